"""Sweeps: from a YAML document to validated jobs with their keys, in the order they will be numbered.

    name: digits
    networks:                                  # names for networks, for the fields that take one
      certified: {recipe: {dataset: digits, training: {kind: ibp}}}
      mine: nets/f.onnx                        # from the sweep file's folder
    jobs:                                      # entries; each yields one row for each point of its grid
      - method: verification.certify
        params: {dataset: digits}              # the same in all rows
        grid:                                  # their product; the last one varies fastest
          network: [certified, mine]
          index: {range: [0, 100]}             # start, stop[, step]: whole numbers, without the stop
          radius: [0.01, 0.02]
        limits: {seconds: 60, memory: 1GB}     # of each job; not part of its key

Every mistake of a document is collected before anything is refused, and nothing is stored by reading or preparing one.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from netassay import catalogue, job
from netassay.errors import UserError
from netassay.fields import ReferenceTo
from netassay.method import Contract, Method, time_limit
from producer import references, wording
from producer.references import Resolver

#: Errors that a message shows and that are kept; beyond, they are counted only (a million rows can be wrong).
SHOWN, KEPT = 20, 1000

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One item of a document's `jobs`. grid: axis -> its values, in order. number: its place, from 1."""

    number: int
    method: str
    params: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    time_limit: float | None = None
    memory_limit: int | None = None

    @property
    def rows(self) -> int:
        return math.prod(map(len, self.grid.values()))


@dataclass(frozen=True)
class Document:
    """A sweep as written, its structure checked. base: folder its paths start from. source: its name in messages."""

    jobs: tuple[Entry, ...]
    networks: Mapping[str, Any]
    name: str
    base: Path
    source: str


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
        return f"{self.where}: {f'{self.field} ' if self.field else ''}{self.message}{others}"


class BadSweep(UserError, ValueError):
    """A document that cannot be submitted. errors: the different ones (at most `KEPT`); total: all that is wrong."""

    def __init__(self, source: str, errors: Sequence[RowError], total: int | None = None) -> None:
        self.source, self.errors = source, list(errors)
        self.total = total if total is not None else sum(error.rows for error in self.errors)
        super().__init__(source)

    def __str__(self) -> str:
        count = "1 error" if self.total == 1 else f"{self.total:,} errors"
        lines = [f"{self.source}: {count}, nothing was submitted", *(f"  {error}" for error in self.errors[:SHOWN])]
        left = self.total - sum(error.rows for error in self.errors[:SHOWN])
        if left > 0:
            lines.append(f"  ... and {left:,} more")
        return "\n".join(lines)


@dataclass(slots=True)
class Segment:
    """Consecutive jobs of one method that may run together: same references, dataset, `group` answer and limits.

    group: short label, such as the user's name of the network. seconds, memory (bytes): the method's prediction for its
    first job. time_limit (seconds), memory_limit (bytes): as the sweep says, else None. group_size: how many jobs one
    `run_many` call may take. recipes: references of recipes whose networks the jobs need. params: canonical JSON.
    """

    method: str
    version: int
    group: str
    seconds: float
    memory: int | None
    time_limit: float | None
    memory_limit: int | None
    group_size: int
    libraries: tuple[str, ...]
    recipes: tuple[str, ...]
    params: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class Prepared:
    """All jobs of a sweep, each key once. names: reference -> the user's name. refused: rows left out."""

    segments: list[Segment]
    names: dict[str, str]
    duplicates: int = 0
    errors: list[RowError] = field(default_factory=list)
    refused: int = 0

    @property
    def count(self) -> int:
        return sum(len(segment.keys) for segment in self.segments)


@dataclass(frozen=True)
class Summary:
    """Jobs of one method with the same limits and prediction. seconds, time_limit: of one job."""

    method: str
    group: str
    jobs: int
    seconds: float
    time_limit: float
    memory_limit: int | None

    @property
    def total_seconds(self) -> float:
        return self.jobs * self.seconds


# --- reading ------------------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice, and reads 1e-3 as a number as YAML 1.2 does (1.1 makes it text)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(name, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice, first in line {seen[key]}", name.start_mark
                )
            if isinstance(key, typing.Hashable):
                seen[key] = name.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load_yaml(text: str | bytes) -> Any:
    return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader: makes plain values only


