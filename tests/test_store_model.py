"""Any interleaving of submitters, dispatchers, workers and people leaves the books balanced and loses no job.

Two real dispatchers, each with a memory and a clock of its own, share a store and a broker that loses, doubles, delays
and forgets messages, and that fails in the middle of a send. Workers are stepped by hand: they claim, claim again after
a lost answer, fall silent until a dispatcher's clock gives them up, write late, write twice, and lose children. People
submit overlapping batches, append, run again, pause, cancel, retry. The search tries them in any order, and puts one
step between two transactions of another.

Without one of the guards it finds what that guard is for.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import services
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_by_hand import (
    audit,
    audit_at_rest,
    builder,
    done,
    failed,
    jobs,
    number_of,
    recount,
    rows,
    sign_on,
    submit,
)

from netassay import faults
from netassay.job import Segment
from netassay.store import control, dispatching, reading, running
from netassay.store.database import Database
from netassay.store.running import Claim, Death, Outcome, StaleToken, Task
from netassay.store.submission import NameTaken
from producer.dispatch import BrokerDown, Dispatcher

#: Jobs from this number on need the network of this recipe.
NEEDING, LAST = 6, 9
RECIPE = "recipe:" + "1" * 64
NAMES = ("a", "b", "c")
#: "" is done; the other ends are of every kind: kept, run again, an answer.
ENDS = ("", "", "", "not_applicable", "error", "time", "invalid_input")
WHICH = st.integers(0, 100)
SLOTS = st.integers(0, 1)
#: Seconds after which a silent worker is lost.
LOST_AFTER = 3.0
#: Longer between two looks, and a dispatcher does not know what happened meanwhile.
SLEPT = 2.0
#: Of the suite: half a minute for both stores. By hand, let it search for an hour.
USUAL = 60
EXAMPLES = int(os.environ.get("NETASSAY_MODEL_EXAMPLES", str(USUAL)))
STEPS = 60


def end_of(task: Task, how: str) -> Outcome:
    if task.deaths >= running.MOST_STARTS:
        return Outcome(task.id, "failed", "crash", "its process died too often")
    if how == "not_applicable":
        return Outcome(task.id, how, message="no inputs")
    return failed(how)(task) if how else done(task)


@dataclass
class Broker:
    """A list in memory, as faithless as the search likes. late: what somebody has taken and will act on, some day."""

    messages: list[dispatching.Message] = field(default_factory=list)
    late: list[dispatching.Message] = field(default_factory=list)
    number: int | None = None
    failing: str = ""

    def send(self, messages: list[dispatching.Message]) -> None:
        if self.failing:
            self.messages += messages[: len(messages) // 2]
            raise BrokerDown("the connection was reset")
        self.messages += messages

    def waiting(self) -> int:
        return len(self.messages)

    def remembered(self) -> int | None:
        if self.failing == "from the start":
            raise BrokerDown("no route to Redis")
        return self.number

    def remember(self, incarnation: int) -> None:
        self.number = incarnation

    def forget(self) -> None:
        self.messages.clear()
        self.number = None


@dataclass
class Watch:
    """A dispatcher with its clock, and for how long it has watched each worker's counter stand still: by our count."""

    dispatcher: Dispatcher
    clock: list[float]
    counters: dict[int, int] = field(default_factory=dict)
    silent: dict[int, float] = field(default_factory=dict)

    def look(self, database: Database, seconds: float) -> None:
        self.clock[0] += seconds
        for worker, counter in rows(database, "SELECT id, counter FROM worker WHERE state = 'alive'"):
            if self.counters.get(worker) != counter:
                self.counters[worker], self.silent[worker] = counter, 0.0
            elif seconds < SLEPT:
                self.silent[worker] += seconds


@dataclass
class Held:
    """What a worker believes to hold: its slot, its id then."""

    slot: int
    worker: int
    claim: Claim


@dataclass
class Asked:
    """A claim whose answer did not arrive."""

    slot: int
    worker: int
    chunk_id: int
    token: str


