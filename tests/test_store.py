"""The store keeps its promises: submission, claims, counters, caching, needs, losses, reading, schema."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import services
from services import STORES
from sqlalchemy import Connection, event, inspect, text
from store_by_hand import (
    audit,
    audit_at_rest,
    builder,
    done,
    drain,
    failed,
    finish,
    jobs,
    jobs_in,
    number_of,
    publish,
    recount,
    rows,
    sign_on,
    submit,
    take,
)

from netassay.job import CAUSES, DETERMINISTIC
from netassay.store import arriving, artifacts, control, dispatching, reading, running, submission, tables
from netassay.store.database import SCHEMA, Database, StoreError
from netassay.store.reset import forget_records
from netassay.store.running import Claim, Death, Outcome, StaleToken, Task
from netassay.store.submission import NameTaken


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    """The kind of store."""
    return request.param


@pytest.fixture
def database(store: str, tmp_path: Path) -> Iterator[Database]:
    with services.new_store(store, tmp_path) as found:
        yield found


@pytest.fixture
def worker(database: Database) -> int:
    return sign_on(database)


def in_process(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python in a process of its own, with the helpers of these tests at hand."""
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", "from store_by_hand import *\nimport sys\n" + script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def claim_of(database: Database, worker: int, chunk_id: int) -> Claim:
    claim = running.claim(database, worker, chunk_id)
    assert claim is not None
    return claim


# Submission


def test_the_same_batch_again_adds_nothing(database: Database) -> None:
    first = submit(database, "a", jobs(range(25)))
    again = submit(database, "a", jobs(range(25)))

    assert (first.new, first.known, first.already) == (25, 0, False)
    assert (again.batch_id, again.new, again.already) == (first.batch_id, 0, True)
    assert rows(database, "SELECT count(*) FROM job") == [(25,)]
    assert rows(database, "SELECT count(*) FROM membership") == [(25,)]
    assert len(reading.batches(database)) == 1


def test_appended_jobs_come_behind_and_those_that_are_there_are_left_out(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(10)), note="the first ten")
    drain(database, worker)
    assert reading.progress(database, "a").state == "finished"

    added = submit(database, "a", jobs(range(5, 15)), append=True)

    assert (added.size, added.appended, added.new, added.known, added.already) == (15, 5, 5, 0, False)
    seen = reading.progress(database, "a")
    assert (seen.size, seen.done, seen.state) == (15, 10, "open")
    assert rows(database, "SELECT note FROM batch") == [("the first ten",)]
    assert [record.params["n"] for record in reading.records(database, "a")] == list(range(15))
    audit(database)
    assert len(drain(database, worker)) == 5
    audit_at_rest(database)
    # Now it is the batch of these fifteen, for whoever submits them as one.
    assert submit(database, "a", jobs(range(15))).already
    assert submit(database, "a", jobs(range(3)), append=True).already
    assert rows(database, "SELECT count(*) FROM batch") == [(1,)]


def test_jobs_known_from_elsewhere_are_counted_when_they_are_appended(database: Database, worker: int) -> None:
    submit(database, "other", jobs(range(20, 30)))
    drain(database, worker)
    submit(database, "a", jobs(range(5)))
    added = submit(database, "a", jobs(range(18, 32)), append=True, note="more")
    assert (added.size, added.new, added.known) == (19, 4, 10)
    assert reading.progress(database, "a").done == 10
    assert rows(database, "SELECT note FROM batch WHERE name = 'a'") == [("more",)]
    audit(database)
    assert len(drain(database, worker)) == 9
    audit_at_rest(database)


def test_tags_and_note_of_whoever_appends_are_taken_though_no_job_is_new(database: Database) -> None:
    submit(database, "a", jobs(range(3)), tags=tuple(f"t{number:02}" for number in range(15)))
    again = tuple(f"t{number:02}" for number in range(10))
    assert submit(database, "a", jobs(range(3)), append=True, tags=(*again, "more"), note="looked at twice").already
    assert submit(database, "a", jobs(range(3, 5)), append=True, tags=(*again, "most")).appended == 2
    ((tags, note),) = rows(database, "SELECT tags, note FROM batch")
    assert len(tags.split()) == 17
    assert {"more", "most", "t14"} < set(tags.split())
    assert note == "looked at twice"


def test_what_is_appended_waits_for_the_network_that_the_batch_builds_already(database: Database, worker: int) -> None:
    recipe = "recipe:" + "1" * 64
    submit(database, "a", builder(recipe), jobs(range(3), recipes=(recipe,)))
    added = submit(database, "a", builder(recipe), jobs(range(3, 6), recipes=(recipe,)), append=True)
    assert added.appended == 3
    assert [message.label for message in publish(database)] == ["a / networks.train / 0..0"]
    with database.write() as connection:
        dispatching.new_incarnation(connection)
    assert len(drain(database, worker)) == 7
    audit_at_rest(database)


def test_appending_to_no_batch_makes_one_and_to_a_cancelled_one_opens_it(database: Database, worker: int) -> None:
    assert submit(database, "a", jobs(range(4)), append=True).appended == 0
    control.cancel(database, "a")
    assert submit(database, "a", jobs(range(4, 6)), append=True).appended == 2
    assert len(drain(database, worker)) == 6
    audit_at_rest(database)


def test_two_who_append_at_once_both_have_their_jobs_in(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(10)))
    waits = threading.Barrier(2)

    def add(low: int) -> None:
        mine = Database(database.url.render_as_string(hide_password=False))
        met = []

        def meet(share: float) -> None:
            if not met:
                met.append(share)
                waits.wait()

        submission.submit(mine, "a", [jobs(range(low, low + 20))], {}, progress=meet, append=True)
        mine.dispose()

    threads = [threading.Thread(target=add, args=(low,)) for low in (5, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.params["n"] for record in reading.records(database, "a")) == list(range(35))
    assert rows(database, "SELECT name, state, size FROM batch") == [("a", "open", 35)]
    assert len(drain(database, worker)) == 35
    audit_at_rest(database)


def test_fresh_runs_again_what_is_known_in_every_batch_that_holds_it(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(6)))
    submit(database, "b", jobs(range(4, 8)))
    drain(database, worker, lambda task: failed("numerical")(task) if number_of(task) == 0 else done(task))

    same = submit(database, "a", jobs(range(6)), fresh=True)
    assert (same.already, same.rerun) == (True, 6)
    assert (reading.progress(database, "a").ended, reading.progress(database, "b").ended) == (0, 2)
    audit(database)
    assert len(drain(database, worker)) == 6

    other = submit(database, "c", jobs(range(3, 9)), fresh=True)
    assert (other.new, other.known, other.rerun) == (1, 5, 5)
    assert len(drain(database, worker)) == 6
    audit_at_rest(database)


def test_fresh_jobs_behind_a_batch_run_again_where_it_held_them_too(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(6)))
    drain(database, worker)
    outcome = submit(database, "a", jobs(range(3, 9)), append=True, fresh=True)
    assert (outcome.size, outcome.appended, outcome.new, outcome.rerun) == (9, 3, 3, 3)
    assert len(drain(database, worker)) == 6
    audit_at_rest(database)


def test_one_name_cannot_hold_other_jobs(database: Database) -> None:
    submit(database, "a", jobs(range(25)))

    with pytest.raises(NameTaken, match=r"'a' exists and holds other jobs \(25\).*another --name"):
        submit(database, "a", jobs(range(26)))
    with pytest.raises(NameTaken):
        submit(database, "a", jobs(reversed(range(25))))  # order is part of a batch

    assert rows(database, "SELECT name, state, size FROM batch") == [("a", "open", 25)]


