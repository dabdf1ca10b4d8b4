"""A submission in a fresh process, whose peak memory is its own: `python submitter.py SYSTEM SECONDS FIRST N`.

SECONDS: CPU time of a job; negative: jobs that do nothing. FIRST: value, or tag, of the first job. Prints, as JSON,
when the submission began and ended (the machine's monotonic clock) and the process's peak memory in bytes. Imports, and
the first connection, are over before the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

#: What the documentation of RQ submits at once.
RQ_BATCH = 1000


def peak() -> int:
    """Most bytes that were ever resident in this process since it became this program."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def netassay(seconds: float, first: int, jobs: int) -> Callable[[], object]:
    from netassay.settings import Settings
    from netassay.store import submission as _  # noqa: F401 - imported at first use otherwise
    from producer import submission

    config = Settings()
    document = {"name": f"bench-{first}", "jobs": [entry(seconds, first, jobs)]}
    return lambda: submission.submit(document, config)


def entry(seconds: float, first: int, jobs: int) -> dict:
    """The sweep's only entry."""
    values = {"range": [first, first + jobs]}
    if seconds < 0:
        return {"method": "diagnostics.echo", "grid": {"value": values}}
    return {"method": "diagnostics.burn", "params": {"seconds": seconds}, "grid": {"tag": values}}


def celery(seconds: float, first: int, jobs: int) -> Callable[[], object]:
    import celery_peer

    celery_peer.app.connection_for_write().ensure_connection()

    def submit() -> None:
        if seconds < 0:
            for value in range(first, first + jobs):
                celery_peer.square.delay(value)
        else:
            for tag in range(first, first + jobs):
                celery_peer.spend.delay(seconds, tag)

    return submit


def rq(seconds: float, first: int, jobs: int) -> Callable[[], object]:
    import redis
    import work
    from rq import Queue

    queue = Queue(connection=redis.Redis.from_url(os.environ["BENCH_RQ"]))
    queue.connection.ping()

    def submit() -> None:
        for start in range(first, first + jobs, RQ_BATCH):
            numbers = range(start, min(start + RQ_BATCH, first + jobs))
            if seconds < 0:
                queue.enqueue_many([Queue.prepare_data(work.square, (value,)) for value in numbers])
            else:
                queue.enqueue_many([Queue.prepare_data(work.spend, (seconds, tag)) for tag in numbers])

    return submit


def main() -> None:
    name, seconds, first, jobs = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    submit = {"netassay": netassay, "celery": celery, "rq": rq}[name](seconds, first, jobs)
    began = time.monotonic()
    submit()
    ended = time.monotonic()
    print(json.dumps({"began": began, "ended": ended, "peak": peak()}))


if __name__ == "__main__":
    main()
