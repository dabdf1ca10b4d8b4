"""Places where a process can be made to die, and guards that can be switched off, for the tests of what is never lost.

Neither does anything unless its environment variable is set:

* NETASSAY_CRASH_AT=<point>[,<point>...]: the process kills itself with SIGKILL when it reaches the point; only the
  first process to get there where NETASSAY_CRASH_ONCE names a folder (a marker file in it remembers).
* NETASSAY_WITHOUT=<guard>[,<guard>...]: `fence` (late writers are not refused), `reconciler` (lost messages and lost
  workers are not noticed). A fault test that still passes without a guard does not test it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    "submit.arriving",  # jobs written, batch not open yet
    "submit.opened",  # batch open and synced, nothing printed yet
    "import.arriving",  # jobs and records of one batch of a file written, batch not open yet
    "import.opened",  # one batch of a file open and synced, the next not begun
    "dispatch.marked",  # chunk marked published, message not sent
    "dispatch.sent",  # message sent
    "worker.popped",  # message taken and acknowledged, chunk not claimed
    "worker.claimed",  # chunk claimed, no job started
    "worker.computed",  # results in memory, nothing committed
    "worker.committed",  # results committed, task not returned
)
GUARDS = ("fence", "reconciler")

_crash_at = frozenset(filter(None, os.environ.get("NETASSAY_CRASH_AT", "").split(",")))
_without = frozenset(filter(None, os.environ.get("NETASSAY_WITHOUT", "").split(",")))


def reach(point: str) -> None:
    """Die here if asked to."""
    if point not in _crash_at:
        return
    once = os.environ.get("NETASSAY_CRASH_ONCE")
    if once:
        try:
            (Path(once) / point).touch(exist_ok=False)
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)


def guarded(guard: str) -> bool:
    """Whether this guard is on (it is, outside the tests that show what it is for)."""
    return guard not in _without