def test_a_name_taken_while_the_batch_arrives_is_refused_and_swept_up(database: Database) -> None:
    rival = Database(database.url.render_as_string(hide_password=False))

    def at_the_end(share: float) -> None:
        if share == 0.75:
            submit(rival, "a", jobs(range(5)))

    with pytest.raises(NameTaken):
        submission.submit(database, "a", [jobs(range(9))], {}, progress=at_the_end)

    assert rows(database, "SELECT name, state, size FROM batch") == [("a", "open", 5)]
    assert rows(database, "SELECT count(*) FROM membership") == [(5,)]


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_a_submission_that_is_broken_off_sweeps_up_after_itself(database: Database, share: float) -> None:
    def interrupt(done: float) -> None:
        if done >= share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submission.submit(database, "a", [jobs(range(9)), jobs(range(9, 12))], {}, progress=interrupt)

    for table in ("batch", "membership", "segment"):
        assert rows(database, f"SELECT count(*) FROM {table}") == [(0,)]
    assert submit(database, "a", jobs(range(12))).size == 12


def test_a_removal_that_breaks_off_is_found_again_and_its_batch_never_opens(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("DELETE FROM batch"):
            raise Died

    def thought_dead(share: float) -> None:
        """Its memberships are written; somebody takes it for dead, and dies in turn while removing it."""
        if share < 0.75 or rows(database, "SELECT count(*) FROM membership") == [(0,)]:
            return
        monkeypatch.setattr(arriving, "ABANDONED_SECONDS", -1.0)
        event.listen(database.engine, "before_cursor_execute", die)
        with pytest.raises(Died):
            arriving.discard_abandoned(database)
        event.remove(database.engine, "before_cursor_execute", die)
        assert rows(database, "SELECT state FROM batch") == [("arriving",)]

    with pytest.raises(StoreError, match="taken for dead"):
        submission.submit(database, "a", [jobs(range(9))], {}, progress=thought_dead)

    assert rows(database, "SELECT count(*) FROM batch") == [(0,)]
    assert rows(database, "SELECT count(*) FROM membership") == [(0,)]


def test_segments_in_number_cost_no_transactions_and_no_scans(database: Database, worker: int) -> None:
    """A network for each job: so many segments. Neither submitting nor publishing nor retrying looks at all of them."""
    statements: dict[str, tuple] = {}
    begun = []

    def note(connection: Connection, cursor: object, statement: str, parameters: tuple, *_: object) -> None:
        if "segment" in statement and not statement.startswith("INSERT"):
            statements[statement] = parameters
        if statement == "BEGIN IMMEDIATE" or "pg_advisory_xact_lock" in statement:
            begun.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    submit(database, "a", *(jobs([number], group=f"{number}.onnx") for number in range(500)), jobs(range(500, 600)))
    assert len(begun) < 10
    drain(database, worker, failed("time"))
    assert control.retry(database, "a") == 600
    drain(database, worker)
    event.remove(database.engine, "before_cursor_execute", note)
    assert recount(database, "a") == (600, 0, 0)
    audit_at_rest(database)

    assert any("ORDER BY s.start LIMIT 1" in statement for statement in statements)
    if not database.sqlite:
        return  # with so few rows PostgreSQL scans, and rightly so
    with database.read() as connection:
        for statement, parameters in statements.items():
            steps = [row[3] for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, parameters)]
            # What waits for its needs has an index of its own, read in full.
            bad = [
                step
                for step in steps
                if (step.startswith(("SCAN s", "SCAN segment")) and not step.endswith("USING INDEX segment_waiting"))
                or "TEMP B-TREE" in step
            ]
            assert not bad, f"{statement}: {steps}"
            for condition, index in ((dispatching.FRESH, "segment_fresh"), (dispatching.LEFT, "segment_left")):
                if condition in statement:
                    assert any(f"INDEX {index} " in step for step in steps), f"{statement}: {steps}"


def test_segments_in_number_whose_jobs_ended_before_are_counted_in_a_few_statements(
    database: Database, worker: int
) -> None:
    """All others wait while a batch opens."""
    submit(database, "a", jobs(range(300)))
    drain(database, worker, lambda task: failed("numerical")(task) if number_of(task) % 3 == 0 else done(task))
    statements: list[str] = []

    def note(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    ended = (jobs([number], group=f"{number}.onnx") for number in range(200))
    partly = (jobs([number, 1000 + number], group=f"{number}.onnx") for number in range(200, 300))
    submit(database, "b", *ended, *partly)
    event.remove(database.engine, "before_cursor_execute", note)
    assert len(statements) < 40, statements
    assert recount(database, "b") == (200, 0, 100)
    audit(database)
    assert len(drain(database, worker)) == 100
    audit_at_rest(database)


def test_a_retry_lets_exactly_the_segments_wait_that_need_or_hold_a_retried_job(
    database: Database, worker: int
) -> None:
    submit(
        database,
        "a",
        builder("r", "q"),
        jobs([1], recipes=("r",)),
        jobs([2, 3], recipes=("q",)),
        jobs([4]),
        jobs([5, 6], recipes=("q",)),
    )
    drain(database, worker)
    job = {number: place for place, number in enumerate((None, None, None, 1, 2, 3, 4, 5, 6)) if number}

    def waiting_after(*retried: int) -> list[int]:
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE segment SET waiting = 0")
            forget_records(connection, retried)
            found = connection.exec_driver_sql("SELECT start FROM segment WHERE waiting = 1 ORDER BY start")
            return [row[0] for row in found]

    assert waiting_after(job[3]) == [3]
    assert waiting_after(job[4]) == []
    assert waiting_after(job[1], job[6]) == [2, 6]
    assert waiting_after(1) == [2]
    assert waiting_after(2) == [3, 6]


def test_two_names_share_the_rows_of_their_common_jobs(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(10)))
    other = submit(database, "b", jobs(range(5, 15)))

    assert (other.new, other.known) == (5, 5)
    assert rows(database, "SELECT count(*) FROM job") == [(15,)]
    assert len(drain(database, worker)) == 15
    audit_at_rest(database)
    assert {seen.state for seen in reading.batches(database)} == {"finished"}


def test_two_processes_that_submit_one_batch_at_once_make_one(database: Database, tmp_path: Path) -> None:
    script = """
from pathlib import Path
database = Database(sys.argv[1])
Path(sys.argv[2]).touch()
import time
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
outcome = submit(database, "bulk", jobs(range(20_000)))
print(outcome.already, outcome.new)
"""
    url = database.url.render_as_string(hide_password=False)
    ready, start = [tmp_path / "ready-0", tmp_path / "ready-1"], tmp_path / "go"
    processes = [in_process(script, url, str(flag), str(start)) for flag in ready]
    deadline = time.monotonic() + 60
    while not all(flag.exists() for flag in ready):
        assert time.monotonic() < deadline, "the submitters did not start"
        time.sleep(0.01)
    start.touch()
    said = sorted(process.communicate(timeout=120)[0].split() for process in processes)

    assert [process.returncode for process in processes] == [0, 0]
    assert [words[0] for words in said] == ["False", "True"]
    assert rows(database, "SELECT name, state, size FROM batch") == [("bulk", "open", 20_000)]
    assert rows(database, "SELECT count(*), count(DISTINCT job_id) FROM membership") == [(20_000, 20_000)]
    assert rows(database, "SELECT count(*), count(DISTINCT key) FROM job") == [(20_000, 20_000)]
    assert rows(database, "SELECT count(*) FROM job j JOIN job_key k ON k.job_id = j.id AND k.key = j.key") == [
        (20_000,)
    ]
    audit(database)


