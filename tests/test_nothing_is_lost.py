"""Whatever is killed, every accepted job ends once, with its value right: held against the oracle of `labs`.

One accident a test here; many at once, and overlapping, are in `faults/`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from labs import KINDS, Lab, a_lab, alive, in_python, until

from netassay import faults
from netassay.store import control, dispatching, reading
from producer import lab as embedded_lab

#: Seconds without a sign of life after which these labs give a worker up; its renewals come every second.
LOST_AFTER = "3"


@pytest.fixture(scope="module", params=KINDS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with a_lab(request.param, LOST_AFTER=LOST_AFTER) as found:
        yield found


def mixture(lab: Lab, tag: int, sleeps: int = 80, seconds: float = 0.05) -> list[dict]:
    """Jobs that vectorise and jobs that take their time: some five seconds on two slots."""
    return [
        lab.entry("diagnostics.echo", {"tag": tag}, grid={"value": {"range": [0, 300]}}),
        lab.entry(
            "diagnostics.sleep", {"seconds": seconds}, grid={"tag": {"range": [1000 * tag, 1000 * tag + sleeps]}}
        ),
    ]


def under_way(lab: Lab, tag: int, jobs: int = 10) -> None:
    """Wait until so many of the sleeping jobs of `mixture` have started."""

    def started() -> bool:
        named = [job.split() for job in lab.started()]
        return sum(words[0] == "sleep" and int(words[3]) // 1000 == tag for words in named) >= jobs

    until(started, what="jobs to start")


def at_work(lab: Lab) -> int:
    """The process of the lab's worker, if it lives and has signed on."""
    pid = lab.described().get("services", {}).get("worker", 0)
    return pid if alive(pid) and lab.query("SELECT 1 FROM worker WHERE pid = :pid AND state = 'alive'", pid=pid) else 0


def attempts_in(lab: Lab, name: str) -> list:
    """Children that died on the jobs of a batch."""
    return lab.query(
        "SELECT a.message FROM attempt a JOIN membership m ON m.job_id = a.job_id JOIN batch b ON b.id = m.batch_id"
        " WHERE b.name = :name",
        name=name,
    )


def broker(lab: Lab) -> redis.Redis:
    url = lab.config.broker or lab.described()["broker"]
    return redis.Redis.from_url(url.replace("redis+socket", "unix"))


def test_a_worker_killed_mid_batch_loses_no_job_and_leaves_no_child(lab: Lab) -> None:
    lab.submit("worker", *mixture(lab, 1))
    under_way(lab, 1)
    children = until(lambda: len(lab.children()) == 2 and lab.children())
    killed = lab.kill("worker")
    until(lambda: not any(map(alive, children)), 5, "the children to end with their worker")
    lab.restarted("worker", killed)
    lab.wait("worker")
    assert lab.violations("worker", takeover=True) == []
    assert attempts_in(lab, "worker") == [], "a lost worker is no attempt of the job"


def test_a_child_killed_from_outside_costs_its_job_an_attempt_and_no_end(lab: Lab) -> None:
    lab.submit("child", *mixture(lab, 2))
    under_way(lab, 2)
    os.kill(lab.children()[0], signal.SIGKILL)
    lab.wait("child")
    assert lab.violations("child") == []
    (attempt,) = attempts_in(lab, "child")
    assert "SIGKILL from outside" in attempt.message


def test_a_killed_dispatcher_is_replaced_and_publishes_on(lab: Lab) -> None:
    lab.submit("dispatcher", *mixture(lab, 3))
    under_way(lab, 3)
    killed = lab.kill("dispatcher")
    assert lab.restarted("dispatcher", killed) != killed
    lab.wait("dispatcher")
    assert lab.violations("dispatcher") == []


def test_redis_killed_under_two_busy_slots_is_restarted_and_heard_again(lab: Lab) -> None:
    lab.submit("redis", *mixture(lab, 4))
    under_way(lab, 4)
    worker = lab.pid("worker")
    lab.restarted("redis", lab.kill("redis"))
    began = time.monotonic()
    lab.wait("redis")
    assert time.monotonic() - began < 20, "the worker has been deaf"
    assert lab.violations("redis") == []
    assert lab.pid("worker") == worker, "it has to come back by itself, as one of a cluster must"


def test_redis_wiped_mid_batch_costs_no_job(lab: Lab) -> None:
    lab.submit("wiped", *mixture(lab, 5))
    under_way(lab, 5)
    broker(lab).flushall()
    lab.wait("wiped")
    assert lab.violations("wiped") == []


def test_a_store_locked_for_five_seconds_delays_and_loses_nothing(lab: Lab) -> None:
    lab.submit("locked", *mixture(lab, 6))
    under_way(lab, 6)
    with lab.database.write():
        time.sleep(5.0)
    lab.wait("locked")
    assert lab.violations("locked") == []


