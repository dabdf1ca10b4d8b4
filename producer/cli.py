"""The command line: `netassay VERB`. Heavy imports stay inside the verbs that need them.

Exit codes: 0 fine; 1 some jobs failed; 2 bad input, nothing was done; 3 the batch was cancelled; 4 the disk
or the store would not.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netassay import __version__
from netassay.errors import UserError

if TYPE_CHECKING:
    from netassay.store.database import Database

app = typer.Typer(
    name="netassay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A bulk laboratory for neural networks: submit jobs by the thousand, watch them, keep every result.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
BatchName = Annotated[str, typer.Argument(metavar="BATCH", help="Name of a batch.")]


def main() -> None:
    """Entry point: errors that a user can mend are one message and exit code 2, not a traceback."""
    try:
        # Outside standalone mode the code of `typer.Exit` is returned.
        sys.exit(app(standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except UserError as error:
        print(f"netassay: {error}", file=sys.stderr)
        sys.exit(2)
    except typer.TyperException as error:
        print(f"netassay: {getattr(error, 'message', error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        words = _trouble_outside(error)
        if words is None:
            raise
        print(f"netassay: {words}", file=sys.stderr)
        sys.exit(4)


def _trouble_outside(error: Exception) -> str | None:
    """What to say of a disk or database that would not; None where the error is our own."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room or mend the rights, then do the same again"
    database = sys.modules.get("sqlalchemy.exc")  # not imported for verbs that need no store
    if database is not None and isinstance(error, database.OperationalError):
        return (
            f"the store does not answer ({error.orig}); see that its disk has room and its database is up, then do the "
            "same again: what is done already is not done twice"
        )
    return None


class BadSettings(UserError):
    """An environment variable holds what it cannot."""


