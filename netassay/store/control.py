"""What people ask of a batch: pause, resume, cancel, retry, weight."""

from __future__ import annotations

import functools

from sqlalchemy import Connection, text

from netassay.store.arriving import check_submitter, check_weight
from netassay.store.database import Database, StoreError, slices
from netassay.store.reset import forget_records


class NoSuchBatch(StoreError):
    """No batch of that name; the message lists the newest ones."""


def batch_id_of(database: Database, name: str) -> int:
    with database.read() as connection:
        found = connection.execute(
            text("SELECT id FROM batch WHERE name = :name AND state <> 'arriving'"), {"name": name}
        ).scalar()
        if found is not None:
            return found
        newest = connection.execute(
            text("SELECT name FROM batch WHERE state <> 'arriving' ORDER BY id DESC LIMIT 5")
        ).scalars()
        others = ", ".join(newest)
    there = f"the newest are: {others}" if others else "none was submitted yet"
    raise NoSuchBatch(f"no batch is called {name!r}; {there}")


def _move(database: Database, name: str, state: str, allowed: tuple[str, ...], judged: bool = False) -> bool:
    batch_id = batch_id_of(database, name)
    places = ", ".join(f"'{item}'" for item in allowed)

    def move(connection: Connection) -> bool:
        return bool(
            connection.execute(
                text(
                    "UPDATE batch SET state = :state, reason = '',"
                    " judged = CASE WHEN :judged = 1 THEN 1 ELSE judged END"
                    f" WHERE id = :id AND state IN ({places})"
                ),
                {"id": batch_id, "state": state, "judged": int(judged)},
            ).rowcount
        )

    return database.transact(move, durable=True)


def pause(database: Database, name: str) -> bool:
    """Start no more of its jobs; running ones end. False where it was not open."""
    return _move(database, name, "paused", ("open",))


def resume(database: Database, name: str) -> bool:
    """Go on with a paused or cancelled batch; it will not pause itself again. False where it was neither."""
    # Whoever lacked a method may have it by now.
    database.transact(lambda connection: connection.execute(text("DELETE FROM worker_lack")))
    return _move(database, name, "open", ("paused", "cancelled"), judged=True)


def cancel(database: Database, name: str) -> bool:
    """Start no more of its jobs and stop running ones, except where another open batch holds them."""
    return _move(database, name, "cancelled", ("open", "paused"))


def retry(database: Database, name: str, cause: str | None = None) -> int:
    """Give the batch's failed jobs (of one cause, if given) a new start. Returns how many."""
    batch_id = batch_id_of(database, name)
    with database.read() as connection:
        failed = list(
            connection.execute(
                text(
                    "SELECT r.job_id FROM membership m JOIN record r ON r.job_id = m.job_id WHERE m.batch_id = :id"
                    " AND r.state = 'failed'" + (" AND r.cause = :cause" if cause else "")
                ),
                {"id": batch_id, "cause": cause} if cause else {"id": batch_id},
            ).scalars()
        )
    retried = 0
    for piece in slices(failed, 5_000):
        retried += database.transact(functools.partial(forget_records, jobs=piece), durable=True)
    if retried:
        judge = text("UPDATE batch SET judged = 1 WHERE id = :id")
        database.transact(lambda connection: connection.execute(judge, {"id": batch_id}), durable=True)
    return retried


def set_weight(database: Database, name: str, weight: float) -> None:
    """Its share of the slots against other open batches of its submitter; 1 is usual."""
    check_weight(weight)
    batch_id = batch_id_of(database, name)
    change = text("UPDATE batch SET weight = :weight WHERE id = :id")
    database.transact(
        lambda connection: connection.execute(change, {"id": batch_id, "weight": float(weight)}), durable=True
    )


def set_share(database: Database, submitter: str, weight: float) -> None:
    """A submitter's share of the slots against other submitters with open batches; 1 is usual."""
    check_weight(weight)
    check_submitter(submitter)
    usual = float(weight) == 1.0

    def change(connection: Connection) -> None:
        connection.execute(text("DELETE FROM submitter WHERE name = :name"), {"name": submitter})
        if not usual:
            connection.execute(
                text("INSERT INTO submitter (name, weight) VALUES (:name, :weight)"),
                {"name": submitter, "weight": float(weight)},
            )

    database.transact(change, durable=True)


def shares(database: Database) -> dict[str, float]:
    """Everybody who submitted a batch or has a share of their own -> that share."""
    with database.read() as connection:
        rows = connection.execute(
            text(
                "SELECT n.name, coalesce(u.weight, 1.0) FROM (SELECT DISTINCT submitter AS name FROM batch"
                " WHERE state <> 'arriving' UNION SELECT name FROM submitter) n"
                " LEFT JOIN submitter u ON u.name = n.name ORDER BY n.name"
            )
        )
        return {row[0]: row[1] for row in rows}