def test_a_worker_stopped_beyond_its_lease_changes_nothing_when_it_wakes(lab: Lab) -> None:
    lab.submit("stopped", *mixture(lab, 7))
    under_way(lab, 7)
    worker = lab.query("SELECT id FROM worker WHERE state = 'alive'")[0].id
    lab.kill("worker", signal.SIGSTOP)
    try:
        with lab.second_worker():
            until(lambda: lab.query("SELECT 1 FROM worker WHERE id = :id AND state = 'lost'", id=worker))
            lab.wait("stopped")
            before = lab.query("SELECT * FROM record ORDER BY job_id")
            counts = lab.progress("stopped")
            lab.kill("worker", signal.SIGCONT)
            # It notices, drops what it held and signs on anew.
            until(lambda: len(lab.query("SELECT 1 FROM worker WHERE state = 'alive'")) == 2)
            time.sleep(1.0)
            assert lab.query("SELECT * FROM record ORDER BY job_id") == before
            assert lab.progress("stopped") == counts
    finally:
        lab.kill("worker", signal.SIGCONT)
    lab.submit("woken", lab.entry("diagnostics.echo", {"tag": 70}, grid={"value": {"range": [0, 20]}}))
    lab.wait("woken")
    assert lab.violations("stopped", takeover=True) == []
    assert lab.violations("woken") == []


SUBMIT = """
from pathlib import Path
from netassay.settings import settings
from producer import submission
print(submission.submit(Path({path!r}), settings())[1].already)
"""


def test_a_submitter_killed_before_its_batch_opens_leaves_no_batch(lab: Lab) -> None:
    path = lab.document("early", *mixture(lab, 8, sleeps=10))
    killed = in_python(SUBMIT.format(path=str(path)), lab, CRASH_AT="submit.arriving")
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(control.NoSuchBatch):
        lab.progress("early")
    again = in_python(SUBMIT.format(path=str(path)), lab)
    assert again.stdout.strip() == "False", again.stderr
    lab.wait("early")
    assert lab.violations("early") == []


def test_a_submitter_killed_after_its_batch_opened_has_submitted_it(lab: Lab) -> None:
    path = lab.document("late", *mixture(lab, 9, sleeps=10))
    killed = in_python(SUBMIT.format(path=str(path)), lab, CRASH_AT="submit.opened")
    assert killed.returncode == -signal.SIGKILL
    again = in_python(SUBMIT.format(path=str(path)), lab)
    assert again.stdout.strip() == "True", again.stderr
    lab.wait("late")
    assert lab.violations("late") == []
    assert lab.progress("late").size == 310


def test_a_killed_lab_takes_all_with_it_and_goes_on_when_it_is_started_again(lab: Lab) -> None:
    lab.submit("whole", *mixture(lab, 10))
    under_way(lab, 10)
    place = embedded_lab.Place(lab.config.root)
    connection = broker(lab)
    lab.kill("lab")
    until(lambda: not lab.processes(), 10, "all processes to end with the lab")
    assert not embedded_lab.is_locked(place.lock)
    assert place.described() is None
    if lab.server is None:
        with pytest.raises(redis.ConnectionError):
            connection.ping()
    lab.up()
    lab.wait("whole")
    assert lab.violations("whole", takeover=True) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_worker_held_goes_on_as_soon_as_its_lab_has_put_another_in_its_place(kind: str) -> None:
    """Not only when a dispatcher can be sure that it is lost."""
    with a_lab(kind, LOST_AFTER="300") as lab:
        lab.submit("worker", *mixture(lab, 11))
        under_way(lab, 11)
        lab.kill("worker")
        lab.wait("worker", seconds=60)
        lab.submit("all", *mixture(lab, 12))
        under_way(lab, 12)
        lab.kill("lab")
        until(lambda: not lab.processes(), 10, "all processes to end with the lab")
        lab.up()
        lab.wait("all", seconds=60)
        assert lab.query("SELECT count(*) FROM worker WHERE state = 'lost'") == [(2,)]
        assert lab.violations("worker", "all", takeover=True) == []


#: Each dies at a process's step in one kind of lab here; in the other in the longer runs, and in both in `faults/`.
DEATHS = [
    ("embedded", ("dispatch.marked", "worker.popped", "worker.computed")),
    ("cluster", ("dispatch.sent", "worker.claimed", "worker.committed")),
    ("cluster", ("dispatch.forgotten", "worker.died", "dispatch.reclaimed")),
    ("embedded", ("worker.popped", "dispatch.unpublished", "worker.reported")),
]


