"""Verbs of batches: submit, watch, wait, batches, pause, resume, cancel, retry, weight, share, logs."""

from __future__ import annotations

import fnmatch
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netassay.errors import UserError
from producer.cli.common import (
    CANCELLED,
    PAUSED,
    SOME_FAILED,
    TIMED_OUT,
    AsJson,
    BatchName,
    batch_names,
    busy,
    causes,
    method_names,
    open_store,
    print_output,
    read_settings,
    working,
)

if TYPE_CHECKING:
    from netassay.settings import Settings
    from netassay.store.database import Database
    from netassay.store.reading import Progress

#: Invalid rows that are named when they are left out.
NAMED = 20

verbs = typer.Typer()


@verbs.command()
def submit(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Sweeps (YAML, JSON) or rows of params (CSV, JSON lines); globs in quotes; - for standard input. "
            "Together they are one batch.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the batch; else the sweep's own, else the file's.")] = "",
    method: Annotated[str, typer.Option(help="Method of rows that name none.", autocompletion=method_names)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, show what would run, store nothing.")] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the batch of this name the jobs it does not hold.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute again what the store knows already.")] = False,
    weight: Annotated[float, typer.Option(help="Share of the slots against other batches.", min=0.001, max=1000)] = 1.0,
    note: Annotated[str, typer.Option(help="A remark kept with the batch.")] = "",
    tag: Annotated[list[str], typer.Option(help="A word to find the batch by; several times for several.")] = [],  # noqa: B006
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave bad rows out instead of refusing all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a sweep as a batch. When this returns, no crash loses a job."""
    from producer import submission

    config = read_settings()
    what = files[0] if len(files) == 1 else files
    if dry_run:
        _dry_run(what, config, skip_invalid, method, as_json)
        return
    started = time.perf_counter()
    with working("submitting") as progress:
        prepared, outcome = submission.submit(
            what, config, name or None, weight, skip_invalid, progress,
            method=method, note=note, tags=tag, append=append, fresh=fresh, stdin=sys.stdin.buffer,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    from producer import lab

    with lab.records_of(config) as database:
        works = lab.anybody_works(config, database)
    if as_json:
        left_out = {"refused": prepared.refused, "duplicates": prepared.duplicates}
        print_output("submit", {**asdict(outcome), "seconds": seconds, **left_out, "works": works})
        return
    _report_left_out(prepared)
    print(f"batch {outcome.name}{_told(outcome)}; stored in {seconds:.1f} s")
    if works:
        print(f"watch it: netassay watch {shlex.quote(outcome.name)}")
    elif lab.on_cluster(config):
        print(
            "no worker is alive; the jobs start when one is: netassay up, or netassay worker, on a host of the cluster"
        )
    else:
        print("no lab runs here; they start when one does: netassay up")


def _told(outcome: Any) -> str:
    from producer.wording import counted

    rerun = f" ({outcome.rerun:,} of them run again)" if outcome.rerun else ""
    if outcome.already:
        again = "; it was cancelled and goes on now" if outcome.reopened else ""
        same = f"{'this' if outcome.size == 1 else 'these'} {counted(outcome.size, 'job')}"
        return f" was submitted before with {same}; nothing was added{rerun}{again}"
    if outcome.appended:
        return f": {counted(outcome.appended, 'job')} added, {outcome.new:,} new{rerun}; it has {outcome.size:,} now"
    known = f", {outcome.known:,} known from before" if outcome.known else ""
    return f": {counted(outcome.size, 'job')}, {outcome.new:,} new{known}{rerun}"


def _report_left_out(prepared: Any) -> None:
    from producer import submission
    from producer.wording import counted

    if prepared.duplicates:
        print(f"{counted(prepared.duplicates, 'row')} asked for a job that is in the batch already; each is kept once")
    if prepared.refused:
        print(f"{submission.left_out(prepared)}:", file=sys.stderr)
        for error in prepared.errors[:NAMED]:
            print(f"  {error}", file=sys.stderr)


def _dry_run(what: str | list[str], config: Settings, skip_invalid: bool, method: str, as_json: bool) -> None:
    from producer import submission, sweeps

    with busy("checking"):
        _, prepared, _ = submission.prepare(what, config, skip_invalid, method, sys.stdin.buffer)
        rows = sweeps.describe(prepared)
    if as_json:
        left_out = {"refused": prepared.refused, "duplicates": prepared.duplicates}
        told = [{**asdict(row), "total_seconds": row.total_seconds} for row in rows]
        print_output("submit", {"jobs": prepared.count, **left_out, "rows": told})
        return
    from producer.show import console, table
    from producer.wording import counted, duration, size

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
    print(f"{counted(prepared.count, 'job')}; nothing was stored (dry run)")


@verbs.command()
def watch(
    batch: BatchName,
    timeout: Annotated[float | None, typer.Option(help="Stop watching after so many seconds.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Show a batch's progress until it is over or paused.

    Exit code 0: all done; 1: some failed; 3: it was cancelled; 5: the timeout passed; 6: it is paused.
    """
    from netassay.store import reading
    from producer import following, notebook, show

    config, database = read_settings(), open_store()
    with notebook.Silent(says=False) if as_json else notebook.Terminal(show.console) as bar:
        (last,) = following.show(following.follow(database, config, [batch], timeout), bar)
    failures = reading.failures(database, batch)
    if as_json:
        print_output("watch", {**last.as_dict(), "failures": [asdict(group) for group in failures]})
    else:
        print(show.batch_line(last))
        for group in failures:
            print(f"  {group.jobs:,} failed with cause {group.cause}, e.g. {group.example_key[:12]}: "
                  f"{group.example.partition(chr(10))[0][:200]}")  # fmt: skip
        _next_step(last, failures[0].example_key[:12] if failures else "JOB")
    raise typer.Exit(_exit_code(last))


