"""Places where a process can be made to die, and guards that can be switched off, for the tests of what is never lost.

Neither does anything unless its environment variable is set:

* NETASSAY_CRASH_AT=<point>[,<point>...]: the process kills itself with SIGKILL when it reaches the point; only the
  first process to get there where NETASSAY_CRASH_ONCE names a folder (a marker file in it remembers).
* NETASSAY_CRASH_ARMED=<folder>: while it runs, a file `<point>` put into the folder is one death: the first process to
  reach the point renames it to `<point>.<its process id>` and kills itself.
* NETASSAY_WITHOUT=<guard>[,<guard>...]: what the guard looks at is not looked at. A fault test that still passes
  without a guard does not test it.
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
    "dispatch.reclaimed",  # a lost worker's chunks taken back, none of them published again
    "dispatch.forgotten",  # all published chunks taken back from a Redis that forgot them, Redis not told
    "dispatch.unpublished",  # chunks whose messages are lost taken back, none of them published again
    "worker.popped",  # message taken and acknowledged, chunk not claimed
    "worker.claimed",  # chunk claimed, no job started
    "worker.died",  # a child has died, its attempt not written
    "worker.reported",  # the attempt written, what is left not run again
    "worker.computed",  # results in memory, nothing committed
    "worker.committed",  # results committed, task not returned
)
GUARDS = (
    "fence",  # late writers are refused
    "claim",  # a chunk is handed out once, and without the jobs that run or have ended elsewhere
    "reconciler",  # lost messages and lost workers are noticed
)

_crash_at = frozenset(filter(None, os.environ.get("NETASSAY_CRASH_AT", "").split(",")))
_armed = os.environ.get("NETASSAY_CRASH_ARMED", "")
_without = frozenset(filter(None, os.environ.get("NETASSAY_WITHOUT", "").split(",")))


def reach(point: str) -> None:
    """Die here if asked to."""
    if _armed:
        try:
            os.rename(f"{_armed}/{point}", f"{_armed}/{point}.{os.getpid()}")
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
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