def read(path: Path) -> Document:
    """The document in a YAML file. Raises BadSweep with all that is wrong with its structure."""
    path = Path(path)
    try:
        return parse(path.read_bytes(), base=path.parent, source=path.name)
    except OSError as error:
        raise BadSweep(str(path), [RowError("the file", 0, "", f"cannot be read: {error.strerror}")]) from None


def parse(text: str | bytes, base: Path, source: str = "sweep") -> Document:
    """The document in YAML text. Raises BadSweep, as `read`."""
    try:
        values = _load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        wrong = " ".join(part for part in (error.problem, error.context) if part) or "is not YAML"
        raise BadSweep(source, [RowError(where, 0, "", wrong)]) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadSweep(source, [RowError("the file", 0, "", f"is not YAML: {' '.join(str(error).split())}")]) from None
    return document(values, base=base, source=source)


def document(values: Any, base: Path, source: str = "sweep") -> Document:
    """The document that plain values (a loaded YAML file, a method's EXAMPLE) stand for. Raises BadSweep, as `read`."""
    errors: list[RowError] = []

    def wrong(where: str, field: str, message: str) -> None:
        errors.append(RowError(where, 0, field, message))

    if not isinstance(values, Mapping):
        wrong("the document", "", f"is {wording.short(values)}, must be a mapping with `jobs`")
        raise BadSweep(source, errors)
    known = ("name", "networks", "jobs")
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
    networks = values.get("networks") or {}
    if not isinstance(networks, Mapping):
        wrong("the document", "networks", "must be a mapping from names to paths or recipes")
        networks = {}
    for key in networks:
        if not isinstance(key, str):
            wrong("networks", wording.short(key), "is a name, so must be text (write it in quotes)")
    jobs = values.get("jobs")
    items = [jobs] if isinstance(jobs, Mapping) else jobs
    entries: list[Entry] = []
    if not isinstance(items, list) or not items:
        wrong("the document", "jobs", "must be a list of at least one entry `- method: ...`")
    else:
        for number, item in enumerate(items, 1):
            entry = _entry(number, item, functools.partial(wrong, f"entry {number}"))
            if entry is not None:
                entries.append(entry)
    if errors:
        raise BadSweep(source, errors)
    return Document(tuple(entries), networks, name, Path(base), source)


def _entry(number: int, item: Any, wrong: Callable[[str, str], None]) -> Entry | None:
    if not isinstance(item, Mapping):
        wrong("", f"is {wording.short(item)}, must be a mapping with `method`")
        return None
    known = ("method", "params", "grid", "limits")
    for key in item:
        if key not in known:
            wrong(f"`{key}`", f"is not known here{wording.nearest(key, known)} (known: {', '.join(known)})")
    method = item.get("method")
    if not isinstance(method, str):
        wrong("method", "is missing" if method is None else f"is {wording.short(method)}, must be the name of a method")
        method = ""
    params, grid = item.get("params") or {}, item.get("grid") or {}
    for part, value in (("params", params), ("grid", grid)):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            wrong(part, f"is {wording.short(value)}, must be a mapping from names of parameters")
            return None
    axes: dict[str, Sequence[Any]] = {}
    for axis, values in grid.items():
        if axis in params:
            wrong(axis, "is given under both params and grid; keep one")
        try:
            axes[axis] = _axis(values)
        except ValueError as error:
            wrong(f"grid {axis}", str(error))
    try:
        seconds, memory = _limits(item.get("limits"))
    except ValueError as error:
        wrong("limits", str(error))
        seconds, memory = None, None
    return Entry(number, method, params, axes, seconds, memory)


def _axis(values: Any) -> Sequence[Any]:
    if isinstance(values, Mapping) and set(values) == {"range"}:
        ends = values["range"]
        whole = isinstance(ends, list) and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        if not whole or len(ends) not in (2, 3):
            raise ValueError(
                f"range is {wording.short(ends)}, must be [start, stop] or [start, stop, step], whole numbers"
            )
        if len(ends) == 3 and ends[2] == 0:
            raise ValueError("range has step 0")
        values = range(*ends)
        if not values:
            raise ValueError(f"range {wording.short(ends)} is empty; the stop itself is not part of it")
        return values
    if not isinstance(values, list):
        raise ValueError(f"is {wording.short(values)}, must be a list of values or {{range: [start, stop]}}")
    if not values:
        raise ValueError("is an empty list, which makes no jobs; leave it out to use the default")
    return values