@pytest.mark.parametrize("point", ["submit.arriving", "submit.opened"])
def test_a_submission_killed_at_a_crash_point_is_all_or_nothing(database: Database, worker: int, point: str) -> None:
    url = database.url.render_as_string(hide_password=False)
    process = in_process(
        "submit(Database(sys.argv[1]), 'a', jobs(range(30)))\nprint('returned')", url, NETASSAY_CRASH_AT=point
    )
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == -9

    visible = [(seen.name, seen.size) for seen in reading.batches(database)]
    assert visible == ([] if point == "submit.arriving" else [("a", 30)])
    assert bool(publish(database)) is (point == "submit.opened")

    again = submit(database, "a", jobs(range(30)))
    assert (again.already, again.new, again.known) == (point == "submit.opened", 0, 30)
    with database.write() as connection:
        dispatching.new_incarnation(connection)  # forget the publication above
    assert len(drain(database, worker)) == 30
    audit_at_rest(database)


def test_a_submission_that_breaks_off_anywhere_leaves_nothing_visible_and_can_be_repeated(
    database: Database, worker: int
) -> None:
    class Cut(Exception):
        pass

    stages: list[float] = []
    submission.submit(database, "whole", [jobs(range(40))], {}, progress=stages.append)
    assert len(stages) >= 4
    drain(database, worker)
    for stage in range(len(stages)):
        mine = jobs(range(100 * stage + 100, 100 * stage + 140))
        for append, name in ((False, f"a{stage}"), (True, "whole")):
            before, calls = reading.batches(database), itertools.count()

            def cut(_: float, calls: Iterator[int] = calls, stage: int = stage) -> None:
                if next(calls) == stage:
                    raise Cut

            with pytest.raises(Cut):
                submission.submit(database, name, [mine], {}, progress=cut, append=append)
            assert reading.batches(database) == before
            assert publish(database) == []
        submit(database, f"a{stage}", mine)
        assert len(drain(database, worker)) == 40
        audit_at_rest(database)
    jobs_there = 40 * (1 + len(stages))
    assert rows(database, "SELECT count(*), count(DISTINCT job_id) FROM job_key") == [(jobs_there, jobs_there)]


def test_the_names_of_new_artifacts_are_synced_with_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(artifacts, "_sync", lambda folder: synced.append(folder))
    folder = tmp_path / "artifacts"
    store = artifacts.Artifacts(folder)
    digest = store.put(b"one")
    assert synced == [tmp_path, folder / digest[:2], folder]
    (folder / digest[:2] / digest).unlink()
    store.put(b"one")
    assert synced[3:] == [folder / digest[:2]], "neither folder was new"


def test_jobs_that_ended_before_are_counted_at_submission_and_not_sent_around(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(10)))
    drain(database, worker)

    submit(database, "b", jobs(range(10)))
    submit(database, "c", jobs(range(5, 13)))

    assert reading.progress(database, "b").state == "finished"
    assert recount(database, "c") == (5, 0, 0)
    assert reading.progress(database, "c").done == 5
    audit(database)
    messages = publish(database)
    claims = [claim_of(database, worker, message.chunk_id) for message in messages]
    assert sorted(number_of(task) for claim in claims for task in claim.tasks) == [10, 11, 12]


