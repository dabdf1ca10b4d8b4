"""Garbage is found and removed; whatever anybody names, is about to name, or has computed, stays."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import services
from services import STORES
from sqlalchemy import text
from store_by_hand import audit_at_rest, builder, drain, jobs, rows, sign_on, submit

from netassay.job import Segment, key_of
from netassay.store import arriving, submission, tidying
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database
from netassay.store.running import Outcome


@pytest.fixture(params=STORES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with services.new_store(request.param, tmp_path) as found:
        yield found


def naming(*references: str) -> Segment:
    """A segment: one job a reference, which its params name."""
    params = [json.dumps({"network": reference}) for reference in references]
    keys = [key_of("some.method", 1, one) for one in params]
    return Segment("some.method", 1, "", 0.1, None, None, None, 1, (), (), params, keys)


def age(artifacts: Artifacts, days: float = 2) -> None:
    for path in artifacts.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * 86400,) * 2)


def arrive(database: Database, name: str, segment: Segment, hours: float = 0) -> int:
    """A submission up to the moment before it opens."""
    batch_id = arriving.begin(database, name, b"d" * 16, len(segment.keys))
    arrival = arriving.Arrival(database, [segment], lambda share: None, batch_id, 0, {})
    arrival.write_jobs()
    arrival.write_memberships()
    with database.write() as connection:
        connection.execute(
            text("UPDATE batch SET submitted_at = submitted_at - :s WHERE id = :id"),
            {"s": hours * 3600, "id": batch_id},
        )
    return batch_id


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_a_store_in_order_holds_no_garbage(database: Database, artifacts: Artifacts) -> None:
    kept = {name: artifacts.put(name.encode()) for name in ("in params", "in a result", "in a recipe", "in inputs")}
    recipe = artifacts.put(json.dumps({"data": f"data:{kept['in a recipe']}"}).encode())
    named = artifacts.put(b"called by a name only")
    submission.submit(
        database, "a", [builder(f"recipe:{recipe}"), naming(f"onnx:{kept['in params']}")], {f"onnx:{named}": "net.onnx"}
    )
    result = json.dumps({"network": f"onnx:{kept['in inputs']}", "a": {"array": f"array:{kept['in a result']}"}})
    drain(database, sign_on(database), lambda task: Outcome(task.id, "done", result=result))
    age(artifacts)
    assert tidying.find(database, artifacts).empty
    assert tidying.remove(database, artifacts).empty
    assert len(list(artifacts.list())) == 6
    audit_at_rest(database)


def test_what_dead_submissions_left_goes_and_nothing_else(database: Database, artifacts: Artifacts) -> None:
    shared, own = artifacts.put(b"shared"), artifacts.put(b"own")
    submit(database, "kept", jobs(range(5)), naming(f"onnx:{shared}"))
    arrive(database, "dead", naming(f"onnx:{shared}", f"onnx:{own}"), hours=2)
    (artifacts.folder / ".arriving-x").write_bytes(b"half")
    age(artifacts)
    seen = tidying.find(database, artifacts)
    assert (seen.batches, seen.jobs, seen.artifacts) == (1, 1, ((own, 3),))
    assert seen.temporaries == ((".arriving-x", 4),)
    assert seen.bytes == 7
    assert tidying.remove(database, artifacts) == seen
    assert tidying.find(database, artifacts).empty
    assert [kept.digest for kept in artifacts.list()] == [shared]
    assert len(rows(database, "SELECT id FROM job")) == len(rows(database, "SELECT key FROM job_key")) == 6
    assert len(drain(database, sign_on(database))) == 6
    assert submit(database, "again", naming(f"onnx:{own}")).new == 1


def test_young_files_stay(database: Database, artifacts: Artifacts) -> None:
    old, again = artifacts.put(b"old"), artifacts.put(b"kept again")
    age(artifacts)
    artifacts.put(b"young")
    artifacts.put(b"kept again")
    (artifacts.folder / ".arriving-x").write_bytes(b"a submission at work")
    assert tidying.find(database, artifacts).artifacts == ((old, 3),)
    assert tidying.remove(database, artifacts).temporaries == ()
    assert artifacts.has(again)
    assert not artifacts.has(old)
    assert (artifacts.folder / ".arriving-x").exists()


def test_a_file_kept_again_between_the_look_and_the_removal_stays(
    database: Database, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = artifacts.put(b"wanted after all")
    age(artifacts)
    look = tidying._unnamed

    def late(*arguments: object) -> dict[str, int]:
        found = look(*arguments)  # type: ignore[arg-type]
        artifacts.put(b"wanted after all")
        return found

    monkeypatch.setattr(tidying, "_unnamed", late)
    assert tidying.remove(database, artifacts).artifacts == ()
    assert artifacts.has(digest)


def test_jobs_stay_while_a_batch_arrives(database: Database, artifacts: Artifacts) -> None:
    digest = artifacts.put(b"of a job that may be found again")
    arriving.discard(database, arrive(database, "refused", naming(f"onnx:{digest}")))
    age(artifacts)
    on_its_way = arrive(database, "on its way", jobs(range(3)))
    removed = tidying.remove(database, artifacts)
    assert (removed.jobs, removed.jobs_kept, removed.artifacts) == (0, 1, ())
    arriving.discard(database, on_its_way)
    removed = tidying.remove(database, artifacts)
    assert (removed.jobs, removed.jobs_kept, [one for one, _ in removed.artifacts]) == (4, 0, [digest])


def test_records_outlive_their_batches(database: Database, artifacts: Artifacts) -> None:
    submit(database, "a", jobs(range(3)))
    drain(database, sign_on(database))
    with database.write() as connection:
        connection.execute(text("DELETE FROM membership"))
    assert tidying.remove(database, artifacts).empty
    assert submit(database, "b", jobs(range(3))).new == 0


def test_submissions_at_the_same_time_lose_nothing(database: Database, artifacts: Artifacts) -> None:
    """Thirty submissions of jobs that are garbage when they begin, against a collector that never rests."""
    stop = threading.Event()
    removed = [0]

    def collect() -> None:
        while not stop.is_set():
            removed.append(tidying.remove(database, artifacts).jobs)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(30):
            before = sum(removed)
            arriving.discard(database, arrive(database, "refused", jobs(range(number * 100, number * 100 + 20))))
            if number % 3 == 0:  # nothing arrives now: the collector has its way
                wait_until(lambda before=before: sum(removed) > before)
            size = 20 - number % 7
            first = number * 100 + number % 7
            assert submit(database, f"batch {number}", jobs(range(first, first + size))).size == size
    finally:
        stop.set()
        collector.join()
    assert not rows(
        database, "SELECT m.job_id FROM membership m WHERE NOT EXISTS (SELECT 1 FROM job j WHERE j.id = m.job_id)"
    )
    assert len(drain(database, sign_on(database))) == sum(20 - number % 7 for number in range(30))
    audit_at_rest(database)
