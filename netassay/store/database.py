"""One door to the database of records: SQLite now, another database later by the same calls.

SQLite runs in WAL mode; every write takes the lock at its start (BEGIN IMMEDIATE), so a transaction never fails
half-way for want of it; a connection serves one thread at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from netassay.errors import UserError
from netassay.settings import settings
from netassay.store import tables

#: A busy database is waited for this long; SQLite's own default is 0.
BUSY_SECONDS = 30
#: The newest migration in netassay/store/migrations; a store of another one is refused or upgraded.
SCHEMA = "0001"
#: The first SQLite with RETURNING (March 2021).
OLDEST_SQLITE = (3, 35, 0)

#: What a database that is down, locked, full or cut off raises: worth trying again.
Outage: tuple[type[DBAPIError], ...] = (OperationalError, InterfaceError)


class StoreError(UserError):
    """The store cannot be used; the message says what to try."""


class Database:
    """A store's records. Cheap to make; connections open at first use.

    Raises StoreError for a URL that is none, or not of SQLite.
    """

    def __init__(self, url: str | None = None) -> None:
        given = url or settings().store_url
        try:
            self.url = make_url(given)
        except ArgumentError:
            raise StoreError(
                f"NETASSAY_STORE is no database URL: {given!r}; leave it empty, or give sqlite:////folder/store.sqlite"
            ) from None
        if self.url.get_backend_name() != "sqlite":
            raise StoreError(
                f"this release keeps its records in SQLite only, not in {self.url.get_backend_name()}; leave "
                "NETASSAY_STORE empty, or give sqlite:////folder/store.sqlite (on a disk of this host)"
            )
        self.engine = create_engine(
            self.url,
            # Size 0 is no bound: as many connections as threads work at once, each in the hands of one of them. A
            # bounded pool of one connection a thread would close those that other threads are using.
            poolclass=QueuePool,
            pool_size=0,
            pool_use_lifo=True,
            connect_args={"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False},
        )
        event.listen(self.engine, "connect", _prepare_sqlite)
        event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view."""
        with self.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self, durable: bool = False) -> Iterator[Connection]:
        """One transaction; `durable`: when the block ends, it and all before it have been synced to disk."""
        with self.engine.connect() as connection:
            if self.sqlite:
                connection = connection.execution_options(netassay_write=True)
                if durable:
                    _synchronous(connection, "FULL")
            try:
                with connection.begin():
                    yield connection
            finally:
                if self.sqlite and durable:
                    _synchronous(connection, "NORMAL")

    def prepare(self) -> None:
        """Create the tables where there are none, upgrade those of an older schema.

        Raises StoreError where the store is newer than this program, or no store at all, or SQLite is too old.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreError(
                f"this Python comes with SQLite {sqlite3.sqlite_version}; netassay needs "
                f"{'.'.join(map(str, OLDEST_SQLITE))} or newer: use a newer Python, or one of conda-forge"
            )
        if self.sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        try:
            found = self._schema()
            if found == SCHEMA:
                return
            if found is None:
                self._create()
            else:
                self._upgrade(found)
        except OperationalError as error:
            raise StoreError(
                f"the store {self.url.render_as_string()} cannot be opened: {error.orig}; check NETASSAY_STORE, "
                "NETASSAY_HOME and the rights on that folder"
            ) from error
        except DBAPIError as error:
            if "not a database" not in str(error.orig):
                raise
            raise StoreError(f"{self.url.database} is not a SQLite database; point NETASSAY_HOME elsewhere") from error

    def exists(self) -> bool:
        return not self.sqlite or not self.url.database or Path(self.url.database).is_file()

    def _schema(self) -> str | None:
        with self.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    def _create(self) -> None:
        with self.write(durable=True) as connection:
            if inspect(connection).has_table("alembic_version"):  # another process was faster
                return
            tables.create(connection)
            connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
            connection.execute(text("INSERT INTO alembic_version VALUES (:v)"), {"v": SCHEMA})

    def _upgrade(self, found: str) -> None:
        from alembic import command
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        from netassay.store.migrations import config

        try:
            ScriptDirectory.from_config(config(self)).get_revision(found)
        except CommandError:
            raise StoreError(
                f"the store has schema {found}, this program knows up to {SCHEMA}: it was written by a newer netassay; "
                "upgrade this installation"
            ) from None
        command.upgrade(config(self), "head")

    def insert(
        self, connection: Connection, table: str, columns: Sequence[str], rows: list[tuple], ignore: bool = False
    ) -> int:
        """Insert many rows in one call; `ignore`: skip those whose primary key exists. Returns how many went in."""
        if not rows:
            return 0
        mark = "?" if self.sqlite else "%s"
        statement = (
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(mark for _ in columns)})"
            f"{' ON CONFLICT DO NOTHING' if ignore else ''}"
        )
        return connection.exec_driver_sql(statement, rows).rowcount

    def persist(self, seconds: float, action: Any) -> Any:
        """Call `action` until it succeeds or `seconds` of outages have passed."""
        deadline, pause = time.monotonic() + seconds, 0.05
        while True:
            try:
                return action()
            except Outage:
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 2.0)

    def dispose(self) -> None:
        self.engine.dispose()


def _prepare_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "cache_size=-65536",  # 64 MiB
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("netassay_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _synchronous(connection: Connection, level: str) -> None:
    # Ineffective inside a transaction, hence straight to the driver, before SQLAlchemy begins one.
    dbapi = connection.connection.dbapi_connection
    if dbapi is not None:
        dbapi.cursor().execute(f"PRAGMA synchronous={level}")


def slices(items: Sequence, size: int = 10_000) -> Iterable[Sequence]:
    """Consecutive pieces of at most `size`: a transaction of more rows keeps others waiting."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
