"""What a worker does to the store: sign on, claim chunks, renew, keep results, give back.

A claim writes a token into the chunk and takes the chunk's unfinished jobs into `running`. Whatever the holder writes
later carries the token; after a takeover it changes nothing.

Workers write `beside` each other: none of these steps touches a chunk that another holds, a takeover and everything
else that moves chunks excludes them all, and where two of them want one job, the primary key of `running` decides.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from netassay import faults
from netassay.job import ENDS
from netassay.store.database import SCHEMA, Database
from netassay.store.dispatching import LEAST_HINT, LOSSES_SUSPECT, PREDICTED, release
from netassay.store.reset import make_ready

#: What a database, or its driver before it, raises for values it does not take.
_Refused = (DataError, IntegrityError, ProgrammingError, UnicodeError, OverflowError)

#: A job that killed its child this often is not started again.
MOST_STARTS = 3
#: Characters of its log that a group's death leaves with each of its jobs.
GROUP_LOG = 2048


class StaleToken(Exception):
    """The chunk was taken over (this worker was thought lost) or given up; what was computed for it is dropped."""


@dataclass(frozen=True)
class Task:
    """One job to run. deaths: children it was in when they died; suspect: it must run alone, in a fresh child."""

    id: int
    params: str
    deaths: int = 0
    suspect: bool = False


@dataclass(frozen=True)
class Claim:
    """A chunk in hand."""

    chunk_id: int
    token: str
    method: str
    version: int
    method_id: int
    segment_id: int
    time_limit: float
    memory_limit: int | None
    group_size: int
    seconds: float
    """predicted, a job"""
    libraries: tuple[str, ...]
    tasks: list[Task]
    given: dict[str, str] = field(default_factory=dict)
    """recipe -> network that stands for it"""


@dataclass(frozen=True)
class Outcome:
    """How one job ended. result: JSON text of the result's fields."""

    job_id: int
    state: str
    cause: str = ""
    message: str = ""
    result: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Death:
    """A child that died, or was killed, while it ran these jobs."""

    job_ids: tuple[int, ...]
    started_at: float
    ended_at: float
    cause: str
    message: str
    log: str


def sign_on(database: Database, name: str, host: str, pid: int, slots: int, memory: int = 0) -> int:
    """A worker joins. memory: bytes that its slots together may use; 0: not told. Returns its id, and only its own."""
    with database.write(beside=True, lasting=True) as connection:
        return connection.execute(
            text(
                "INSERT INTO worker (name, host, pid, slots, memory, schema, state, started_at)"
                " VALUES (:name, :host, :pid, :slots, :memory, :schema, 'alive', :now) RETURNING id"
            ),
            {"name": name, "host": host, "pid": pid, "slots": slots, "memory": memory, "schema": SCHEMA,
             "now": time.time()},
        ).scalar_one()  # fmt: skip


def sign_off(database: Database, worker_id: int) -> None:
    """The worker leaves in good order; what it still holds goes back."""
    with database.write() as connection:
        held = connection.execute(
            text("SELECT id FROM chunk WHERE worker_id = :id AND state = 'claimed'"), {"id": worker_id}
        ).scalars()
        for chunk_id in list(held):
            release(connection, chunk_id)
        connection.execute(
            text("UPDATE worker SET state = 'stopped' WHERE id = :id AND state = 'alive'"), {"id": worker_id}
        )
        connection.execute(text("DELETE FROM worker_lack WHERE worker_id = :id"), {"id": worker_id})


def lacks(database: Database, worker_id: int, method_id: int, reason: str) -> None:
    """Write down that this worker could not load a version of a method: as long as all say so, none is handed out."""
    with database.write(beside=True) as connection:
        connection.execute(
            text(
                "INSERT INTO worker_lack (worker_id, method_id, reason) VALUES (:worker, :method, :reason)"
                " ON CONFLICT (worker_id, method_id) DO UPDATE SET reason = :reason"
            ),
            {"worker": worker_id, "method": method_id, "reason": reason},
        )


def has(database: Database, worker_id: int, method_id: int) -> None:
    """Take back what `lacks` wrote down."""
    with database.write(beside=True) as connection:
        connection.execute(
            text("DELETE FROM worker_lack WHERE worker_id = :worker AND method_id = :method"),
            {"worker": worker_id, "method": method_id},
        )


