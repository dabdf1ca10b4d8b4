"""Verbs that take records out: results, plot."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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
    end_in_order,
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
    vnncomp: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write verdicts and counterexamples as VNN-COMP keeps them, to this folder."
        ),
    ] = None,
) -> None:
    """The records of a batch, or of methods across batches: params and results as columns.

    Parquet and CSV hold typed, tidy columns; JSON is one object a line (in a .json file, a list of them).
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} has no ending that says what to write; end it in one of {', '.join(FORMATS)}")
    if sum((as_json, csv, out is not None, vnncomp is not None)) > 1:
        raise UserError("give one of --json, --csv, --out and --vnncomp")
    if vnncomp is not None and (by or columns):
        raise UserError("--vnncomp has its own columns; leave out --by and --columns")
    if vnncomp is not None:
        end_in_order()
    if out is not None:
        from netassay.store import transfer

        transfer.target(out)
        end_in_order()
    database = open_store()
    query = _query(database, what, network, since, state, cause)
    wanted = _split(columns)
    if vnncomp is not None:
        _write_vnncomp(database, query, vnncomp, what)
    elif by:
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
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


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
    from producer import frames

    for row in frames.flat_rows(database, query, wanted, progress):
        yield {name: row.get(name) for name in wanted} if wanted else row


def _summarise(
    database: Database, query: Query, by: list[str], of: list[str], as_json: bool, csv: bool, out: Path | None
) -> None:
    from producer import frames, show

    with _reading(database, query) as progress:
        rows = show.summary(frames.flat_rows(database, query, [*by, *of], progress), by, of)
    if out is not None:
        from netassay.store import transfer

        with transfer.beside(out) as temporary:
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
        if of:
            _print_table(names, rows)
        else:
            _print_fitting(names, rows, always=(*by, "jobs"))
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
    from producer.wording import strict

    whole, number = suffix == ".json", 0
    for number, row in enumerate(rows, 1):
        before = ("[\n" if number == 1 else ",\n") if whole else ""
        after = "" if whole else "\n"
        stream.write(f"{before}{json.dumps(strict(row), default=str, ensure_ascii=False, allow_nan=False)}{after}")
    if whole:
        stream.write("\n]\n" if number else "[]\n")
    return number


def _write(database: Database, query: Query, wanted: list[str], out: Path) -> None:
    from netassay.store import transfer
    from producer import frames

    suffix = out.suffix.lower()
    with _reading(database, query) as progress:
        if suffix in (".parquet", ".csv"):
            rows = frames.write(database, query, out, suffix[1:], columns=wanted, progress=progress)
        else:
            with transfer.beside(out) as temporary, open(temporary, "w", encoding="utf-8") as stream:
                rows = _write_json(_flat(database, query, wanted, progress), suffix, stream)
    print(f"{rows:,} records: {out}")


def _write_vnncomp(database: Database, query: Query, folder: Path, what: str) -> None:
    from netassay.store import artifacts
    from producer import vnncomp

    with _reading(database, query) as progress, artifacts.using(artifacts.of(read_settings())):
        counts = vnncomp.write(database, query, folder, query.batch or what or "all", progress)
    left = counts.pop("open", 0)
    said = ", ".join(f"{count:,} {result}" for result, count in counts.most_common())
    print(f"{counts.total():,} instances: {folder / 'results.csv'}; {said or 'none has ended'}")
    if left:
        print(f"{left:,} without an end are not in it; write it again when they have one")


def _show(database: Database, query: Query, what: str, wanted: list[str], limit: int) -> None:
    from netassay.store import reading
    from producer import frames

    with busy("reading"):
        kept = list(itertools.islice(frames.flat_rows(database, query, wanted), limit or None))
        left = reading.count(database, query) - len(kept) if limit and len(kept) == limit else 0
    if not kept:
        print(f"{f'batch {query.batch}' if query.batch else what or 'the store'} has no such records")
        return
    if wanted:
        _print_table(wanted, kept)
    else:
        _show_methods(kept)
    if left > 0:
        print(f"... and {left:,} more; all of them: the same with --out FILE.parquet, --csv, --json or --limit 0")


