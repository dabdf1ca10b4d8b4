"""What is missing on this host, or wrong with it, and the command that mends it.

A doctor only looks: nothing is installed, started or created. Each look ends within seconds, also where a host drops
all packets or a disk hangs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from netassay import __version__, disk
from netassay.errors import UserError
from netassay.settings import Settings, masked
from producer import lab
from producer.wording import counted

if TYPE_CHECKING:
    from netassay.store.artifacts import Artifacts
    from netassay.store.database import Database

State = Literal["ok", "missing", "wrong", "unknown"]

#: What one look may take.
LOOK_SECONDS = 8.0
#: Importing all methods, a user's own among them.
METHODS_SECONDS = 60.0
#: A worker renews its counter every second or two; one that does not for so long is probably dead.
STILL_SECONDS = 5.0
#: A dispatcher looks into Redis several times a second.
DISPATCHER_SECONDS = 5.0
#: Clocks of two hosts may differ so much: times of records are for people.
CLOCK_SECONDS = 5.0
#: What a lab may do in Redis: the commands of docker/redis/users.acl, which says what each is for.
REDIS_RIGHTS = (
    "+@connection -@dangerous +info +time +lpush +rpush +rpop +brpop +llen +hset +hget +hdel +zadd +zrem +zrange"
    " +zrangebyscore +sadd +srem +smembers +get +set +del +exists +pexpire +object|idletime +multi +exec +watch"
    " +unwatch +evalsha +script|load +script|exists +publish +psubscribe +punsubscribe"
)
#: A compute child with torch takes some 300 MB before it has done anything.
MEMORY_A_SLOT = 500_000_000
OLDEST_REDIS = (6, 2)
#: File systems on which SQLite's locks and its shared memory cannot be relied upon.
NETWORK_FILE_SYSTEMS = re.compile(
    r"^(nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|ncpfs|davfs|virtiofs|fuse\..*|fuse)$"
)
COMPUTE = {"torch": "torch", "onnxruntime": "onnxruntime", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Check:
    """What one look found. mend: the command, or the words, that mend it."""

    name: str
    state: State
    found: str
    mend: str = ""


#: What a look says: its state, what was found, what mends it.
Finding = tuple[State, str, str]


def _ok(found: str) -> Finding:
    return "ok", found, ""


def _python(config: Settings) -> Finding:
    from netassay.store.database import OLDEST_SQLITE

    found = f"netassay {__version__}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    if sys.version_info < (3, 11) or sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        return "wrong", found, f"use Python 3.11 or newer with SQLite {needed} or newer, e.g. of conda-forge"
    return _ok(found)


def _packages(config: Settings) -> Finding:
    missing = [name for name, module in COMPUTE.items() if importlib.util.find_spec(module) is None]
    if config.artifacts_url.startswith("s3:") and importlib.util.find_spec("s3fs") is None:
        return "missing", "NETASSAY_ARTIFACTS is on S3, and s3fs is not installed", "pip install 'netassay[s3]'"
    if not missing:
        return _ok(f"{', '.join(COMPUTE)}: this host can compute")
    found = f"without {', '.join(missing)} this host can submit and read, but not compute"
    if lab.on_cluster(config) and not lab.Place(config.root).described():
        return _ok(found)
    return "missing", found, "pip install 'netassay[compute]'"


def _redis(config: Settings) -> Finding:
    url = lab.broker_of(config)
    if not url:
        try:
            binary = lab.redis_binary()
        except lab.LabError:
            return "missing", "no Redis server, and NETASSAY_BROKER names none", _install_redis()
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=LOOK_SECONDS)
        number = re.search(r"v=(\S+)", done.stdout)
        if done.returncode or number is None:
            return "wrong", f"{binary} does not run: {done.stderr.strip() or done.stdout.strip()}", _install_redis()
        return _judged(f"Redis {number[1]} in {binary}, for the lab of this folder", number[1])
    client = lab.reach_broker(url, LOOK_SECONDS / 2)
    try:
        about = client.info("server")
    except Exception as error:
        return "unknown", f"{masked(url)} answers; its version cannot be seen ({error})", ""
    return _judged(f"{masked(url)} answers, version {about['redis_version']}", about["redis_version"])


def _judged(found: str, version: str) -> Finding:
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_REDIS:
        return "wrong", found, f"use Redis {'.'.join(map(str, OLDEST_REDIS))} or newer"
    return _ok(found)


def _install_redis() -> str:
    if shutil.which("apt-get"):
        return "sudo apt-get install redis-server"
    if shutil.which("brew"):
        return "brew install redis"
    return "pip install 'netassay[embedded]'; or set NETASSAY_BROKER to a running Redis"


def _redis_settings(config: Settings) -> Finding:
    url = lab.broker_of(config)
    if not url:
        return _ok("are given by: netassay up")
    client = lab.reach_broker(url, LOOK_SECONDS / 2)
    try:
        policy = client.info("memory").get("maxmemory_policy", "noeviction")
        appends = client.info("persistence").get("aof_enabled", 0)
    except Exception as error:
        return "unknown", f"cannot be seen ({error})", ""
    told = f"maxmemory-policy {policy}, appendonly {'yes' if appends else 'no'}"
    wanted = []
    if policy != "noeviction":
        wanted.append("maxmemory-policy noeviction")
    if not appends:
        wanted.append("appendonly yes")
    if wanted:
        # Nothing is lost either way (the store holds the jobs), but what is evicted has to be sent again each time.
        return "wrong", told, f"{' && '.join(f'redis-cli config set {one}' for one in wanted)}, and in redis.conf"
    return _ok(told)


def _redis_rights(config: Settings) -> Finding:
    """Try what a lab does, on keys of its own."""
    url = lab.broker_of(config)
    if not url:
        return _ok("are given by: netassay up")
    import redis

    client = lab.reach_broker(url, LOOK_SECONDS / 2)
    key = f"{_prefix(config)}doctor.{uuid.uuid4().hex}"
    trials: dict[str, Callable[[], Any]] = {
        "SET": lambda: client.set(key, "1", ex=10),
        "GET": lambda: client.get(key),
        "DEL": lambda: client.delete(key),
        "LPUSH": lambda: client.lpush(f"{key}.list", "1"),
        "LLEN": lambda: client.llen(f"{key}.list"),
        "BRPOP": lambda: client.brpop([f"{key}.list"], timeout=1),
        "SADD": lambda: client.sadd(f"{key}.set", "1"),
        "SMEMBERS": lambda: client.smembers(f"{key}.set"),
        "SREM": lambda: client.srem(f"{key}.set", "1"),
        "PUBLISH": lambda: client.publish(key, "1"),
    }
    refused = []
    for name, trial in trials.items():
        try:
            trial()
        except redis.exceptions.NoPermissionError:
            refused.append(name)
    for rest in (key, f"{key}.list", f"{key}.set"):  # where what takes them away was refused
        with contextlib.suppress(redis.RedisError):
            client.delete(rest)
    if refused:
        user = client.connection_pool.connection_kwargs.get("username") or "default"
        told = f"the user {user} may not {', '.join(refused)} on keys {_prefix(config)}*"
        return "wrong", told, f"redis-cli acl setuser {user} '~netassay:*' '&*' {REDIS_RIGHTS}"
    return _ok("all that a lab needs")


def _prefix(config: Settings) -> str:
    """What all keys of this lab in Redis begin with."""
    from netassay.store import dispatching

    with _database(config) as database:
        return "netassay:" if database is None else dispatching.key_prefix(database)


@contextlib.contextmanager
def _database(config: Settings) -> Iterator[Database | None]:
    """The records, for the time of the block; None where their tables are not there."""
    from sqlalchemy import inspect

    with lab.records_of(config) as database:
        there = database.exists()
        if there:
            with database.read() as connection:
                there = inspect(connection).has_table("alembic_version")
        yield database if there else None


def _store(config: Settings) -> Finding:
    with lab.records_of(config) as database:
        return _sqlite(database) if database.sqlite else _postgres(database)


def _sqlite(database: Database) -> Finding:
    path = Path(database.url.database or "").absolute()
    parent = _existing(path.parent)
    free = shutil.disk_usage(parent).free
    room = f"{free / 1e9:.1f} GB free"
    if not os.access(parent, os.W_OK | os.X_OK):
        return "wrong", f"{parent} cannot be written to", f"chown {_user()} {parent}; or set NETASSAY_HOME elsewhere"
    if free < disk.ROOM:
        return "wrong", f"{path}: only {room}", "make room on that disk; or set NETASSAY_HOME elsewhere"
    if not path.exists():
        return _ok(f"no records yet; SQLite makes {path} at first use, {room}")
    if not os.access(path, os.W_OK):
        return "wrong", f"{path} cannot be written to", f"chown {_user()} {path}*"
    schema = _schema(database)
    if schema[0] != "ok":
        return schema
    with database.write():  # takes the lock, changes nothing
        pass
    return _ok(f"SQLite in {path}, {schema[1]}, {room}")


def _postgres(database: Database) -> Finding:
    from sqlalchemy import inspect, text

    from netassay.store import tables
    from netassay.store.database import OLDEST_POSTGRES

    with database.read() as connection:
        number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
        version = connection.execute(text("SHOW server_version")).scalar_one()
        found = f"{database} answers, PostgreSQL {version.split()[0]}"
        if number < OLDEST_POSTGRES:
            return "wrong", found, f"use PostgreSQL {OLDEST_POSTGRES // 10000} or newer"
        user = connection.execute(text("SELECT current_user")).scalar_one()
        if not inspect(connection).has_table("alembic_version"):
            if connection.execute(text("SELECT has_schema_privilege(current_schema(), 'CREATE')")).scalar():
                return _ok(f"{found}; no records yet, the tables are made at first use")
            grant = f"psql -c 'GRANT CREATE ON SCHEMA public TO \"{user}\"' {database.url.database}"
            return "wrong", f"{found}, but {user} may not create tables", grant
        rights = " AND ".join(
            f"has_table_privilege(:name, '{right}')" for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
        )
        there = [name for name in tables.metadata.tables if inspect(connection).has_table(name)]
        refused = [name for name in there if not connection.execute(text(f"SELECT {rights}"), {"name": name}).scalar()]
    if refused:
        grant = f"psql -c 'GRANT ALL ON ALL TABLES IN SCHEMA public TO \"{user}\"' {database.url.database}"
        return "wrong", f"{found}, but {user} has no rights on {', '.join(refused)}", grant
    schema = _schema(database)
    return schema if schema[0] != "ok" else _ok(f"{found}, {schema[1]}")


def _schema(database: Database) -> Finding:
    from sqlalchemy import text
    from sqlalchemy.exc import DatabaseError

    from netassay.store.database import SCHEMA

    try:
        with database.read() as connection:
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except DatabaseError as error:
        return (
            "wrong",
            f"{database} is no store of netassay: {error.orig}",
            "point NETASSAY_STORE or NETASSAY_HOME elsewhere",
        )
    if found == SCHEMA:
        return _ok(f"schema {found}")
    if str(found) < SCHEMA:
        return _ok(f"schema {found}, brought to {SCHEMA} at the next use")
    return "wrong", f"schema {found} was written by a newer netassay", "pip install --upgrade netassay"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _user() -> str:
    import getpass

    with contextlib.suppress(Exception):  # a container's user may have no name
        return getpass.getuser()
    return str(os.getuid())


def _artifacts(config: Settings) -> Finding:
    from netassay.store.artifacts import Artifacts

    if "://" in config.artifacts_url:
        return _remote_artifacts(config)
    folder = config.artifacts_folder
    parent = _existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        mend = f"chown {_user()} {parent}; or set NETASSAY_ARTIFACTS elsewhere"
        return "wrong", f"{parent} cannot be written to", mend
    if not folder.exists():
        return _ok(f"none yet; kept in {folder}")
    if not _comes_back(Artifacts(folder), Artifacts(folder)):
        return "wrong", f"{folder} gave back other bytes than it was given", "check that disk"
    return _ok(f"{folder}: wrote, read and removed a file; {shutil.disk_usage(folder).free / 1e9:.1f} GB free")


def _remote_artifacts(config: Settings) -> Finding:
    from netassay.store.artifacts import Artifacts
    from netassay.store.remote import Remote

    remote = Remote(config.artifacts_url, patience=LOOK_SECONDS / 4)
    remote.look()
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        # Two caches: what the second reads has been there and back.
        same = _comes_back(Artifacts(Path(here), remote), Artifacts(Path(there), remote))
    if not same:
        return "wrong", f"{remote} gave back other bytes than it was given", "ask whoever runs it"
    return _ok(f"{masked(config.artifacts_url)}: wrote, read and removed a file")


def _comes_back(mine: Artifacts, theirs: Artifacts) -> bool:
    """Whether a file that one keeps is the same for the other; it is removed again."""
    probe = f"netassay doctor {uuid.uuid4()}".encode()
    digest = mine.put(probe)
    try:
        return theirs.read(digest) == probe
    finally:
        mine.remove(digest)


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system that holds the path, by the text of /proc/mounts; empty where none does."""
    best, kind = "", ""
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), words[1])
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):  # a later mount on the same point hides the earlier
            best, kind = point, words[2]
    return kind


