"""How many workers one store carries: the store's own steps, by 1 to 200 simulated workers, and nothing computed.

    python benchmarks/scaling.py --store postgresql://... [--regime paced|saturated|steps] [--workers 1,10,100,200]
        [--seconds 10] [--jobs 20] [--slots 2] [--processes 4] [--repeats 500]

Workers are threads of a few processes: each slot takes a real Celery message from a real (private) Redis, claims its
chunk, and writes its records; each worker renews every second. Paced: a chunk takes two seconds, as in a lab, so W
workers of 2 slots ask for W chunks a second. Saturated: it takes no time. A dispatcher of its own process, the real
one, publishes. Without --store the records are in SQLite, in a temporary folder.

Steps: one thread takes --repeats chunks through publication, claim, renewal and writing of records, one after another,
and prints the processor time of each step: PostgreSQL's, ours, in milliseconds. These hardly depend on what else the
machine does.

Prints for each number of workers: chunks and records a second (and what was asked for), median and 95th percentile of a
claim, of the writing of a chunk's records, of a renewal; passes of the dispatcher a second, and the median of one; the
processor time that PostgreSQL, the simulated workers and the dispatcher took, in cores and in milliseconds a chunk: on
a busy machine these last say more than the rates. `starved` is the share of the slots' time spent waiting for a
message: where it is large, the dispatcher is the narrow part, not the store.

Each worker of s slots needs up to s + 1 connections: 200 of 2 slots need a PostgreSQL with max_connections > 600.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
from sqlalchemy import text

from netassay.job import Segment, key_of
from netassay.store import control, dispatching, running, submission
from netassay.store.database import Database, Outage
from producer import lab
from producer.dispatch import BUSY_PAUSE, IDLE_PAUSE, BrokerDown, CeleryBroker, Dispatcher

METHOD = "diagnostics.echo"
CHUNK_SECONDS = dispatching.CHUNK_SECONDS
#: Chunks a second that are laid out for workers which do not pause; where more are possible, `starved` says so.
MOST_CHUNKS = 400.0
#: A worker of a lab says so often that it lives.
RENEW_SECONDS = 1.0


@dataclass(frozen=True)
class Point:
    """One measurement. jobs: a chunk. paced: a chunk takes its two seconds."""

    url: str
    broker: str
    prefix: str
    workers: int
    slots: int
    jobs: int
    paced: bool
    seconds: float


@dataclass
class Tally:
    """What one process has seen; durations in seconds."""

    claims: list[float] = field(default_factory=list)
    finishes: list[float] = field(default_factory=list)
    renewals: list[float] = field(default_factory=list)
    records: int = 0
    starved: float = 0.0
    refused: int = 0
    cpu: float = 0.0


class Worker:
    """A worker without children: its slots and its sign of life are threads."""

    def __init__(self, point: Point, number: int, tally: Tally, over: threading.Event) -> None:
        self.point, self.tally, self.over = point, tally, over
        self.database = Database(point.url)
        self.id = self.database.persist(30.0, lambda: running.sign_on(self.database, f"s{number}", "s", 1, point.slots))
        steps = [self.serve] * point.slots + [self.renew]
        self.threads = [threading.Thread(target=self.outlast, args=(step, number)) for step in steps]

    def outlast(self, step: Any, number: int) -> None:
        draw = random.Random(number * 1000 + threading.get_ident() % 1000)
        while not self.over.is_set():
            try:
                step(draw)
            except (Outage, redis.RedisError):
                self.tally.refused += 1
                time.sleep(0.5)

    def serve(self, draw: random.Random) -> None:
        server = redis.Redis.from_url(lab.redis_address(self.point.broker))
        queue = self.point.prefix + dispatching.QUEUE
        if self.point.paced:
            time.sleep(draw.uniform(0, CHUNK_SECONDS))  # slots of a lab are not in step
        while not self.over.is_set():
            began = time.perf_counter()
            popped = server.brpop([queue], timeout=1)
            self.tally.starved += time.perf_counter() - began
            if popped is None:
                continue
            message = json.loads(popped[1])  # type: ignore[index]
            (chunk, _), *_ = json.loads(base64.b64decode(message["body"]))
            self.run(chunk)

    def run(self, chunk: int) -> None:
        token, began = running.new_token(), time.perf_counter()
        claim = self.database.persist(30.0, lambda: running.claim(self.database, self.id, chunk, token))
        self.tally.claims.append(time.perf_counter() - began)
        if claim is None:
            return
        if self.point.paced:
            self.over.wait(CHUNK_SECONDS)
        outcomes = [running.Outcome(task.id, "done", result=task.params, seconds=1e-3) for task in claim.tasks]
        # Its timing keeps chunks at the size asked for.
        seconds, began = CHUNK_SECONDS / (self.point.jobs + 0.5), time.perf_counter()
        with contextlib.suppress(running.StaleToken):
            self.database.persist(
                30.0, lambda: running.finish(self.database, self.id, claim, outcomes, seconds_a_job=seconds)
            )
            self.tally.records += len(outcomes)
        self.tally.finishes.append(time.perf_counter() - began)

    def renew(self, draw: random.Random) -> None:
        time.sleep(draw.uniform(0, RENEW_SECONDS))
        while not self.over.wait(RENEW_SECONDS):
            began = time.perf_counter()
            running.renew(self.database, self.id, {})
            self.tally.renewals.append(time.perf_counter() - began)


def work(point: Point, numbers: Sequence[int], gate: Any, results: Any) -> None:
    """A process of simulated workers."""
    tally, over = Tally(), threading.Event()
    workers = [Worker(point, number, tally, over) for number in numbers]
    threads = [thread for worker in workers for thread in worker.threads]
    gate.wait()
    before = cpu_of_mine()
    for thread in threads:
        thread.start()
    time.sleep(point.seconds)
    tally.cpu = cpu_of_mine() - before
    results.put(Tally(**{**vars(tally), **{n: list(getattr(tally, n)) for n in ("claims", "finishes", "renewals")}}))
    over.set()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.database.dispose()


def dispatch(point: Point, gate: Any, results: Any) -> None:
    """The real dispatcher, with a count of what its loop does."""
    database = Database(point.url)
    dispatcher = Dispatcher(database, CeleryBroker(point.broker, point.prefix), lost_after=60.0)
    dispatcher.one_pass()
    gate.wait()
    before, passes, pause = cpu_of_mine(), [], IDLE_PAUSE
    end = time.perf_counter() + point.seconds
    while (began := time.perf_counter()) < end:
        try:
            pause = BUSY_PAUSE if dispatcher.one_pass() else min(IDLE_PAUSE, 2 * pause)
        except (BrokerDown, Outage):
            pause = 1.0
        passes.append(time.perf_counter() - began)
        time.sleep(pause)
    results.put((passes, cpu_of_mine() - before))
    database.dispose()


def cpu_of_mine() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Server:
    """The processes of a PostgreSQL on this host that work for one database."""

    def __init__(self, database: Database) -> None:
        self.name, self.postmaster = database.url.database or "", None
        if database.sqlite:
            return
        with database.read() as connection:
            backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with contextlib.suppress(psutil.Error):
            self.postmaster = psutil.Process(backend).parent()

    def cpu(self) -> dict[int, float]:
        """Process -> seconds."""
        found: dict[int, float] = {}
        for process in self.postmaster.children() if self.postmaster else []:
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if f" {self.name} " in title or "writer" in title or "checkpointer" in title:
                    times = process.cpu_times()
                    found[process.pid] = times.user + times.system
        return found


def batch(database: Database, name: str, first: int, count: int, jobs: int) -> None:
    """A batch of distinct jobs, cut into chunks of so many."""
    params = [f'{{"n":{number}}}' for number in range(first, first + count)]
    keys = [key_of(METHOD, 1, one) for one in params]
    seconds = CHUNK_SECONDS / (jobs + 0.5)
    segment = Segment(METHOD, 1, "", seconds, None, None, None, 1, (), (), params, keys)
    submission.submit(database, name, [segment], {})


def measure(point: Point, processes: int, first: int) -> str:
    """One line of the table."""
    database = Database(point.url)
    most = point.workers / CHUNK_SECONDS * point.slots if point.paced else MOST_CHUNKS
    name = f"scale-{first}"
    batch(database, name, first, int((most * 1.2 * point.seconds + 20) * point.jobs), point.jobs)
    server = Server(database)
    context = multiprocessing.get_context("spawn")
    shares = [range(start, point.workers, processes) for start in range(min(processes, point.workers))]
    gate, results, passes = context.Barrier(len(shares) + 2), context.Queue(), context.Queue()
    crew = [context.Process(target=work, args=(point, list(share), gate, results)) for share in shares]
    crew.append(context.Process(target=dispatch, args=(point, gate, passes)))
    for process in crew:
        process.start()
    gate.wait()
    before = server.cpu()
    time.sleep(point.seconds * 0.9)
    used = sum(seconds - before.get(pid, 0.0) for pid, seconds in server.cpu().items()) / 0.9
    tallies: list[Tally] = [results.get() for _ in shares]
    looks, dispatcher_cpu = passes.get()
    control.cancel(database, name)
    for process in crew:
        process.join()
    with database.write() as connection:
        for worker in connection.execute(text("SELECT id FROM worker WHERE state = 'alive'")).scalars().all():
            connection.execute(text("UPDATE worker SET state = 'stopped' WHERE id = :id"), {"id": worker})
        for chunk in connection.execute(text("SELECT id FROM chunk WHERE state = 'claimed'")).scalars().all():
            dispatching.release(connection, chunk)
    database.dispose()
    return row(point, tallies, looks, dispatcher_cpu, used, most)


def row(
    point: Point, tallies: Sequence[Tally], looks: list[float], dispatcher: float, server: float, most: float
) -> str:
    claims, finishes, renewals = (
        sorted(value for tally in tallies for value in getattr(tally, name))
        for name in ("claims", "finishes", "renewals")
    )
    chunks = len(finishes)
    asked = f"{most:.0f}" if point.paced else "-"
    starved = sum(tally.starved for tally in tallies) / (point.workers * point.slots * point.seconds)
    ours = sum(tally.cpu for tally in tallies)
    each = 1000 / max(chunks, 1)
    cells = [
        str(point.workers),
        asked,
        f"{len(claims) / point.seconds:.0f}",
        f"{sum(tally.records for tally in tallies) / point.seconds:,.0f}",
        *(f"{1000 * middle(values):.0f}, {1000 * late(values):.0f}" for values in (claims, finishes, renewals)),
        f"{len(looks) / point.seconds:.1f}, {1000 * middle(looks):.0f}",  # of the dispatcher
        *(f"{used / point.seconds:.2f}, {used * each:.1f}" for used in (server, ours, dispatcher)),
        f"{100 * starved:.0f} %",
        str(sum(tally.refused for tally in tallies)),
    ]
    return "| " + " | ".join(cells) + " |"


def steps(url: str, jobs: int, repeats: int, first: int) -> None:
    """Prints what each step costs, one after another, with nobody else at the store."""
    database = Database(url)
    batch(database, f"steps-{first}", first, (repeats + 2) * jobs, jobs)
    server, spent = Server(database), {}
    worker = running.sign_on(database, "steps", "s", 1, 2)

    def cost(name: str, step: Any) -> Any:
        wall, ours, theirs = time.perf_counter(), time.thread_time(), sum(server.cpu().values())
        result = step()
        # The server counts in hundredths of a second: only sums over many steps say anything.
        now = time.perf_counter() - wall, time.thread_time() - ours, sum(server.cpu().values()) - theirs
        spent[name] = tuple(map(sum, zip(spent.get(name, (0, 0, 0)), now, strict=True)))
        return result

    def publish() -> list[int]:
        chunks = []
        for _ in range(repeats):
            with database.write() as connection:
                (mine,) = [one for one in dispatching.open_batches(connection) if one.name == f"steps-{first}"]
                message = dispatching.publish_next(connection, mine, 1)
            assert message is not None
            chunks.append(message.chunk_id)
        return chunks

    def end(claim: running.Claim) -> None:
        outcomes = [running.Outcome(task.id, "done", result=task.params) for task in claim.tasks]
        running.finish(database, worker, claim, outcomes, seconds_a_job=CHUNK_SECONDS / (jobs + 0.5))

    chunks = cost("publish", publish)
    claims = cost("claim", lambda: [running.claim(database, worker, chunk) for chunk in chunks])
    cost("renew", lambda: [running.renew(database, worker, {chunks[0]: [1]}) for _ in chunks])
    cost("finish", lambda: [end(claim) for claim in claims])
    dispatcher = Dispatcher(database, _Nowhere(), lost_after=60.0)
    dispatcher.one_pass()
    cost("idle pass", lambda: [dispatcher.one_pass() for _ in chunks])
    control.cancel(database, f"steps-{first}")
    running.sign_off(database, worker)
    records = sum(len(claim.tasks) for claim in claims)
    print(f"{database.url.get_backend_name()}, {repeats} chunks, {records} records, load {os.getloadavg()[0]:.1f}")
    print("| step | PostgreSQL, CPU ms | ours, CPU ms | wall ms |\n| --- | --- | --- | --- |")
    for name, (wall, ours, theirs) in spent.items():
        print(f"| {name} | {1000 * theirs / repeats:.2f} | {1000 * ours / repeats:.2f} | {1000 * wall / repeats:.1f} |")
    database.dispose()


class _Nowhere:
    """A broker that keeps nothing; a dispatcher in front of it still finds all that it published waiting."""

    number: int | None = None

    def send(self, messages: list[dispatching.Message]) -> None: ...

    def waiting(self) -> int:
        return 1

    def remembered(self) -> int | None:
        return self.number

    def remember(self, incarnation: int) -> None:
        self.number = incarnation


HEAD = (
    "| workers | chunks/s asked | claims/s | records/s | claim ms: median, 95 % | finish ms | renew ms |"
    " passes/s, ms | PostgreSQL: cores, ms a chunk | workers | dispatcher | starved | refused |"
)


def middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def late(values: Sequence[float]) -> float:
    """The least value that 95 % of them do not exceed."""
    return sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)] if values else math.nan


@contextlib.contextmanager
def private_redis(folder: Path) -> Iterator[str]:
    """URL of a Redis for the time of the block."""
    socket = folder / "redis.sock"
    command = [lab.redis_binary(), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""]
    process = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.02)
        yield f"redis+socket://{socket}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--store", default="")
    options.add_argument("--regime", choices=["paced", "saturated", "steps"], default="paced")
    options.add_argument("--workers", default="1,2,5,10,20,50,100,200")
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--jobs", type=int, default=20)
    options.add_argument("--slots", type=int, default=2)
    options.add_argument("--processes", type=int, default=4)
    options.add_argument("--repeats", type=int, default=500)
    wanted = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder, private_redis(Path(folder)) as broker:
        url = wanted.store or f"sqlite:///{folder}/store.sqlite"
        database = Database(url)
        database.prepare()
        prefix = dispatching.key_prefix(database)
        database.dispose()
        first = int(time.time()) % 100_000 * 10_000_000
        if wanted.regime == "steps":
            steps(url, wanted.jobs, wanted.repeats, first)
            return
        print(
            f"{database.url.get_backend_name()}, {wanted.regime}, {wanted.slots} slots a worker, {wanted.jobs} jobs a"
            f" chunk, {wanted.seconds:.0f} s a line, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n{HEAD}",
            flush=True,
        )
        for workers in map(int, wanted.workers.split(",")):
            paced = wanted.regime == "paced"
            point = Point(url, broker, prefix, workers, wanted.slots, wanted.jobs, paced, wanted.seconds)
            print(measure(point, wanted.processes, first), flush=True)
            first += 1_000_000


if __name__ == "__main__":
    main()
