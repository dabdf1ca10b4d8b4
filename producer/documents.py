"""Documents: what is written down, its structure checked, before any row of it is looked at.

`producer.sweeps` shows what a document looks like; `producer.readers` makes one of files in any format.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netassay.errors import UserError
from producer import axes, plain, tables, wording
from producer.plain import Unreadable
from producer.tables import Source, Table

#: Errors that a message shows and that are kept; beyond, they are counted only (a million rows can be wrong).
SHOWN, KEPT = 20, 1000
#: Characters of one of them that are shown: it may quote what it refuses.
LONGEST_MESSAGE = 2_000
#: The most points that the axes of one entry may make.
MOST_ROWS = 10_000_000
#: The largest limit of memory: databases keep it as a whole number of 64 bits. A multiple of 1024, so that it is the
#: same as a float.
MOST_BYTES = 2**63 - 1024

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One item of a document's `jobs`: a row for each row of `table` x point of `grid` x `zip` x `random`.

    number: its place in its file, from 1; 0 where the file is the table itself. method: empty where each row of the
    table names its own. grid, zip, random: axis -> its values, in order; the axes of `grid` make a product, those of
    `zip` go in step, and so do those of `random`. base: the folder its paths start from (None: where the resolver is).
    networks, datasets: the names its file gives. source: its file, where a document has several.
    """

    number: int
    method: str
    params: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    time_limit: float | None = None
    memory_limit: int | None = None
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    random: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    table: Table | None = None
    base: Path | None = None
    networks: Mapping[str, Any] = field(default_factory=dict)
    datasets: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def rows(self) -> int:
        """How many rows, without making them; the rows of a file are counted."""
        return self.points * (1 if self.table is None else len(self.table))

    @property
    def points(self) -> int:
        """How many points the axes make: rows, but for a table."""
        steps = (len(next(iter(axes.values()))) for axes in (self.zip, self.random) if axes)
        return math.prod(map(len, self.grid.values())) * math.prod(steps)

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.grid, *self.zip, *self.random)


@dataclass(frozen=True)
class Document:
    """What was written, its structure checked. base: folder its paths start from. source: its name in messages.

    Of several files, `networks`, `datasets` and `base` are the first one's: each entry has those of its own file.
    """

    jobs: tuple[Entry, ...]
    networks: Mapping[str, Any]
    name: str
    base: Path
    source: str
    datasets: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class RowError:
    """What is wrong in one row, or with an entry or the document as a whole (row 0).

    where: the entry and the row's point of the grid. rows: how many rows of the entry are refused for this very reason.
    """

    where: str
    row: int
    field: str
    message: str
    rows: int = 1

    def __str__(self) -> str:
        others = f" (so in {self.rows:,} rows)" if self.rows > 1 else ""
        long = self.message[LONGEST_MESSAGE:] and "..."
        return f"{self.where}: {f'{self.field} ' if self.field else ''}{self.message[:LONGEST_MESSAGE]}{long}{others}"


class BadSweep(UserError, ValueError):
    """A document that cannot be submitted. errors: the different ones (at most `KEPT`); total: all that is wrong."""

    def __init__(self, source: str, errors: Sequence[RowError], total: int | None = None) -> None:
        self.source, self.errors = source, list(errors)
        self.total = total if total is not None else sum(error.rows for error in self.errors)
        super().__init__(source)

    def __str__(self) -> str:
        errors = wording.counted(self.total, "error")
        lines = [f"{self.source}: {errors}, nothing was submitted", *(f"  {error}" for error in self.errors[:SHOWN])]
        left = self.total - sum(error.rows for error in self.errors[:SHOWN])
        if left > 0:
            lines.append(f"  ... and {left:,} more")
        return "\n".join(lines)


def read(path: Path) -> Document:
    """The document in a YAML file. Raises BadSweep with all that is wrong with its structure."""
    path = Path(path)
    try:
        text = Source(path).whole()
    except Unreadable as error:
        raise BadSweep(str(path), [fault(error)]) from None
    return parse(text, base=path.parent, source=path.name)


