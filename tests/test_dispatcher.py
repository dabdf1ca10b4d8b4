"""The dispatcher keeps Redis small and just, and nothing is lost whatever happens to Redis, workers or itself."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import services
from sqlalchemy import Connection, text
from store_by_hand import (
    audit,
    audit_at_rest,
    done,
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

from netassay import disk, faults
from netassay.job import Segment
from netassay.settings import Settings
from netassay.store import control, dispatching, reading, running
from netassay.store.database import Database, StoreError
from netassay.store.running import StaleToken
from producer import dispatch
from producer.dispatch import (
    CHUNKS_A_SLOT,
    OVERTAKEN_SECONDS,
    PASS_CHUNKS,
    UNCLAIMED_SECONDS,
    UNFIT_SECONDS,
    BrokerDown,
    Dispatcher,
)


@dataclass
class ListBroker:
    """A list in memory that can be down, lose a message, or be wiped."""

    messages: deque[dispatching.Message] = field(default_factory=deque)
    number: int | None = None
    down: bool = False
    sent: list[dispatching.Message] = field(default_factory=list)
    longest: int = 0

    def _answer(self) -> None:
        if self.down:
            raise BrokerDown("no route to Redis")

    def send(self, messages: list[dispatching.Message]) -> None:
        self._answer()
        self.messages.extend(messages)
        self.sent += messages
        self.longest = max(self.longest, len(self.messages))

    def waiting(self) -> int:
        self._answer()
        return len(self.messages)

    def remembered(self) -> int | None:
        self._answer()
        return self.number

    def remember(self, incarnation: int) -> None:
        self._answer()
        self.number = incarnation

    def wipe(self) -> None:
        self.messages.clear()
        self.number = None


class Lab:
    """A store, a broker and a clock that only moves when told to; dispatchers and workers are stepped by hand."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.broker = ListBroker()
        self.now = 1000.0
        self.dispatcher = self.another_dispatcher()

    def another_dispatcher(self) -> Dispatcher:
        return Dispatcher(self.database, self.broker, clock=lambda: self.now)

    def one_pass(self) -> bool:
        return self.dispatcher.one_pass()

    def settle(self, passes: int = 3) -> None:
        """Passes without time, until the broker is full."""
        for _ in range(passes):
            self.dispatcher.one_pass()

    def wait(self, seconds: float, *alive: int, step: float = 0.5) -> None:
        """Let time pass, the dispatcher looking on, these workers renewing."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + step, end)
            for worker in alive:
                running.renew(self.database, worker, {})
            self.dispatcher.one_pass()

    def pop(self, worker: int) -> running.Claim | None:
        return running.claim(self.database, worker, self.broker.messages.popleft().chunk_id)

    def work(self, worker: int, most: int = 10**9) -> list[int]:
        """Take and run what the broker holds. Returns the numbers of the jobs."""
        ran: list[int] = []
        while self.broker.messages and most > 0:
            most -= 1
            claim = self.pop(worker)
            if claim is not None:
                ran += [number_of(task) for task in claim.tasks]
                finish(self.database, worker, claim)
        return ran

    def run_dry(self, *workers: int) -> list[int]:
        """Dispatch and run until everything open is finished."""
        ran: list[int] = []
        for _ in range(400):
            self.now += 1.0
            for worker in workers:
                running.renew(self.database, worker, {})
            self.dispatcher.one_pass()
            ran += self.work(workers[0])
            if all(seen.state != "open" for seen in reading.batches(self.database)):
                audit_at_rest(self.database)
                return ran
        raise AssertionError(f"never finished: {reading.batches(self.database)}")


@pytest.fixture(params=services.STORES)
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with services.new_store(request.param, tmp_path) as database:
        yield Lab(database)


def sizes(lab: Lab) -> list[int]:
    """Jobs of each message sent, in order."""
    found = dict(rows(lab.database, "SELECT id, stop - start FROM chunk"))
    return [found[message.chunk_id] for message in lab.broker.sent]


# What is published, and when


@pytest.mark.parametrize("slots", [1, 4])
def test_never_more_than_two_chunks_a_slot_are_published(lab: Lab, slots: int) -> None:
    worker = sign_on(lab.database, slots=slots)
    submit(lab.database, "a", jobs(range(200), seconds=0.5))
    submit(lab.database, "b", jobs(range(200, 260), seconds=0.5))
    ran = []
    for _ in range(30):
        lab.now += 0.1
        lab.one_pass()
        lab.one_pass()
        ((published,),) = rows(lab.database, "SELECT count(*) FROM chunk WHERE state = 'published'")
        assert published <= CHUNKS_A_SLOT * slots
        ran += lab.work(worker, most=1)
    assert lab.broker.longest == CHUNKS_A_SLOT * slots
    assert len(ran) > 30
    audit(lab.database)


def test_two_dispatchers_at_once_do_not_exceed_the_bound(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_on(lab.database, slots=2)
    lab.settle()
    submit(lab.database, "a", jobs(range(100), seconds=1.1))
    rival = Dispatcher(
        Database(lab.database.url.render_as_string(hide_password=False)), lab.broker, clock=lambda: lab.now
    )
    read = dispatching.open_batches

    def overtaken_by_the_rival(connection: Connection, offered: dispatching.Offer) -> list[dispatching.OpenBatch]:
        found = read(connection, offered)
        monkeypatch.setattr(dispatching, "open_batches", read)
        assert rival.one_pass()
        return found

    monkeypatch.setattr(dispatching, "open_batches", overtaken_by_the_rival)
    lab.one_pass()
    assert len(lab.broker.sent) == CHUNKS_A_SLOT * 2
    assert rows(lab.database, "SELECT count(*) FROM chunk WHERE state = 'published'") == [(CHUNKS_A_SLOT * 2,)]


def test_many_slots_are_served_in_several_transactions_with_room_for_workers_in_between(lab: Lab) -> None:
    worker = sign_on(lab.database, slots=3 * PASS_CHUNKS)
    submit(lab.database, "a", jobs(range(2000), seconds=2.0))
    waiting = []
    for _ in range(5):
        lab.one_pass()
        running.renew(lab.database, worker, {})
        waiting.append(len(lab.broker.messages))
    assert waiting == [PASS_CHUNKS, 2 * PASS_CHUNKS, 3 * PASS_CHUNKS, 3 * PASS_CHUNKS, 3 * PASS_CHUNKS]


@pytest.mark.parametrize("slots", [1, 3])
def test_long_chunks_wait_in_redis_one_a_slot(lab: Lab, slots: int) -> None:
    """What waits there is what a newcomer has to wait for."""
    sign_on(lab.database, slots=slots)
    submit(lab.database, "a", jobs(range(100), seconds=60.0))
    lab.settle()
    assert len(lab.broker.sent) == slots


def test_with_no_worker_yet_little_is_published(lab: Lab) -> None:
    submit(lab.database, "a", jobs(range(100), seconds=1.5))
    lab.settle()
    assert len(lab.broker.sent) == CHUNKS_A_SLOT


def test_the_first_job_of_each_segment_goes_alone_and_first(lab: Lab) -> None:
    sign_on(lab.database, slots=4)
    submit(
        lab.database,
        "a",
        jobs(range(50), group="f.onnx"),
        jobs(range(50, 90), group="g.onnx"),
        jobs(range(90, 95), method="lipschitz.local_bound"),
    )
    lab.settle()
    assert [message.label for message in lab.broker.sent[:4]] == [
        "a / diagnostics.echo on f.onnx / 0..0",
        "a / diagnostics.echo on g.onnx / 50..50",
        "a / lipschitz.local_bound / 90..90",
        lab.broker.sent[3].label,
    ]
    assert sizes(lab)[:3] == [1, 1, 1]
    assert sizes(lab)[3] > 1


@pytest.mark.parametrize(
    ("seconds", "group_size", "expected"),
    [(0.01, 1, 200), (0.01, 64, 192), (0.5, 1, 4), (0.5, 64, 4), (1.9, 1, 1), (1e-9, 1, dispatching.CHUNK_JOBS)],
)
def test_a_chunk_takes_two_seconds_and_holds_whole_groups(
    lab: Lab, seconds: float, group_size: int, expected: int
) -> None:
    sign_on(lab.database, slots=2)
    count = min(40_000, 10 * expected + 100) if seconds > 1e-6 else 20_001
    submit(lab.database, "a", jobs(range(count), seconds=seconds, group_size=group_size))
    lab.settle()
    assert sizes(lab)[:3] == [1, expected, expected if seconds > 1e-6 else 10_000]
    assert lab.broker.sent[1].seconds == pytest.approx(expected * seconds)


def test_a_watch_tells_of_each_write_by_others_once_and_of_no_reading(lab: Lab) -> None:
    changed = lab.database.watch()
    if changed is None:
        assert not lab.database.sqlite
        return
    assert [changed(), changed()] == [True, False]
    submit(lab.database, "a", jobs(range(3)))
    assert [changed(), changed()] == [True, False]
    publish(lab.database)
    assert changed()
    reading.batches(lab.database)
    assert not changed()


def test_a_dispatcher_at_rest_publishes_a_new_batch_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "UNCHANGED_PAUSE", 3600.0)  # nothing but the change can wake it
    broker = ListBroker()
    monkeypatch.setattr(dispatch, "CeleryBroker", lambda url, prefix: broker)
    with services.new_store("sqlite", tmp_path) as database:
        stop = threading.Event()
        config = Settings(home=tmp_path, store=database.url.render_as_string())
        serving = threading.Thread(target=dispatch.serve, args=(config, stop))
        serving.start()
        try:
            time.sleep(0.5)
            submit(database, "a", jobs(range(3)))
            deadline = time.monotonic() + 30
            while not broker.sent and time.monotonic() < deadline:
                time.sleep(0.01)
            assert broker.sent
        finally:
            stop.set()
            serving.join()


def test_what_a_method_took_corrects_what_it_predicts_for_jobs_of_another_size(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "small", jobs([0], seconds=0.001))
    claim = take(lab.database, worker)
    running.finish(lab.database, worker, claim, [done(task) for task in claim.tasks], seconds_a_job=0.002)
    # Twice its prediction, so a second each: two to a chunk, and not a thousand as of those that were measured.
    submit(lab.database, "large", jobs(range(1, 40), seconds=0.5))
    first, second = publish(lab.database, slots=2)[:2]
    assert (first.seconds, second.seconds) == pytest.approx((1.0, 2.0))


def test_a_prediction_of_nothing_does_not_make_its_method_seem_a_thousand_times_slower(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "none", jobs([0], seconds=0.0))
    claim = take(lab.database, worker)
    running.finish(lab.database, worker, claim, [done(task) for task in claim.tasks], seconds_a_job=0.001)
    submit(lab.database, "large", jobs(range(1, 40), seconds=0.5))
    assert publish(lab.database, slots=2)[0].seconds == pytest.approx(0.5)


def test_measured_timings_replace_the_hint_in_this_batch_and_the_next(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(1000), seconds=2.0))
    submit(lab.database, "b", jobs(range(1000, 1500), seconds=2.0))
    (message,) = publish(lab.database, most=1)
    claim = running.claim(lab.database, worker, message.chunk_id)
    assert claim is not None
    running.finish(lab.database, worker, claim, [done(task) for task in claim.tasks], seconds_a_job=0.1)

    messages = publish(lab.database, slots=2)

    chunk = dict(rows(lab.database, "SELECT id, stop - start FROM chunk"))
    of = {name: [chunk[m.chunk_id] for m in messages if m.label.startswith(name)] for name in ("a", "b")}
    assert of["a"][0] == 20
    assert of["b"][:2] == [1, 20]


def test_a_given_back_range_that_proved_slow_is_cut_smaller(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(101), seconds=0.02))
    for message in publish(lab.database, most=2):
        claim = running.claim(lab.database, worker, message.chunk_id)
        assert claim is not None
        running.finish(lab.database, worker, claim, [done(task) for task in claim.tasks[:1]], seconds_a_job=1.0)
    messages = publish(lab.database)
    assert {message.seconds for message in messages} <= {1.0, 2.0}
    audit(lab.database)
    assert jobs_in(lab.database, "published") == 99


def test_what_a_split_range_leaves_stays_in_one_piece(lab: Lab) -> None:
    submit(lab.database, "a", jobs(range(3)), jobs(range(10, 1011), seconds=0.002))
    publish(lab.database)
    ((segment,),) = rows(lab.database, "SELECT max(id) FROM segment")
    with lab.database.write() as connection:
        connection.exec_driver_sql("UPDATE chunk SET state = 'ready' WHERE state = 'published'")
        connection.exec_driver_sql(f"UPDATE segment SET seconds = 1.0 WHERE id = {segment}")
    before = rows(lab.database, f"SELECT stop - start FROM chunk WHERE segment_id = {segment} ORDER BY id")
    assert before == [(1,), (1000,)]
    publish(lab.database, most=4)
    after = rows(lab.database, f"SELECT stop - start FROM chunk WHERE segment_id = {segment} ORDER BY id")
    assert after == [(1,), (2,), (998,)]
    audit(lab.database)


@pytest.mark.parametrize("slots", [3, 8])
def test_the_end_of_a_segment_is_dealt_out_evenly(lab: Lab, slots: int) -> None:
    count = 301
    submit(lab.database, "a", jobs(range(count), seconds=0.1))
    messages = publish(lab.database, slots=slots)
    cut = dict(rows(lab.database, "SELECT id, stop - start FROM chunk"))
    dealt = [cut[message.chunk_id] for message in messages]
    assert sum(dealt) == count
    left = count
    for size in dealt[1:]:
        left -= 1 if left == count else 0
        assert size <= 20
        if left <= 20 * slots and left > 2:  # below 0.2 s there is nothing to share
            assert size <= -(-left // slots), "one slot works while the others idle"
        left -= size


def test_the_end_of_a_grouped_segment_keeps_whole_groups_where_all_slots_stay_busy(lab: Lab) -> None:
    submit(lab.database, "a", jobs(range(1 + 16 * 12), seconds=0.1, group_size=16))
    messages = publish(lab.database, slots=4)
    cut = dict(rows(lab.database, "SELECT id, stop - start FROM chunk"))
    dealt = [cut[message.chunk_id] for message in messages]
    whole = [size for size in dealt[1:] if size == 16]
    assert len(whole) >= 8
    assert sum(dealt) == 193
    assert all(size <= 16 for size in dealt)


def test_shares_follow_the_weights(lab: Lab) -> None:
    worker = sign_on(lab.database)
    weights = {"light": 1.0, "middle": 2.0, "heavy": 5.0}
    for place, (name, weight) in enumerate(weights.items()):
        # The chunks differ in jobs, by method timing, but the share is one of time.
        numbers = range(2000 * place, 2000 * place + 600)
        submit(lab.database, name, jobs(numbers, method=f"m.{name}", seconds=1.0 / (1 + place)), weight=weight)
    for _ in range(160):
        lab.one_pass()
        lab.work(worker, most=1)
    seconds = Counter()
    for message in lab.broker.sent:
        seconds[message.label.split(" /")[0]] += message.seconds
    total, all_weights = sum(seconds.values()), sum(weights.values())
    for name, weight in weights.items():
        assert seconds[name] / total == pytest.approx(weight / all_weights, rel=0.1)


def seconds_by(lab: Lab, owner: dict[str, str]) -> Counter[str]:
    """Seconds of work that were published for each owner of batches."""
    found: Counter[str] = Counter()
    for message in lab.broker.sent:
        found[owner[message.label.split(" /")[0]]] += message.seconds
    return found


def test_a_submitter_of_many_batches_gets_no_more_than_one_of_a_single_batch(lab: Lab) -> None:
    worker = sign_on(lab.database)
    owner = {f"ada-{number}": "ada" for number in range(8)} | {"grace-0": "grace"}
    for place, (name, submitter) in enumerate(owner.items()):
        submit(lab.database, name, jobs(range(4000 * place, 4000 * place + 4000)), submitter=submitter)
    for _ in range(160):
        lab.one_pass()
        lab.work(worker, most=1)
    found = seconds_by(lab, owner)
    assert found["ada"] == pytest.approx(found["grace"], rel=0.1)


def test_shares_of_submitters_follow_their_weights_and_batches_theirs_within(lab: Lab) -> None:
    worker = sign_on(lab.database)
    weights = {"ada-1": 1.0, "ada-3": 3.0, "grace": 1.0}
    owner = {name: name.partition("-")[0] for name in weights}
    control.set_share(lab.database, "grace", 2.0)
    assert control.shares(lab.database) == {"grace": 2.0}
    for place, (name, weight) in enumerate(weights.items()):
        numbers = range(4000 * place, 4000 * place + 4000)
        submit(lab.database, name, jobs(numbers), weight=weight, submitter=owner[name])
    assert control.shares(lab.database) == {"ada": 1.0, "grace": 2.0}
    for _ in range(160):
        lab.one_pass()
        lab.work(worker, most=1)
    found = seconds_by(lab, owner)
    assert found["grace"] / found["ada"] == pytest.approx(2.0, rel=0.1)
    mine = seconds_by(lab, {name: name for name in weights})
    assert mine["ada-3"] / mine["ada-1"] == pytest.approx(3.0, rel=0.15)
    control.set_share(lab.database, "grace", 1.0)
    assert rows(lab.database, "SELECT count(*) FROM submitter") == [(0,)], "1 is usual, and needs no row"


# What no worker can run


def needing(numbers: range, memory: int) -> Segment:
    return replace(jobs(numbers), memory_limit=memory)


def test_jobs_that_fit_no_worker_are_not_published_and_the_others_go_on(lab: Lab) -> None:
    small = sign_on(lab.database, "small", memory=8 << 30)
    submit(lab.database, "a", needing(range(5), 15 << 30), jobs(range(5, 9)))
    for _ in range(10):
        lab.one_pass()
        assert set(lab.work(small)) <= {5, 6, 7, 8}
    assert reading.progress(lab.database, "a").done == 4
    large = sign_on(lab.database, "large", memory=16 << 30)
    assert sorted(lab.run_dry(large, small)) == [0, 1, 2, 3, 4]


def test_a_batch_of_which_only_what_fits_nobody_is_left_pauses_itself_and_says_what_is_missing(lab: Lab) -> None:
    worker = sign_on(lab.database, "small", memory=8 << 30)
    submit(lab.database, "a", needing(range(5), 15 << 30))
    for _ in range(int(UNFIT_SECONDS) - 2):
        lab.now += 1.0
        running.renew(lab.database, worker, {})
        lab.one_pass()
        assert reading.progress(lab.database, "a").state == "open", "a worker that has more may be restarting"
    for _ in range(4):
        lab.now += 1.0
        running.renew(lab.database, worker, {})
        lab.one_pass()
    seen = reading.progress(lab.database, "a")
    assert (seen.state, lab.broker.sent) == ("paused", [])
    assert "may use 16.1 GB, the slots of the largest worker 8.6 GB" in seen.reason
    assert control.resume(lab.database, "a")
    assert len(lab.run_dry(sign_on(lab.database, "large", memory=16 << 30), worker)) == 5


def test_without_any_worker_nothing_is_found_unfit(lab: Lab) -> None:
    submit(lab.database, "a", needing(range(5), 15 << 30))
    for _ in range(30):
        lab.now += 1.0
        lab.one_pass()
    assert reading.progress(lab.database, "a").state == "open"


def test_a_method_that_every_worker_lacks_is_not_published_until_one_has_it(lab: Lab) -> None:
    old, older = sign_on(lab.database, "old"), sign_on(lab.database, "older")
    submit(lab.database, "a", jobs(range(3), method="new.method"), jobs(range(3, 6)))
    ((method,),) = rows(lab.database, "SELECT id FROM method_version WHERE name = 'new.method'")
    running.lacks(lab.database, old, method, "version 1 of new.method is not here")
    lab.one_pass()
    assert any("new.method" in message.label for message in lab.broker.sent), "the other one may have it"
    running.lacks(lab.database, older, method, "version 1 of new.method is not here")
    lab.broker.wipe()
    lab.broker.sent.clear()
    for _ in range(int(UNFIT_SECONDS) + 5):
        lab.now += 1.0
        for worker in (old, older):
            running.renew(lab.database, worker, {})
        lab.one_pass()
        lab.work(old)
    assert not any("new.method" in message.label for message in lab.broker.sent)
    seen = reading.progress(lab.database, "a")
    assert (seen.done, seen.state) == (3, "paused")
    assert "version 1 of new.method is not here" in seen.reason
    control.resume(lab.database, "a")
    assert sorted(lab.run_dry(older, old)) == [0, 1, 2]


def test_a_store_that_was_upgraded_ends_the_dispatcher_and_refuses_its_workers(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(3)))
    lab.settle()
    message = lab.broker.messages[0]
    with lab.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="was upgraded to schema 9999, this program knows"):
        lab.one_pass()
    assert running.claim(lab.database, worker, message.chunk_id) is None
    renewal = running.renew(lab.database, worker, {})
    assert (renewal.lost, renewal.schema) == (True, "9999")


def test_nothing_is_published_while_the_disk_of_the_store_is_short(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(3)))
    monkeypatch.setattr(disk, "RESERVE_SHARE", 2.0)
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 60)
    for _ in range(3):
        lab.one_pass()
    if lab.database.sqlite:
        assert lab.broker.sent == []
    monkeypatch.undo()
    assert len(lab.run_dry(worker)) == 3


def test_ten_jobs_behind_a_huge_batch_are_served_within_four_chunks(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "huge", jobs(range(5000), seconds=0.5))
    for _ in range(60):
        lab.one_pass()
        lab.work(worker, most=1)
    submit(lab.database, "small", jobs(range(10_000, 10_010), seconds=0.01))
    before = len(lab.broker.sent)
    while sum(message.label.startswith("small") for message in lab.broker.sent) < 1:
        assert len(lab.broker.sent) - before < 4
        lab.work(worker, most=1)
        lab.one_pass()
    for _ in range(8):
        lab.work(worker, most=1)
        lab.one_pass()
    assert recount(lab.database, "small") == (10, 0, 0)
    # And it was not given all the time before it came, either.
    after = [message.label.split(" /")[0] for message in lab.broker.sent[before:]]
    assert after.count("huge") >= after.count("small")


def test_a_newcomer_goes_first_with_its_rest_right_behind_its_first_job(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "huge", jobs(range(5000), seconds=0.003))
    for _ in range(10):
        lab.one_pass()
        lab.work(worker, most=1)
    lab.settle()
    submit(lab.database, "small", jobs(range(10_000, 10_010), seconds=0.01))
    before = len(lab.broker.sent)
    lab.work(worker)
    lab.one_pass()
    assert [message.label for message in lab.broker.sent[before : before + 2]] == [
        "small / diagnostics.echo / 0..0",
        "small / diagnostics.echo / 1..9",
    ]


def test_one_newcomer_after_another_does_not_starve_a_batch_that_was_there(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "old", jobs(range(1000), seconds=2.0))
    lab.settle()
    for number in range(40):
        submit(lab.database, f"new{number}", jobs([10_000 + number], seconds=2.0))
        lab.work(worker, most=1)
        lab.one_pass()
    shares = Counter(message.label.startswith("old") for message in lab.broker.sent)
    # It has its share among those that wait, which grow more with each of its own turns: the 1st, 5th, 11th, 17th ...
    assert shares[True] >= 6


@pytest.mark.parametrize("slots", [1, 3])
def test_chunks_a_little_short_of_two_seconds_wait_one_a_slot_too(lab: Lab, slots: int) -> None:
    """As nearly all are: they hold whole jobs."""
    worker = sign_on(lab.database, slots=slots)
    submit(lab.database, "a", jobs(range(100_000), seconds=0.0011))
    lab.settle()
    lab.work(worker)
    lab.settle()
    waiting = {message.chunk_id for message in lab.broker.messages}
    cut = rows(lab.database, "SELECT id, stop - start FROM chunk")
    assert [size for chunk, size in cut if chunk in waiting] == [1818] * slots


def test_a_paused_batch_gives_its_place_to_the_others(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(100), seconds=1.0))
    submit(lab.database, "b", jobs(range(100, 200), seconds=1.0))
    lab.settle()
    control.pause(lab.database, "a")
    before = len(lab.broker.sent)
    for _ in range(20):
        lab.work(worker, most=1)
        lab.one_pass()
    assert {message.label[0] for message in lab.broker.sent[before:]} == {"b"}
    ((started,),) = rows(
        lab.database,
        "SELECT count(*) FROM chunk c JOIN batch b ON b.id = c.batch_id"
        " WHERE b.name = 'a' AND c.state IN ('claimed', 'finished')",
    )
    assert started == 0


# Housekeeping


def test_hopeless_and_finished_batches_are_noticed_within_a_second(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "bad", jobs(range(30), seconds=2.0))
    submit(lab.database, "good", jobs(range(50, 55)))
    for _ in range(40):
        lab.now += 0.5
        running.renew(lab.database, worker, {})
        lab.one_pass()
        while lab.broker.messages:
            claim = lab.pop(worker)
            if claim is not None:
                finish(lab.database, worker, claim, lambda t: failed("error")(t) if number_of(t) < 50 else done(t))
    assert reading.progress(lab.database, "bad").state == "paused"
    assert (
        20 <= reading.progress(lab.database, "bad").failed <= 20 + 3 * CHUNKS_A_SLOT
    )  # what a second of passes brings
    assert rows(lab.database, "SELECT state FROM batch WHERE name = 'good'") == [("finished",)]


def test_what_waits_is_looked_through_a_tenth_of_the_time_at_most(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def slowly(database: Database) -> int:
        looked.append(lab.now)
        lab.now += 0.3
        return 0

    monkeypatch.setattr(dispatching, "settle_needs", slowly)
    submit(lab.database, "a", jobs([1]))
    for _ in range(100):
        lab.now += 0.02
        lab.one_pass()
    assert not looked, "nothing waits"
    with lab.database.write() as connection:
        connection.execute(text("UPDATE segment SET waiting = 1"))
    for _ in range(1000):
        lab.now += 0.02
        lab.one_pass()
    assert len(looked) >= 6
    assert min(after - before for before, after in itertools.pairwise(looked)) >= 3.0 - 1e-9
    assert max(after - before for before, after in itertools.pairwise(looked)) <= 3.0 + 0.03


def test_a_blocked_chunk_runs_when_the_other_batch_is_done_with_its_jobs(lab: Lab) -> None:
    one, other = sign_on(lab.database, "one"), sign_on(lab.database, "other")
    submit(lab.database, "a", jobs([1]))
    submit(lab.database, "b", jobs([1]))
    lab.settle()
    held = lab.pop(one)
    assert held is not None
    assert lab.work(other) == []
    lab.wait(3.0, one, other)
    assert not lab.broker.messages
    finish(lab.database, one, held)
    assert lab.run_dry(other, one) == []
    assert recount(lab.database, "b") == (1, 0, 0)


# What gets lost


def test_a_lost_message_that_was_overtaken_is_published_again(lab: Lab) -> None:
    worker = sign_on(lab.database, slots=2)
    submit(lab.database, "a", jobs(range(4), seconds=2.0))
    lab.settle()
    lost = lab.broker.messages.popleft()
    lab.work(worker, most=1)  # overtakes it

    lab.wait(OVERTAKEN_SECONDS, worker)
    assert lab.broker.sent.count(lost) == 1
    lab.wait(0.6, worker)
    assert lab.broker.sent.count(lost) == 2
    assert sorted(lab.run_dry(worker)) == [0, 2, 3]


def test_the_last_message_if_lost_is_published_again_once_the_list_is_empty(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(2), seconds=1.5))
    lab.settle()
    lost = lab.broker.messages.pop()
    kept = lab.broker.messages.popleft()
    lab.broker.messages.append(kept)

    lab.wait(2 * UNCLAIMED_SECONDS, worker)
    assert lab.broker.sent.count(lost) == 1, "the list is not empty: it may be in it"
    lab.broker.messages.clear()  # both are lost now
    lab.wait(0.5, worker)
    assert (lab.broker.sent.count(kept), lab.broker.sent.count(lost)) == (2, 2)
    assert sorted(lab.run_dry(worker)) == [0, 1]


def test_unclaimed_messages_are_not_published_again_while_there_is_no_worker(lab: Lab) -> None:
    submit(lab.database, "a", jobs(range(5), seconds=1.5))
    lab.settle()
    lab.broker.messages.clear()
    lab.wait(60.0)
    assert len(lab.broker.sent) == CHUNKS_A_SLOT
    assert sorted(lab.run_dry(sign_on(lab.database))) == list(range(5))


def test_a_doubled_message_runs_once(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(6), seconds=1.0))
    ran = []
    for _ in range(10):
        lab.one_pass()
        lab.broker.messages.extend(list(lab.broker.messages))
        ran += lab.work(worker)
    assert sorted(ran) == list(range(6))
    audit_at_rest(lab.database)


def test_after_a_wipe_of_redis_everything_published_is_published_again(lab: Lab) -> None:
    worker = sign_on(lab.database, slots=2)
    submit(lab.database, "a", jobs(range(20), seconds=2.0))
    lab.settle()
    first = [message.chunk_id for message in lab.broker.sent]
    lab.broker.wipe()

    lab.settle()

    assert sorted(message.chunk_id for message in lab.broker.sent[len(first) :]) == sorted(first)
    assert lab.broker.remembered() == rows(lab.database, "SELECT value FROM lab WHERE name = 'incarnation'")[0][0]
    lab.settle()
    assert len(lab.broker.sent) == 2 * len(first), "once is enough"
    assert sorted(lab.run_dry(worker)) == list(range(20))


def test_while_redis_is_down_nothing_is_lost(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(8), seconds=1.0))
    lab.settle()
    lab.broker.down = True
    assert lab.work(worker)
    for _ in range(10):
        lab.now += 1.0
        with pytest.raises(BrokerDown):
            lab.one_pass()
        running.renew(lab.database, worker, {})
    submit(lab.database, "b", jobs(range(8, 12)))  # submission does not need Redis

    lab.broker.down = False
    lab.run_dry(worker)
    assert (recount(lab.database, "a"), recount(lab.database, "b")) == ((8, 0, 0), (4, 0, 0))


def test_a_broker_that_fails_in_the_middle_of_a_send_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(8), seconds=1.0))
    lab.settle()
    lab.work(worker)

    def half(messages: list[dispatching.Message]) -> None:
        lab.broker.messages.append(messages[0])
        raise BrokerDown("connection reset")

    with monkeypatch.context() as patched:
        patched.setattr(lab.broker, "send", half)
        with pytest.raises(BrokerDown):
            lab.one_pass()
    audit(lab.database)
    assert rows(lab.database, "SELECT count(*) FROM chunk WHERE state = 'published'") == [(0,)]
    lab.run_dry(worker)
    assert recount(lab.database, "a") == (8, 0, 0)


@pytest.mark.parametrize("point", ["dispatch.marked", "dispatch.sent"])
def test_a_dispatcher_that_dies_at_a_crash_point_loses_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    class Died(BaseException):
        pass

    def reach(here: str) -> None:
        if here == point:
            raise Died

    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs(range(12), seconds=1.0))
    ran = []
    for _ in range(4):
        with monkeypatch.context() as patched:
            patched.setattr(faults, "reach", reach)
            for _ in range(3):  # the pass that finds Redis empty publishes nothing
                try:
                    lab.one_pass()
                except Died:
                    break
        ran += lab.work(worker)
        lab.dispatcher = lab.another_dispatcher()
        lab.now += 1.0
    assert bool(lab.broker.sent) is (point == "dispatch.sent")
    ran += lab.run_dry(worker)
    assert sorted(ran) == list(range(12))


def test_two_dispatchers_in_turn_publish_nothing_twice_and_lose_nothing(lab: Lab) -> None:
    worker = sign_on(lab.database, slots=2)
    submit(lab.database, "a", jobs(range(40), seconds=1.0))
    one, other = lab.dispatcher, lab.another_dispatcher()
    ran = []
    for turn in range(120):
        lab.now += 0.2
        running.renew(lab.database, worker, {})
        lab.dispatcher = (one, other)[turn % 2]
        lab.one_pass()
        ran += lab.work(worker, most=turn % 3)
    assert sorted(ran) == list(range(40))
    assert max(Counter(message.chunk_id for message in lab.broker.sent).values()) == 1
    assert rows(lab.database, "SELECT state FROM batch") == [("finished",)]
    audit_at_rest(lab.database)


# Lost workers


def test_a_worker_whose_counter_stands_still_for_ten_seconds_is_lost(lab: Lab) -> None:
    dead, other = sign_on(lab.database, "dead"), sign_on(lab.database, "other")
    submit(lab.database, "a", jobs(range(3), seconds=2.0))
    lab.settle()
    stale = lab.pop(dead)
    assert stale is not None

    lab.wait(10.0, other)
    assert [seen.name for seen in reading.workers(lab.database)] == ["dead", "other"]
    lab.wait(1.0, other)
    assert [seen.name for seen in reading.workers(lab.database)] == ["other"]
    audit(lab.database)

    ran = lab.run_dry(other)
    assert sorted(ran) == [0, 1, 2]
    with pytest.raises(StaleToken):
        finish(lab.database, dead, stale, failed("error"))
    assert recount(lab.database, "a") == (3, 0, 0)


def test_a_worker_that_renews_is_never_lost_however_long_its_job(lab: Lab) -> None:
    worker = sign_on(lab.database)
    submit(lab.database, "a", jobs([1], seconds=300.0))
    lab.settle()
    claim = lab.pop(worker)
    assert claim is not None
    lab.wait(300.0, worker, step=1.0)
    finish(lab.database, worker, claim)
    assert recount(lab.database, "a") == (1, 0, 0)


@pytest.mark.parametrize("held", [12.0, 60.0])
def test_a_worker_that_waits_for_a_held_write_lock_is_not_lost(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, held: float
) -> None:
    worker = sign_on(lab.database)
    lab.settle()
    free_at = lab.now + held
    write = lab.database.write

    def when_free(durable: bool = False, beside: bool = False) -> AbstractContextManager[Connection]:
        lab.now = max(lab.now, free_at)
        return write(durable, beside)

    monkeypatch.setattr(lab.database, "write", when_free)
    monkeypatch.setattr("producer.dispatch.HOUSEKEEPING_SECONDS", 1e9)  # else that waits for the lock first
    while lab.now < free_at:
        lab.now += 0.5
        lab.one_pass()
    for _ in range(3):  # the lock is free, but the dispatcher is quicker than the worker
        lab.now += 0.5
        lab.one_pass()
    assert not running.renew(lab.database, worker, {}).lost
    lab.wait(5.0)
    assert not running.renew(lab.database, worker, {}).lost, "the sign of life counts like any other"
    lab.wait(11.0)
    assert reading.workers(lab.database) == [], "and the dead are noticed as before"


@pytest.mark.parametrize("lost_after", [1.0, 4.0, 10.0])
def test_the_look_at_the_lock_does_not_delay_the_loss(lab: Lab, lost_after: float) -> None:
    sign_on(lab.database)
    lab.dispatcher.lost_after = lost_after
    lab.settle()
    lab.wait(lost_after, step=0.25)
    assert len(reading.workers(lab.database)) == 1
    lab.wait(0.5, step=0.25)
    assert reading.workers(lab.database) == []


def test_a_dispatcher_that_slept_blames_no_worker(lab: Lab) -> None:
    sign_on(lab.database)
    lab.settle()
    for _ in range(20):
        lab.now += 60.0  # suspended in between, and the worker perhaps with it
        lab.one_pass()
    assert len(reading.workers(lab.database)) == 1
    lab.wait(11.0)
    assert reading.workers(lab.database) == []


def test_a_dispatcher_that_could_not_read_blames_no_worker(lab: Lab) -> None:
    sign_on(lab.database)
    lab.wait(8.0)
    lab.now += 30.0  # passes that raised an outage at their first read: they saw nothing
    lab.wait(1.5)
    assert len(reading.workers(lab.database)) == 1
    lab.wait(2.0)
    assert reading.workers(lab.database) == []


def test_time_is_counted_once_while_redis_is_down(lab: Lab) -> None:
    sign_on(lab.database)
    lab.settle()
    lab.broker.down = True
    for _ in range(18):
        lab.now += 0.5
        with pytest.raises(BrokerDown):
            lab.one_pass()
    assert len(reading.workers(lab.database)) == 1  # 9 s
    for _ in range(4):
        lab.now += 0.5
        with pytest.raises(BrokerDown):
            lab.one_pass()
    assert reading.workers(lab.database) == []  # 11 s: workers are watched without Redis, too


def test_only_the_reconciler_brings_back_what_was_lost(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "guarded", lambda guard: guard != "reconciler")
    submit(lab.database, "a", jobs(range(2), seconds=1.5))
    dead, other = sign_on(lab.database, "dead"), sign_on(lab.database, "other")
    lab.settle()
    assert lab.pop(dead) is not None
    lab.broker.messages.clear()
    lab.wait(60.0, other)
    assert not lab.broker.messages

    monkeypatch.undo()
    assert sorted(lab.run_dry(other)) == [0, 1]
