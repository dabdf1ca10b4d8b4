"""The services that tests need: PostgreSQL and Redis, as they are found on this machine.

NETASSAY_TEST_POSTGRES is the URL of a database whose user may create others; where it is not set, the server on this
host is tried. A test that lacks a service is skipped at home and fails in CI, where a promise that nobody checks would
go unnoticed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
import redis

from netassay.store import tables
from netassay.store.database import Database
from producer import lab

#: The kinds of store. What is promised of a store is promised of both.
STORES = ("sqlite", "postgresql")


def absent(service: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(service)
    pytest.skip(service)


def require_redis() -> None:
    """Skip, or in CI fail, where there is no Redis server to start."""
    try:
        lab.redis_binary()
    except lab.LabError as error:
        absent(str(error))


@functools.cache
def _postgres() -> tuple[str, str]:
    """URL of the database that others are made from, and why there is none."""
    url = os.environ.get("NETASSAY_TEST_POSTGRES", "postgresql://127.0.0.1:5432/postgres")
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.Error as error:
        return url, f"no PostgreSQL at {url}: {error}; set NETASSAY_TEST_POSTGRES"
    return url, ""


def require_postgres() -> str:
    """URL of the database that others are made from; skips, or in CI fails, where there is none."""
    url, missing = _postgres()
    if missing:
        absent(missing)
    return url


def _administer(statement: str) -> None:
    with psycopg.connect(_postgres()[0], autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]


@contextlib.contextmanager
def new_database() -> Iterator[str]:
    """URL of a new, empty database of PostgreSQL, dropped with the block."""
    url = require_postgres()
    name = f"netassay_test_{secrets.token_hex(6)}"
    _administer(f"CREATE DATABASE {name}")
    try:
        yield url.rpartition("/")[0] + f"/{name}"
    finally:
        _administer(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def empty_database(kind: str, folder: Path) -> Iterator[str]:
    """URL of a store of this kind without any table."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'store.sqlite'}"
        return
    with new_database() as url:
        yield url


@contextlib.contextmanager
def new_store(kind: str, folder: Path) -> Iterator[Database]:
    """An empty store of this kind, with its tables."""
    with _kept_database() if kind == "postgresql" else empty_database(kind, folder) as url:
        database = Database(url)
        database.prepare()
        try:
            yield database
        finally:
            database.dispose()


@dataclass
class _Kept:
    """A database of PostgreSQL whose tables are as `prepare` made them. To empty one takes a tenth of the time of
    dropping it and making another."""

    url: str
    fingerprint: str
    drop: contextlib.ExitStack


#: Those that no test uses now.
_kept: list[_Kept] = []
#: One that has grown by more is dropped: deleting its rows would take longer.
_KEPT_BYTES = 20_000_000
#: All that a test could have changed but rows: relations and their columns, indexes, constraints, triggers, rights,
#: functions, settings of the database, the schema's version.
_FINGERPRINT = """
SELECT md5(string_agg(what, '|' ORDER BY what)) FROM (
    SELECT format('%s %s %s %s %s', relname, relkind, relacl, reloptions, relpersistence)
        FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull)
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s %s', pg_get_indexdef(indexrelid), indisvalid)
        FROM pg_index JOIN pg_class c ON c.oid = indexrelid WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s %s', conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s %s', tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('%s %s', nspname, nspacl) FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'
    UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s %s', setrole, setconfig) FROM pg_db_role_setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL SELECT version_num FROM alembic_version
) AS everything(what)
"""


def _value(connection: psycopg.Connection, statement: str) -> Any:
    (value,) = connection.execute(statement).fetchone() or (None,)  # type: ignore[call-overload]
    return value


@contextlib.contextmanager
def _kept_database() -> Iterator[str]:
    """URL of a store without rows on PostgreSQL: one that a test before left as it was but for its rows, else a new
    one."""
    require_postgres()
    mine = _kept.pop() if _kept else _new_to_keep()
    try:
        yield mine.url
    finally:
        kept = False
        with contextlib.suppress(psycopg.Error):
            kept = _emptied(mine)
        if kept:
            _kept.append(mine)
        else:
            mine.drop.close()


def _new_to_keep() -> _Kept:
    with contextlib.ExitStack() as drop:
        url = drop.enter_context(new_database())
        database = Database(url)
        database.prepare()
        database.dispose()
        with psycopg.connect(url) as connection:
            return _Kept(url, _value(connection, _FINGERPRINT), drop.pop_all())


def _emptied(database: _Kept) -> bool:
    """Take all rows out, so that the store is as `prepare` leaves it, with another id. False where the test changed
    more than rows, or left many."""
    with psycopg.connect(database.url, options="-c lock_timeout=5s -c synchronous_commit=off") as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        size = _value(connection, "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r'")
        if _value(connection, _FINGERPRINT) != database.fingerprint or size > _KEPT_BYTES:
            return False
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(f"DELETE FROM {table.name}")  # type: ignore[call-overload]
        connection.execute(
            "SELECT setval(oid, 1, false) FROM pg_class WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace"
        )
        connection.execute("SELECT pg_stat_reset()")
        with connection.cursor() as cursor:
            cursor.executemany("INSERT INTO lab (name, value) VALUES (%s, %s)", [*tables.counters().items()])
    return True


def drop_kept() -> None:
    """Drop all databases that were kept for the next test."""
    while _kept:
        _kept.pop().drop.close()


def shared_redis() -> str:
    """URL of a Redis that runs already and that others may use too: NETASSAY_TEST_REDIS, else the one on this host."""
    url = os.environ.get("NETASSAY_TEST_REDIS", "redis://127.0.0.1:6379/0")
    try:
        redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5).ping()
    except redis.RedisError as error:
        absent(f"no Redis at {url}: {error}; set NETASSAY_TEST_REDIS")
    return url


class RedisServer:
    """A Redis on a port of its own, with an append-only file, that can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        require_redis()
        self.folder, self.options = folder, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            lab.redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
            "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", *self.options,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.RedisError):
                redis.Redis(port=self.port, socket_timeout=5).execute_command("PING")
                return
            # One that asks for a password has come up as well.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                if self.options:
                    return
            if time.monotonic() > deadline:
                pytest.fail(f"Redis did not start on port {self.port}")
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait()
