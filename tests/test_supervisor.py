"""The supervisor and its compute child, without Celery or Redis: limits, deaths, results, outages."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from labs import alive, until
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from netassay import __version__, disk
from netassay.job import Record
from netassay.methods.diagnostics import _side_log
from netassay.settings import Settings
from netassay.store import artifacts, control, dispatching, reading, running
from netassay.store.database import Database
from producer import submission
from worker import limits, supervisor
from worker.compute import LOG_BYTES, Child, ChildDied
from worker.room import Room
from worker.supervisor import Supervisor

USER_METHODS = Path(__file__).parent / "user_methods"


class Bench:
    """A worker of one slot on a store of its own, fed by hand."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.config = Settings(home=home, memory=500_000_000, **settings)
        self.database = Database(self.config.store_url)
        self.supervisor = Supervisor(self.config, slots=1)
        self.supervisor.start()

    @property
    def slot(self) -> supervisor.Slot:
        return self.supervisor._held[threading.get_ident()]

    @property
    def child(self) -> Child:
        assert self.slot.child is not None
        return self.slot.child

    def submit(self, name: str, *jobs: dict[str, Any]) -> None:
        path = self.home / f"{name}.json"
        path.write_text(json.dumps({"name": name, "jobs": jobs}))
        submission.submit(path, self.config)

    def publish(self) -> int | None:
        """The next chunk of the oldest open batch."""
        with self.database.write() as connection:
            offered = dispatching.offer(connection, dispatching.alive_workers(connection))
            for batch in dispatching.open_batches(connection, offered):
                if message := dispatching.publish_next(connection, batch, 1, offered):
                    return message.chunk_id
        return None

    def run(self, name: str, *jobs: dict[str, Any]) -> list[Record]:
        """Submit and run to the end. Returns the records."""
        self.submit(name, *jobs)
        while chunk := self.publish():
            self.supervisor.run(chunk)
        return self.records(name)

    def records(self, name: str) -> list[Record]:
        return list(reading.records(self.database, name))

    def attempts(self, record: Record) -> list[reading.AttemptSeen]:
        return reading.attempts(self.database, record.key)

    def query(self, statement: str) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(text(statement)).all())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("NETASSAY_METHODS", str(USER_METHODS))
    found = Bench(tmp_path)
    yield found
    found.supervisor.close()


def echo(count: int, tag: int = 0) -> dict[str, Any]:
    return {"method": "diagnostics.echo", "params": {"tag": tag}, "grid": {"value": {"range": [0, count]}}}


def alone(how: str, **params: Any) -> dict[str, Any]:
    return {"method": "poison.alone", "params": {"how": how, **params}, "limits": {"seconds": 20, "memory": "100MB"}}


def test_a_time_limit_holds_inside_c_code_with_the_interpreter_lock_held(bench: Bench) -> None:
    began = time.monotonic()
    job = {"method": "diagnostics.burn", "params": {"seconds": 60, "busy": "c"}, "limits": {"seconds": 0.5}}
    (record,) = bench.run("spin", job)
    assert time.monotonic() - began < 10
    assert (record.state, record.cause) == ("failed", "time")
    (attempt,) = bench.attempts(record)
    assert attempt.cause == "time"
    assert attempt.alone
    assert 0.4 < attempt.ended_at - attempt.started_at < 5


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="RLIMIT_DATA is enforced on Linux only")
def test_an_allocation_beyond_the_limit_fails_inside_the_job_and_its_child_is_replaced(bench: Bench) -> None:
    bench.run("before", alone("well"))
    before = bench.child.process.pid
    greedy = {"method": "diagnostics.allocate", "params": {"endless": True}, "limits": {"memory": "100MB"}}
    (record,) = bench.run("greedy", greedy)
    assert (record.state, record.cause) == ("failed", "memory")
    assert "MemoryError" in record.message
    assert bench.attempts(record) == [], "nothing died"
    (after,) = bench.run("after", alone("well", path="again"))
    assert after.result is not None
    assert after.result["pid"] != before


def test_a_limit_is_the_jobs_own_and_lifted_for_the_next(bench: Bench) -> None:
    def job(size: int, limit: str) -> dict[str, Any]:
        return {"method": "diagnostics.allocate", "params": {"bytes": size}, "limits": {"memory": limit}}

    (small,) = bench.run("small", job(150_000_000, "20MB"))
    (large,) = bench.run("large", job(150_000_001, "200MB"))
    assert (small.cause, large.state) == ("memory", "done")


