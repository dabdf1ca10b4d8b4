"""The monitor: whether a lab is well, and its numbers, over HTTP.

    GET /livez     200 as long as this process answers
    GET /healthz   200 where store, broker, dispatcher, workers and disk are well, else 503; why, as JSON
    GET /metrics   the numbers of the lab, for Prometheus

Requests are answered from memory. The store, the broker and the disk are looked at each by threads of their own, so
that one that hangs is told of and holds up nobody: one for the cheap signs of life every two seconds, one for the sums,
only when somebody asks for them, and never more than a twentieth of the time. It only reads; any number of monitors may
run.

The server is Starlette on uvicorn: what FastAPI is made of, in half its time to start and without its models, which
three fixed answers do not need. The routes can be mounted in an application of FastAPI as they are.
"""

from __future__ import annotations

import asyncio
import math
import platform
import shutil
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from netassay import __version__, disk, logs
from netassay.errors import UserError
from netassay.settings import Settings, masked, settings
from netassay.store import artifacts, dispatching, measures
from netassay.store.database import SCHEMA, Database
from producer import lab
from producer.health import QUIET_SECONDS

log = structlog.get_logger("netassay.monitor")

#: Between two looks for signs of life.
LOOK_SECONDS = 2.0
#: So often a look may be late, or fail to end, before its part counts as out.
LATE_SECONDS = 10.0
#: Sums are not made anew before they are so old, nor before so many times what they took has passed.
FRESH_SECONDS, SCAN_FACTOR = 2.0, 20.0
#: So long a request waits for sums that are being made; then it gets the last ones.
PATIENCE_SECONDS = 5.0
#: Between two walks over the artifacts' folder.
WALK_SECONDS = 60.0
#: Connections at a time; more are turned away with 503.
MOST_CONNECTIONS = 200

T = TypeVar("T")


class MonitorError(UserError):
    """The monitor cannot be started; the message says why."""


