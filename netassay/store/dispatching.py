"""What a dispatcher does to the store: cut chunks and mark them published, take back what was lost, settle needs.

Every step is a compare-and-set within one write transaction that has the store to itself, so two dispatchers do no
harm.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, Row, text

from netassay.job import BUILDER
from netassay.store.database import Database, slices

#: The Celery task that runs a chunk and the queue it travels in: the one name by which dispatcher and worker, which do
#: not import each other, meet.
TASK, QUEUE = "netassay.run_chunk", "netassay"

#: A chunk should take about this long: short enough to share and to give back, long enough to vanish in the overhead.
CHUNK_SECONDS = 2.0
#: More jobs in one transaction keep others waiting.
CHUNK_JOBS = 10_000
#: As many worker losses with it in hand make a job suspect of causing them.
LOSSES_SUSPECT = 3
#: A segment none of which is cut into chunks yet, one with some left: the conditions of the indexes in `tables`.
FRESH, LEFT = "s.waiting = 0 AND s.next = s.start AND s.next < s.stop", "s.waiting = 0 AND s.next < s.stop"
#: A job takes no less than this, whatever a clock or a prediction says; 0 would mean chunks without bound.
LEAST_SECONDS = 1e-6
#: Nor does a prediction of less say by how much it was wrong: what such a job takes is mostly the way to it and back.
LEAST_HINT = 1e-3
#: What a job of segment `s` of method `m` is predicted to take: as measured; else as its method predicts, by as much
#: more or less as the newest jobs of that method took. Jobs of one method may differ a thousandfold, and it knows that.
PREDICTED = (
    f"coalesce(s.seconds, CASE WHEN s.hint < {LEAST_HINT} THEN {LEAST_HINT} ELSE s.hint END * m.seconds, s.hint)"
)


@dataclass(frozen=True)
class Message:
    """A chunk to publish: its id, and a label for people: batch / method / range."""

    chunk_id: int
    label: str
    seconds: float


@dataclass(frozen=True)
class WorkerSeen:
    """memory: bytes its slots may use; 0: not told. lacking: how many versions of methods it could not load."""

    id: int
    name: str
    counter: int
    slots: int
    memory: int = 0
    lacking: int = 0


def alive_workers(connection: Connection) -> list[WorkerSeen]:
    rows = connection.execute(
        text(
            "SELECT w.id, w.name, w.counter, w.slots, w.memory,"
            " (SELECT count(*) FROM worker_lack l WHERE l.worker_id = w.id) FROM worker w WHERE w.state = 'alive'"
            " ORDER BY w.id"
        )
    )
    return [WorkerSeen(*row) for row in rows]


@dataclass(frozen=True)
class Offer:
    """What the alive workers have between them; what asks for more is not published. memory: bytes of the largest one,
    None where that is not known; lacked: versions of methods (their ids) that none of them could load, with the reason
    that one of them gave."""

    memory: int | None = None
    lacked: Mapping[int, str] = field(default_factory=dict)

    @property
    def takes(self) -> str:
        """The condition on a segment `s`, for SQL."""
        conditions = ["1 = 1"]
        if self.memory is not None:
            conditions.append(f"coalesce(s.memory_limit, 0) <= {self.memory}")
        if self.lacked:
            conditions.append(f"s.method_id NOT IN ({', '.join(map(str, sorted(self.lacked)))})")
        return " AND ".join(conditions)


def offer(connection: Connection, workers: Sequence[WorkerSeen]) -> Offer:
    if not workers:  # whoever comes may have all
        return Offer()
    memory = max(worker.memory for worker in workers) if all(worker.memory for worker in workers) else None
    if not all(worker.lacking for worker in workers):
        return Offer(memory)
    lacked = connection.execute(
        text(
            "SELECT l.method_id, min(l.reason) FROM worker_lack l JOIN worker w ON w.id = l.worker_id"
            " WHERE w.state = 'alive' GROUP BY l.method_id HAVING count(*) = :all"
        ),
        {"all": len(workers)},
    )
    return Offer(memory, {row[0]: row[1] for row in lacked})


@dataclass(frozen=True)
class Backlog:
    """Published chunks that nobody has claimed (id -> serial), and the seconds they are predicted to take."""

    published: dict[int, int]
    seconds: float


def backlog(connection: Connection) -> Backlog:
    rows = connection.execute(
        text(
            f"SELECT c.id, c.serial, (c.stop - c.start) * {PREDICTED} AS seconds"
            " FROM chunk c JOIN segment s ON s.id = c.segment_id JOIN method_version m ON m.id = s.method_id"
            " WHERE c.state = 'published'"
        )
    ).all()
    return Backlog({row.id: row.serial for row in rows}, sum(row.seconds for row in rows))


@dataclass(frozen=True)
class Marks:
    """claimed: the newest serial that somebody has claimed; incarnation: the number that Redis must know if it still
    holds what was published; needing: whether any segment waits for what it needs."""

    claimed: int
    incarnation: int
    needing: bool


def marks(connection: Connection) -> Marks:
    row = connection.execute(
        text(
            "SELECT (SELECT value FROM lab WHERE name = 'claimed'), (SELECT value FROM lab WHERE name = 'incarnation'),"
            " EXISTS (SELECT 1 FROM segment WHERE waiting = 1)"
        )
    ).one()
    return Marks(row[0], row[1], bool(row[2]))


@dataclass(frozen=True)
class OpenBatch:
    """weight: its share among its submitter's batches; share: that of its submitter among all."""

    id: int
    name: str
    weight: float
    submitter: str = ""
    share: float = 1.0


