"""Any interleaving of submitters, dispatchers, workers and people leaves the books balanced and loses no job.

The steps are the store's own transactions, in any order that the search tries: overlapping batches, doubled and lost
messages, deaths, reclaimed workers that write late, pauses and retries in between.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
import services
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_by_hand import (
    audit,
    audit_at_rest,
    builder,
    done,
    drain,
    failed,
    jobs,
    number_of,
    publish,
    recount,
    rows,
    sign_on,
    submit,
)

from netassay.store import control, dispatching, reading, running
from netassay.store.running import Claim, Death, Outcome, StaleToken, Task
from netassay.store.submission import NameTaken

#: Jobs from this number on need the network of this recipe.
NEEDING, LAST = 6, 9
RECIPE = "recipe:" + "1" * 64
NAMES = ("a", "b", "c")
#: "" is done; the other ends are of every kind: kept, run again, an answer.
ENDS = ("", "", "", "not_applicable", "error", "time", "invalid_input")
WHICH = st.integers(0, 100)
SHARES = st.sampled_from([0, 1, 2, 4, 4, 4])
HOW = st.lists(st.sampled_from(ENDS), min_size=1, max_size=4)
#: About twenty seconds; by hand, let it search for an hour.
EXAMPLES = int(os.environ.get("NETASSAY_MODEL_EXAMPLES", "100"))


def end_of(task: Task, how: str) -> Outcome:
    if how == "not_applicable":
        return Outcome(task.id, how, message="no inputs")
    return failed(how)(task) if how else done(task)


class Interleaving(RuleBasedStateMachine):
    store: str

    @initialize(low=st.integers(0, LAST - 1), high=st.integers(1, LAST))
    def begin(self, low: int, high: int) -> None:
        self.kept = contextlib.ExitStack()
        folder = self.kept.enter_context(tempfile.TemporaryDirectory(prefix="netassay-model-"))
        self.database = self.kept.enter_context(services.new_store(type(self).store, Path(folder)))
        self.workers = [sign_on(self.database, "w0"), sign_on(self.database, "w1")]
        self.messages: list[int] = []
        #: what workers believe to hold: slot of the worker, its id then, the claim
        self.held: list[tuple[int, int, Claim]] = []
        self.void: set[str] = set()  # tokens of claims that were taken over
        self.answers: dict[int, str] = {}
        self.submit("a", low, LAST)
        self.submit("b", 0, high)

    # Submitters

    @rule(name=st.sampled_from(NAMES), low=st.integers(0, LAST - 1), count=st.integers(1, LAST))
    def submit(self, name: str, low: int, count: int) -> None:
        numbers = range(low, min(low + count, LAST))
        plain = [number for number in numbers if number < NEEDING]
        needing = [number for number in numbers if number >= NEEDING]
        segments = [jobs(plain, seconds=0.7)] if plain else []
        if needing:
            segments += [builder(RECIPE), jobs(needing, seconds=0.7, recipes=(RECIPE,))]
        size = len(numbers) + bool(needing)
        try:
            outcome = submit(self.database, name, *segments)
        except NameTaken:
            return
        assert outcome.size == size == outcome.new + outcome.known

    # Dispatchers

    @rule(slots=st.integers(1, 3), most=st.integers(1, 4))
    def publish(self, slots: int, most: int) -> None:
        dispatching.settle_needs(self.database)
        self.messages += [message.chunk_id for message in publish(self.database, slots, most)]

    @rule(what=st.sampled_from(["doubled", "lost", "late", "wiped"]), which=WHICH)
    def redis_misbehaves(self, what: str, which: int) -> None:
        if what == "wiped":
            self.messages.clear()
            with self.database.write() as connection:
                dispatching.new_incarnation(connection)
        elif self.messages:
            message = self.messages[which % len(self.messages)]
            if what == "doubled":
                self.messages.append(message)
                return
            if what == "lost":
                self.messages.remove(message)
            with self.database.write() as connection:  # as if lost, while it may only be late
                dispatching.unpublish(connection, [message])

    @rule()
    def keep_house(self) -> None:
        with self.database.write() as connection:
            dispatching.unblock(connection)
        dispatching.pause_hopeless(self.database)
        dispatching.finish_batches(self.database)

    @rule(slot=st.integers(0, 1), politely=st.booleans())
    def a_worker_goes(self, slot: int, politely: bool) -> None:
        worker = self.workers[slot]
        if politely:
            running.sign_off(self.database, worker)
        else:
            ((counter,),) = rows(self.database, "SELECT counter FROM worker WHERE id = :id", id=worker)
            assert dispatching.reclaim(self.database, worker, counter) is not None
        self.void |= {claim.token for _, holder, claim in self.held if holder == worker}
        # What it still pops before it knows goes to nobody.
        if self.messages:
            assert running.claim(self.database, worker, self.messages[-1]) is None
        self.workers[slot] = sign_on(self.database, f"w{slot}")

    # Workers

    @rule(slot=st.integers(0, 1), which=WHICH)
    def claim(self, slot: int, which: int) -> None:
        if not self.messages:
            self.publish(2, 4)
        if not self.messages:
            return
        chunk = self.messages.pop(which % len(self.messages))
        claim = running.claim(self.database, self.workers[slot], chunk)
        if claim is None:
            return
        self.held.append((slot, self.workers[slot], claim))
        ((state,),) = rows(
            self.database, "SELECT b.state FROM chunk c JOIN batch b ON b.id = c.batch_id WHERE c.id = :id", id=chunk
        )
        assert state == "open"
        ended = {job for (job,) in rows(self.database, "SELECT job_id FROM record")}
        assert not ended & {task.id for task in claim.tasks}, "a job that has ended is started again"
        if any(number_of(task) >= NEEDING for task in claim.tasks):
            assert set(claim.given) == {RECIPE}, "a job is started without the network it needs"

    @rule(slot=st.integers(0, 1), which=WHICH)
    def claim_more(self, slot: int, which: int) -> None:
        """The same again: claims should not be rare among so many rules."""
        self.claim(slot, which)

    @precondition(lambda self: self.held)
    @rule(
        which=WHICH,
        share=st.sampled_from([0, 1, 2, 4, 4, 4]),
        how=st.lists(st.sampled_from(ENDS), min_size=1, max_size=4),
    )
    def finish(self, which: int, share: int, how: list[str]) -> None:
        """All of it, some of it or nothing; in time or late."""
        _, worker, claim = self.held.pop(which % len(self.held))
        kept = claim.tasks[: -(-len(claim.tasks) * share // 4)]
        seconds = (2.0 if len(kept) % 2 else 0.1) if kept else None  # as slow as a chunk, or far quicker than thought
        outcomes = [end_of(task, how[place % len(how)]) for place, task in enumerate(kept)]
        try:
            running.finish(self.database, worker, claim, outcomes, seconds_a_job=seconds)
        except StaleToken:
            assert claim.token in self.void
            return
        assert claim.token not in self.void, "a late writer was let in"
        self.answers |= {o.job_id: o.result or "" for o in outcomes if o.state in ("done", "not_applicable")}

    @precondition(lambda self: self.held)
    @rule(which=WHICH, both=st.booleans())
    def a_child_dies(self, which: int, both: bool) -> None:
        _, worker, claim = self.held[which % len(self.held)]
        victims = tuple(task.id for task in claim.tasks[: 2 if both else 1])
        if not victims:
            return
        try:
            running.report_death(self.database, worker, claim, Death(victims, 1.0, 2.0, "crash", "signal 11", ""))
        except StaleToken:
            assert claim.token in self.void
        else:
            assert claim.token not in self.void

    @rule(slot=st.integers(0, 1))
    def renew(self, slot: int) -> None:
        worker = self.workers[slot]
        mine = [claim for _, holder, claim in self.held if holder == worker]
        current = {claim.chunk_id: [task.id for task in claim.tasks[:1]] for claim in mine}
        renewal = running.renew(self.database, worker, current)
        assert not renewal.lost
        assert renewal.cancelled | renewal.paused <= {claim.chunk_id for claim in mine}

    # People

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from([control.pause, control.resume, control.cancel]))
    def move(self, name: str, what: object) -> None:
        if name in {seen.name for seen in reading.batches(self.database)}:
            what(self.database, name)  # type: ignore[operator]

    @rule(name=st.sampled_from(NAMES), cause=st.sampled_from([None, "error", "time", "dependency"]))
    def retry(self, name: str, cause: str | None) -> None:
        if name in {seen.name for seen in reading.batches(self.database)}:
            control.retry(self.database, name, cause)

    # What always holds

    @invariant()
    def the_books_balance(self) -> None:
        audit(self.database)

    @invariant()
    def no_job_runs_twice_at_once(self) -> None:
        started = [task.id for _, _, claim in self.held if claim.token not in self.void for task in claim.tasks]
        assert len(started) == len(set(started))

    @invariant()
    def answers_stay(self) -> None:
        found = dict(rows(self.database, "SELECT job_id, coalesce(result, '') FROM record WHERE state <> 'failed'"))
        assert found == self.answers

    def teardown(self) -> None:
        """However it was left: new workers end every job of every open batch, and then of all."""
        if not hasattr(self, "database"):
            return
        try:
            for worker in self.workers:
                running.sign_off(self.database, worker)
            with self.database.write() as connection:
                dispatching.new_incarnation(connection)
            worker = sign_on(self.database, "last")
            for also_the_paused in (False, True):
                wanted = {seen.name for seen in reading.batches(self.database) if seen.state in ("open", "finished")}
                drain(self.database, worker)
                for seen in reading.batches(self.database):
                    if seen.name in wanted:
                        assert seen.state == "finished"
                        assert sum(recount(self.database, seen.name)) == seen.size == seen.ended
                if not also_the_paused:
                    for seen in reading.batches(self.database):
                        control.resume(self.database, seen.name)
            audit_at_rest(self.database)
            assert rows(self.database, "SELECT count(*) FROM running") == [(0,)]
        finally:
            self.kept.close()


@pytest.mark.timeout(900)  # a failure is made as short as it goes, and that takes minutes
@pytest.mark.parametrize("store", services.STORES)
def test_any_interleaving_keeps_the_books_and_loses_no_job(store: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    if store == "postgresql":
        services.require_postgres()
    run_state_machine_as_test(
        type("Interleaving", (Interleaving,), {"store": store}),
        settings=settings(
            max_examples=EXAMPLES if store == "sqlite" else EXAMPLES // 5,  # a step takes ten times as long
            stateful_step_count=60,
            deadline=None,
            derandomize=EXAMPLES == 100,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
