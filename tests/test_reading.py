"""Records are found across batches: by method, network, time, state and cause, each once, page by page."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from services import STORES
from sqlalchemy import event
from store_by_hand import done, drain, failed, finish, jobs, number_of, sign_on, submit, take

from netassay.job import Segment, key_of
from netassay.store import arriving, reading, running, submission
from netassay.store.control import NoSuchBatch
from netassay.store.database import Database
from netassay.store.reading import NoSuchMethod, NoSuchNetwork, Query
from netassay.store.running import Death, Outcome


@pytest.fixture(params=STORES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with services.new_store(request.param, tmp_path) as found:
        yield found


def reference(name: str, kind: str = "onnx") -> str:
    return f"{kind}:{hashlib.sha256(name.encode()).hexdigest()}"


def on(network: str, numbers: range, method: str = "some.method") -> Segment:
    """A segment: jobs on one network."""
    params = [json.dumps({"n": number, "network": network}) for number in numbers]
    return Segment(method, 1, "", 0.1, None, None, None, 1, (), (), params, [key_of(method, 1, one) for one in params])


def numbers(database: Database, **query: Any) -> list[int]:
    """What was found, by the numbers in the params; `count` agrees."""
    wanted = Query(**query)
    found = [record.params["n"] for record in reading.find(database, wanted)]
    assert reading.count(database, wanted) == len(found)
    return found


def test_each_job_is_found_once_with_all_batches_that_hold_it(database: Database) -> None:
    submit(database, "a", jobs(range(4)))
    submit(database, "b", jobs(range(2, 6)))
    drain(database, sign_on(database))
    found = list(reading.find(database, Query()))
    assert [record.params["n"] for record in found] == [0, 1, 2, 3, 4, 5]
    assert [record.batches for record in found] == [("a",), ("a",), ("a", "b"), ("a", "b"), ("b",), ("b",)]
    assert [record.batches for record in reading.records(database, "b")] == [("b",)] * 4
    assert list(reading.find(database, Query(batch="b"))) == list(reading.records(database, "b"))


def test_methods_are_found_by_pattern(database: Database) -> None:
    submit(database, "a", jobs([1], method="lipschitz.local"), jobs([2], method="lipschitz.global"))
    submit(database, "b", jobs([3], method="kernels.lipschitz"))
    assert numbers(database, method="lipschitz.*") == [1, 2]
    assert numbers(database, method="*.lipschitz") == [3]
    assert numbers(database, method="lipschitz.local", batch="a") == [1]
    assert numbers(database, method="kernels.*", batch="a") == []
    assert reading.methods(database, Query(method="l*")) == [("lipschitz.global", 1), ("lipschitz.local", 1)]
    with pytest.raises(NoSuchMethod, match=r"lipshitz.*lipschitz\.local"):
        numbers(database, method="lipshitz.local")
    with pytest.raises(NoSuchBatch):
        numbers(database, batch="c")


def test_networks_are_found_by_name_pattern_and_digest_and_the_newest_name_is_shown(database: Database) -> None:
    one, other = reference("one"), reference("other")
    submission.submit(database, "a", [on(one, range(3))], {one: "f.onnx"})
    submission.submit(database, "b", [on(other, range(3, 5))], {other: "g.onnx"})
    submission.submit(database, "c", [on(one, range(2, 4))], {one: "f-renamed.onnx"})
    assert numbers(database, network="f-renamed.onnx") == [0, 1, 2, 3]
    assert numbers(database, network="?.onnx") == [3, 4]
    assert numbers(database, network="*.onnx") == [0, 1, 2, 3, 4, 3]
    assert numbers(database, network=one) == numbers(database, network=one[5:]) == [0, 1, 2, 3]
    assert numbers(database, network=one[:15]) == numbers(database, network=one[5:15]) == [0, 1, 2, 3]
    assert {record.name("network") for record in reading.find(database, Query(network=one))} == {"f-renamed.onnx"}
    assert {record.name("network") for record in reading.records(database, "a")} == {"f.onnx"}
    assert numbers(database, network=other, batch="a") == []
    with pytest.raises(NoSuchNetwork, match=r"g\.onx.*g\.onnx"):
        numbers(database, network="g.onx")


def test_many_networks_of_one_pattern_are_found_too(database: Database) -> None:
    names = {reference(str(number)): f"net{number}.onnx" for number in range(reading._MOST_PATTERNS + 8)}
    segments = [on(one, range(place, place + 1)) for place, one in enumerate(names)]
    submission.submit(database, "a", [*segments, on(reference("unnamed"), range(99, 100))], names)
    assert numbers(database, network="net*") == list(range(len(names)))
    assert numbers(database, network="net1?.onnx") == list(range(10, 20))


def test_what_a_recipe_stood_for_is_found_by_its_digest(database: Database) -> None:
    recipe, built = reference("recipe", "recipe"), reference("built")
    builder = json.dumps({"recipe": recipe})
    submission.submit(
        database,
        "a",
        [
            Segment("networks.train", 1, "", 0.1, None, None, None, 1, (), (), [builder],
                    [key_of("networks.train", 1, builder)]),
            Segment("some.method", 1, "", 0.1, None, None, None, 1, (), (recipe,), ['{"n":1}'],
                    [key_of("some.method", 1, '{"n":1}')]),
        ],
        {recipe: "certified"},
    )  # fmt: skip
    drain(database, sign_on(database), lambda task: Outcome(task.id, "done", result=f'{{"network":"{built}"}}'))
    (found,) = reading.find(database, Query(network=built))
    assert (found.params, found.inputs) == ({"n": 1}, {recipe: built})
    assert {record.method for record in reading.find(database, Query(network="certified"))} == {
        "networks.train",
        "some.method",
    }


def test_states_causes_and_times(database: Database) -> None:
    submit(database, "a", jobs(range(6)))
    worker = sign_on(database)

    def end(task: Any) -> Outcome:
        return failed("time" if number_of(task) else "crash")(task) if number_of(task) < 2 else done(task)

    for _ in range(2):
        finish(database, worker, take(database, worker), end)
    submit(database, "b", jobs(range(100, 103)))
    take(database, worker)
    everything = {state: numbers(database, state=state) for state in ("done", "failed", "running", "pending")}
    assert sorted(itertools.chain(*everything.values())) == [0, 1, 2, 3, 4, 5, 100, 101, 102]
    assert everything["failed"] == [0, 1]
    assert len(everything["running"]) == 1
    assert numbers(database, cause="time") == [1]
    assert numbers(database, state="done", cause="time") == []
    assert numbers(database, since=time.time() - 60) == [0, 1, 2, 3, 4, 5]
    assert numbers(database, since=time.time() + 60) == []


def test_what_is_still_arriving_is_not_seen(database: Database) -> None:
    submit(database, "a", jobs(range(3)))
    batch_id = arriving.begin(database, "b", b"", 9)
    arrival = arriving.Arrival(database, [jobs(range(9))], lambda share: None, batch_id, 0, {})
    arrival.write_jobs()
    arrival.write_memberships()
    assert numbers(database) == [0, 1, 2]
    assert [record.batches for record in reading.find(database, Query())] == [("a",)] * 3


@pytest.mark.parametrize("page", [1, 2, 7, 10, 11])
def test_pages_of_any_size_give_the_same(database: Database, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(database, "a", jobs(range(10)), jobs(range(10), method="other.method"))
    worker = sign_on(database)
    claim = take(database, worker)
    death = Death(tuple(task.id for task in claim.tasks), 1.0, 2.0, "crash", "died", "")
    running.report_death(database, worker, claim, death)
    finish(database, worker, claim)
    queries = [Query(), Query(batch="a"), Query(method="other.*"), Query(state="pending")]
    expected = [list(reading.find(database, query)) for query in queries]
    assert [len(found) for found in expected] == [20, 20, 10, 19]
    assert sum(record.attempts for record in expected[0]) == 1
    monkeypatch.setattr(reading, "_PAGE", page)
    assert [list(reading.find(database, query)) for query in queries] == expected


def test_all_batches_take_as_many_queries_as_one(database: Database) -> None:
    def queries(action: Any) -> int:
        seen: list[str] = []

        def note(*arguments: Any) -> None:
            seen.append(arguments[2])

        event.listen(database.engine, "before_cursor_execute", note)
        try:
            action()
        finally:
            event.remove(database.engine, "before_cursor_execute", note)
        return len(seen)

    submit(database, "a", jobs(range(5)))
    few = queries(lambda: reading.batches(database))
    for number in range(20):
        submit(database, f"b{number}", jobs(range(number, number + 5)))
    assert queries(lambda: reading.batches(database)) == few
    worker = sign_on(database)
    held = len(take(database, worker).tasks)
    found = {seen.name: seen for seen in reading.batches(database)}
    assert len(found) == 21
    assert sum(seen.running for seen in found.values()) == held
    assert all(found[name] == reading.progress(database, name) for name in found)
