"""Give jobs that ended a new start: their records go, and every batch that holds them counts them as open again."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence

from sqlalchemy import Connection, Row, text


def forget_records(connection: Connection, jobs: Sequence[int]) -> int:
    """Within a write transaction: forget how these jobs ended. Returns how many had ended.

    In every batch that had counted one, the count goes down and a chunk of its own range is made ready, so the sum over
    a batch's chunks stays what its records say. Attempts are kept, but no longer count against the job.
    """
    ended = 0
    for start in range(0, len(jobs), 5_000):
        ended += _forget(connection, ", ".join(map(str, jobs[start : start + 5_000])))
    return ended


def _forget(connection: Connection, places: str) -> int:
    held: dict[int, dict[int, str]] = defaultdict(dict)
    for batch_id, ordinal, state in connection.execute(
        text(
            "SELECT m.batch_id, m.ordinal, r.state"
            " FROM record r JOIN membership m ON m.job_id = r.job_id JOIN batch b ON b.id = m.batch_id"
            f" WHERE b.state <> 'arriving' AND r.job_id IN ({places})"
        )
    ):
        held[batch_id][ordinal] = state
    ended = connection.execute(text(f"DELETE FROM record WHERE job_id IN ({places})")).rowcount
    connection.execute(text(f"UPDATE attempt SET spent = 1 WHERE job_id IN ({places})"))
    connection.execute(text(f"DELETE FROM worker_loss WHERE job_id IN ({places})"))
    for batch_id, states in held.items():
        counted = _counted(connection, batch_id, sorted(states))
        if not counted:
            continue
        lost = Counter((chunk_id, states[ordinal]) for ordinal, chunk_id in counted.items())
        for (chunk_id, state), number in lost.items():
            connection.execute(
                text(f"UPDATE chunk SET {state} = {state} - :n WHERE id = :id"), {"n": number, "id": chunk_id}
            )
        make_ready(connection, batch_id, list(counted))
        connection.execute(
            text("UPDATE batch SET state = 'open' WHERE id = :id AND state = 'finished'"), {"id": batch_id}
        )
    # What needs one of these jobs has to wait for it again, and what is run again looks anew at what it needs.
    connection.execute(
        text(
            f"UPDATE segment SET waiting = 1 WHERE id IN (SELECT n.segment_id FROM need n WHERE n.job_id IN ({places}))"
        )
    )
    # Of the segments that begin at or before an ordinal, the last is the one that holds it.
    connection.execute(
        text(
            "UPDATE segment SET waiting = 1 WHERE id IN (SELECT n.segment_id FROM need n WHERE n.segment_id IN ("
            " SELECT (SELECT s.id FROM segment s WHERE s.batch_id = m.batch_id AND s.start <= m.ordinal"
            f" ORDER BY s.start DESC LIMIT 1) FROM membership m WHERE m.job_id IN ({places})))"
        )
    )
    return ended


def _counted(connection: Connection, batch_id: int, ordinals: Sequence[int]) -> dict[int, int]:
    """The chunk that counts each of these ordinals (given in order); not in it: those that nobody has counted yet.

    The newest chunk over an ordinal answers for it: what is given back, split off or retried lies over an older range.
    If that one is not finished it has counted nothing, and will find the record gone.
    """
    chunks = connection.execute(
        text(
            "SELECT id, start, stop, state FROM chunk WHERE batch_id = :b AND start <= :high AND stop > :low"
            " ORDER BY start"
        ),
        {"b": batch_id, "low": ordinals[0], "high": ordinals[-1]},
    ).all()
    counted: dict[int, int] = {}
    over: list[tuple[int, Row]] = []
    place = 0
    for ordinal in ordinals:
        while place < len(chunks) and chunks[place].start <= ordinal:
            heapq.heappush(over, (-chunks[place].id, chunks[place]))
            place += 1
        while over and over[0][1].stop <= ordinal:
            heapq.heappop(over)
        if over and over[0][1].state == "finished":
            counted[ordinal] = over[0][1].id
    return counted


def make_ready(connection: Connection, batch_id: int, ordinals: Sequence[int], state: str = "ready") -> None:
    """Chunks over exactly these ordinals of a batch, one for each run of neighbours within a segment."""
    segments = connection.execute(
        text(
            "SELECT id, start, stop FROM segment WHERE batch_id = :b AND start <= :high AND stop > :low ORDER BY start"
        ),
        {"b": batch_id, "low": min(ordinals), "high": max(ordinals)},
    ).all()
    rows, place = [], 0
    ordinals = sorted(ordinals)
    for segment in segments:
        while place < len(ordinals) and ordinals[place] < segment.stop:
            start = ordinals[place]
            stop = start + 1
            place += 1
            while place < len(ordinals) and ordinals[place] == stop < segment.stop:
                stop += 1
                place += 1
            rows.append({"s": segment.id, "b": batch_id, "start": start, "stop": stop, "state": state})
    connection.execute(
        text("INSERT INTO chunk (segment_id, batch_id, start, stop, state) VALUES (:s, :b, :start, :stop, :state)"),
        rows,
    )