def parse(text: str | bytes, base: Path, source: str = "sweep") -> Document:
    """The document in YAML text. Raises BadSweep, as `read`."""
    try:
        values = plain.load_yaml(text).value
    except Unreadable as error:
        raise BadSweep(source, [fault(error)]) from None
    return document(values, base=base, source=source)


def fault(error: Unreadable) -> RowError:
    """A file that cannot be read, as an error of a document."""
    place = f"line {error.line:,}" if error.line else "the file"
    return RowError(f"{place}, column {error.column}" if error.column else place, error.line, "", str(error))


def document(values: Any, base: Path, source: str = "sweep", method: str = "") -> Document:
    """The document that plain values (a loaded YAML file, a method's EXAMPLE) stand for. Raises BadSweep, as `read`.

    method: of entries that name none.
    """
    errors: list[RowError] = []

    def wrong(where: str, field: str, message: str) -> None:
        errors.append(RowError(where, 0, field, message))

    if not isinstance(values, Mapping):
        wrong("the document", "", f"is {wording.short(values)}, must be a mapping with `jobs`")
        raise BadSweep(source, errors)
    known = ("name", "networks", "datasets", "jobs")
    for key in values:
        if key not in known:
            wrong(
                "the document",
                f"`{key}`",
                f"is not known here{wording.nearest(key, known)} (known: {', '.join(known)})",
            )
    name = values.get("name") or ""
    if not isinstance(name, str):
        wrong("the document", "name", f"is {wording.short(name)}, must be text (write it in quotes)")
    names: list[Mapping[str, Any]] = []
    for part, what in (("networks", "paths or recipes"), ("datasets", "paths or generators")):
        given = values.get(part) or {}
        if not isinstance(given, Mapping):
            wrong("the document", part, f"must be a mapping from names to {what}")
            given = {}
        for key in given:
            if not isinstance(key, str):
                wrong(part, wording.short(key), "is a name, so must be text (write it in quotes)")
        names.append(given)
    networks, datasets = names
    jobs = values.get("jobs")
    items = [jobs] if isinstance(jobs, Mapping) else jobs
    entries: list[Entry] = []
    if not isinstance(items, list) or not items:
        wrong("the document", "jobs", "must be a list of at least one entry `- method: ...`")
    else:
        for number, item in enumerate(items, 1):
            told = functools.partial(wrong, f"entry {number}")
            parts = _entry(item, Path(base), method, told)
            if parts is not None:
                entries.append(Entry(number, base=Path(base), networks=networks, datasets=datasets, **parts))
    if errors:
        raise BadSweep(source, errors)
    return Document(tuple(entries), networks, name, Path(base), source, datasets)


def of_table(table: Table, base: Path, method: str = "") -> Document:
    """The document whose only entry is a table. Raises BadSweep where nothing says what its rows are jobs of."""
    if not (method or table.method) and table.columns is not None and tables.METHOD not in table.columns:
        message = f"is missing; give it as --method NAME, or add a column `{tables.METHOD}`"
        raise BadSweep(table.name, [RowError("the file", 0, "method", message)])
    return Document((Entry(0, method or table.method, {}, {}, table=table, base=base),), {}, "", base, table.name)


_PARTS = ("params", "grid", "zip", "random")


