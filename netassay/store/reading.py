"""What people and programs read: batches, progress, records. Never blocks a writer."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, text

from netassay.job import ENDS, Record
from netassay.store import storable
from netassay.store.control import batch_id_of
from netassay.store.database import Database, StoreError, slices


@dataclass(frozen=True)
class Progress:
    """A batch at one moment. state: open, paused, cancelled, finished. running: jobs in slots now; waiting: all others
    that have not ended (in a cancelled batch: those that will not run)."""

    name: str
    state: str
    reason: str
    size: int
    done: int
    not_applicable: int
    failed: int
    running: int
    weight: float
    submitted_at: float
    note: str = ""
    submitter: str = ""
    tags: tuple[str, ...] = ()

    @property
    def ended(self) -> int:
        return self.done + self.not_applicable + self.failed

    @property
    def waiting(self) -> int:
        return self.size - self.ended - self.running

    @property
    def over(self) -> bool:
        """Nothing more will happen to it."""
        return self.ended == self.size or (self.state == "cancelled" and not self.running)

    @property
    def resting(self) -> bool:
        """Nothing happens to it unless somebody asks: it is over, or paused with nothing running."""
        return self.over or (self.state == "paused" and not self.running)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "waiting": self.waiting}


_PROGRESS = (
    "SELECT b.id, b.name, b.state, b.reason, b.size, coalesce(sum(c.done), 0) AS done,"
    " coalesce(sum(c.not_applicable), 0) AS not_applicable, coalesce(sum(c.failed), 0) AS failed,"
    " b.weight, b.submitted_at, b.note, b.submitter, b.tags FROM batch b LEFT JOIN chunk c ON c.batch_id = b.id"
    " WHERE b.state <> 'arriving'{} GROUP BY b.id ORDER BY b.id DESC"
)


def _progress(connection: Connection, batch_id: int | None) -> list[Progress]:
    """Of one batch, or of all, newest first, in two queries."""
    values = {} if batch_id is None else {"id": batch_id}
    running: dict[int, int] = dict(
        connection.execute(
            text(
                "SELECT c.batch_id, count(*) FROM chunk c JOIN running r ON r.chunk_id = c.id WHERE c.state = 'claimed'"
                f"{' AND c.batch_id = :id' if values else ''} GROUP BY c.batch_id"
            ),
            values,
        ).all()
    )
    found = []
    for row in connection.execute(text(_PROGRESS.format(" AND b.id = :id" if values else "")), values):
        fields = row._asdict()
        fields |= {name: int(fields[name]) for name in ENDS}
        fields["tags"] = tuple(fields["tags"].split())
        if sum(fields[name] for name in ENDS) == row.size and row.state == "open":
            fields["state"] = "finished"  # the dispatcher writes it down a moment later
        found.append(Progress(running=running.get(fields.pop("id"), 0), **fields))
    return found


def progress(database: Database, name: str) -> Progress:
    """One batch. Raises NoSuchBatch."""
    batch_id = batch_id_of(database, name)
    with database.read() as connection:
        (found,) = _progress(connection, batch_id)
        return found


def batches(database: Database) -> list[Progress]:
    """All batches, newest first."""
    with database.read() as connection:
        return _progress(connection, None)


@dataclass(frozen=True)
class Query:
    """Which jobs to read; what is left empty asks for nothing.

    batch: its name. method: a name, or a pattern with `*` and `?` (`lipschitz.*`). network: what a user called it,
    pattern allowed, or the beginning of a reference or digest, of at least six digits; matches references of any kind
    among the params, and networks that recipes stood for. since: ended at that time or later (seconds since 1970).
    state: pending, running, done, not_applicable or failed. cause: of a failure.
    """

    batch: str = ""
    method: str = ""
    network: str = ""
    since: float | None = None
    state: str = ""
    cause: str = ""


class NoSuchMethod(StoreError, LookupError):
    """No job in the store is of a method of that name."""


class NoSuchNetwork(StoreError, LookupError):
    """No job in the store has a reference of that name or digest."""


_FIELDS = (
    "j.id, j.key, v.name AS method, v.version, j.params, r.state, r.cause, r.message, r.result, r.seconds,"
    " r.finished_at, r.inputs, r.provenance_id, u.chunk_id AS running"
)
# A left join where an inner one would do, and `coalesce` in the conditions, keep the planner from starting at the
# methods or records, and sorting.
_REST = (
    " LEFT JOIN method_version v ON v.id = j.method_id LEFT JOIN record r ON r.job_id = j.id"
    " LEFT JOIN running u ON u.job_id = j.id"
)
_OF_BATCH = (" FROM membership m JOIN job j ON j.id = m.job_id" + _REST, "m.batch_id = :batch", "m.ordinal")
# Jobs of no open batch belong to a submission or an import on its way, or to one that died: not for eyes yet.
_OF_ALL = (
    " FROM job j" + _REST,
    "EXISTS (SELECT 1 FROM membership m JOIN batch b ON b.id = m.batch_id WHERE m.job_id = j.id"
    " AND b.state <> 'arriving')",
    "j.id",
)
_STATE = "coalesce(r.state, CASE WHEN u.job_id IS NULL THEN 'pending' ELSE 'running' END)"
_PAGE = 10_000
#: More references than this are looked for in Python, not by the database.
_MOST_PATTERNS = 32
_REFERENCE = re.compile(r'"([a-z]+:[0-9a-f]{64})"')
_KEY = re.compile(r"[0-9a-fA-F]{1,32}")
_BEGINNING = re.compile(r"^(?:[a-z]+:)?[0-9a-f]{6,64}$")


@dataclass
class _Plan:
    """A query taken apart: the tables, the conditions and their values, the column that pages go by.

    names: reference -> the user's name. references: what else a job must refer to, where they are too many for SQL.
    """

    tables: str
    conditions: list[str]
    place: str
    values: dict[str, Any]
    names: dict[str, str]
    batch: str = ""
    references: frozenset[str] = field(default_factory=frozenset)

    def select(self, what: str, tail: str = "") -> Any:
        return text(f"SELECT {what}{self.tables} WHERE {' AND '.join(self.conditions)}{tail}")

    def holds(self, row: Row) -> bool:
        if not self.references:
            return True
        return not self.references.isdisjoint(_REFERENCE.findall(row.params + (row.inputs or "")))


def _plan(database: Database, query: Query) -> _Plan:
    """Raises NoSuchBatch, NoSuchMethod, NoSuchNetwork."""
    values: dict[str, Any] = {}
    if query.batch:
        values["batch"] = batch_id_of(database, query.batch)
    tables, condition, place = _OF_BATCH if query.batch else _OF_ALL
    with database.read() as connection:
        plan = _Plan(tables, [condition], place, values, _names(connection, values.get("batch")), query.batch)
        if query.method:
            versions = connection.execute(text("SELECT id, name FROM method_version")).all()
            ids = [row.id for row in versions if fnmatch.fnmatchcase(row.name, query.method)]
            if not ids:
                raise NoSuchMethod(_nobody("no job is of a method", query.method, [row.name for row in versions]))
            plan.conditions.append(f"j.method_id IN ({', '.join(map(str, ids))})")
        if query.network:
            _find_network(plan, query.network, _names(connection) if query.batch else plan.names)
    if query.state:
        plan.conditions.append(f"{_STATE} = :state")
        values["state"] = query.state
    if query.cause:
        plan.conditions.append("coalesce(r.cause, '') = :cause")
        values["cause"] = query.cause
    if query.since is not None:
        plan.conditions.append("coalesce(r.finished_at, 0) >= :since")
        values["since"] = query.since
    return plan


def _names(connection: Connection, batch_id: int | None = None) -> dict[str, str]:
    """Reference -> what the user called it; where batches differ, the newest one's name.

    One entry a reference, some 200 bytes each: a store of 100,000 networks takes 20 MB.
    """
    rows = connection.execute(
        text(
            "SELECT n.reference, n.name FROM reference_name n JOIN batch b ON b.id = n.batch_id"
            f" WHERE b.state <> 'arriving'{' AND b.id = :id' if batch_id is not None else ''} ORDER BY b.id"
        ),
        {} if batch_id is None else {"id": batch_id},
    )
    return {row.reference: row.name for row in rows}


def _find_network(plan: _Plan, wanted: str, names: Mapping[str, str]) -> None:
    found = [reference for reference, name in names.items() if name == wanted or fnmatch.fnmatchcase(name, wanted)]
    patterns = [f'"{reference}"' for reference in found]
    if not found and _BEGINNING.match(wanted):
        patterns = [f'"{wanted}' if ":" in wanted else f":{wanted}"]
    if not patterns:
        raise NoSuchNetwork(_nobody("no network is called", wanted, list(dict.fromkeys(names.values()))))
    if len(patterns) > _MOST_PATTERNS:
        plan.references = frozenset(found)
        return
    either = []
    for number, pattern in enumerate(patterns):
        plan.values[f"network{number}"] = f"%{pattern}%"
        either.append(f"j.params LIKE :network{number} OR r.inputs LIKE :network{number}")
    plan.conditions.append(f"({' OR '.join(either)})")


def _nobody(what: str, wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or known[-3:]
    there = f"there are: {', '.join(close)}" if close else "none was submitted yet"
    return f"{what} {wanted!r}; {there}"


def find(database: Database, query: Query) -> Iterator[Record]:
    """Jobs with or without an outcome that answer to all of `query`, each once.

    Of one batch in its order, else in the order of submission. A reference is called as its batch, or the newest batch,
    calls it; `batches` of a record is the batch asked for, else all that hold the job. Read page by page, in memory
    that does not grow with the number of records.

    Cost: with a batch, its memberships by primary key. Across batches, one walk over the jobs by id, each with its
    record and membership by primary key or index, whatever is asked for: of 1,000,000 records some seconds, which an
    index on times or methods would shorten and every finished job would pay for.

    Raises NoSuchBatch, NoSuchMethod, NoSuchNetwork at the first record.
    """
    plan = _plan(database, query)
    with database.read() as connection:
        kept = {row.id: json.loads(row.body) for row in connection.execute(text("SELECT id, body FROM provenance"))}
    held = (query.batch,)
    for rows in _pages(database, plan, _FIELDS):
        matching = [row for row in rows if plan.holds(row)] if plan.references else rows
        ids = [row.id for row in matching]
        with database.read() as connection:
            deaths = _deaths(connection, ids)
            holders = {} if query.batch else _holders(connection, ids)
        for row in matching:
            yield Record(
                id=row.id,
                key=bytes(row.key).hex(),
                method=row.method,
                version=row.version,
                params=storable.parse(row.params),
                state=row.state or ("running" if row.running else "pending"),
                result=storable.load(row.result) if row.result else None,
                cause=row.cause or "",
                message=row.message or "",
                seconds=row.seconds or 0.0,
                finished=row.finished_at or 0.0,
                attempts=deaths.get(row.id, 0),
                names=plan.names,
                inputs=storable.parse(row.inputs) if row.inputs else {},
                provenance=kept.get(row.provenance_id, {}),
                batches=holders.get(row.id, held),
            )


def _pages(database: Database, plan: _Plan, what: str) -> Iterator[Sequence[Row]]:
    """All rows of a plan in order, some thousands at a time.

    SQLite gets a query a page, for a reader that stays open keeps its log growing. PostgreSQL gets one query and a
    cursor: it would plan every page anew, and join whole tables for it.
    """
    if not database.sqlite:
        statement = plan.select(f"{plan.place} AS place, {what}", f" ORDER BY {plan.place}")
        with database.read() as connection:
            found = connection.execute(statement.execution_options(stream_results=True), plan.values)
            yield from found.partitions(_PAGE)
        return
    page = plan.select(
        f"{plan.place} AS place, {what}", f" AND {plan.place} >= :start ORDER BY {plan.place} LIMIT :limit"
    )
    start = 0
    while True:
        with database.read() as connection:
            rows = connection.execute(page, {**plan.values, "start": start, "limit": _PAGE}).all()
        yield rows
        if len(rows) < _PAGE:
            return
        start = rows[-1].place + 1


def _deaths(connection: Connection, ids: Sequence[int]) -> dict[int, int]:
    """Job -> number of its attempts, where there are any."""
    found: dict[int, int] = {}
    for piece in slices(ids, 5_000):
        places = ", ".join(map(str, piece))
        found |= dict(
            connection.execute(
                text(f"SELECT job_id, count(*) FROM attempt WHERE job_id IN ({places}) GROUP BY job_id")
            ).all()
        )
    return found


def _holders(connection: Connection, ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Job -> names of the batches that hold it, oldest first."""
    found: dict[int, tuple[str, ...]] = {}
    called = {
        row.id: row.name for row in connection.execute(text("SELECT id, name FROM batch WHERE state <> 'arriving'"))
    }
    for piece in slices(ids, 5_000):
        places = ", ".join(map(str, piece))
        for job_id, batch_id in connection.execute(
            text(f"SELECT job_id, batch_id FROM membership WHERE job_id IN ({places}) ORDER BY job_id, batch_id")
        ):
            if batch_id in called:
                found[job_id] = (*found.get(job_id, ()), called[batch_id])
    return found