def test_a_submission_is_synced_to_disk_before_it_returns(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite in WAL mode survives a power cut only from the last commit under synchronous = FULL (2), PostgreSQL from
    the last with synchronous_commit = on."""
    levels: list[tuple[str, int | str]] = []
    ask, quick, synced = ("PRAGMA synchronous", 1, 2) if database.sqlite else ("SHOW synchronous_commit", "off", "on")

    def watch(connection: Connection) -> None:
        states = connection.execute(text("SELECT state FROM batch")).scalars()
        levels.append((",".join(states), connection.execute(text(ask)).scalar_one()))

    event.listen(database.engine, "commit", watch)
    submit(database, "a", jobs(range(3)))

    # On PostgreSQL all steps before it, too: the submission goes on from them through a crash of the server.
    assert {level for state, level in levels if state != "open"} == {quick if database.sqlite else synced}
    assert levels[-1] == ("open", synced)
    with database.write():
        pass
    assert levels[-1] == ("open", quick)


# Caching


@pytest.mark.parametrize("cause", CAUSES)
def test_a_new_submission_reruns_exactly_the_failures_that_may_pass(
    database: Database, worker: int, cause: str
) -> None:
    submit(database, "a", jobs(range(6)))
    drain(database, worker, lambda task: failed(cause)(task) if number_of(task) < 4 else done(task))
    assert recount(database, "a") == (2, 0, 4)

    again = submit(database, "b", jobs(range(6)))

    kept = cause in DETERMINISTIC
    assert again.rerun == (0 if kept else 4)
    audit(database)
    assert reading.progress(database, "b").failed == (4 if kept else 0)
    # The other batch that holds these jobs counts them as open again, too.
    assert reading.progress(database, "a").state == ("finished" if kept else "open")
    assert len(drain(database, worker)) == (0 if kept else 4)
    assert recount(database, "a") == recount(database, "b") == ((2, 0, 4) if kept else (6, 0, 0))
    audit_at_rest(database)


def test_done_and_not_applicable_are_never_run_again(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(4)))
    drain(
        database,
        worker,
        lambda task: Outcome(task.id, "not_applicable", message="no inputs") if number_of(task) == 3 else done(task),
    )

    assert submit(database, "b", jobs(range(4))).rerun == 0
    assert control.retry(database, "a") == 0
    assert drain(database, worker) == []
    assert recount(database, "b") == (3, 1, 0)
    audit_at_rest(database)


# Claims, tokens, what two batches share


def test_of_many_threads_that_claim_one_chunk_one_wins(database: Database) -> None:
    submit(database, "a", jobs(range(60), seconds=0.5))
    claimants = [sign_on(database, f"w{place}") for place in range(4)]
    for message in publish(database)[:6]:
        won: list[Claim | None] = []
        together = threading.Barrier(len(claimants))

        def race(worker: int, chunk: int = message.chunk_id, gate: threading.Barrier = together) -> None:
            gate.wait()
            won.append(running.claim(database, worker, chunk))  # noqa: B023

        threads = [threading.Thread(target=race, args=(worker,)) for worker in claimants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim is not None for claim in won) == 1
        assert len(won) == len(claimants)
    audit(database)


def test_a_doubled_message_and_one_of_a_finished_chunk_find_nothing_to_do(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(3)))
    claim = take(database, worker)

    assert running.claim(database, worker, claim.chunk_id) is None
    finish(database, worker, claim)
    assert running.claim(database, worker, claim.chunk_id) is None
    assert running.claim(database, worker, 10**6) is None
    audit(database)


def test_a_job_of_two_batches_runs_once_at_a_time_and_counts_in_both(database: Database) -> None:
    first, second = sign_on(database, "w1"), sign_on(database, "w2")
    submit(database, "a", jobs(range(8), seconds=0.001))
    submit(database, "b", jobs(range(4, 12), seconds=0.001))
    messages = publish(database)
    of_a = [message for message in messages if message.label.startswith("a ")]
    of_b = [message for message in messages if message.label.startswith("b ")]
    held = [claim_of(database, first, message.chunk_id) for message in of_a]

    # Meanwhile b runs: it gets only what a does not run, and the rest of its range waits, blocked.
    got = []
    for message in of_b:
        claim = claim_of(database, second, message.chunk_id)
        got += [number_of(task) for task in claim.tasks]
        finish(database, second, claim)
    assert sorted(got) == [8, 9, 10, 11]
    audit(database)
    assert jobs_in(database, "blocked") == 4
    with database.write() as connection:
        assert dispatching.unblock(connection) == 0  # they still run

    for claim in held:
        finish(database, first, claim)
    with database.write() as connection:
        assert dispatching.unblock(connection) > 0
    assert drain(database, second) == []  # only counted
    assert recount(database, "a") == recount(database, "b") == (8, 0, 0)
    audit_at_rest(database)


def test_what_a_worker_does_not_return_goes_back_and_runs_later(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(21), seconds=0.1))
    drained = take(database, worker)
    finish(database, worker, drained)  # the first job, alone
    claim = take(database, worker)
    assert len(claim.tasks) == 20

    kept = [task for task in claim.tasks if number_of(task) % 3 == 0]
    running.finish(database, worker, claim, [done(task) for task in kept])

    audit(database)
    assert recount(database, "a") == (1 + len(kept), 0, 0)
    assert len(drain(database, worker)) == 20 - len(kept)
    audit_at_rest(database)


def test_a_late_writer_changes_nothing(database: Database) -> None:
    slow, quick = sign_on(database, "slow"), sign_on(database, "quick")
    submit(database, "a", jobs([1]))
    stale = take(database, slow)
    assert dispatching.reclaim(database, slow, counter=1) == 1  # its claim was its first sign of life
    before = drain(database, quick)
    state = rows(database, "SELECT * FROM record"), rows(database, "SELECT * FROM chunk")

    task = stale.tasks[0]
    with pytest.raises(StaleToken):
        running.finish(database, slow, stale, [Outcome(task.id, "failed", "error", "late")], seconds_a_job=9.0)
    with pytest.raises(StaleToken):
        running.report_death(database, slow, stale, Death((task.id,), 0.0, 1.0, "crash", "late", ""))

    assert before == [task.id]
    assert state == (rows(database, "SELECT * FROM record"), rows(database, "SELECT * FROM chunk"))
    assert rows(database, "SELECT count(*) FROM attempt") == [(0,)]
    audit_at_rest(database)


LATE_WRITER = """
from netassay.store import reading
database = Database(sys.argv[1])
slow, quick = sign_on(database, "slow"), sign_on(database, "quick")
submit(database, "a", jobs([1]))
stale = take(database, slow)
dispatching.reclaim(database, slow, counter=1)
drain(database, quick)
try:
    running.finish(database, slow, stale, [Outcome(stale.tasks[0].id, "failed", "error", "late")])
except running.StaleToken:
    print("refused", end=" ")
print(next(reading.records(database, "a")).state)
"""


@pytest.mark.parametrize(("without", "said"), [("", "refused done"), ("fence", "failed")])
def test_it_is_the_fence_that_stops_a_late_writer(database: Database, without: str, said: str) -> None:
    url = database.url.render_as_string(hide_password=False)
    process = in_process(LATE_WRITER, url, NETASSAY_WITHOUT=without)
    assert process.communicate(timeout=60)[0].strip() == said


def test_a_worker_that_was_given_up_gets_no_more_chunks(database: Database) -> None:
    # Nobody watches it any longer, so what it took now would never be taken back.
    worker = sign_on(database)
    submit(database, "a", jobs(range(3)))
    take(database, worker)
    dispatching.reclaim(database, worker, counter=1)
    messages = publish(database)

    assert [running.claim(database, worker, message.chunk_id) for message in messages] == [None] * len(messages)
    assert running.renew(database, worker, {}).lost
    assert len(drain(database, sign_on(database, "next"))) == 3
    audit_at_rest(database)


def test_a_worker_that_signs_off_gives_back_what_it_holds(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(3)))
    claim = take(database, worker)

    running.sign_off(database, worker)

    audit(database)
    assert [seen.state for seen in reading.workers(database, ("alive", "stopped"))] == ["stopped"]
    with pytest.raises(StaleToken):
        finish(database, worker, claim)
    assert len(drain(database, sign_on(database))) == 3
    audit_at_rest(database)


# Retry


def test_retry_by_cause_reaches_the_overlapping_batch(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(10)))
    submit(database, "b", jobs(range(5, 15)))
    ends = {4: "time", 6: "time", 7: "memory", 12: "time", 8: "invalid_input"}
    drain(database, worker, lambda t: failed(ends[number_of(t)])(t) if number_of(t) in ends else done(t))
    assert (recount(database, "a"), recount(database, "b")) == ((6, 0, 4), (6, 0, 4))
    audit_at_rest(database)

    assert control.retry(database, "a", "time") == 2  # 4 and 6

    audit(database)
    assert reading.progress(database, "a").failed == 2
    assert reading.progress(database, "b").failed == 3  # 6 runs again there as well, 12 does not
    assert {reading.progress(database, name).state for name in "ab"} == {"open"}
    assert len(drain(database, worker)) == 2
    assert (recount(database, "a"), recount(database, "b")) == ((8, 0, 2), (7, 0, 3))
    assert control.retry(database, "a") == 2
    drain(database, worker)
    assert recount(database, "a") == (10, 0, 0)
    audit_at_rest(database)


def test_a_retry_leaves_alone_what_a_batch_has_not_counted_yet(database: Database) -> None:
    """b gave the end of its range back; there, a failure is known by a's record only, and a retries it."""
    first, second = sign_on(database, "w1"), sign_on(database, "w2")
    submit(database, "a", jobs([3]))
    submit(database, "b", jobs(range(5), seconds=0.001))
    (of_a, *of_b) = publish(database)
    drained = [claim_of(database, second, message.chunk_id) for message in of_b]
    for claim in drained:
        running.finish(database, second, claim, [done(task) for task in claim.tasks if number_of(task) < 3])
    finish(database, first, claim_of(database, first, of_a.chunk_id), failed("time"))
    audit(database)
    assert reading.progress(database, "b").ended == 3

    assert control.retry(database, "a") == 1

    audit(database)
    assert reading.progress(database, "b").ended == 3
    drain(database, first)
    assert recount(database, "b") == (5, 0, 0)
    audit_at_rest(database)


def test_a_retry_of_many_failures_in_many_chunks_is_quick(database: Database, worker: int) -> None:
    # 8,000 chunks over one batch: finding who counted a job must not look at all of them for each job.
    count = 8_000
    submit(database, "a", jobs(range(count)))
    ids = [job for (job,) in rows(database, "SELECT id FROM job ORDER BY id")]
    with database.write() as connection:
        connection.execute(text("UPDATE segment SET next = stop"))
        database.insert(
            connection,
            "chunk",
            ("segment_id", "batch_id", "start", "stop", "state", "failed"),
            [(1, 1, place, place + 1, "finished", 1) for place in range(count)],
        )
        database.insert(
            connection,
            "record",
            ("job_id", "state", "cause", "finished_at"),
            [(i, "failed", "time", 0.0) for i in ids],
        )
    audit_at_rest(database)
    began = time.process_time()
    assert control.retry(database, "a") == count
    assert time.process_time() - began < 3.0  # 0.4 s; with a look at every chunk for every job, 8 s
    audit(database)
    assert reading.progress(database, "a").ended == 0


def test_attempts_before_a_retry_no_longer_count_against_the_job(database: Database, worker: int) -> None:
    submit(database, "a", jobs([7]))
    for expected in range(3):
        claim = take(database, worker)
        assert (claim.tasks[0].deaths, claim.tasks[0].suspect) == (expected, expected > 0)
        running.report_death(
            database, worker, claim, Death((claim.tasks[0].id,), 1.0, 2.0, "crash", "signal 11", "boom")
        )
        if expected < 2:
            running.finish(database, worker, claim, [])
    finish(database, worker, claim, failed("crash"))

    control.retry(database, "a")

    claim = take(database, worker)
    assert (claim.tasks[0].deaths, claim.tasks[0].suspect) == (0, False)
    finish(database, worker, claim)
    (record,) = reading.records(database, "a")
    assert (record.state, record.attempts) == ("done", 3)  # kept for people to read
    seen = reading.attempts(database, record.key)
    assert [(a.cause, a.alone, a.message, a.log, a.worker) for a in seen] == 3 * [
        ("crash", True, "signal 11", "boom", "worker")
    ]
    audit_at_rest(database)


# Pause, resume, cancel


def test_a_paused_batch_starts_nothing_until_it_is_resumed(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(5)))
    messages = publish(database)

    assert control.pause(database, "a")
    assert not control.pause(database, "a")  # it was not open
    assert [running.claim(database, worker, message.chunk_id) for message in messages] == [None] * len(messages)
    assert publish(database) == []
    audit(database)

    assert control.resume(database, "a")
    assert len(drain(database, worker)) == 5
    assert not control.resume(database, "a")
    audit_at_rest(database)