def test_memory_that_the_kernels_limit_does_not_count_is_found_by_looking(bench: Bench) -> None:
    (record,) = bench.run("shared", alone("shared_memory"))
    assert (record.state, record.cause) == ("failed", "memory")
    assert "its limit is" in record.message
    assert len(bench.attempts(record)) == 1


def test_a_record_says_with_what_it_was_computed(bench: Bench) -> None:
    (record,) = bench.run("about", {"method": "poison.values", "params": {"size": 2}})
    assert record.provenance["netassay"] == __version__
    assert record.provenance["numpy"] == np.__version__
    assert {"python", "host", "platform", "processor"} <= set(record.provenance)


def test_nan_infinities_arrays_and_bad_text_come_back_as_they_were(bench: Bench) -> None:
    small, large = bench.run("values", {"method": "poison.values", "grid": {"size": [5, 20_000]}})
    assert small.result is not None
    numbers = small.result["numbers"]
    assert math.isnan(numbers[0])
    assert numbers[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, numbers[3]) == -1
    assert small.result["text"] == "nul \\x00 and \\ud800"
    with artifacts.using(bench.config.artifacts_folder):
        for record, size in ((small, 5), (large, 20_000)):
            assert np.array_equal(record.array("array"), np.arange(size) / 3)


def test_a_crash_leaves_its_last_words_and_no_more_than_64_kib_of_them(bench: Bench) -> None:
    (record,) = bench.run("talk", alone("talk"))
    assert (record.state, record.cause) == ("failed", "crash")
    attempts = bench.attempts(record)
    assert [(attempt.cause, attempt.alone) for attempt in attempts] == [("crash", True)] * 3
    for attempt in attempts:
        assert len(attempt.log) <= LOG_BYTES
        assert attempt.log.endswith("the last words of a job\n")
        assert "code 3" in attempt.message
    assert "the last words" in record.message


def test_a_segmentation_fault_leaves_the_line_of_python_it_happened_in(bench: Bench) -> None:
    (record,) = bench.run("segv", {"method": "diagnostics.crash", "params": {"by": "SIGSEGV"}})
    assert record.cause == "crash"
    log = bench.attempts(record)[0].log
    assert "Segmentation fault" in log
    assert "crash.py" in log


def test_a_log_holds_nothing_of_the_jobs_before(bench: Bench) -> None:
    bench.run("flood", alone("flood"))
    (record,) = bench.run("crash", {"method": "diagnostics.crash"})
    assert "yyy" not in bench.attempts(record)[0].log


def test_a_death_is_noticed_though_a_fork_keeps_the_pipes_open_and_the_fork_ends_too(bench: Bench) -> None:
    path = bench.home / "fork"
    began = time.monotonic()
    (record,) = bench.run("fork", alone("fork", path=str(path)))
    assert time.monotonic() - began < 15, "it was waited for until the limit"
    assert (record.state, record.cause) == ("failed", "crash")
    until(lambda: not alive(int(path.read_text())), 5)


def test_a_child_that_closes_its_pipes_is_not_waited_for(bench: Bench) -> None:
    began = time.monotonic()
    (record,) = bench.run("closed", alone("close_pipes"))
    assert record.cause == "crash"
    assert time.monotonic() - began < 3 * 20


def test_a_job_that_reads_input_finds_it_empty_and_takes_no_other_job(bench: Bench) -> None:
    asks, well = bench.run("input", alone("read_input"), alone("well"))
    assert asks.cause == "error"
    assert "EOFError" in asks.message
    assert well.state == "done"


def test_a_missing_library_fails_the_jobs_by_its_name(bench: Bench) -> None:
    began = time.monotonic()
    records = bench.run("unfit", {"method": "poison.unfit", "grid": {"tag": [1, 2]}})
    assert time.monotonic() - began < 30
    for record in records:
        assert (record.state, record.cause) == ("failed", "error")
        assert "No module named 'no_such_library'" in record.message
    (well,) = bench.run("fit", alone("well"))
    assert well.state == "done"