def _home(config: Settings) -> Finding:
    home = config.root
    try:
        kind = file_system(_existing(home).resolve(), Path("/proc/mounts").read_text())
    except OSError:
        return "unknown", f"{home}: the kind of its disk cannot be seen on {sys.platform}", ""
    found = f"{home} on {kind or 'an unknown file system'}"
    if NETWORK_FILE_SYSTEMS.match(kind):
        if config.broker and not config.store_url.startswith("sqlite"):
            return _ok(f"{found}; it holds logs only")
        return (
            "wrong",
            f"{found}: SQLite and Redis are not safe on a network file system",
            "set NETASSAY_HOME to a folder on a local disk (export NETASSAY_HOME=$HOME/.netassay, if that is one)",
        )
    return _ok(found)


def _socket(config: Settings) -> Finding:
    if config.broker:
        return _ok("none is used: NETASSAY_BROKER is set")
    path = lab.Place(config.root).runtime / "redis.sock"
    if len(str(path).encode()) > lab.SOCKET_PATH_BYTES:
        return "wrong", f"{path} is longer than {lab.SOCKET_PATH_BYTES} bytes", "export TMPDIR=/tmp"
    if not os.access(path.parent.parent, os.W_OK):
        return "wrong", f"{path.parent.parent} cannot be written to", "export TMPDIR=/tmp"
    return _ok(str(path))