def _limits(limits: Any) -> tuple[float | None, int | None]:
    """(seconds, bytes) of an entry's `limits`. Raises ValueError."""
    if limits is None:
        return None, None
    known = ("seconds", "memory")
    if not isinstance(limits, Mapping) or not set(limits) <= set(known):
        raise ValueError(f"is {wording.short(limits)}, must be a mapping with seconds, memory or both")
    seconds, memory = limits.get("seconds"), limits.get("memory")
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ValueError(f"seconds is {wording.short(seconds)}, must be a number above 0")
        seconds = float(seconds)
    if memory is not None:
        memory = size(memory)
    return seconds, memory


def size(text: Any) -> int:
    """Bytes of a size such as 500MB, 1.5 GiB or 1000000. Raises ValueError."""
    match = None if isinstance(text, bool) else _SIZE.match(str(text))
    if match is None or (number := float(match[1])) <= 0:
        raise ValueError(f"memory is {wording.short(text)}, must be a size such as 500MB, 2GiB or a number of bytes")
    return int(number * _UNITS[(match[2] or "").upper()])


# --- preparing ----------------------------------------------------------------------------------------------------


def prepare(document: Document, resolver: Resolver, skip_invalid: bool = False) -> Prepared:
    """Validate every row, and give each job its key and its place. Stores nothing: see `Resolver.commit`.

    A job that occurs twice is kept once. For every recipe that stands for a network a `networks.train` job is put in
    front, unless it is among the jobs. Raises BadSweep with all errors, unless `skip_invalid`: then the rows that
    have one are left out and reported.

    Cost: some 6 us a row and 180 bytes a job for a method of plain fields; files are read once.
    """
    work = _Preparation(resolver)
    for entry in document.jobs:
        work.add(entry)
    if work.errors and not skip_invalid:
        raise BadSweep(document.source, list(work.errors.values()), work.wrong)
    segments = list(work.segments.values())
    training = _Preparation(resolver, seen=work.seen)
    for recipe in work.recipes:
        training.add(Entry(0, job.BUILDER, {"recipe": recipe}, {}))
    if training.errors:
        raise BadSweep(document.source, list(training.errors.values()))
    segments = [*training.segments.values(), *segments]
    # All jobs of a segment have the same references, so its first speaks for all.
    used = {reference for segment in segments for reference in _REFERENCES.findall(segment.params[0])}
    names = {reference: name for reference, name in resolver.names.items() if reference in used}
    return Prepared(segments, names, work.duplicates, list(work.errors.values()), work.refused)


_REFERENCES = re.compile(r'"((?:onnx|recipe|array|file):[0-9a-f]{64})"')
# The text of -0.0 and of numbers such as -0.05 begins alike; only the first has to be rewritten.
_NEGATIVE_ZERO = re.compile(r"-0\.0(?!\d)")
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