def _entry(item: Any, base: Path, method: str, wrong: Callable[[str, str], None]) -> dict[str, Any] | None:
    """The fields of an `Entry` that stand in the item itself; None where it cannot be looked at any further."""
    if not isinstance(item, Mapping):
        wrong("", f"is {wording.short(item)}, must be a mapping with `method`")
        return None
    known = ("method", *_PARTS, "rows", "limits")
    for key in item:
        if key not in known:
            wrong(f"`{key}`", f"is not known here{wording.nearest(key, known)} (known: {', '.join(known)})")
    table = _table(item.get("rows"), base, wrong)
    given = item.get("method", method or (table.method if table is not None else None))
    by_row = table is not None and (table.columns is None or tables.METHOD in table.columns)
    if not isinstance(given, str) and not (given is None and by_row):
        wrong("method", "is missing" if given is None else f"is {wording.short(given)}, must be the name of a method")
    method = given if isinstance(given, str) else ""
    found: dict[str, Mapping[str, Any]] = {}
    for part in ("params", "grid", "zip"):
        value = item.get(part) or {}
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            wrong(part, f"is {wording.short(value)}, must be a mapping from names of parameters")
            return None
        found[part] = value
    for part in ("grid", "zip"):
        values: dict[str, Sequence[Any]] = {}
        for axis, written in found[part].items():
            try:
                values[axis] = axes.axis(written, base)
            except ValueError as error:
                wrong(f"{part} {axis}", str(error))
        found[part] = values
    lengths = {axis: len(values) for axis, values in found["zip"].items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{axis} has {length:,}" for axis, length in lengths.items())
        wrong("zip", f"goes in step, so all its axes must have the same length: {told}")
    found["random"] = {}
    if "random" in item:
        try:
            found["random"] = axes.draws(item["random"])
        except ValueError as error:
            for line in str(error).splitlines():
                wrong("random", line)
    places: dict[str, str] = {}
    for part in _PARTS:
        for name in found[part]:
            if name in places:
                wrong(name, f"is given under both {places[name]} and {part}; keep one")
            places.setdefault(name, part)
    if table is not None:
        for name in table.columns or ():
            if name in places:
                wrong(name, f"is given under both {places[name]} and a column of {table.name}; keep one")
    try:
        seconds, memory = limits_of(item.get("limits"))
    except ValueError as error:
        wrong("limits", str(error))
        seconds, memory = None, None
    points = Entry(0, "", {}, found["grid"], zip=found["zip"], random=found["random"]).points
    if points > MOST_ROWS:
        wrong("", f"makes {points:,} rows, at most {MOST_ROWS:,} are possible; give its axes fewer values")
    return {"method": method, **found, "table": table, "time_limit": seconds, "memory_limit": memory}


def _table(rows: Any, base: Path, wrong: Callable[[str, str], None]) -> Table | None:
    if rows is None:
        return None
    if isinstance(rows, list) and rows:
        return tables.Listed(rows, "rows")
    if not isinstance(rows, str) or not rows:
        wrong("rows", f"is {wording.short(rows)}, must be the path of a file of rows, or a list of them")
        return None
    try:
        path = base / Path(rows).expanduser()
        if path.exists() and not path.is_file():  # a pipe would be waited for, for ever
            raise Unreadable("is no regular file; give a file of rows")
        return tables.read_rows(Source(path, rows))
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of nobody
        wrong("rows", f"{wording.short(rows)}: cannot be read: {error}")
        return None
    except Unreadable as error:
        wrong("rows", f"{rows}{f', line {error.line:,}' if error.line else ''}: {error}")
        return None


def limits_of(limits: Any) -> tuple[float | None, int | None]:
    """(seconds, bytes) of an entry's `limits`. Raises ValueError."""
    if limits is None:
        return None, None
    known = ("seconds", "memory")
    if not isinstance(limits, Mapping) or not set(limits) <= set(known):
        raise ValueError(f"is {wording.short(limits)}, must be a mapping with seconds, memory or both")
    seconds, memory = limits.get("seconds"), limits.get("memory")
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= sys.float_info.max:
            raise ValueError(f"seconds is {wording.short(seconds)}, must be a number above 0")
        seconds = float(seconds)
    if memory is not None:
        memory = size(memory)
    return seconds, memory


def size(text: Any) -> int:
    """Bytes of a size such as 500MB, 1.5 GiB or 1000000. Raises ValueError."""
    if isinstance(text, int) and text > MOST_BYTES:  # apart: of a very large one Python does not make text
        raise ValueError(f"memory is {wording.short(text)}, must be at most {MOST_BYTES:,} bytes")
    match = None if isinstance(text, bool) else _SIZE.match(str(text))
    if match is None:
        raise ValueError(f"memory is {wording.short(text)}, must be a size such as 500MB, 2GiB or a number of bytes")
    number = float(match[1]) * _UNITS[(match[2] or "").upper()]
    if number < 1:  # cut to whole bytes it would be 0, which stands for no limit
        raise ValueError(f"memory is {wording.short(text)}, must be at least 1 byte")
    if number > MOST_BYTES:
        raise ValueError(f"memory is {wording.short(text)}, must be at most {MOST_BYTES:,} bytes")
    return int(number)
