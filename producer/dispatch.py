"""The dispatcher: a small loop that keeps just enough chunks in Redis.

The store holds all jobs; Redis holds at most two chunks a slot. This one part gives fairness (weighted round robin
over submitters, and over the open batches of each), pause and cancel that act at once, back-pressure, and a Redis that
stays small; and it notices what got lost: messages, Redis itself, workers. Any number of dispatchers may run: all they
do is compare-and-set.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from netassay import disk, faults, logs
from netassay.errors import NoAnswer, UserError
from netassay.settings import Settings, settings
from netassay.store import arriving, dispatching
from netassay.store.database import PATIENCE, Database, Outage
from producer import lab
from producer.turns import LEAST_TURN, Turns

log = structlog.get_logger("netassay.dispatch")

#: Most published chunks a slot. Fewer where they are long: what waits in Redis is what a newcomer waits for.
CHUNKS_A_SLOT = 2
#: Predicted work in Redis a slot, beside one chunk a slot, that is enough. Chunks are whole jobs, so nearly all are a
#: little shorter than `CHUNK_SECONDS`: if that were the mark, they would always miss it by a hair, and one more wait.
WAITING_SECONDS = 0.955 * dispatching.CHUNK_SECONDS
#: Most chunks published in one transaction, which keeps all workers waiting: some tenths of a second. With hundreds of
#: slots an empty Redis takes several passes to fill.
PASS_CHUNKS = 50
#: What a batch is given in one turn, at least.
TURN_SECONDS = dispatching.CHUNK_SECONDS / 2
#: A message overtaken by a later one for so long is lost. A worker claims within milliseconds of its pop.
OVERTAKEN_SECONDS = 3.0
#: So long after publication, with nothing left in the Redis list, an unclaimed chunk's message is lost.
UNCLAIMED_SECONDS = 5.0
#: A worker whose renewal waited for the store's write lock gets so long, once it is free, to show its sign of life.
RENEWAL_SECONDS = 2.0
#: Between passes while there is work, and while there is none.
BUSY_PAUSE, IDLE_PAUSE = 0.02, 0.2
#: Where it costs nothing to ask whether the store has changed, that is asked so often while nothing was to be done, and
#: without a change the next pass comes after so long: less work, and a new batch is seen sooner.
LOOK_PAUSE, UNCHANGED_PAUSE = 0.05, 0.5
#: What reads a whole batch, or all that wait for their networks, is done at most once in so many times as it takes.
SCAN_FACTOR = 10.0
#: After Redis or the store did not answer.
OUTAGE_PAUSE = 1.0
#: Questions that cost a scan (is a batch finished, hopeless) are asked so often.
HOUSEKEEPING_SECONDS = 1.0
#: Leftovers of submissions that died are looked for so often.
TIDYING_SECONDS = 600.0
#: A batch that no alive worker can go on with pauses after so long: the one that could may just be restarting.
UNFIT_SECONDS = 15.0


class Broker(Protocol):
    """What the dispatcher needs of Redis. `waiting`: messages nobody has taken; `remembered`: the number last written
    by `remember`, None where Redis has lost it."""

    def send(self, messages: list[dispatching.Message]) -> None: ...
    def waiting(self) -> int: ...
    def remembered(self) -> int | None: ...
    def remember(self, incarnation: int) -> None: ...


class BrokerDown(Exception):
    """Redis does not answer."""


class CeleryBroker:
    """Redis through Celery for messages, directly for its own number and the length of the list.

    prefix: of all its keys.
    """

    def __init__(self, url: str, prefix: str) -> None:
        import redis
        from celery import Celery
        from kombu.exceptions import KombuError, OperationalError

        self._app = Celery("netassay", broker=url)
        self._app.conf.update(
            task_default_queue=dispatching.QUEUE,
            task_serializer="json",
            task_ignore_result=True,
            broker_transport_options={
                "global_keyprefix": prefix,
                "socket_timeout": 10,
                "socket_connect_timeout": 5,
                "health_check_interval": 25,
                "max_retries": 1,
            },
            task_publish_retry=False,
        )
        self._prefix = prefix
        address = lab.redis_address(url)
        self._redis = redis.Redis.from_url(address, socket_timeout=10, decode_responses=True)
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError, KombuError, OperationalError)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._errors as error:
            raise BrokerDown(str(error) or type(error).__name__) from error

    def send(self, messages: list[dispatching.Message]) -> None:
        def publish() -> None:
            with self._app.producer_or_acquire() as producer:
                for message in messages:
                    arguments = [message.chunk_id, message.label]
                    self._app.send_task(dispatching.TASK, args=arguments, queue=dispatching.QUEUE, producer=producer)

        self._ask(publish)

    def waiting(self) -> int:
        return self._ask(lambda: self._redis.llen(self._prefix + dispatching.QUEUE))

    def remembered(self) -> int | None:
        value = self._ask(lambda: self._redis.get(self._prefix + "incarnation"))
        return int(value) if value else None

    def remember(self, incarnation: int) -> None:
        self._ask(lambda: self._redis.set(self._prefix + "incarnation", incarnation))


@dataclass
class Sighting:
    """A worker's counter, and for how long of our own watching it has stood still."""

    counter: int
    still: float = 0.0
    had_its_chance: bool = False
    """The write lock was seen free since the counter stood still, so a renewal that waited for it could go through."""