class _Preparation:
    """What grows while the rows of a document go by."""

    def __init__(self, resolver: Resolver, seen: set[bytes] | None = None) -> None:
        self.resolver = resolver
        self.segments: dict[tuple[Any, ...], Segment] = {}
        self.recipes: dict[str, None] = {}
        self.errors: dict[tuple[int, str, str], RowError] = {}
        self.seen: set[bytes] = set() if seen is None else seen
        self.duplicates = self.refused = self.wrong = 0

    def add(self, entry: Entry) -> None:
        """Validate the rows of one entry and append its jobs to their segments."""
        try:
            method = catalogue.get(entry.method)
        except catalogue.UnknownMethod as error:
            self.refused += entry.rows
            self._refuse(entry, 0, "", "", str(error))
            return
        if not self._names_are_right(entry, method):
            self.refused += entry.rows
            return
        # The loop below is `job.key` taken apart: what does not change from row to row is looked up before it.
        validate = method.Params.__pydantic_validator__.validate_python
        dump = method.Params.__pydantic_serializer__.to_python
        name, version, context, seen = method.name, method.version, {"resolve": self.resolver}, self.seen
        references = reference_fields(method.Params)
        together = [*references, *(("dataset",) if "dataset" in method.Params.model_fields else ())]
        split = method.group if hasattr(method.module, "group") else None
        limits = (entry.time_limit, entry.memory_limit)
        segment: Segment | None = None
        for number, row in enumerate(_rows(entry), 1):
            try:
                params = validate(row, context=context)
                try:
                    text = _encode(dump(params, mode="json"))
                except ValueError:
                    text = job.canonical(params)  # raises with the name of the field
                if "-0.0" in text and _NEGATIVE_ZERO.search(text):
                    text = job.canonical(params)
                key = job.key_of(name, version, text)
            except ValidationError as error:
                self._refuse_row(entry, number, row, wording.explain(error))
                continue
            except ValueError as error:
                self._refuse_row(entry, number, row, [("", str(error))])
                continue
            if key in seen:
                self.duplicates += 1
                continue
            seen.add(key)
            if segment is None or together or split is not None:
                values = params.__dict__
                group = [values[one] if type(values[one]) is str else repr(values[one]) for one in together]
                place = (name, *group, split(params) if split is not None else "", limits)
                segment = self.segments.get(place)
                if segment is None:
                    segment = self.segments[place] = self._segment(entry, method, params, references)
            segment.params.append(text)
            segment.keys.append(key)

    def _segment(self, entry: Entry, method: Method, params: Contract, references: Mapping[str, bool]) -> Segment:
        needs = method.needs(params)
        labels: dict[str, None] = {}
        recipes: dict[str, None] = {}
        for name, is_network in references.items():
            for value in _strings(getattr(params, name)):
                labels[self.resolver.names.get(value, value[:15])] = None
                if is_network and value.startswith("recipe:"):
                    recipes[value] = None
        self.recipes |= recipes
        return Segment(
            method=method.name,
            version=method.version,
            group=", ".join(labels) or str(getattr(params, "dataset", "")),
            seconds=needs.seconds,
            memory=needs.memory,
            time_limit=entry.time_limit,
            memory_limit=entry.memory_limit,
            group_size=needs.group if method.run_many is not None else 1,
            libraries=needs.libraries,
            recipes=tuple(recipes),
        )

    def _names_are_right(self, entry: Entry, method: Method) -> bool:
        """Whether the entry gives only fields that exist, and all that must be given: the same for all its rows."""
        given = {*entry.params, *entry.grid}
        fields = method.Params.model_fields
        wrongs = [
            (name, wording.unknown_field(name, method.Params, method.name)) for name in sorted(given - set(fields))
        ]
        wrongs += [
            (name, "is missing; give it under params or grid")
            for name, about in fields.items()
            if about.is_required() and name not in given
        ]
        for name, message in wrongs:
            self._refuse(entry, 0, "", name, message)
        return not wrongs

    def _refuse_row(self, entry: Entry, number: int, row: Mapping[str, Any], wrongs: list[tuple[str, str]]) -> None:
        point = ", ".join(f"{axis}={wording.short(row[axis])}" for axis in entry.grid)
        where = f", row {number:,}{f' ({point})' if point else ''}"
        self.refused += 1
        for name, message in wrongs:
            self._refuse(entry, number, where, name, message)

    def _refuse(self, entry: Entry, number: int, where: str, field: str, message: str) -> None:
        self.wrong += 1
        same = self.errors.get((entry.number, field, message))
        if same is not None:
            same.rows += 1
        elif len(self.errors) < KEPT:
            text = f"entry {entry.number} ({entry.method}){where}"
            self.errors[entry.number, field, message] = RowError(text, number, field, message)


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    """The params of every row. It is one dict, changed in place: validation copies what it takes."""
    row = dict(entry.params)
    if not entry.grid:
        yield row
        return
    *slow, fast = entry.grid
    for point in itertools.product(*(entry.grid[axis] for axis in slow)):
        row.update(zip(slow, point, strict=True))
        for value in entry.grid[fast]:
            row[fast] = value
            yield row


