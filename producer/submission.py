"""From what a person has written to a batch in the store: the one way in, for the command line and for programs."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from pydantic import ValidationError

from netassay import catalogue
from netassay.errors import UserError
from netassay.method import Contract, Method
from netassay.settings import Settings
from netassay.store import artifacts
from producer import documents, readers, references, sweeps, tables, wording
from producer.references import Resolver

if TYPE_CHECKING:
    from netassay.store.submission import Submitted

#: A path or glob, several of them, a sweep as a mapping, rows of params, a Polars or pandas frame of them, or a
#: document that was read already.
What: TypeAlias = Any


class CannotSubmit(UserError, ValueError):
    """What was given is none of the things that can be submitted, or lacks a name."""


def document(what: What, method: str = "", stdin: BinaryIO | None = None) -> sweeps.Document:
    """The document that `what` stands for.

    method: of rows and entries that name none themselves. stdin: where the path `-` is read from. Paths in a mapping or
    in rows start from the working folder. Raises BadSweep, CannotSubmit.
    """
    if isinstance(what, sweeps.Document):
        return what
    if isinstance(what, str | os.PathLike):
        return readers.read([_named(what)], method, stdin)
    if isinstance(what, Mapping):
        return sweeps.document(_plain(what), Path.cwd(), method=method)
    if (rows := _rows_of_frame(what)) is not None:
        return documents.of_table(tables.of_rows(rows, "the frame"), Path.cwd(), method)
    items = list(what) if isinstance(what, Iterable) else []
    if items and all(isinstance(item, str | os.PathLike) for item in items):
        return readers.read([_named(item) for item in items], method, stdin)
    if items and all(isinstance(item, Mapping) for item in items):
        return documents.of_table(tables.of_rows(map(_plain, items), "the rows"), Path.cwd(), method)
    if isinstance(what, Iterable) and not items:
        raise CannotSubmit("there is nothing to submit: the list is empty")
    raise CannotSubmit(
        f"{type(what).__name__} cannot be submitted; give a path, a list of paths, a sweep as a mapping with `jobs`, "
        "a list of mappings of params, or a Polars or pandas frame of them (these two with method=...)"
    )


def prepare(
    what: What, config: Settings, skip_invalid: bool = False, method: str = "", stdin: BinaryIO | None = None
) -> tuple[sweeps.Document, sweeps.Prepared, Resolver]:
    """Read and check a document. Stores nothing. Raises BadSweep with every error in it, CannotSubmit."""
    with catalogue.using(config.methods):
        found = document(what, method, stdin)
        resolver = Resolver(found.base, found.networks, artifacts.of(config), datasets=found.datasets)
        return found, sweeps.prepare(found, resolver, skip_invalid), resolver


def submit(
    what: What,
    config: Settings,
    name: str | None = None,
    weight: float = 1.0,
    skip_invalid: bool = False,
    progress: Callable[[float], None] = lambda share: None,
    *,
    method: str = "",
    note: str = "",
    tags: Sequence[str] = (),
    append: bool = False,
    fresh: bool = False,
    stdin: BinaryIO | None = None,
) -> tuple[sweeps.Prepared, Submitted]:
    """Check a document, keep its files, write its batch. Returns what was prepared and what became of it.

    name: else the document's own, else that of its only file. append: add to the batch of this name. fresh: compute
    again what the store knows already. Nothing is stored unless all of it is valid, or `skip_invalid` leaves the bad
    rows out. Raises BadSweep, CannotSubmit, StoreError (NameTaken among them), ChangedFile.
    """
    found, prepared, resolver = prepare(what, config, skip_invalid, method, stdin)
    called = name or found.name
    if not called:
        raise CannotSubmit("the batch needs a name: give it as --name NAME (in Python: name=...)")
    if not prepared.count:
        rows = wording.counted(prepared.refused, "row")
        raise CannotSubmit(f"{called}: of {rows} none is valid, so there is nothing to submit")
    from netassay.store import arriving, submission
    from producer import lab

    arriving.check_name(called)  # before files are kept
    arriving.check_tags(tags)
    particulars = arriving.Particulars(weight, note, submitter_of(config), tuple(tags))
    particulars.check()
    with lab.records_of(config) as database:
        database.prepare()
        resolver.commit()
        outcome = submission.submit(
            database, called, prepared.segments, prepared.names, particulars, progress, append=append, fresh=fresh
        )
    return prepared, outcome


def submitter_of(config: Settings) -> str:
    """Whose batches these are: as the settings say, else the user of this system; empty where it does not know one."""
    if config.submitter:
        return config.submitter
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def _named(path: str | os.PathLike[str]) -> str:
    if not (text := os.fspath(path)):  # as a path it would be the working folder
        raise CannotSubmit("the name of a file is empty; give a path, or - for standard input")
    return text


def left_out(prepared: sweeps.Prepared) -> str:
    """`1 invalid row was left out`, `3 invalid rows were left out`."""
    were = "was" if prepared.refused == 1 else "were"
    return f"{wording.counted(prepared.refused, 'invalid row')} {were} left out"


def parameters(method: Method, values: Mapping[str, Any]) -> Contract:
    """Params of one job from plain values; files and recipes in them are kept at once. Raises BadSweep."""
    fields = method.Params.model_fields
    errors = [
        sweeps.RowError(method.name, 0, name, wording.unknown_field(name, method.Params, method.name))
        for name in values
        if name not in fields
    ]
    if not errors:
        try:
            return method.Params.model_validate(_plain(values), context={"resolve": references.in_process()})
        except ValidationError as error:
            errors = [sweeps.RowError(method.name, 0, name, message) for name, message in wording.explain(error)]
    raise sweeps.BadSweep(method.name, errors)


def _rows_of_frame(what: Any) -> Iterable[Mapping[str, Any]] | None:
    """The rows of a Polars or pandas frame, cells without a value left out; None where it is no frame.

    Neither library is imported: whoever has a frame has imported its own.
    """
    library = type(what).__module__.partition(".")[0]
    if library == "polars" and hasattr(what, "iter_rows"):
        rows = what.iter_rows(named=True)
    elif library == "polars" and hasattr(what, "collect"):
        raise CannotSubmit("a lazy frame has no rows yet; give its .collect()")
    elif library == "pandas" and hasattr(what, "columns"):
        missing = what.isna().to_numpy()
        names = list(what.columns)
        rows = (
            {name: value for name, value, gone in zip(names, row, absent, strict=True) if not gone}
            for row, absent in zip(what.itertuples(index=False, name=None), missing, strict=True)
        )
    else:
        return None
    return ({name: _plain(value) for name, value in row.items() if value is not None} for row in rows)


def _plain(value: Any) -> Any:
    """The value as a YAML file would hold it: tuples, ranges, arrays and series as lists, paths as text."""
    if type(value) in (str, bool, int, float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for convert in ("tolist", "to_list"):  # of NumPy (whose float64 is a float), pandas and torch; of Polars
        if hasattr(value, convert):
            return _plain(getattr(value, convert)())
    return value
