"""The systems that are compared, each started for a block with services of its own and given back clean after it."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import work
from sqlalchemy import text

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab

HERE = Path(__file__).parent
#: What Redis does before it answers: syncs each write, syncs once a second, keeps nothing.
DURABILITIES = {
    "always": ("--appendonly", "yes", "--appendfsync", "always"),
    "everysec": ("--appendonly", "yes", "--appendfsync", "everysec"),
    "no": ("--appendonly", "no"),
}
#: Longer than anything measured here takes on a machine worth measuring.
PATIENCE = 600.0
#: Jobs that do nothing, as the seconds of a job.
TRIVIAL = -1.0


@dataclass(frozen=True)
class Submission:
    """began, ended: by the machine's monotonic clock. peak: bytes of the submitting process."""

    began: float
    ended: float
    peak: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Run:
    """From the start of the submission to the last result. redis: bytes it held at its peak, beyond an empty one."""

    jobs: int
    seconds: float
    submitting: float = 0.0
    redis: int = 0

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


def python(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A Python with the benchmark's modules on its path."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def submitted(name: str, seconds: float, first: int, jobs: int, variables: Mapping[str, str]) -> Submission:
    """What one submission took, in a fresh process."""
    arguments = (str(HERE / "submitter.py"), name, str(seconds), str(first), str(jobs))
    process = python(*arguments, **variables)
    said, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise SystemExit(f"the submission to {name} failed")
    return Submission(**json.loads(said))


@dataclass
class RedisServer:
    """A Redis on a unix socket, with nothing in it."""

    folder: Path
    durability: str = "everysec"
    process: subprocess.Popen = field(init=False)

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    @functools.cached_property
    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def start(self) -> None:
        command = [
            lab.redis_binary(), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder),
            "--save", "", "--maxmemory-policy", "noeviction", *DURABILITIES[self.durability],
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _until(self.socket.exists)
        _until(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def most(self) -> int:
        """Bytes held at the peak, beyond those of an empty server."""
        return peak_of(self.client)

    def end(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def peak_of(client: redis.Redis) -> int:
    memory: Any = client.info("memory")
    return memory["used_memory_peak"] - memory["used_memory_startup"]


@contextlib.contextmanager
def redis_server(durability: str) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="nabench-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(Path(folder), durability)
        server.start()
        try:
            yield server
        finally:
            server.end()


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("a service did not start")
        time.sleep(0.01)


class System:
    """What runs jobs. `finished`: how many have a result; `check`: raises where a result is not right."""

    name: str
    variables: Mapping[str, str]

    def finished(self) -> int:
        raise NotImplementedError

    def check(self, seconds: float, first: int, jobs: int) -> None:
        raise NotImplementedError

    def redis_peak(self) -> int:
        return 0

    def submit(self, seconds: float, first: int, jobs: int) -> Submission:
        return submitted(self.name, seconds, first, jobs, self.variables)

    def run(self, seconds: float, first: int, jobs: int) -> Run:
        """Submit and wait for the last result; `first` tells these jobs from those of other runs."""
        before = self.finished()
        sent = self.submit(seconds, first, jobs)
        ended = self._wait(before + jobs, sent.began)
        self.check(seconds, first, jobs)
        return Run(jobs, ended - sent.began, sent.seconds, self.redis_peak())

    def _wait(self, count: int, began: float) -> float:
        """When so many had a result. Asks seldom while many are missing: to ask costs time of those who work."""
        missing = at_first = count - self.finished()
        since = time.monotonic()
        while missing > 0:
            passed = time.monotonic() - since
            speed = (at_first - missing) / passed if passed > 0 else 0.0
            time.sleep(min(0.5, max(0.01, missing / speed / 4 if speed else 0.05)))
            missing = count - self.finished()
            if time.monotonic() - began > PATIENCE:
                raise SystemExit(f"{self.name}: {missing} jobs have no result after {PATIENCE:.0f} s")
        return time.monotonic()


class Netassay(System):
    """An embedded lab, Flower and monitor included."""

    name = "netassay"

    def __init__(self, home: Path, about: Mapping[str, Any]) -> None:
        self.config = Settings(home=home)
        self.variables = lab.environment_of(self.config)
        self.database = Database(self.config.store_url)
        self.client = redis.Redis.from_url(lab.redis_address(about["broker"]))
        self.lab = psutil.Process(about["pid"])

    def finished(self) -> int:
        with self.database.read() as connection:
            return connection.execute(text("SELECT coalesce(sum(done), 0) FROM chunk")).scalar_one()

    def check(self, seconds: float, first: int, jobs: int) -> None:
        seen = reading.progress(self.database, f"bench-{first}")
        assert seen.done == jobs, seen
        name, right = ("square", None) if seconds < 0 else ("seconds", seconds * jobs)
        with self.database.read() as connection:
            total = connection.execute(
                text(
                    f"SELECT total(r.result ->> '{name}') FROM record r JOIN membership m ON m.job_id = r.job_id"
                    " JOIN batch b ON b.id = m.batch_id WHERE b.name = :name"
                ),
                {"name": f"bench-{first}"},
            ).scalar_one()
        _agree(total, sum(value * value for value in range(first, first + jobs)) if right is None else right)

    def redis_peak(self) -> int:
        return peak_of(self.client)

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far of its compute children, and of all its other processes together."""
        children, others = 0.0, 0.0
        for process in [self.lab, *self.lab.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                spent = sum(process.cpu_times()[:2])
                if "worker.child" in process.cmdline():
                    children += spent
                else:
                    others += spent
        return children, others


@contextlib.contextmanager
def netassay(slots: int = 2) -> Iterator[Netassay]:
    with tempfile.TemporaryDirectory(prefix="nabench-", ignore_cleanup_errors=True) as folder:
        with lab.running(Settings(home=Path(folder)), slots=slots, flower=True, monitor=True) as about:
            system = Netassay(Path(folder), about)
            try:
                system.run(0.01, 10**8, 20 * slots)
                system.run(TRIVIAL, 10**8 + 10**6, 1000)
                yield system
            finally:
                system.database.dispose()
                system.client.close()


class Peer(System):
    """Celery or RQ: they keep messages and results in a Redis."""

    def __init__(self, server: RedisServer, variables: Mapping[str, str]) -> None:
        self.server, self.variables = server, variables

    def redis_peak(self) -> int:
        return self.server.most()


class Celery(Peer):
    name = "celery"

    @functools.cached_property
    def results(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.server.socket), db=1)

    def finished(self) -> int:
        size: Any = self.results.dbsize()
        return size

    def check(self, seconds: float, first: int, jobs: int) -> None:
        keys: Any = self.results.keys("celery-task-meta-*")
        texts: Any = self.results.mget(keys)
        ends = [json.loads(one) for one in texts]
        assert len(ends) == jobs
        assert all(end["status"] == "SUCCESS" for end in ends)
        _agree(sum(end["result"] for end in ends), _sum(seconds, first, jobs))
        self.results.flushdb()


class RQ(Peer):
    name = "rq"

    def finished(self) -> int:
        size: Any = self.server.client.zcard("rq:finished:default")
        return size

    def check(self, seconds: float, first: int, jobs: int) -> None:
        from rq import Queue
        from rq.job import Job
        from rq.registry import FinishedJobRegistry

        client = self.server.client
        names = FinishedJobRegistry(queue=Queue(connection=client)).get_job_ids()
        found = [job for job in Job.fetch_many(names, connection=client) if job is not None]
        assert len(found) == jobs
        _agree(sum(job.return_value() for job in found), _sum(seconds, first, jobs))
        with client.pipeline() as pipe:
            pipe.delete("rq:finished:default")
            for job in found:
                job.delete(pipeline=pipe)
            pipe.execute()


def _sum(seconds: float, first: int, jobs: int) -> float:
    return sum(value * value for value in range(first, first + jobs)) if seconds < 0 else seconds * jobs


def _agree(found: float, right: float) -> None:
    assert abs(found - right) <= 1e-9 * abs(right), f"the results add up to {found}, not {right}"


def celery_variables(server: RedisServer, results: bool) -> dict[str, str]:
    address = f"redis+socket://{server.socket}"
    return {"BENCH_BROKER": address, "BENCH_RESULTS": f"{address}?virtual_host=1" if results else ""}


def rq_variables(server: RedisServer) -> dict[str, str]:
    return {"BENCH_RQ": f"unix://{server.socket}"}


@contextlib.contextmanager
def celery(slots: int = 2) -> Iterator[Celery]:
    """Plain Celery: acknowledged late, taken one by one, two processes, results in Redis."""
    with redis_server("everysec") as server:
        variables = celery_variables(server, results=True)
        command = f"-m celery --app celery_peer --quiet worker --pool prefork --concurrency {slots} --loglevel ERROR"
        with _service(command.split(), variables):
            system = Celery(server, variables)
            system.run(0.01, 10**8, 20 * slots)
            yield system
            system.results.close()


@contextlib.contextmanager
def rq(slots: int = 2, forks: bool = True) -> Iterator[RQ]:
    """RQ's own pool of workers. forks: a process for each job, as is its default, or all jobs in the worker's."""
    with redis_server("everysec") as server:
        variables = rq_variables(server)
        kind = "rq.worker.Worker" if forks else "rq.worker.SimpleWorker"
        command = f"-m rq.cli worker-pool --num-workers {slots} --logging-level ERROR --worker-class {kind}"
        with _service([*command.split(), "--url", variables["BENCH_RQ"]], variables):
            system = RQ(server, variables)
            system.run(0.01, 10**8, 20 * slots)
            yield system


@contextlib.contextmanager
def _service(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    process = python(*command, **variables)
    try:
        yield
    finally:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        for one in family:  # Celery and RQ may leave some behind
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class Pool(System):
    """multiprocessing.Pool: no broker, no records, no second host; a job that dies hangs it. The floor."""

    name = "pool"

    def __init__(self, pool: Any, slots: int) -> None:
        self.pool, self.slots = pool, slots

    def run(self, seconds: float, first: int, jobs: int) -> Run:
        # A tenth of a second a message, or one job where that is longer; with fewer than ten messages a process, the
        # last ones would be waited for.
        each = max(seconds, 1e-6)
        size = max(1, min(int(0.1 / each), jobs // (10 * self.slots)))
        began = time.monotonic()
        if seconds < 0:
            total = sum(self.pool.imap_unordered(work.square_of, range(first, first + jobs), size))
        else:
            params = ((seconds, tag) for tag in range(first, first + jobs))
            total = sum(self.pool.imap_unordered(work.spend_of, params, size))
        ended = time.monotonic()
        _agree(total, _sum(seconds, first, jobs))
        return Run(jobs, ended - began)


@contextlib.contextmanager
def pool(slots: int = 2) -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(slots) as processes:
        system = Pool(processes, slots)
        system.run(0.01, 0, 20 * slots)
        yield system
