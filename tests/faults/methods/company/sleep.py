"""Jobs that sleep together in one call, one of which may end the process in its turn.

A method as a user would add one: the diagnostics that vectorise take no time, so nobody is ever killed in their midst.
"""

from __future__ import annotations

import ctypes
import time

from netassay.fields import Seconds
from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
EXAMPLE = {"jobs": [{"method": "company.sleep", "params": {"seconds": 0.01}, "grid": {"tag": [0, 1]}}]}


class Params(Contract):
    seconds: Seconds = 0.1
    spoil: bool = False
    """Read from address 0 instead of sleeping."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    seconds: float
    """The seconds asked for."""


def needs(params: Params) -> Needs:
    return Needs(seconds=params.seconds, libraries=(), group=8)


def run(params: Params) -> Result:
    return run_many([params])[0]


def run_many(many: list[Params]) -> list[Result]:
    """Results in order. The side log gets all start lines before the first job's turn, all end lines after the last."""
    names = [name(params) for params in many]
    _side_log.append(many[0].log, "start", names)
    for params in many:
        if params.spoil:
            ctypes.string_at(0)
        time.sleep(params.seconds)
    _side_log.append(many[0].log, "end", names)
    return [Result(seconds=params.seconds) for params in many]


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"company {params.seconds!r} {params.spoil} {params.tag}"
