"""Workers, dispatchers, submitters and people at one store at the same moment, each with connections of its own.

The state machine of `test_store_model` puts whole transactions in any order; here they overlap. A witness outside the
store notes who runs which job.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import services
from store_by_hand import audit_at_rest, builder, done, drain, failed, jobs, number_of, rows, sign_on, submit

from netassay.store import control, dispatching, reading, running, submission
from netassay.store.database import Database
from netassay.store.running import Outcome, StaleToken, Task

#: Some seconds of it in the suite; by hand, an hour.
SECONDS = float(os.environ.get("NETASSAY_AT_ONCE_SECONDS", "5"))
#: Jobs from this number on need the network of the recipe.
NEEDING, LAST = 400, 500
RECIPE = "recipe:" + "1" * 64


class Witness:
    """Who runs which job, by what the workers say of themselves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[int, int] = {}
        self.ended: set[int] = set()
        self.wrong: list[str] = []

    def begin(self, worker: int, task: Task) -> None:
        with self.lock:
            if task.id in self.running:
                self.wrong.append(f"{worker} runs job {task.id}, which {self.running[task.id]} runs")
            if task.id in self.ended:
                self.wrong.append(f"{worker} runs job {task.id} again, which has ended for good")
            self.running[task.id] = worker

    def end(self, task: Task, for_good: bool) -> None:
        """To be called before the end is written: from then on nobody may take the job."""
        with self.lock:
            del self.running[task.id]
            if for_good:
                self.ended.add(task.id)


def end_of(task: Task) -> Outcome:
    """Every seventh job fails for a reason that may pass."""
    return failed("time")(task) if number_of(task) % 7 == 3 else done(task)


class Crowd:
    def __init__(self, database: Database) -> None:
        self.url = database.url.render_as_string(hide_password=False)
        self.witness, self.over = Witness(), threading.Event()
        self.messages: list[int] = []
        self.claims = 0

    @contextlib.contextmanager
    def own(self) -> Iterator[Database]:
        database = Database(self.url)
        try:
            yield database
        finally:
            database.dispose()

    def work(self, seed: int) -> None:
        draw = random.Random(seed)
        with self.own() as database:
            worker = sign_on(database, f"w{seed}")
            while not self.over.is_set():
                try:
                    chunk = self.messages.pop(0)
                except IndexError:
                    time.sleep(0.001)
                    continue
                if draw.random() < 0.1:
                    self.messages.append(chunk)  # Redis hands it out twice
                claim = database.persist(30, functools.partial(running.claim, database, worker, chunk))
                if claim is None:
                    continue
                self.claims += 1
                for task in claim.tasks:
                    self.witness.begin(worker, task)
                if draw.random() < 0.3:
                    database.persist(30, lambda: running.renew(database, worker, {}))
                returned = [task for task in claim.tasks if draw.random() < 0.9]
                for task in claim.tasks:
                    self.witness.end(task, for_good=task in returned and end_of(task).state == "done")
                ends = [end_of(task) for task in returned]
                with contextlib.suppress(StaleToken):
                    database.persist(30, functools.partial(running.finish, database, worker, claim, ends, None, 0.01))

    def dispatch(self, seed: int) -> None:
        draw = random.Random(seed)
        with self.own() as database:
            while not self.over.is_set():
                with database.write() as connection:
                    dispatching.unblock(connection)
                    for batch in dispatching.open_batches(connection):
                        for _ in range(3):
                            if message := dispatching.publish_next(connection, batch, 8):
                                self.messages.append(message.chunk_id)
                dispatching.settle_needs(database)
                dispatching.finish_batches(database)
                if draw.random() < 0.05:  # Redis forgot all
                    with database.write() as connection:
                        dispatching.new_incarnation(connection)
                time.sleep(0.002)

    def submit(self, seed: int) -> None:
        draw = random.Random(seed)
        with self.own() as database:
            while not self.over.is_set():
                low = draw.randrange(LAST - 20)
                plain = jobs(range(low, min(low + draw.randrange(10, 150), NEEDING)), seconds=0.2)
                needing = jobs(range(max(low, NEEDING), LAST), seconds=0.2, recipes=(RECIPE,))
                parts = [part for part in (builder(RECIPE), plain, needing) if part.keys]
                submit(database, f"b{draw.randrange(40)}", *parts, append=True)
                time.sleep(0.01)

    def steer(self, seed: int) -> None:
        draw = random.Random(seed)
        acts: list[Callable] = [control.pause, control.resume, control.cancel, control.resume, control.retry]
        with self.own() as database:
            while not self.over.is_set():
                names = [seen.name for seen in reading.batches(database)]
                if names:
                    draw.choice(acts)(database, draw.choice(names))
                time.sleep(0.005)


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """Whoever holds the store's lock needs its turn at the interpreter too, for each of its statements."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("store", services.STORES)
def test_a_crowd_at_one_store_runs_each_job_once_at_a_time_and_keeps_the_books(store: str, tmp_path: Path) -> None:
    with services.new_store(store, tmp_path) as database, quick_switches():
        crowd, broken = Crowd(database), []

        def guarded(action: Callable[[int], None], seed: int) -> None:
            try:
                action(seed)
            except BaseException as error:
                broken.append(error)
                raise

        cast = [*[crowd.work] * 6, *[crowd.dispatch] * 2, *[crowd.submit] * 2, crowd.steer]
        threads = [threading.Thread(target=guarded, args=(act, seed)) for seed, act in enumerate(cast)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS)
        crowd.over.set()
        for thread in threads:
            thread.join(60)
        assert broken == []
        assert crowd.witness.wrong == []
        assert crowd.claims > 50, "nothing happened"

        for seen in reading.batches(database):
            control.resume(database, seen.name)
        with database.write() as connection:
            dispatching.new_incarnation(connection)
        drain(database, sign_on(database), end_of)
        audit_at_rest(database)
        assert {seen.state for seen in reading.batches(database)} <= {"finished"}
        held = "SELECT count(*) FROM membership m WHERE NOT EXISTS (SELECT 1 FROM record r WHERE r.job_id = m.job_id)"
        assert rows(database, held) == [(0,)]
        print(f"{store}: {crowd.claims} claims, {len(reading.batches(database))} batches")


def test_two_who_write_the_same_keys_at_once_do_not_meet_in_a_deadlock() -> None:
    """A deadlock is broken by PostgreSQL and tried again by us: the server's own count is what tells."""
    with services.new_store("postgresql", Path()) as database:
        url = database.url.render_as_string(hide_password=False)
        gate, ended = threading.Barrier(2), []
        # Each in an order of its own: what is submitted is not what the keys are sorted by.
        orders = [range(10_000), range(9_999, -1, -1)]

        def submit_when_both_are_there(side: int) -> None:
            def progress(share: float) -> None:
                if share == 0.1:  # the keys have been looked up: both have to write them all
                    gate.wait()

            mine = Database(url)
            ended.append(submission.submit(mine, f"side {side}", [jobs(orders[side])], {}, progress=progress).size)
            mine.dispose()

        threads = [threading.Thread(target=submit_when_both_are_there, args=(side,)) for side in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [10_000, 10_000]
        assert rows(database, "SELECT count(*) FROM job") == [(10_000,)]
        time.sleep(1.5)  # the server writes its statistics down about once a second
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert rows(database, query) == [(0,)]