def open_batches(connection: Connection, offered: Offer = Offer()) -> list[OpenBatch]:
    """Batches with something to publish now that somebody can run, oldest first."""
    rows = connection.execute(
        text(
            "SELECT b.id, b.name, b.weight, b.submitter, coalesce(u.weight, 1.0) FROM batch b"
            " LEFT JOIN submitter u ON u.name = b.submitter WHERE b.state = 'open' AND"
            f" {_has_some(connection, offered)} ORDER BY b.id"
        )
    )
    return [OpenBatch(*row) for row in rows]


def _has_some(connection: Connection, offered: Offer) -> str:
    """The condition on a batch `b` that something of it can be published."""
    return (
        f"(EXISTS (SELECT 1 FROM segment s{_by(connection, 'segment_left')} WHERE s.batch_id = b.id AND {LEFT}"
        f" AND {offered.takes}) OR EXISTS (SELECT 1 FROM chunk c JOIN segment s ON s.id = c.segment_id"
        f" WHERE c.state = 'ready' AND c.batch_id = b.id AND s.waiting = 0 AND {offered.takes}))"
    )


def unfit(connection: Connection, offered: Offer) -> dict[int, str]:
    """Open batches of which nothing can go on though something is left, as no alive worker takes it: id -> why."""
    if offered.takes == Offer().takes:
        return {}
    rows = connection.execute(
        text(
            "SELECT b.id FROM batch b WHERE b.state = 'open'"
            f" AND {_has_some(connection, Offer())} AND NOT {_has_some(connection, offered)} AND NOT EXISTS"
            " (SELECT 1 FROM chunk c WHERE c.batch_id = b.id AND c.state IN ('published', 'claimed', 'blocked'))"
        )
    ).all()
    return {row.id: _why_unfit(connection, row.id, offered) for row in rows}


def _why_unfit(connection: Connection, batch_id: int, offered: Offer) -> str:
    left = connection.execute(
        text(
            "SELECT max(s.memory_limit) AS memory, min(s.method_id) AS method_id FROM segment s"
            f" WHERE s.batch_id = :b AND s.waiting = 0 AND NOT ({offered.takes}) AND (s.next < s.stop OR EXISTS"
            " (SELECT 1 FROM chunk c WHERE c.segment_id = s.id AND c.state = 'ready'))"
        ),
        {"b": batch_id},
    ).one()
    if left.method_id in offered.lacked:
        return f"no worker could load its method: {offered.lacked[left.method_id]}"
    return (
        f"its jobs may use {left.memory / 1e9:,.1f} GB, the slots of the largest worker"
        f" {(offered.memory or 0) / 1e9:,.1f} GB; start a worker with more (NETASSAY_MEMORY), then resume it, or submit"
        " them with a lower limit under another name"
    )


def pause_unfit(database: Database, batch_ids: Collection[int]) -> list[str]:
    """Pause those of these batches that are still unfit. Returns what to say about each."""
    said = []
    with database.write() as connection:
        offered = offer(connection, alive_workers(connection))
        for batch_id, why in unfit(connection, offered).items():
            if batch_id not in batch_ids:
                continue
            name = connection.execute(
                text("UPDATE batch SET state = 'paused', reason = :why WHERE id = :id RETURNING name"),
                {"id": batch_id, "why": why},
            ).scalar_one()
            said.append(f"batch {name} paused itself: {why}")
    return said


