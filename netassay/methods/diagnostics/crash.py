"""A job that ends its process, as broken native code does.

    signal in {SIGSEGV, SIGABRT, SIGKILL, SIGTERM}, or exit with a code, or none

SIGSEGV is a real read from address 0 and SIGABRT a real abort(3); neither raises a Python exception, so only a
supervising process can tell what happened. With `none` the job survives: that is the example. Run it in a lab, not by
`netassay run`, which would end with it. Cost: none.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Annotated, Literal

from pydantic import Field

from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
NEEDS = Needs(seconds=0.001, libraries=())
EXAMPLE = {"jobs": [{"method": "diagnostics.crash", "params": {"by": "none"}, "grid": {"tag": [0, 1]}}]}


class Params(Contract):
    by: Literal["SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM", "exit", "none"] = "SIGSEGV"
    """How the process ends."""
    code: Annotated[int, Field(ge=0, le=255, description="exit code, where `by` is exit")] = 1
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    survived: bool
    """Always true: a job that ended its process returns nothing."""


def run(params: Params) -> Result:
    with _side_log.witnessed(params.log, name(params)):
        if params.by == "SIGSEGV":
            ctypes.string_at(0)
        elif params.by == "SIGABRT":
            os.abort()
        elif params.by == "exit":
            os._exit(params.code)
        elif params.by != "none":
            os.kill(os.getpid(), getattr(signal, params.by))
    return Result(survived=True)


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"crash {params.by} {params.tag}"
