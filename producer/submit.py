"""From a sweep file to a batch in the store: the one way in, for the command line and for programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from netassay.settings import Settings
from netassay.store.artifacts import Artifacts
from producer import sweeps
from producer.references import Resolver


def prepare(
    path: Path, config: Settings, skip_invalid: bool = False
) -> tuple[sweeps.Document, sweeps.Prepared, Resolver]:
    """Read and check a sweep. Stores nothing. Raises BadSweep with every error in it."""
    document = sweeps.read(path)
    resolver = Resolver(document.base, document.networks, Artifacts(config.artifacts_folder))
    return document, sweeps.prepare(document, resolver, skip_invalid), resolver


def submit(
    path: Path,
    config: Settings,
    name: str | None = None,
    weight: float = 1.0,
    skip_invalid: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[sweeps.Prepared, object]:
    """Check a sweep, keep its files, write its batch. Returns what was prepared and what became of it
    (`netassay.store.submission.Submitted`).

    Nothing is stored unless all of it is valid, or `skip_invalid` leaves the bad rows out. Raises BadSweep, NameTaken,
    ChangedFile.
    """
    document, prepared, resolver = prepare(path, config, skip_invalid)
    from netassay.store import submission
    from netassay.store.database import Database

    database = Database(config.store_url)
    database.prepare()
    resolver.commit()
    called = name or document.name or path.stem
    return prepared, submission.submit(database, called, prepared.segments, prepared.names, weight, progress)