@pytest.mark.parametrize("times", [supervisor.PREPARATIONS - 1, supervisor.PREPARATIONS + 1])
def test_a_child_killed_while_it_imports_costs_nobody_anything(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.05)
    prepare, killed = Child.prepare, []

    def unlucky(self: Child, *args: Any) -> None:
        if len(killed) < times:
            killed.append(self.process.pid)
            self.kill()
            raise ChildDied("memory", "killed by SIGKILL from outside", "", code=-9)
        prepare(self, *args)

    monkeypatch.setattr(Child, "prepare", unlucky)
    records = bench.run("unlucky", echo(3))
    assert len(killed) == times
    assert [record.state for record in records] == ["done"] * 3
    assert bench.query("SELECT * FROM attempt") == []


def test_a_library_that_crashes_at_every_import_fails_the_jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(self: Child, *_: Any) -> None:
        tried.append(self.process.pid)
        self.kill()
        raise ChildDied("crash", "the process died of SIGILL", "", code=-signal.SIGILL)

    monkeypatch.setattr(Child, "prepare", broken)
    (record,) = bench.run("broken", echo(1))
    assert len(tried) == supervisor.PREPARATIONS
    assert (record.state, record.cause) == ("failed", "error")
    assert "SIGILL" in record.message
    assert timings(bench) == [(None, None)]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_jobs_wait_while_the_host_has_no_room_for_a_child(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.05)
    refused = []

    def short(*args: Any, **options: Any) -> Child:
        if len(refused) < 2:
            refused.append(number)
            raise OSError(number, os.strerror(number))
        return Child(*args, **options)

    monkeypatch.setattr(supervisor, "Child", short)
    records = bench.run("short", echo(3))
    assert len(refused) == 2
    assert [record.state for record in records] == ["done"] * 3
    assert bench.query("SELECT * FROM attempt") == []