def _by(connection: Connection, index: str) -> str:
    """SQLite has to be told the index: left to itself it may walk over all segments that are cut up already. The
    planner of PostgreSQL knows how many those are."""
    return f" INDEXED BY {index}" if connection.dialect.name == "sqlite" else ""


def publish_next(connection: Connection, batch: OpenBatch, slots: int, offered: Offer = Offer()) -> Message | None:
    """Within a write transaction: mark the batch's next chunk as published.

    Order: chunks given back; the first job of each segment, alone, so that a mistake shows early; the rest.
    """
    row = connection.execute(
        text(
            "SELECT c.id, c.start, c.stop, s.id AS segment_id, s.group_size, s.label, m.name AS method,"
            f" {PREDICTED} AS predicted"
            " FROM chunk c JOIN segment s ON s.id = c.segment_id JOIN method_version m ON m.id = s.method_id"
            f" WHERE c.state = 'ready' AND c.batch_id = :b AND s.waiting = 0 AND {offered.takes} ORDER BY c.id LIMIT 1"
        ),
        {"b": batch.id},
    ).one_or_none()
    if row is not None:
        chunk_id, start, stop = row.id, row.start, row.stop
        largest = _jobs_a_chunk(row, stop - start, slots, share=False)
        if stop - start > largest:  # given back in one piece by a lost worker, but slower than was thought
            stop = start + largest
            connection.execute(text("UPDATE chunk SET stop = :stop WHERE id = :id"), {"stop": stop, "id": chunk_id})
            connection.execute(
                text(
                    "INSERT INTO chunk (segment_id, batch_id, start, stop, state)"
                    " VALUES (:s, :b, :start, :stop, 'ready')"
                ),
                {"s": row.segment_id, "b": batch.id, "start": stop, "stop": row.stop},
            )
    else:
        row = _next_segment(connection, batch, "segment_fresh", f"{FRESH} AND {offered.takes}") or _next_segment(
            connection, batch, "segment_left", f"{LEFT} AND {offered.takes}"
        )
        if row is None:
            return None
        start = row.next
        size = 1 if start == row.start else _jobs_a_chunk(row, row.stop - start, slots, share=True)
        stop = start + size
        connection.execute(text("UPDATE segment SET next = :next WHERE id = :id"), {"next": stop, "id": row.segment_id})
        chunk_id = connection.execute(
            text(
                "INSERT INTO chunk (segment_id, batch_id, start, stop, state)"
                " VALUES (:s, :b, :start, :stop, 'ready') RETURNING id"
            ),
            {"s": row.segment_id, "b": batch.id, "start": start, "stop": stop},
        ).scalar_one()
    _mark(connection, chunk_id)
    label = f"{batch.name} / {row.method}{f' on {row.label}' if row.label else ''} / {start}..{stop - 1}"
    return Message(chunk_id, label, seconds=row.predicted * (stop - start))


def _next_segment(connection: Connection, batch: OpenBatch, index: str, condition: str) -> Row | None:
    """The batch's first segment of that condition, by its index. With an inner join SQLite may begin with the methods,
    and sort."""
    return connection.execute(
        text(
            "SELECT s.id AS segment_id, s.start, s.stop, s.next, s.group_size, s.label, m.name AS method,"
            f" {PREDICTED} AS predicted"
            f" FROM segment s{_by(connection, index)} LEFT JOIN method_version m ON m.id = s.method_id"
            f" WHERE s.batch_id = :b AND {condition} ORDER BY s.start LIMIT 1"
        ),
        {"b": batch.id},
    ).one_or_none()