def provenance_id(database: Database, digest: str, body: str) -> int:
    with database.write(beside=True, lasting=True) as connection:
        connection.execute(
            text("INSERT INTO provenance (digest, body) VALUES (:digest, :body) ON CONFLICT DO NOTHING"),
            {"digest": digest, "body": body},
        )
        return connection.execute(
            text("SELECT id FROM provenance WHERE digest = :digest"), {"digest": digest}
        ).scalar_one()


@dataclass(frozen=True)
class Renewal:
    """What a worker learns when it renews. lost: it was given up and must sign on anew; schema: of the store now, where
    it is not the one this program knows; the chunks of its own to stop at once (cancelled) and after the jobs they run
    now (paused, or cancelled while another open batch holds one of those jobs); stray: those that it has not in
    hand."""

    lost: bool
    schema: str
    cancelled: frozenset[int]
    paused: frozenset[int]
    stray: frozenset[int] = frozenset()


def renew(database: Database, worker_id: int, current: Mapping[int, Sequence[int]]) -> Renewal:
    """Show a sign of life, with the jobs that run now (chunk in hand -> jobs), and look what has been asked of us."""
    with database.write(beside=True) as connection:
        schema = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        if schema != SCHEMA:  # what else there is may mean something else now
            return Renewal(True, schema, frozenset(), frozenset())
        alive = connection.execute(
            text("UPDATE worker SET counter = counter + 1 WHERE id = :id AND state = 'alive'"), {"id": worker_id}
        ).rowcount
        for chunk_id, jobs in current.items():
            connection.execute(
                text("UPDATE chunk SET current = :jobs WHERE id = :id AND worker_id = :worker"),
                {"id": chunk_id, "worker": worker_id, "jobs": " ".join(map(str, jobs))},
            )
        rows = connection.execute(
            text(
                "SELECT c.id, b.state FROM chunk c JOIN batch b ON b.id = c.batch_id"
                " WHERE c.worker_id = :id AND c.state = 'claimed' AND b.state <> 'open'"
            ),
            {"id": worker_id},
        ).all()
        cancelled = frozenset(
            row.id
            for row in rows
            if row.state == "cancelled" and not _wanted(connection, row.id, current.get(row.id, ()))
        )
        claimed = connection.execute(
            text("SELECT id FROM chunk WHERE state = 'claimed' AND worker_id = :id"), {"id": worker_id}
        ).scalars()
        stray = frozenset(claimed) - current.keys()
    return Renewal(
        lost=not alive,
        schema="",
        cancelled=cancelled,
        paused=frozenset(row.id for row in rows) - cancelled,
        stray=stray,
    )


def _wanted(connection: Connection, chunk_id: int, jobs: Sequence[int]) -> bool:
    """Whether an open batch holds one of these jobs, which the chunk runs. What else is in the chunk goes back, and
    runs for whoever wants it."""
    if not jobs:
        return False
    found = connection.execute(
        text(
            "SELECT 1 FROM running r JOIN membership m ON m.job_id = r.job_id JOIN batch o ON o.id = m.batch_id"
            f" WHERE r.chunk_id = :id AND r.job_id IN ({', '.join(map(str, jobs))}) AND o.state = 'open' LIMIT 1"
        ),
        {"id": chunk_id},
    )
    return found.one_or_none() is not None


def give_back(database: Database, worker_id: int, chunk_ids: Iterable[int]) -> None:
    """Release chunks of a worker that it has not in hand: the store has forgotten their end, as PostgreSQL may when it
    crashes, or the answer to their claim never came. As long as the worker lives, nobody else would."""
    with database.write() as connection:
        for chunk_id in sorted(chunk_ids):
            ours = connection.execute(
                text("SELECT 1 FROM chunk WHERE id = :id AND worker_id = :worker AND state = 'claimed'"),
                {"id": chunk_id, "worker": worker_id},
            ).one_or_none()
            if ours:
                release(connection, chunk_id)


def new_token() -> str:
    """What one claim writes into its chunk."""
    return secrets.token_hex(8)


