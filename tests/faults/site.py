"""A lab with all that surrounds it in a fault run: services that may be killed and are brought back, bad ways to them,
a second worker, a small disk, clocks; and a way to the store that no accident touches."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from labs import Lab, variables
from services import RedisServer
from sqlalchemy import text

from netassay.settings import Settings
from netassay.store.database import Database
from producer import lab as embedded_lab

from .postgres import Postgres
from .proxy import Proxy
from .witness import Witness, alive

REPOSITORY = Path(__file__).parents[2]
#: Size of the disk that fills up: the store and logs of some ten thousand jobs, many times over.
DISK_BYTES = 256 << 20
#: Methods of the harness itself.
METHODS = Path(__file__).parent / "methods"
#: All slots of a worker together; an endless allocation ends long before the machine feels it.
MEMORY = 1_000_000_000


class _Broker(RedisServer):
    """A Redis that the lab reaches by way of a proxy."""

    proxy: Proxy | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port if self.proxy else self.port}/0"


class Site:
    """One lab of a kind (`embedded` or `cluster`) for the time of a `with` block.

    without: guards that are switched off. notes: what this machine did not allow.
    """

    def __init__(self, kind: str, lost_after: float = 3.0, without: str = "", slots: int = 2) -> None:
        self.kind, self.lost_after, self.without, self.slots = kind, lost_after, without, slots
        self.notes: list[str] = []
        self.server: _Broker | None = None
        self.postgres: Postgres | None = None
        self.broker_way: Proxy | None = None
        self.store_way: Proxy | None = None
        self.second: subprocess.Popen | None = None
        self.second_host: Lab | None = None
        self.disk: Path | None = None
        """where a small disk is mounted, on which the store lies"""
        self.tending = threading.RLock()
        """held by whoever starts labs and workers again"""
        self.broker_lock, self.store_lock = threading.Lock(), threading.Lock()
        """held by whoever takes these services away and brings them back"""
        self.killed: set[int] = set()
        """supervisors of labs that accidents have killed"""
        self.surprises: list[str] = []
        """what came to an end by itself that should not have"""
        self._supervisors: dict[Path, int] = {}
        self._stack = contextlib.ExitStack()
        self._ending = threading.Event()

    # --- its life ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Site:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._stack.close()

    def _build(self) -> None:
        # Processes are killed here, not machines: what they wrote is there whether a disk has it or not; and on a disk
        # that others keep busy a job of a tenth of a second may take five.
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="na-", dir=memory if os.access(memory, os.W_OK) else None))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.armed, self.clocks, self.scratch = (self.folder / name for name in ("armed", "clocks", "scratch"))
        for folder in (self.armed, self.clocks, self.scratch):
            folder.mkdir()
        paths = [str(Path(__file__).parent / "clock"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = {
            "LOST_AFTER": str(self.lost_after),
            "WITHOUT": self.without,
            "CRASH_ARMED": str(self.armed),
            "TEST_CLOCKS": str(self.clocks),
            "MEMORY": str(MEMORY),
            "METHODS": str(METHODS),
        }
        self.environment = {f"NETASSAY_{name}": value for name, value in environment.items()}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        small = self._small_disk(self.folder / "disk")
        if self.kind == "cluster":
            self._build_cluster(small)
        else:
            self.lab = Lab(small / "home", self.slots, self.environment)
            self.direct = self.lab.database
        self._stack.callback(lambda: self.direct.dispose())
        self.home = self.lab.home
        self.home.mkdir(exist_ok=True)
        self.witness = Witness(self.workers)
        self._stack.callback(self._end)
        self.lab.up()
        if self.second_host is not None:
            self.second_host.up()
        threading.Thread(target=self._tend, name="tend", daemon=True).start()

    def _build_cluster(self, small: Path) -> None:
        data = small / "postgres"
        data.mkdir()
        for folder in (self.folder, small):
            folder.chmod(0o711)  # PostgreSQL runs as another user and has to get there
        self.postgres = Postgres(data)
        self._stack.callback(self.postgres.stop)
        self.postgres.start()
        self.server = _Broker(self.folder / "redis")
        self.server.start()
        self._stack.callback(self.server.kill)
        self.store_way, self.broker_way = Proxy(self.postgres.port), Proxy(self.server.port)
        self._stack.callback(self.store_way.close)
        self._stack.callback(self.broker_way.close)
        self.server.proxy = self.broker_way
        shared = {**self.environment, "NETASSAY_ARTIFACTS": str(self.folder / "artifacts")}
        store = self.postgres.url(self.store_way.port)
        self.lab = Lab(self.folder / "host-1", self.slots, shared, self.server, store)
        self.second_host = Lab(self.folder / "host-2", 1, shared, self.server, store)
        self.second_host.home.mkdir()
        self.direct = Database(self.postgres.url())
        self.lab.database = self.direct

    def _small_disk(self, place: Path) -> Path:
        place.mkdir()
        options = f"size={DISK_BYTES},mode=0755"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "netassay-faults", str(place)], capture_output=True, text=True
        )
        if mounted.returncode:
            self.notes.append(f"no full disks: {mounted.stderr.strip() or 'mount refused'}")
        else:
            self.disk = place
            self._stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=False, capture_output=True)
        return place

    def fill_disk(self) -> Path:
        """Leave no byte on the small disk. Returns the file whose removal makes room again."""
        assert self.disk is not None
        ballast = self.disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        return ballast

    def _end(self) -> None:
        self.witness.close()
        with self.tending:
            for host in self.hosts():
                for process in host.processes():
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                shutil.rmtree(embedded_lab.Place(host.config.root).runtime, ignore_errors=True)
            if self.second is not None:
                self.second.kill()
                self.second.wait()

    # --- its parts -----------------------------------------------------------------------------------------------

    def hosts(self) -> list[Lab]:
        return [host for host in (self.lab, self.second_host) if host is not None]

    def described(self, host: Lab) -> dict[str, Any]:
        """What the lab of a host wrote down, while its supervisor lives."""
        try:
            about = json.loads((host.home / "lab.json").read_text())
        except (OSError, ValueError):
            return {}
        return about if alive(about["pid"]) else {}

    def workers(self) -> list[int]:
        """Process ids of the workers that there should be; some may be dead."""
        found = [self.described(host).get("services", {}).get("worker", 0) for host in self.hosts()]
        if self.second is not None:
            found.append(self.second.pid)
        return [pid for pid in found if pid and alive(pid)]

    def services(self, name: str) -> list[int]:
        """Processes of a service, or of the `lab`s themselves."""
        if name == "redis" and self.server is not None:
            return [self.server.pid]
        found = []
        for host in self.hosts():
            about = self.described(host)
            found.append(about.get("pid", 0) if name == "lab" else about.get("services", {}).get(name, 0))
        return [pid for pid in found if pid and alive(pid)]

    def children(self) -> dict[int, int]:
        """Compute child -> its worker."""
        workers = set(self.workers())
        return {pid: worker for pid, worker in dict(self.witness.parent).items() if worker in workers and alive(pid)}

    @property
    def config(self) -> Settings:
        return self.lab.config

    @property
    def broker(self) -> str:
        """Redis itself, without any proxy; empty while an embedded lab is not up."""
        if self.server is not None:
            return f"redis://127.0.0.1:{self.server.port}/0"
        return str(self.described(self.lab).get("broker", "")).replace("redis+socket", "unix")

    def query(self, statement: str, **values: Any) -> list[Any]:
        with self.direct.read() as connection:
            return list(connection.execute(text(statement), values).all())

    def command(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a verb of `netassay` at this lab, as somebody at a terminal would."""
        named = {f"NETASSAY_{name}": value for name, value in environment.items()}
        return subprocess.Popen(
            [sys.executable, "-m", "producer.cli", *arguments],
            env={**os.environ, **self.environment, **embedded_lab.environment_of(self.config), **named},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.scratch,
        )

    # --- bringing back -------------------------------------------------------------------------------------------

    def _tend(self) -> None:
        """Bring back what has no supervisor of its own, as an operator would: a killed lab, the second worker."""
        while not self._ending.wait(0.5):
            with contextlib.suppress(Exception), self.tending:
                self.tend()

    @contextlib.contextmanager
    def not_tended(self) -> Iterator[bool]:
        """Nobody starts a lab again within the block. False where somebody is at it right now."""
        free = self.tending.acquire(timeout=0.2)
        try:
            yield free
        finally:
            if free:
                self.tending.release()

    def tend(self) -> None:
        if self._ending.is_set():
            return
        for host in self.hosts():
            about = self.described(host)
            last = self._supervisors.get(host.home, 0)
            if about:
                self._supervisors[host.home] = about["pid"]
            elif last and last not in self.killed:
                self.killed.add(last)
                log = (host.home / "logs" / "lab.log").read_text(errors="replace")[-600:]
                self.surprises.append(f"the supervisor of {host.home.name} ended by itself: {log}")
            if not about:
                with contextlib.suppress(Exception, BaseExceptionGroup), variables(host.environment):
                    embedded_lab.up(host.config, host.slots, flower=False)
        if self.second_host is None and (self.second is None or self.second.poll() is not None):
            self.second = self._start_second()

    def _start_second(self) -> subprocess.Popen | None:
        about = self.described(self.lab)
        if not about:
            return None
        command = [*embedded_lab.PYTHON, "-m", "producer.tether", str(os.getpid()), *embedded_lab.worker_command(1)]
        environment = {**os.environ, **self.environment, **embedded_lab.environment_of(self.config)}
        with open(self.folder / "second.log", "ab") as log:
            return subprocess.Popen(
                command,
                env={**environment, "NETASSAY_BROKER": about["broker"]},
                cwd=self.scratch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def healthy(self) -> bool:
        """Every worker that should be there is, and has signed on; every lab has its dispatcher."""
        wanted = 2
        with contextlib.suppress(Exception):
            known = {row.pid for row in self.query("SELECT pid FROM worker WHERE state = 'alive'")}
            there = [pid for pid in self.workers() if pid in known]
            return len(there) >= wanted and len(self.services("dispatcher")) == len(self.hosts())
        return False

    def heal(self, seconds: float = 240.0) -> None:
        """Wait until all is well again. Raises TimeoutError where it does not become so."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the lab did not come back within {seconds:.0f} s: {self.state()}")
            time.sleep(0.2)

    def state(self) -> Mapping[str, Any]:
        about: dict[str, Any] = {"workers": self.workers(), "dispatchers": self.services("dispatcher")}
        with contextlib.suppress(Exception):
            about["known"] = [tuple(row) for row in self.query("SELECT id, pid, state FROM worker ORDER BY id DESC")][
                :8
            ]
        return about

    @contextlib.contextmanager
    def retrying(self, seconds: float = 60.0) -> Iterator[Callable[[Callable[[], Any]], Any]]:
        """Within: `again(action)` does something to the store until it succeeds or the time is over."""
        deadline = time.monotonic() + seconds

        def again(action: Callable[[], Any]) -> Any:
            while True:
                try:
                    return action()
                except Exception:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)

        yield again

    def keep_evidence(self, place: Path) -> None:
        """Copy logs, side logs and the store to a folder."""
        place.mkdir(parents=True, exist_ok=True)
        for host in self.hosts():
            shutil.copytree(host.home / "logs", place / f"logs-{host.home.name}", dirs_exist_ok=True)
        for file in (*self.folder.glob("*.log"), *self.folder.glob("disk/home/store.sqlite*")):
            shutil.copy2(file, place)
        if self.postgres is not None:
            dump = self.postgres._do("pg_dump", self.postgres.url(), check=False)
            (place / "store.sql").write_text(dump.stdout or dump.stderr)
            shutil.copy2(self.postgres.log, place)
