"""One door to the database of records: SQLite for one host, PostgreSQL for many, by the same calls.

A write takes its lock at its start, so a transaction never fails half-way for want of it. There are two kinds:

* alone (the default): nobody else writes meanwhile. Whatever moves jobs between chunks or batches is of this kind.
* `beside`: what a worker does to chunks of its own, and what a submission writes before it opens, may run at the same
  time as other such writes; who writes so has to say why the steps of two of them cannot cross.

How far a write is waited for:

* as it comes (the default): a crash of PostgreSQL may forget the last moments, in order and as a whole. For whoever
  asks the store again before going on.
* `lasting`: a crash of PostgreSQL does not undo it. For whoever goes on from it in memory, through the crash and behind
  it: ids that were handed out, rows that later ones are about. SQLite has no server that could crash without its users.
* `durable`: it and all before it are on disk. For what a person is told.

SQLite has one writer at a time anyway (WAL mode, BEGIN IMMEDIATE). On PostgreSQL an advisory lock is held alone or
shared; its queue is fair, so a stream of shared holders starves nobody. Statements there run at READ COMMITTED: each
sees what was committed when it began. A connection serves one thread at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from netassay.errors import NoAnswer, UserError
from netassay.settings import masked, settings

#: A busy database is waited for this long; SQLite's own default is 0.
BUSY_SECONDS = 30
#: The newest migration in netassay/store/migrations; a store of another one is refused or upgraded.
SCHEMA = "0003"
#: The first SQLite with RETURNING (March 2021).
OLDEST_SQLITE = (3, 35, 0)
#: The oldest PostgreSQL that is still looked after, as `server_version` writes it.
OLDEST_POSTGRES = 130000
#: Seconds of an outage, or of giving way to others' transactions, that a person's request sits out.
PATIENCE = 30.0
#: The advisory lock of PostgreSQL that writes take, alone or shared: "netassay" as a number.
_LOCK = int.from_bytes(b"netassay", "big")
#: A dead peer is noticed in half a minute; libpq's own defaults wait for the kernel's two hours.
_POSTGRES = {
    "connect_timeout": 10,
    "application_name": "netassay",
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 30_000,  # milliseconds
}

T = TypeVar("T")

#: Seconds that a client may be silent within a write; whoever is stopped or cut off there would hold up all others.
SILENT_SECONDS = 60
#: Set on the server's side too, for the other half of the connection: there a dead client is waited for just as long.
_SERVER = {
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "30000",
}
#: What PostgreSQL says when it takes no writes for a while (it is the standby, or became one; its disk is nearly full),
#: or ended a write that was silent for too long. The driver counts them among its internal errors.
_OUTAGES = ("25006", "25P03")

#: What a database that is down, locked, full or cut off raises: worth trying again.
Outage: tuple[type[DBAPIError], ...] = (OperationalError, InterfaceError)


class StoreError(UserError):
    """The store cannot be used; the message says what to try."""


class StoreOutage(StoreError, NoAnswer):
    """The database does not answer, or refuses us."""


class Database:
    """A store's records. Cheap to make; connections open at first use.

    Raises StoreError for a URL that is none, or of another database than SQLite and PostgreSQL.
    """

    def __init__(self, url: str | None = None) -> None:
        given = url or settings().store_url
        try:
            self.url = make_url(given)
        except ArgumentError:
            raise StoreError(
                f"NETASSAY_STORE is no database URL: {masked(given)!r}; leave it empty, or give "
                "sqlite:////folder/store.sqlite or postgresql://user:password@host/database"
            ) from None
        if self.url.get_backend_name() in ("postgresql", "postgres"):
            self.url = self.url.set(drivername="postgresql+psycopg")
        elif self.url.get_backend_name() != "sqlite":
            raise StoreError(
                f"records are kept in SQLite or PostgreSQL, not in {self.url.get_backend_name()}; leave NETASSAY_STORE "
                "empty, or give sqlite:////folder/store.sqlite (on a disk of this host) or "
                "postgresql://user:password@host/database"
            )
        # Size 0 is no bound: as many connections as threads work at once, each in the hands of one of them. A bounded
        # pool of one connection a thread would close those that other threads are using.
        pool: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 0, "pool_use_lifo": True}
        if self.sqlite:
            arguments: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
            self.engine = create_engine(self.url, connect_args=arguments, **pool)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            arguments = {name: value for name, value in _POSTGRES.items() if name not in self.url.query}
            self.engine = create_engine(
                self.url, connect_args=arguments, pool_pre_ping=True, isolation_level="READ COMMITTED", **pool
            )
            event.listen(self.engine, "connect", _prepare_postgres)
            event.listen(self.engine, "handle_error", _tell_outage, retval=True)

    @property
    def sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def __str__(self) -> str:
        """Its URL, without passwords."""
        url = self.url.set(drivername=self.url.get_backend_name())  # without the name of our driver
        return masked(url.render_as_string(hide_password=True))

    @property
    def folder(self) -> Path | None:
        """Where its file is; None where it is a server, whose disk is not ours to look at."""
        return Path(self.url.database).parent if self.sqlite and self.url.database else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view."""
        with self.engine.connect() as connection:
            if not self.sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            yield connection

    @contextlib.contextmanager
    def write(self, durable: bool = False, beside: bool = False, lasting: bool = False) -> Iterator[Connection]:
        """One transaction, alone or `beside` others of that kind. When the block ends it is committed; `durable`, and
        on PostgreSQL `lasting` too: it and all before it have been synced to disk."""
        with self.engine.connect() as connection:
            if self.sqlite:
                connection = connection.execution_options(netassay_write=True)
                if durable:
                    _synchronous(connection, "FULL")
            try:
                with connection.begin():
                    if not self.sqlite:
                        _take_turn(connection, durable or lasting, beside)
                    yield connection
            finally:
                if self.sqlite and durable:
                    _synchronous(connection, "NORMAL")

    def transact(
        self,
        action: Callable[[Connection], T],
        durable: bool = False,
        beside: bool = False,
        lasting: bool = False,
        seconds: float = PATIENCE,
    ) -> T:
        """`action` in one transaction; again, for so many seconds, where the database was out or broke a deadlock.

        It may then have been done already (the answer to the commit got lost), so it has to bear being done twice.
        """

        def once() -> T:
            with self.write(durable, beside, lasting) as connection:
                return action(connection)

        # SQLite has waited for its lock already, and what else it complains of (a full disk) does not pass by itself.
        return once() if self.sqlite else self.persist(seconds, once)

    def prepare(self) -> None:
        """Create the tables where there are none, upgrade those of an older schema.

        Raises StoreError where the store is newer than this program, or no store at all, or the database is too old.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreError(
                f"this Python comes with SQLite {sqlite3.sqlite_version}; netassay needs "
                f"{'.'.join(map(str, OLDEST_SQLITE))} or newer: use a newer Python, or one of conda-forge"
            )
        if self.sqlite and self.url.database:
            try:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreOutage(f"the store {self} cannot be opened: {error}; {self._way_out()}") from error
        try:
            found = self._schema()
            if found == SCHEMA:
                return
            if found is None:
                self._create()
            else:
                self._upgrade(found)
        except OperationalError as error:
            raise StoreOutage(f"the store {self} cannot be opened: {error.orig}; {self._way_out()}") from error
        except DBAPIError as error:
            if "not a database" in str(error.orig):
                raise StoreError(
                    f"{self.url.database} is not a SQLite database; point NETASSAY_HOME elsewhere"
                ) from error
            if "permission denied" in str(error.orig):
                raise StoreOutage(f"the store {self} cannot be used: {error.orig}; {self._way_out()}") from error
            raise

    def _way_out(self) -> str:
        if self.sqlite:
            return "check NETASSAY_STORE, NETASSAY_HOME and the rights on that folder"
        return "check NETASSAY_STORE, that PostgreSQL runs there, and that this user may create tables in the database"

    def exists(self) -> bool:
        return not self.sqlite or not self.url.database or Path(self.url.database).is_file()

    def _schema(self) -> str | None:
        with self.read() as connection:
            if not self.sqlite:
                number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
                if number < OLDEST_POSTGRES:
                    raise StoreError(
                        f"{self} is PostgreSQL {number // 10000}; netassay needs {OLDEST_POSTGRES // 10000} or newer"
                    )
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    def check_schema(self, connection: Connection) -> None:
        """For what runs long: raises StoreError where somebody has upgraded the store since `prepare`."""
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        if found != SCHEMA:
            raise StoreError(
                f"the store {self} was upgraded to schema {found}, this program knows {SCHEMA}: upgrade this "
                "installation and start it again"
            )

    def _create(self) -> None:
        from netassay.store import tables  # not at the top: it loads what SQLAlchemy has for either database

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
        """Insert many rows in one call; `ignore`: skip those whose primary key exists. Returns how many went in.

        On PostgreSQL rows that may not exist are copied (COPY), others sent as one array a column; where two
        transactions may insert the same keys, both have to bring them in the same order.
        """
        if not rows:
            return 0
        if self.sqlite:
            statement = (
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' for _ in columns)})"
                f"{' ON CONFLICT DO NOTHING' if ignore else ''}"
            )
            return connection.exec_driver_sql(statement, rows).rowcount
        if not ignore:
            return _copy(connection, table, columns, rows)
        from netassay.store import tables

        types = tables.metadata.tables[table].columns
        arrays = ", ".join(f"%s::{types[name].type.compile(self.engine.dialect)}[]" for name in columns)
        statement = f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays}) ON CONFLICT DO NOTHING"
        return connection.exec_driver_sql(statement, tuple(map(list, zip(*rows, strict=True)))).rowcount

    def persist(self, seconds: float, action: Callable[[], T]) -> T:
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

    def watch(self) -> Callable[[], bool] | None:
        """A function that says whether anybody has written since it was last called, for a few microseconds a call; at
        first it says yes. None where the question would cost as much as to look: of a server.
        """
        if not self.sqlite:
            return None
        # The number is that of one connection: it changes with what others write.
        held = self.engine.raw_connection()
        seen = None

        def changed() -> bool:
            nonlocal seen
            before = seen
            try:
                seen = held.cursor().execute("PRAGMA data_version").fetchall()
            except sqlite3.Error:  # whoever looks properly hears of it
                return False
            return seen != before

        return changed

    def dispose(self) -> None:
        self.engine.dispose()


def _prepare_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
    _keep_journal(cursor)
    for pragma in (
        "synchronous=NORMAL",
        "cache_size=-65536",  # 64 MiB
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _keep_journal(cursor: sqlite3.Cursor) -> None:
    """Switch to the write-ahead log. Where others open the new file at the same moment, SQLite refuses the switch at
    once instead of waiting, since both would wait for each other."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _prepare_postgres(connection: Any, _: Any) -> None:
    settings = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _SERVER.items())
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {settings}")
    connection.commit()