def test_a_cancelled_batch_is_over_and_the_same_submission_opens_it_again(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(5)))
    finish(database, worker, take(database, worker))
    assert control.cancel(database, "a")

    assert drain(database, worker) == []
    assert reading.progress(database, "a").over
    assert submit(database, "a", jobs(range(5))).reopened
    assert len(drain(database, worker)) == 4
    assert not control.cancel(database, "a")  # finished
    audit_at_rest(database)


def test_running_jobs_hear_of_a_pause_or_cancel_unless_another_open_batch_wants_them(
    database: Database, worker: int
) -> None:
    submit(database, "a", jobs([1]))
    submit(database, "b", jobs([1, 2]))
    claim = take(database, worker)

    def asked() -> tuple[bool, bool]:
        renewal = running.renew(database, worker, {claim.chunk_id: [claim.tasks[0].id]})
        return claim.chunk_id in renewal.cancelled, claim.chunk_id in renewal.paused

    assert asked() == (False, False)
    control.cancel(database, "a")
    assert asked() == (False, True)  # b holds job 1: it comes to its end
    control.cancel(database, "b")
    assert asked() == (True, False)
    control.resume(database, "a")
    control.pause(database, "a")
    assert asked() == (False, True)


def test_of_a_cancelled_batch_only_the_job_that_another_wants_comes_to_its_end(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(4)))
    finish(database, worker, take(database, worker))
    submit(database, "b", jobs([2]))
    claim = take(database, worker)
    assert [number_of(task) for task in claim.tasks] == [1, 2, 3]
    one, two, _ = (task.id for task in claim.tasks)
    control.cancel(database, "a")
    assert running.renew(database, worker, {claim.chunk_id: [one]}).cancelled == {claim.chunk_id}
    assert running.renew(database, worker, {claim.chunk_id: [one, two]}).paused == {claim.chunk_id}
    running.finish(database, worker, claim, [])
    assert drain(database, worker) == [two]
    assert submit(database, "a", jobs(range(4))).reopened
    assert len(drain(database, worker)) == 2
    audit_at_rest(database)


def test_an_unknown_batch_is_named_with_the_newest_ones(database: Database) -> None:
    with pytest.raises(control.NoSuchBatch, match="none was submitted yet"):
        control.pause(database, "x")
    submit(database, "a", jobs([1]))
    submit(database, "b", jobs([2]))
    with pytest.raises(control.NoSuchBatch, match="'x'; the newest are: b, a"):
        reading.progress(database, "x")


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e4, float("nan")])
def test_a_weight_out_of_range_is_refused(database: Database, weight: float) -> None:
    submit(database, "a", jobs([1]))
    with pytest.raises(StoreError, match=r"outside 0\.001\.\.1000"):
        control.set_weight(database, "a", weight)


@pytest.mark.parametrize("weight", [0, -1, 1e4, float("inf"), float("nan"), True, "2"])
def test_a_submission_with_a_weight_that_would_stop_the_dispatcher_stores_nothing(
    database: Database, weight: Any
) -> None:
    with pytest.raises(StoreError, match=r"outside 0\.001\.\.1000"):
        submit(database, "a", jobs([1]), weight=weight)
    assert rows(database, "SELECT id FROM batch") == rows(database, "SELECT id FROM job") == []


def test_a_weight_is_stored_as_the_number_it_is(database: Database) -> None:
    submit(database, "a", jobs([1]), weight=np.float32(2.5))
    assert rows(database, "SELECT weight FROM batch") == [(2.5,)]
    control.set_weight(database, "a", np.int64(3))
    assert rows(database, "SELECT weight FROM batch") == [(3.0,)]


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "the name is empty"),
        ("a\0b", r"the name holds '\x00', which cannot be printed"),
        ("a\nb", r"the name holds '\n', which cannot be printed"),
        ("\x1b[2J", r"the name holds '\x1b', which cannot be printed"),
        ("half \ud83d", r"the name holds '\ud83d', which cannot be printed"),
        (" a", "the name begins or ends with a space"),
        ("--append", "a batch cannot be called '--append': the name begins with a dash"),
        ("a" * 201, "the name has 201 characters, at most 200 are possible"),
        (3, "the name is no text"),
    ],
)
def test_a_name_that_nobody_could_type_is_refused(database: Database, name: Any, words: str) -> None:
    with pytest.raises(StoreError, match=re.escape(words)):
        submit(database, name, jobs([1]))
    assert rows(database, "SELECT id FROM batch") == rows(database, "SELECT id FROM job") == []


@pytest.mark.parametrize("name", ["a", "two words", "größe-Ω", "数字", "a/b", "it's", "a" * 200, "🙂"])
def test_other_names_are_fine(database: Database, name: str) -> None:
    submit(database, name, jobs([1]))
    assert reading.progress(database, name).size == 1


@pytest.mark.parametrize(
    "note, words",
    [
        ("a\0b", r"the note holds '\x00'"),
        ("\udc80", r"the note holds '\udc80'"),
        ("\x1b[2J", r"the note holds '\x1b'"),
        ("a" * 10_001, "the note has 10,001 characters, at most 10,000"),
        (3, "the note is no text but int"),
    ],
)
def test_a_note_that_no_database_keeps_is_refused(database: Database, note: Any, words: str) -> None:
    with pytest.raises(StoreError, match=re.escape(words)):
        submit(database, "a", jobs([1]), note=note)
    submit(database, "a", jobs([1]), note="two lines,\n\tone moved in")
    with pytest.raises(StoreError, match=re.escape(words)):
        submit(database, "a", jobs([2]), note=note, append=True)
    assert rows(database, "SELECT size, note FROM batch") == [(1, "two lines,\n\tone moved in")]


def run_until(database: Database, worker: int, ended: int, cause: object) -> None:
    while reading.batches(database)[0].ended < ended:
        claim = take(database, worker)
        finish(database, worker, claim, lambda task: failed(cause(number_of(task)))(task))  # type: ignore[operator]


def test_a_batch_whose_first_twenty_jobs_fail_alike_pauses_itself_once(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(40), seconds=2.0))
    run_until(database, worker, 19, lambda number: "error")
    assert dispatching.pause_hopeless(database) == []
    run_until(database, worker, 20, lambda number: "error")

    (said,) = dispatching.pause_hopeless(database)

    assert "batch a paused itself: its first 20 jobs all failed with cause error" in said
    seen = reading.progress(database, "a")
    assert seen.state == "paused"
    assert seen.reason in said
    control.resume(database, "a")
    assert reading.progress(database, "a").reason == ""
    run_until(database, worker, 39, lambda number: "error")
    assert dispatching.pause_hopeless(database) == []
    assert reading.progress(database, "a").state == "open"


def test_mixed_causes_or_one_success_do_not_pause(database: Database, worker: int) -> None:
    submit(database, "mixed", jobs(range(40), seconds=2.0))
    run_until(database, worker, 25, lambda number: "error" if number else "time")
    assert dispatching.pause_hopeless(database) == []
    run_until(database, worker, 39, lambda number: "error")
    assert dispatching.pause_hopeless(database) == []


def test_failures_of_before_the_submission_do_not_pause_a_batch(database: Database, worker: int) -> None:
    submit(database, "old", jobs(range(30), seconds=2.0))
    drain(database, worker, failed("invalid_input"))
    submit(database, "new", jobs(range(80), seconds=2.0))
    assert dispatching.pause_hopeless(database) == []
    run_until(database, worker, 30 + 19, lambda number: "invalid_input")
    assert dispatching.pause_hopeless(database) == []
    assert rows(database, "SELECT judged FROM batch WHERE name = 'new'") == [(0,)]
    run_until(database, worker, 30 + 20, lambda number: "invalid_input")
    assert len(dispatching.pause_hopeless(database)) == 1
    assert reading.progress(database, "new").state == "paused"