def check(database: Database, query: Query) -> None:
    """Raises NoSuchBatch, NoSuchMethod or NoSuchNetwork where `find` would."""
    _plan(database, query)


def count(database: Database, query: Query) -> int:
    """How many records `find` would give. Raises what it raises."""
    plan = _plan(database, query)
    with database.read() as connection:
        if not plan.references:
            return connection.execute(plan.select("count(*)"), plan.values).scalar_one()
        statement = plan.select("j.params, r.inputs").execution_options(stream_results=True)
        pages = connection.execute(statement, plan.values).partitions(_PAGE)
        return sum(map(plan.holds, itertools.chain.from_iterable(pages)))


def methods(database: Database, query: Query) -> list[tuple[str, int]]:
    """Name and version of every method that has a job among those of `query`, which network is not asked for."""
    plan = _plan(database, query)
    with database.read() as connection:
        rows = connection.execute(plan.select("DISTINCT v.name, v.version", " ORDER BY v.name, v.version"), plan.values)
        return [(row.name, row.version) for row in rows]


def texts(database: Database, query: Query, method: str, version: int) -> Iterator[tuple[str, str | None]]:
    """Params and result of the jobs that `find` would give of one method, as stored: for whoever only looks at their
    shape."""
    plan = _plan(database, query)
    plan.conditions.append("v.name = :name AND v.version = :version")
    plan.values |= {"name": method, "version": version}
    for rows in _pages(database, plan, "j.params, r.inputs, r.result"):
        yield from ((row.params, row.result) for row in rows if plan.holds(row))


