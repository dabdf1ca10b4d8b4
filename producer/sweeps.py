"""Sweeps: from what is written down to validated jobs with their keys, in the order they will be numbered.

    name: digits
    networks:                                  # names for networks, for the fields that take one
      certified: {recipe: {dataset: digits, training: {kind: ibp}}}
      mine: nets/f.onnx                        # from the sweep file's folder
    datasets:                                  # likewise for datasets
      moons: {generator: two_moons, noise: 0.1}
    jobs:                                      # entries; each yields one row for each point of its axes
      - method: verification.certify
        params: {dataset: digits}              # the same in all rows
        rows: images.csv                       # from a file: CSV, JSON Lines or a JSON list of params
        grid:                                  # the product of these; the last one varies fastest
          network: [certified, mine]
          index: {range: [0, 100]}             # start, stop[, step]: whole numbers, without the stop
        zip:                                   # these go in step
          radius: [0.01, 0.02]
          seed: [1, 2]
        random:                                # and these are drawn: see `producer.axes`, also for other axes
          {count: 10, seed: 0, draw: {share: {uniform: [0, 1]}}}
        limits: {seconds: 60, memory: 1GB}     # of each job; not part of its key

The parts make a product, rows x grid x zip x random, whose last part varies fastest. All but `method` may be left out.
Every mistake of a document is collected before anything is refused, and nothing is stored by reading or preparing one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from netassay import catalogue, job
from netassay.fields import KINDS, ReferenceTo
from netassay.job import Segment
from netassay.method import TIME_CEILING, Contract, Method, time_limit
from producer import cells, references, tables, wording
from producer.documents import KEPT, MOST_BYTES, BadSweep, Document, Entry, RowError, limits_of
from producer.documents import document as document
from producer.documents import parse as parse
from producer.documents import read as read
from producer.documents import size as size
from producer.plain import Unreadable
from producer.references import Resolver

#: How often the same fault in rows of a file is told with its line; of further such rows the number only.
APART = 5


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


# --- preparing ----------------------------------------------------------------------------------------------------


def prepare(document: Document, resolver: Resolver, skip_invalid: bool = False) -> Prepared:
    """Validate every row, and give each job its key and its place. Stores nothing: see `Resolver.commit`.

    A job that occurs twice is kept once. For every recipe that stands for a network a `networks.train` job is put in
    front, unless it is among the jobs. Raises BadSweep with all errors, unless `skip_invalid`: then the rows that
    have one are left out and reported; a file that cannot be read to its end is refused all the same.

    Cost: some 4 us a row, 6 of a file, and 180 bytes a job for a method of plain fields; networks are read once.
    """
    work = _Preparation(resolver)
    for entry in document.jobs:
        work.add(entry)
    if work.broken or (work.errors and not skip_invalid):
        raise BadSweep(document.source, work.errors, work.wrong)
    segments = list(work.segments.values())
    training = _Preparation(resolver, seen=work.seen)
    for recipe in work.recipes:
        training.add(Entry(0, job.BUILDER, {"recipe": recipe}, {}))
    if training.errors:
        raise BadSweep(document.source, training.errors)
    segments = [*training.segments.values(), *segments]
    used = {reference for segment in segments for text in _telling(segment) for reference in _REFERENCES.findall(text)}
    names = {reference: name for reference, name in resolver.names.items() if reference in used}
    return Prepared(segments, names, work.duplicates, work.errors, work.refused)


def _telling(segment: Segment) -> list[str]:
    """Params that between them name all references of a segment: where all are shared, its first speaks for all."""
    varies = not all(_shared(catalogue.get(segment.method).Params).values())
    return segment.params if varies else segment.params[:1]


_REFERENCES = re.compile(rf'"((?:{"|".join(KINDS)}):[0-9a-f]{{64}})"')
# The text of -0.0 and of numbers such as -0.05 begins alike; only the first has to be rewritten.
_NEGATIVE_ZERO = re.compile(r"-0\.0(?!\d)")
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class _Kind:
    """What does not change from row to row of one method. together: fields whose values keep segments apart."""

    method: Method
    validate: Callable[..., Any]
    dump: Callable[..., Any]
    references: Mapping[str, bool]
    together: Sequence[str]
    split: Callable[[Any], str] | None
    readers: Mapping[str, Callable[[str], Any]]


_Limits: typing.TypeAlias = tuple[float | None, int | None]
#: Number of the row (of a file: its line), its params, their method, its limits.
_Row: typing.TypeAlias = tuple[int, dict[str, Any], _Kind, _Limits]
_APART_FROM_PARAMS = frozenset((tables.METHOD, "params", "limits", tables.SECONDS, tables.MEMORY))


class _Preparation:
    """What grows while the rows of a document go by. broken: a file could not be read to its end."""

    def __init__(self, resolver: Resolver, seen: set[bytes] | None = None) -> None:
        self.resolver = resolver
        self.segments: dict[tuple[Any, ...], Segment] = {}
        self.recipes: dict[str, None] = {}
        self.errors: list[RowError] = []
        self.told: dict[tuple[str, int, str, str], tuple[int, RowError]] = {}
        self.seen: set[bytes] = set() if seen is None else seen
        self.duplicates = self.refused = self.wrong = 0
        self.broken = False

    def add(self, entry: Entry) -> None:
        """Validate the rows of one entry and append its jobs to their segments."""
        if entry.base is not None:
            self.resolver.enter(entry.base, entry.networks, entry.datasets)
        rows = self._points(entry) if entry.table is None else self._table_rows(entry, entry.table)
        # The loop below is `job.key` taken apart: what does not change from row to row is looked up before it.
        context, seen = {"resolve": self.resolver}, self.seen
        kind: _Kind | None = None
        limits: _Limits | None = None
        segment: Segment | None = None
        for number, row, now, limited in rows:
            if now is not kind:
                kind, segment = now, None
                method, validate, dump = kind.method, kind.validate, kind.dump
                name, version, together, split = method.name, method.version, kind.together, kind.split
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
                self._refuse_row(entry, number, row, wording.explain(error), method)
                continue
            except UnicodeEncodeError:
                self._refuse_row(entry, number, row, [("", "holds half a surrogate pair, which is no text")], method)
                continue
            except ValueError as error:
                self._refuse_row(entry, number, row, [("", str(error))], method)
                continue
            if key in seen:
                self.duplicates += 1
                continue
            seen.add(key)
            if segment is None or limited is not limits or together or split is not None:
                limits = limited
                values = params.__dict__
                group = [values[one] if type(values[one]) is str else repr(values[one]) for one in together]
                place = (name, *group, split(params) if split is not None else "", limits)
                segment = self.segments.get(place)
                if segment is None:
                    segment = self.segments[place] = self._segment(limits, method, params, kind.references)
            segment.params.append(text)
            segment.keys.append(key)

    def _points(self, entry: Entry) -> Iterable[_Row]:
        """The rows of an entry that has no table."""
        kind = self._kind(entry, entry.method, {*entry.params, *entry.axes})
        if kind is None:
            self.refused += entry.rows
            return ()
        limits = (entry.time_limit, entry.memory_limit)
        points = _points(entry, dict(entry.params))
        return zip(itertools.count(1), points, itertools.repeat(kind), itertools.repeat(limits))

    def _table_rows(self, entry: Entry, table: tables.Table) -> Iterator[_Row]:
        """The rows of a table, each at all points of the entry's axes; those that are no rows are refused."""
        points, fixed, has_axes = entry.points, frozenset((*entry.params, *entry.axes)), bool(entry.axes)
        columns = table.columns if table.columns is not None and tables.METHOD not in table.columns else None
        given = None if columns is None else {*fixed, *columns} - _APART_FROM_PARAMS
        kinds: dict[str, _Kind | None] = {}
        recipes: dict[str, Any] = {}
        known_limits: dict[_Limits, _Limits] = {}
        usual = (entry.time_limit, entry.memory_limit)
        try:
            for line, row in table:
                if isinstance(row, list):
                    self._refuse_row(entry, line, {}, row, None, points)
                    continue
                name, limits = entry.method, usual
                if row.keys() & _APART_FROM_PARAMS:
                    own, row, limited = _parts(row)
                    name = own or name
                    try:
                        limits = _limits(limited, usual, table.texts) if limited else usual
                    except ValueError as error:
                        self._refuse_row(entry, line, {}, [("limits", str(error))], None, points)
                        continue
                    limits = known_limits.setdefault(limits, limits)
                try:
                    kind = kinds[name]
                except KeyError:
                    kind = kinds[name] = self._kind(entry, name, given, line)
                if kind is None:
                    self.refused += points
                    continue
                if table.texts:
                    readers = kind.readers
                    row = {
                        name: readers[name](text) if name in readers else text
                        for name, text in row.items()
                        if text and not (text.isspace() and readers.get(name) is not str)
                    }
                elif kind.references:
                    row = {name: _interned(recipes, value) for name, value in row.items()}
                if fixed:
                    if not fixed.isdisjoint(row):
                        wrongs = [
                            (name, "is given in the row and in the entry; keep one") for name in fixed & row.keys()
                        ]
                        self._refuse_row(entry, line, {}, sorted(wrongs), None, points)
                        continue
                    row = {**entry.params, **row}
                if not has_axes:
                    yield line, row, kind, limits
                    continue
                for point in _points(entry, row):
                    yield line, point, kind, limits
        except Unreadable as error:
            self.broken = True
            self._refuse(entry, error.line, _place(entry, error.line), "", str(error))

    def _kind(self, entry: Entry, name: str, given: set[str] | None, line: int = 0) -> _Kind | None:
        """The method of this name; None where there is none, or what is given (None: not known) does not fit it."""
        if not name:
            what = f"`{tables.METHOD}` in the row" if given is None else f"a column `{tables.METHOD}`"
            self._refuse(entry, line, _place(entry, line), "method", f"is missing; give {what}, or --method NAME")
            return None
        try:
            method = catalogue.get(name)
        except (catalogue.UnknownMethod, catalogue.BrokenMethod) as error:
            own = line if name != entry.method else 0
            self._refuse(entry, own, _place(entry, own), "", str(error))
            return None
        if given is not None and not self._names_are_right(entry, method, given):
            return None
        return _Kind(
            method=method,
            validate=method.Params.__pydantic_validator__.validate_python,
            dump=method.Params.__pydantic_serializer__.to_python,
            references=reference_fields(method.Params),
            together=[name for name, same in _shared(method.Params).items() if same],
            split=method.group if hasattr(method.module, "group") else None,
            readers=cells.readers(method.Params) if entry.table is not None and entry.table.texts else {},
        )

    def _segment(self, limits: _Limits, method: Method, params: Contract, references: Mapping[str, bool]) -> Segment:
        needs = method.needs(params)
        labels: dict[str, None] = {}
        bundled: dict[str, None] = {}
        recipes: dict[str, None] = {}
        for name, same in _shared(type(params)).items():
            is_network = references[name]
            for value in _strings(getattr(params, name)) if same else ():
                if ":" in value:
                    labels[self.resolver.names.get(value, value[:15])] = None
                else:  # a dataset: its name tells little beside a network's
                    bundled[value] = None
                if is_network and value.startswith("recipe:"):
                    recipes[value] = None
        self.recipes |= recipes
        return Segment(
            method=method.name,
            version=method.version,
            group=", ".join(labels or bundled),
            seconds=min(TIME_CEILING, needs.seconds),
            memory=None if needs.memory is None else min(MOST_BYTES, needs.memory),
            time_limit=limits[0],
            memory_limit=limits[1],
            group_size=needs.group if method.run_many is not None else 1,
            libraries=needs.libraries,
            recipes=tuple(recipes),
        )

    def _names_are_right(self, entry: Entry, method: Method, given: set[str]) -> bool:
        """Whether only fields are given that exist, and all that must be: the same for all rows of the entry."""
        fields = method.Params.model_fields
        where = "a column" if entry.table is not None else "params or grid"
        wrongs = [
            (name, wording.unknown_field(name, method.Params, method.name)) for name in sorted(given - set(fields))
        ]
        wrongs += [
            (name, f"is missing; give it {'as' if entry.table is not None else 'under'} {where}")
            for name, about in fields.items()
            if about.is_required() and name not in given
        ]
        for name, message in wrongs:
            self._refuse(entry, 0, _place(entry, 0), name, message)
        return not wrongs

    def _refuse_row(
        self,
        entry: Entry,
        number: int,
        row: Mapping[str, Any],
        wrongs: Iterable[tuple[str, str]],
        method: Method | None,
        rows: int = 1,
    ) -> None:
        """Refuse one row, or `rows` points of one row of a table. method: None where it has not come to that."""
        point = ", ".join(f"{axis}={wording.short(row[axis])}" for axis in entry.axes if axis in row)
        where = _place(entry, number) if entry.table is not None else f"{_place(entry, 0)}, row {number:,}"
        where += f" ({point})" if point else ""
        self.refused += rows
        for name, message in wrongs:
            unknown = method is not None and name and name not in method.Params.model_fields
            if method is not None and unknown:
                message = wording.unknown_field(name, method.Params, method.name)
            self._refuse(entry, number, where, name, message, APART if entry.table is not None and not unknown else 1)

    def _refuse(self, entry: Entry, number: int, where: str, field: str, message: str, apart: int = 1) -> None:
        """apart: how often the very same fault is told by itself."""
        self.wrong += 1
        fault = (entry.source, entry.number, field, message)
        times, last = self.told.get(fault, (0, None))
        if last is not None and times >= apart:
            last.rows += 1
        elif len(self.errors) < KEPT:
            self.errors.append(RowError(where, number, field, message))
            self.told[fault] = (times + 1, self.errors[-1])