def _next_step(batch: Progress, failed: str = "JOB") -> None:
    """failed: key of a job that failed."""
    name = shlex.quote(batch.name)
    if batch.state == "paused":
        print(f"go on with: netassay resume {name}")
    if batch.failed:
        print(f"why one failed: netassay logs {failed}; once mended: netassay retry {name}")
    elif batch.over and batch.done:
        print(f"its records: netassay results {name}")


def _exit_code(batch: Progress) -> int:
    if not batch.resting:
        return TIMED_OUT
    if not batch.over:
        return PAUSED
    if batch.state == "cancelled":
        return CANCELLED
    return SOME_FAILED if batch.failed else 0


_OUTCOMES = {0: "done", SOME_FAILED: "failed", CANCELLED: "cancelled", TIMED_OUT: "timeout", PAUSED: "paused"}


@verbs.command()
def wait(
    batches: Annotated[list[str], typer.Argument(metavar="BATCH...", autocompletion=batch_names)],
    timeout: Annotated[float | None, typer.Option(help="Wait no longer than so many seconds.", min=0)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing, only give the exit code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Wait until batches are over or paused; for scripts.

    Exit code 0: all done; 1: some jobs failed; 3: a batch was cancelled; 5: the timeout passed before all had come to
    rest; 6: a batch is paused (by itself, if its first jobs all failed). Of several batches the highest code.
    """
    from producer import following, notebook, show

    config, database = read_settings(), open_store()
    names = list(dict.fromkeys(batches))
    with notebook.Silent(says=False) if quiet or as_json else notebook.Terminal(show.errors) as bar:
        last = following.show(following.follow(database, config, names, timeout), bar)
    code = max(map(_exit_code, last))
    if as_json:
        print_output("wait", {"outcome": _OUTCOMES[code], "batches": [batch.as_dict() for batch in last]})
    elif not quiet:
        for batch in last:
            print(show.batch_line(batch))
            _next_step(batch)
    raise typer.Exit(code)


@verbs.command()
def batches(
    pattern: Annotated[
        str, typer.Argument(help="Only those so named, e.g. 'digits*'.", autocompletion=batch_names)
    ] = "*",
    state: Annotated[str, typer.Option(help="Only those in this state: open, paused, cancelled, finished.")] = "",
    tag: Annotated[str, typer.Option(help="Only those with this tag.")] = "",
    submitter: Annotated[str, typer.Option(help="Only those of this submitter.")] = "",
    limit: Annotated[int, typer.Option(help="Rows of the table, newest first; 0: all. JSON has all.", min=0)] = 20,
    as_json: AsJson = False,
) -> None:
    """List the batches, newest first."""
    from netassay.store import reading
    from producer.show import batch_table, console

    states = ("open", "paused", "cancelled", "finished")
    if state and state not in states:
        raise UserError(f"{state!r} is no state of a batch; states are: {', '.join(states)}")
    with busy("counting"):
        everything = reading.batches(open_store())
    found = [
        b
        for b in everything
        if fnmatch.fnmatchcase(b.name, pattern)
        and state in ("", b.state)
        and submitter in ("", b.submitter)
        and (not tag or tag in b.tags)
    ]
    if as_json:
        print_output("batches", [batch.as_dict() for batch in found])
        return
    if not everything:
        print("no batch was submitted yet; try: netassay submit FILE --name NAME")
    elif not found:
        narrowed = state or tag or submitter
        print(f"no batch of {len(everything):,} is of that kind" if narrowed else "no batch is so named")
    else:
        shown = found[: limit or None]
        console.print(batch_table(shown))
        if len(shown) < len(found):
            print(f"... and {len(found) - len(shown):,} older ones: netassay batches --limit 0")


def _say_changed(
    verb: str, database: Database, batch: str, changed: bool, words: tuple[str, str], as_json: bool
) -> None:
    """words: what to say where it changed, and where it did not."""
    if as_json:
        from netassay.store import reading

        print_output(verb, {"batch": batch, "changed": changed, "state": reading.progress(database, batch).state})
    else:
        print(f"{batch} {words[0] if changed else words[1]}")


@verbs.command()
def pause(batch: BatchName, as_json: AsJson = False) -> None:
    """Start no more of a batch's jobs; the running ones end."""
    from netassay.store import control

    database = open_store()
    changed = control.pause(database, batch)
    _say_changed(
        "pause",
        database,
        batch,
        changed,
        (f"paused; go on with: netassay resume {shlex.quote(batch)}", "is not open"),
        as_json,
    )


@verbs.command()
def resume(batch: BatchName, as_json: AsJson = False) -> None:
    """Go on with a paused or cancelled batch."""
    from netassay.store import control

    database = open_store()
    changed = control.resume(database, batch)
    _say_changed("resume", database, batch, changed, ("goes on", "is neither paused nor cancelled"), as_json)


@verbs.command()
def cancel(batch: BatchName, as_json: AsJson = False) -> None:
    """Stop a batch, its running jobs included; what is done stays. `resume` takes it up again."""
    from netassay.store import control

    database = open_store()
    changed = control.cancel(database, batch)
    _say_changed("cancel", database, batch, changed, ("cancelled", "is over already"), as_json)


@verbs.command()
def retry(
    batch: BatchName,
    failed_with: Annotated[
        str, typer.Option(help="Only jobs that failed with this cause, e.g. time.", autocompletion=causes)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Give a batch's failed jobs a new start."""
    from netassay.job import CAUSES
    from netassay.store import control

    if failed_with and failed_with not in CAUSES:
        raise UserError(f"{failed_with!r} is no cause; causes are: {', '.join(CAUSES)}")
    database = open_store()
    with busy("looking for failed jobs"):
        number = control.retry(database, batch, failed_with or None)
    if as_json:
        print_output("retry", {"batch": batch, "jobs": number})
    else:
        from producer.wording import counted

        given = f"{counted(number, 'job')} of {batch} {'gets' if number == 1 else 'get'} a new start"
        print(given if number else f"{batch} has no such failed jobs")


@verbs.command()
def weight(
    batch: BatchName,
    share: Annotated[
        float, typer.Argument(metavar="WEIGHT", help="1 is usual; 2 gets twice as much.", min=0.001, max=1000)
    ],
    as_json: AsJson = False,
) -> None:
    """Set a batch's share of the slots against other open batches."""
    from netassay.store import control

    control.set_weight(open_store(), batch, share)
    if as_json:
        print_output("weight", {"batch": batch, "weight": share})
    else:
        print(f"{batch} has weight {share:g} now")


@verbs.command()
def share(
    submitter: Annotated[str, typer.Argument(help="Whose share; nothing: list them all.")] = "",
    share: Annotated[
        float | None, typer.Argument(metavar="WEIGHT", help="1 is usual; 2 gets twice as much.", min=0.001, max=1000)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set a submitter's share of the slots against other submitters, however many batches each has."""
    from netassay.store import control

    database = open_store()
    if share is not None:
        control.set_share(database, submitter, share)
    found = {name: weight for name, weight in control.shares(database).items() if submitter in ("", name)}
    if submitter and not found:
        raise UserError(f"nobody called {submitter!r} has submitted a batch; the list of all: netassay share")
    if as_json:
        print_output("share", {"submitters": [{"name": name, "weight": weight} for name, weight in found.items()]})
        return
    for name, weight in found.items():
        print(f"{name or '(not known)'} has the share {weight:g}")
    if not found:
        print("nobody has submitted a batch yet")


@verbs.command()
def logs(
    key: Annotated[str, typer.Argument(metavar="JOB", help="A job's key, or its beginning.")], as_json: AsJson = False
) -> None:
    """What is known of a job's failure: its message with traceback; when its process died, why, and its last words."""
    from netassay.store import reading

    database = open_store()
    attempts, end = reading.attempts(database, key), reading.end_of(database, key)
    if as_json:
        print_output("logs", {"key": key, **asdict(end), "attempts": [asdict(attempt) for attempt in attempts]})
        return
    print(f"job {key}: {end.state}{f' with cause {end.cause}' if end.cause else ''}")
    _print_indented(end.message.splitlines())
    if not attempts:
        print("no process died while it ran")
    for number, attempt in enumerate(attempts, 1):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started_at))
        with_others = "alone" if attempt.alone else "in a group"
        print(f"attempt {number}, {when} on {attempt.worker}, {with_others}: {attempt.cause}: {attempt.message}")
        _print_indented(attempt.log.rstrip().splitlines())


def _print_indented(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"    {line}")