def test_networks_that_are_built_neither_save_nor_doom_a_batch(database: Database, worker: int) -> None:
    recipes = [f"r{number}" for number in range(30)]
    submit(database, "built", builder(*recipes), jobs(range(60), seconds=2.0))
    while rows(database, "SELECT count(*) FROM record") < [(30 + 19,)]:
        finish(
            database, worker, take(database, worker), lambda t: done(t) if "recipe" in t.params else failed("error")(t)
        )
    assert dispatching.pause_hopeless(database) == []
    finish(database, worker, take(database, worker), failed("error"))
    assert len(dispatching.pause_hopeless(database)) == 1

    submit(database, "unbuilt", builder(*(f"q{number}" for number in range(30))), jobs(range(100, 140), seconds=2.0))
    while rows(database, "SELECT count(*) FROM record") < [(50 + 30,)]:
        finish(database, worker, take(database, worker), failed("time"))
    assert dispatching.pause_hopeless(database) == []
    assert rows(database, "SELECT judged FROM batch WHERE name = 'unbuilt'") == [(0,)]


def test_a_batch_that_has_ended_altogether_is_finished_rather_than_paused(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(30), seconds=0.01))
    messages = publish(database)
    for message in messages:
        finish(database, worker, claim_of(database, worker, message.chunk_id), failed("error"))
    assert dispatching.pause_hopeless(database) == []
    dispatching.finish_batches(database)
    assert rows(database, "SELECT state FROM batch") == [("finished",)]


# Needs

R1, R2 = "recipe:" + "1" * 64, "recipe:" + "2" * 64


def test_jobs_whose_network_cannot_be_built_fail_in_slices(
    database: Database, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "_SLICE", 10)
    submit(database, "a", builder("r", "q"), jobs(range(95), recipes=("r",)), jobs(range(95, 98), recipes=("q",)),
           *(jobs([number], recipes=("q",), group=str(number)) for number in range(98, 110)))  # fmt: skip
    ends = iter((failed("memory"), failed("memory")))
    begun = []
    event.listen(database.engine, "begin", begun.append)
    drain(database, worker, lambda task: next(ends)(task))
    assert len(begun) > 12, "each slice is a transaction of its own"
    assert recount(database, "a") == (0, 0, 112)
    audit_at_rest(database)
    assert rows(database, "SELECT cause, count(*) FROM record GROUP BY 1 ORDER BY 1") == [
        ("dependency", 110), ("memory", 2)
    ]  # fmt: skip


def test_a_retry_between_two_slices_leaves_the_rest_to_run(
    database: Database, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "_SLICE", 10)
    submit(database, "a", builder("r"), jobs(range(95), recipes=("r",)))
    claim = take(database, worker)
    finish(database, worker, claim, failed("memory"))
    fail_range = dispatching._fail_range

    def retry_after_the_second(connection: Connection, segment: int, start: int, stop: int) -> None:
        fail_range(connection, segment, start, stop)
        if start > 1:
            forget_records(connection, [claim.tasks[0].id])

    monkeypatch.setattr(dispatching, "_fail_range", retry_after_the_second)
    dispatching.settle_needs(database)
    monkeypatch.setattr(dispatching, "_fail_range", fail_range)
    assert rows(database, "SELECT count(*) FROM record") == [(20,)]
    drain(database, worker)
    assert recount(database, "a") == (76, 0, 20)
    audit_at_rest(database)


def test_jobs_wait_for_the_networks_they_need_and_are_given_them(database: Database, worker: int) -> None:
    submit(database, "a", builder(R1, R2), jobs(range(4), recipes=(R1,)), jobs(range(4, 8), recipes=(R1, R2)))

    messages = publish(database)
    assert all("networks.train" in message.label for message in messages)
    first, second = (claim_of(database, worker, message.chunk_id) for message in messages)
    finish(database, worker, first)
    assert dispatching.settle_needs(database) == 1
    assert dispatching.settle_needs(database) == 0
    assert {message.label.split("/")[-1].strip() for message in publish(database)} == {"2..2", "3..5"}
    finish(database, worker, second)
    assert dispatching.settle_needs(database) == 1
    claim = take(database, worker)
    assert claim.given == {R1: "onnx:built", R2: "onnx:built"}
    finish(database, worker, claim)
    ((inputs,),) = rows(database, "SELECT inputs FROM record WHERE job_id = :id", id=claim.tasks[0].id)
    assert inputs == f'{{"{R1}": "onnx:built", "{R2}": "onnx:built"}}'


def test_a_failed_need_fails_its_dependents_and_a_retry_runs_both_in_order(database: Database, worker: int) -> None:
    submit(database, "a", builder(R1), jobs(range(4), recipes=(R1,)), jobs(range(4, 6)))

    ran = drain(database, worker, lambda task: failed("memory")(task) if "recipe" in task.params else done(task))

    assert len(ran) == 3  # the builder, and the two that need nothing
    assert recount(database, "a") == (2, 0, 5)
    groups = {group.cause: (group.jobs, group.example) for group in reading.failures(database, "a")}
    assert groups["memory"][0] == 1
    assert groups["dependency"][0] == 4
    assert "could not be built" in groups["dependency"][1]
    assert "memory" in groups["dependency"][1]
    audit_at_rest(database)

    assert control.retry(database, "a", "dependency") == 4
    assert drain(database, worker) == []  # the need is still failed
    assert recount(database, "a") == (2, 0, 5)

    assert control.retry(database, "a") == 5
    order = drain(database, worker)
    assert len(order) == 5
    assert order[0] == ran[0], "the builder runs before those that need it"
    assert recount(database, "a") == (7, 0, 0)
    audit_at_rest(database)


def test_a_chunk_on_its_way_is_not_started_while_its_need_is_built_anew(database: Database, worker: int) -> None:
    submit(database, "a", builder(R1), jobs(range(3), recipes=(R1,)))
    finish(database, worker, take(database, worker), failed("time"))
    dispatching.settle_needs(database)
    messages = publish(database)  # of failed jobs, sent around to be counted

    control.retry(database, "a")

    assert [running.claim(database, worker, message.chunk_id) for message in messages] == [None] * len(messages)
    assert len(drain(database, worker)) == 4
    assert recount(database, "a") == (4, 0, 0)
    audit_at_rest(database)


