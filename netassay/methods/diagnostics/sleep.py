"""A job that sleeps inside one C call.

    wall time of the job >= s,  CPU time ~ 0        s: seconds

The call is nanosleep(2), entered either with Python's interpreter lock held, as a badly behaved extension does (nothing
else in the process can run, so only another process can end it), or with the lock released. A signal that Python
handles in between does not shorten the sleep. Not vectorised: sleeping side by side is what slots are for.
Cost: s seconds of wall time. Needs a POSIX system.
"""

from __future__ import annotations

import ctypes

from netassay.fields import Seconds
from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
EXAMPLE = {"jobs": [{"method": "diagnostics.sleep", "params": {"seconds": 0.02}, "grid": {"hold_lock": [False, True]}}]}


class Params(Contract):
    seconds: Seconds = 1.0
    hold_lock: bool = False
    """Whether the C call keeps Python's interpreter lock."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    seconds: float
    """The seconds asked for."""


class _Timespec(ctypes.Structure):
    # time_t and long are both `long` on the 64-bit systems PyTorch runs on.
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def needs(params: Params) -> Needs:
    return Needs(seconds=params.seconds, libraries=())


def run(params: Params) -> Result:
    with _side_log.witnessed(params.log, name(params)):
        library = ctypes.PyDLL(None) if params.hold_lock else ctypes.CDLL(None)
        whole = int(params.seconds)
        time_left = _Timespec(whole, int((params.seconds - whole) * 1e9))
        # Interrupted by a signal, nanosleep returns -1 and leaves in its second argument what remains.
        while library.nanosleep(ctypes.byref(time_left), ctypes.byref(time_left)) == -1:
            pass
    return Result(seconds=params.seconds)


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"sleep {params.seconds!r} {params.hold_lock} {params.tag}"