def _config() -> Any:
    from pydantic import ValidationError

    from netassay.settings import settings

    try:
        return settings()
    except ValidationError as error:
        told = [f"NETASSAY_{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise BadSettings("; ".join(told)) from None


def _database() -> Database:
    from netassay.store.database import Database, StoreError

    config = _config()
    database = Database(config.store_url)
    if not database.exists():
        raise StoreError(
            f"there is no lab in {config.root} yet; start one with: netassay up (or set NETASSAY_HOME / NETASSAY_STORE)"
        )
    database.prepare()
    return database


@contextmanager
def _working(words: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error for what may take longer than two seconds; gone when it is over."""
    from rich.progress import Progress

    from producer.show import errors

    with Progress(console=errors, transient=True) as bars:
        bar = bars.add_task(words, total=1.0)
        yield lambda share: bars.update(bar, completed=share)


@contextmanager
def _busy(words: str) -> Iterator[None]:
    """A sign of life on standard error for what says nothing while it goes on."""
    from producer.show import errors

    with errors.status(f"{words} ..."):
        yield


def _print_json(value: Any) -> None:
    print(json.dumps(_strict(value), default=str, ensure_ascii=False, allow_nan=False))


def _strict(value: Any) -> Any:
    """JSON knows no NaN: it is written as in the store, `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _version(wanted: bool) -> None:
    if wanted:
        print(f"netassay {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# --- the lab -------------------------------------------------------------------------------------------------------


@app.command()
def up(
    slots: Annotated[int, typer.Option(help="Compute children; 0: one per core.", min=0)] = 0,
    flower: Annotated[bool, typer.Option(help="Also start Flower, Celery's own monitor.")] = True,
    as_json: AsJson = False,
) -> None:
    """Start the lab of this folder in the background: Redis, a worker, the dispatcher, Flower."""
    from producer import lab

    config = _config()
    with _busy("starting the lab"):
        described = lab.up(config, slots, flower)
    if as_json:
        _print_json(described)
        return
    print(f"lab up in {config.root}: {described['slots']} slots, records in {described['store']}")
    if described["flower"]:
        print(f"Flower: {described['flower']}")
    print("next: netassay submit FILE --name NAME; stop the lab with: netassay down")


@app.command()
def down() -> None:
    """Stop the lab of this folder. What is submitted stays, and goes on at the next `up`."""
    from producer import lab

    config = _config()
    with _busy("stopping the lab; running jobs may end within some seconds"):
        stopped = lab.down(config)
    print("lab stopped" if stopped else f"no lab runs in {config.root}")


@app.command()
def status(as_json: AsJson = False) -> None:
    """What runs: the lab, its workers, the batches."""
    from dataclasses import asdict

    from producer import lab

    config = _config()
    described = lab.Place(config.root).described()
    from netassay.store import reading
    from netassay.store.database import Database

    database = Database(config.store_url)
    known = database.exists()
    if known:
        database.prepare()
    workers = reading.workers(database) if known else []
    batches = reading.batches(database) if known else []
    if as_json:
        _print_json(
            {"lab": described, "workers": [asdict(w) for w in workers], "batches": [b.as_dict() for b in batches]}
        )
        return
    from producer.show import batch_line

    if described:
        print(
            f"lab up in {config.root} (process {described['pid']}), {described['slots']} slots; {described['flower']}"
        )
        for name, times in described.get("restarts", {}).items():
            print(f"  {name} was started again {times} times; see {config.root / 'logs' / name}.log")
    else:
        print(f"no lab runs in {config.root}; start it with: netassay up")
    for worker in workers if described else []:
        print(f"  worker {worker.name}: {worker.slots} slots, {worker.running:,} jobs in hand")
    for batch in batches:
        print(batch_line(batch))
    if known and not batches:
        print("no batch was submitted yet; try: netassay submit FILE --name NAME")


# --- methods -------------------------------------------------------------------------------------------------------


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="A method's name, or words to search for.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the methods, search them, or show one: its text, fields, reference and example."""
    from netassay import catalogue

    names = catalogue.names()
    if name in names:
        _show_method(name, as_json)
        return
    found = catalogue.search(name) if name else names
    if not found:
        raise catalogue.UnknownMethod(name)
    if as_json:
        _print_json([{"name": one, "claim": catalogue.claim(one)} for one in found])
        return
    width = max(map(len, found))
    for one in found:
        print(f"{one:<{width}}  {catalogue.claim(one)}")


def _show_method(name: str, as_json: bool) -> None:
    from netassay import catalogue

    method = catalogue.get(name)
    schema = method.Params.model_json_schema()
    if as_json:
        _print_json(
            {"name": name, "version": method.version, "doc": method.doc, "params": schema, "example": method.example}
        )
        return
    import yaml

    from producer.show import console, table

    print(f"{name} (version {method.version})\n\n{method.doc}\n")
    required = set(schema.get("required", ()))
    rows = []
    for field, about in schema.get("properties", {}).items():
        default = "required" if field in required else json.dumps(about.get("default"))
        rows.append((field, _type(about), default, about.get("description", "")))
    console.print(table(("field", "type and bounds", "default", "meaning"), rows))
    print("\nexample sweep:\n")
    print(yaml.safe_dump(json.loads(json.dumps(method.example)), sort_keys=False, default_flow_style=None))


def _type(about: dict[str, Any]) -> str:
    if "enum" in about:
        return " | ".join(map(str, about["enum"]))
    if "const" in about:
        return repr(about["const"])
    if "anyOf" in about:
        return " or ".join(_type(one) for one in about["anyOf"])
    bounds = [
        f"{sign} {about[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in about
    ]
    return " ".join([about.get("type", about.get("$ref", "any").rpartition("/")[2]), ", ".join(bounds)]).strip()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="Name of a method.")],
    as_json: AsJson = False,
) -> None:
    """Run one job in this process, without any lab: netassay run METHOD field=value ..."""
    from netassay import catalogue, job
    from netassay.store import storable
    from producer import sweeps

    found = catalogue.get(method)
    params = sweeps.parameters(found, context.args)
    started = time.perf_counter()
    with _busy(f"running {method}"):
        result = found.run(params)
    seconds = time.perf_counter() - started
    fields = json.loads(storable.dump(result))
    if as_json:
        _print_json({"method": method, "key": job.key(found, params), "seconds": seconds, "result": fields})
        return
    from producer.show import _plain, cell, console, duration, table

    rows = [(name, cell(_plain(value)) if not isinstance(value, str) else value) for name, value in fields.items()]
    console.print(table(("result", "value"), rows))
    print(f"{method} took {duration(seconds)}")


# --- batches -------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="A sweep, as YAML.")],
    name: Annotated[str, typer.Option(help="Name of the batch; else the sweep's own, else the file's.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, show what would run, store nothing.")] = False,
    weight: Annotated[float, typer.Option(help="Share of the slots against other batches.", min=0.001, max=1000)] = 1.0,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave bad rows out instead of refusing all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a sweep as a batch. When this returns, no crash loses a job."""
    from producer import submit as submission

    config = _config()
    if dry_run:
        _dry_run(file, config, skip_invalid, as_json)
        return
    started = time.perf_counter()
    with _working("submitting") as progress:
        prepared, outcome = submission.submit(file, config, name or None, weight, skip_invalid, progress)
    from netassay.store.submission import Submitted

    assert isinstance(outcome, Submitted)
    seconds = time.perf_counter() - started
    if as_json:
        from dataclasses import asdict

        _print_json(
            {**asdict(outcome), "seconds": seconds, "refused": prepared.refused, "duplicates": prepared.duplicates}
        )
        return
    _report_left_out(prepared)
    if outcome.already:
        again = "; it was cancelled and goes on now" if outcome.reopened else ""
        print(f"batch {outcome.name} was submitted before with these {outcome.size:,} jobs; nothing was added{again}")
    else:
        known = f", {outcome.known:,} known from before" if outcome.known else ""
        rerun = f" ({outcome.rerun:,} of them run again)" if outcome.rerun else ""
        print(
            f"batch {outcome.name}: {outcome.size:,} jobs, {outcome.new:,} new{known}{rerun}; stored in {seconds:.1f} s"
        )
    from producer import lab

    if not config.broker and not lab.Place(config.root).described():
        print("no lab runs here; they start when one does: netassay up")
    else:
        print(f"watch it: netassay watch {outcome.name}")


def _report_left_out(prepared: Any) -> None:
    if prepared.duplicates:
        print(f"{prepared.duplicates:,} rows asked for a job that is in the batch already; each is kept once")
    if prepared.refused:
        print(f"{prepared.refused:,} invalid rows were left out:", file=sys.stderr)
        for error in prepared.errors[:20]:
            print(f"  {error}", file=sys.stderr)


def _dry_run(file: Path, config: Any, skip_invalid: bool, as_json: bool) -> None:
    from producer import submit as submission
    from producer import sweeps

    _, prepared, _ = submission.prepare(file, config, skip_invalid)
    rows = sweeps.describe(prepared)
    if as_json:
        from dataclasses import asdict

        _print_json({"jobs": prepared.count, "duplicates": prepared.duplicates, "rows": [asdict(row) for row in rows]})
        return
    from producer.show import console, duration, size, table

    shown = [
        (
            row.method, row.group, f"{row.jobs:,}", duration(row.seconds), duration(row.total_seconds),
            duration(row.time_limit), size(row.memory_limit) if row.memory_limit else "the host's share",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("method", "on", "jobs", "each, predicted", "all", "time limit", "memory limit")
    console.print(table(columns, shown, right=("jobs", "each, predicted", "all", "time limit")))
    _report_left_out(prepared)
    print(f"{prepared.count:,} jobs; nothing was stored (dry run)")


@app.command()
def watch(
    batch: BatchName,
    timeout: Annotated[float | None, typer.Option(help="Stop watching after so many seconds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a batch's progress until it is over or paused. Exit code 1 unless all is done, 3 if it was cancelled."""
    from netassay.store import reading
    from producer import show

    database = _database()
    if as_json:
        last = reading.progress(database, batch)
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        while not last.resting and time.monotonic() < deadline:
            time.sleep(0.2)
            last = reading.progress(database, batch)
        _print_json(last.as_dict())
    else:
        last = show.watch(database, batch, timeout)
        print(show.batch_line(last))
        for group in reading.failures(database, batch):
            print(f"  {group.jobs:,} failed with cause {group.cause}, e.g. {group.example_key[:12]}: "
                  f"{group.example.partition(chr(10))[0][:200]}")  # fmt: skip
        if last.state == "paused":
            print(f"go on with: netassay resume {batch}")
        if last.failed:
            print(f"logs of one: netassay logs KEY; once mended: netassay retry {batch}")
    raise typer.Exit(3 if last.state == "cancelled" else int(last.failed > 0 or not last.over))


@app.command()
def results(
    batch: BatchName,
    columns: Annotated[str, typer.Option(help="Columns to show, separated by commas; else all.")] = "",
    state: Annotated[str, typer.Option(help="Only jobs in this state.")] = "",
    by: Annotated[str, typer.Option(help="Summarise the done jobs for each value of these columns.")] = "",
    limit: Annotated[int, typer.Option(help="Rows to print in a table; 0: all.", min=0)] = 20,
    as_json: AsJson = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
) -> None:
    """The records of a batch: params and results as columns."""
    import itertools

    from netassay.store import reading
    from producer import show

    database = _database()
    records = reading.records(database, batch)
    rows: Iterator[dict[str, Any]] = (show.flat(record) for record in records if not state or record.state == state)
    wanted = [name.strip() for name in columns.split(",") if name.strip()]
    if by:
        rows = iter(show.summary(rows, [name.strip() for name in by.split(",")], wanted))
        wanted = []
    if as_json:
        for row in rows:
            _print_json({name: row.get(name) for name in wanted} if wanted else row)
        return
    if csv:
        _write_csv(rows, wanted)
        return
    kept = list(itertools.islice(rows, limit or None))
    counted = not by and not state
    left = 0 if not limit or len(kept) < limit else _left(database, batch, rows, len(kept), counted)
    if not kept:
        print(f"batch {batch} has no such records")
        return
    names = wanted or _columns(kept)
    show.console.print(show.table(names, [[show.cell(row.get(name)) for name in names] for row in kept]))
    if left:
        print(f"... and {left:,} more; all of them: netassay results {batch} --csv (or --json, --limit 0)")


def _left(database: Database, batch: str, rows: Iterator[Any], shown: int, counted: bool) -> int:
    """How many rows follow those shown; `counted`: the rows are the batch's jobs, whose number is known."""
    if not counted:
        with _busy("counting"):
            return sum(1 for _ in rows)
    from netassay.store import reading

    return reading.progress(database, batch).size - shown


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of all these rows; those empty everywhere are left out, and those equal everywhere if there are many."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    if len(names) > 10 and len(rows) > 1:
        varied = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
        return varied or names
    return names


def _write_csv(rows: Iterator[dict[str, Any]], wanted: list[str]) -> None:
    """CSV of any number of rows; columns that appear only later need a second look, hence the list."""
    import csv as writer

    kept = list(rows)
    names = wanted or list(dict.fromkeys(name for row in kept for name in row))
    out = writer.DictWriter(sys.stdout, names, extrasaction="ignore", restval="")
    out.writeheader()
    for row in kept:
        out.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})


@app.command()
def plot(
    batch: BatchName,
    out: Annotated[Path | None, typer.Option(help="File to write: .png, .svg or .json; else BATCH.png here.")] = None,
    method: Annotated[str, typer.Option(help="Which method's figure, where the batch has several.")] = "",
) -> None:
    """Draw the figure of a batch's method."""
    from netassay import catalogue
    from netassay.store import artifacts, reading
    from producer import drawing

    config = _config()
    records: dict[str, list[Any]] = {}
    with _busy(f"reading {batch}"):
        for record in reading.records(_database(), batch):
            records.setdefault(record.method, []).append(record)
    drawable = [name for name in records if catalogue.get(name).plot is not None]
    if method and method not in drawable:
        raise typer.BadParameter(f"{method} has no figure in this batch; there are: {', '.join(drawable) or 'none'}")
    # A network trained on the way is not what the batch is about.
    chosen = [method] if method else [n for n in drawable if n != "networks.train" or len(drawable) == 1]
    if not chosen:
        raise typer.BadParameter(f"no method of batch {batch} draws a figure: {', '.join(records)}")
    with artifacts.using(config.artifacts_folder):
        for name in chosen:
            plot_of = catalogue.get(name).plot
            assert plot_of is not None
            path = out or Path(f"{batch}.png")
            if len(chosen) > 1:
                path = path.with_stem(f"{path.stem}-{name.replace('.', '-')}")
            with _busy(f"drawing {name}"):
                drawing.draw(plot_of(records[name]), path)
            print(f"{name}: {path}")


@app.command()
def logs(key: Annotated[str, typer.Argument(help="A job's key, or its beginning.")]) -> None:
    """What is known of a job's failure: its message with traceback; when its process died, why, and its last words."""
    from datetime import datetime

    from netassay.store import reading

    database = _database()
    attempts, end = reading.attempts(database, key), reading.end_of(database, key)
    print(f"job {key}: {end.state}{f' with cause {end.cause}' if end.cause else ''}")
    for line in end.message.splitlines():
        print(f"    {line}")
    if not attempts:
        print("no process died while it ran")
    for number, attempt in enumerate(attempts, 1):
        when = datetime.fromtimestamp(attempt.started_at).isoformat(" ", "seconds")
        with_others = "alone" if attempt.alone else "in a group"
        print(f"attempt {number}, {when} on {attempt.worker}, {with_others}: {attempt.cause}: {attempt.message}")
        for line in attempt.log.rstrip().splitlines():
            print(f"    {line}")


@app.command()
def pause(batch: BatchName) -> None:
    """Start no more of a batch's jobs; the running ones end."""
    from netassay.store import control

    print(f"{batch} paused" if control.pause(_database(), batch) else f"{batch} is not open")


@app.command()
def resume(batch: BatchName) -> None:
    """Go on with a paused or cancelled batch."""
    from netassay.store import control

    print(f"{batch} goes on" if control.resume(_database(), batch) else f"{batch} is neither paused nor cancelled")


@app.command()
def cancel(batch: BatchName) -> None:
    """Stop a batch, its running jobs included; what is done stays. `resume` takes it up again."""
    from netassay.store import control

    print(f"{batch} cancelled" if control.cancel(_database(), batch) else f"{batch} is over already")


@app.command()
def retry(
    batch: BatchName,
    failed_with: Annotated[str, typer.Option(help="Only jobs that failed with this cause, e.g. time.")] = "",
) -> None:
    """Give a batch's failed jobs a new start."""
    from netassay.job import CAUSES
    from netassay.store import control

    if failed_with and failed_with not in CAUSES:
        raise typer.BadParameter(f"{failed_with!r} is no cause; causes are: {', '.join(CAUSES)}")
    number = control.retry(_database(), batch, failed_with or None)
    print(f"{number:,} jobs of {batch} get a new start" if number else f"{batch} has no such failed jobs")


if __name__ == "__main__":
    main()
