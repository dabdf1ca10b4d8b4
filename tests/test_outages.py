"""A PostgreSQL that loses answers, takes no writes for a while, or waits for a client that is frozen."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from store_by_hand import audit, audit_at_rest, done, drain, jobs, publish, rows, sign_on, submit

from netassay.store import control, database, running
from netassay.store.database import Database, Outage
from netassay.store.running import Death
from worker import supervisor

PATIENCE = 20.0


class Deaf:
    """A way to PostgreSQL on which the answer to one COMMIT gets lost, once `armed`, and the connection with it."""

    def __init__(self, host: str, port: int) -> None:
        self.target, self.armed, self.lost = (host, port), False, 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self.target)
        cut = threading.Event()

        def onwards() -> None:
            with contextlib.suppress(OSError):
                while piece := client.recv(1 << 16):
                    if self.armed and b"COMMIT\x00" in piece:
                        self.armed, self.lost = False, self.lost + 1
                        cut.set()
                    server.sendall(piece)
            server.close()

        threading.Thread(target=onwards, daemon=True).start()
        with contextlib.suppress(OSError):
            while (piece := server.recv(1 << 16)) and not cut.is_set():
                client.sendall(piece)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def store() -> Iterator[Database]:
    with services.new_store("postgresql", Path()) as found:
        yield found


@pytest.fixture
def deaf(store: Database) -> Iterator[tuple[Database, Callable[[], None]]]:
    """The store by way of a `Deaf`, and what arms it."""
    way = Deaf(store.url.host or "127.0.0.1", store.url.port or 5432)
    url = store.url.set(host="127.0.0.1", port=way.port)
    found = Database(url.render_as_string(hide_password=False))

    def arm() -> None:
        assert not way.armed, "no COMMIT came by since it was armed"
        way.armed = True

    yield found, arm
    assert way.lost
    assert not way.armed
    found.dispose()
    way.listening.close()


def again(store: Database, action: Callable[[], Any]) -> Any:
    return store.persist(PATIENCE, action)


def test_a_claim_whose_answer_is_lost_finds_what_it_took(deaf: Any, store: Database) -> None:
    found, arm = deaf
    worker = sign_on(found)
    submit(found, "a", jobs(range(30)))
    (message, *_) = publish(found)
    token = running.new_token()
    arm()
    claim = again(found, lambda: running.claim(found, worker, message.chunk_id, token))
    assert claim.token == token
    assert [task.id for task in claim.tasks] == [row[0] for row in rows(store, "SELECT job_id FROM running ORDER BY 1")]
    assert running.claim(found, worker, message.chunk_id) is None, "to another it is taken"
    running.finish(found, worker, claim, [done(task) for task in claim.tasks])
    drain(found, worker)
    audit_at_rest(store)


def test_a_death_whose_answer_is_lost_is_one_attempt(deaf: Any, store: Database) -> None:
    found, arm = deaf
    worker = sign_on(found)
    submit(found, "a", jobs(range(3)))
    (message, *_) = publish(found)
    claim = running.claim(found, worker, message.chunk_id)
    assert claim is not None
    for began in (1.0, 2.0):
        death = Death((claim.tasks[0].id,), began, began + 0.5, "crash", "died", "last words")
        arm()
        again(found, lambda death=death: running.report_death(found, worker, claim, death))
    assert rows(store, "SELECT started_at FROM attempt ORDER BY 1") == [(1.0,), (2.0,)]


def test_results_whose_answer_is_lost_are_kept_once_and_nobody_calls_them_late(deaf: Any, store: Database) -> None:
    found, arm = deaf
    worker = sign_on(found)
    submit(found, "a", jobs(range(3)))
    (message, *_) = publish(found)
    claim = running.claim(found, worker, message.chunk_id)
    assert claim is not None
    arm()
    again(found, lambda: running.finish(found, worker, claim, [done(task) for task in claim.tasks]))
    assert rows(store, "SELECT count(*) FROM record") == [(len(claim.tasks),)]
    drain(found, worker)
    audit_at_rest(store)


@pytest.mark.parametrize("append", [False, True])
def test_a_submission_that_loses_the_answer_to_any_of_its_commits_is_there_once(
    append: bool, deaf: Any, store: Database
) -> None:
    found, arm = deaf
    submit(found, "a", jobs(range(5)))
    with losing_one(found) as commits:
        submit(found, "count", jobs(range(100, 110)))
    for place in range(commits[0]):
        first = 1000 * (place + 1)
        with losing_one(found, place, arm):
            submit(found, "a" if append else f"b-{place}", jobs(range(first, first + 10)), append=append)
        # One that was begun twice leaves a batch that never opens; it is removed when it is old.
        assert rows(store, "SELECT count(*) FROM batch WHERE state = 'arriving'") <= [(1,)]
    assert rows(store, "SELECT count(*) FROM job") == [(5 + 10 + 10 * commits[0],)]
    audit(store)


@contextlib.contextmanager
def losing_one(found: Database, place: int = -1, arm: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Count the commits of writes in the block; at the one in this place the answer gets lost."""
    seen = [0]

    def committing(connection: Any) -> None:
        if seen[0] == place:
            arm()
        seen[0] += 1

    event.listen(found.engine, "commit", committing)
    try:
        yield seen
    finally:
        event.remove(found.engine, "commit", committing)