def test_a_worker_without_room_for_a_child_can_still_be_shut_down(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> Child:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 60.0)
    monkeypatch.setattr(supervisor, "Child", short)
    bench.submit("short", echo(1))
    chunk = bench.publish()
    assert chunk is not None
    threading.Timer(0.2, bench.supervisor.stop).start()
    began = time.monotonic()
    bench.supervisor.run(chunk)
    assert time.monotonic() - began < 5
    assert reading.progress(bench.database, "short").waiting == 1
    assert bench.query("SELECT count(*) FROM running") == [(0,)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted in /proc")
@pytest.mark.parametrize("place", [(subprocess, "Popen"), (selectors, "DefaultSelector"), (os, "pipe")])
def test_a_child_that_cannot_be_started_leaves_no_descriptor_open(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(*place, short)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Too many open files"):
        Child(Path("unused"))
    assert os.listdir("/proc/self/fd") == before


def test_a_method_that_the_worker_has_not_got_goes_back_and_is_asked_for_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.02)
    children = count_children(monkeypatch)
    bench.submit("unknown", {"method": "poison.grouped", "grid": {"tag": {"range": [0, 50]}}})
    with monkeypatch.context() as without:
        without.delenv("NETASSAY_METHODS")
        chunk = bench.publish()
        assert chunk is not None
        for _ in range(3):
            bench.supervisor.run(chunk)
        assert len(children) == 2, "in a fresh child once, then not for a while"
        assert bench.publish() is None, "no worker has it"
    ((reason,),) = bench.query("SELECT reason FROM worker_lack")
    assert "cannot load poison.grouped" in reason
    assert "NETASSAY_METHODS" in reason
    assert reading.progress(bench.database, "unknown").waiting == 50
    assert bench.query("SELECT count(*) FROM running") == [(0,)]
    monkeypatch.setattr(supervisor, "LACK_SECONDS", 0.0)
    control.resume(bench.database, "unknown")
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    assert {record.state for record in bench.records("unknown")} == {"done"}
    assert bench.query("SELECT * FROM worker_lack") == []


def count_children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes of the children that are started from here on."""
    found = []

    def child(*args: Any) -> Child:
        made = Child(*args)
        found.append(made.process.pid)
        return made

    monkeypatch.setattr(supervisor, "Child", child)
    return found


def test_a_method_upgraded_under_a_child_that_has_loaded_it_runs_in_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (USER_METHODS / "poison" / "alone.py").read_text()
    module = tmp_path / "methods" / "poison" / "alone.py"
    module.parent.mkdir(parents=True)
    module.write_text(source)
    monkeypatch.setenv("NETASSAY_METHODS", str(tmp_path / "methods"))
    bench = Bench(tmp_path)
    try:
        bench.run("before", alone("well"))
        before = bench.child.process.pid
        bench.submit("after", alone("well", path="another"))
        module.write_text(source.replace("VERSION = 1", "VERSION = 2"))
        with bench.database.write() as connection:  # as if its submitter had had the new one already
            connection.execute(text("UPDATE method_version SET version = 2"))
        chunk = bench.publish()
        assert chunk is not None
        bench.supervisor.run(chunk)
        assert [record.state for record in bench.records("after")] == ["done"]
        assert bench.child.process.pid != before
        assert bench.query("SELECT * FROM worker_lack") == []
    finally:
        bench.supervisor.close()


def test_a_child_that_keeps_what_its_jobs_computed_is_replaced(bench: Bench) -> None:
    bench.run("well", alone("well"))
    before = bench.child.process.pid
    bench.run("well again", alone("well", path="again"))
    assert bench.child.process.pid == before
    (record,) = bench.run("hoard", {**alone("hoard"), "limits": {"seconds": 60, "memory": "450MB"}, "params": {
        "how": "hoard"}})  # fmt: skip
    assert bench.slot.child is None
    assert (record.state, record.cause) == ("failed", "memory")


def test_a_full_disk_starts_nothing_and_fails_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.02)
    bench.submit("full", alone("full"), alone("well"))
    with monkeypatch.context() as short:
        short.setattr(disk, "is_short", lambda folder: True)
        chunk = bench.publish()
        assert chunk is not None
        bench.supervisor.run(chunk)
        assert bench.query("SELECT state FROM chunk") == [("published",)], "not even claimed"
    looked = []

    def filling(folder: Path) -> bool:
        looked.append(folder)
        return len(looked) > 2  # both folders had room when the chunk came

    with monkeypatch.context() as short:
        short.setattr(disk, "is_short", filling)
        bench.supervisor.run(chunk)
    assert reading.progress(bench.database, "full").waiting == 2, "it fails for want of room, so it goes back"
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    full, well = sorted(bench.records("full"), key=lambda record: record.state, reverse=True)
    assert (well.state, full.state, full.cause) == ("done", "failed", "error")
    assert "No space left on device" in full.message, "there is room: whatever is full is the job's own matter"


def test_two_jobs_that_need_most_of_the_memory_do_not_meet(bench: Bench) -> None:
    room, inside, most = Room(24), [], []
    gate = threading.Barrier(4)

    def job(wanted: int) -> None:
        gate.wait()
        with room.reserve(wanted, 30.0, lambda: False) as fits:
            assert fits
            inside.append(wanted)
            most.append(sum(inside))
            time.sleep(0.05)
            inside.remove(wanted)

    threads = [threading.Thread(target=job, args=(wanted,)) for wanted in (15, 15, 9, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 4
    assert max(most) <= 24


def test_whoever_needs_much_is_not_passed_by_those_who_need_little() -> None:
    room, order = Room(10), []

    def job(name: str, wanted: int) -> None:
        with room.reserve(wanted, 30.0, lambda: False):
            order.append(name)

    with room.reserve(6, 0.0, lambda: False) as fits:
        assert fits
        large = threading.Thread(target=job, args=("large", 8))
        large.start()
        until(lambda: len(room._turns) == 1)
        small = threading.Thread(target=job, args=("small", 1))
        small.start()
        until(lambda: len(room._turns) == 2)
        time.sleep(0.3)
        assert order == []
    large.join()
    small.join()
    assert order == ["large", "small"]


def test_memory_that_is_not_to_be_had_is_not_waited_for_and_what_is_unwanted_neither() -> None:
    room = Room(10)
    with room.reserve(11, 60.0, lambda: False) as fits:
        assert not fits
    with room.reserve(10, 0.0, lambda: False) as held:
        assert held
        for seconds, unwanted in ((0.0, False), (60.0, True)):
            began = time.monotonic()
            with room.reserve(1, seconds, lambda unwanted=unwanted: unwanted) as fits:
                assert not fits
            assert time.monotonic() - began < 5
    with room.reserve(10, 0.0, lambda: False) as fits:
        assert fits


def test_jobs_of_a_chunk_that_finds_no_room_go_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "ROOM_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.02)
    bench.submit("large", {**alone("well"), "limits": {"memory": "400MB"}})
    chunk = bench.publish()
    assert chunk is not None
    with bench.supervisor.room.reserve(200_000_000, 0.0, lambda: False):
        bench.supervisor.run(chunk)
    assert reading.progress(bench.database, "large").waiting == 1
    assert bench.query("SELECT count(*) FROM running") == [(0,)]
    assert bench.query("SELECT id, state FROM chunk") == [(chunk, "ready")], "the same, and no empty one beside it"
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    assert [record.state for record in bench.records("large")] == ["done"]


@pytest.mark.parametrize("end", ["1 / 0", "raise SystemExit(3)"])
def test_a_method_whose_module_breaks_goes_back_and_takes_no_other_job_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.02)
    source = bench.home / "methods" / "mine" / "breaks.py"
    source.parent.mkdir(parents=True)
    source.write_text((USER_METHODS / "poison" / "grouped.py").read_text())
    monkeypatch.setenv("NETASSAY_METHODS", str(source.parents[1]))
    bench.config = bench.config.model_copy(update={"methods": str(source.parents[1])})
    bench.submit("breaks", {"method": "mine.breaks", "grid": {"tag": [1, 2]}}, echo(2))
    source.write_text(f'"""A method that broke."""\n{end}\n')
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    broken, well = bench.records("breaks")[:2], bench.records("breaks")[2:]
    assert [record.state for record in broken] == ["pending"] * 2
    assert [record.state for record in well] == ["done"] * 2
    ((reason,),) = bench.query("SELECT reason FROM worker_lack")
    assert "cannot load mine.breaks" in reason
    assert {"1 / 0": "ZeroDivisionError"}.get(end, "SystemExit") in reason
    assert bench.query("SELECT * FROM attempt") == []


def timings(bench: Bench) -> list[tuple[float | None, float | None]]:
    """What the store knows of the seconds of a job: by each segment, and by its method for a job of that segment."""
    rows = bench.query(
        "SELECT s.seconds, s.hint * m.seconds FROM segment s JOIN method_version m ON m.id = s.method_id"
    )
    return [(row[0], row[1]) for row in rows]


def test_a_chunk_in_which_a_child_died_says_nothing_of_what_a_job_takes(bench: Bench) -> None:
    (record,) = bench.run("crash", {"method": "diagnostics.crash"})
    assert record.cause == "crash"
    assert timings(bench) == [(None, None)]


def test_time_counts_up_to_a_failed_allocation(bench: Bench) -> None:
    greedy = {"method": "diagnostics.allocate", "params": {"endless": True}, "limits": {"memory": "100MB"}}
    (record,) = bench.run("greedy", greedy)
    assert record.cause == "memory"
    ((segment, method),) = timings(bench)
    assert segment is not None
    assert segment == pytest.approx(method)
    assert segment > 1e-3, "to fill 100 MB takes longer"


def test_a_chunk_of_no_measurable_time_does_not_say_zero(bench: Bench) -> None:
    slot = supervisor.Slot(bench.supervisor)
    assert slot._seconds_a_job(claim_of(1, 0.001, 60.0, None), 10_000) == 1e-6
    assert slot._seconds_a_job(claim_of(1, 0.001, 60.0, None), 0) is None


def test_a_chunk_starts_slowly_and_slows_down_as_soon_as_its_jobs_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "AHEAD_SECONDS", 0.6)
    send, sent = Child.send, []

    def noted(self: Child, request: dict[str, Any]) -> None:
        sent.append(len(request.get("groups", ())))
        send(self, request)

    monkeypatch.setattr(Child, "send", noted)
    # Each a group: four quick ones, the first of which goes alone in its chunk, and six slow ones.
    seconds = [0.0, 1e-6, 2e-6, 3e-6, 0.35, 0.351, 0.352, 0.353, 0.354, 0.355]
    bench.run("uneven", {"method": "diagnostics.sleep", "grid": {"seconds": seconds}})
    assert [groups for groups in sent if groups] == [1, 1, 2, 4, 1, 1]


def test_no_request_has_more_than_sixteen_groups_nor_twice_those_of_the_one_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = Child.send, []

    def noted(self: Child, request: dict[str, Any]) -> None:
        sent.append(len(request.get("groups", ())))
        send(self, request)

    monkeypatch.setattr(Child, "send", noted)
    sleeps = {"method": "diagnostics.sleep", "params": {"seconds": 0.0}, "grid": {"tag": {"range": [0, 200]}}}
    bench.run("quick", sleeps)
    requests = [groups for groups in sent if groups]
    assert sum(requests) == 200
    assert max(requests) == supervisor.AHEAD_GROUPS == 16
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(requests))


def test_past_its_budget_a_chunk_gives_back_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BUDGET_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "AHEAD_SECONDS", 0.0)
    sleeps = {"method": "diagnostics.sleep", "params": {"seconds": 0.2}, "grid": {"tag": {"range": [0, 9]}}}
    bench.submit("long", sleeps)
    first, second = bench.publish(), bench.publish()
    assert first is not None
    assert second is not None
    bench.supervisor.run(first)
    bench.supervisor.run(second)
    seen = reading.progress(bench.database, "long")
    assert 1 < seen.done < 9
    assert seen.waiting == 9 - seen.done
    assert bench.query("SELECT count(*) FROM running") == [(0,)]
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    assert reading.progress(bench.database, "long").done == 9


def test_a_group_that_breaks_down_after_the_budget_still_comes_to_an_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BUDGET_SECONDS", 0.3)
    log = str(bench.home / "side.log")

    def well(start: int, stop: int) -> dict[str, Any]:
        return {"method": "poison.grouped", "params": {"log": log}, "grid": {"tag": {"range": [start, stop]}}}

    late = {"method": "poison.grouped", "params": {"log": log, "how": "late"}}
    records = bench.run("late", well(0, 20), late, well(20, 30))
    ends = Counter((record.state, record.cause) for record in records)
    assert ends == {("done", ""): 30, ("failed", "error"): 1}
    starts = Counter(line.job for line in _side_log.read(log) if line.event == "start")
    assert max(starts.values()) == 2


def test_what_was_computed_for_a_chunk_taken_over_is_dropped(bench: Bench) -> None:
    bench.submit("late", {"method": "diagnostics.sleep", "params": {"seconds": 1.5}})
    chunk = bench.publish()
    assert chunk is not None
    asleep = bench.supervisor.worker_id

    def take_over() -> bool:
        with bench.database.read() as connection:
            seen = next(one for one in dispatching.alive_workers(connection) if one.id == asleep)
        return bool(dispatching.reclaim(bench.database, asleep, seen.counter))

    def give_up() -> None:
        until(lambda: bench.query("SELECT 1 FROM chunk WHERE state = 'claimed'"))
        until(take_over)

    thread = threading.Thread(target=give_up)
    thread.start()
    bench.supervisor.run(chunk)
    thread.join()
    assert bench.records("late")[0].state == "pending"
    until(lambda: bench.supervisor.worker_id != asleep, 10, "the worker to sign on anew")
    again = bench.publish()
    assert again is not None
    bench.supervisor.run(again)
    (record,) = bench.records("late")
    assert record.state == "done"
    assert bench.query("SELECT count(*) FROM attempt") == [(0,)]


def test_through_an_outage_results_are_held_and_then_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, refused = running.finish, []

    def out(*args: Any) -> None:
        if len(refused) < 3:
            refused.append(time.monotonic())
            raise OperationalError("COMMIT", {}, Exception("disk I/O error"))
        finish(*args)

    monkeypatch.setattr(running, "finish", out)
    records = bench.run("outage", echo(5))
    assert len(refused) == 3
    assert [record.state for record in records] == ["done"] * 5
    starts = [later - earlier for earlier, later in itertools.pairwise(refused)]
    assert starts == sorted(starts), "it waits longer each time"


def test_an_outage_that_does_not_end_holds_up_no_shutdown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def out(*_: Any) -> None:
        refused.append(time.monotonic())
        raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    def stop_when_refused() -> None:
        until(lambda: refused)
        bench.supervisor.stop()

    bench.supervisor.settings = bench.config.model_copy(update={"grace": 0.3})
    bench.submit("outage", echo(1))
    chunk = bench.publish()
    assert chunk is not None
    with monkeypatch.context() as broken:
        broken.setattr(running, "finish", out)
        threading.Thread(target=stop_when_refused).start()
        bench.supervisor.run(chunk)
        assert time.monotonic() - refused[0] < 5
    assert bench.query("SELECT state FROM chunk") == [("claimed",)]
    bench.supervisor.close()
    assert reading.progress(bench.database, "outage").waiting == 1


def test_a_store_that_takes_neither_results_nor_failures_gets_its_chunk_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SHORT_SECONDS", 0.05)

    def refuse(*_: Any) -> None:
        raise RuntimeError("a bug in the store")

    bench.submit("refused", echo(1))
    chunk = bench.publish()
    assert chunk is not None
    with monkeypatch.context() as broken:
        broken.setattr(running, "finish", refuse)
        bench.supervisor.run(chunk)
    assert bench.query("SELECT state, token, worker_id FROM chunk") == [("ready", None, None)]
    assert bench.query("SELECT * FROM running") == []
    while again := bench.publish():
        bench.supervisor.run(again)
    assert [record.state for record in bench.records("refused")] == ["done"]


def test_a_refused_chunk_that_others_hold_by_now_is_left_to_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit("taken", echo(1))
    chunk = bench.publish()
    assert chunk is not None
    claim = running.claim(bench.database, bench.supervisor.worker_id, chunk)
    assert claim is not None
    slot = supervisor.Slot(bench.supervisor)
    slot._release(replace(claim, token="another's"))
    assert bench.query("SELECT state FROM chunk") == [("claimed",)]
    slot._release(claim)
    assert bench.query("SELECT state FROM chunk") == [("ready",)]


def test_an_outage_does_not_end_the_signs_of_life(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, raised = running.renew, []

    def out(*args: Any) -> running.Renewal:
        if len(raised) < 2:
            raised.append(1)
            raise OperationalError("UPDATE", {}, Exception("locked")) if len(raised) == 1 else RuntimeError("a bug")
        return renew(*args)

    monkeypatch.setattr(running, "renew", out)
    until(lambda: len(raised) == 2)
    before = bench.query("SELECT counter FROM worker")
    until(lambda: bench.query("SELECT counter FROM worker") > before, 5)


def test_a_worker_that_shuts_down_lets_a_job_end_within_the_grace_and_gives_back_the_others(bench: Bench) -> None:
    sleeps = {"method": "diagnostics.sleep", "params": {"seconds": 0.5}, "grid": {"tag": {"range": [0, 4]}}}
    bench.submit("bye", sleeps)
    first, rest = bench.publish(), bench.publish()
    assert first is not None
    assert rest is not None
    bench.supervisor.run(first)
    threading.Timer(0.2, bench.supervisor.stop).start()
    bench.supervisor.run(rest)
    seen = reading.progress(bench.database, "bye")
    assert (seen.done, seen.waiting) == (2, 2)
    assert bench.query("SELECT count(*) FROM attempt") == [(0,)]


def claim_of(jobs: int, seconds: float, time_limit: float, memory: int | None) -> running.Claim:
    return running.Claim(
        chunk_id=1, token="", method="m", version=1, method_id=1, segment_id=1, time_limit=time_limit,
        memory_limit=memory, group_size=jobs, seconds=seconds, libraries=(), tasks=[],
    )  # fmt: skip


@pytest.mark.parametrize("jobs, seconds, memory, expected", [
    (1, 0.001, None, (60.0, 500_000_000)),  # a job alone: its own limits
    (1, 0.001, 10**6, (60.0, 10**6)),
    (1, 0.001, 10**9, (60.0, 10**9)),  # asked for by name, so given
    (40, 5.0, 10**6, (2400.0, 40 * 10**6)),  # sums, where 20 x the prediction is longer
    (40, 0.001, 10**6, (60.0, 40 * 10**6)),  # one job's limit, where the sum is absurd
    (40, 10.0 / 40, 10**8, (200.0, 500_000_000)),  # 20 x the prediction; no more than the slot has
    (40, 0.001, 10**9, (60.0, 10**9)),
])  # fmt: skip
def test_limits_of_a_group(bench: Bench, jobs: int, seconds: float, memory: int | None, expected: tuple) -> None:
    slot = supervisor.Slot(bench.supervisor)
    assert slot._limits(claim_of(jobs, seconds, 60.0, memory), jobs) == expected


@pytest.mark.parametrize("error, cause", [
    (ZeroDivisionError("division by zero"), "error"),  # most often a bug, and mended bugs are to be run again
    (OverflowError("math range error"), "error"),
    (FloatingPointError("overflow encountered"), "numerical"),
    (np.linalg.LinAlgError("Singular matrix"), "numerical"),
    (MemoryError(), "memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    (RuntimeError("sizes do not match"), "error"),
])  # fmt: skip
def test_the_cause_of_an_exception(error: Exception, cause: str) -> None:
    assert limits.cause_of_exception(error) == cause


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="it is read from /proc")
def test_a_child_is_told_no_address_no_secret_and_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROKER", "STORE", "HOME"):
        monkeypatch.setenv(f"NETASSAY_{name}", f"the-{name}")
    secrets = ("NETASSAY_ARTIFACTS", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "FSSPEC_S3_SECRET", "PGPASSWORD", "MY_TOKEN",
               "REDIS_PASSWORD", "API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "FLOWER_BASIC_AUTH")  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "a-secret")
    for name in ("TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME"):
        monkeypatch.setenv(name, "no-secret")
    child = Child(Path("unused"))
    environ = Path(f"/proc/{child.process.pid}/environ")
    try:
        until(lambda: "\0" in environ.read_text())  # empty until the program has taken the place of the fork
        seen = environ.read_text().split("\0")
    finally:
        child.kill()
    assert not any("the-BROKER" in variable or "the-STORE" in variable for variable in seen)
    assert not any("a-secret" in variable for variable in seen)
    assert {"NETASSAY_HOME=the-HOME", "OMP_NUM_THREADS=1", "NETASSAY_ARTIFACTS=unused"} <= set(seen)
    assert {"TOKENIZERS_PARALLELISM=no-secret", "GIT_AUTHOR_NAME=no-secret"} <= set(seen)


def test_a_family_is_a_process_with_its_descendants() -> None:
    child = Child(Path("unused"))
    try:
        assert set(limits.family(os.getpid())) >= {os.getpid(), child.process.pid}
        assert limits.family(child.process.pid) == [child.process.pid]
    finally:
        child.kill()
    assert not alive(child.process.pid)
    assert limits.resident(child.process.pid) == 0


def test_a_process_that_ends_while_its_family_is_asked_for_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(Path("unused"))
    child.kill()
    monkeypatch.setattr(limits.os.path, "exists", lambda path: True)  # it was there a moment ago
    assert limits.family(child.process.pid) == [child.process.pid]
    assert limits.resident(child.process.pid) == 0


def test_requests_larger_than_a_pipe_reach_a_child_that_is_slow_to_read(bench: Bench) -> None:
    texts = {"method": "diagnostics.echo", "grid": {"value": [f"{number} " + "x" * 5000 for number in range(100)]}}
    records = bench.run("large", texts)
    assert [record.result["value"] for record in records if record.result] == texts["grid"]["value"]


def test_a_child_that_never_reads_is_ended_by_the_time_limit() -> None:
    child = Child(Path("unused"))
    child.process.send_signal(signal.SIGSTOP)
    child.send({"prepare": {"libraries": ["x" * 1_000_000]}})
    with pytest.raises(ChildDied) as death:
        child.line(time.monotonic() + 0.5, None, lambda: False)
    assert death.value.cause == "time"
    assert not alive(child.process.pid)


def test_results_that_lay_in_the_pipe_while_the_worker_was_stopped_are_in_time(tmp_path: Path) -> None:
    child = Child(tmp_path)
    try:
        child.prepare([], lambda: False)
        text = "x" * 200_000  # more than a pipe takes: the child is in the middle of its answer
        jobs = [[1, json.dumps({"value": text})]]
        request = {"method": "diagnostics.echo", "version": 1, "given": {}, "groups": [{"memory": 2**30, "jobs": jobs}]}
        child.send(request)
        while child._unsent:
            child._pump(0.1)
        until(lambda: select.select([child._results], [], [], 0)[0], what="an answer")
        line = child.line(time.monotonic() - 1.0, None, lambda: False)
        assert json.loads(line)[0][1] == "done"
        child.send({**request, "method": "diagnostics.sleep", "groups": [{"memory": 2**30, "jobs": [[2, "{}"]]}]})
        with pytest.raises(ChildDied):
            child.line(time.monotonic() - 1.0, None, lambda: False)
    finally:
        child.kill()


def test_a_process_that_nobody_has_asked_about_yet_is_gone_all_the_same() -> None:
    """The first process of a container often does not ask, and a predecessor would seem to live for ever."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not supervisor._is_gone(child.pid)
        child.kill()
        until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, what="its end")
        assert supervisor._is_gone(child.pid)
    finally:
        child.wait()
    assert supervisor._is_gone(child.pid)
