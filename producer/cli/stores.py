"""Verbs of whole stores: export, import, backup, restore, gc."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from producer.cli.common import AsJson, batch_names, end_in_order, open_store, print_output, read_settings, working

verbs = typer.Typer()


@verbs.command("export")
def export_store(
    file: Annotated[Path, typer.Argument(help="File to write, such as lab.tar.")],
    batches: Annotated[
        list[str] | None, typer.Argument(help="Names of batches; else all.", autocompletion=batch_names)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write batches, their jobs, records and files to one file, for `netassay import` elsewhere."""
    from netassay.store import artifacts, transfer
    from producer.wording import size

    transfer.target(file)
    database = open_store()
    end_in_order()
    with working("exporting") as progress:
        out = transfer.export(database, artifacts.of(read_settings()), file, batches or (), progress)
    if as_json:
        print_output("export", asdict(out))
        return
    print(
        f"{out.path}: {out.batches:,} batches, {out.jobs:,} jobs, {out.records:,} with records, {out.artifacts:,} "
        f"files; {size(out.bytes)}"
    )
    _tell_missing(out.missing)


@verbs.command("import")
def import_store(
    file: Annotated[Path, typer.Argument(help="What `netassay export` wrote.")],
    rename: Annotated[
        str, typer.Option(metavar="SUFFIX", help="Put this behind names that batches with other jobs have here.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Take in what `netassay export` wrote. What is there already stays as it is; once more, it adds nothing."""
    from netassay.store import artifacts, transfer
    from netassay.store.database import Database

    config = read_settings()
    database = Database(config.store_url)
    database.prepare()
    with working("importing") as progress:
        brought = transfer.bring(database, artifacts.of(config), file, rename, progress)
    if as_json:
        print_output("import", asdict(brought))
        return
    there = f"; {brought.skipped:,} were there" if brought.skipped else ""
    print(
        f"{brought.batches:,} batches came in, {brought.jobs:,} jobs ({brought.new:,} new), "
        f"{brought.records:,} records, {brought.artifacts:,} files{there}"
    )
    for name, here in brought.renamed.items():
        print(f"  {name} is called {here} here")


def _tell_missing(references: Sequence[str]) -> None:
    if references:
        print(f"{len(references):,} files that are named are missing or damaged, and were left out:", file=sys.stderr)
        for reference in references[:20]:
            print(f"  {reference}", file=sys.stderr)


@verbs.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="Folder of backups, on another disk; files that it has stay.")],
    as_json: AsJson = False,
) -> None:
    """Save the whole store as it is at one moment, while the lab runs. Files that the folder has are not copied."""
    from netassay.store import artifacts
    from netassay.store import backup as backups
    from producer.wording import size

    database = open_store()
    end_in_order()
    with working("saving") as progress:
        saved = backups.save(database, artifacts.of(read_settings()), folder, progress)
    if as_json:
        print_output("backup", asdict(saved))
        return
    print(
        f"{saved.path}: {saved.batches:,} batches, {saved.jobs:,} jobs, {saved.records:,} with records, "
        f"{saved.artifacts:,} files of which {saved.copied:,} are new; {size(saved.bytes)} written"
    )
    _tell_missing(saved.missing)


@verbs.command()
def restore(
    path: Annotated[Path, typer.Argument(help="Folder of backups, for the newest; or the .json file of one.")],
    as_json: AsJson = False,
) -> None:
    """Bring a backup into an empty store. What ran or waited when it was made runs at the next `up`."""
    from netassay.store import artifacts
    from netassay.store import backup as backups
    from netassay.store.database import Database

    config = read_settings()
    database = Database(config.store_url)
    database.prepare()
    with working("restoring") as progress:
        back = backups.restore(database, artifacts.of(config), path, progress)
    if as_json:
        print_output("restore", asdict(back))
        return
    there = f"; {back.skipped:,} were there" if back.skipped else ""
    print(
        f"{back.path}: {back.batches:,} batches came back, {back.jobs:,} jobs, {back.records:,} with records, "
        f"{back.artifacts:,} files{there}"
    )
    print("next: netassay up")


@verbs.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what serves nobody: jobs of no batch, files that nothing names and that are older than a day.

    Records stay, and so does all that a submission or a worker has in hand.
    """
    from netassay.store import artifacts, tidying
    from producer.wording import size

    database, kept = open_store(), artifacts.of(read_settings())
    with working("looking" if dry_run else "removing") as progress:
        found = tidying.find(database, kept) if dry_run else tidying.remove(database, kept, progress=progress)
    if as_json:
        print_output(
            "gc",
            {
                "dry_run": dry_run, "batches": found.batches, "jobs": found.jobs, "jobs_kept": found.jobs_kept,
                "artifacts": [{"digest": digest, "bytes": length} for digest, length in found.artifacts],
                "temporaries": len(found.temporaries), "bytes": found.bytes,
            },
        )  # fmt: skip
        return
    if dry_run:
        for digest, length in found.artifacts:
            print(f"  {digest}  {size(length)}")
    print(
        f"{'would remove' if dry_run else 'removed'} {found.jobs:,} jobs, {found.batches:,} batches that died on their "
        f"way, {len(found.artifacts):,} files, {len(found.temporaries):,} temporary files; {size(found.bytes)}"
    )
    if found.jobs_kept:
        print(f"{found.jobs_kept:,} more jobs belong to no batch, but a submission is on its way: try again later")
