"""`python -m worker NAME SLOTS [PREDECESSOR]`: the worker of a host, in the foreground; its settings come from the
environment. PREDECESSOR: number of the process whose place it takes, as that one died.

It is what `celery --app worker.app worker --pool threads --concurrency SLOTS` runs, without Celery's command line: that
loads all its verbs first, Flower with its web server and a library of prompts among them, a third of a worker's start.
"""

from __future__ import annotations

import socket
import sys

from netassay.store.dispatching import QUEUE
from worker import app as ours
from worker.app import app


def main() -> int:
    """Run until SIGTERM. Returns the exit code."""
    name, slots = sys.argv[1], int(sys.argv[2])
    ours.predecessor = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    worker = app.Worker(
        hostname=f"{name}@{socket.gethostname()}",
        pool_cls="threads",
        concurrency=slots,
        queues=QUEUE,
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return worker.exitcode or 0


if __name__ == "__main__":
    sys.exit(main())