def records(database: Database, name: str) -> Iterator[Record]:
    """The records of a batch in its order, read page by page, jobs without an outcome included."""
    return find(database, Query(batch=name))


class NoSuchJob(StoreError, LookupError):
    """No job, or more than one, has a key that starts so."""


@dataclass(frozen=True)
class FailureGroup:
    cause: str
    jobs: int
    example_key: str
    example: str


def failures(database: Database, name: str) -> list[FailureGroup]:
    """Failed jobs of a batch by cause, the most frequent first, with one message each."""
    batch_id = batch_id_of(database, name)
    with database.read() as connection:
        rows = connection.execute(
            text(
                "SELECT f.cause, f.jobs, j.key, r.message FROM"
                " (SELECT r.cause, count(*) AS jobs, min(r.job_id) AS job_id"
                "  FROM membership m JOIN record r ON r.job_id = m.job_id"
                "  WHERE m.batch_id = :id AND r.state = 'failed' GROUP BY r.cause) f"
                " JOIN job j ON j.id = f.job_id JOIN record r ON r.job_id = f.job_id ORDER BY f.jobs DESC"
            ),
            {"id": batch_id},
        )
        return [FailureGroup(row.cause, row.jobs, bytes(row.key).hex(), row.message) for row in rows]


@dataclass(frozen=True)
class AttemptSeen:
    """A child that died on a job; `alone`: no other job ran in it."""

    started_at: float
    ended_at: float
    cause: str
    alone: bool
    message: str
    log: str
    worker: str