def claim(database: Database, worker_id: int, chunk_id: int, token: str = "") -> Claim | None:
    """Take a chunk and those of its jobs that are neither done nor running elsewhere.

    token: a `new_token()`, made here if not given. With the same again, where the answer to the first try was lost, it
    finds what that took.

    None where there is nothing to do: claimed by another, its batch is not open, its needs are to be built anew, or
    this worker was given up, as all are whose program knows another schema than the store has. The claim is the
    acknowledgement.
    """
    token = token or new_token()
    with database.write(beside=True) as connection:
        chunk = connection.execute(
            text(
                "SELECT c.id, c.batch_id, c.segment_id, c.start, c.stop, c.state, c.token, c.serial,"
                " b.state AS batch_state, s.waiting, s.method_id, s.time_limit, s.memory_limit, s.group_size,"
                f" s.libraries, {PREDICTED} AS seconds, m.name, m.version"
                " FROM chunk c JOIN batch b ON b.id = c.batch_id JOIN segment s ON s.id = c.segment_id"
                " JOIN method_version m ON m.id = s.method_id WHERE c.id = :id"
                + ("" if database.sqlite else " FOR UPDATE OF c")  # of two that claim it, one waits here for the other
            ),
            {"id": chunk_id},
        ).one_or_none()
        ours = chunk is not None and chunk.state == "claimed" and chunk.token == token
        guarded = faults.guarded("claim")
        if chunk is None or (guarded and not (ours or chunk.state in ("published", "ready"))):
            return None
        # Once a worker has been declared lost nobody watches it any more: what it took then would never be taken back.
        alive = connection.execute(
            text(
                "SELECT 1 FROM worker w JOIN alembic_version v ON v.version_num = w.schema"
                " WHERE w.id = :id AND w.state = 'alive'"
            ),
            {"id": worker_id},
        ).one_or_none()
        if chunk.batch_state != "open" or chunk.waiting or not alive:
            release(connection, chunk_id)
            _arrived(connection, worker_id, chunk.serial)
            return None
        taken = connection.execute(
            text(
                "UPDATE chunk SET state = 'claimed', token = :token, worker_id = :worker"
                " WHERE id = :id" + (" AND (state IN ('ready', 'published') OR token = :token)" if guarded else "")
            ),
            {"id": chunk_id, "token": token, "worker": worker_id},
        ).rowcount
        if not taken:
            return None
        connection.execute(
            text(
                "INSERT INTO running (job_id, chunk_id) SELECT m.job_id, :chunk FROM membership m"
                " WHERE m.batch_id = :batch AND m.ordinal >= :start AND m.ordinal < :stop"
                # In an order that all share: two claims that want the same jobs must not wait for each other.
                " AND NOT EXISTS (SELECT 1 FROM record r WHERE r.job_id = m.job_id) ORDER BY m.job_id"
                " ON CONFLICT DO NOTHING"
            ),
            {"chunk": chunk_id, "batch": chunk.batch_id, "start": chunk.start, "stop": chunk.stop},
        )
        if not database.sqlite:
            # Another's record and the end of its hold on the job may have been committed after the look for records
            # above and before the row went in. This statement sees them.
            connection.execute(
                text("DELETE FROM running u USING record r WHERE u.chunk_id = :chunk AND r.job_id = u.job_id"),
                {"chunk": chunk_id},
            )
        rows = connection.execute(
            text(
                "SELECT j.id, j.params FROM membership m"
                + (" JOIN running u ON u.job_id = m.job_id AND u.chunk_id = :chunk" if guarded else "")
                + " JOIN job j ON j.id = m.job_id"
                " WHERE m.batch_id = :batch AND m.ordinal >= :start AND m.ordinal < :stop"
                " ORDER BY m.ordinal"
            ),
            {"chunk": chunk_id, "batch": chunk.batch_id, "start": chunk.start, "stop": chunk.stop},
        ).all()
        deaths, losses = _history(connection, chunk_id)
        few = _suspects([row.id for row in rows], losses)
        if few:
            # The rest is not ours to hold: `finish` gives it back, or leaves it to whoever takes it meanwhile.
            places = ", ".join(map(str, few))
            connection.execute(
                text(f"DELETE FROM running WHERE chunk_id = :id AND job_id NOT IN ({places})"), {"id": chunk_id}
            )
            rows = [row for row in rows if row.id in few]
        given = _given(connection, chunk.segment_id)
        _arrived(connection, worker_id, chunk.serial)
    if deaths or few:
        alone = len(few) == 1
        tasks = [Task(job_id, params, deaths.get(job_id, 0), alone or job_id in deaths) for job_id, params in rows]
    else:
        tasks = [Task(job_id, params) for job_id, params in rows]
    return Claim(
        chunk_id=chunk_id,
        token=token,
        method=chunk.name,
        version=chunk.version,
        method_id=chunk.method_id,
        segment_id=chunk.segment_id,
        time_limit=chunk.time_limit,
        memory_limit=chunk.memory_limit,
        group_size=chunk.group_size,
        seconds=chunk.seconds,
        libraries=tuple(chunk.libraries.split()),
        tasks=tasks,
        given=given,
    )


