"""A real lab for tests: Redis, dispatcher, worker and children in a folder of their own; and the oracle.

The oracle compares three witnesses that do not share code: what was submitted, what the store says, and the side log to
which the jobs themselves append a synced line before and after their work.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from services import RedisServer, new_database, require_redis
from sqlalchemy import text

from netassay import catalogue
from netassay.job import ENDS, Record
from netassay.methods.diagnostics import _side_log
from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab, submission
from producer import lab as embedded_lab

#: Every wait ends; on a busy machine with two cores a lab is up to ten times slower than on an idle one.
PATIENCE = 60.0


def until(condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "") -> Any:
    """The first true value of `condition`. Fails the test where there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what or condition}")
        time.sleep(0.02)


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Run:
    """One start of a job, as the job itself wrote it down. stop is None where its process died first."""

    job: str
    pid: int
    start: float
    stop: float | None


@dataclass
class Lab:
    """A lab and its folder. environment: variables for all its services.

    It is embedded where no `server` is given: then it has a Redis of its own and records in SQLite. With a server and a
    `store` (URL) it is one host of a cluster.
    """

    home: Path
    slots: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)
    server: RedisServer | None = None
    store: str = ""

    @property
    def config(self) -> Settings:
        named = {name.removeprefix("NETASSAY_").lower(): value for name, value in self.environment.items()}
        known = {name: named[name] for name in ("lost_after", "methods", "artifacts") if name in named}
        return Settings(home=self.home, broker=self.server.url if self.server else "", store=self.store, **known)

    @functools.cached_property
    def database(self) -> Database:
        return Database(self.config.store_url)

    @property
    def log(self) -> Path:
        return self.home / "side.log"

    # --- its life ------------------------------------------------------------------------------------------------

    def up(self) -> None:
        with variables(self.environment):
            lab.up(self.config, self.slots, flower=False, monitor=False)

    def down(self) -> None:
        lab.down(self.config)

    @contextlib.contextmanager
    def second_worker(self) -> Iterator[subprocess.Popen]:
        """Another worker of one slot at this lab, signed on, for the time of the block."""
        about = self.described()
        known = {worker.id for worker in reading.workers(self.database)}
        command = (
            "celery --app worker.app --quiet worker --pool threads --concurrency 1 --without-gossip --without-mingle"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split(), "--queues", "netassay", "--hostname", "second@%h"],
            env={
                **os.environ,
                **self.environment,
                **lab.environment_of(self.config),
                "NETASSAY_BROKER": self.config.broker or about["broker"],
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda: {worker.id for worker in reading.workers(self.database)} - known, what="the second worker")
            yield process
        finally:
            process.terminate()
            process.wait()

    def described(self) -> dict[str, Any]:
        return lab.Place(self.config.root).described() or {}

    def pid(self, service: str) -> int:
        if service == "redis" and self.server is not None:
            return self.server.pid
        return self.described()["pid"] if service == "lab" else self.described()["services"][service]

    def children(self) -> list[int]:
        """Processes of the compute children of the lab's worker."""
        with contextlib.suppress(psutil.Error):
            return [
                process.pid
                for process in psutil.Process(self.pid("worker")).children(recursive=True)
                if "worker.child" in process.cmdline()
            ]
        return []

    def kill(self, service: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a service (or `lab`, their supervisor). Returns the process it had."""
        pid = self.pid(service)
        if service == "redis" and self.server is not None:
            self.server.kill(number)
        else:
            os.kill(pid, number)
        return pid

    def restarted(self, service: str, pid: int) -> int:
        """Wait until a service runs in another process than `pid`. Returns that one.

        The Redis of a cluster is nobody's service: it is started again here, as whoever keeps it would.
        """
        if service == "redis" and self.server is not None:
            self.server.start()
            return self.server.pid

        def other() -> int:
            now = self.described().get("services", {}).get(service, pid)
            return now if now != pid and alive(now) else 0

        return until(other, what=f"a new {service}")

    def processes(self) -> list[psutil.Process]:
        """All processes that were started with this lab's folder in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("NETASSAY_HOME") == str(self.home)
                if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def logs(self) -> str:
        """The ends of all logs, for the report of a failed test."""
        files = sorted((self.home / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    # --- its work ------------------------------------------------------------------------------------------------

    def entry(self, method: str, params: Mapping[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
        """An entry of a sweep whose jobs write to the side log."""
        return {"method": method, "params": {"log": str(self.log), **(params or {})}, **rest}

    def document(self, name: str, *entries: Mapping[str, Any], **rest: Any) -> Path:
        path = self.home / f"{name}.json"  # JSON is YAML
        path.write_text(json.dumps({"name": name, "jobs": entries, **rest}))
        return path

    def submit(self, name: str, *entries: Mapping[str, Any], weight: float = 1.0, **rest: Any) -> str:
        with variables(self.environment):
            submission.submit(self.document(name, *entries, **rest), self.config, weight=weight)
        return name

    def progress(self, name: str) -> reading.Progress:
        return reading.progress(self.database, name)

    def wait(self, *names: str, seconds: float = PATIENCE) -> None:
        """Until the batches are over. Fails with the logs where that takes too long."""
        deadline = time.monotonic() + seconds
        for name in names:
            while not (seen := self.progress(name)).over:
                if time.monotonic() > deadline:
                    pytest.fail(f"after {seconds:.0f} s: {seen}\n{self.logs()}")
                time.sleep(0.05)

    def records(self, name: str) -> list[Record]:
        return list(reading.records(self.database, name))

    def query(self, statement: str, **values: Any) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(text(statement), values).all())

    def started(self) -> set[str]:
        """Jobs that have written a start line."""
        return {line.job for line in _side_log.read(self.log)}

    def runs(self) -> dict[str, list[Run]]:
        """What the side log witnesses: the runs of each job by their start."""
        found: dict[str, list[Run]] = defaultdict(list)
        for line in _side_log.read(self.log):
            runs = found[line.job]
            if line.event == "start":
                runs.append(Run(line.job, line.pid, line.monotonic, None))
                continue
            place = next(
                place
                for place in reversed(range(len(runs)))
                if runs[place].pid == line.pid and runs[place].stop is None
            )
            runs[place] = Run(line.job, line.pid, runs[place].start, line.monotonic)
        return {job: sorted(runs, key=lambda run: run.start) for job, runs in found.items()}

    # --- the oracle ----------------------------------------------------------------------------------------------

    def violations(
        self, *names: str, ends: Callable[[Record], Sequence[str]] = lambda record: ["done"], takeover: bool = False
    ) -> list[str]:
        """What contradicts the promises, in sentences; nothing where all is well.

        ends: how a job may end: a state, or `failed:cause`. takeover: a worker went while these jobs were on their way,
        so what it ran may have been run again by another; where the store has no such worker, that is a violation too.
        Only jobs that were given the lab's side log are compared with it.
        """
        with variables(self.environment):
            return self._violations(names, ends, takeover)

    def _violations(self, names: Sequence[str], ends: Callable[[Record], Sequence[str]], lost: bool) -> list[str]:
        wrong: list[str] = []
        runs = self.runs()
        if lost and not self.query("SELECT 1 FROM worker WHERE state <> 'alive'"):
            wrong.append("no worker went, as far as the store knows")
        for name in names:
            for record in self.records(name):
                wrong += self._wrong_end(record, ends(record))
                if record.params.get("log") == str(self.log):
                    wrong += self._wrong_runs(record, runs.get(called(record), []), lost)
            wrong += self._wrong_counts(name)
        if all(self.progress(name).over for name in names):
            held = self.query("SELECT count(*) FROM running")[0][0]
            wrong += [f"{held} jobs are held though none runs"] if held else []
        return wrong

    def _wrong_end(self, record: Record, ends: Sequence[str]) -> list[str]:
        end = record.state + (f":{record.cause}" if record.cause else "")
        if record.state not in ENDS:
            return [f"{called(record)} never ended ({record.state})"]
        if end not in ends:
            return [f"{called(record)} ended {end}, not {' or '.join(ends)}: {record.message}"]
        if record.state == "done" and record.result != (right := right_result(record)):
            return [f"{called(record)} has the result {record.result}, not {right}"]
        return []

    def _wrong_runs(self, record: Record, runs: Sequence[Run], lost: bool) -> list[str]:
        wrong = []
        whole = [run for run in runs if run.stop is not None]
        if record.state == "done" and not whole:
            wrong.append(f"{called(record)} is done but never ran to its end")
        for before, after in itertools.pairwise(runs):
            if before.stop is not None and after.start < before.stop and not lost:
                wrong.append(f"{called(record)} ran twice at the same time")
        attempts = self.query("SELECT alone FROM attempt WHERE job_id = :id AND spent = 0", id=record.id)
        if len(whole) > 1 and not attempts and not lost:
            wrong.append(f"{called(record)} ran to its end {len(whole)} times though nothing died")
        if attempts and not lost:
            most = 3 if any(row.alone for row in attempts) else 2
            if len(runs) > most:
                wrong.append(f"{called(record)} was started {len(runs)} times, {most} are allowed")
        return wrong

    def _wrong_counts(self, name: str) -> list[str]:
        counted = self.progress(name)
        rows = self.query(
            "SELECT coalesce(r.state, '') AS state, count(*) AS jobs FROM batch b"
            " JOIN membership m ON m.batch_id = b.id LEFT JOIN record r ON r.job_id = m.job_id"
            " WHERE b.name = :name AND b.state <> 'arriving' GROUP BY 1",
            name=name,
        )
        found = {row.state: row.jobs for row in rows}
        wrong = [
            f"{name} counts {getattr(counted, state)} {state}, its records say {found.get(state, 0)}"
            for state in ENDS
            if getattr(counted, state) != found.get(state, 0)
        ]
        if sum(found.values()) != counted.size:
            wrong.append(f"{name} has {sum(found.values())} jobs, {counted.size} were accepted")
        return wrong


def called(record: Record) -> str:
    """How the side log calls the job."""
    method = catalogue.get(record.method)
    params = method.Params.model_validate(record.params)
    return method.module.name(params) if hasattr(method.module, "name") else f"{record.method} {record.key}"


def right_result(record: Record) -> dict[str, Any]:
    """The result that a diagnostic must have, from its params alone."""
    params = record.params
    match record.method:
        case "diagnostics.echo":
            value = params["value"]
            return {"value": value, "square": None if isinstance(value, str) else value * value}
        case "diagnostics.sleep" | "diagnostics.burn":
            return {"seconds": params["seconds"]}
        case "diagnostics.allocate":
            return {"bytes": params["bytes"]}
        case "diagnostics.crash":
            return {"survived": True}
        case _:
            assert record.result is not None
            return record.result


@contextlib.contextmanager
def embedded(slots: int = 2, start: bool = True, **environment: str) -> Iterator[Lab]:
    """A lab in a new folder with a short path, ended and removed with the block.

    environment: settings without their prefix, e.g. LOST_AFTER="3".
    """
    require_redis()
    folder = Path(tempfile.mkdtemp(prefix="na-"))
    found = Lab(folder, slots, {f"NETASSAY_{name}": value for name, value in environment.items()})
    try:
        if start:
            found.up()
        yield found
    finally:
        with contextlib.suppress(Exception):
            found.down()
        for process in found.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(lab.Place(folder).runtime, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(slots: int = 2, start: bool = True, **environment: str) -> Iterator[Lab]:
    """As `embedded`, but one host of a cluster: records in a new database of PostgreSQL, a Redis on a port of its
    own, artifacts in a shared folder."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(new_database())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-")))
        server = RedisServer(folder / "redis")
        server.start()
        stack.callback(server.kill)
        named = {"ARTIFACTS": str(folder / "artifacts"), **environment}
        found = Lab(folder / "host", slots, {f"NETASSAY_{name}": value for name, value in named.items()}, server, url)
        found.home.mkdir()
        try:
            if start:
                found.up()
            yield found
        finally:
            found.database.dispose()
            with contextlib.suppress(Exception):
                found.down()
            for process in found.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()


#: Both kinds of lab. What is promised of one is promised of the other.
KINDS = ("embedded", "cluster")


def a_lab(kind: str, slots: int = 2, start: bool = True, **environment: str) -> contextlib.AbstractContextManager[Lab]:
    """A lab of this kind for the time of a block."""
    return (cluster if kind == "cluster" else embedded)(slots, start, **environment)


def in_python(script: str, lab: Lab, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in which guards can be off or crash points set."""
    named = {f"NETASSAY_{name}": value for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **embedded_lab.environment_of(lab.config), **named},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