def _lab(config: Settings) -> Finding:
    described = lab.Place(config.root).described()
    if described:
        dying = ", ".join(f"{name} {times}" for name, times in described.get("restarts", {}).items())
        again = f"; started again because they died: {dying} times, see {config.root / 'logs'}" if dying else ""
        return _ok(f"up in {config.root}, {counted(described['slots'], 'slot')}{again}")
    if lab.on_cluster(config):
        return _ok("none on this host; the workers of the cluster do the work")
    return "missing", f"no lab runs in {config.root}: what is submitted waits", "netassay up"


def _workers(config: Settings) -> Finding:
    from netassay.store import dispatching

    start = "netassay up" if not lab.on_cluster(config) else "netassay worker, on each host that is to compute"
    with _database(config) as database:
        if database is None:
            return "missing", "none: there is no store yet", start

        def counters() -> dict[str, int]:
            with database.read() as connection:
                return {worker.name: worker.counter for worker in dispatching.alive_workers(connection)}

        first = still = counters()
        deadline = time.monotonic() + STILL_SECONDS
        while still and time.monotonic() < deadline:
            time.sleep(0.2)
            now = counters()
            still = {name: value for name, value in still.items() if now.get(name) == value}
    living = [name for name in first if name not in still]
    if not living:
        told = f"; {', '.join(still)} shows no sign of life" if still else ""
        return "missing", f"no worker is alive{told}", start
    if still:
        lost = "those are given up by the dispatcher in some seconds; see the logs on their hosts"
        return "wrong", f"{', '.join(living)} alive, but no sign of life from {', '.join(still)}", lost
    return _ok(f"{', '.join(living)} alive")


