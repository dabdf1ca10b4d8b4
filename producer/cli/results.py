"""Verbs that take records out: results, plot."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netassay.errors import UserError
from producer.cli.common import (
    AsJson,
    batch_names,
    busy,
    causes,
    method_names,
    open_store,
    print_json,
    read_settings,
    working,
)

if TYPE_CHECKING:
    from netassay.store.database import Database
    from netassay.store.reading import Query

verbs = typer.Typer()

FORMATS = (".parquet", ".csv", ".json", ".jsonl")


def _named(incomplete: str) -> list[str]:
    return [*batch_names(incomplete), *method_names(incomplete)]


What = Annotated[
    str,
    typer.Argument(
        metavar="[BATCH|METHOD]",
        help="Name of a batch; else of a method, or a pattern such as 'lipschitz.*', across all batches.",
        autocompletion=_named,
    ),
]
Network = Annotated[str, typer.Option(help="Only jobs on the network of this name, pattern or digest.")]
Since = Annotated[str, typer.Option(help="Only what ended later: 7d, 12h, 30m ago, or at a date such as 2026-01-31.")]


@verbs.command()
def results(
    what: What = "",
    network: Network = "",
    since: Since = "",
    state: Annotated[str, typer.Option(help="Only jobs in this state.")] = "",
    cause: Annotated[str, typer.Option(help="Only failures of this cause.", autocompletion=causes)] = "",
    columns: Annotated[str, typer.Option(help="Columns to show, separated by commas; else all.")] = "",
    by: Annotated[str, typer.Option(help="Summarise the done jobs for each value of these columns.")] = "",
    limit: Annotated[int, typer.Option(help="Rows to print in a table; 0: all.", min=0)] = 20,
    as_json: AsJson = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write all rows to this file: .parquet, .csv, .json or .jsonl.")
    ] = None,
) -> None:
    """The records of a batch, or of methods across batches: params and results as columns.

    Parquet and CSV hold typed, tidy columns; JSON is one object a line (in a .json file, a list of them).
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} has no ending that says what to write; end it in one of {', '.join(FORMATS)}")
    if sum((as_json, csv, out is not None)) > 1:
        raise UserError("give one of --json, --csv and --out")
    database = open_store()
    query = _query(database, what, network, since, state, cause)
    wanted = _split(columns)
    if by:
        _summarise(database, query, _split(by), wanted, as_json, csv, out)
    elif out is not None:
        _write(database, query, wanted, out)
    elif csv:
        from producer import frames

        with _reading(database, query, sys.stdout.isatty()) as progress:
            frames.write_csv(database, query, sys.stdout, wanted, progress)
    elif as_json:
        with _reading(database, query, sys.stdout.isatty()) as progress:
            for row in _flat(database, query, wanted, progress):
                print_json(row)
    else:
        _show(database, query, what, wanted, limit)


def _query(database: Database, what: str, network: str, since: str, state: str, cause: str) -> Query:
    """Raises UserError where the words make no sense, or nothing is called so."""
    from producer import client

    return client.query_of(database, what, network, since or None, state, cause)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@contextmanager
