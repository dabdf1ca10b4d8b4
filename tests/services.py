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
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest
import redis

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
    with empty_database(kind, folder) as url:
        database = Database(url)
        database.prepare()
        try:
            yield database
        finally:
            database.dispose()


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