@pytest.mark.parametrize(
    "kind, points",
    [
        pytest.param(kind, points, marks=() if kind == first else pytest.mark.slow)
        for first, points in DEATHS
        for kind in KINDS
    ],
)
def test_a_process_that_dies_at_any_point_of_a_jobs_way_loses_no_job(
    kind: str, points: tuple[str, ...], tmp_path: Path
) -> None:
    with a_lab(kind, LOST_AFTER=LOST_AFTER, CRASH_AT=",".join(points), CRASH_ONCE=str(tmp_path)) as lab:
        lab.submit("points", *mixture(lab, 1, sleeps=20), lab.entry("diagnostics.crash", {"by": "SIGSEGV"}))
        if "dispatch.reclaimed" in points:  # only what a worker holds that stands still, and has no successor
            until((tmp_path / "worker.died").exists, what="the worker to die")
            worker = until(lambda: at_work(lab), what="the next worker")
            os.kill(worker, signal.SIGSTOP)
            try:
                until((tmp_path / "dispatch.reclaimed").exists, what="the dispatcher to take back")
            finally:
                os.kill(worker, signal.SIGCONT)
        lab.wait("points")
        assert {mark.name for mark in tmp_path.iterdir()} == set(points), "a point was not reached"
        ends = {"diagnostics.crash": ["failed:crash"]}
        assert lab.violations("points", ends=lambda r: ends.get(r.method, ["done"]), takeover=True) == []


def test_every_point_where_a_process_can_be_made_to_die_is_tried() -> None:
    tried = {"submit.arriving", "submit.opened", "dispatch.marked", "dispatch.sent"}
    tried |= {"worker.popped", "worker.claimed", "worker.computed", "worker.committed"}
    tried |= {"dispatch.forgotten", "dispatch.reclaimed", "dispatch.unpublished", "worker.died", "worker.reported"}
    tried |= {"import.arriving", "import.opened"}  # by test_transfer
    assert tried == set(faults.POINTS)


@pytest.mark.parametrize("kind, accident", [("embedded", "worker killed"), ("cluster", "redis wiped")])
def test_without_the_reconciler_jobs_are_missed_and_the_oracle_says_so(accident: str, kind: str) -> None:
    with a_lab(kind, LOST_AFTER=LOST_AFTER, WITHOUT="reconciler") as lab:
        lab.submit("missed", *mixture(lab, 1, sleeps=60))
        under_way(lab, 1, jobs=2)
        if accident == "worker killed":
            lab.restarted("worker", lab.kill("worker"))
        else:
            # While the dispatcher cannot publish, so that messages of published chunks do lie in Redis.
            queue = dispatching.key_prefix(lab.database) + dispatching.QUEUE
            until(lambda: broker(lab).llen(queue) > 0 and broker(lab).flushall())
        time.sleep(8.0)
        assert not lab.progress("missed").over
        assert any("never ended" in one for one in lab.violations("missed"))


#: Two workers, one chunk: the first is given up, the second runs it, the first wakes and commits another result.
LATE = """
import json, sys
from pathlib import Path
from netassay.settings import settings
from netassay.store import dispatching, reading, running
from netassay.store.database import Database
from producer import submission
from sqlalchemy import text

database = Database(settings().store_url)
database.prepare()
submission.submit(Path({path!r}), settings())
first, second = (running.sign_on(database, name, "host", 1, 1) for name in ("first", "second"))
batch = dispatching.OpenBatch(1, "late", 1.0)

def publish():
    with database.write() as connection:
        return dispatching.publish_next(connection, batch, 1).chunk_id

def finish(worker, claim, result):
    outcomes = [running.Outcome(task.id, "done", result=json.dumps(dict(value=result))) for task in claim.tasks]
    try:
        running.finish(database, worker, claim, outcomes)
        return "kept"
    except running.StaleToken:
        return "refused"

asleep = running.claim(database, first, publish())
assert dispatching.reclaim(database, first, dispatching_counter(first)) == 1
taken = running.claim(database, second, publish())
assert taken.chunk_id == asleep.chunk_id and taken.token != asleep.token
print(finish(second, taken, 2), finish(first, asleep, 1))
with database.read() as connection:
    row = connection.execute(text("SELECT result, worker_id FROM record")).one()
print(json.loads(row.result)["value"], row.worker_id == second)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guards_off, said", [("", "kept refused 2 True"), ("fence", "kept kept 1 False")])
def test_a_late_writer_is_refused_and_only_the_fence_does_it(
    guards_off: str, said: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "late.yaml"
    path.write_text("name: late\njobs: [{method: diagnostics.echo, params: {value: 1}}]\n")
    counter = (
        "def dispatching_counter(worker):\n"
        "    with database.read() as connection:\n"
        "        return next(w.counter for w in dispatching.alive_workers(connection) if w.id == worker)\n"
    )
    script = LATE.format(path=str(path)).replace("\nasleep", "\n" + counter + "asleep")
    with a_lab(kind, start=False) as lab:
        done = in_python(script, lab, WITHOUT=guards_off)
    assert done.stdout.split() == said.split(), done.stderr


def test_progress_of_a_batch_is_seen_while_it_runs(lab: Lab) -> None:
    """The oracle's own tooth: it says of jobs on their way that they have not ended."""
    lab.submit("seen", lab.entry("diagnostics.sleep", {"seconds": 3.0}, grid={"tag": {"range": [90_000, 90_004]}}))
    assert len([one for one in lab.violations("seen") if "never ended" in one]) == 4
    lab.wait("seen")
    assert lab.violations("seen") == []
    assert reading.progress(lab.database, "seen").done == 4