class Interleaving(RuleBasedStateMachine):
    store: str

    @initialize(low=st.integers(0, LAST - 1), high=st.integers(1, LAST))
    def begin(self, low: int, high: int) -> None:
        self.kept = contextlib.ExitStack()
        folder = self.kept.enter_context(tempfile.TemporaryDirectory(prefix="netassay-model-"))
        self.database = self.kept.enter_context(services.new_store(type(self).store, Path(folder)))
        self.workers = [sign_on(self.database, "w0"), sign_on(self.database, "w1")]
        self.broker = Broker()
        self.watches = [self.new_watch(1000.0), self.new_watch(5.0)]
        self.held: list[Held] = []
        self.asked: list[Asked] = []
        self.finished: list[Held] = []
        self.void: set[str] = set()  # tokens of claims that were taken over
        self.lost: set[int] = set()  # workers that were given up and may not know it
        self.answers: dict[int, str] = {}
        self.submit("a", low, LAST, False, 9)
        self.submit("b", 0, high, False, 9)

    def new_watch(self, now: float) -> Watch:
        clock = [now]
        return Watch(Dispatcher(self.database, self.broker, LOST_AFTER, clock=lambda: clock[0]), clock)

    # One step between two transactions of another

    @contextlib.contextmanager
    def interrupted(self, after: int, act: Callable[[], object]) -> Iterator[None]:
        """Within the block, `act` comes before the write that follows `after` others."""
        write, left = self.database.write, [after]

        def when_due(*options: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                act()
            return write(*options, **named)

        self.database.write = when_due  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.database.write  # type: ignore[method-assign]

    def something(self, what: int) -> None:
        """A step of somebody else."""
        match what % 5:
            case 0:
                self.take(what % 2, what)
            case 1 if self.held:
                self.end(self.held.pop(what % len(self.held)), 4, ["", "time"])
            case 2:
                self.one_pass(what % 2, 0.3)
            case 3:
                self.broker.forget()
            case 4:
                self.go(what % 2)

    # Submitters

    def wanted(self, low: int, count: int) -> list[Segment]:
        numbers = range(low, min(low + count, LAST))
        plain = [number for number in numbers if number < NEEDING]
        needing = [number for number in numbers if number >= NEEDING]
        segments = [jobs(plain, seconds=0.7)] if plain else []
        if needing:
            segments += [builder(RECIPE), jobs(needing, seconds=0.7, recipes=(RECIPE,))]
        return segments

    @rule(
        name=st.sampled_from(NAMES),
        low=st.integers(0, LAST - 1),
        count=st.integers(1, LAST),
        append=st.booleans(),
        after=st.integers(0, 12),
        what=WHICH,
    )
    def submit(self, name: str, low: int, count: int, append: bool, after: int, what: int = 3) -> None:
        segments = self.wanted(low, count)
        keys = {key for segment in segments for key in segment.keys}
        before = self.keys_of(name)
        try:
            with self.interrupted(after, lambda: self.something(what)):
                outcome = submit(self.database, name, *segments, append=append)
        except NameTaken:
            assert before
            assert not append
            return
        if not before:
            assert outcome.size == len(keys) == outcome.new + outcome.known
        assert self.keys_of(name) == before | keys
        assert outcome.size == len(before | keys)

    def keys_of(self, name: str) -> set[bytes]:
        query = (
            "SELECT j.key FROM batch b JOIN membership m ON m.batch_id = b.id JOIN job j ON j.id = m.job_id"
            " WHERE b.name = :name AND b.state <> 'arriving'"
        )
        return {bytes(key) for (key,) in rows(self.database, query, name=name)}

    @rule(name=st.sampled_from(NAMES), low=st.integers(0, LAST - 1), count=st.integers(1, LAST), append=st.booleans())
    def submit_fresh(self, name: str, low: int, count: int, append: bool) -> None:
        """What ended runs again, in every batch that holds it."""
        segments = self.wanted(low, count)
        keys = {key for segment in segments for key in segment.keys}
        known = {bytes(key): job for key, job in rows(self.database, "SELECT key, id FROM job")}
        ended = {job for (job,) in rows(self.database, "SELECT job_id FROM record")}
        again = {known[key] for key in keys if key in known} & ended
        try:
            outcome = submit(self.database, name, *segments, append=append, fresh=True)
        except NameTaken:
            assert not append
            return
        left = {job for (job,) in rows(self.database, "SELECT job_id FROM record")}
        assert not again & left, "what was to run again keeps its record"
        assert outcome.rerun == len(again)
        self.answers = {job: answer for job, answer in self.answers.items() if job not in again}

    # Dispatchers

    def one_pass(self, which: int, seconds: float) -> None:
        """One look of a dispatcher, so long after its last."""
        watch = self.watches[which]
        watch.look(self.database, seconds)
        losses = dict(rows(self.database, "SELECT job_id, losses FROM worker_loss"))
        held = rows(self.database, "SELECT c.worker_id, r.job_id FROM running r JOIN chunk c ON c.id = r.chunk_id")
        with contextlib.suppress(BrokerDown):
            watch.dispatcher.one_pass()
        gone = {worker for (worker,) in rows(self.database, "SELECT id FROM worker WHERE state = 'lost'")} - self.lost
        for worker in gone:
            assert watch.silent[worker] > LOST_AFTER - 1e-9, "a worker was given up that had not been silent for long"
        now = dict(rows(self.database, "SELECT job_id, losses FROM worker_loss"))
        for worker, job in held:
            assert now.get(job, 0) == losses.get(job, 0) + (worker in gone), "losses are miscounted"
        self.given_up(gone)

    def given_up(self, gone: set[int]) -> None:
        self.lost |= gone
        self.void |= {held.claim.token for held in self.held if held.worker in gone}
        self.void |= {asked.token for asked in self.asked if asked.worker in gone}

    @rule(which=SLOTS, seconds=st.sampled_from([0.0, 0.3, 1.0, 1.9, 5.0, 60.0]))
    def dispatch(self, which: int, seconds: float) -> None:
        self.one_pass(which, seconds)

    @rule(which=SLOTS, after=st.integers(0, 6), what=WHICH)
    def dispatch_with_others_in_between(self, which: int, after: int, what: int) -> None:
        if what % 5 in (2, 4):  # what it does to workers is checked pass by pass
            what += 1
        if what % 5 == 0:
            what += 1
        watch = self.watches[which]
        watch.look(self.database, 0.3)
        with self.interrupted(after, lambda: self.something(what)):
            with contextlib.suppress(BrokerDown):
                watch.dispatcher.one_pass()
        gone = {worker for (worker,) in rows(self.database, "SELECT id FROM worker WHERE state = 'lost'")} - self.lost
        self.given_up(gone)

    @rule(which=SLOTS, slot=SLOTS)
    def a_worker_falls_silent(self, which: int, slot: int) -> None:
        """Under the eyes of a dispatcher, while the other worker renews: that one stays, this one is given up."""
        silent, other = self.workers[slot], self.workers[1 - slot]
        before = set(self.lost)
        self.broker.failing = ""
        for _ in range(7):
            if other not in self.lost:
                running.renew(self.database, other, {})
            self.one_pass(which, 1.0)
        assert silent in self.lost, "nobody noticed that a worker was gone"
        assert other in before or other not in self.lost, "a worker that renewed was given up"

    @rule(which=SLOTS)
    def a_dispatcher_is_restarted(self, which: int) -> None:
        self.watches[which] = self.new_watch(17.0)

    @rule(failing=st.sampled_from(["", "from the start", "in the middle of a send"]))
    def redis_fails(self, failing: str) -> None:
        self.broker.failing = failing

    @rule(what=st.sampled_from(["doubled", "lost", "late", "back", "all lost", "forgotten"]), which=WHICH)
    def redis_misbehaves(self, what: str, which: int) -> None:
        there = self.broker.messages
        if what == "forgotten":
            self.broker.forget()
        elif what == "all lost":
            there.clear()
        elif what == "back" and self.broker.late:
            there.append(self.broker.late.pop(which % len(self.broker.late)))
        elif there and what == "doubled":
            there.append(there[which % len(there)])
        elif there and what in ("lost", "late"):
            message = there.pop(which % len(there))
            if what == "late":
                self.broker.late.append(message)

    # Workers

    def go(self, slot: int) -> None:
        """A worker leaves in good order, and another takes its place."""
        worker = self.workers[slot]
        running.sign_off(self.database, worker)
        self.void |= {held.claim.token for held in self.held if held.worker == worker}
        self.void |= {asked.token for asked in self.asked if asked.worker == worker}
        # What it still pops before it knows goes to nobody.
        if self.broker.messages:
            assert running.claim(self.database, worker, self.broker.messages[-1].chunk_id) is None
        self.workers[slot] = sign_on(self.database, f"w{slot}")

    @rule(slot=SLOTS)
    def a_worker_goes(self, slot: int) -> None:
        self.go(slot)

    def next_message(self, which: int) -> int | None:
        """The chunk of a message: mostly the first, as Redis hands them out."""
        for _ in range(3):
            if not self.broker.messages:
                self.one_pass(which % 2, 0.3)
        if not self.broker.messages:
            return None
        place = which % len(self.broker.messages) if which % 3 == 0 else 0
        return self.broker.messages.pop(place).chunk_id

    def take(self, slot: int, which: int) -> None:
        chunk = self.next_message(which)
        if chunk is None:
            return
        worker, token = self.workers[slot], running.new_token()
        claim = running.claim(self.database, worker, chunk, token)
        if claim is not None:
            self.check_claim(worker, claim)
            self.held.append(Held(slot, worker, claim))
        if which % 4 == 1:  # its answer was lost: it asks again at once
            again = running.claim(self.database, worker, chunk, token)
            assert (again is None) == (claim is None)
            assert again is None or again.tasks == claim.tasks  # type: ignore[union-attr]

    def check_claim(self, worker: int, claim: Claim) -> None:
        assert worker not in self.lost, "a worker that was given up got work"
        ((state,),) = rows(
            self.database,
            "SELECT b.state FROM chunk c JOIN batch b ON b.id = c.batch_id WHERE c.id = :id",
            id=claim.chunk_id,
        )
        assert state == "open"
        ended = {job for (job,) in rows(self.database, "SELECT job_id FROM record")}
        assert not ended & {task.id for task in claim.tasks}, "a job that has ended is started again"
        if any(number_of(task) >= NEEDING for task in claim.tasks):
            assert set(claim.given) == {RECIPE}, "a job is started without the network it needs"
        losses = dict(rows(self.database, "SELECT job_id, losses FROM worker_loss"))
        suspicion = {losses.get(task.id, 0) for task in claim.tasks}
        if max(suspicion, default=0) >= dispatching.LOSSES_SUSPECT:
            assert len(suspicion) == 1, "a suspect runs with jobs that are less so"
            assert len(claim.tasks) > 1 or claim.tasks[0].suspect, "a suspect is alone and does not know it"

    @rule(slot=SLOTS, which=WHICH)
    def claim(self, slot: int, which: int) -> None:
        self.take(slot, which)

    @rule(slot=SLOTS, which=WHICH)
    def claim_more(self, slot: int, which: int) -> None:
        """The same again: claims should not be rare among so many rules."""
        self.take(slot, which)

    @rule(slot=SLOTS, which=WHICH)
    def claim_without_an_answer(self, slot: int, which: int) -> None:
        chunk = self.next_message(which)
        if chunk is not None:
            asked = Asked(slot, self.workers[slot], chunk, running.new_token())
            running.claim(self.database, asked.worker, chunk, asked.token)
            self.asked.append(asked)

    @precondition(lambda self: self.asked)
    @rule(which=WHICH)
    def ask_again(self, which: int) -> None:
        asked = self.asked.pop(which % len(self.asked))
        claim = running.claim(self.database, asked.worker, asked.chunk_id, asked.token)
        if claim is not None:
            assert asked.token not in self.void
            self.check_claim(asked.worker, claim)
            self.held.append(Held(asked.slot, asked.worker, claim))

    @rule(slot=SLOTS, which=SLOTS, times=st.integers(3, 5))
    def a_chunk_costs_one_worker_after_another(self, slot: int, which: int, times: int) -> None:
        """Until its jobs are suspect."""
        self.broker.failing = ""
        for _ in range(times):
            self.take(slot, 3)
            ((counter,),) = rows(self.database, "SELECT counter FROM worker WHERE id = :id", id=self.workers[slot])
            if dispatching.reclaim(self.database, self.workers[slot], counter) is not None:
                self.given_up({self.workers[slot]})
            self.workers[slot] = sign_on(self.database, f"w{slot}")

    @precondition(lambda self: self.held)
    @rule(
        which=WHICH,
        share=st.sampled_from([0, 1, 2, 4, 4, 4]),
        how=st.lists(st.sampled_from(ENDS), min_size=1, max_size=4),
    )
    def finish(self, which: int, share: int, how: list[str]) -> None:
        self.end(self.held.pop(which % len(self.held)), share, how)

    def end(self, held: Held, share: int, how: list[str]) -> None:
        """All of a chunk, some of it or nothing; in time or late."""
        claim = held.claim
        kept = claim.tasks[: -(-len(claim.tasks) * share // 4)]
        seconds = (2.0 if len(kept) % 2 else 0.1) if kept else None  # as slow as a chunk, or far quicker than thought
        outcomes = [end_of(task, how[place % len(how)]) for place, task in enumerate(kept)]
        try:
            running.finish(self.database, held.worker, claim, outcomes, seconds_a_job=seconds)
        except StaleToken:
            assert claim.token in self.void, "a holder was refused"
            return
        assert claim.token not in self.void, "a late writer was let in"
        self.answers |= {o.job_id: o.result or "" for o in outcomes if o.state in ("done", "not_applicable")}
        self.finished.append(held)

    @precondition(lambda self: self.finished)
    @rule(which=WHICH)
    def finish_once_more(self, which: int) -> None:
        """The answer to its commit was lost: it writes again, and changes nothing."""
        held = self.finished[which % len(self.finished)]
        before = rows(self.database, "SELECT * FROM record ORDER BY job_id")
        running.finish(self.database, held.worker, held.claim, [failed("error")(task) for task in held.claim.tasks])
        assert rows(self.database, "SELECT * FROM record ORDER BY job_id") == before

    @precondition(lambda self: self.held)
    @rule(which=WHICH, both=st.booleans(), twice=st.booleans())
    def a_child_dies(self, which: int, both: bool, twice: bool) -> None:
        held = self.held[which % len(self.held)]
        victims = tuple(task.id for task in held.claim.tasks[: 2 if both else 1])
        if not victims:
            return
        ((before,),) = rows(self.database, "SELECT count(*) FROM attempt")
        death = Death(victims, float(before), before + 1.0, "crash", "signal 11", "")
        for _ in range(1 + twice):  # told again after a lost answer, it is written once
            try:
                running.report_death(self.database, held.worker, held.claim, death)
            except StaleToken:
                assert held.claim.token in self.void
                return
        assert held.claim.token not in self.void, "a late writer was let in"
        assert rows(self.database, "SELECT count(*) FROM attempt") == [(before + len(victims),)]

    @rule(slot=SLOTS)
    def renew(self, slot: int) -> None:
        worker = self.workers[slot]
        mine = [held.claim for held in self.held if held.worker == worker]
        current = {claim.chunk_id: [task.id for task in claim.tasks[:1]] for claim in mine}
        renewal = running.renew(self.database, worker, current)
        assert renewal.lost == (worker in self.lost)
        unanswered = {asked.chunk_id for asked in self.asked if asked.worker == worker}
        assert renewal.cancelled | renewal.paused <= {claim.chunk_id for claim in mine} | unanswered
        if renewal.lost:
            self.workers[slot] = sign_on(self.database, f"w{slot}")

    # People

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from([control.pause, control.resume, control.cancel]))
    def move(self, name: str, what: Callable[[Database, str], object]) -> None:
        if name in {seen.name for seen in reading.batches(self.database)}:
            what(self.database, name)

    @rule(
        name=st.sampled_from(NAMES),
        cause=st.sampled_from([None, "error", "time", "dependency"]),
        after=st.integers(0, 2),
        what=WHICH,
    )
    def retry(self, name: str, cause: str | None, after: int, what: int) -> None:
        if name in {seen.name for seen in reading.batches(self.database)}:
            with self.interrupted(after, lambda: self.something(what)):
                control.retry(self.database, name, cause)

    # What always holds

    @invariant()
    def the_books_balance(self) -> None:
        audit(self.database)

    @invariant()
    def no_job_runs_twice_at_once(self) -> None:
        started = [task.id for held in self.held if held.claim.token not in self.void for task in held.claim.tasks]
        assert len(started) == len(set(started)), "a job runs twice at once"

    @invariant()
    def answers_stay(self) -> None:
        found = dict(rows(self.database, "SELECT job_id, coalesce(result, '') FROM record WHERE state <> 'failed'"))
        assert found == self.answers, "an answer was lost or changed"

    def teardown(self) -> None:
        """However it was left: all workers are dead, and whatever Redis held is gone. The dispatchers find out, and a
        new worker ends every job of every open batch; then of all."""
        if not hasattr(self, "database"):
            return
        try:
            self.broker.failing = ""
            self.broker.messages.clear()
            worker = sign_on(self.database, "last")
            wanted = {seen.name for seen in reading.batches(self.database) if seen.state in ("open", "finished")}
            self.run_dry(worker)
            for seen in reading.batches(self.database):
                if seen.name in wanted:
                    assert seen.state == "finished"
                    assert sum(recount(self.database, seen.name)) == seen.size == seen.ended
                control.resume(self.database, seen.name)
            self.run_dry(worker)
            assert {seen.state for seen in reading.batches(self.database)} == {"finished"}
            audit_at_rest(self.database)
            assert rows(self.database, "SELECT count(*) FROM running") == [(0,)]
        finally:
            self.kept.close()

    def run_dry(self, worker: int) -> None:
        for turn in range(60):
            if all(seen.state != "open" for seen in reading.batches(self.database)):
                return
            running.renew(self.database, worker, {})
            watch = self.watches[turn % 2]
            watch.clock[0] += 0.4
            self.watches[1 - turn % 2].clock[0] += 0.4
            watch.dispatcher.one_pass()
            while self.broker.messages:
                claim = running.claim(self.database, worker, self.broker.messages.pop(0).chunk_id)
                if claim is not None:
                    running.finish(self.database, worker, claim, [end_of(task, "") for task in claim.tasks])
        raise AssertionError(f"a job was lost: {reading.batches(self.database)}")


def search(store: str, **options: Any) -> None:
    run_state_machine_as_test(
        type("Interleaving", (Interleaving,), {"store": store}),
        settings=settings(
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


@pytest.mark.timeout(900)  # a failure is made as short as it goes, and that takes minutes
@pytest.mark.parametrize("store", services.STORES)
def test_any_interleaving_keeps_the_books_and_loses_no_job(store: str) -> None:
    if store == "postgresql":
        services.require_postgres()
    search(
        store,
        max_examples=EXAMPLES if store == "sqlite" else EXAMPLES // 5,  # a step takes ten times as long
        derandomize=EXAMPLES == USUAL,
    )


@pytest.mark.parametrize(
    ("guard", "found"),
    [
        ("fence", "a late writer was let in"),
        ("reconciler", "a job was lost|nobody noticed"),
        ("claim", "runs twice at once|is started again|runs for chunk|a holder was refused|a suspect is alone"),
    ],
)
def test_without_a_guard_the_search_finds_what_it_is_for(
    guard: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guard in faults.GUARDS
    monkeypatch.setattr(faults, "guarded", lambda asked: asked != guard)
    with pytest.raises(AssertionError, match=found):
        search("sqlite", max_examples=100, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