def attempts(database: Database, key: str) -> list[AttemptSeen]:
    """The attempts of the job whose key starts so, oldest first. Raises NoSuchJob."""
    with database.read() as connection:
        job_id = _job_id(connection, key)
        rows = connection.execute(
            text(
                "SELECT a.started_at, a.ended_at, a.cause, a.alone, a.message, a.log, coalesce(w.name, '') AS worker"
                " FROM attempt a LEFT JOIN worker w ON w.id = a.worker_id WHERE a.job_id = :id ORDER BY a.id"
            ),
            {"id": job_id},
        )
        return [AttemptSeen(row[0], row[1], row[2], bool(row[3]), row[4], row[5], row[6]) for row in rows]


@dataclass(frozen=True)
class End:
    """How a job stands: its state, and of a failure the cause and the whole message, traceback included."""

    state: str
    cause: str
    message: str


def end_of(database: Database, key: str) -> End:
    """How the job whose key starts so stands. Raises NoSuchJob."""
    with database.read() as connection:
        job_id = _job_id(connection, key)
        row = connection.execute(
            text("SELECT state, cause, message FROM record WHERE job_id = :id"), {"id": job_id}
        ).one_or_none()
        if row is not None:
            return End(row.state, row.cause, row.message)
        running = connection.execute(text("SELECT 1 FROM running WHERE job_id = :id"), {"id": job_id}).one_or_none()
        return End("running" if running else "pending", "", "")