def reference_fields(params: type[Contract]) -> dict[str, bool]:
    """Fields of a method's Params that hold references -> whether a recipe there stands for a network to be built."""
    found = {}
    for name, about in params.model_fields.items():
        marks = [*about.metadata, *_marks(about.annotation)]
        wanted = [mark for mark in marks if isinstance(mark, ReferenceTo)]
        if wanted:
            found[name] = any("onnx" in mark.kinds for mark in wanted)
    return found


def _marks(annotation: Any) -> Iterator[Any]:
    """All that is annotated inside a type: `list[NetworkRef]`, `NetworkRef | None`."""
    yield from getattr(annotation, "__metadata__", ())
    for part in typing.get_args(annotation):
        yield from _marks(part)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_strings, value))


# --- showing, and running one -------------------------------------------------------------------------------------


def describe(prepared: Prepared) -> list[Summary]:
    """What a submission would run, for `--dry-run`: segments of one method with the same limits together, in order."""
    together: dict[tuple[Any, ...], list[Segment]] = {}
    for segment in prepared.segments:
        limit = segment.time_limit if segment.time_limit is not None else time_limit(segment.seconds)
        memory = segment.memory_limit if segment.memory_limit is not None else segment.memory
        together.setdefault((segment.method, segment.seconds, limit, memory), []).append(segment)
    rows = []
    for (method, seconds, limit, memory), segments in together.items():
        groups = list(dict.fromkeys(segment.group for segment in segments))
        label = ", ".join(groups) if len(groups) <= 3 else f"{', '.join(groups[:2])} and {len(groups) - 2} more"
        rows.append(Summary(method, label, sum(len(segment.keys) for segment in segments), seconds, limit, memory))
    return rows


def parameters(method: Method, options: Sequence[str], resolver: Resolver | None = None) -> Contract:
    """Params of one job from the command line: `field=value`, `--field value`, `--field=value`, or a bare `--flag`.

    Values are read as YAML (`radius=1e-2`, `hidden=[8, 8]`, `--network '{dataset: digits}'`); paths start from the
    working folder. Files and recipes are kept at once. Raises BadSweep with all that is wrong.
    """
    texts, errors = _options(options)
    fields = method.Params.model_fields
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in fields:
            errors.append(RowError(method.name, 0, name, wording.unknown_field(name, method.Params, method.name)))
            continue
        try:
            values[name] = _load_yaml(text)
        except (yaml.YAMLError, ValueError):
            values[name] = text
    context = {"resolve": resolver if resolver is not None else references.in_process()}
    if errors:
        raise BadSweep(method.name, errors)
    try:
        return method.Params.model_validate(values, context=context)
    except ValidationError as error:
        # A field of text given as `2`, `no` or `2024-01-01`: quotes within a shell's quotes are not asked of anyone.
        quoted = {str(one["loc"][0]) for one in error.errors() if one["type"] in ("string_type", "literal_error")}
    try:
        retried = {name: texts[name] if name in quoted else value for name, value in values.items()}
        return method.Params.model_validate(retried, context=context)
    except ValidationError as error:
        missing = {str(one["loc"][0]) for one in error.errors() if one["type"] == "missing" and len(one["loc"]) == 1}
        raise BadSweep(
            method.name,
            [
                RowError(method.name, 0, name, f"is missing; give it as {name}=..." if name in missing else message)
                for name, message in wording.explain(error)
            ],
        ) from None


def _options(options: Sequence[str]) -> tuple[dict[str, str], list[RowError]]:
    """Field -> text, and what cannot be read as a field."""
    texts: dict[str, str] = {}
    errors: list[RowError] = []
    rest = list(options)
    while rest:
        option = rest.pop(0)
        name, equals, text = option.removeprefix("--").partition("=")
        if not equals and option.startswith("--"):
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        elif not equals:
            errors.append(
                RowError("the command line", 0, wording.short(option), "must be field=value or --field value")
            )
            continue
        name = name.replace("-", "_")
        if name in texts:
            errors.append(RowError("the command line", 0, name, "is given twice"))
        texts[name] = text
    return texts, errors