def _show_methods(rows: list[dict[str, Any]]) -> None:
    """A table a method."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    for place, (method, members) in enumerate(methods.items()):
        if place:
            print()
        names = [name for name in _columns(members) if name != "method" or len(methods) == 1]
        _print_fitting(names, members, always=("job",), title=method if len(methods) > 1 else "")


def _print_fitting(names: list[str], rows: list[dict[str, Any]], always: Sequence[str], title: str = "") -> None:
    """A table of the columns there is room for, and which those are that have none."""
    from producer import show

    shown = _that_fit(names, rows, always, show.console.width)
    _print_table(shown, rows, title)
    if hidden := [name for name in names if name not in shown]:
        show.console.print(
            f"no room for: {', '.join(hidden)}; --columns shows those it names, --out FILE has all",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _print_table(names: list[str], rows: list[dict[str, Any]], title: str = "") -> None:
    from producer import show

    show.console.print(show.table(names, [[show.cell(row.get(name)) for name in names] for row in rows], title=title))


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of all these rows; those that are empty everywhere are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]


def _that_fit(names: list[str], rows: list[dict[str, Any]], always: Sequence[str], width: int) -> list[str]:
    """As many of these columns as stand side by side, in their order.

    always: those that come first. Of the others, those that differ between rows come before those that do not, and what
    became of a job before its params and result.
    """
    from rich.cells import cell_len

    from producer import show

    widths = {name: max(cell_len(name), *(cell_len(show.cell(row.get(name))) for row in rows)) for name in names}
    same = {name for name in names if len(rows) > 1 and len({str(row.get(name)) for row in rows}) == 1}
    kept: set[str] = set()
    left = width + show.GAP
    first = (*always, "state", "cause")
    for name in sorted(
        names, key=lambda name: (name in same and name not in always, name not in first, names.index(name))
    ):
        if widths[name] + show.GAP <= left or not kept:
            kept.add(name)
            left -= widths[name] + show.GAP
    return [name for name in names if name in kept]


@verbs.command()
def plot(
    what: What,
    out: Annotated[Path | None, typer.Option(help="File to write: .png, .svg or .json; else BATCH.png here.")] = None,
    method: Annotated[
        str, typer.Option(help="Which method's figure, where there are several.", autocompletion=method_names)
    ] = "",
    network: Network = "",
    since: Since = "",
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="TIMES.csv",
            help="Show beside it how many of the same instances other tools decided within a time: a CSV file with "
            "columns onnx, vnnlib and one a tool, whose cells are verdict:seconds, such as unsat:1.5.",
        ),
    ] = None,
) -> None:
    """Draw the figure of a batch's method, or of a method across batches."""
    from netassay import beside as others
    from netassay import catalogue
    from netassay.job import BUILDER
    from netassay.store import artifacts, reading, transfer
    from producer import drawing

    config = read_settings()
    if out is not None:
        transfer.target(out)
    times = None if beside is None else others.read(beside)
    database = open_store()
    query = _query(database, what, network, since, "", "")
    records: dict[str, list[Any]] = {}
    with busy(f"reading {what}"):
        for record in reading.find(database, query):
            records.setdefault(record.method, []).append(record)
    plots = {name: catalogue.get(name).drawn(times) for name in records}
    drawable = {name: draw for name, draw in plots.items() if draw is not None}
    figure = "figure" if times is None else "figure beside other tools' times"
    if method and method not in drawable:
        raise UserError(f"{method} has no {figure} in {what}; there are: {', '.join(drawable) or 'none'}")
    # A network trained on the way is not what the batch is about.
    chosen = [method] if method else [n for n in drawable if n != BUILDER or len(drawable) == 1]
    if not chosen:
        raise UserError(f"no method of {what} draws a {figure}: {', '.join(records) or 'there are no such records'}")
    with artifacts.using(artifacts.of(config)):
        for name in chosen:
            path = out or Path(re.sub(r"[*?/\[\]]+", "-", what) + ".png")
            if len(chosen) > 1:
                path = path.with_stem(f"{path.stem}-{name.replace('.', '-')}")
            with busy(f"drawing {name}"):
                drawing.draw(drawable[name](records[name]), path)
            print(f"{name}: {path}")
