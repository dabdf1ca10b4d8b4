"""A PostgreSQL that crashes may forget its last moments: what workers do is not waited for until it is on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import services
from sqlalchemy import text
from store_by_hand import audit_at_rest, done, drain, jobs, publish, rows, sign_on, submit

from netassay.store import running
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