@dataclass
class Dispatcher:
    """One dispatcher's memory: nothing in it is needed by the next one."""

    database: Database
    broker: Broker
    lost_after: float = 10.0
    clock: Callable[[], float] = time.monotonic
    _workers: dict[int, Sighting] = field(default_factory=dict)
    _overtaken: dict[tuple[int, int], float] = field(default_factory=dict)
    _unclaimed: dict[tuple[int, int], float] = field(default_factory=dict)
    _turns: Turns[str] = field(default_factory=Turns)
    """of submitters"""
    _within: dict[str, Turns[int]] = field(default_factory=dict)
    """submitter -> turns of that one's batches"""
    _unfit: dict[int, float] = field(default_factory=dict)
    _short: bool = False
    _looked: float = -1.0
    _tidied: float = -math.inf
    _keep_house_again: float = -math.inf
    _settle_again: float = -math.inf

    def one_pass(self) -> bool:
        """Look once and do what is due. True if anything was published or taken back (so another pass may be worth it).

        Raises BrokerDown, Outage: nothing is lost by either, try again. Raises StoreError where the store was upgraded
        past this program.
        """
        now = self.clock()
        with self.database.read() as connection:
            self.database.check_schema(connection)
            workers = dispatching.alive_workers(connection)
            offered = dispatching.offer(connection, workers)
            pending = dispatching.backlog(connection)
            marks = dispatching.marks(connection)
        changed = False
        if faults.guarded("reconciler"):
            changed = self._lost_workers(workers, now)
            self._looked = now = self.clock()
            changed = self._lost_messages(workers, pending, marks, now) or changed
        if now >= self._keep_house_again:
            began = self.clock()
            self._keep_house(offered)
            self._keep_house_again = now + max(HOUSEKEEPING_SECONDS, SCAN_FACTOR * (self.clock() - began))
        if marks.needing and now >= self._settle_again:
            began = self.clock()
            changed = bool(dispatching.settle_needs(self.database)) or changed
            took = self.clock() - began
            # It reads all that waits: with 100,000 networks that must not be all this loop does.
            self._settle_again = began + SCAN_FACTOR * took
        slots = sum(worker.slots for worker in workers)
        if self._short_of_disk():
            return changed
        # What was taken back just now is counted by nobody; `_publish` counts again.
        if not changed and self._full(len(pending.published), pending.seconds, max(1, slots)):
            return False
        return self._publish(max(1, slots), offered) or changed

    def _lost_workers(self, workers: list[dispatching.WorkerSeen], now: float) -> bool:
        """Take back what workers hold whose counter stood still while we looked.

        Only time between two looks in quick succession counts: if we could not read, or were ourselves asleep, we do
        not know what they did meanwhile. And a worker that could not write because somebody held the lock all the time
        is not lost: near the end of the wait the lock is taken once, and the rest is counted from there.
        """
        passed = now - self._looked if self._looked >= 0 and now - self._looked < 2.0 else 0.0
        changed = False
        chance = self.lost_after - min(RENEWAL_SECONDS, self.lost_after / 2)
        self._workers = {worker.id: self._workers.get(worker.id, Sighting(-1)) for worker in workers}
        for worker in workers:
            seen = self._workers[worker.id]
            if seen.counter != worker.counter:
                seen.counter, seen.still, seen.had_its_chance = worker.counter, 0.0, False
                continue
            seen.still += passed
            if seen.still >= chance and not seen.had_its_chance:
                with self.database.write():
                    pass
                seen.still, seen.had_its_chance = chance, True
                continue
            if seen.still > self.lost_after:
                chunks = dispatching.reclaim(self.database, worker.id, worker.counter)
                if chunks is not None:
                    faults.reach("dispatch.reclaimed")
                    log.warning("worker_lost", worker=worker.name, chunks=chunks)
                    changed = True
        return changed

    def _lost_messages(
        self, workers: list[dispatching.WorkerSeen], pending: dispatching.Backlog, marks: dispatching.Marks, now: float
    ) -> bool:
        remembered = self.broker.remembered()
        if remembered is None or remembered != marks.incarnation:
            with self.database.write() as connection:
                if dispatching.marks(connection).incarnation != marks.incarnation:
                    return True  # another dispatcher was faster
                fresh = dispatching.new_incarnation(connection)
            faults.reach("dispatch.forgotten")
            self.broker.remember(fresh)
            if marks.incarnation:
                log.warning("redis_forgot", published=len(pending.published))
            return True
        # Chunks are listed oldest first: the list hands out in order, so what a later one overtook is gone.
        sent = set(pending.published.items())
        self._overtaken = {mark: self._overtaken.get(mark, now) for mark in sent if mark[1] < marks.claimed}
        lost = [mark[0] for mark, since in self._overtaken.items() if now - since > OVERTAKEN_SECONDS]
        self._unclaimed = {mark: self._unclaimed.get(mark, now) for mark in sent}
        old = [mark[0] for mark, since in self._unclaimed.items() if now - since > UNCLAIMED_SECONDS]
        if old and workers and not self.broker.waiting():
            lost += [chunk for chunk in old if chunk not in lost]
        if lost:
            with self.database.write() as connection:
                dispatching.unpublish(connection, lost)
            faults.reach("dispatch.unpublished")
            log.warning("messages_lost", chunks=lost)
        return bool(lost)

    def _short_of_disk(self) -> bool:
        """Whether the store's disk, if it is this host's, is so full that more work would only fill it up."""
        folder = self.database.folder
        short = folder is not None and disk.is_short(folder)
        if short != self._short:
            self._short = short
            log.warning("disk_short" if short else "disk_has_room_again", folder=str(folder))
        return short

    def _keep_house(self, offered: dispatching.Offer) -> None:
        with self.database.read() as connection:
            blocked = dispatching.blocked(connection)
        if blocked:
            with self.database.write() as connection:
                dispatching.unblock(connection)
        for said in dispatching.pause_hopeless(self.database):
            log.warning("batch_paused", why=said)
        dispatching.finish_batches(self.database)
        self._pause_unfit(offered)
        if self._looked - self._tidied >= TIDYING_SECONDS:
            self._tidied = self._looked
            arriving.discard_abandoned(self.database)

    def _pause_unfit(self, offered: dispatching.Offer) -> None:
        """Pause batches that nobody could go on with for a while: a person has to do something."""
        with self.database.read() as connection:
            found = dispatching.unfit(connection, offered)
        self._unfit = {batch: self._unfit.get(batch, self._looked) for batch in found}
        ripe = [batch for batch, since in self._unfit.items() if self._looked - since >= UNFIT_SECONDS]
        if ripe:
            for said in dispatching.pause_unfit(self.database, ripe):
                log.warning("batch_paused", why=said)
            for batch in ripe:  # resumed, it has as long again
                del self._unfit[batch]

    def _publish(self, slots: int, offered: dispatching.Offer) -> bool:
        """Fill Redis up, batch by batch: the next chunk is of the submitter who has had least for their share, and of
        that one's batches of the one that has had least for its weight."""
        with self.database.read() as connection:
            batches = dispatching.open_batches(connection, offered)
        if not batches:
            self._turns, self._within = Turns(), {}
            return False
        messages: list[dispatching.Message] = []
        with self.database.write() as connection:
            left = self._take_places(batches)
            # Counted again under the lock: another dispatcher may have filled it up.
            pending = dispatching.backlog(connection)
            chunks, seconds = len(pending.published), pending.seconds
            while left and len(messages) < PASS_CHUNKS and not self._full(chunks, seconds, slots):
                submitter = self._turns.next(dict.fromkeys(batch.submitter for batch in left.values()))
                within = self._within[submitter]
                batch = left[within.next(one.id for one in left.values() if one.submitter == submitter)]
                turn = 0.0
                # A turn is not over with the first job of a segment, which goes alone.
                while turn < TURN_SECONDS and len(messages) < PASS_CHUNKS and not self._full(chunks, seconds, slots):
                    message = dispatching.publish_next(connection, batch, slots, offered)
                    if message is None:
                        del left[batch.id]
                        break
                    turn += max(message.seconds, LEAST_TURN)
                    messages.append(message)
                    chunks, seconds = chunks + 1, seconds + message.seconds
                if turn:
                    within.took(batch.id, turn)
                    self._turns.took(submitter, turn)
        faults.reach("dispatch.marked")
        try:
            if messages:
                self.broker.send(messages)
        except BrokerDown:
            with self.database.write() as connection:
                dispatching.unpublish(connection, [message.chunk_id for message in messages])
            raise
        faults.reach("dispatch.sent")
        return bool(messages)

    def _take_places(self, batches: Sequence[dispatching.OpenBatch]) -> dict[int, dispatching.OpenBatch]:
        """Note who has something to publish. Returns the batches by their id."""
        self._turns.present({batch.submitter: batch.share for batch in batches})
        of: dict[str, dict[int, float]] = {}
        for batch in batches:
            of.setdefault(batch.submitter, {})[batch.id] = batch.weight
        self._within = {submitter: self._within.get(submitter, Turns()) for submitter in of}
        for submitter, weights in of.items():
            self._within[submitter].present(weights)
        return {batch.id: batch for batch in batches}

    @staticmethod
    def _full(chunks: int, seconds: float, slots: int) -> bool:
        """Whether so many published chunks are enough: one a slot, or two where they are short."""
        enough = chunks >= slots and seconds >= WAITING_SECONDS * slots
        return enough or chunks >= CHUNKS_A_SLOT * slots