def _tell_outage(context: ExceptionContext) -> BaseException | None:
    """An outage that does not look like one, as an OperationalError."""
    error = context.original_exception
    if getattr(error, "sqlstate", None) not in _OUTAGES:
        return None
    return OperationalError(context.statement, None, error, connection_invalidated=context.is_disconnect)


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("netassay_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _synchronous(connection: Connection, level: str) -> None:
    # Ineffective inside a transaction, hence straight to the driver, before SQLAlchemy begins one.
    dbapi = connection.connection.dbapi_connection
    if dbapi is not None:
        dbapi.cursor().execute(f"PRAGMA synchronous={level}")


def _take_turn(connection: Connection, synced: bool, beside: bool) -> None:
    # Others see a transaction that is synced only once it is: what they find and build on is on disk, too.
    shared = "_shared" if beside else ""
    # Each of our writes goes by indexes from the rows it is about. Tables grow from nothing to millions in seconds, and
    # until the statistics have followed, the planner would rather read them whole.
    connection.execute(
        text(
            "SELECT set_config('synchronous_commit', :level, true), set_config('enable_seqscan', 'off', true),"
            " set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),"
            " set_config('idle_in_transaction_session_timeout', :silent, true),"
            f" pg_advisory_xact_lock{shared}(:lock)"
        ),
        {"level": "on" if synced else "off", "lock": _LOCK, "silent": f"{SILENT_SECONDS}s"},
    )


def _copy(connection: Connection, table: str, columns: Sequence[str], rows: list[tuple]) -> int:
    import psycopg

    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
    driver: Any = connection.connection.dbapi_connection
    try:
        with driver.cursor() as cursor:
            with cursor.copy(statement) as copy:
                for row in rows:
                    copy.write_row(row)
            return cursor.rowcount
    except psycopg.Error as error:
        # Past SQLAlchemy, so its own errors have to be made here: callers tell outages from refusals by them.
        lost = bool(driver.closed)
        if error.sqlstate in _OUTAGES:
            raise OperationalError(statement, None, error, connection_invalidated=lost) from error
        raise DBAPIError.instance(
            statement, None, error, psycopg.Error, connection_invalidated=lost, dialect=connection.dialect
        ) from error


def slices(items: Sequence, size: int = 10_000) -> Iterable[Sequence]:
    """Consecutive pieces of at most `size`: a transaction of more rows keeps others waiting."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