def _dispatcher(config: Settings) -> Finding:
    import redis

    url = lab.broker_of(config)
    start = "netassay dispatch, on one host of the cluster" if config.broker else "netassay up"
    with _database(config) as database:
        if not url or database is None:
            return "missing", "none: no lab runs", start
    client = lab.reach_broker(url, LOOK_SECONDS / 2)
    # It reads this key each time it looks, several times a second; Redis knows for how long nobody did.
    try:
        idle = client.object("IDLETIME", f"{_prefix(config)}incarnation")
    except redis.RedisError as error:
        return "unknown", f"cannot be seen ({error})", ""
    if idle is None:
        return "missing", "none has ever looked into this Redis for this store", start
    if idle > DISPATCHER_SECONDS:
        return "missing", f"none has looked into Redis for {idle} s", start
    return _ok("publishes")


def _versions(config: Settings) -> Finding:
    from sqlalchemy import text

    from netassay.store import reading

    newest: dict[str, dict[str, Any]] = {}
    with _database(config) as database:
        if database is None:
            return _ok("no worker has computed anything yet")
        hosts = {worker.host for worker in reading.workers(database)}
        with database.read() as connection:
            for body in connection.execute(text("SELECT body FROM provenance ORDER BY id DESC LIMIT 1000")).scalars():
                about = json.loads(body)
                newest.setdefault(about.get("host", ""), about)
    known = {host: about.get("netassay", "") for host, about in newest.items() if host in hosts}
    other = [f"{host} has netassay {version}" for host, version in known.items() if version != __version__]
    if other:
        return "wrong", f"{', '.join(other)}; here it is {__version__}", f"pip install netassay=={__version__}, there"
    if not known:
        return _ok("no worker that is alive has computed anything yet")
    return _ok(f"{', '.join(sorted(known))}: netassay {__version__}, as here")


