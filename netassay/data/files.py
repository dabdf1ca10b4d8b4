"""Datasets from users' files: .npz, .csv and .parquet become one canonical artifact, which is all that workers read.

    my.csv     or     {file: my.csv, label: species, scale: minmax}

Tables (.csv, .parquet): one row an example, the first line of a .csv the names of the columns. The last column is the
class, or the one that `label` names; all others are features and must hold finite numbers. Arrays (.npz): `x` (or X,
data) of shape (n, ...) and `y` (or labels, target) of n classes; `feature_names` and `class_names` (or target_names)
are taken along if they are there. Pickled arrays are never read: unpickling can run code.

Classes written as text become 0, 1, ... in sorted order. Whole numbers are kept as they are, because output j of a
network means class j: they must be 0 .. k-1, none left out unless `classes` says how many there are. Numbers beside
text are refused: one `NA` would make text of all classes, and another order of them.

Values are scaled as `scale` says (`netassay.data.splits.Scale`; by default not at all) and then rounded once to
float32. Certificates cut their balls with [0, 1] unless told not to: `minmax` puts data there.

The artifact is an .npz without compression: x (n, *shape) float32, y (n,) int64, classes (k,) and features (d,) text,
features empty where they have no names. We write its bytes ourselves, with no time stamps, so that the same content is
the same digest whatever format it came in. The names are content: a renamed column is another dataset.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from netassay.data.splits import PERIOD, Facts, Scale, scaled
from netassay.fields import Count
from netassay.heavy import np
from netassay.method import Contract, InvalidInput

if TYPE_CHECKING:
    import numpy
    import polars

SUFFIXES = (".csv", ".npz", ".parquet")
#: Bytes of a file, and numbers of a dataset (2 GiB in float64): reading takes a few times as much memory.
LARGEST_FILE, LARGEST = 2**31, 2**28
#: More classes than this are taken for a wrong column; longer names for a column of prose.
_MOST_CLASSES, _LONGEST_NAME = 10_000, 200
_LONGEST_LINE = 16 << 20
#: Bytes of a column of text.
_MOST_TEXT = 256 << 20
_X, _Y = ("x", "X", "data"), ("y", "labels", "target")
_FEATURES, _CLASSES = ("feature_names", "features"), ("class_names", "target_names", "classes")


#: What Python's reader of zip archives and NumPy's of arrays raise for damaged ones.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, OSError, ValueError,
    struct.error, TypeError, KeyError, OverflowError, SyntaxError,
)  # fmt: skip


class DatasetFileError(InvalidInput, ValueError):
    """A file that cannot be used as a dataset: what, why, what to try. A ValueError too, for validators."""


class File(Contract):
    """A dataset in a file, and how it is to be read."""

    file: Annotated[str, Field(min_length=1)]
    label: str | None = None
    """column (or array of an .npz) that holds the classes; None: the last column (y, labels or target)"""
    without: tuple[str, ...] = ()
    """columns of a table that are left out, such as a row number"""
    header: bool = True
    """whether the first line of a .csv holds the names of its columns; without, they are column_1, column_2, ..."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """between the cells of a .csv"""
    classes: Annotated[int, Field(ge=2, le=_MOST_CLASSES)] | None = None
    """number of classes, where some of them have no example in the file"""
    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] | None = None
    """shape of one example, e.g. [1, 28, 28]; None: as it is in the file"""
    scale: Scale = "none"


@dataclass(frozen=True, eq=False)
class Table:
    """x: (n, *shape), float64 holding float32 numbers. y: (n,), int64. features: empty where they have no names."""

    x: numpy.ndarray
    y: numpy.ndarray
    classes: tuple[str, ...]
    features: tuple[str, ...]


def parse(mapping: Mapping[str, Any]) -> File:
    """The options of a mapping with `file`. Raises ValueError with one line for each that is wrong."""
    try:
        return File.model_validate(dict(mapping))
    except ValidationError as error:
        raise ValueError("; ".join(map(_told, error.errors(include_url=False)))) from None


def _told(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{place}: is not known; a dataset's file takes {', '.join(File.model_fields)}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, options: File) -> Table:
    """The dataset in a file. Raises DatasetFileError naming row and column, OSError."""
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise DatasetFileError("the file is empty", what_to_try="a file with a row for each example")
    if size > LARGEST_FILE:
        raise DatasetFileError(
            f"the file has {size / 2**30:.1f} GiB",
            f"datasets are read as a whole, so at most {LARGEST_FILE // 2**30} GiB are",
            "a part of it, or an .npz of float32 in place of text",
        )
    suffix = path.suffix.lower()
    if suffix == ".npz":
        x, y, classes, features = _arrays(path, options)
    elif suffix in SUFFIXES:
        x, y, classes, features = _columns(
            _csv(path, options) if suffix == ".csv" else _parquet(path, options.without), options
        )
    else:
        raise DatasetFileError(
            f"a dataset cannot be read from {suffix or 'a file without a suffix'}",
            what_to_try=f"one of {', '.join(SUFFIXES)}",
        )
    if len(y) < PERIOD:
        raise DatasetFileError(
            f"there are {len(y)} examples",
            f"every {PERIOD}rd example is for testing, so at least {PERIOD} are needed",
            "a file with a row for each example",
        )
    if len(set(np.unique(y).tolist())) < 2:
        raise DatasetFileError(
            f"all {len(y)} examples are of one class ({classes[int(y[0])]!r})",
            "there is nothing to tell apart",
            "name the column of the classes with `label`",
        )
    if any("\0" in name for name in (*classes, *features)):
        raise DatasetFileError("a name of a class or feature holds a NUL character", what_to_try="names without it")
    x = _rounded(x, options.scale)
    if options.shape is not None:
        if math.prod(options.shape) != math.prod(x.shape[1:]):
            raise DatasetFileError(
                f"an example has {math.prod(x.shape[1:])} values, which do not make up the shape {options.shape}",
                what_to_try="a shape whose product is that number, or leave columns out with `without`",
            )
        x = x.reshape(len(x), *options.shape)
    return Table(x, y, classes, features)


def _rounded(x: numpy.ndarray, scale: Scale) -> numpy.ndarray:
    """Scaled, then rounded once to float32; float64, with -0.0 as 0.0, which is the same number."""
    with np.errstate(over="ignore"):
        rounded = scaled(x, scale).astype(np.float32).astype(np.float64)
    if not np.isfinite(rounded).all():
        at = tuple(np.argwhere(~np.isfinite(rounded))[0].tolist())
        raise DatasetFileError(
            f"the value {float(x[at]):g} of example {at[0] + 1} is too large for float32",
            "networks read float32 numbers, of at most 3.4e38",
            "scale: minmax",
        )
    return rounded + 0.0


def _bounded(examples: int, values: int) -> None:
    if examples * values > LARGEST:
        raise DatasetFileError(
            f"{examples:,} examples of {values:,} values are too many",
            f"at most {LARGEST:,} numbers (2 GiB in float64) are read",
            "a part of the examples, or of the features",
        )


def _classed(y: numpy.ndarray, options: File, place: str) -> tuple[numpy.ndarray, tuple[str, ...]]:
    """Whole numbers as classes, and the classes' names. place: what holds them, in words."""
    if len(y) == 0:
        return y.astype(np.int64), ()
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= _MOST_CLASSES:
        wrong = low if low < 0 else high
        row = int(np.argmax(y == wrong))
        raise DatasetFileError(
            f"{place} holds {wrong} (row {row + 1})",
            f"classes are whole numbers from 0, at most {_MOST_CLASSES - 1:,}",
            "another `label`, numbers from 0, or names of classes as text",
        )
    count = options.classes if options.classes is not None else high + 1
    if high >= count:
        row = int(np.argmax(y == high))
        raise DatasetFileError(
            f"{place} holds {high} (row {row + 1}), but there are {count} classes: 0..{count - 1}",
            what_to_try=f"classes: {high + 1}, or numbers from 0",
        )
    missing = sorted(set(range(count)) - set(np.unique(y).tolist()))
    if missing and options.classes is None:
        raise DatasetFileError(
            f"{place} holds numbers up to {high}, but none is {missing[0]}",
            "output j of a network means class j, so numbers are not shifted",
            f"`classes: {count}` if some classes have no example here, else numbers from 0 without gaps, or text",
        )
    return y.astype(np.int64), tuple(map(str, range(count)))


