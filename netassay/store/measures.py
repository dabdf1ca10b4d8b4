"""What a monitor reads: the whole lab in some twenty numbers, at one moment.

Nothing here reads jobs, memberships or records: of 1,000,000 jobs it reads the rows of chunks and segments, of which
there are as many as jobs only where each takes seconds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, text

from netassay.job import CAUSES, ENDS
from netassay.store.database import Database
from netassay.store.dispatching import PREDICTED

#: Of batches that people see.
BATCH_STATES = ("open", "paused", "cancelled", "finished")
CHUNK_STATES = ("ready", "blocked", "published", "claimed", "finished")


@dataclass(frozen=True)
class Measures:
    """A store at one moment, with a 0 wherever there are none: what comes and goes cannot be watched. A job that two
    batches hold counts in both, as in each batch's own counters.

    batches: state -> how many. jobs: (state of the batch; waiting, running or how it ended) -> how many. methods:
    (method; how they ended) -> how many. chunks: state -> how many. backlog: predicted seconds of one slot for all that
    open batches have still to run, jobs in hand left out. attempts: cause -> how many. losses: workers that were lost.
    busy: slots with a chunk in hand. bytes: of the records on disk.
    """

    batches: dict[str, int]
    jobs: dict[tuple[str, str], int]
    methods: dict[tuple[str, str], int]
    chunks: dict[str, int]
    backlog: float
    attempts: dict[str, int]
    losses: int
    busy: int
    bytes: int


def schema(database: Database) -> str:
    """The schema that the store has. Raises what the database raises where there is none, or it does not
    answer."""
    with database.read() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()


def measure(database: Database) -> Measures:
    """All of it, in one snapshot."""
    with database.read() as connection:
        sizes, batches = _batches(connection)
        ended, methods, chunks = _chunks(connection)
        running: dict[str, int] = dict(
            connection.execute(
                text(
                    "SELECT b.state, count(*) FROM chunk c JOIN running r ON r.chunk_id = c.id"
                    " JOIN batch b ON b.id = c.batch_id WHERE c.state = 'claimed' GROUP BY b.state"
                )
            ).all()
        )
        jobs: dict[tuple[str, str], int] = {}
        for state, size in sizes.items():
            told = {end: ended[state, end] for end in ENDS} | {"running": running.get(state, 0)}
            told["waiting"] = size - sum(told.values())
            jobs |= {(state, name): number for name, number in told.items()}
        attempts = dict.fromkeys(CAUSES, 0)
        for cause, number in connection.execute(text("SELECT cause, count(*) FROM attempt GROUP BY cause")):
            attempts[cause] = number
        losses = connection.execute(text("SELECT count(*) FROM worker WHERE state = 'lost'")).scalar_one()
        backlog = _backlog(connection)
        size_on_disk = _bytes(database, connection)
    return Measures(batches, jobs, methods, chunks, backlog, attempts, losses, chunks["claimed"], size_on_disk)


def _batches(connection: Connection) -> tuple[dict[str, int], dict[str, int]]:
    """State -> jobs, without those that still arrive; state -> batches."""
    rows = connection.execute(text("SELECT state, count(*), sum(size) FROM batch GROUP BY state")).all()
    sizes = {state: int(size) for state, _, size in rows if state != "arriving"}
    numbers: dict[str, int] = {state: number for state, number, _ in rows}
    return dict.fromkeys(BATCH_STATES, 0) | sizes, dict.fromkeys(("arriving", *BATCH_STATES), 0) | numbers


def _chunks(
    connection: Connection,
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int], dict[str, int]]:
    """(state of the batch, end) -> jobs; (method, end) -> jobs; state -> chunks."""
    known = connection.execute(text("SELECT DISTINCT name FROM method_version")).scalars()
    methods: dict[tuple[str, str], int] = dict.fromkeys(itertools.product(known, ENDS), 0)
    ended: dict[tuple[str, str], int] = dict.fromkeys(itertools.product(BATCH_STATES, ENDS), 0)
    chunks = dict.fromkeys(CHUNK_STATES, 0)
    rows = connection.execute(
        text(
            "SELECT f.batch, f.state, f.chunks, f.done, f.not_applicable, f.failed, v.name FROM"
            " (SELECT b.state AS batch, s.method_id, c.state, count(*) AS chunks, sum(c.done) AS done,"
            "  sum(c.not_applicable) AS not_applicable, sum(c.failed) AS failed FROM chunk c"
            "  JOIN segment s ON s.id = c.segment_id JOIN batch b ON b.id = c.batch_id"
            "  WHERE b.state <> 'arriving' GROUP BY b.state, s.method_id, c.state) f"
            " JOIN method_version v ON v.id = f.method_id"
        )
    )
    for row in rows:
        chunks[row.state] += row.chunks
        for end in ENDS:
            number = int(getattr(row, end))
            ended[row.batch, end] += number
            methods[row.name, end] += number
    return ended, methods, chunks


def _backlog(connection: Connection) -> float:
    """Seconds, of what is not cut into chunks yet and of the chunks that nobody has claimed."""
    return connection.execute(
        text(
            "SELECT coalesce(sum(jobs * seconds), 0.0) FROM ("
            f" SELECT s.stop - s.next AS jobs, {PREDICTED} AS seconds FROM batch b"
            "  JOIN segment s ON s.batch_id = b.id JOIN method_version m ON m.id = s.method_id"
            "  WHERE b.state = 'open' AND s.next < s.stop"
            " UNION ALL"
            f" SELECT c.stop - c.start, {PREDICTED} FROM chunk c"
            "  JOIN batch b ON b.id = c.batch_id JOIN segment s ON s.id = c.segment_id"
            "  JOIN method_version m ON m.id = s.method_id"
            "  WHERE c.state IN ('ready', 'blocked', 'published') AND b.state = 'open') f"
        )
    ).scalar_one()


def _bytes(database: Database, connection: Connection) -> int:
    if not database.sqlite:
        return connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    path = database.url.database or ""
    files = (Path(path + suffix) for suffix in ("", "-wal"))
    return sum(file.stat().st_size for file in files if file.is_file())
