"""From files in any format to one document: all files that are given together are one batch.

==============================  ===================================================================================
YAML (.yaml, .yml)              a sweep (see `producer.sweeps`), or a list of rows
JSON (.json)                    the same: a sweep, or a list of rows
JSON Lines (.jsonl, .ndjson)    one row a line
CSV (.csv, .tsv)                a header, then one row a line; comma, semicolon or tab; a cell is read by the type of
                                its field (see `producer.cells`), an empty one is the field's default
instances.csv of VNN-COMP       no header: network.onnx, property.vnnlib, seconds
==============================  ===================================================================================

A row is the params of one job. Beside them it may have `method`, `limits.seconds` and `limits.memory`; in JSON and YAML
it may also be nested, {method: ..., params: {...}, limits: {...}}. Each of these may be packed with gzip (.gz). Without
a known suffix, as on standard input, the format is told from the content. Paths in a file start from its folder.
"""

from __future__ import annotations

import dataclasses
import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from producer import documents, plain, tables
from producer.documents import BadSweep, Document, RowError
from producer.plain import Unreadable
from producer.tables import Source


def read(files: Sequence[str | Path], method: str = "", stdin: BinaryIO | None = None) -> Document:
    """The one document in these files, in their order.

    files: paths; patterns such as 'sweeps/*.yaml' or 'sweeps/**', which stand for the files they match, sorted; folders
    that hold an instances.csv; `-`, which is standard input. method: of rows and entries that name none. Its name is
    that of the first file that has one, else the stem of the only file, else empty.

    Raises BadSweep with all that is wrong with the structure of all of them. Rows are looked at by `sweeps.prepare`.
    """
    errors: list[RowError] = []
    found: list[tuple[str, Document]] = []
    sources: list[tuple[str, Path | None]] = []
    for file in files:
        try:
            sources += _files(file)
        except Unreadable as error:
            errors.append(RowError(str(file) or "''", 0, "", str(error)))
    if [name for name, path in sources if path is None][1:]:
        errors.append(RowError("standard input", 0, "", "is given twice, but can be read once only"))
    elif not files:
        errors.append(RowError("the files", 0, "", "are missing; give at least one, or - for standard input"))
    for name, path in sources if not errors else ():
        try:
            found.append((name, _read(name, path, method, stdin)))
        except BadSweep as bad:
            several = len(sources) > 1
            errors += [dataclasses.replace(one, where=f"{name}: {one.where}") if several else one for one in bad.errors]
    if errors:
        raise BadSweep(_called(files, sources), errors)
    return _one(found)


def _called(files: Sequence[str | Path], sources: Sequence[tuple[str, Path | None]]) -> str:
    if len(sources) == 1:
        ((name, path),) = sources
        return path.name if path is not None else name
    return f"{len(sources)} files" if sources else " ".join(map(str, files)) or "the command line"


def _one(found: Sequence[tuple[str, Document]]) -> Document:
    (name, first), *others = found
    if not others:
        stem = "" if first.source == _STDIN else _stem(name)
        return dataclasses.replace(first, name=first.name or stem)
    jobs = [dataclasses.replace(entry, source=name) for name, document in found for entry in document.jobs]
    called = next((document.name for _, document in found if document.name), "")
    return dataclasses.replace(first, jobs=tuple(jobs), name=called, source=f"{len(found)} files")


_STDIN = "standard input"


def _files(file: str | Path) -> Iterator[tuple[str, Path | None]]:
    """(name for messages, path or None for standard input) of what one argument stands for. Raises Unreadable."""
    text = str(file)
    path = Path(text).expanduser()
    if text == "-":
        yield _STDIN, None
    elif path.is_dir():
        yield from ((str(one), one) for one in [_instances(path)])
    elif not path.exists() and glob.has_magic(text):
        matches = sorted(one for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
        if not matches:
            raise Unreadable(f"matches no file in {Path.cwd()}; check the pattern, and that it stands in quotes")
        yield from ((match, Path(match)) for match in matches)
    elif not text or not path.exists():
        raise Unreadable("cannot be read: No such file or directory; check the path, or quote a pattern")
    else:
        yield text, path


def _instances(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*instances.csv*") if path.name.endswith((".csv", ".csv.gz")))
    exact = [path for path in found if path.name.startswith("instances.csv")]
    found = exact[:1] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise Unreadable(f"is a folder with several lists: {', '.join(path.name for path in found)}; give one of them")
    raise Unreadable(f"is a folder without an instances.csv; give its files themselves, such as '{folder}/*.yaml'")


def _read(name: str, path: Path | None, method: str, stdin: BinaryIO | None) -> Document:
    """The document in one file. Raises BadSweep."""
    try:
        if path is None:
            source = Source.of_stream(stdin if stdin is not None else sys.stdin.buffer, _STDIN)
        elif path.is_file():
            source = Source(path)
        else:  # a pipe, as the shell makes of <(...), can be read once only
            with open(path, "rb") as pipe:
                source = Source.of_stream(pipe, path.name)
        base = path.parent if path is not None else Path.cwd()
        kind = tables.form(source)
        if kind not in ("yaml", "json"):
            return documents.of_table(tables.RowFile(source, kind), base, method)
        text = plain.decode(source.whole()).removeprefix("\ufeff")
        if kind == "json":
            return documents.document(plain.load_json(text), base, source.name, method)
        loaded = plain.load_yaml(text)
    except OSError as error:
        raise BadSweep(name, [RowError("the file", 0, "", f"cannot be read: {error.strerror or error}")]) from None
    except Unreadable as error:
        raise BadSweep(name, [documents.fault(error)]) from None
    # A list of anything else is told what a document looks like.
    if isinstance(loaded.value, list) and any(isinstance(item, dict) for item in loaded.value):
        return documents.of_table(tables.Listed(loaded.value, source.name, loaded.lines), base, method)
    return documents.document(loaded.value, base, source.name, method)


def _stem(name: str) -> str:
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem
