"""A PostgreSQL that crashes may forget its last moments: what workers do is not waited for until it is on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from sqlalchemy import text
from store_by_hand import audit_at_rest, done, drain, jobs, publish, rows, sign_on, submit

from netassay.store import arriving, running
from netassay.store.database import Database

from .postgres import Postgres, missing


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    if why := missing():
        services.absent(why)
    folder = Path(tempfile.mkdtemp(prefix="na-"))
    server = Postgres(folder, wal_writer_delay="10s")  # so it forgets for certain
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_chunk_whose_end_was_forgotten_goes_back_though_its_worker_lives(postgres: Postgres) -> None:
    database = Database(postgres.url())
    database.prepare()
    worker = sign_on(database)
    submit(database, "a", jobs(range(3)))
    (message, *_) = publish(database)
    claim = running.claim(database, worker, message.chunk_id)
    assert claim is not None
    assert running.renew(database, worker, {claim.chunk_id: []}).stray == frozenset()
    with database.write(durable=True) as connection:  # what went before is on disk now; what follows need not be
        connection.execute(text("UPDATE lab SET value = value WHERE name = 'id'"))
    running.finish(database, worker, claim, [done(task) for task in claim.tasks])
    postgres.crash()
    postgres.start()
    database.dispose()
    assert rows(database, "SELECT state FROM chunk WHERE id = :id", id=claim.chunk_id) == [("claimed",)]
    seen = running.renew(database, worker, {})
    assert seen.stray == {claim.chunk_id}
    running.give_back(database, worker, seen.stray)
    assert rows(database, "SELECT state FROM chunk WHERE id = :id", id=claim.chunk_id) == [("ready",)]
    drain(database, worker)
    audit_at_rest(database)
    database.dispose()


def forget(postgres: Postgres) -> None:
    """Crash at once, with all that was not waited for."""
    postgres.crash()
    postgres.start()


@pytest.mark.parametrize("step", ["write_jobs", "_allot", "_insert_jobs", "_insert_keys", "write_memberships", "place"])
def test_a_submission_that_goes_on_after_a_crash_has_all_its_rows(
    step: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(postgres.url())
    database.prepare()
    worker = sign_on(database)
    crashed: list[str] = []
    usual = getattr(arriving.Arrival, step)

    def after_a_crash(self: arriving.Arrival, *arguments: Any) -> Any:
        if not crashed:
            crashed.append(step)
            forget(postgres)
        return usual(self, *arguments)

    monkeypatch.setattr(arriving.Arrival, step, after_a_crash)
    submit(database, "a", jobs(range(3)))
    assert crashed
    submit(database, "b", jobs(range(2, 6)))
    drain(database, worker)
    assert rows(database, "SELECT count(*) FROM job") == [(6,)]
    assert rows(database, "SELECT count(*) FROM record") == [(6,)]
    audit_at_rest(database)
    database.dispose()


def test_nobody_gets_the_id_of_a_worker_that_signed_on_before_a_crash(postgres: Postgres) -> None:
    database = Database(postgres.url())
    database.prepare()
    first = sign_on(database)
    provenance = running.provenance_id(database, "digest", "body")
    forget(postgres)
    database.dispose()
    assert sign_on(database) != first
    assert running.provenance_id(database, "digest", "body") == provenance
    assert rows(database, "SELECT count(*) FROM worker WHERE id = :id", id=first) == [(1,)]
    database.dispose()