def _job_id(connection: Connection, key: str) -> int:
    if not _KEY.fullmatch(key):
        raise NoSuchJob(f"{key!r} is not the beginning of a job's key (hexadecimal, 1 to 32 digits)")
    low, high = (bytes.fromhex(key.ljust(32, digit)) for digit in "0f")
    found = connection.execute(
        text("SELECT job_id FROM job_key WHERE key >= :low AND key <= :high LIMIT 2"), {"low": low, "high": high}
    ).scalars()
    match list(found):
        case [job_id]:
            return job_id
        case []:
            raise NoSuchJob(f"no job's key starts with {key}")
        case _:
            raise NoSuchJob(f"several jobs' keys start with {key}; give more digits")


@dataclass(frozen=True)
class WorkerInfo:
    id: int
    name: str
    host: str
    pid: int
    slots: int
    state: str
    running: int


def workers(database: Database, states: Sequence[str] = ("alive",)) -> list[WorkerInfo]:
    """Workers in these states, and how many jobs each holds."""
    places = ", ".join(f"'{state}'" for state in states)
    with database.read() as connection:
        rows = connection.execute(
            text(
                "SELECT w.id, w.name, w.host, w.pid, w.slots, w.state, (SELECT count(*) FROM chunk c JOIN running r"
                " ON r.chunk_id = c.id WHERE c.worker_id = w.id AND c.state = 'claimed') AS running"
                f" FROM worker w WHERE w.state IN ({places}) ORDER BY w.id"
            )
        )
        return [WorkerInfo(*row) for row in rows]