def _named(names: Sequence[str], options: File, place: str) -> tuple[str, ...]:
    """Classes written as text, sorted: checked."""
    long = next((name for name in names if len(name) > _LONGEST_NAME), None)
    if len(names) > _MOST_CLASSES or long is not None:
        found = f"a text of {len(long)} characters" if long is not None else f"{len(names):,} different texts"
        raise DatasetFileError(
            f"{place} holds {found}",
            f"that is no column of classes: at most {_MOST_CLASSES:,} of {_LONGEST_NAME} characters",
            "name the column of the classes with `label`",
        )
    if options.classes is not None and options.classes != len(names):
        raise DatasetFileError(
            f"{place} holds {len(names)} classes as text, not {options.classes}",
            "of text, only those that occur are known",
            "leave `classes` out, or write the classes as numbers",
        )
    return tuple(names)


# --- tables -----------------------------------------------------------------------------------------------------------

_Parts = tuple["numpy.ndarray", "numpy.ndarray", tuple[str, ...], tuple[str, ...]]


def _csv(path: Path, options: File) -> polars.DataFrame:
    """All cells as text, so that a bad one can be told with its row."""
    import polars as pl

    names = _header(path, options)
    with open(path, "rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    _bounded(lines, len(names))
    try:
        frame = pl.read_csv(
            path,
            has_header=options.header,
            separator=options.separator,
            infer_schema=False,
            encoding="utf8",
        )
    except pl.exceptions.NoDataError:
        raise DatasetFileError("the file has no rows", what_to_try="a row for each example") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        _ragged(path, options, len(names))
        words = " ".join(str(error).partition("\n")[0].split())
        raise DatasetFileError("the file is no table", words[:100], "check its separator and its quotes") from None
    if frame.width != len(names):
        raise DatasetFileError(
            f"the first line has {len(names)} cells, the table {frame.width} columns",
            what_to_try="names of columns on one line, without quotes left open",
        )
    if options.header:
        frame.columns = names
    empty = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    if frame.width > 1 and empty.any():
        _blank(path, options)
        frame = frame.filter(~empty)
    return frame


def _header(path: Path, options: File) -> list[str]:
    """Cells of the first line that is not blank. Raises DatasetFileError where they are no names of columns."""
    with open(path, "rb") as file:
        first = next((line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip()), b"")
    if len(first) >= _LONGEST_LINE:
        raise DatasetFileError(
            f"the first line is longer than {_LONGEST_LINE >> 20} MiB", what_to_try="a line for each example"
        )
    try:
        names = next(csv.reader([first.decode("utf-8-sig")], delimiter=options.separator), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetFileError("the first line is not text in UTF-8", str(error), "save it as UTF-8") from None
    if not options.header:
        return names
    names = [name.strip() for name in names]
    if len(names) > 1 and all(_number(name) for name in names):
        raise DatasetFileError(
            "the first line holds numbers, not names of columns",
            what_to_try="a first line with names, or `header: false`",
        )
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DatasetFileError(f"two columns are called {twice!r}", what_to_try="a name of its own for each column")
    return names


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _blank(path: Path, options: File) -> None:
    """Raise a DatasetFileError for the first line of nothing but separators: only a blank line is no row."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not line.strip(options.separator.encode() + b'" \t\r\n'):
                raise DatasetFileError(
                    f"line {number} has empty cells only", what_to_try="leave it out, or fill in its values"
                )


def _ragged(path: Path, options: File, width: int) -> None:
    """Raise a DatasetFileError that names the first line which is not UTF-8 or has too many cells, if there is one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DatasetFileError(
                    f"line {number} is not text in UTF-8", str(error.reason), "save the file as UTF-8"
                ) from None
    with open(path, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=options.separator)
        try:
            for cells in rows:
                if len(cells) > width:
                    raise DatasetFileError(
                        f"line {rows.line_num} has {len(cells)} cells, the first line {width}",
                        what_to_try="as many cells in each line, with quotes around those that hold a separator",
                    )
        except csv.Error as error:
            raise DatasetFileError(f"line {rows.line_num} cannot be read", str(error), "check its quotes") from None


def _parquet(path: Path, without: Sequence[str] = ()) -> polars.DataFrame:
    # Not by Polars: on damaged files its reader panics, which is no error that a program can hold.
    import polars as pl
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(place) for place in range(len(file.schema))]
            # Of lists and texts a few bytes can say that they repeat for ever: a list is refused unread, a text is read
            # as its dictionary.
            lists = {leaf.path.partition(".")[0] for leaf in leaves if leaf.max_repetition_level}
            if found := sorted(lists - set(without)):
                raise DatasetFileError(
                    f"column {found[0]!r} holds lists, not numbers", what_to_try=f"`without: [{found[0]}]`"
                )
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            names = file.schema_arrow.names
            _bounded(file.metadata.num_rows, len(names))
            table = file.read(columns=[name for name in names if name not in lists]) if lists else file.read()
            table.validate(full=True)
            columns = [_written_out(column) for column in table.columns]
            # Without what other programs noted in the schema, which Polars would read.
            table = pa.table(
                [*columns, *(pa.nulls(table.num_rows) for _ in lists)], names=[*table.column_names, *sorted(lists)]
            )
    except DatasetFileError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetFileError(
            "the file is no Parquet file, or damaged",
            " ".join(str(error).split())[:200],
            "write it again, or give a .csv",
        ) from None
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DatasetFileError(f"two columns are called {twice!r}", what_to_try="a name of its own for each column")
    try:
        frame = pl.from_arrow(table)
    except (pl.exceptions.PolarsError, pa.ArrowException, ValueError, TypeError) as error:
        raise DatasetFileError(
            "the file holds columns that cannot be read", str(error)[:200], "numbers, and text for the classes"
        ) from None
    assert isinstance(frame, pl.DataFrame)
    return frame


def _written_out(column: Any) -> Any:
    """A column of texts that was read as a dictionary, as texts; any other as it is. Raises DatasetFileError."""
    import pyarrow as pa
    from pyarrow import compute

    if not pa.types.is_dictionary(column.type) or not (
        pa.types.is_string(column.type.value_type) or pa.types.is_binary(column.type.value_type)
    ):
        return column
    size = 0
    for chunk in column.chunks:
        lengths = compute.binary_length(chunk.dictionary).take(chunk.indices)
        size += compute.sum(compute.cast(lengths, pa.int64())).as_py() or 0
    if size > _MOST_TEXT:
        raise DatasetFileError(
            f"a column of texts has {size / 2**20:,.0f} MiB",
            f"that is no column of classes: too large, at most {_MOST_TEXT >> 20} MiB are read",
            "leave it out with `without`",
        )
    return column.cast(column.type.value_type)


def _columns(frame: polars.DataFrame, options: File) -> _Parts:
    """The parts of a table: x (n, columns) float64, y, names of classes, names of features."""
    for name in (*options.without, *((options.label,) if options.label is not None else ())):
        if name not in frame.columns:
            raise DatasetFileError(f"there is no column {name!r}", what_to_try=f"one of {_some(frame.columns)}")
    frame = frame.drop(options.without)
    label = options.label if options.label is not None else (frame.columns or [""])[-1]
    features = [name for name in frame.columns if name != label]
    if label not in frame.columns or not features:
        raise DatasetFileError(
            f"the table has {frame.width} column{'' if frame.width == 1 else 's'} to read",
            "it needs at least one feature and the class",
            "check `separator`, such as ';' or '\\t', `without`, and quotes left open",
        )
    if frame.height == 0:
        raise DatasetFileError("the table has no rows", what_to_try="a row for each example")
    _bounded(frame.height, len(features))
    x = np.empty((frame.height, len(features)))
    for place, name in enumerate(features):
        x[:, place] = _numbers(frame[name])
    y, classes = _labels(frame[label], options)
    return x, y, classes, tuple(features) if options.header else ()


def _numbers(column: polars.Series) -> numpy.ndarray:
    """A column as float64. Raises DatasetFileError for the first missing or non-numeric cell."""
    import polars as pl

    name, kind = column.name, column.dtype
    if kind == pl.String:
        column = column.str.strip_chars()
        cells = column.cast(pl.Float64, strict=False)
    elif kind.is_numeric() or kind == pl.Boolean:
        cells = column.cast(pl.Float64)
    else:
        raise DatasetFileError(
            f"column {name!r} holds {kind}, not numbers", what_to_try=f"`without: [{name}]`, or numbers in its place"
        )
    empty = column.is_null() | (column == "") if kind == pl.String else column.is_null()
    if empty.any():
        raise _at(column, empty, "is missing", "leave such rows or the column out, or fill in a value")
    if cells.is_null().any():
        what_to_try = f"`without: [{name}]`, `label: {name}` if it is the class, or numbers in its place"
        raise _at(column, cells.is_null(), "is not a number", what_to_try)
    if not cells.is_finite().all():
        raise _at(column, ~cells.is_finite(), "is not finite", "leave such rows or the column out, or fill in a value")
    return cells.to_numpy()


def _at(column: polars.Series, wrong: polars.Series, what: str, what_to_try: str) -> DatasetFileError:
    """What is wrong with the first of these cells. Rows are counted from 1, below the names of the columns."""
    first = int(wrong.arg_true()[0])
    value = column[first]
    shown = "a value" if value is None or value == "" else repr(value)[:60]
    others = int(wrong.sum()) - 1
    more = f" (and {others:,} more in this column)" if others else ""
    return DatasetFileError(f"row {first + 1}, column {column.name!r}: {shown} {what}{more}", "", what_to_try)


def _labels(column: polars.Series, options: File) -> tuple[numpy.ndarray, tuple[str, ...]]:
    """Classes of a column: whole numbers as they are, text in sorted order; never both."""
    import polars as pl

    name, kind = column.name, column.dtype
    place = f"column {name!r}"
    if kind in (pl.String, pl.Categorical, pl.Enum, pl.Boolean):
        column = column.cast(pl.String).str.strip_chars()
        empty = column.is_null() | (column == "")
    elif kind.is_numeric():
        empty = column.is_null() | column.cast(pl.Float64).is_nan()
    else:
        raise DatasetFileError(f"{place} holds {kind}, not classes", what_to_try="another `label`")
    if empty.any():
        raise _at(column, empty, "is missing", "leave such rows out, or write the class")
    numbers = column.cast(pl.Float64, strict=False)
    finite = numbers.is_finite().fill_null(False)
    if not finite.all() and (finite.any() or kind.is_numeric()):
        most = kind.is_numeric() or 2 * int(finite.sum()) >= len(finite)
        raise _at(column, ~finite if most else finite, _beside(most), _MIXED)
    if not finite.any():
        names = column.unique().sort().to_list()
        classes = _named(names, options, place)
        return column.replace_strict(names, range(len(names)), return_dtype=pl.Int64).to_numpy(), classes
    whole = numbers == numbers.round()
    if not whole.all():
        raise _at(
            column, ~whole, "is not a class", "whole numbers from 0 or text, or name the right column with `label`"
        )
    return _classed(numbers.to_numpy(), options, place)


# Were numbers beside text taken for text, the classes 0..11 would be numbered anew: 0, 1, 10, 11, 2, ...
_MIXED = "leave such rows out, or write the class; classes are all numbers or all text"


def _beside(numbers: bool) -> str:
    """What is wrong with a class where most others are numbers, or text."""
    return f"is not a class where most are {'numbers' if numbers else 'text'}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# --- arrays -----------------------------------------------------------------------------------------------------------


def _arrays(path: Path, options: File) -> _Parts:
    """The parts of an .npz: x (n, ...) float64, y, names of classes, names of features."""
    if options.without or not options.header or options.separator != ",":
        raise DatasetFileError(
            "`without`, `header` and `separator` are for tables", what_to_try="leave them out for an .npz"
        )
    if not zipfile.is_zipfile(path):
        raise DatasetFileError(
            "the file is no .npz", "it is not a zip of arrays", "write it with numpy.savez(file, x=..., y=...)"
        )
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            inside = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

            def array(looked_for: Sequence[str], needed: bool = True) -> numpy.ndarray | None:
                name = next((one for one in looked_for if one in inside), None)
                if name is None and needed:
                    raise DatasetFileError(
                        f"the file has no array called {' or '.join(looked_for)}",
                        f"it has {_some(inside) or 'none'}",
                        "numpy.savez(file, x=examples, y=classes)",
                    )
                if name is None:
                    return None
                _check_array(archive, name)
                return arrays[name]

            x = array(_X)
            y = array(_Y if options.label is None else (options.label,))
            features, classes = array(_FEATURES, needed=False), array(_CLASSES, needed=False)
    except DatasetFileError:
        raise
    except _DAMAGED as error:
        raise DatasetFileError("the file is damaged", str(error), "write it again with numpy.savez") from None
    assert x is not None
    assert y is not None
    if x.dtype.kind not in "fiub":
        raise DatasetFileError(f"x holds {x.dtype}, not numbers", what_to_try="an array of float32")
    if x.ndim < 2:
        raise DatasetFileError(
            f"x has the shape {x.shape}, but its axes are the examples and, behind them, the features",
            what_to_try="x[:, None] for one feature",
        )
    if y.ndim != 1:
        one_hot = "y.argmax(1)" if y.ndim == 2 and y.shape[1] > 1 else "y.ravel()"
        raise DatasetFileError(f"y has the shape {y.shape}, but is one class for each example", what_to_try=one_hot)
    if len(x) != len(y):
        raise DatasetFileError(
            f"x has {len(x):,} examples, but y has {len(y):,}", what_to_try="arrays of the same length"
        )
    _bounded(len(x), math.prod(x.shape[1:]))
    if len(y) == 0 or x.size == 0:
        raise DatasetFileError(f"x has the shape {x.shape}: it holds nothing", what_to_try="at least three examples")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        wrong = np.argwhere(~np.isfinite(x))
        at = tuple(wrong[0].tolist())
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        raise DatasetFileError(
            f"x[{', '.join(map(str, at))}] is {float(x[at])}, not a finite number{more}",
            what_to_try="leave such examples out, or fill in a value",
        )
    texts = [str(name) for name in classes] if classes is not None and classes.dtype.kind == "U" else []
    y, names = _array_labels(y, options, texts)
    width = math.prod(x.shape[1:])
    if features is not None and (features.shape != (width,) or features.dtype.kind != "U"):
        raise DatasetFileError(
            f"feature_names has the shape {features.shape} and holds {features.dtype}",
            f"it names the {width} features of an example, as text",
            "leave it out, or give one text for each feature",
        )
    return x, y, names, tuple(map(str, features)) if features is not None else ()


def _check_array(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array by its header: NumPy would make room for whatever size a header claims."""
    about = archive.getinfo(f"{name}.npy")
    with archive.open(about) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, kind = read_header[version](file)
        except zipfile.BadZipFile:
            raise
        except Exception as error:  # a header is Python's own text: what its parser raises is nobody's promise
            raise DatasetFileError(
                f"the array {name} cannot be read", str(error), "write the file again with numpy.savez"
            ) from None
        if kind.hasobject:
            raise DatasetFileError(
                f"the array {name} holds pickled Python objects",
                "unpickling can run code, so they are never read",
                f"numbers, or text such as {name}.astype(str)",
            )
        if math.prod(shape) > LARGEST:
            _bounded(shape[0], math.prod(shape[1:]))
        if math.prod(shape) * kind.itemsize + file.tell() > about.file_size:
            raise DatasetFileError(
                f"the array {name} is cut short",
                f"its header promises the shape {shape}",
                "write the file again with numpy.savez",
            )


def _array_labels(y: numpy.ndarray, options: File, texts: Sequence[str]) -> tuple[numpy.ndarray, tuple[str, ...]]:
    """Classes of an array, and their names. texts: names that the file gives to whole numbers, or none."""
    place = f"the array {options.label or 'y'}"
    if y.dtype.kind in "bU":
        text = np.char.strip(np.where(y, "true", "false") if y.dtype.kind == "b" else y)
        if (text == "").any():
            raise DatasetFileError(
                f"{place} holds an empty text (row {int(np.argmax(text == '')) + 1})", what_to_try="the class' name"
            )
        names, codes = np.unique(text, return_inverse=True)
        finite = np.array([_number(str(name)) and math.isfinite(float(name)) for name in names])[codes]
        if finite.all():  # as in a table, where all is text
            return _array_labels(text.astype(np.float64), options, texts)
        if finite.any():
            most = 2 * int(finite.sum()) >= len(finite)
            row = int(np.argmin(finite) if most else np.argmax(finite))
            raise DatasetFileError(
                f"{place} holds {str(text[row])!r} (row {row + 1}), which {_beside(most)}", what_to_try=_MIXED
            )
        return codes.astype(np.int64), _named([str(name) for name in names], options, place)
    if y.dtype.kind not in "iuf":
        raise DatasetFileError(f"{place} holds {y.dtype}, not classes", what_to_try="whole numbers from 0, or text")
    wrong = ~(y == np.round(y)) | ~np.isfinite(y)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DatasetFileError(
            f"{place} holds {float(y[row])} (row {row + 1}), which is not a class",
            what_to_try="whole numbers from 0, or text",
        )
    if not texts:
        return _classed(y, options, place)
    # The names say how many classes there are.
    counted = options if options.classes is not None else options.model_copy(update={"classes": len(texts)})
    y, numbers = _classed(y, counted, place)
    if len(texts) != len(numbers):
        raise DatasetFileError(
            f"class_names holds {len(texts)} names for {len(numbers)} classes", what_to_try="one for each class"
        )
    return y, _named(texts, counted, "class_names")


# --- the artifact -----------------------------------------------------------------------------------------------------


def content(table: Table) -> bytes:
    """The artifact's bytes: the same table gives the same bytes, on any machine."""
    buffer = io.BytesIO()
    arrays = {
        "x": np.ascontiguousarray(table.x, dtype="<f4"),
        "y": np.ascontiguousarray(table.y, dtype="<i8"),
        "classes": _text(table.classes),
        "features": _text(table.features),
    }
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            about = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            about.create_system = 3  # else it tells Windows from the others
            archive.writestr(about, _npy_header(array) + array.tobytes())
    return buffer.getvalue()


def _text(names: Sequence[str]) -> numpy.ndarray:
    return np.array(names, dtype=f"<U{max([1, *map(len, names)])}")


def _npy_header(array: numpy.ndarray) -> bytes:
    """Version 1.0 of NumPy's format, by hand: its own padding has changed between versions."""
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


_HEADER = re.compile(rb"'shape': (\([\d, ]*\))")


def facts(data: bytes) -> Facts:
    """What an artifact says of itself, without NumPy. Raises DatasetFileError for anything else than an artifact."""
    (size, *shape), (classes,) = _shape(data, "x"), _shape(data, "classes")
    return Facts(size, tuple(shape), classes)


def _shape(data: bytes, name: str) -> tuple[int, ...]:
    with _distrusted(), zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(f"{name}.npy") as file:
        found = _HEADER.search(file.read(256))
        shape: tuple[int, ...] = ast.literal_eval(found[1].decode("ascii")) if found else ()
        if len(shape) < (2 if name == "x" else 1):
            raise ValueError(f"{name} has the shape {shape}")
    return shape


def load(data: bytes) -> Table:
    """The dataset in an artifact. Raises DatasetFileError for anything else than an artifact."""
    with _distrusted():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in ("x", "y", "classes", "features"):
                _check_array(archive, name)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = Table(
                arrays["x"].astype(np.float64),
                arrays["y"].astype(np.int64),
                tuple(map(str, arrays["classes"])),
                tuple(map(str, arrays["features"])),
            )
    if found.x.ndim < 2 or found.y.shape != found.x.shape[:1]:
        raise _no_artifact(f"x has the shape {found.x.shape}, y {found.y.shape}")
    if len(found.y) and not 0 <= int(found.y.min()) <= int(found.y.max()) < len(found.classes):
        raise _no_artifact("y holds classes that have no name")
    return found


@contextlib.contextmanager
def _distrusted() -> Iterator[None]:
    """Whatever a zip archive or an array's header may raise, as a DatasetFileError: exports bring in artifacts that
    others wrote."""
    try:
        yield
    except DatasetFileError:
        raise
    except (*_DAMAGED, MemoryError) as error:
        raise _no_artifact(f"{type(error).__name__}: {error}") from None


def _no_artifact(why: str) -> DatasetFileError:
    return DatasetFileError(
        "the artifact is no dataset", f"it was not written by netassay, or is damaged ({why})", "submit its file again"
    )
