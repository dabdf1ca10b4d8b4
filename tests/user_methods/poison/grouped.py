"""Jobs that run together, one of which may spoil it for all.

A method as a user would add one, for the tests of what becomes of the neighbours.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import time
from typing import Literal

from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
NEEDS = Needs(seconds=0.002, libraries=(), group=40)
EXAMPLE = {"jobs": [{"method": "poison.grouped", "grid": {"tag": [0, 1]}}]}


class Params(Contract):
    how: Literal["well", "crash", "allocate", "spin", "raise", "late"] = "well"
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    tag: int


def run(params: Params) -> Result:
    return run_many([params])[0]


def run_many(many: list[Params]) -> list[Result]:
    names = [name(params) for params in many]
    _side_log.append(many[0].log, "start", names)
    for params in many:
        _behave(params.how)
    _side_log.append(many[0].log, "end", names)
    return [Result(tag=params.tag) for params in many]


def _behave(how: str) -> None:
    if how == "crash":
        print("the last words of a job", flush=False)
        ctypes.string_at(0)
    elif how == "allocate":
        kept = []
        while True:
            kept.append(b"\x01" * 2**22)
    elif how == "spin":
        collections.deque(itertools.repeat(None), maxlen=0)  # in C, for ever, with the interpreter lock held
    elif how == "late":
        time.sleep(0.6)
        raise RuntimeError("the whole call fails, after a while")
    elif how == "raise":
        raise RuntimeError("the whole call fails")


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"grouped {params.how} {params.tag}"
