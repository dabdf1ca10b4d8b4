"""The dispatcher: a small loop that keeps just enough chunks in Redis.

The store holds all jobs; Redis holds at most two chunks a slot. This one part gives fairness (weighted round robin over
the open batches), pause and cancel that act at once, back-pressure, and a Redis that stays small; and it notices what
got lost: messages, Redis itself, workers. Any number of dispatchers may run: all they do is compare-and-set.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from netassay import faults, logs
from netassay.errors import NoAnswer, UserError
from netassay.settings import Settings, settings
from netassay.store import arriving, dispatching
from netassay.store.database import PATIENCE, Database, Outage
from producer import lab

log = structlog.get_logger("netassay.dispatch")

#: Most published chunks a slot. Fewer where they are long: what waits in Redis is what a newcomer waits for.
CHUNKS_A_SLOT = 2
#: A message overtaken by a later one for so long is lost. A worker claims within milliseconds of its pop.
OVERTAKEN_SECONDS = 3.0
#: So long after publication, with nothing left in the Redis list, an unclaimed chunk's message is lost.
UNCLAIMED_SECONDS = 5.0
#: A worker whose renewal waited for the store's write lock gets so long, once it is free, to show its sign of life.
RENEWAL_SECONDS = 2.0
#: Between passes while there is work, and while there is none.
BUSY_PAUSE, IDLE_PAUSE = 0.02, 0.2
#: What reads a whole batch, or all that wait for their networks, is done at most once in so many times as it takes.
SCAN_FACTOR = 10.0
#: After Redis or the store did not answer.
OUTAGE_PAUSE = 1.0
#: Questions that cost a scan (is a batch finished, hopeless) are asked so often.
HOUSEKEEPING_SECONDS = 1.0
#: Leftovers of submissions that died are looked for so often.
TIDYING_SECONDS = 600.0


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
    _served: dict[int, float] = field(default_factory=dict)
    _looked: float = -1.0
    _tidied: float = -math.inf
    _keep_house_again: float = -math.inf
    _settle_again: float = -math.inf

    def one_pass(self) -> bool:
        """Look once and do what is due. True if anything was published or taken back (so another pass may be worth it).

        Raises BrokerDown, Outage: nothing is lost by either, try again.
        """
        now = self.clock()
        with self.database.read() as connection:
            workers = dispatching.alive_workers(connection)
            pending = dispatching.backlog(connection)
        changed = False
        if faults.guarded("reconciler"):
            changed = self._lost_workers(workers, now)
            self._looked = now = self.clock()
            changed = self._lost_messages(workers, pending, now) or changed
        if now >= self._keep_house_again:
            began = self.clock()
            self._keep_house()
            self._keep_house_again = now + max(HOUSEKEEPING_SECONDS, SCAN_FACTOR * (self.clock() - began))
        if now >= self._settle_again:
            began = self.clock()
            changed = bool(dispatching.settle_needs(self.database)) or changed
            took = self.clock() - began
            # It reads all that waits: with 100,000 networks that must not be all this loop does.
            self._settle_again = began + SCAN_FACTOR * took
        slots = sum(worker.slots for worker in workers)
        return self._publish(max(1, slots)) or changed

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
                    log.warning("worker_lost", worker=worker.name, chunks=chunks)
                    changed = True
        return changed

    def _lost_messages(self, workers: list[dispatching.WorkerSeen], pending: dispatching.Backlog, now: float) -> bool:
        with self.database.read() as connection:
            known = dispatching.incarnation(connection)
        remembered = self.broker.remembered()
        if remembered is None or remembered != known:
            with self.database.write() as connection:
                fresh = dispatching.new_incarnation(connection)
            self.broker.remember(fresh)
            if known:
                log.warning("redis_forgot", published=len(pending.published))
            return True
        # Chunks are listed oldest first: the list hands out in order, so what a later one overtook is gone.
        marks = set(pending.published.items())
        self._overtaken = {mark: self._overtaken.get(mark, now) for mark in marks if mark[1] < pending.claimed}
        lost = [mark[0] for mark, since in self._overtaken.items() if now - since > OVERTAKEN_SECONDS]
        self._unclaimed = {mark: self._unclaimed.get(mark, now) for mark in marks}
        old = [mark[0] for mark, since in self._unclaimed.items() if now - since > UNCLAIMED_SECONDS]
        if old and workers and not self.broker.waiting():
            lost += [chunk for chunk in old if chunk not in lost]
        if lost:
            with self.database.write() as connection:
                dispatching.unpublish(connection, lost)
            log.warning("messages_lost", chunks=lost)
        return bool(lost)

    def _keep_house(self) -> None:
        with self.database.read() as connection:
            blocked = dispatching.blocked(connection)
        if blocked:
            with self.database.write() as connection:
                dispatching.unblock(connection)
        for said in dispatching.pause_hopeless(self.database):
            log.warning("batch_paused", why=said)
        dispatching.finish_batches(self.database)
        if self._looked - self._tidied >= TIDYING_SECONDS:
            self._tidied = self._looked
            arriving.discard_abandoned(self.database)

    def _publish(self, slots: int) -> bool:
        """Fill Redis up, batch by batch: the next chunk is of the batch that has had least for its weight."""
        with self.database.read() as connection:
            if self._full(dispatching.waiting(connection), slots):
                return False
            batches = dispatching.open_batches(connection)
        if not batches:
            self._served.clear()
            return False
        messages: list[dispatching.Message] = []
        with self.database.write() as connection:
            # A newcomer starts level with the least served, not with a claim on all the time before it came.
            floor = min((self._served[b.id] for b in batches if b.id in self._served), default=0.0)
            self._served = {b.id: max(self._served.get(b.id, floor), floor) for b in batches}
            # Counted again under the lock: another dispatcher may have filled it up.
            there = dispatching.waiting(connection)
            while batches and not self._full(there, slots):
                batch = min(batches, key=lambda b: (self._served[b.id], b.id))
                message = dispatching.publish_next(connection, batch, slots)
                if message is None:
                    batches.remove(batch)
                    continue
                self._served[batch.id] += max(message.seconds, 1e-3) / batch.weight
                messages.append(message)
                there = dispatching.Waiting(there.chunks + 1, there.seconds + message.seconds)
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

    @staticmethod
    def _full(there: dispatching.Waiting, slots: int) -> bool:
        """Whether Redis holds enough: a chunk a slot, or two where they are short."""
        enough = there.chunks >= slots and there.seconds >= dispatching.CHUNK_SECONDS * slots
        return enough or there.chunks >= CHUNKS_A_SLOT * slots


def serve(config: Settings, stop: threading.Event) -> None:
    """Dispatch until `stop` is set; outages of Redis or the store are waited out."""
    database = Database(config.store_url)
    database.prepare()
    broker = CeleryBroker(config.broker, database.persist(PATIENCE, lambda: dispatching.key_prefix(database)))
    dispatcher = Dispatcher(database, broker, lost_after=config.lost_after)
    pause = IDLE_PAUSE
    while not stop.wait(pause):
        try:
            pause = BUSY_PAUSE if dispatcher.one_pass() else min(IDLE_PAUSE, 2 * pause)
        except BrokerDown as error:
            log.warning("broker_out", error=str(error)[:200])
            pause = OUTAGE_PAUSE
        except Outage as error:
            log.warning("store_out", error=str(error)[:200])
            pause = OUTAGE_PAUSE


def main() -> int:
    """`python -m producer.dispatch`: the dispatcher as a process of its own."""
    config = settings()
    if not config.broker:
        print("NETASSAY_BROKER is not set; start an embedded lab with: netassay up", file=sys.stderr)
        return 2
    logs.configure()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with contextlib.suppress(NoAnswer):  # an outage is waited out, an address that is none is not
            lab.reach_broker(config.broker).close()
        serve(config, stop)
    except UserError as error:
        print(f"the dispatcher cannot start: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
