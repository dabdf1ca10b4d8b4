"""Records as tidy tables: a row a job, its params and results as typed columns; a frame in memory, Parquet or CSV.

Columns, in this order:

* of every job: `job` (its key), `batches` (a list), `method`, `version`, `state`, `cause`, `message`, `seconds`,
  `finished` (UTC), `attempts`; a job that has not ended has no `seconds` and no `finished`;
* each field of `Params` under its own name, then each field of `Result`. A param called as a column above is
  `params.<name>`; a result called so, or as a param of its method, is `result.<name>`;
* a nested field has its path with dots (`training.kind`);
* a reference is the user's name for it, `<field>.reference` the reference;
* an array is a struct of its dtype, its shape and its reference (null where it is kept inside the record); if asked
  for, such a small one is the list of its numbers in C order, beside `<field>.shape` and `<field>.reference`.

Types come from `Params` and `Result` where this process knows the method in the version of the record: Int64, Float64
(NaN and infinities are themselves), Boolean, text, lists of these. What they leave open (`int | str`, `Any`), and other
methods and versions, is read off the data, in a pass of its own. Where methods share a column, whole numbers and
fractions become Float64 and any other two types text: numbers and lists then stand in it as JSON. A whole number beyond
64 bits makes its column Float64, rounded. Mappings whose keys no model names, and lists of mappings or models, are JSON
in one column.
"""

from __future__ import annotations

import csv
import datetime
import enum
import functools
import itertools
import json
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import pyarrow as pa
from pydantic import BaseModel

from netassay import catalogue, fields
from netassay.errors import UserError
from netassay.job import Record
from netassay.store import reading, storable
from netassay.store.database import Database
from netassay.store.reading import Query
from netassay.store.transfer import beside
from producer.wording import plain, strict

if TYPE_CHECKING:
    import polars

FORMATS = ("parquet", "csv")
#: Records turned into columns at a time: some 3 KB each while they are Python objects.
_GROUP = 10_000
#: Rows of a Parquet row group: readers skip and parallelise by these, writers hold one in memory.
_ROW_GROUP = 100_000
#: More different keys than this are data, not columns.
_MOST_KEYS = 100

