"""The Celery app of a worker: one task, `netassay.run_chunk`, on a pool of threads.

Started as `python -m worker` by `netassay up` and `netassay worker`, or by hand as `celery --app worker.app worker
--pool threads --concurrency SLOTS` with NETASSAY_BROKER, NETASSAY_STORE and NETASSAY_ARTIFACTS set.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import structlog
from celery import Celery, signals
from celery.exceptions import SecurityWarning

from netassay import logs
from netassay.settings import settings
from netassay.store.database import PATIENCE, Database
from netassay.store.dispatching import QUEUE, TASK, key_prefix
from worker import messages
from worker.supervisor import Supervisor

# To root it speaks of the dangers of pickle, which is not accepted here.
warnings.filterwarnings("ignore", category=SecurityWarning)

messages.be_careful()
app = Celery("netassay", broker=settings().broker)
app.conf.update(
    # The message is only a doorbell: the claim in the store is the acknowledgement, so the message may go at once, and
    # a lost or doubled one does no harm. Hence no visibility timeout, no redelivery, no result backend.
    task_acks_late=False,
    task_ignore_result=True,
    result_backend=None,
    task_serializer="json",
    accept_content=["json"],
    task_default_queue=QUEUE,
    task_create_missing_queues=True,
    # A chunk taken ahead by a busy worker would wait there while another is idle.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_enable_prefetch_count_reduction=False,  # after a lost connection; for late acknowledgement
    worker_send_task_events=True,  # for Flower; they are per chunk
    worker_enable_remote_control=True,
    worker_hijack_root_logger=False,
    # It is about late acknowledgement, which is off; as a default it fills the log with a warning of its own change.
    worker_cancel_long_running_tasks_on_connection_loss=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_pool_acquire_timeout=30,
    broker_transport_options={
        "health_check_interval": 25,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
    },
)


@app.on_after_configure.connect
def _name_keys(sender: Celery, **_: Any) -> None:
    """All keys in Redis begin with the lab's own id, which the store knows."""
    database = Database(settings().store_url)
    try:
        database.prepare()
        prefix = database.persist(PATIENCE, lambda: key_prefix(database))
    finally:
        database.dispose()
    sender.conf.broker_transport_options = {**sender.conf.broker_transport_options, "global_keyprefix": prefix}


_supervisor: Supervisor | None = None
#: Process of the worker whose place this one takes; set before it starts. 0: of none.
predecessor = 0


@app.task(name=TASK)
def run_chunk(chunk_id: int, label: str = "") -> None:
    """Run one chunk; `label` (batch / method / range) is for people who look at Flower."""
    if _supervisor is None:
        raise RuntimeError("this worker has not signed on")
    with structlog.contextvars.bound_contextvars(chunk=chunk_id, batch=label.rsplit(" / ", 2)[0]):
        _supervisor.run(chunk_id)


def _about() -> dict[str, Any]:
    return {"worker": _supervisor.worker_id} if _supervisor is not None else {}


if logs.as_json():
    # Flower is started with this app as well. Celery leaves logging alone where somebody listens to this signal.
    logs.configure("flower" if "flower" in sys.argv else "worker", _about)
    signals.setup_logging.connect(lambda **_: None, weak=False)


@signals.worker_init.connect
def _start(sender: Any = None, **_: Any) -> None:
    global _supervisor
    if not logs.as_json():
        logs.configure("worker")
    concurrency = sender.concurrency if sender is not None else 1
    try:
        supervisor = Supervisor(settings(), int(concurrency))
        supervisor.start(predecessor)
    except Exception as error:
        # Celery only notes what a signal's receiver raises, and would go on to take messages that nobody can run.
        logs.complain(f"the worker cannot start: {error}")
        raise SystemExit(1) from error
    _supervisor = supervisor


@signals.worker_shutting_down.connect
def _stop(**_: Any) -> None:
    if _supervisor is not None:
        _supervisor.stop()


@signals.worker_shutdown.connect
def _close(**_: Any) -> None:
    if _supervisor is not None:
        _supervisor.close()
