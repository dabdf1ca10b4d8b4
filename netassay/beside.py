"""Times of other tools on the same instances, read from a CSV file, to be drawn beside a batch's own.

    onnx,vnnlib,timeout,verdict,first tool,second tool
    f.onnx,prop_1.vnnlib,116,unsat,unsat:9.187,timeout:116.2
    f.onnx,prop_2.vnnlib,116,sat,sat:0.5,error

A line is an instance: a network (column `onnx` or `network`) and a property (column `vnnlib` or `property`), told by
the names of their files without folders and `.gz`. Every other column in which a cell reads `verdict:seconds`, or
seconds alone, is a tool; but for `timeout`. An instance counts as decided where the verdict is sat or unsat, or where
seconds stand alone; an empty cell, `-`, unknown, timeout and error are no decision.

What is drawn is a cactus plot: the k-th smallest of a tool's times against k, so that a line says how many instances
were decided within a time, each given that much.

Reference: Brain, Davenport, Griggio. Benchmarking solvers, SAT-style. 2017.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from netassay import files
from netassay.errors import UserError
from netassay.figure import Axis, Line, Panel

if TYPE_CHECKING:
    from netassay.job import Record

#: (network, property), names of files.
Instance: TypeAlias = tuple[str, str]

#: Bytes of a file, and tools that lines of a figure tell apart.
LIMIT, TOOLS = 32 * 2**20, 13
#: Seconds where the axis begins, and lines that colour alone tells apart.
_SHORTEST, _COLOURS = 1e-3, 7
_OURS = "this batch"
_NETWORK, _PROPERTY, _TIMEOUT = ("onnx", "network"), ("vnnlib", "property"), ("timeout",)
_DECIDED, _OPEN = ("sat", "unsat"), ("", "-", "unknown", "timeout", "error")
_CELL = re.compile(r"(?:([a-z]+) *: *)?([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf(?:inity)?|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Times:
    """name: of the file. instances: all that stand in it. tools: tool -> the seconds of each instance it decided."""

    name: str
    instances: frozenset[Instance]
    tools: Mapping[str, Mapping[Instance, float]]


def instance(network: str, property: str) -> Instance:
    """What both sides call an instance, whatever the folders of its files and whether they are packed."""
    first, second = (PurePosixPath(name.strip().replace("\\", "/")).name for name in (network, property))
    return first.removesuffix(".gz"), second.removesuffix(".gz")


def read(file: str | os.PathLike[str]) -> Times:
    """The times in a CSV file, which may be packed with gzip. Raises UserError naming the line and the column."""
    path = Path(file)
    try:
        text = files.read(path, LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no CSV file: byte {error.start} is not UTF-8") from None
    except files.Unreadable as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: this is no CSV: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty; its first line names the columns: onnx,vnnlib and one a tool")
    return _times(path, rows[0][1], rows[1:])


def _times(path: Path, header: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> Times:
    for place, name in enumerate(header):
        if not name or name in header[:place]:
            raise UserError(
                f"{path}, line 1: column {place + 1} {'is given twice' if name else 'has no name'}: {name!r}"
            )
    network, wanted = _column(path, header, _NETWORK), _column(path, header, _PROPERTY)
    lines: dict[Instance, int] = {}
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: it has {len(cells)} cells, the header has {len(header)}")
        for place in (network, wanted):
            if not cells[place]:
                raise UserError(f"{path}, line {line}, column {header[place]!r}: it is empty; it must name a file")
        asked = instance(cells[network], cells[wanted])
        if asked in lines:
            raise UserError(f"{path}, line {line}: {' and '.join(asked)} stand in line {lines[asked]} too")
        lines[asked] = line
    known = {network, wanted, *(place for place, name in enumerate(header) if name.lower() in _TIMEOUT)}
    tools = {
        name: _decided(
            path, name, {asked: (line, cells[place]) for asked, (line, cells) in zip(lines, rows, strict=True)}
        )
        for place, name in enumerate(header)
        if place not in known and any(_CELL.fullmatch(cells[place]) for _, cells in rows)
    }
    if not tools:
        raise UserError(
            f"{path} has no column of times: in none of {', '.join(header)} is a cell such as unsat:1.5 or 1.5"
        )
    if len(tools) > TOOLS:
        raise UserError(f"{path} has {len(tools)} columns of times; lines of at most {TOOLS} can be told apart")
    return Times(path.name, frozenset(lines), tools)


def _column(path: Path, header: Sequence[str], names: Sequence[str]) -> int:
    found = [place for place, name in enumerate(header) if name.lower() in names]
    if len(found) != 1:
        raise UserError(
            f"{path}, line 1: {len(found) or 'no'} columns are called {' or '.join(names)}, must be one; there are: "
            f"{', '.join(header)}"
        )
    return found[0]


def _decided(path: Path, name: str, cells: Mapping[Instance, tuple[int, str]]) -> dict[Instance, float]:
    found: dict[Instance, float] = {}
    for asked, (line, cell) in cells.items():
        match = _CELL.fullmatch(cell)
        verdict = (match[1] or "") if match else cell
        seconds = float(match[2]) if match else None
        if seconds is None and verdict.lower() not in _OPEN:
            why = "it must be verdict:seconds, seconds, or one of unknown, timeout and error"
        elif verdict.lower() not in (*_DECIDED, *_OPEN):
            why = f"{verdict!r} is no verdict: sat, unsat, unknown, timeout or error"
        elif seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            why = "seconds are finite and not below 0"
        else:
            if seconds is not None and (not verdict or verdict.lower() in _DECIDED):
                found[asked] = seconds
            continue
        shown = cell if len(cell) <= 40 else f"{cell[:40]}..."
        raise UserError(f"{path}, line {line}, column {name!r}: {shown!r} is no time of a tool; {why}")
    return found


def cactus(records: Sequence[Record], times: Times, decided: Callable[[Record], bool]) -> tuple[Panel, str]:
    """Instances within a time, by tool, of those that the records and the file have in common; and a sentence on them.

    records: of a method that asks a `property` of a `network`. Raises UserError where they have none in common, and
    where one is asked twice.
    """
    asked: dict[Instance, Record] = {}
    for record in records:
        one = instance(record.name("network"), record.name("property"))
        if one in asked:
            raise UserError(
                f"{one[1]} is asked of {one[0]} more than once, with other parameters or in another batch, and the "
                "line of a tool counts it once; name one batch in which each instance stands once"
            )
        asked[one] = record
    shared = [one for one in asked if one in times.instances]
    if not shared:
        here, there = (" with ".join(min(side, default=("none",))) for side in (asked, times.instances))
        raise UserError(
            f"{times.name} has none of these instances, which are told by the names of their files: {here} here, "
            f"{there} there"
        )
    seconds = {_OURS: [asked[one].seconds for one in shared if decided(asked[one])]}
    for tool, ended in times.tools.items():
        seconds[f"{tool} ({times.name})" if tool == _OURS else tool] = [ended[one] for one in shared if one in ended]
    said = (
        f" Beside other tools: the {len(shared):,} instances that {times.name} has too. Seconds of this batch are run "
        "time on its workers, of a vectorised group a job's share; those of the others are as the file gives them."
    )
    return within(seconds, "Decided, beside other tools"), said


def within(seconds: Mapping[str, Sequence[float]], title: str) -> Panel:
    """A line for each label: how many of its times are within a time. Labels without any have none."""
    marks: list[Any] = []
    for place, (label, found) in enumerate(seconds.items()):
        x = sorted(max(time, _SHORTEST) for time in found)
        if x:
            y = list(range(1, len(x) + 1))
            marks.append(Line(x=list(x), y=list(y), label=label, points=len(x) == 1, dashed=place >= _COLOURS))
    return Panel(
        title=title,
        x=Axis(label="seconds of one instance", scale="log"),
        y=Axis(label="instances within that time", low=0),
        marks=marks,
    )