def _arrived(connection: Connection, worker_id: int, serial: int | None) -> None:
    """A claim is a sign of life; and what was published before this chunk and has not arrived is lost. Last in the
    transaction: others wait for these rows."""
    connection.execute(text("UPDATE worker SET counter = counter + 1 WHERE id = :id"), {"id": worker_id})
    if serial is not None:
        connection.execute(
            text("UPDATE lab SET value = :serial WHERE name = 'claimed' AND value < :serial"), {"serial": serial}
        )


def _history(connection: Connection, chunk_id: int) -> tuple[dict[int, int], dict[int, int]]:
    """Deaths and worker losses of the jobs that a chunk has just taken."""
    deaths = connection.execute(
        text(
            "SELECT a.job_id, count(*) FROM attempt a JOIN running u ON u.job_id = a.job_id"
            " WHERE u.chunk_id = :id AND a.spent = 0 GROUP BY a.job_id"
        ),
        {"id": chunk_id},
    )
    losses = connection.execute(
        text(
            "SELECT w.job_id, w.losses FROM worker_loss w JOIN running u ON u.job_id = w.job_id WHERE u.chunk_id = :id"
        ),
        {"id": chunk_id},
    )
    return {row[0]: row[1] for row in deaths}, {row[0]: row[1] for row in losses}


