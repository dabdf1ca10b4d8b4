"""Files of rows: CSV, JSON Lines, a JSON list, or the `instances.csv` of a verification competition; also packed (.gz).

A row gives the params of one job, and may give `method`, `limits.seconds` and `limits.memory`. Files are read as
streams, row by row, and again from the start each time they are asked, so a million rows need no more memory than one.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, cast

from producer import plain, wording
from producer.plain import LONGEST, Unreadable

#: What is wrong with a row that cannot be read as one: (column or empty, sentence) of each fault.
BadRow: TypeAlias = list[tuple[str, str]]
#: Columns that are not params.
METHOD, SECONDS, MEMORY = "method", "limits.seconds", "limits.memory"
FORMATS = "YAML, JSON, JSON Lines, CSV and the instances.csv of VNN-COMP, each also packed with gzip"

_SIZE = f"{LONGEST // 2**20} MiB"
_SUFFIXES = {
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (as .xlsx and .npz are)",
    b"PK\x05\x06": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\x7fELF": "a program",
    b"\x89PNG": "an image",
    **{b"\x80" + bytes([protocol]): "a Python pickle" for protocol in range(2, 6)},
}
_YAML_LINE = re.compile(r"""(---|%YAML|-\s|-$|\?\s|["']?[\w. -]+["']?\s*:(\s|$))""")
_SPACE = re.compile(r"[ \t\n\r]*")


class Source:
    """Bytes that can be read from their start again and again, unpacked. name: for messages."""

    def __init__(self, path: Path, name: str = "", held: Any = None) -> None:
        self.path, self.name = path, name or path.name
        self._held = held  # a temporary file, which goes when the source does

    @classmethod
    def of_stream(cls, stream: BinaryIO, name: str = "standard input") -> Source:
        """A copy of a stream that can be read once only. Raises Unreadable where a line has no end."""
        held = tempfile.NamedTemporaryFile(prefix="netassay-")  # noqa: SIM115
        line = since = 0
        a_list = None
        while block := stream.read(2**20):
            if a_list is None:
                a_list = block.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" or block[:2] == b"\x1f\x8b"
            last = block.rfind(b"\n")
            line += block.count(b"\n")
            since = since + len(block) if last < 0 else len(block) - last - 1
            if since > LONGEST and not a_list:
                raise _too_long(line + 1)
            held.write(block)
        held.flush()
        return cls(Path(held.name), name, held)

    def open(self) -> BinaryIO:
        """Raises OSError."""
        with open(self.path, "rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(self.path, "rb")) if packed else open(self.path, "rb")

    def start(self, count: int = 2**16) -> bytes:
        """The first bytes. Raises Unreadable where they cannot be had."""
        try:
            with self.open() as stream:
                return stream.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"cannot be unpacked, it is damaged or cut off: {error}") from None
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror or error}") from None

    def whole(self) -> bytes:
        """All bytes of a document. Raises Unreadable, also where they are too many."""
        data = self.start(LONGEST + 1)
        if len(data) > LONGEST:
            raise Unreadable(
                f"is longer than {_SIZE}, the most that a YAML or JSON document may have; write rows as CSV or JSONL, "
                "which are read row by row, and use ranges"
            )
        return data


def form(source: Source) -> str:
    """Which of yaml, json, json list, jsonl and csv a source is, by its content and the suffix of its name.

    Raises Unreadable where it is none of them.
    """
    start = source.start()
    for mark, kind in _FOREIGN.items():
        if start.startswith(mark):
            raise Unreadable(f"is {kind}; jobs can be given as {FORMATS}")
    suffixes = [suffix.lower() for suffix in Path(source.name).suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if suffix == ".onnx":
        raise Unreadable("is a network; name it in a sweep, or run one job on it: netassay run METHOD network=FILE")
    if suffix == ".vnnlib":
        raise Unreadable("is a property; name it in a sweep or in an instances.csv, beside a network")
    expected = _SUFFIXES.get(suffix)
    # A character may be cut in two at the end of what was read; what comes before it must be text.
    cut = start[: start.rfind(b"\n") + 1] or start[:-4]
    text = plain.decode(cut if len(start) == 2**16 else start).removeprefix("\ufeff")
    if expected in ("yaml", "csv", "jsonl"):
        return expected
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    first = lines[0].strip() if lines else ""
    if first.startswith("["):
        return "json list" if expected == "json" or _is_json_start(text) else "yaml"
    if first.startswith("{"):
        try:
            values = plain.json_decoder.decode(first)
        except (ValueError, RecursionError):
            # The line may be cut by what was read, or be a row that is wrong, among rows that are right.
            long = expected is None and len(lines) == 1 and len(start) == 2**16 and '"jobs"' not in first
            if long or any(map(_is_object, lines[1:4])):
                return "jsonl"
            return "json" if expected == "json" or _is_json_start(text) else "yaml"
        rows = len(lines) > 1 or not isinstance(values, Mapping) or "jobs" not in values
        return "jsonl" if rows else "json"
    if expected == "json" or _YAML_LINE.match(first) or not first:
        return expected or "yaml"
    return "csv"


def _is_json_start(text: str) -> bool:
    """Whether `[` or `{` begins JSON rather than YAML's brackets: by what stands behind them all."""
    inside = text.lstrip("[{ \t\r\n")
    return inside[:1] in ('"', "]", "}", "-", "") or inside[:1].isdigit()


def _is_object(line: str) -> bool:
    try:
        return isinstance(plain.json_decoder.decode(line), dict)
    except (ValueError, RecursionError):
        return False


# --- tables -----------------------------------------------------------------------------------------------------------


class Table(Protocol):
    """Rows, one after the other.

    name: of the file, for messages. unit: what its rows are counted by, line or row. method: what the rows are jobs of
    where nothing else says so. columns: those of all rows; None where each row has its own names. texts: whether values
    are text, to be read by the field's type.
    """

    name: str
    unit: str
    method: str
    columns: Sequence[str] | None
    texts: bool

    def __len__(self) -> int:
        """How many rows, bad ones among them. For a file this reads it."""

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """(line of the file, row) of each row. Raises Unreadable where reading on is impossible."""


class Listed:
    """Rows in memory: the items of a YAML list, or what a program gives. lines: where each begins, if that is known."""

    columns: Sequence[str] | None = None
    texts = False

    def __init__(self, rows: Sequence[Any], name: str, lines: Sequence[int] = (), method: str = "") -> None:
        self.rows, self.name, self.lines, self.method = rows, name, lines, method
        self.unit = "line" if lines else "row"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        for place, row in enumerate(self.rows):
            yield self.lines[place] if self.lines else place + 1, _row(row)


class RowFile:
    """A file of rows, read as a stream. Raises Unreadable where its beginning is wrong, or it has no rows."""

    method, unit = "", "line"

    def __init__(self, source: Source, form: str) -> None:
        self.source, self.form, self.name = source, form, source.name
        self.columns: Sequence[str] | None = None
        self.texts = form == "csv"
        self._headed, self._delimiter = False, ","
        if form == "csv":
            self._read_header()
        if not any(True for _ in self):
            raise Unreadable("has a header but no rows" if self._headed else "is empty, there are no rows in it")

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        count = 0
        try:
            for _ in self:
                count += 1
        except Unreadable:  # told by whoever reads the rows themselves
            pass
        return count

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        try:
            with self.source.open() as stream:
                match self.form:
                    case "csv":
                        yield from self._csv(stream)
                    case "jsonl":
                        yield from _json_lines(stream)
                    case "json list":
                        yield from _json_list(stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"cannot be unpacked, it is damaged or cut off: {error}") from None
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror or error}") from None

    def _read_header(self) -> None:
        try:
            with self.source.open() as stream:
                first = next((line for _, line in _lines(stream) if line.strip()), "")
        except (EOFError, zlib.error, OSError) as error:
            raise Unreadable(f"cannot be read: {error}") from None
        if not first:
            raise Unreadable("is empty; a CSV file begins with a line of column names")
        self._delimiter = _delimiter(first)
        with self.source.open() as stream:
            line, header = next(iter(self._records(stream)))
        if not isinstance(header[0], str):
            raise Unreadable(header[0][1], line)
        names = [cell.strip() for cell in header]
        if len(names) in (2, 3) and _ends(names[0], ".onnx") and _ends(names[1], ".vnnlib"):
            self.columns, self.method = ("network", "property", SECONDS)[: len(names)], "verification.verify"
            return
        self.columns, self._headed = names, True
        for place, name in enumerate(names, 1):
            if not name:
                raise Unreadable(
                    f"column {place} has no name (pandas writes such a column unless told to_csv(index=False))", line
                )
            if name in names[: place - 1]:
                raise Unreadable(f"column {name!r} is given twice", line)

    def _csv(self, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        columns = cast(Sequence[str], self.columns)
        width, header = len(columns), "the header has" if self._headed else "the first row has"
        records = self._records(stream)
        if self._headed:
            next(records)
        for line, cells in records:
            if not isinstance(cells[0], str):
                yield line, cells
            elif len(cells) == width:
                yield line, dict(zip(columns, cells, strict=True))
            else:
                yield line, [("", f"has {counted(len(cells))}, {header} {width}")]

    def _records(self, stream: BinaryIO) -> Iterator[tuple[int, list[str] | BadRow]]:
        """(line, cells) of each record that is not blank, the header among them."""
        csv.field_size_limit(LONGEST)
        begun = [0]

        def texts() -> Iterator[str]:
            length, of = 0, 0
            for _, text in _lines(stream):
                # A quote that is never closed would take the rest of the file as one cell.
                length, of = (length + len(text), of) if of == begun[0] else (len(text), begun[0])
                if length > LONGEST:
                    raise Unreadable(f"begins a row longer than {_SIZE}; is a quote missing?", begun[0] + 1)
                yield text

        reader = csv.reader(texts(), delimiter=self._delimiter, strict=True)
        while True:
            begun[0] = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield begun[0] + 1, [("", _csv_fault(str(error)))]
                continue
            if cells:
                yield begun[0] + 1, cells


def _too_long(line: int) -> Unreadable:
    return Unreadable(f"is longer than {_SIZE}, the most that one line may have; is this a file of rows?", line)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number, text) of each line; no more of a line is read than one may have. Raises Unreadable."""
    offset = 0
    for number, data in enumerate(iter(functools.partial(stream.readline, LONGEST + 1), b""), 1):
        if len(data) > LONGEST:
            raise _too_long(number)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = plain.decode(data, number, offset)
        if "\0" in text:
            plain.decode(data, number, offset)
        yield number, text.removeprefix("\ufeff") if number == 1 else text
        offset += len(data)


def _delimiter(header: str) -> str:
    """Which of comma, semicolon and tab stands between the names, outside quotes, most often; the comma where none."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=bare.count)


def _csv_fault(error: str) -> str:
    if "unexpected end of data" in error:
        return "opens a quote that is never closed"
    if "expected after" in error:
        return "has text behind a closing quote; a quote within a cell is doubled, and the cell put in quotes"
    if "new-line character" in error:
        return "has a carriage return inside a cell; end lines with a line feed, or put the cell in quotes"
    return f"is not CSV: {error}"


def counted(count: int) -> str:
    return wording.counted(count, "cell")


def _ends(path: str, suffix: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(suffix)


def _row(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return value
    return [("", f"is {wording.short(value)}, must be an object (a mapping) of params")]


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    decode = plain.json_decoder.decode
    for number, text in _lines(stream):
        if text.isspace():
            continue
        try:
            row = decode(text)
            if len(text) > plain.DEEPEST:
                plain.check_depth(row, text)
        except json.JSONDecodeError as error:
            yield number, [("", f"is not JSON: {error.msg} (column {error.colno})")]
        except Unreadable as error:
            yield number, [("", str(error))]
        except RecursionError:
            yield number, [("", plain.TOO_DEEP)]
        else:
            yield number, row if type(row) is dict else _row(row)


def _json_list(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    window = _Window(stream)
    window.expect("[")
    if window.next_is("]"):
        return
    while True:
        yield window.line, window.item()
        if window.next_is(","):
            continue
        window.expect("]")
        window.end()
        return


class _Window:
    """The part of a JSON text that is in memory: from the current item on, at most `LONGEST` and a block beyond."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.text, self.at, self._line, self._counted = stream, "", 0, 1, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = self._lines_read = 0
        self._over = False

    @property
    def line(self) -> int:
        """Where the next item begins."""
        self._skip()
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def item(self) -> dict[str, Any] | BadRow:
        """The next value of the list."""
        self._skip()
        line = self.line
        while True:
            try:
                value, end = plain.json_decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # a number may go on
                    break
            except json.JSONDecodeError as error:
                if not self._more():
                    below = self.text.count("\n", self.at, error.pos)
                    raise Unreadable(f"is not JSON: {error.msg}", line + below) from None
            except Unreadable as error:
                return self._refused(str(error), line)
            except RecursionError:
                raise Unreadable(plain.TOO_DEEP, line) from None
            if len(self.text) - self.at > LONGEST:
                raise Unreadable(
                    f"begins a row longer than {_SIZE}, or is not JSON; is a quote or bracket missing?", line
                )
        text, self.at = self.text[self.at : end], end
        try:
            plain.check_depth(value, text)
        except Unreadable as error:
            return [("", str(error))]
        return _row(value)

    def _refused(self, message: str, line: int) -> BadRow:
        """Go past an item that is JSON in form only."""
        while True:
            try:
                _, self.at = _LENIENT.raw_decode(self.text, self.at)
                return [("", message)]
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LONGEST or not self._more():
                    raise Unreadable(f"is not JSON: {error.msg}", line) from None

    def next_is(self, mark: str) -> bool:
        """Whether the next character is this one, which is passed then."""
        self._skip()
        if self.text[self.at : self.at + 1] != mark:
            return False
        self.at += 1
        return True

    def expect(self, mark: str) -> None:
        if not self.next_is(mark):
            found = self.text[self.at : self.at + 10]
            what = f"{found!r} where {mark!r} or ',' must stand" if found else f"it ends where {mark!r} must stand"
            raise Unreadable(f"is not JSON: {what}", self.line)

    def end(self) -> None:
        self._skip()
        if self.at < len(self.text):
            raise Unreadable("is not JSON: there is text behind the end of the list", self.line)

    def _skip(self) -> None:
        """Go past spaces, and forget what has been read."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self._over:
            return False
        self._line += self.text.count("\n", self._counted, self.at)
        self.text = self.text[self.at :]
        self.at = self._counted = 0
        # As much again as there is, so that a long item is tried few times.
        block = self.stream.read(max(2**16, len(self.text)))
        self._over = not block
        try:
            text = self._decoder.decode(block, final=self._over)
        except UnicodeDecodeError:
            plain.decode(block, 1 + self._lines_read, self._offset)
            raise Unreadable("is not UTF-8: a character is cut in two", 1 + self._lines_read) from None
        if "\0" in text:
            plain.decode(block, 1 + self._lines_read, self._offset)
        if not self._offset:
            text = text.removeprefix("\ufeff")
        self._offset += len(block)
        self._lines_read += text.count("\n")
        self.text += text
        return True


_LENIENT = json.JSONDecoder(parse_int=lambda digits: 0)


def read_rows(source: Source) -> RowFile:
    """The table in a source. Raises Unreadable, also where it holds a sweep instead."""
    kind = form(source)
    if kind == "yaml" or kind == "json":
        raise Unreadable("is not a file of rows: rows are given as CSV, JSON Lines or a JSON list of objects")
    return RowFile(source, kind)


def of_rows(rows: Iterable[Any], name: str, method: str = "") -> Listed:
    """A table of rows that a program gives."""
    return Listed(list(rows), name, method=method)
