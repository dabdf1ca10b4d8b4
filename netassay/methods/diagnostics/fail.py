"""A job that fails with a given cause.

    invalid_input, numerical, not_applicable      an end that a method foresees, with its reason
    error, memory                                 an unexpected exception: RuntimeError, MemoryError
    exit, interrupt                               SystemExit, KeyboardInterrupt: not caught by `except Exception`
    unstorable                                    a result that no store takes
    none                                          no failure

In `run_many` the foreseen ones fail their own job only; the others end the whole call, as a real mistake would, and the
lab has to find the culprit by running the jobs one by one. Cost: none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from netassay.method import Contract, Failure, InvalidInput, MethodError, Needs, NotApplicable, NumericalError
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
NEEDS = Needs(seconds=2e-5, libraries=(), group=100)
EXAMPLE = {
    "jobs": [
        {"method": "diagnostics.fail", "grid": {"cause": ["none", "invalid_input", "numerical", "not_applicable"]}}
    ]
}


class Params(Contract):
    cause: Literal[
        "none", "invalid_input", "numerical", "not_applicable", "error", "memory", "exit", "interrupt", "unstorable"
    ] = "error"
    """How the job fails."""
    message: str = "failed as asked"
    """What the failure says."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    value: Any
    """Null; of an unstorable result, an object that no rule of the store covers."""


_RAISED: dict[str, Callable[[str], BaseException]] = {
    "invalid_input": lambda message: InvalidInput(message, "the job was asked to fail", "cause: none"),
    "numerical": NumericalError,
    "not_applicable": NotApplicable,
    "error": RuntimeError,
    "memory": MemoryError,
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
}


def run(params: Params) -> Result:
    with _side_log.witnessed(params.log, name(params)):
        if params.cause in _RAISED:
            raise _RAISED[params.cause](params.message)
    return Result(value=object() if params.cause == "unstorable" else None)


def run_many(many: list[Params]) -> list[Result | Failure]:
    ends: list[Result | Failure] = []
    for params in many:
        try:
            ends.append(run(params))
        except MethodError as error:
            ends.append(Failure.of(error))
    return ends


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"fail {params.cause} {params.tag}"
