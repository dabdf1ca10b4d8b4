"""What people and programs read: batches, progress, records. Never blocks a writer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, text

from netassay.job import Record
from netassay.store import storable
from netassay.store.control import batch_id_of
from netassay.store.database import Database, StoreError


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
    " b.weight, b.submitted_at FROM batch b LEFT JOIN chunk c ON c.batch_id = b.id"
    " WHERE b.state <> 'arriving'{} GROUP BY b.id ORDER BY b.id DESC"
)


def _progress(connection: Connection, row: Any) -> Progress:
    running = connection.execute(
        text(
            "SELECT count(*) FROM chunk c JOIN running r ON r.chunk_id = c.id"
            " WHERE c.state = 'claimed' AND c.batch_id = :id"
        ),
        {"id": row.id},
    ).scalar_one()
    values = row._asdict()
    values.pop("id")
    if values["done"] + values["not_applicable"] + values["failed"] == row.size and row.state == "open":
        values["state"] = "finished"  # the dispatcher writes it down a moment later
    return Progress(running=running, **values)


def progress(database: Database, name: str) -> Progress:
    """One batch. Raises NoSuchBatch."""
    batch_id = batch_id_of(database, name)
    with database.read() as connection:
        row = connection.execute(text(_PROGRESS.format(" AND b.id = :id")), {"id": batch_id}).one()
        return _progress(connection, row)


def batches(database: Database) -> list[Progress]:
    """All batches, newest first."""
    with database.read() as connection:
        return [_progress(connection, row) for row in connection.execute(text(_PROGRESS.format(""))).all()]


_RECORDS = (
    "SELECT m.ordinal, j.id, j.key, v.name AS method, v.version, j.params, r.state, r.cause, r.message, r.result,"
    " r.seconds, r.finished_at, r.inputs, r.provenance_id, u.chunk_id AS running"
    " FROM membership m JOIN job j ON j.id = m.job_id JOIN method_version v ON v.id = j.method_id"
    " LEFT JOIN record r ON r.job_id = m.job_id LEFT JOIN running u ON u.job_id = m.job_id"
    " WHERE m.batch_id = :id AND m.ordinal >= :start ORDER BY m.ordinal LIMIT :limit"
)
_PAGE = 10_000


def records(database: Database, name: str) -> Iterator[Record]:
    """The records of a batch in its order, read page by page, jobs without an outcome included."""
    batch_id = batch_id_of(database, name)
    with database.read() as connection:
        names: dict[str, str] = dict(
            connection.execute(
                text("SELECT reference, name FROM reference_name WHERE batch_id = :id"), {"id": batch_id}
            ).all()
        )
        kept = {row.id: json.loads(row.body) for row in connection.execute(text("SELECT id, body FROM provenance"))}
        deaths: dict[int, int] = dict(
            connection.execute(
                text(
                    "SELECT a.job_id, count(*) FROM attempt a JOIN membership m ON m.job_id = a.job_id"
                    " WHERE m.batch_id = :id GROUP BY a.job_id"
                ),
                {"id": batch_id},
            ).all()
        )
    start = 0
    while True:
        with database.read() as connection:
            rows = connection.execute(text(_RECORDS), {"id": batch_id, "start": start, "limit": _PAGE}).all()
        for row in rows:
            yield Record(
                id=row.id,
                key=bytes(row.key).hex(),
                method=row.method,
                version=row.version,
                params=json.loads(row.params),
                state=row.state or ("running" if row.running else "pending"),
                result=storable.load(row.result) if row.result else None,
                cause=row.cause or "",
                message=row.message or "",
                seconds=row.seconds or 0.0,
                finished=row.finished_at or 0.0,
                attempts=deaths.get(row.id, 0),
                names=names,
                inputs=json.loads(row.inputs) if row.inputs else {},
                provenance=kept.get(row.provenance_id, {}),
            )
        if len(rows) < _PAGE:
            return
        start = rows[-1].ordinal + 1


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
    try:
        low = bytes.fromhex(key + "0" * (32 - len(key)))
        high = bytes.fromhex(key + "f" * (32 - len(key)))
    except ValueError:
        raise NoSuchJob(f"{key!r} is not the beginning of a job's key (hexadecimal, up to 32 digits)") from None
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