def host_memory() -> int:
    """Bytes this host may use: its memory, or its control group's limit where that is lower."""
    import psutil

    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no control groups here, or "max"
            total = min(total, int(Path(path).read_text()))
    return total


def _host(config: Settings) -> Finding:
    memory, cores = host_memory(), lab.cores()
    slots = (lab.Place(config.root).described() or {}).get("slots") or config.slots or cores
    found = f"{counted(cores, 'core')}, {memory / 1e9:.1f} GB of memory, {counted(slots, 'slot')}"
    if config.memory > memory:
        more = f"NETASSAY_MEMORY gives the slots {config.memory / 1e9:.1f} GB"
        return "wrong", f"{found}; {more}", "set NETASSAY_MEMORY to less than the host has, or to 0"
    share = (config.memory or 0.8 * memory) / slots
    if share < MEMORY_A_SLOT:
        few = max(1, int((config.memory or 0.8 * memory) / MEMORY_A_SLOT))
        return "wrong", f"{found}: {share / 1e6:.0f} MB each is too little for torch", f"export NETASSAY_SLOTS={few}"
    return _ok(f"{found} of {share / 1e9:.1f} GB")


#: Says each name before it is imported: where this process dies or hangs, the last one is to blame.
_IMPORT_ALL = """
import json, sys
from netassay import catalogue
def say(*words):
    sys.__stdout__.write("\\n" + json.dumps(words) + "\\n")
    sys.__stdout__.flush()
for name, why in getattr(catalogue, "broken", dict)().items():
    say("broken", name, why)
for name in catalogue.names():
    say("begin", name, "")
    try:
        catalogue.get(name)
    except BaseException as error:
        say("broken", name, str(error) or type(error).__name__)
    say("end", name, "")
"""


def _methods(config: Settings) -> Finding:
    folders = [folder for folder in config.methods.split(os.pathsep) if folder]
    if absent := [folder for folder in folders if not Path(folder).is_dir()]:
        return "wrong", f"NETASSAY_METHODS names no folder: {', '.join(absent)}", "mend NETASSAY_METHODS"
    # In a process of its own: what users wrote may do anything at import.
    environment = {**os.environ, "NETASSAY_METHODS": config.methods}
    command = [*lab.PYTHON, "-c", _IMPORT_ALL]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=METHODS_SECONDS
        )
        out, code, words = done.stdout, done.returncode, done.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired as error:
        out, code, words = error.stdout or b"", 1, f"its import takes more than {METHODS_SECONDS:.0f} s"
    broken: dict[str, str] = {}
    begun = ""
    good = 0
    for kind, name, why in _said(out.decode(errors="replace")):
        if kind == "broken":
            broken.setdefault(name, why)
        begun = name if kind == "begin" else "" if kind == "end" else begun
        good += kind == "end" and name not in broken
    if begun:
        broken[begun] = words.rpartition("\n")[2] or f"the process that imported it ended with {code}"
    elif code:
        return "wrong", f"methods cannot be listed: {words.rpartition(chr(10))[2]}", "mend NETASSAY_METHODS"
    if broken:
        told = "; ".join(f"{name}: {why.partition(chr(10))[0]}" for name, why in broken.items())
        return "wrong", told, f"mend {', '.join(broken)}, or take it out of NETASSAY_METHODS"
    return _ok(f"{good} can be imported")