def serve(config: Settings, stop: threading.Event) -> None:
    """Dispatch until `stop` is set; outages of Redis or the store are waited out.

    Raises StoreError where the store is of a newer program.
    """
    database = Database(config.store_url)
    database.prepare()
    broker = CeleryBroker(config.broker, database.persist(PATIENCE, lambda: dispatching.key_prefix(database)))
    dispatcher = Dispatcher(database, broker, lost_after=config.lost_after)
    changed = database.watch()
    pause = IDLE_PAUSE
    while not stop.wait(pause):
        try:
            if changed is not None:
                changed()  # what was written up to here is seen by this pass
            if dispatcher.one_pass():
                pause = BUSY_PAUSE
            elif changed is None:
                pause = min(IDLE_PAUSE, 2 * pause)
            else:
                _until_changed(stop, changed)
                pause = 0.0
        except BrokerDown as error:
            log.warning("broker_out", error=str(error)[:200])
            pause = OUTAGE_PAUSE
        except Outage as error:
            log.warning("store_out", error=str(error)[:200])
            pause = OUTAGE_PAUSE


def _until_changed(stop: threading.Event, changed: Callable[[], bool]) -> None:
    """Wait for a change of the store, for the next pass that is due without one, or for the end."""
    end = time.monotonic() + UNCHANGED_PAUSE
    while not changed() and time.monotonic() < end:
        if stop.wait(LOOK_PAUSE):
            return


def main() -> int:
    """`python -m producer.dispatch`: the dispatcher as a process of its own."""
    config = settings()
    logs.configure("dispatcher")
    if not config.broker:
        logs.complain("NETASSAY_BROKER is not set; start an embedded lab with: netassay up")
        return 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with contextlib.suppress(NoAnswer):  # an outage is waited out, an address that is none is not
            lab.reach_broker(config.broker).close()
        serve(config, stop)
    except UserError as error:
        logs.complain(f"the dispatcher cannot start: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
