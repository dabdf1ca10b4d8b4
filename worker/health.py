"""`python -m worker.health`: does the worker of this host show signs of life? Exit code 0 where it does.

It asks the store, as the dispatcher does, and neither Redis nor the worker's own word: a worker that hangs, or cannot
reach the store, does not move its counter. Where several workers run on one host, one that lives is enough.
"""

from __future__ import annotations

import socket
import sys
import time

from netassay.errors import UserError
from netassay.settings import settings
from netassay.store.database import Database, Outage
from netassay.store.dispatching import alive_workers

#: A counter moves about once a second; a busy store may hold it up.
WAIT_SECONDS = 8.0


def counters(database: Database, host: str) -> dict[int, int]:
    """Worker -> counter, of those on this host that have not signed off."""
    with database.read() as connection:
        return {worker.id: worker.counter for worker in alive_workers(connection) if _is_on(host, worker.name)}


def _is_on(host: str, name: str) -> bool:
    return name.rpartition("-")[0] == host  # see `Supervisor.name`


def moves(database: Database, host: str, seconds: float = WAIT_SECONDS) -> bool:
    """Whether the counter of a worker on this host moves within so many seconds."""
    before, deadline = counters(database, host), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = counters(database, host)
        if any(now[worker] > before[worker] for worker in now.keys() & before.keys()):
            return True
        before = {**now, **before}
    return False


def main() -> int:
    host = socket.gethostname()
    try:
        if moves(Database(settings().store_url), host):
            return 0
        print(f"no worker on {host} has shown a sign of life for {WAIT_SECONDS:.0f} s; see its log", file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
    except Outage as error:
        print(f"the store does not answer: {error.orig}; check NETASSAY_STORE", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
