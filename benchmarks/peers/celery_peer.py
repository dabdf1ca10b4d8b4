"""Plain Celery as its documentation recommends it for jobs that must not get lost: acknowledged late, taken one by one.

BENCH_BROKER, BENCH_RESULTS: URLs of databases of Redis; without the second, results are ignored.
"""

from __future__ import annotations

import os

import work
from celery import Celery

app = Celery("peer", broker=os.environ["BENCH_BROKER"], backend=os.environ.get("BENCH_RESULTS") or None)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=not os.environ.get("BENCH_RESULTS"),
    task_serializer="json",
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
)

square = app.task(name="square")(work.square)
spend = app.task(name="spend")(work.spend)