@dataclass
class Look(Generic[T]):
    """A thread that asks the same question again and again, and the last answer.

    An answer may come with sums, which are only made when somebody wants them, by `ask(True)`; by another thread, as
    that may take long, and the signs of life must not seem to have stopped meanwhile.
    """

    name: str
    ask: Callable[[bool], T]
    every: float = LOOK_SECONDS
    answer: T | None = None
    error: str = ""
    ended: float = -math.inf
    """when a question was last answered or refused, by the monotonic clock"""
    summed: float = -math.inf
    """when the sums in hand were asked for"""
    took: float = 0.0
    """seconds that the last sums took"""
    _wanted: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"look-{self.name}", daemon=True).start()
        threading.Thread(target=self._sum, name=f"sums-{self.name}", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        self._wanted.set()

    def want(self) -> None:
        """Somebody asks for sums: make them anew if those in hand are too old."""
        if time.monotonic() - self.summed > max(FRESH_SECONDS, SCAN_FACTOR * self.took):
            self._wanted.set()

    @property
    def asked(self) -> bool:
        """Whether sums are being made, or are about to be."""
        return self._wanted.is_set()

    @property
    def silent(self) -> float:
        """Seconds since it last heard anything."""
        return time.monotonic() - self.ended

    def _run(self) -> None:
        while not self._stop.is_set():
            before = self.error
            try:
                self.answer, self.error = self.ask(False), ""
            except Exception as error:  # whatever it is, it is the answer
                said = masked(str(getattr(error, "orig", error)).strip() or type(error).__name__)
                if not self.error:
                    log.warning(f"{self.name}_out", error=said)
                self.error = said
            else:
                if before:
                    log.info(f"{self.name}_back")
            self.ended = time.monotonic()
            self._stop.wait(self.every)

    def _sum(self) -> None:
        while self._wanted.wait() and not self._stop.is_set():
            began = time.monotonic()
            try:
                self.ask(True)
                took = time.monotonic() - began
                self.answer = self.ask(False)
            except Exception as error:  # what is out, the signs of life tell; those sums were not made
                log.warning(f"{self.name}_sums_failed", error=masked(str(getattr(error, "orig", error))))
            else:
                self.summed, self.took = began, took
            self._wanted.clear()


@dataclass(frozen=True)
class StoreSeen:
    """schema: of the tables. alive: workers that have not signed off; still: worker -> seconds for which its counter
    has not moved. sums: as last made, None before the first; ended: (method, end) -> jobs since the first."""

    schema: str
    alive: list[dispatching.WorkerSeen]
    still: dict[int, float]
    sums: measures.Measures | None
    ended: Mapping[tuple[str, str], int]

    def moving(self, within: float) -> list[dispatching.WorkerSeen]:
        return [worker for worker in self.alive if self.still[worker.id] <= within]


class StoreLook:
    """What is asked of the records. The counters of workers are held against what they were by our own clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._counters: dict[int, tuple[int, float]] = {}
        self._sums: measures.Measures | None = None
        self._ended = _Rising()
        self._looked = -math.inf

    def __call__(self, sums: bool) -> StoreSeen:
        schema = measures.schema(self.database)
        if schema != SCHEMA:
            return StoreSeen(schema, [], {}, None, {})
        with self.database.read() as connection:
            alive = dispatching.alive_workers(connection)
        now = time.monotonic()
        self._counters = {worker.id: (worker.counter, self._moved(worker, now)) for worker in alive}
        self._looked = now
        if sums:
            self._sums = measures.measure(self.database)
            self._ended.look(self._sums.methods)
        still = {worker: now - moved for worker, (_, moved) in self._counters.items()}
        return StoreSeen(schema, alive, still, self._sums, dict(self._ended.risen))

    def _moved(self, worker: dispatching.WorkerSeen, now: float) -> float:
        """When its counter was last seen to move, by the monotonic clock."""
        counter, moved = self._counters.get(worker.id, (-1, -math.inf))
        if counter == worker.counter:
            return moved
        # A counter that is seen for the first time may have stood still for long, unless we were looking just before.
        return now if counter >= 0 or now - self._looked < LATE_SECONDS else -math.inf


@dataclass(frozen=True)
class BrokerSeen:
    """quiet: seconds since a dispatcher looked, infinite where none has; waiting: messages nobody has taken."""

    quiet: float
    waiting: int
    memory: int
    version: str


class BrokerLook:
    """What is asked of Redis, by one connection that is kept."""

    def __init__(self, config: Settings, database: Database) -> None:
        self.config, self.database = config, database
        self._client: Any = None
        self._prefix = ""

    def __call__(self, sums: bool) -> BrokerSeen:
        if self._client is None:
            self._client = lab.reach_broker(self.config.broker)
        try:
            self._prefix = self._prefix or dispatching.key_prefix(self.database)
        except Exception as error:
            raise RuntimeError("its keys begin with the lab's id, and the store, which knows that, is out") from error
        try:
            quiet = self._client.object("idletime", f"{self._prefix}incarnation")
            about = self._client.info("memory") | self._client.info("server")
            waiting = self._client.llen(self._prefix + dispatching.QUEUE)
        except Exception:
            client, self._client = self._client, None
            client.close()
            raise
        return BrokerSeen(
            math.inf if quiet is None else float(quiet), int(waiting), int(about["used_memory"]), about["redis_version"]
        )


@dataclass(frozen=True)
class DiskSeen:
    """free: of the disk under each place. kept, bytes: artifacts in their folder; None where they lie behind a URL."""

    free: dict[str, int]
    kept: int | None
    bytes: int | None


class DiskLook:
    """Free room of the home folder and of the artifacts' folder or cache; how much the artifacts take."""

    def __init__(self, config: Settings) -> None:
        self.places = {"home": config.root, "artifacts": config.artifacts_folder}
        self.kept = artifacts.of(config)
        self._walked: tuple[int, int] | None = None
        self._again = -math.inf

    def __call__(self, sums: bool) -> DiskSeen:
        free = {name: shutil.disk_usage(_above(path)).free for name, path in self.places.items()}
        if self.kept.remote is not None:
            return DiskSeen(free, None, None)
        if sums and time.monotonic() > self._again:
            began = time.monotonic()
            sizes = [one.bytes for one in self.kept.list()]
            self._walked = len(sizes), sum(sizes)
            took = time.monotonic() - began
            self._again = time.monotonic() + max(WALK_SECONDS, SCAN_FACTOR * took)
        return DiskSeen(free, *(self._walked or (None, None)))


def _above(path: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


class Monitor:
    """What is known of a lab at the moment. Threads may ask it."""

    def __init__(self, config: Settings) -> None:
        self.config = config
        self.database = Database(config.store_url)
        self.store: Look[StoreSeen] = Look("store", StoreLook(self.database))
        # Its own connections: one that hangs in the store must not make the broker look out.
        self.broker: Look[BrokerSeen] = Look("broker", BrokerLook(config, Database(config.store_url)))
        self.disk: Look[DiskSeen] = Look("disk", DiskLook(config))

    @property
    def looks(self) -> tuple[Look[Any], ...]:
        return self.store, self.broker, self.disk

    def start(self) -> None:
        for look in self.looks:
            look.want()  # what has risen is counted from here on
            look.start()

    def stop(self) -> None:
        for look in self.looks:
            look.stop()

    # --- is it well? ---------------------------------------------------------------------------------------------

    def health(self) -> dict[str, str]:
        """Part -> what is wrong with it, empty where it is well."""
        return {
            "store": self._out(self.store) or self._schema(),
            "broker": self._out(self.broker),
            "dispatcher": self._dispatcher(),
            "workers": self._workers(),
            "disk": self._out(self.disk) or self._room(),
        }

    def _out(self, look: Look[Any]) -> str:
        if look.silent > LATE_SECONDS:
            since = "yet" if math.isinf(look.silent) else f"for {look.silent:.0f} s"
            return f"the {look.name} has not answered {since}"
        return f"the {look.name} does not answer: {look.error}" if look.error else ""

    def _schema(self) -> str:
        found = self.store.answer.schema if self.store.answer else ""
        if found == SCHEMA:
            return ""
        return f"the store has schema {found}, this program is of schema {SCHEMA}; use one version everywhere"

    def _dispatcher(self) -> str:
        if self._out(self.broker) or self.broker.answer is None:
            return "cannot be seen without the broker"
        quiet = self.broker.answer.quiet
        if quiet <= QUIET_SECONDS:
            return ""
        since = "since Redis started empty" if math.isinf(quiet) else f"for {quiet:.0f} s"
        return f"no dispatcher has looked {since}; start one: netassay dispatch"

    def _workers(self) -> str:
        if self._out(self.store) or self._schema() or self.store.answer is None:
            return "cannot be seen without the store"
        seen = self.store.answer
        if seen.moving(self.config.lost_after):
            return ""
        if not seen.alive:
            return "no worker has signed on; start one: netassay worker"
        names = ", ".join(worker.name for worker in seen.alive[:5])
        return f"no worker has shown a sign of life for {self.config.lost_after:.0f} s ({names}); see its log"

    def _room(self) -> str:
        free = self.disk.answer.free if self.disk.answer else {}
        short = [f"{left / 1e9:.1f} GB under the {name}" for name, left in free.items() if left < disk.ROOM]
        return f"only {' and '.join(short)} are free; make room" if short else ""

    # --- its numbers ---------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Any]:
        """The numbers as families of prometheus_client. What could not be asked for is left out."""
        yield InfoMetricFamily(
            "netassay_build",
            "Versions of the monitor.",
            value={"version": __version__, "schema": SCHEMA, "python": platform.python_version()},
        )
        yield _gauge("netassay_up", "1 where this part of the lab is well, see /healthz.", "part", self._ups())
        yield _gauge(
            "netassay_monitor_look_seconds", "What the last sums took.", "part", {k.name: k.took for k in self.looks}
        )
        if self.store.answer is not None and not self._out(self.store):
            yield from self._of_store(self.store.answer)
        if self.broker.answer is not None and not self._out(self.broker):
            yield from self._of_broker(self.broker.answer)
        if self.disk.answer is not None and not self._out(self.disk):
            yield from self._of_disk(self.disk.answer)

    def _ups(self) -> dict[str, float]:
        return {part: float(not wrong) for part, wrong in self.health().items()}

    def _of_store(self, seen: StoreSeen) -> Iterator[Any]:
        moving = seen.moving(self.config.lost_after)
        workers = {"alive": len(moving), "silent": len(seen.alive) - len(moving)}
        yield _gauge(
            "netassay_workers",
            "Workers that have not signed off, by whether their counter moves.",
            "state",
            workers,
        )
        yield _gauge("netassay_slots", "Slots of the workers that are alive.", "", sum(w.slots for w in moving))
        sums = seen.sums
        if sums is None:
            return
        yield _gauge("netassay_slots_busy", "Slots that hold a chunk.", "", sums.busy)
        yield _gauge("netassay_batches", "Batches by state.", "state", sums.batches)
        jobs = GaugeMetricFamily(
            "netassay_jobs",
            "Jobs by the state of their batch and their own; one that two batches hold counts in both.",
            labels=["batch_state", "state"],
        )
        for both, number in sorted(sums.jobs.items()):
            jobs.add_metric(both, number)
        yield jobs
        methods = GaugeMetricFamily(
            "netassay_method_jobs", "Jobs that have ended, by method and how they ended.", labels=["method", "state"]
        )
        for both, number in sorted(sums.methods.items()):
            methods.add_metric(both, number)
        yield methods
        ended = CounterMetricFamily(
            "netassay_jobs_ended",
            "Jobs that ended since this monitor started, by method and how they ended; retried ones again.",
            labels=["method", "state"],
        )
        for both, number in sorted(seen.ended.items()):
            ended.add_metric(both, number)
        yield ended
        yield _gauge("netassay_chunks", "Chunks by state.", "state", sums.chunks)
        yield _gauge(
            "netassay_backlog_seconds",
            "Predicted seconds of one slot for what open batches have still to run, jobs in hand left out.",
            "",
            sums.backlog,
        )
        attempts = CounterMetricFamily("netassay_attempts", "Processes that died on a job, by cause.", labels=["cause"])
        for cause, number in sorted(sums.attempts.items()):
            attempts.add_metric([cause], number)
        yield attempts
        yield CounterMetricFamily("netassay_worker_losses", "Workers that were lost.", value=sums.losses)
        yield _gauge("netassay_store_bytes", "The records on disk.", "", sums.bytes)

    def _of_broker(self, seen: BrokerSeen) -> Iterator[Any]:
        yield _gauge("netassay_messages_waiting", "Messages in Redis that nobody has taken.", "", seen.waiting)
        yield _gauge("netassay_redis_memory_bytes", "Memory that Redis uses, for all it holds.", "", seen.memory)
        yield _gauge(
            "netassay_dispatcher_quiet_seconds",
            "Seconds since a dispatcher looked, in whole ones; +Inf where none has since Redis started empty.",
            "",
            seen.quiet,
        )

    def _of_disk(self, seen: DiskSeen) -> Iterator[Any]:
        yield _gauge("netassay_disk_free_bytes", "Free room of the disk under a folder.", "folder", seen.free)
        if seen.kept is not None and seen.bytes is not None:
            yield _gauge("netassay_artifacts", "Artifacts in their folder.", "", seen.kept)
            yield _gauge("netassay_artifacts_bytes", "What the artifacts take.", "", seen.bytes)

    def exposition(self) -> bytes:
        """All numbers as text for Prometheus."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    async def sums(self) -> None:
        """Have sums made where those in hand are old, and wait for them a while."""
        began = time.monotonic()
        for look in self.looks:
            look.want()
        while time.monotonic() - began < PATIENCE_SECONDS:
            if not any(look.asked for look in self.looks):
                return
            await asyncio.sleep(0.01)


class _Rising:
    """Counters made of sums that may fall: a retry takes a job out of those that ended."""

    def __init__(self) -> None:
        self._last: Mapping[tuple[str, str], int] | None = None
        self.risen: dict[tuple[str, str], int] = defaultdict(int)
        """by how much each sum has risen in all since the first look, its falls left out"""

    def look(self, now: Mapping[tuple[str, str], int]) -> None:
        before = now if self._last is None else self._last
        for key, value in now.items():
            self.risen[key] += max(0, value - before.get(key, 0))
        self._last = now


def _gauge(name: str, words: str, label: str, values: Mapping[str, float] | float) -> GaugeMetricFamily:
    if not isinstance(values, Mapping):
        return GaugeMetricFamily(name, words, value=values)
    family = GaugeMetricFamily(name, words, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


def application(monitor: Monitor) -> Starlette:
    """The three answers as an application of ASGI."""

    async def livez(request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def healthz(request: Request) -> Response:
        wrong = monitor.health()
        checks = {part: {"well": not reason, "reason": reason} for part, reason in wrong.items()}
        well = not any(wrong.values())
        return JSONResponse({"well": well, "checks": checks}, 200 if well else 503, {"Cache-Control": "no-store"})

    async def metrics(request: Request) -> Response:
        await monitor.sums()
        return Response(monitor.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    answers = {"/livez": livez, "/healthz": healthz, "/metrics": metrics}
    return Starlette(routes=[Route(path, answer, methods=["GET"]) for path, answer in answers.items()])


def listen(address: str) -> socket.socket:
    """A socket at `host:port`, `[::1]:port` for IPv6. Raises MonitorError."""
    host, _, port = address.rpartition(":")
    try:
        if not (port.isdecimal() and int(port) < 1 << 16):  # getaddrinfo would take some other port
            raise ValueError(f"{port!r} is no port")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family)
    except (OSError, ValueError) as error:
        raise MonitorError(
            f"nobody can listen at {address!r} ({error}); set NETASSAY_MONITOR to a free host:port, such as "
            f"{lab.MONITOR_ADDRESS}"
        ) from None


def serve(config: Settings, address: str) -> None:
    """Answer at this address until SIGTERM. Raises MonitorError, StoreError."""
    monitor = Monitor(config)
    with listen(address) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                application(monitor), log_config=None, access_log=False, lifespan="off", server_header=False,
                timeout_keep_alive=30, timeout_graceful_shutdown=2, limit_concurrency=MOST_CONNECTIONS,
            )
        )  # fmt: skip
        monitor.start()
        try:
            server.run(sockets=[listening])
        finally:
            monitor.stop()


def main() -> int:
    """`python -m producer.monitor [HOST:PORT]`: the monitor as a process of its own."""
    config = settings()
    logs.configure("monitor")
    if not config.broker:
        logs.complain("NETASSAY_BROKER is not set; start an embedded lab with: netassay up")
        return 2
    try:
        serve(config, sys.argv[1] if len(sys.argv) > 1 else config.monitor or lab.MONITOR_ADDRESS)
    except UserError as error:
        logs.complain(f"the monitor cannot start: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