def _said(text: str) -> Iterator[tuple[str, str, str]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # what a module prints at import
            kind, name, why = json.loads(line)
            yield kind, name, why


def _clock(config: Settings) -> Finding:
    from sqlalchemy import text

    others: dict[str, float] = {}
    if config.broker:
        seconds, micros = lab.reach_broker(config.broker, LOOK_SECONDS / 2).time()
        others["the broker"] = seconds + micros / 1e6 - time.time()
    if not config.store_url.startswith("sqlite"):
        with lab.records_of(config) as database, database.read() as connection:
            there = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        others["the store"] = float(there) - time.time()
    apart = {name: shift for name, shift in others.items() if abs(shift) > CLOCK_SECONDS}
    if apart:
        told = ", ".join(f"{abs(s):.0f} s {'behind' if s > 0 else 'ahead of'} that of {n}" for n, s in apart.items())
        return "wrong", f"the clock of this host is {told}", "sudo timedatectl set-ntp true"
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return _ok(f"{now}{', as that of ' + ' and '.join(others) if others else ''}")


#: In the order in which one would look: what comes later rests on what comes before.
_LOOKS: dict[str, Callable[[Settings], Finding]] = {
    "Python": _python,
    "packages": _packages,
    "Redis": _redis,
    "Redis settings": _redis_settings,
    "store": _store,
    "Redis rights": _redis_rights,
    "artifacts": _artifacts,
    "home folder": _home,
    "socket": _socket,
    "lab": _lab,
    "workers": _workers,
    "dispatcher": _dispatcher,
    "versions": _versions,
    "memory and cores": _host,
    "methods": _methods,
    "clock": _clock,
}
#: Looks that would only repeat what the one they rest on has said.
_RESTS_ON = {
    "Redis settings": ("Redis",),
    "Redis rights": ("Redis", "store"),
    "workers": ("store", "lab"),
    "dispatcher": ("Redis", "store", "lab"),
    "versions": ("store",),
    "clock": ("Redis", "store"),
}


def examine(config: Settings) -> list[Check]:
    """All checks, in order. Never raises, never hangs: a look that fails says so."""
    checks: dict[str, Check] = {}
    for name, look in _LOOKS.items():
        ill = [other for other in _RESTS_ON.get(name, ()) if checks[other].state in ("missing", "wrong")]
        if ill:
            checks[name] = Check(name, "unknown", f"cannot be seen before {ill[0]} is mended")
        else:
            checks[name] = _look(name, functools.partial(look, config))
    return list(checks.values())


def _look(name: str, look: Callable[[], Finding]) -> Check:
    seconds = METHODS_SECONDS + LOOK_SECONDS if name == "methods" else LOOK_SECONDS
    try:
        return Check(name, *lab.within(seconds, look, f"no answer within {seconds:.0f} s"))
    except UserError as error:
        found, _, way = str(error).partition("; ")
        return Check(name, "wrong", found, way or _GENERAL.get(name, "see that it runs"))
    except Exception as error:
        words = masked(str(getattr(error, "orig", error)).strip()) or type(error).__name__
        return Check(name, "wrong", words.replace("\n", " "), _GENERAL.get(name, "see that it runs"))


_GENERAL = {
    "store": "see that the database runs, and that NETASSAY_STORE is right",
    "artifacts": "see that NETASSAY_ARTIFACTS is right, and the rights there",
    "Redis": "see that Redis runs, and that NETASSAY_BROKER is right",
}