def test_a_need_that_is_retried_while_it_is_looked_at_fails_nobody(
    database: Database, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(database, "a", builder(R1), jobs(range(3), recipes=(R1,)))
    finish(database, worker, take(database, worker), failed("time"))
    write = database.write

    def retried_just_before(durable: bool = False) -> object:
        monkeypatch.setattr(database, "write", write)
        control.retry(database, "a")
        return write(durable)

    monkeypatch.setattr(database, "write", retried_just_before)
    assert dispatching.settle_needs(database) == 0
    assert len(drain(database, worker)) == 4
    assert recount(database, "a") == (4, 0, 0)


# Losses and refusals


def test_worker_losses_count_apart_and_after_three_the_job_is_suspect(database: Database) -> None:
    submit(database, "a", jobs([1]))
    seen = []
    for loss in range(6):
        worker = sign_on(database, f"w{loss}")
        claim = take(database, worker)
        (task,) = claim.tasks
        seen.append((task.deaths, task.suspect))
        running.renew(database, worker, {claim.chunk_id: [task.id]})
        assert dispatching.reclaim(database, worker, counter=2) == 1
    assert seen == [(0, False)] * 3 + [(0, True), (1, True), (2, True)]
    claim = take(database, sign_on(database))
    assert claim.tasks[0].deaths == running.MOST_STARTS
    audit(database)


@pytest.mark.parametrize(("count", "culprit"), [(10, 2), (10, 9), (1, 0), (200, 150)])
def test_a_job_that_kills_its_worker_at_once_is_found_and_costs_no_other(
    database: Database, count: int, culprit: int
) -> None:
    """Nothing is ever reported as running: the worker dies before its first renewal."""
    submit(database, "a", jobs(range(count), seconds=0.005))
    worker, lost, rounds = sign_on(database), 0, 0
    while messages := publish(database, most=1):
        rounds += 1
        assert rounds < 400
        claim = running.claim(database, worker, messages[0].chunk_id)
        assert claim is not None
        audit(database)
        end: dict[int, Outcome] = {}
        for task in claim.tasks:
            if task.deaths >= running.MOST_STARTS:
                end[task.id] = Outcome(task.id, "failed", "crash", "it killed its worker")
            elif number_of(task) != culprit:
                end[task.id] = done(task)
        if len(end) == len(claim.tasks):
            finish(database, worker, claim, lambda task, end=end: end[task.id])  # type: ignore[misc]
            continue
        lost += 1
        ((counter,),) = rows(database, "SELECT counter FROM worker WHERE id = :id", id=worker)
        assert dispatching.reclaim(database, worker, counter) == 1
        worker = sign_on(database)
    dispatching.finish_batches(database)
    audit_at_rest(database)
    assert recount(database, "a") == (count - 1, 0, 1)
    assert rows(
        database, "SELECT j.params, r.cause FROM record r JOIN job j ON j.id = r.job_id WHERE r.state = 'failed'"
    ) == [(f'{{"n":{culprit}}}', "crash")]
    assert rows(database, "SELECT count(*) FROM attempt") == [(running.MOST_STARTS,)], "the others have none"
    halvings = math.ceil(math.log2(count))
    assert lost <= dispatching.LOSSES_SUSPECT + halvings + running.MOST_STARTS


def test_a_group_keeps_the_end_of_its_log_with_each_job_and_a_single_job_all_of_it(
    database: Database, worker: int
) -> None:
    submit(database, "a", jobs(range(20), group_size=20))
    finish(database, worker, take(database, worker))  # the first goes alone
    claim = take(database, worker)
    ids = tuple(task.id for task in claim.tasks)
    log = "".join(f"line {number}\n" for number in range(6000))
    running.report_death(database, worker, claim, Death(ids, 1.0, 2.0, "crash", "signal 11", log))
    running.report_death(database, worker, claim, Death(ids[:1], 2.0, 3.0, "crash", "signal 11", log))
    kept = [text for (text,) in rows(database, "SELECT log FROM attempt ORDER BY id")]
    assert kept == [log[-running.GROUP_LOG :]] * len(ids) + [log]
    assert len(ids) > 1


def test_a_claim_that_loses_the_race_between_look_and_write_takes_nothing(database: Database, worker: int) -> None:
    submit(database, "a", jobs([1]))
    (message,) = publish(database)

    def overtake(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE chunk SET state = 'claimed'"):
            connection.connection.cursor().execute("UPDATE chunk SET state = 'finished'")

    event.listen(database.engine, "before_cursor_execute", overtake)
    assert running.claim(database, worker, message.chunk_id) is None
    assert rows(database, "SELECT state, token FROM chunk") == [("finished", None)]
    assert rows(database, "SELECT count(*) FROM running") == [(0,)]


@contextlib.contextmanager
def just_before(found: Database, beginning: str, action: Callable[[], None]) -> Iterator[None]:
    """`action` once, when the first statement that begins so is about to be executed."""
    done_so = []

    def look(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(beginning) and not done_so:
            done_so.append(statement)
            action()

    event.listen(found.engine, "before_cursor_execute", look)
    yield
    event.remove(found.engine, "before_cursor_execute", look)
    assert done_so, f"no statement began with {beginning}"


@pytest.fixture
def shared_job(tmp_path: Path) -> Iterator[tuple[Database, int, Claim, int]]:
    """On PostgreSQL, where writes overlap: two batches share job 2, which this claim of the first is running. The chunk
    of the second, with jobs 2 and 3, is published."""
    with services.new_store("postgresql", tmp_path) as found:
        worker = sign_on(found)
        submit(found, "a", jobs([1, 2]))
        first, second = (claim_of(found, worker, message.chunk_id) for message in publish(found))
        finish(found, worker, first)
        submit(found, "b", jobs([4, 3, 2]))
        alone, both = publish(found)
        finish(found, worker, claim_of(found, worker, alone.chunk_id))
        yield found, worker, second, both.chunk_id


def test_a_job_that_another_ends_while_it_is_claimed_is_not_run_again(shared_job: Any) -> None:
    found, worker, other, chunk = shared_job

    def let_go() -> None:
        """The end of its hold comes with its record. A claim under way may see the first and not yet the second: it
        looked for records before it waited for the hold to end."""
        with found.write(beside=True) as connection:
            connection.execute(text("DELETE FROM running WHERE chunk_id = :id"), {"id": other.chunk_id})

    with (
        just_before(found, "INSERT INTO running", let_go),
        just_before(found, "DELETE FROM running u USING record", lambda: finish(found, worker, other)),
    ):
        mine = claim_of(found, worker, chunk)
    assert [number_of(task) for task in mine.tasks] == [3]
    finish(found, worker, mine)
    drain(found, worker)
    audit_at_rest(found)


def test_a_job_that_another_ends_while_a_chunk_is_settled_is_counted_once(shared_job: Any) -> None:
    found, worker, other, chunk = shared_job
    mine = claim_of(found, worker, chunk)
    assert all(number_of(task) != 2 for task in mine.tasks)
    with just_before(found, "SELECT m.ordinal, coalesce(r.state", lambda: finish(found, worker, other)):
        finish(found, worker, mine)
    drain(found, worker)
    audit_at_rest(found)


def test_forty_threads_write_at_once(database: Database) -> None:
    """In a process of its own: a connection closed in the hands of another thread ends the process."""
    process = in_process(
        """
import threading
database = Database(sys.argv[1])
gate = threading.Barrier(40)
def write(number):
    gate.wait()
    for _ in range(3):
        with database.write() as connection:
            connection.execute(text("UPDATE lab SET value = value + 1 WHERE name = 'next_job'"))
        with database.read() as connection:
            connection.execute(text("SELECT count(*) FROM lab")).scalar_one()
threads = [threading.Thread(target=write, args=(n,)) for n in range(40)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(rows(database, "SELECT value FROM lab WHERE name = 'next_job'"))
""",
        database.url.render_as_string(hide_password=False),
    )
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.strip() == "[(121,)]"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/x", "in SQLite or PostgreSQL, not in mysql"),
        ("a folder", "no database URL"),
        ("postgres//me:secret@host", "no database URL"),
    ],
)
def test_a_store_of_another_kind_is_refused_in_words(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        Database(url)


def test_a_sqlite_without_returning_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 34, 1))
    with pytest.raises(StoreError, match=r"3\.35\.0 or newer"):
        Database(f"sqlite:///{tmp_path / 'store.sqlite'}").prepare()


def test_a_worker_that_moved_is_not_taken_for_lost(database: Database, worker: int) -> None:
    submit(database, "a", jobs([1]))
    claim = take(database, worker)
    running.renew(database, worker, {})
    assert dispatching.reclaim(database, worker, counter=1) is None
    finish(database, worker, claim)
    assert recount(database, "a") == (1, 0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        Outcome(0, None, message="no state"),  # type: ignore[arg-type]
        Outcome(0, "done", result="\ud800"),
    ],
    ids=["a null", "a lone surrogate"],
)
def test_a_row_that_the_database_refuses_fails_alone(database: Database, worker: int, bad: Outcome) -> None:
    _one_row_is_refused(database, worker, bad)


