"""Limits of time and memory, and what exceptions and exit signals mean.

Time: the supervisor kills the child at its deadline; C code that holds the GIL cannot prevent that.

Memory, twice: on Linux the child lowers its RLIMIT_DATA to what it uses after its imports plus the job's limit, so an
allocation fails inside the job (RLIMIT_AS would break the import of torch, which reserves 3 GiB of address space);
everywhere the supervisor polls the resident memory of the child and its descendants and kills it.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path

import psutil

from netassay.store.artifacts import MissingArtifact

#: Share of the host's memory that all slots together may use.
HOST_SHARE = 0.8
_PAGE = mmap.PAGESIZE


def host_memory() -> int:
    """Bytes this process may use: the host's memory, or its control group's limit where that is lower."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # no control groups here, or "max"
            continue
    return total


def memory_of_slots(configured: int = 0) -> int:
    """Bytes that the jobs of all slots together may use."""
    return configured or int(HOST_SHARE * host_memory())


def resident(pid: int) -> int:
    """Bytes resident in a process and its descendants; 0 where it is gone."""
    total = 0
    for member in family(pid):
        try:
            total += _resident(member)
        except (OSError, psutil.Error):
            continue
    return total


# Both are asked at each request to a child, which waits meanwhile; psutil takes five times as long, and looks through
# all processes of the host to find children.


def _resident(pid: int) -> int:
    if not sys.platform.startswith("linux"):
        return psutil.Process(pid).memory_info().rss
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def family(pid: int) -> list[int]:
    """A process and its descendants; empty where it is gone."""
    if os.path.exists(f"/proc/{pid}/task/{pid}/children"):
        found = [pid]
        for member in found:
            try:
                threads = os.listdir(f"/proc/{member}/task")
            except OSError:  # that process has just ended
                continue
            for thread in threads:
                try:
                    with open(f"/proc/{member}/task/{thread}/children", "rb") as file:
                        found += map(int, file.read().split())
                except OSError:  # that thread has just ended
                    continue
        return found
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def cause_of_exception(error: BaseException) -> str:
    """The cause of a job's failure by the exception it raised (`netassay.method.MethodError` knows its own)."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, MissingArtifact):
        return "store"
    # torch reports a failed allocation on the CPU as a RuntimeError, on an accelerator as OutOfMemoryError.
    words = str(error).lower()
    if type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, RuntimeError | OSError) and (
        "can't allocate memory" in words or "cannot allocate memory" in words or "not enough memory" in words
    ):
        return "memory"
    # Not ZeroDivisionError or OverflowError: mostly a bug of the method, which a kept answer would outlive.
    if isinstance(error, FloatingPointError) or type(error).__name__ == "LinAlgError":
        return "numerical"
    return "error"


def cause_of_exit(code: int) -> tuple[str, str]:
    """Cause and message for a child that ended by itself: code as `subprocess` gives it, a signal as negative."""
    if code >= 0:
        return "crash", f"the process exited with code {code} in the middle of the job"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        # Not our kill (those are named by their reason): on Linux nearly always the kernel, out of memory.
        return "memory", "the process was killed by SIGKILL from outside; most often the kernel, out of memory"
    return "crash", f"the process died of {name}"