def _jobs_a_chunk(row: Row, left: int, slots: int, share: bool) -> int:
    seconds = max(row.predicted, LEAST_SECONDS)
    jobs = min(CHUNK_JOBS, max(1, int(CHUNK_SECONDS / seconds)))
    if jobs >= row.group_size:
        jobs -= jobs % row.group_size  # a broken group costs as much as a whole one where jobs vectorise
    if share and left < 2 * jobs * slots and left * seconds > 0.2:
        # The end of a segment is dealt out evenly, in whole groups where that keeps every slot busy.
        even = -(-left // (slots if left <= jobs * slots else 2 * slots))
        whole = -(-even // row.group_size) * row.group_size
        jobs = min(jobs, whole if whole * (slots - 1) < left else even)
    return min(jobs, left)


def _mark(connection: Connection, chunk_id: int) -> None:
    serial = connection.execute(
        text("UPDATE lab SET value = value + 1 WHERE name = 'published' RETURNING value")
    ).scalar_one()
    connection.execute(
        text(
            "UPDATE chunk SET state = 'published', serial = :serial WHERE id = :id AND state IN ('ready', 'published')"
        ),
        {"serial": serial, "id": chunk_id},
    )


def unpublish(connection: Connection, chunk_ids: Sequence[int]) -> None:
    """Nothing was sent for these chunks (or it was lost): they may be published again. Claimed ones are left alone."""
    for chunk_id in chunk_ids:
        connection.execute(
            text("UPDATE chunk SET state = 'ready' WHERE id = :id AND state = 'published'"), {"id": chunk_id}
        )


def key_prefix(database: Database) -> str:
    """What all keys of this lab in Redis begin with: labs may share one."""
    with database.read() as connection:
        number = connection.execute(text("SELECT value FROM lab WHERE name = 'id'")).scalar_one()
    return f"netassay:{number:x}:"


def new_incarnation(connection: Connection) -> int:
    """Everything published is to be published again: Redis has forgotten it."""
    value = secrets.randbits(53)
    connection.execute(text("UPDATE lab SET value = :v WHERE name = 'incarnation'"), {"v": value})
    connection.execute(text("UPDATE chunk SET state = 'ready' WHERE state = 'published'"))
    return value


def reclaim(database: Database, worker_id: int, counter: int) -> int | None:
    """Declare a worker lost whose counter stood still: its chunks go back. Returns how many.

    None, and nothing is done, if the counter has moved since it was read or another dispatcher was faster.
    """
    with database.write() as connection:
        lost = connection.execute(
            text("UPDATE worker SET state = 'lost' WHERE id = :id AND counter = :counter AND state = 'alive'"),
            {"id": worker_id, "counter": counter},
        ).rowcount
        if not lost:
            return None
        connection.execute(text("DELETE FROM worker_lack WHERE worker_id = :id"), {"id": worker_id})
        chunks = connection.execute(
            text("SELECT id, token FROM chunk WHERE worker_id = :id AND state = 'claimed'"), {"id": worker_id}
        ).all()
        for chunk in chunks:
            _count_loss(connection, worker_id, chunk)
            release(connection, chunk.id)
        return len(chunks)


def bury(database: Database, host: str, pid: int) -> dict[str, int]:
    """Declare those workers lost that this process was, which has died. Returns by their names how many chunks went
    back of each.

    Where two hosts have one name, a worker of the other one may have that number: it signs on anew, and its chunks run
    again.
    """
    with database.read() as connection:
        found = connection.execute(
            text("SELECT id, name, counter FROM worker WHERE host = :host AND pid = :pid AND state = 'alive'"),
            {"host": host, "pid": pid},
        ).all()
    taken = {row.name: reclaim(database, row.id, row.counter) for row in found}
    return {name: chunks for name, chunks in taken.items() if chunks is not None}


def _count_loss(connection: Connection, worker_id: int, chunk: Row) -> None:
    """A worker died with these jobs in hand. Most often that is not their fault: it is counted apart from attempts,
    until it has happened so often that each further time a job had the chunk to itself is one.

    All jobs of the chunk are counted, not those it last said were running: a chunk takes about as long as two such
    reports are apart, so a job that kills at once is never the reported one. `claim` then halves the suspects until
    the culprit is alone.
    """
    losses = connection.execute(
        text(
            "INSERT INTO worker_loss (job_id, losses) SELECT job_id, 1 FROM running WHERE chunk_id = :id"
            " ON CONFLICT (job_id) DO UPDATE SET losses = worker_loss.losses + 1 RETURNING job_id, losses"
        ),
        {"id": chunk.id},
    ).all()
    job_id, number = losses[0] if len(losses) == 1 else (0, 0)
    if number > LOSSES_SUSPECT:
        connection.execute(
            text(
                "INSERT INTO attempt (job_id, chunk_id, token, worker_id, started_at, ended_at, cause, alone,"
                " message, log) VALUES (:job, :chunk, :token, :worker, :now, :now, 'crash', 1, :message, '')"
            ),
            {"job": job_id, "chunk": chunk.id, "token": chunk.token, "worker": worker_id, "now": time.time(),
             "message": f"the whole worker was lost while this job ran alone, after {number - 1} such losses"},
        )  # fmt: skip


def release(connection: Connection, chunk_id: int, state: str = "ready") -> None:
    """Take a chunk from its holder, whose token is void from here on."""
    connection.execute(text("DELETE FROM running WHERE chunk_id = :id"), {"id": chunk_id})
    connection.execute(
        text("UPDATE chunk SET state = :state, token = NULL, worker_id = NULL, current = NULL WHERE id = :id"),
        {"id": chunk_id, "state": state},
    )


def retire_workers(connection: Connection) -> None:
    """Give up all workers, for no fault of theirs or of their jobs: the store changes under them."""
    connection.execute(text("UPDATE worker SET state = 'lost' WHERE state = 'alive'"))
    connection.execute(text("DELETE FROM running"))
    connection.execute(
        text(
            "UPDATE chunk SET state = 'ready', token = NULL, worker_id = NULL, current = NULL"
            " WHERE state IN ('claimed', 'published')"
        )
    )


def unblock(connection: Connection) -> int:
    """Chunks whose jobs were running for another batch, and are no more, become ready again."""
    return connection.execute(
        text(
            "UPDATE chunk SET state = 'ready' WHERE state = 'blocked' AND NOT EXISTS ("
            " SELECT 1 FROM membership m JOIN running r ON r.job_id = m.job_id"
            " WHERE m.batch_id = chunk.batch_id AND m.ordinal >= chunk.start AND m.ordinal < chunk.stop)"
        )
    ).rowcount


def blocked(connection: Connection) -> bool:
    return connection.execute(text("SELECT 1 FROM chunk WHERE state = 'blocked' LIMIT 1")).one_or_none() is not None


def _settled_segments(connection: Connection) -> dict[int, bool]:
    """Segments of open batches that wait though all they need has ended, and whether all of it is done."""
    rows = connection.execute(
        text(
            "SELECT n.segment_id, coalesce(r.state, '') FROM segment s JOIN batch b ON b.id = s.batch_id"
            " JOIN need n ON n.segment_id = s.id LEFT JOIN record r ON r.job_id = n.job_id"
            " WHERE s.waiting = 1 AND b.state = 'open'"
        )
    )
    found: dict[int, list[str]] = {}
    for segment_id, state in rows:
        found.setdefault(segment_id, []).append(state)
    return {segment: set(ends) == {"done"} for segment, ends in found.items() if "" not in ends}


def settle_needs(database: Database) -> int:
    """Let segments go whose needs are done; fail the jobs of those whose needs failed. Returns how many changed."""
    with database.read() as connection:
        found = _settled_segments(connection)
    if not found:
        return 0
    changed = 0
    if any(found.values()):
        with database.write() as connection:
            # Again: a retry may have come in between.
            ready = [segment for segment, done in _settled_segments(connection).items() if done]
            for piece in slices(ready, 1_000):
                connection.execute(text(f"UPDATE segment SET waiting = 0 WHERE id IN ({', '.join(map(str, piece))})"))
        changed = len(ready)
    return changed + _fail_segments(database, [segment for segment, done in found.items() if not done])


#: Jobs that one transaction fails: all others wait meanwhile.
_SLICE = 10_000


def _fail_segments(database: Database, segments: Sequence[int]) -> int:
    """Fail every job of these segments that has not ended; their unfinished chunks then find nothing left to run.

    A segment that takes several transactions waits for its needs until the last of them. Returns how many were failed.
    """
    failed = 0
    with database.read() as connection:
        pieces = deque(
            (row.id, start, min(start + _SLICE, row.stop), start + _SLICE >= row.stop)
            for some in slices(segments, 1_000)
            for row in connection.execute(
                text(f"SELECT id, start, stop FROM segment WHERE id IN ({', '.join(map(str, some))})")
            ).all()
            for start in range(row.start, row.stop, _SLICE)
        )
    while pieces:
        with database.write() as connection:
            settled, jobs = _settled_segments(connection), 0
            while pieces and jobs < _SLICE:
                segment, start, stop, last = pieces.popleft()
                if settled.get(segment, True):
                    continue  # a retry came in between
                _fail_range(connection, segment, start, stop)
                jobs += stop - start
                if last:
                    connection.execute(text("UPDATE segment SET waiting = 0 WHERE id = :id"), {"id": segment})
                    failed += 1
    return failed


def _fail_range(connection: Connection, segment_id: int, start: int, stop: int) -> None:
    needed = connection.execute(
        text(
            "SELECT n.reference, r.state, r.cause, r.message FROM need n JOIN record r ON r.job_id = n.job_id"
            " WHERE n.segment_id = :id AND r.state <> 'done' LIMIT 1"
        ),
        {"id": segment_id},
    ).one()
    message = (
        f"the network it needs could not be built ({needed.reference[:19]}...: {needed.cause or needed.state}:"
        f" {needed.message}); mend that and retry"
    )
    connection.execute(
        text(
            "INSERT INTO record (job_id, state, cause, message, finished_at)"
            " SELECT m.job_id, 'failed', 'dependency', :message, :now FROM segment s"
            " JOIN membership m ON m.batch_id = s.batch_id AND m.ordinal >= :start AND m.ordinal < :stop"
            " WHERE s.id = :id AND NOT EXISTS (SELECT 1 FROM running u WHERE u.job_id = m.job_id)"
            " ON CONFLICT DO NOTHING"
        ),
        {"id": segment_id, "message": message, "now": time.time(), "start": start, "stop": stop},
    )


#: A batch whose first so many jobs all failed with one cause pauses itself.
JUDGED_JOBS = 20


def pause_hopeless(database: Database) -> list[str]:
    """Pause open batches whose first 20 jobs to end all failed with one cause. Returns what to say about each.

    What ended before the batch was submitted is not judged (cached failures are old news), nor is the building of
    networks: as long as fewer than 20 other jobs have ended, nothing is decided. Clocks of hosts are compared here; one
    that goes wrong delays the verdict or lets a cached failure count, no more.
    """
    said = []
    with database.read() as connection:
        candidates = connection.execute(
            text(
                # One that has ended altogether has nothing left to be spared.
                "SELECT b.id, b.name FROM batch b WHERE b.state = 'open' AND b.judged = 0 AND b.size > :n AND"
                " (SELECT sum(done + not_applicable + failed) FROM chunk c WHERE c.batch_id = b.id)"
                " BETWEEN :n AND b.size - 1"
            ),
            {"n": JUDGED_JOBS},
        ).all()
    for batch in candidates:
        with database.read() as connection:
            if len(_first_ends(connection, batch.id)) < JUDGED_JOBS:
                continue
        with database.write() as connection:
            ends = _first_ends(connection, batch.id)  # again: a retry may have come in between
            if len(ends) < JUDGED_JOBS:
                continue
            causes = {row.cause if row.state == "failed" else "" for row in ends}
            hopeless = len(causes) == 1 and "" not in causes
            reason = (
                f"its first {JUDGED_JOBS} jobs all failed with cause {ends[0].cause} ({ends[0].message[:200]}); "
                f"resume it if that is expected"
                if hopeless
                else ""
            )
            connection.execute(
                text(
                    "UPDATE batch SET judged = 1, reason = :reason, state = CASE WHEN :hopeless = 1 THEN 'paused'"
                    " ELSE state END WHERE id = :id AND state = 'open'"
                ),
                {"id": batch.id, "reason": reason, "hopeless": int(hopeless)},
            )
        if hopeless:
            said.append(f"batch {batch.name} paused itself: {reason}")
    return said


def _first_ends(connection: Connection, batch_id: int) -> Sequence[Row]:
    """State, cause and message of the batch's first 20 jobs to end since it was submitted."""
    return connection.execute(
        text(
            "SELECT r.state, r.cause, r.message FROM batch b JOIN membership m ON m.batch_id = b.id"
            " JOIN record r ON r.job_id = m.job_id JOIN job j ON j.id = m.job_id"
            " JOIN method_version v ON v.id = j.method_id"
            " WHERE b.id = :b AND r.finished_at >= b.submitted_at AND v.name <> :builder"
            " ORDER BY r.finished_at, m.ordinal LIMIT :n"
        ),
        {"b": batch_id, "builder": BUILDER, "n": JUDGED_JOBS},
    ).all()


def finish_batches(database: Database) -> None:
    """Batches all of whose jobs have ended are finished."""
    settled = (
        "b.state = 'open' AND b.size = (SELECT coalesce(sum(done + not_applicable + failed), 0) FROM chunk c"
        " WHERE c.batch_id = b.id)"
    )
    with database.read() as connection:
        ended = list(connection.execute(text(f"SELECT b.id FROM batch b WHERE {settled}")).scalars())
    for batch_id in ended:
        with database.write() as connection:
            connection.execute(
                text(
                    "UPDATE batch SET state = 'finished'"
                    f" WHERE id = :id AND id IN (SELECT b.id FROM batch b WHERE {settled})"
                ),
                {"id": batch_id},
            )
