"""A job that returns what it was given, and the square of a number.

    result = (v, v^2)        v: the value; of text, the square is null

The cheapest job there is, for measuring what the lab itself costs and for counting jobs in and out. It says nothing
about networks. Cost: some microseconds a job, and one disk sync a `run_many` call for each line of the side log.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from netassay import figure
from netassay.fields import Real
from netassay.job import Record
from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
# Measured through `run_many` with 1,000 jobs: 3 us a job; the rest is what storing one record was planned with.
NEEDS = Needs(seconds=2e-5, libraries=(), group=1000)
EXAMPLE = {
    "jobs": [
        {"method": "diagnostics.echo", "grid": {"value": {"range": [0, 3]}}},
        {"method": "diagnostics.echo", "grid": {"value": [0.5, "text"]}},
    ]
}


# Signed 64 bits: what every database and JSON reader takes.
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Params(Contract):
    value: Whole | Real | str
    """What to return."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    value: int | float | str
    """The value given."""
    square: int | float | None
    """Its square; null for text. Infinite where a float's square overflows."""


def run(params: Params) -> Result:
    return run_many([params])[0]


def run_many(many: list[Params]) -> list[Result]:
    """Results in order. Side logs get all start lines of the group before all its end lines."""
    jobs: dict[str, list[str]] = {}
    for params in many:
        if params.log:
            jobs.setdefault(params.log, []).append(name(params))
    for path, names in jobs.items():
        _side_log.append(path, "start", names)
    results = [Result(value=params.value, square=_square(params.value)) for params in many]
    for path, names in jobs.items():
        _side_log.append(path, "end", names)
    return results


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"echo {params.value!r} {params.tag}"


def _square(value: int | float | str) -> int | float | None:
    return None if isinstance(value, str) else value * value


def plot(records: list[Record]) -> figure.Figure:
    """The square against the value, of numbers only."""
    found = sorted(
        (record.result["value"], record.result["square"])
        for record in records
        if record.state == "done" and record.result is not None and record.result["square"] is not None
    )
    points = figure.Points(x=[value for value, _ in found], y=[square for _, square in found])
    panel = figure.Panel(x=figure.Axis(label="value"), y=figure.Axis(label="square"), marks=[points])
    return figure.Figure(title="Echo", panels=[panel])