def test_a_row_that_only_this_database_refuses_fails_alone(database: Database, worker: int) -> None:
    result: Any = 2**70 if database.sqlite else "a NUL: \x00"
    _one_row_is_refused(database, worker, Outcome(0, "done", result=result))


def _one_row_is_refused(database: Database, worker: int, bad: Outcome) -> None:
    submit(database, "a", jobs(range(9), seconds=0.1))
    finish(database, worker, take(database, worker))
    claim = take(database, worker)
    assert len(claim.tasks) > 3

    def end(task: Task) -> Outcome:
        return (
            Outcome(task.id, bad.state, result=bad.result, message=bad.message) if number_of(task) == 3 else done(task)
        )

    finish(database, worker, claim, end)
    drain(database, worker)

    assert [record.cause for record in reading.records(database, "a")] == ["", "", "", "unstorable", *[""] * 5]
    assert recount(database, "a") == (8, 0, 1)
    audit_at_rest(database)


# Reading


def test_records_come_in_order_page_by_page_with_their_provenance(
    database: Database, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAGE", 7)
    submission.submit(database, "a", [jobs(range(21, 0, -1), seconds=1.0)], {"onnx:1": "f.onnx"})
    about = running.provenance_id(database, "digest", '{"python":"3.11"}')
    assert running.provenance_id(database, "digest", '{"python":"3.11"}') == about
    claim = take(database, worker)
    running.finish(database, worker, claim, [Outcome(claim.tasks[0].id, "done", result='{"x":{"float":"nan"}}')], about)
    take(database, worker)

    found = list(reading.records(database, "a"))

    assert [record.params["n"] for record in found] == list(range(21, 0, -1))
    assert [record.state for record in found] == ["done", "running", "running", *["pending"] * 18]
    assert found[0].provenance == {"python": "3.11"}
    assert found[0].result is not None
    assert str(found[0].result["x"]) == "nan"
    assert found[0].names == {"onnx:1": "f.onnx"}
    assert found[1].provenance == {}
    seen = reading.progress(database, "a")
    assert (seen.ended, seen.running, seen.waiting) == (1, 2, 18)


def test_failures_are_grouped_by_cause_the_most_frequent_first(database: Database, worker: int) -> None:
    submit(database, "a", jobs(range(6)))
    drain(database, worker, lambda task: failed("time" if number_of(task) == 2 else "memory")(task))
    groups = reading.failures(database, "a")
    assert [(group.cause, group.jobs) for group in groups] == [("memory", 5), ("time", 1)]
    assert groups[1].example == 'time in {"n":2}'
    assert groups[1].example_key == list(reading.records(database, "a"))[2].key


def test_a_key_may_be_shortened_until_it_is_ambiguous(database: Database) -> None:
    submit(database, "a", jobs(range(300)))  # 300 keys on 256 first bytes: two share theirs
    keys = sorted(record.key for record in reading.records(database, "a"))
    twins = next(one[:2] for one, other in itertools.pairwise(keys) if one[:2] == other[:2])

    assert reading.attempts(database, keys[0]) == []
    assert reading.attempts(database, keys[0][:31]) == []  # an odd number of digits
    with pytest.raises(LookupError, match="several jobs' keys start with"):
        reading.attempts(database, twins)
    absent = next(f"{n:032x}" for n in range(1, 9) if f"{n:032x}" not in keys)
    with pytest.raises(LookupError, match="no job's key starts with"):
        reading.attempts(database, absent)
    with pytest.raises(LookupError, match="not the beginning of a job's key"):
        reading.attempts(database, "xyz")


# Schema


def schema(database: Database) -> dict[str, list[str]]:
    with database.read() as connection:
        seen = inspect(connection)
        return {name: [column["name"] for column in seen.get_columns(name)] for name in seen.get_table_names()}


def test_a_fresh_store_has_exactly_the_tables_of_the_metadata(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        found = {name for name in inspect(connection).get_table_names() if name != "sqlite_sequence"}
        assert found == {*tables.metadata.tables, "alembic_version"}
    database.prepare()
    assert rows(database, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]


def test_a_store_of_the_first_schema_is_upgraded_and_keeps_its_batches(store: str, tmp_path: Path) -> None:
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from netassay.store.migrations import config

    with services.empty_database(store, tmp_path) as url:
        database = Database(url)
        command.upgrade(config(database), "0001")
        with database.write() as connection:
            connection.execute(
                text(
                    "INSERT INTO batch (name, digest, state, size, submitted_at)"
                    " VALUES ('old', :digest, 'finished', 0, 0)"
                ),
                {"digest": b"0" * 16},
            )
        database.prepare()
        with database.read() as connection:
            found = compare_metadata(MigrationContext.configure(connection), tables.metadata)
        # Comments, which PostgreSQL keeps, are for people who look at the newest tables.
        steps = [step[0] if isinstance(step, list) else step for step in found]
        assert [step for step in steps if not step[0].endswith("_comment")] == []
        assert rows(database, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
        assert rows(database, "SELECT name, note FROM batch") == [("old", "")]
        assert dispatching.key_prefix(database).startswith("netassay:")
        submit(database, "a", jobs(range(3)))
        assert len(drain(database, sign_on(database))) == 3
        audit_at_rest(database)
        database.dispose()


def test_a_store_of_a_newer_program_is_refused_and_left_alone(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = schema(database)
    with pytest.raises(StoreError, match=f"schema 9999, this program knows up to {SCHEMA}.*upgrade this installation"):
        database.prepare()
    assert schema(database) == before


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"a letter, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"store\.sqlite is not a SQLite database"):
        Database(f"sqlite:///{path}").prepare()
    assert path.read_bytes() == b"a letter, not a database\n" * 100


def test_many_may_prepare_one_store_at_once(store: str, tmp_path: Path) -> None:
    faults: list[BaseException] = []
    gate = threading.Barrier(8)

    def prepare(url: str) -> None:
        gate.wait()
        try:
            database = Database(url)
            database.prepare()
            database.dispose()
        except BaseException as error:
            faults.append(error)

    with services.empty_database(store, tmp_path) as url:
        threads = [threading.Thread(target=prepare, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        database = Database(url)
        assert rows(database, "SELECT count(*) FROM lab") == [(5,)]
        database.dispose()


def test_scattered_jobs_that_ended_before_do_not_cut_a_batch_into_single_jobs(database: Database, worker: int) -> None:
    submit(database, "first", jobs(range(0, 400, 2)))
    drain(database, worker)
    submit(database, "second", jobs(range(400)))
    assert rows(database, "SELECT count(*) FROM chunk WHERE batch_id = 2") == [(0,)]
    drain(database, worker)
    ((chunks,),) = rows(database, "SELECT count(*) FROM chunk WHERE batch_id = 2")
    assert chunks < 400 / 10  # about 20 jobs of 0.1 s a chunk
    assert reading.progress(database, "second").done == 400
    audit_at_rest(database)


def test_what_a_dead_submission_left_is_removed_once_it_is_old(database: Database) -> None:
    submit(database, "alive", jobs(range(5)))
    with database.write() as connection:
        for name, age in (("old", 2 * arriving.ABANDONED_SECONDS), ("young", 1.0)):
            connection.execute(
                text(
                    "INSERT INTO batch (name, digest, state, size, submitted_at) VALUES (:n, :d, 'arriving', 3, :then)"
                ),
                {"n": name, "d": b"", "then": time.time() - age},
            )
        database.insert(
            connection,
            "membership",
            ("batch_id", "ordinal", "job_id"),
            [(b, o, o + 1) for b in (2, 3) for o in range(3)],
        )
    assert arriving.discard_abandoned(database) == 1
    assert rows(database, "SELECT name FROM batch ORDER BY id") == [("alive",), ("young",)]
    assert rows(database, "SELECT batch_id, count(*) FROM membership GROUP BY 1 ORDER BY 1") == [(1, 5), (3, 3)]