def _place(entry: Entry, line: int) -> str:
    """Where an entry, or a row of its table, stands."""
    parts = [entry.source] if entry.source else []
    if entry.number or entry.table is None:
        parts.append(f"entry {entry.number} ({entry.method})" if entry.method else f"entry {entry.number}")
    if entry.table is not None and line:
        file = f"{entry.table.name} " if entry.number else ""
        parts.append(f"{file}{entry.table.unit} {line:,}")
    return ", ".join(parts) or "the file"


def _interned(known: dict[str, Any], value: Any) -> Any:
    """The same object for the same mapping: a recipe in many rows is then known to the resolver by its identity."""
    return known.setdefault(json.dumps(value, sort_keys=True), value) if isinstance(value, dict) else value


def _parts(row: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(method or empty, params, limits) of a row of a table, flat or nested."""
    params = dict(row)
    method = params.pop(tables.METHOD, "")
    limits = {name.partition(".")[2]: params.pop(name) for name in (tables.SECONDS, tables.MEMORY) if name in params}
    if isinstance(params.get("limits"), Mapping):
        limits |= params.pop("limits")
    if isinstance(params.get("params"), Mapping) and len(params) == 1:
        params = dict(params["params"])
    # A method that is not text is none, and is refused by its name.
    return (method.strip() if isinstance(method, str) else repr(method)), params, limits


def _limits(given: Mapping[str, Any], usual: _Limits, texts: bool) -> _Limits:
    """The limits of one row of a table; those it does not give are the entry's. Raises ValueError."""
    values = {name: value for name, value in given.items() if value is not None and value != ""}
    if texts and "seconds" in values:
        with contextlib.suppress(ValueError):
            values["seconds"] = float(values["seconds"])
    seconds, memory = limits_of(values)
    return (usual[0] if seconds is None else seconds, usual[1] if memory is None else memory)


def _points(entry: Entry, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The params of every point of the entry's axes. It is one dict, changed in place: validation copies what it takes.

    Cost: nothing is held but the values of the axes that are not the first.
    """
    parts: list[tuple[list[str], list[Sequence[Any]]]] = [([axis], [values]) for axis, values in entry.grid.items()]
    parts += [(list(axes), list(axes.values())) for axes in (entry.zip, entry.random) if axes]
    if not parts:
        yield row
        return
    *slow, (names, columns) = parts
    if slow:  # they are gone through again and again
        columns = [values if isinstance(values, range | list) else list(values) for values in columns]
    outer = [name for part, _ in slow for name in part]
    for point in itertools.product(*(zip(*values, strict=True) for _, values in slow)):
        row.update(zip(outer, itertools.chain.from_iterable(point), strict=True))
        if len(names) == 1:
            (axis,) = names
            for value in columns[0]:
                row[axis] = value
                yield row
        else:
            for together in zip(*columns, strict=True):
                row.update(zip(names, together, strict=True))
                yield row


def _shared(params: type[Contract]) -> dict[str, bool]:
    """Fields that hold references -> whether all jobs of one `run_many` call have the same there."""
    return {
        name: all(mark.shared for mark in marks if isinstance(mark, ReferenceTo))
        for name in reference_fields(params)
        for marks in [[*params.model_fields[name].metadata, *_marks(params.model_fields[name].annotation)]]
    }


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

    Values are read by the field's type, as CSV cells are (`radius=1e-2`, `hidden=[8, 8]`, `--network '{dataset:
    digits}'`); paths start from the working folder. Files and recipes are kept at once. Raises BadSweep with all that
    is wrong.
    """
    texts, errors = _options(options)
    readers = cells.readers(method.Params)
    errors += [
        RowError(method.name, 0, name, wording.unknown_field(name, method.Params, method.name))
        for name in texts
        if name not in readers
    ]
    if errors:
        raise BadSweep(method.name, errors)
    values = {name: readers[name](text) for name, text in texts.items()}
    try:
        return method.Params.model_validate(
            values, context={"resolve": resolver if resolver is not None else references.in_process()}
        )
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