_ABOUT: dict[str, pa.DataType] = {
    "job": pa.string(),
    "batches": pa.list_(pa.string()),
    "method": pa.string(),
    "version": pa.int64(),
    "state": pa.string(),
    "cause": pa.string(),
    "message": pa.string(),
    "seconds": pa.float64(),
    "finished": pa.timestamp("us", tz="UTC"),
    "attempts": pa.int64(),
}
_ARRAY = pa.struct([("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("reference", pa.string())])
_WHOLE = range(-(2**63), 2**63)

Place = tuple[str, ...]


class NoSuchColumn(UserError, LookupError):
    """The message lists the columns there are."""


class Changed(UserError):
    """Records came in while they were written out, of a shape that the columns already written cannot hold."""


class _Misfit(Exception):
    """A value that its column cannot hold: it was stored after the columns were decided on, or its model lies."""

    def __init__(self, column: str) -> None:
        self.column = column


# --- what a column may hold ---------------------------------------------------------------------------------------


@dataclass
class _Shape:
    """What stands at one path of the params or results of a method. kind: its type; None: to be read off the data."""

    kind: pa.DataType | None
    reference: bool = False
    array: bool = False

    def unite(self, other: _Shape) -> _Shape:
        known = self.kind is not None and other.kind is not None
        kind = _join(self.kind, other.kind) if known else None
        return _Shape(kind, self.reference or other.reference, self.array or other.array)


def _join(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(_join(one.value_type, other.value_type))
    return pa.string()


_SCALARS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), type(None): pa.null()}


def _declared(model: type[BaseModel], path: Place = ()) -> dict[Place, _Shape]:
    """Path -> shape of every field of a model, nested models included."""
    found: dict[Place, _Shape] = {}
    for name, about in model.model_fields.items():
        for inner, shape in _of(about.annotation, about.metadata, (*path, name)).items():
            found[inner] = found[inner].unite(shape) if inner in found else shape
    return found


def _of(annotation: Any, marks: Sequence[Any], path: Place) -> dict[Place, _Shape]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _of(parts[0], [*marks, *parts[1:]], path)
    if _is_array(marks):
        return {path: _Shape(_ARRAY, array=True)}
    if origin in (typing.Union, types.UnionType):
        return _union([part for part in parts if part is not type(None)], marks, path)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _declared(annotation, path)
    return {path: _Shape(_kind(annotation), _is_reference([*marks, *_inner_marks(annotation)]))}


def _is_reference(marks: Sequence[Any]) -> bool:
    return any(isinstance(mark, fields.ReferenceTo) for mark in marks)


def _inner_marks(annotation: Any) -> Iterator[Any]:
    """All that is annotated inside a type, such as `list[NetworkRef]`."""
    yield from getattr(annotation, "__metadata__", ())
    for part in typing.get_args(annotation):
        yield from _inner_marks(part)


def _is_array(marks: Sequence[Any]) -> bool:
    # The validator of `fields.Array` is one object, shared by all fields of that type.
    return any(mark is own for mark in marks for own in typing.get_args(fields.Array)[1:2])


def _union(parts: Sequence[Any], marks: Sequence[Any], path: Place) -> dict[Place, _Shape]:
    found: dict[Place, _Shape] = {}
    for part in parts:
        for inner, shape in _of(part, marks, path).items():
            if inner not in found:
                found[inner] = shape
                continue
            united = found[inner].unite(shape)
            # `int | str` may be numbers throughout: that is for the data to say.
            clash = united.kind == pa.string() and {found[inner].kind, shape.kind} != {pa.string()}
            found[inner] = _Shape(None, united.reference, united.array) if clash else united
    return found


def _kind(annotation: Any) -> pa.DataType | None:
    """The type of a field that is neither an array nor a model; None where the annotation leaves it open."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return None if _is_array(parts[1:]) else _kind(parts[0])
    if origin is Literal:
        return _common([_SCALARS.get(type(value)) for value in parts])
    if origin in (list, set, frozenset, Sequence, Iterable) or annotation in (list, tuple):
        if parts and _is_mapping(parts[0]):
            return pa.string()
        inner = _kind(parts[0]) if parts else None
        return None if inner is None else pa.list_(inner)
    if origin is tuple:
        inner = _common([_kind(part) for part in parts if part is not Ellipsis])
        return None if inner is None else pa.list_(inner)
    if origin in (typing.Union, types.UnionType):
        return _common([_kind(part) for part in parts if part is not type(None)])
    if _is_mapping(annotation):
        return pa.string()
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum):
            return _common([_SCALARS.get(type(member.value)) for member in annotation])
        return _SCALARS.get(annotation)
    return None


def _is_mapping(annotation: Any) -> bool:
    """Whether it is stored as a JSON object: a mapping, or a model."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Annotated, typing.Union, types.UnionType):
        return any(map(_is_mapping, parts[:1] if origin is Annotated else parts))
    return origin in (dict, Mapping) or (isinstance(annotation, type) and issubclass(annotation, dict | BaseModel))


def _common(kinds: Sequence[pa.DataType | None]) -> pa.DataType | None:
    result = pa.null()
    for kind in kinds:
        if kind is None:
            return None
        if (united := _join(result, kind)) == pa.string() and kind != pa.string():
            return None
        result = united
    return result


# --- what the data say --------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What was met under one name: the types of plain values, and what mappings held."""

    kind: pa.DataType = field(default_factory=pa.null)
    reference: bool = False
    array: bool = False
    inside: dict[str, _Seen] = field(default_factory=dict)

    def look(self, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, dict):
            if storable.is_array(value):
                self.array = True
            elif not value:
                self.kind = _join(self.kind, pa.string())
            for name, item in () if storable.is_array(value) else value.items():
                if name not in self.inside and len(self.inside) < _MOST_KEYS + 1:
                    self.inside[name] = _Seen()
                if name in self.inside:
                    self.inside[name].look(item)
            return
        if isinstance(value, str) and not self.reference:
            self.reference = bool(fields.REFERENCE.match(value))
        kind = _kind_of(value)
        if kind is not self.kind:
            self.kind = _join(self.kind, kind)

    def shapes(self, path: Place) -> dict[Place, _Shape]:
        if len(self.inside) > _MOST_KEYS:
            return {path: _Shape(pa.string())}
        found: dict[Place, _Shape] = {}
        if self.array:
            found[path] = _Shape(_ARRAY if pa.types.is_null(self.kind) else pa.string(), array=True)
        elif not pa.types.is_null(self.kind) or not self.inside:
            found[path] = _Shape(pa.string() if pa.types.is_null(self.kind) else self.kind, self.reference)
        for name, inner in self.inside.items():
            found |= inner.shapes((*path, name))
        return found


_NULL, _INT, _FLOAT, _TEXT = pa.null(), pa.int64(), pa.float64(), pa.string()


def _kind_of(value: Any) -> pa.DataType:
    if isinstance(value, list):
        kinds = {_kind_of(item) for item in value}
        inner = _NULL
        for kind in kinds:
            inner = _join(inner, kind)
        return pa.list_(inner)
    if type(value) is int:
        return _INT if value in _WHOLE else _FLOAT
    return _SCALARS.get(type(value), _TEXT)


# --- from shapes to columns ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of one method: its name and type, and how to read it off records."""

    name: str
    kind: pa.DataType
    values: Callable[[Sequence[Record]], list[Any]]


def _columns(params: Mapping[Place, _Shape], result: Mapping[Place, _Shape], arrays: bool) -> list[_Column]:
    """Columns of one method, named so that no two are called alike."""
    found: list[_Column] = []
    taken = set(_ABOUT)
    for source, shapes in (("params", params), ("result", result)):
        for path, shape in shapes.items():
            name = _free(source, ".".join(path), taken)
            assert shape.kind is not None
            for column in _parts(name, shape, _reader(source, path), arrays):
                taken.add(column.name)
                found.append(column)
    return found


def _free(source: str, name: str, taken: Container[str]) -> str:
    while name in taken:
        name = f"{source}.{name}"
    return name


def _reader(source: str, path: Place) -> Callable[[Sequence[Record]], list[Any]]:
    first, *rest = path
    where = (lambda record: record.params) if source == "params" else (lambda record: record.result or _NOTHING)

    def read(records: Sequence[Record]) -> list[Any]:
        values = [where(record).get(first) for record in records]
        for name in rest:
            values = [value.get(name) if isinstance(value, dict) else None for value in values]
        return values

    return read


_NOTHING: dict[str, Any] = {}


def _parts(name: str, shape: _Shape, read: Callable[[Sequence[Record]], list[Any]], arrays: bool) -> Iterator[_Column]:
    kind = shape.kind
    assert kind is not None
    if shape.array and kind == _ARRAY:
        if not arrays:
            yield _Column(name, _ARRAY, lambda records: list(map(_about_array, read(records))))
            return
        yield _Column(name, pa.list_(pa.float64()), lambda records: list(map(_numbers, read(records))))
        for part in ("shape", "reference"):
            inner = _ARRAY.field(part).type
            yield _Column(f"{name}.{part}", inner, functools.partial(_part_of, part, read))
    elif shape.reference:
        yield _Column(name, kind, lambda records: [_called(r, v) for r, v in zip(records, read(records), strict=True)])
        yield _Column(f"{name}.reference", kind, lambda records: list(map(_reference, read(records))))
    elif kind == _TEXT:
        yield _Column(name, kind, read)
    else:
        # What is nested stands in columns of its own.
        yield _Column(name, kind, lambda records: [None if isinstance(v, dict) else v for v in read(records)])


def _part_of(part: str, read: Callable[[Sequence[Record]], list[Any]], records: Sequence[Record]) -> list[Any]:
    return [about and about[part] for about in map(_about_array, read(records))]


def _called(record: Record, value: Any) -> Any:
    if isinstance(value, list):
        return [_called(record, item) for item in value]
    return record.names.get(value, value) if isinstance(value, str) else value


def _reference(value: Any) -> Any:
    if isinstance(value, list):
        return [_reference(item) for item in value]
    return value if isinstance(value, str) and fields.REFERENCE.match(value) else None


def _about_array(value: Any) -> dict[str, Any] | None:
    """Of a number in an array's place too: it is an array of no axes."""
    if value is None:
        return None
    if not storable.is_array(value):
        return {"dtype": None, "shape": [len(value)] if isinstance(value, list) else [], "reference": None}
    kept = value["array"].startswith("array:")
    return {"dtype": value["dtype"], "shape": value["shape"], "reference": value["array"] if kept else None}


def _numbers(value: Any) -> list[float] | None:
    """The numbers of an array that the record itself holds, real parts only of complex ones left out."""
    if value is None or (storable.is_array(value) and value["array"].startswith("array:")):
        return None
    array = storable.load_array(value)
    return None if array.dtype.kind == "c" else array.ravel().astype(float).tolist()


@dataclass
class Schema:
    """The columns of a table: their names and types, and of each (method, version) how they are read."""

    columns: dict[str, pa.DataType]
    methods: dict[tuple[str, int], list[_Column]]

    def arrow(self, wanted: Sequence[str] = ()) -> pa.Schema:
        return pa.schema([(name, self.columns[name]) for name in wanted or self.columns])


def _check(schema: Schema, wanted: Iterable[str]) -> None:
    if unknown := [name for name in dict.fromkeys(wanted) if name not in schema.columns]:
        raise NoSuchColumn(f"there is no column {', '.join(unknown)}; columns are: {', '.join(schema.columns)}")


Texts = Callable[[str, int], Iterable[tuple[dict[str, Any], dict[str, Any] | None]]]


def _schema(methods: Iterable[tuple[str, int]], texts: Texts, arrays: bool) -> Schema:
    """texts: params and results of all records of a method and version."""
    schema = Schema(dict(_ABOUT), {})
    for name, version in methods:
        declared = _models(name, version)
        shapes = _look(declared, texts(name, version)) if _open(declared) else declared
        assert shapes is not None
        schema.methods[name, version] = columns = _columns(*shapes, arrays)
        for column in columns:
            there = schema.columns.get(column.name)
            schema.columns[column.name] = column.kind if there is None else _join(there, column.kind)
    schema.columns = {name: _settled(kind) for name, kind in schema.columns.items()}
    return schema


def _settled(kind: pa.DataType) -> pa.DataType:
    """Not every reader of Parquet knows columns without a type: what was never seen is text."""
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    return pa.string() if pa.types.is_null(kind) else kind


Shapes = tuple[dict[Place, _Shape], dict[Place, _Shape]]


def _models(name: str, version: int) -> Shapes | None:
    """Shapes by the method's models; None where this process does not know the method in that version."""
    try:
        method = catalogue.get(name)
    except Exception:  # a user's own module may fail in any way; its records are readable all the same
        return None
    return (_declared(method.Params), _declared(method.Result)) if method.version == version else None


def _open(shapes: Shapes | None) -> bool:
    return shapes is None or any(shape.kind is None for part in shapes for shape in part.values())


def _look(declared: Shapes | None, texts: Iterable[tuple[dict[str, Any], dict[str, Any] | None]]) -> Shapes:
    """Complete the shapes by what the data hold."""
    seen: tuple[dict[Place, _Seen], dict[Place, _Seen]] = ({}, {})
    wanted: list[list[Place]] = [
        [path for path, shape in part.items() if shape.kind is None] for part in declared or ({}, {})
    ]
    for both in texts:
        for place, values in enumerate(both):
            if values is None:
                continue
            for path in wanted[place] if declared is not None else [(name,) for name in values]:
                value: Any = values
                for name in path:
                    value = value.get(name) if isinstance(value, dict) else None
                if path not in seen[place]:
                    seen[place][path] = _Seen()
                seen[place][path].look(value)
    found: list[dict[Place, _Shape]] = []
    for place, met in enumerate(seen):
        part: dict[Place, _Shape] = {}
        if declared is None:
            for path, one in met.items():
                part |= one.shapes(path)
        else:
            for path, shape in declared[place].items():
                if shape.kind is not None:
                    part[path] = shape
                    continue
                for inner, told in met[path].shapes(path).items() if path in met else [(path, _Shape(_TEXT))]:
                    part[inner] = _Shape(told.kind, shape.reference or told.reference, told.array)
        found.append(part)
    return found[0], found[1]


# --- from records to tables ---------------------------------------------------------------------------------------


def _table(schema: Schema, records: Sequence[Record], wanted: Sequence[str]) -> pa.Table:
    """These records in their order. Raises _Misfit."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault((record.method, record.version), []).append(place)
    tables = []
    for method, places in groups.items():
        if method not in schema.methods:
            raise _Misfit("")
        members = records if len(groups) == 1 else [records[place] for place in places]
        columns = {column.name: column for column in schema.methods[method]}
        arrays = []
        for name in wanted or schema.columns:
            kind = schema.columns[name]
            if name in _ABOUT:
                arrays.append(pa.array(_about(name, members), kind))
            elif name in columns:
                arrays.append(_array(name, columns[name].values(members), kind))
            else:
                arrays.append(pa.nulls(len(members), kind))
        tables.append(pa.Table.from_arrays(arrays, schema=schema.arrow(wanted)))
    if len(tables) == 1:
        return tables[0]
    order = list(itertools.chain.from_iterable(groups.values()))
    back = sorted(range(len(order)), key=order.__getitem__)
    return pa.concat_tables(tables).combine_chunks().take(back)


def _about(name: str, records: Sequence[Record]) -> list[Any]:
    match name:
        case "job":
            return [record.key for record in records]
        case "batches":
            return [list(record.batches) for record in records]
        case "seconds":
            return [record.seconds if record.finished else None for record in records]
        case "finished":  # microseconds since 1970
            return [round(record.finished * 1e6) if record.finished else None for record in records]
        case _:
            return [getattr(record, name) for record in records]


def _array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    try:
        return pa.array([_fit(value, kind) for value in values], kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        raise _Misfit(name) from None


def _fit(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if kind == _TEXT:
        text = value if isinstance(value, str) else json.dumps(strict(value), ensure_ascii=False, allow_nan=False)
        return text.encode(errors="backslashreplace").decode()
    if kind == _FLOAT and not isinstance(value, bool):
        return float(value)
    if pa.types.is_list(kind) and isinstance(value, list):
        return [_fit(item, kind.value_type) for item in value]
    return value


Progress = Callable[[int], None]


def _quiet(done: int) -> None:
    pass


class _Source:
    """The records of a query, or given ones, that may be walked over more than once; their columns are decided on at
    first, and widened where a walk meets what does not fit."""

    def __init__(self, walk: Callable[[], Iterable[Record]], decide: Callable[[], Schema], wanted: Sequence[str]):
        self.walk, self.decide, self.wanted = walk, decide, list(dict.fromkeys(wanted))
        self.text: set[str] = set()

    def schema(self) -> Schema:
        schema = self.decide()
        schema.columns |= {name: pa.string() for name in self.text if name in schema.columns}
        _check(schema, self.wanted)
        return schema

    def tables(self, schema: Schema, progress: Progress) -> Iterator[pa.Table]:
        records, done = iter(self.walk()), 0
        while group := list(itertools.islice(records, _GROUP)):
            yield _table(schema, group, self.wanted)
            done += len(group)
            progress(done)

    def persist(self, action: Callable[[Schema], int]) -> int:
        """`action` with the columns; again with wider ones where records that came meanwhile do not fit."""
        while True:
            try:
                return action(self.schema())
            except _Misfit as misfit:
                if misfit.column in self.text:
                    raise
                if misfit.column:
                    self.text.add(misfit.column)


def _of_store(database: Database, query: Query, arrays: bool, wanted: Sequence[str]) -> _Source:
    def texts(name: str, version: int) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        for params, result in reading.texts(database, query, name, version):
            yield storable.parse(params), storable.load(result) if result else None

    def decide() -> Schema:
        return _schema(reading.methods(database, query), texts, arrays)

    return _Source(lambda: reading.find(database, query), decide, wanted)


def _of_records(records: Sequence[Record], arrays: bool, wanted: Sequence[str]) -> _Source:
    def texts(name: str, version: int) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        return ((r.params, r.result) for r in records if (r.method, r.version) == (name, version))

    def decide() -> Schema:
        return _schema(sorted({(record.method, record.version) for record in records}), texts, arrays)

    return _Source(lambda: records, decide, wanted)


# --- rows of plain values -----------------------------------------------------------------------------------------


def fields_of(record: Record) -> Iterator[tuple[str, str, Any]]:
    """(`params` or `result`, column, value) of each field, nested values whole and arrays by what they are."""
    taken = set(_ABOUT)
    for source, values in (("params", record.params), ("result", record.result or {})):
        for field_name, value in values.items():
            name = _free(source, field_name, taken)
            taken.add(name)
            yield source, name, _called(record, value) if source == "params" else plain(value)


def flat(record: Record) -> dict[str, Any]:
    """A record as one row, its columns called as in a frame."""
    row: dict[str, Any] = {"job": record.key[:12], "method": record.method, "state": record.state}
    row |= {name: value for _, name, value in fields_of(record)}
    return row | {"seconds": record.seconds, "cause": record.cause, "message": record.message}


def flat_rows(
    database: Database, query: Query, columns: Sequence[str] = (), progress: Progress = _quiet
) -> Iterator[dict[str, Any]]:
    """The records of a query as `flat` rows, with those of these columns that a flat row has not (`training.kind`).

    Raises NoSuchColumn, and what `reading.find` raises, at the first row.
    """
    schema = _of_store(database, query, False, columns).schema() if columns else None
    for number, record in enumerate(reading.find(database, query), 1):
        row = flat(record)
        if schema is not None and (more := set(columns) - row.keys()):
            row |= {name: _of_job(name, record) for name in more & _ABOUT.keys()}
            readers = schema.methods.get((record.method, record.version), ())
            row |= {column.name: column.values([record])[0] for column in readers if column.name in more}
        yield row
        if number % 1000 == 0:
            progress(number)


def _of_job(name: str, record: Record) -> Any:
    (value,) = pa.array(_about(name, [record]), _ABOUT[name]).to_pylist()
    return _utc(value) if isinstance(value, datetime.datetime) else value


# --- frames and files ---------------------------------------------------------------------------------------------


def frame(
    database: Database,
    query: Query,
    arrays: bool = False,
    columns: Sequence[str] = (),
    progress: Progress = _quiet,
) -> polars.DataFrame:
    """The records of a query as a frame in memory. columns: only these, in this order; progress: told how many
    records were read.

    Raises NoSuchColumn, and what `reading.find` raises.
    """
    return _frame(_of_store(database, query, arrays, columns), progress)


def frame_of(records: Iterable[Record], arrays: bool = False, columns: Sequence[str] = ()) -> polars.DataFrame:
    """As `frame`, of records at hand."""
    return _frame(_of_records(list(records), arrays, columns), _quiet)


def _frame(source: _Source, progress: Progress) -> polars.DataFrame:
    import polars

    kept: list[pa.Table] = []

    def read(schema: Schema) -> int:
        kept[:] = [schema.arrow(source.wanted).empty_table(), *source.tables(schema, progress)]
        return 0

    source.persist(read)
    found = polars.from_arrow(pa.concat_tables(kept))
    assert isinstance(found, polars.DataFrame)
    return found


def write(
    database: Database,
    query: Query,
    path: Path,
    format: str = "parquet",
    arrays: bool = False,
    columns: Sequence[str] = (),
    progress: Progress = _quiet,
) -> int:
    """Write the records of a query to a file of that format (`parquet` or `csv`), row group by row group. Returns how
    many. The file appears when it is whole.

    Raises NoSuchColumn, and what `reading.find` raises.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, must be one of {', '.join(FORMATS)}")
    source = _of_store(database, query, arrays, columns)
    with beside(path) as temporary:
        if format == "csv":
            with open(temporary, "w", newline="", encoding="utf-8") as stream:
                return source.persist(lambda schema: _csv(source, schema, stream, progress, again=True))
        return source.persist(lambda schema: _parquet(source, schema, temporary, progress))


def write_csv(
    database: Database, query: Query, stream: TextIO, columns: Sequence[str] = (), progress: Progress = _quiet
) -> int:
    """Write the records of a query to a stream as CSV. Returns how many. Raises as `write`."""
    source = _of_store(database, query, False, columns)
    try:
        return _csv(source, source.schema(), stream, progress, again=False)
    except _Misfit as misfit:
        raise Changed(
            f"jobs ended while they were written, and column {misfit.column!r} cannot hold them; do the same again, or "
            "write to a file"
        ) from None


def _parquet(source: _Source, schema: Schema, path: Path, progress: Progress) -> int:
    import pyarrow.parquet as parquet

    rows, waiting, pending = 0, [], 0
    with parquet.ParquetWriter(path, schema.arrow(source.wanted), compression="zstd") as writer:
        for table in source.tables(schema, progress):
            waiting.append(table)
            pending += table.num_rows
            rows += table.num_rows
            if pending >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=pending)
                waiting, pending = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=pending)
    return rows


def _csv(source: _Source, schema: Schema, stream: TextIO, progress: Progress, again: bool) -> int:
    """`again`: the stream can be begun anew. CSV has no types; only a column that was not there could be amiss."""
    if again:
        stream.seek(0)
        stream.truncate()
    writer, rows = csv.writer(stream, lineterminator="\n"), 0
    names = list(schema.arrow(source.wanted).names)
    writer.writerow(names)
    for table in source.tables(schema, progress):
        columns = [_words(table.column(name).to_pylist(), table.schema.field(name).type) for name in names]
        writer.writerows(zip(*columns, strict=True))
        rows += table.num_rows
    return rows


def _words(values: list[Any], kind: pa.DataType) -> list[Any]:
    """Values as CSV holds them: true and false, times in ISO 8601, lists and structs as JSON."""
    if kind == pa.bool_():
        return [None if value is None else "true" if value else "false" for value in values]
    if pa.types.is_timestamp(kind):
        return [None if value is None else _utc(value) for value in values]
    if pa.types.is_nested(kind):
        return [None if value is None else json.dumps(strict(value), ensure_ascii=False) for value in values]
    return values


def _utc(time: datetime.datetime) -> str:
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")