def _reading(database: Database, query: Query, terminal: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar by the number of records read; none where the records go to the same `terminal`."""
    if terminal:
        yield lambda done: None
        return
    from netassay.store import reading

    with working("reading") as share:
        total = max(1, reading.count(database, query))
        yield lambda done: share(min(1.0, done / total))


def _flat(
    database: Database, query: Query, wanted: list[str], progress: Callable[[int], None] = lambda done: None
) -> Iterator[dict[str, Any]]:
    from netassay.store import reading
    from producer import show

    for number, record in enumerate(reading.find(database, query), 1):
        row = show.flat(record)
        yield {name: row.get(name) for name in wanted} if wanted else row
        if number % 1000 == 0:
            progress(number)


def _summarise(
    database: Database, query: Query, by: list[str], of: list[str], as_json: bool, csv: bool, out: Path | None
) -> None:
    from producer import show

    with _reading(database, query) as progress:
        rows = show.summary(_flat(database, query, [], progress), by, of)
    if out is not None:
        from producer import frames

        with frames.beside(out) as temporary:
            if out.suffix.lower() == ".parquet":
                import polars

                polars.DataFrame(rows, infer_schema_length=None).write_parquet(temporary)
            else:
                with open(temporary, "w", newline="", encoding="utf-8") as stream:
                    _write_rows(rows, out.suffix.lower(), stream)
        print(f"{len(rows):,} rows: {out}")
    elif as_json:
        for row in rows:
            print_json(row)
    elif csv:
        _write_rows(rows, ".csv", sys.stdout)
    elif rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        show.console.print(show.table(names, [[show.cell(row.get(name)) for name in names] for row in rows]))
    else:
        print("no job of these is done")


def _write_rows(rows: list[dict[str, Any]], suffix: str, stream: Any) -> None:
    if suffix == ".csv":
        import csv as writer

        names = list(dict.fromkeys(name for row in rows for name in row))
        out = writer.DictWriter(stream, names, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows)
        return
    _write_json(iter(rows), suffix, stream)


def _write_json(rows: Iterator[dict[str, Any]], suffix: str, stream: Any) -> int:
    """One object a line; in a .json file, with brackets and commas around. Returns how many."""
    from producer.cli.common import _strict

    whole, number = suffix == ".json", 0
    for number, row in enumerate(rows, 1):
        before = ("[\n" if number == 1 else ",\n") if whole else ""
        after = "" if whole else "\n"
        stream.write(f"{before}{json.dumps(_strict(row), default=str, ensure_ascii=False, allow_nan=False)}{after}")
    if whole:
        stream.write("\n]\n" if number else "[]\n")
    return number


def _write(database: Database, query: Query, wanted: list[str], out: Path) -> None:
    from producer import frames

    suffix = out.suffix.lower()
    with _reading(database, query) as progress:
        if suffix in (".parquet", ".csv"):
            rows = frames.write(database, query, out, suffix[1:], columns=wanted, progress=progress)
        else:
            with frames.beside(out) as temporary, open(temporary, "w", encoding="utf-8") as stream:
                rows = _write_json(_flat(database, query, wanted, progress), suffix, stream)
    print(f"{rows:,} records: {out}")


def _show(database: Database, query: Query, what: str, wanted: list[str], limit: int) -> None:
    from netassay.store import reading
    from producer import show

    with busy("reading"):
        kept = list(itertools.islice(_flat(database, query, []), limit or None))
        left = reading.count(database, query) - len(kept) if limit and len(kept) == limit else 0
    if not kept:
        print(f"{f'batch {query.batch}' if query.batch else what or 'the store'} has no such records")
        return
    if unknown := [name for name in wanted if not any(name in row for row in kept)]:
        known = dict.fromkeys(name for row in kept for name in row)
        raise show.NoSuchColumn(f"there is no column {', '.join(unknown)}; columns are: {', '.join(known)}")
    names = wanted or _columns(kept)
    show.console.print(show.table(names, [[show.cell(row.get(name)) for name in names] for row in kept]))
    if left > 0:
        print(f"... and {left:,} more; all of them: the same with --out FILE.parquet, --csv, --json or --limit 0")


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of all these rows; those empty everywhere are left out, and those equal everywhere if there are many."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    if len(names) > 10 and len(rows) > 1:
        varied = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
        return varied or names
    return names


@verbs.command()
def plot(
    what: What,
    out: Annotated[Path | None, typer.Option(help="File to write: .png, .svg or .json; else BATCH.png here.")] = None,
    method: Annotated[
        str, typer.Option(help="Which method's figure, where there are several.", autocompletion=method_names)
    ] = "",
    network: Network = "",
    since: Since = "",
) -> None:
    """Draw the figure of a batch's method, or of a method across batches."""
    from netassay import catalogue
    from netassay.store import artifacts, reading
    from producer import drawing

    config = read_settings()
    database = open_store()
    query = _query(database, what, network, since, "", "")
    records: dict[str, list[Any]] = {}
    with busy(f"reading {what}"):
        for record in reading.find(database, query):
            records.setdefault(record.method, []).append(record)
    drawable = [name for name in records if catalogue.get(name).plot is not None]
    if method and method not in drawable:
        raise UserError(f"{method} has no figure in {what}; there are: {', '.join(drawable) or 'none'}")
    # A network trained on the way is not what the batch is about.
    chosen = [method] if method else [n for n in drawable if n != "networks.train" or len(drawable) == 1]
    if not chosen:
        raise UserError(f"no method of {what} draws a figure: {', '.join(records) or 'there are no such records'}")
    with artifacts.using(artifacts.of(config)):
        for name in chosen:
            plot_of = catalogue.get(name).plot
            assert plot_of is not None
            path = out or Path(re.sub(r"[*?/\[\]]+", "-", what) + ".png")
            if len(chosen) > 1:
                path = path.with_stem(f"{path.stem}-{name.replace('.', '-')}")
            with busy(f"drawing {name}"):
                drawing.draw(plot_of(records[name]), path)
            print(f"{name}: {path}")