def _suspects(jobs: Sequence[int], losses: Mapping[int, int]) -> frozenset[int]:
    """The jobs to take alone where some are suspect of having cost their workers: the first half of the most suspect.

    A half that costs another worker becomes more suspect than the other one, and is halved in turn: a culprit among n
    jobs runs alone after log2(n) further losses. Empty where none is suspect.
    """
    most = max((losses.get(job, 0) for job in jobs), default=0)
    if most < LOSSES_SUSPECT:
        return frozenset()
    suspects = [job for job in jobs if losses.get(job, 0) == most]
    return frozenset(suspects[: -(-len(suspects) // 2)])


def _given(connection: Connection, segment_id: int) -> dict[str, str]:
    rows = connection.execute(
        text(
            "SELECT n.reference, r.result FROM need n JOIN record r ON r.job_id = n.job_id"
            " WHERE n.segment_id = :id AND r.state = 'done'"
        ),
        {"id": segment_id},
    )
    return {reference: json.loads(result)["network"] for reference, result in rows}


def report_death(database: Database, worker_id: int, claim: Claim, death: Death) -> None:
    """Write down, before anything else is tried, that a child died on these jobs. Raises StaleToken.

    Of a group each job gets the end of the log only: a thousand copies of all of it would be 64 MB.
    """
    log = death.log if len(death.job_ids) == 1 else death.log[-GROUP_LOG:]
    with database.write(beside=True) as connection:
        if not _fence(connection, claim):
            return
        there = connection.execute(
            text("SELECT job_id FROM attempt WHERE chunk_id = :id AND token = :token AND started_at = :started"),
            {"id": claim.chunk_id, "token": claim.token, "started": death.started_at},
        ).scalars()
        if set(there) & set(death.job_ids):
            return  # done at a first try, whose answer got lost
        connection.execute(
            text(
                "INSERT INTO attempt (job_id, chunk_id, token, worker_id, started_at, ended_at, cause, alone,"
                " message, log)"
                " VALUES (:job, :chunk, :token, :worker, :started, :ended, :cause, :alone, :message, :log)"
            ),
            [
                {"job": job_id, "chunk": claim.chunk_id, "token": claim.token, "worker": worker_id,
                 "started": death.started_at, "ended": death.ended_at, "cause": death.cause,
                 "alone": int(len(death.job_ids) == 1), "message": death.message, "log": log}
                for job_id in death.job_ids
            ],
        )  # fmt: skip


def _fence(connection: Connection, claim: Claim) -> bool:
    """Whether the chunk is in hand; not, if this very claim finished it already. Raises StaleToken."""
    state = connection.execute(
        text("SELECT state FROM chunk WHERE id = :id AND token = :token"),
        {"id": claim.chunk_id, "token": claim.token},
    ).scalar_one_or_none()
    if state is None and faults.guarded("fence"):
        raise StaleToken(f"chunk {claim.chunk_id} was taken over")
    return state != "finished"


def finish(
    database: Database,
    worker_id: int,
    claim: Claim,
    outcomes: Sequence[Outcome],
    provenance: int | None = None,
    seconds_a_job: float | None = None,
) -> None:
    """Keep what was computed, count, and give the rest of the range back, all or nothing. Raises StaleToken."""
    try:
        _finish(database, worker_id, claim, outcomes, provenance, seconds_a_job, singly=False)
    except _Refused:
        # Something in these rows is not to this database's taste: one bad row must not cost its neighbours.
        _finish(database, worker_id, claim, outcomes, provenance, seconds_a_job, singly=True)


def _finish(
    database: Database,
    worker_id: int,
    claim: Claim,
    outcomes: Sequence[Outcome],
    provenance: int | None,
    seconds_a_job: float | None,
    singly: bool,
) -> None:
    with database.write(beside=True) as connection:
        if not _fence(connection, claim):
            return  # done at a first try, whose answer got lost
        inputs = json.dumps(claim.given, sort_keys=True) if claim.given else None
        now = time.time()
        rows = [
            (o.job_id, o.state, o.cause, o.message, o.result, o.seconds, now, worker_id, provenance, inputs)
            for o in outcomes
        ]
        if singly:
            _insert_singly(database, connection, rows)
        else:
            _insert_records(database, connection, rows)
        connection.execute(text("DELETE FROM running WHERE chunk_id = :id"), {"id": claim.chunk_id})
        _settle(connection, claim)
        if seconds_a_job is not None:
            hint = connection.execute(
                text("UPDATE segment SET seconds = :seconds WHERE id = :segment RETURNING hint"),
                {"seconds": seconds_a_job, "segment": claim.segment_id},
            ).scalar_one()
            connection.execute(
                text("UPDATE method_version SET seconds = :share WHERE id = :method"),
                {"share": seconds_a_job / max(hint, LEAST_HINT), "method": claim.method_id},
            )


RECORD = (
    "job_id", "state", "cause", "message", "result", "seconds", "finished_at", "worker_id", "provenance_id", "inputs",
)  # fmt: skip


def _insert_records(database: Database, connection: Connection, rows: list[tuple]) -> None:
    if faults.guarded("fence"):
        database.insert(connection, "record", RECORD, rows, ignore=True)
        return
    # What happens without a fence: the last writer wins.
    connection.execute(text(f"DELETE FROM record WHERE job_id IN ({', '.join(str(row[0]) for row in rows) or 0})"))
    database.insert(connection, "record", RECORD, rows)


def _insert_singly(database: Database, connection: Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    for row in rows:
        try:
            with connection.begin_nested():
                database.insert(connection, "record", RECORD, [row], ignore=True)
        except _Refused as error:
            why = getattr(error, "orig", error)
            refused = (row[0], "failed", "unstorable", f"the store refused its result: {why}", None, *row[5:])
            database.insert(connection, "record", RECORD, [refused], ignore=True)


def _settle(connection: Connection, claim: Claim) -> None:
    """Close the chunk: its counts are what the records of its range say; the rest becomes chunks of its own."""
    chunk = connection.execute(
        text("SELECT batch_id, start, stop FROM chunk WHERE id = :id"), {"id": claim.chunk_id}
    ).one()
    place = {"b": chunk.batch_id, "start": chunk.start, "stop": chunk.stop, "id": claim.chunk_id}
    within = "m.batch_id = :b AND m.ordinal >= :start AND m.ordinal < :stop"
    found: dict[str, int] = dict(
        connection.execute(
            text(
                "SELECT coalesce(r.state, ''), count(*) FROM membership m LEFT JOIN record r ON r.job_id = m.job_id"
                f" WHERE {within} GROUP BY 1"
            ),
            place,
        ).all()
    )
    rest: list[Row] = []
    if found.get(""):
        # All at one look: a job that another's commit ends between two would be neither counted nor given back.
        looked = connection.execute(
            text(
                "SELECT m.ordinal, coalesce(r.state, '') AS state, u.job_id IS NOT NULL AS elsewhere FROM membership m"
                " LEFT JOIN record r ON r.job_id = m.job_id LEFT JOIN running u ON u.job_id = m.job_id"
                f" WHERE {within}"
            ),
            place,
        ).all()
        found = Counter(row.state for row in looked)
        rest = [row for row in looked if not row.state]
    counts = {state: found.get(state, 0) for state in ENDS}
    connection.execute(
        text(
            "UPDATE chunk SET state = 'finished', current = NULL, done = :done,"
            " not_applicable = :not_applicable, failed = :failed WHERE id = :id"
        ),
        {**counts, **place},
    )
    for elsewhere, state in ((False, "ready"), (True, "blocked")):
        ordinals = [row.ordinal for row in rest if bool(row.elsewhere) is elsewhere]
        if ordinals:
            make_ready(connection, chunk.batch_id, ordinals, state)
