"""A store worked by hand: jobs without methods, workers without processes, and an audit of its books."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import text

from netassay.job import BUILDER, Segment, key_of
from netassay.store import arriving, dispatching, running, submission
from netassay.store.database import Database
from netassay.store.running import Claim, Outcome, Task

METHOD = "diagnostics.echo"


def params_of(number: int) -> str:
    return f'{{"n":{number}}}'


def jobs(
    numbers: Iterable[int],
    method: str = METHOD,
    seconds: float = 0.1,
    group_size: int = 1,
    recipes: tuple[str, ...] = (),
    group: str = "",
) -> Segment:
    """A segment: one job a number."""
    params = [params_of(number) for number in numbers]
    keys = [key_of(method, 1, text) for text in params]
    return Segment(method, 1, group, seconds, None, None, None, group_size, (), recipes, params, keys)


def builder(*recipes: str) -> Segment:
    """The segment whose jobs build the networks of these recipes."""
    params = [json.dumps({"recipe": recipe}) for recipe in recipes]
    keys = [key_of(BUILDER, 1, text) for text in params]
    return Segment(BUILDER, 1, "", 0.1, None, None, None, 1, (), (), params, keys)


def submit(database: Database, name: str, *segments: Segment, **options: Any) -> submission.Submitted:
    said = {field: options.pop(field) for field in ("weight", "note", "submitter", "tags") if field in options}
    return submission.submit(database, name, segments, {}, arriving.Particulars(**said), **options)


def sign_on(database: Database, name: str = "worker", slots: int = 1, memory: int = 0) -> int:
    return running.sign_on(database, name, "host", 1, slots, memory)


def number_of(task: Task) -> int:
    return json.loads(task.params).get("n", -1)


def done(task: Task) -> Outcome:
    return Outcome(task.id, "done", result='{"network":"onnx:built"}' if "recipe" in task.params else task.params)


def failed(cause: str) -> Callable[[Task], Outcome]:
    return lambda task: Outcome(task.id, "failed", cause, f"{cause} in {task.params}")


def publish(database: Database, slots: int = 1, most: int = 10**9) -> list[dispatching.Message]:
    """Mark as published all that can be, batch after batch."""
    messages: list[dispatching.Message] = []
    with database.write() as connection:
        for batch in dispatching.open_batches(connection):
            while len(messages) < most and (message := dispatching.publish_next(connection, batch, slots)):
                messages.append(message)
    return messages


def take(database: Database, worker: int, slots: int = 1) -> Claim:
    """Publish one chunk and claim it."""
    (message,) = publish(database, slots, most=1)
    claim = running.claim(database, worker, message.chunk_id)
    assert claim is not None
    return claim


def finish(database: Database, worker: int, claim: Claim, end: Callable[[Task], Outcome] = done) -> None:
    running.finish(database, worker, claim, [end(task) for task in claim.tasks])


def drain(database: Database, worker: int, end: Callable[[Task], Outcome] = done) -> list[int]:
    """Run until nothing is left to publish. Returns the ids of the jobs in the order in which they ran."""
    ran: list[int] = []
    for _ in range(1000):
        dispatching.settle_needs(database)
        with database.write() as connection:
            dispatching.unblock(connection)
        messages = publish(database)
        if not messages:
            dispatching.finish_batches(database)
            return ran
        for message in messages:
            claim = running.claim(database, worker, message.chunk_id)
            if claim is not None:
                ran += [task.id for task in claim.tasks]
                finish(database, worker, claim, end)
    raise AssertionError("the same work comes round for ever")


def rows(database: Database, query: str, **values: object) -> list[tuple]:
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(text(query), values)]


def jobs_in(database: Database, state: str) -> int:
    """How many ordinals lie under chunks of this state."""
    ((count,),) = rows(database, "SELECT coalesce(sum(stop - start), 0) FROM chunk WHERE state = :state", state=state)
    return count


def audit(database: Database) -> None:
    """The books balance, at rest and in between.

    Of each batch, every ordinal belongs to its newest chunk, or to the uncut end of its segment. A chunk that is not
    finished owns all its range and has counted nothing. A finished one has counted exactly what it owns, and each of
    those has a record. Jobs are in `running` only for claimed chunks over them, and have no record.
    """
    records = dict(rows(database, "SELECT job_id, state FROM record"))
    members: dict[int, dict[int, int]] = defaultdict(dict)
    for batch, ordinal, job in rows(database, "SELECT batch_id, ordinal, job_id FROM membership"):
        members[batch][ordinal] = job
    chunks = rows(
        database,
        "SELECT id, batch_id, start, stop, state, done, not_applicable, failed FROM chunk ORDER BY id",
    )
    owner: dict[tuple[int, int], int] = {}
    for chunk in chunks:
        owner |= {(chunk[1], ordinal): chunk[0] for ordinal in range(chunk[2], chunk[3])}
    for segment, batch, start, stop, following in rows(database, "SELECT id, batch_id, start, stop, next FROM segment"):
        assert all((batch, ordinal) in owner for ordinal in range(start, following)), f"segment {segment} lost some"
        assert not any((batch, ordinal) in owner for ordinal in range(following, stop)), f"segment {segment} cut twice"
    held = dict(rows(database, "SELECT job_id, chunk_id FROM running"))
    claimed: dict[int, set[int]] = {}
    for chunk, batch, start, stop, state, *counts in chunks:
        owned = [members[batch][ordinal] for ordinal in range(start, stop) if owner[batch, ordinal] == chunk]
        if state == "finished":
            seen = Counter(records[job] for job in owned)
            assert counts == [seen["done"], seen["not_applicable"], seen["failed"]], f"chunk {chunk} miscounts"
        else:
            assert len(owned) == stop - start > 0, f"chunk {chunk} ({state}) lies under a newer one"
            assert counts == [0, 0, 0]
        if state == "claimed":
            claimed[chunk] = set(owned)
    for job, chunk in held.items():
        assert chunk in claimed, f"job {job} runs for chunk {chunk}, which nobody holds"
        assert job in claimed[chunk], f"job {job} runs for chunk {chunk}, which is not over it"
        assert job not in records, f"job {job} runs though it has ended"


def recount(database: Database, name: str) -> tuple[int, int, int]:
    """done, not_applicable, failed of a batch by its records alone; at rest its counters must say the same."""
    ((*counts,),) = rows(
        database,
        "SELECT count(CASE WHEN r.state = 'done' THEN 1 END), count(CASE WHEN r.state = 'not_applicable' THEN 1 END),"
        " count(CASE WHEN r.state = 'failed' THEN 1 END) FROM batch b JOIN membership m ON m.batch_id = b.id"
        " LEFT JOIN record r ON r.job_id = m.job_id WHERE b.name = :name AND b.state <> 'arriving'",
        name=name,
    )
    return counts[0], counts[1], counts[2]


def audit_at_rest(database: Database) -> None:
    """`audit`, and the counters of every batch are what its records say."""
    from netassay.store import reading

    audit(database)
    for seen in reading.batches(database):
        assert (seen.done, seen.not_applicable, seen.failed) == recount(database, seen.name), seen.name
        assert seen.running == 0
