"""Plain Celery under the same kills: what the oracle has to report of a lab that keeps its jobs in Redis alone.

    python -m tests.faults.plain_celery --jobs 4000 --kills 25 --seed 1

One task with `acks_late`, two prefork processes, a prefetch of one: as Celery's own documentation advises where no job
may be lost. Each job appends to a synced side log as the diagnostics do. The visibility timeout and the sweeps for lost
messages are set to seconds, far quicker than their defaults, so that what can be found again is found within the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import redis
from celery import Celery

from netassay.methods.diagnostics import _side_log

#: Seconds after which Redis' transport gives an unacknowledged message out again.
VISIBILITY = 5
QUEUE = "plain"
#: In which all that can be found again has to be.
REST_SECONDS = 300.0

app = Celery("plain", broker=os.environ.get("PLAIN_BROKER", ""))
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    task_default_queue=QUEUE,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)


@app.task(name="plain.job")
def job(number: int) -> int:
    """A job of some ten milliseconds that says when it starts and ends."""
    with _side_log.witnessed(os.environ["PLAIN_LOG"], str(number)):
        time.sleep(0.01)
    return number * number


@dataclass
class Found:
    """What the oracle has to say. again: jobs that ran to their end more than once."""

    jobs: int
    kills: int = 0
    lost: list[str] = field(default_factory=list)
    never_started: int = 0
    left: int = 0
    """messages that Redis still held at the end: as many of `lost` may only be late"""
    again: int = 0
    seconds: float = 0.0


def assay(jobs: int, kills: int, seed: int, pause: tuple[float, float] = (1.0, 3.0)) -> Found:
    """Submit so many jobs, kill the worker (all its processes) so often while it is busy, wait for rest, and look."""
    from services import RedisServer

    draw, found, began = random.Random(seed), Found(jobs), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-")))
        server = RedisServer(folder / "redis")
        server.start()
        stack.callback(server.kill)
        log = folder / "side.log"
        environment = {
            **os.environ,
            "PLAIN_BROKER": server.url,
            "PLAIN_LOG": str(log),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        app.conf.broker_url = server.url
        with app.connection_for_write(server.url) as connection:
            producer = app.amqp.Producer(connection)
            for number in range(jobs):
                job.apply_async((number,), producer=producer, connection=connection)
        worker = _start(environment, folder)
        stack.callback(lambda: _end(worker))
        while found.kills < kills:
            # Only a worker that is at work is worth a kill.
            before = _ended(log)
            deadline = time.monotonic() + 60
            while _ended(log) <= before + 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            if time.monotonic() > deadline or _ended(log) >= jobs:
                break
            time.sleep(draw.uniform(*pause) / 2)
            _end(worker)
            found.kills += 1
            worker = _start(environment, folder)
        still, rest, deadline = time.monotonic(), -1, time.monotonic() + REST_SECONDS
        with contextlib.closing(redis.Redis.from_url(server.url)) as client:
            # Whatever Redis still holds, in its list or as unacknowledged, is late and not lost.
            while (now := len(_done(log))) < jobs and time.monotonic() < deadline:
                found.left = client.llen(QUEUE) + client.hlen("unacked")
                if found.left or now != rest:
                    still, rest = time.monotonic(), now
                if time.monotonic() - still > 3 * VISIBILITY:
                    break
                time.sleep(0.5)
        _judge(found, log)
    found.seconds = time.monotonic() - began
    return found


def _start(environment: dict[str, str], folder: Path) -> subprocess.Popen:
    command = (
        "celery --app tests.faults.plain_celery --quiet worker --pool prefork --concurrency 2 --without-gossip "
        "--without-mingle --without-heartbeat --loglevel ERROR --queues"
    )
    with open(folder / "worker.log", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command.split(), QUEUE],
            env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def _end(worker: subprocess.Popen) -> None:
    """Kill the worker with its processes, as a host that goes down does."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _ended(log: Path) -> int:
    """End lines so far."""
    return log.read_bytes().count(b'"end"') if log.exists() else 0


def _done(log: Path) -> set[str]:
    """Jobs that ran to their end."""
    return {line.job for line in _side_log.read(log) if line.event == "end"}


def _judge(found: Found, log: Path) -> None:
    lines = _side_log.read(log)
    started, ends = {line.job for line in lines}, Counter(line.job for line in lines if line.event == "end")
    found.lost = [str(number) for number in range(found.jobs) if str(number) not in ends]
    found.never_started = sum(number not in started for number in found.lost)
    found.again = sum(count > 1 for count in ends.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.plain_celery", description=__doc__)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    found = []
    for number in range(asked.runs):
        found.append(assay(asked.jobs, asked.kills, asked.seed + number))
        print(f"run {number + 1}: {found[-1]}", flush=True)
        if asked.report is not None:
            asked.report.write_text(json.dumps([asdict(one) for one in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
