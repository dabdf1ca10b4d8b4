"""A job that keeps one core busy for a given time.

    CPU time of the job ~ s        s: seconds asked for

Busy either in Python byte code, or inside one long C call that holds Python's interpreter lock (no thread of the
process, hence no Python signal handler, runs meanwhile) or releases it. The length of a C call is calibrated by short
calls first, so its CPU time is within some 20 % of s. Cost: s seconds.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import time
from collections.abc import Callable
from typing import Literal

from netassay.fields import Seconds
from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
EXAMPLE = {
    "jobs": [
        {
            "method": "diagnostics.burn",
            "params": {"seconds": 0.05},
            "grid": {"busy": ["python", "c", "c_without_lock"]},
        }
    ]
}


class Params(Contract):
    seconds: Seconds = 1.0
    busy: Literal["python", "c", "c_without_lock"] = "python"
    """Where the time goes: byte code, one C call holding the interpreter lock, or one C call that released it."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    seconds: float
    """The seconds asked for."""


def needs(params: Params) -> Needs:
    return Needs(seconds=params.seconds, libraries=())


def run(params: Params) -> Result:
    with _side_log.witnessed(params.log, name(params)):
        if params.busy == "python":
            end = time.thread_time() + params.seconds
            while time.thread_time() < end:
                pass
        elif params.busy == "c":
            _burn(_drain, params.seconds)
        else:
            _burn(_hash, params.seconds)
    return Result(seconds=params.seconds)


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"burn {params.seconds!r} {params.busy} {params.tag}"


def _drain(steps: int) -> None:
    collections.deque(itertools.repeat(None, steps), maxlen=0)


def _hash(steps: int) -> None:
    hashlib.pbkdf2_hmac("sha256", b"", b"", steps)


def _burn(call: Callable[[int], None], seconds: float) -> None:
    """One call of `call(steps)` that takes about `seconds` of CPU, after growing trials that find the rate."""
    begin = time.thread_time()
    steps, spent = 1000, 0.0
    # 5 ms is 5,000 ticks of a microsecond clock, and little beside any job worth timing.
    while spent < min(0.005, seconds / 4):
        steps *= 2
        before = time.thread_time()
        call(steps)
        spent = time.thread_time() - before
    left = seconds - (time.thread_time() - begin)
    if left > 0 and spent > 0:
        call(max(1, int(steps * left / spent)))