def test_what_a_person_asks_for_is_done_though_the_answer_is_lost(deaf: Any, store: Database) -> None:
    found, arm = deaf
    submit(found, "a", jobs(range(3)))
    arm()
    control.pause(found, "a")
    assert rows(store, "SELECT state FROM batch") == [("paused",)]
    arm()
    control.resume(found, "a")
    arm()
    control.cancel(found, "a")
    assert rows(store, "SELECT state FROM batch") == [("cancelled",)]


FROZEN = """
from netassay.store import database
database.SILENT_SECONDS = 1
found = Database(sys.argv[1])
with found.write(beside=True):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_client_that_freezes_within_a_write_does_not_hold_up_the_others(store: Database) -> None:
    worker = sign_on(store)
    here = Path(__file__).parent
    frozen = subprocess.Popen(
        [sys.executable, "-c", "from store_by_hand import *\nimport sys\n" + FROZEN,
         store.url.render_as_string(hide_password=False)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == "in\n"
        frozen.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with store.write():  # alone: behind it all others would queue
            pass
        assert not running.renew(store, worker, {}).lost
        assert time.monotonic() - began < 10
    finally:
        frozen.send_signal(signal.SIGCONT)
        frozen.kill()
        frozen.wait()


@contextlib.contextmanager
def read_only(found: Database) -> Iterator[None]:
    """PostgreSQL takes no writes from here, as a server does that became the standby, or whose disk is nearly full."""

    def refuse(connection: Any) -> None:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    event.listen(found.engine, "begin", refuse)
    try:
        yield
    finally:
        event.remove(found.engine, "begin", refuse)


def test_a_server_that_takes_no_writes_is_an_outage(store: Database) -> None:
    with read_only(store):
        for action in (
            lambda c: c.execute(text("INSERT INTO provenance (digest, body) VALUES ('a', 'b')")),
            lambda c: store.insert(c, "provenance", ("digest", "body"), [("a", "b")]),
        ):
            with pytest.raises(OperationalError, match="read-only"), store.write() as connection:
                action(connection)
    assert issubclass(OperationalError, Outage)


def test_writes_are_read_committed_whatever_the_server_would_have(store: Database) -> None:
    name = store.url.database
    with store.write() as connection:
        connection.execute(text(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'"))
    fresh = Database(store.url.render_as_string(hide_password=False))
    with fresh.write() as connection:
        assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
    fresh.dispose()


def test_results_wait_for_a_server_that_takes_writes_again(
    store: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_supervisor import Bench, echo

    bench = Bench(tmp_path, store=store.url.render_as_string(hide_password=False))
    bench.submit("a", echo(3))
    refusing = contextlib.ExitStack()
    keep = supervisor.Slot._keep

    def keep_later(slot: supervisor.Slot, *about: Any) -> None:
        monkeypatch.setattr(supervisor.Slot, "_keep", keep)
        refusing.enter_context(read_only(bench.supervisor.database))
        threading.Timer(1.5, refusing.close).start()
        keep(slot, *about)

    monkeypatch.setattr(supervisor.Slot, "_keep", keep_later)
    try:
        while chunk := bench.publish():
            bench.supervisor.run(chunk)
        assert rows(store, "SELECT state, count(*) FROM record GROUP BY 1") == [("done", 3)]
        assert rows(store, "SELECT state FROM worker") == [("alive",)]
    finally:
        refusing.close()
        bench.supervisor.close()


def test_the_server_soon_notices_a_client_that_is_gone(store: Database) -> None:
    if (store.url.host or "").startswith("/"):
        pytest.skip("no TCP on a unix socket")
    with store.read() as connection:
        for name, value in database._SERVER.items():
            shown = connection.execute(text(f"SELECT setting FROM pg_settings WHERE name = '{name}'")).scalar_one()
            assert shown == value
