"""What lies in a store and serves nobody: find it, and remove it, while submissions and workers go on.

* jobs of no batch and without a record: what submissions left that died or were refused on their way. They are removed
  in transactions that nobody writes beside, and only while no batch is arriving: an arriving submission may have found
  any of them by its key, and from its first write to its last it has a batch that arrives.
* artifacts that no job, record, batch or recipe names. Files are kept before the rows that name them are written, and
  what is kept again becomes young again: so only what is older than a day is garbage.
* temporary files of artifacts of that age, and batches that have been arriving for more than an hour.

What is done is never removed: a record stays, whether or not a batch holds its job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from netassay.store import arriving
from netassay.store.artifacts import Artifacts, MissingArtifact, named
from netassay.store.database import Database

#: Longer than any submission takes from its first file to its last row, and any job from its array to its record.
OLD_SECONDS = 24 * 3600.0
_PAGE = 10_000
#: Kinds of artifacts that name others.
_TEXTS = ("recipe:", "generator:")

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Garbage:
    """What serves nobody. batches: dead on arrival; artifacts: (digest, bytes); temporaries: (name, bytes);
    jobs_kept: jobs that would be garbage but for a batch that is arriving."""

    batches: int
    jobs: int
    artifacts: tuple[tuple[str, int], ...]
    temporaries: tuple[tuple[str, int], ...]
    jobs_kept: int = 0

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.artifacts) + sum(size for _, size in self.temporaries)

    @property
    def empty(self) -> bool:
        return not (self.batches or self.jobs or self.artifacts or self.temporaries)


def find(
    database: Database, artifacts: Artifacts, older_than: float = OLD_SECONDS, now: float | None = None
) -> Garbage:
    """What `remove` would remove. older_than: seconds; now: seconds since 1970, else the clock of this host.

    Memory: the digests of the artifacts, those of old ones and those that are named, some 100 bytes each.
    """
    now = time.time() if now is None else now
    dead = _dead(database, now)
    with database.read() as connection:
        jobs = connection.execute(text(f"SELECT count(*) FROM job j WHERE {_unheld(dead)}")).scalar_one()
        waiting = _others_arrive(connection, dead)
    # Listed before the store is read: what is named later was kept, and so made young, later.
    old = {kept.digest: kept.bytes for kept in artifacts.list() if now - kept.modified > older_than}
    garbage = tuple(sorted(_unnamed(database, artifacts, old, "" if waiting else _unheld(dead)).items()))
    return Garbage(
        len(dead), 0 if waiting else jobs, garbage, tuple(_temporaries(artifacts, now - older_than)), jobs * waiting
    )


def remove(
    database: Database,
    artifacts: Artifacts,
    older_than: float = OLD_SECONDS,
    now: float | None = None,
    progress: Progress = lambda share: None,
) -> Garbage:
    """Remove what `find` finds. Returns what was removed."""
    now = time.time() if now is None else now
    dead = _dead(database, now)
    for batch_id in dead:
        arriving.discard(database, batch_id)
    progress(0.1)
    jobs = _remove_jobs(database)
    progress(0.4)
    found = find(database, artifacts, older_than, now)
    gone = []
    for place, (digest, size) in enumerate(found.artifacts):
        if _still_old(artifacts, digest, now - older_than):
            artifacts.remove(digest)
            gone.append((digest, size))
        progress(0.5 + 0.5 * place / len(found.artifacts))
    for name, _ in found.temporaries:
        (artifacts.folder / name).unlink(missing_ok=True)
    return Garbage(len(dead), jobs, tuple(gone), found.temporaries, found.jobs + found.jobs_kept)


def _dead(database: Database, now: float) -> list[int]:
    with database.read() as connection:
        found = connection.execute(
            text("SELECT id FROM batch WHERE state = 'arriving' AND submitted_at < :then ORDER BY id"),
            {"then": now - arriving.ABANDONED_SECONDS},
        )
        return list(found.scalars())


def _others_arrive(connection: Connection, dead: Sequence[int] = ()) -> bool:
    beyond = f" AND id NOT IN ({', '.join(map(str, dead))})" if dead else ""
    return bool(connection.execute(text(f"SELECT 1 FROM batch WHERE state = 'arriving'{beyond} LIMIT 1")).all())


def _unheld(dead: Sequence[int] = ()) -> str:
    """Condition on a job j: it has no record, and no batch but these holds it."""
    beyond = f" AND m.batch_id NOT IN ({', '.join(map(str, dead))})" if dead else ""
    return (
        "NOT EXISTS (SELECT 1 FROM record r WHERE r.job_id = j.id)"
        f" AND NOT EXISTS (SELECT 1 FROM membership m WHERE m.job_id = j.id{beyond})"
    )


def _remove_jobs(database: Database) -> int:
    """Remove jobs of no batch and without a record, page by page. Returns how many."""
    removed, start = 0, 0
    while True:
        with database.read() as connection:
            rows = connection.execute(
                text(f"SELECT j.id, j.key FROM job j WHERE j.id >= :start AND {_unheld()} ORDER BY j.id LIMIT :limit"),
                {"start": start, "limit": _PAGE},
            ).all()
        if not rows:
            return removed
        ids = ", ".join(str(row.id) for row in rows)
        first, last = rows[0].id, rows[-1].id

        def forget(connection: Connection, ids: str = ids) -> int | None:
            if _others_arrive(connection):
                return None
            # Looked at anew: since the page was read a submission may have come and gone.
            still = connection.execute(
                text(f"SELECT j.id, j.key FROM job j WHERE j.id IN ({ids}) AND {_unheld()}")
            ).all()
            if not still:
                return 0
            places = ", ".join(str(row.id) for row in still)
            connection.execute(
                text("DELETE FROM job_key WHERE key = :key AND job_id = :id"),
                [{"key": bytes(row.key), "id": row.id} for row in still],
            )
            for table, column in (("attempt", "job_id"), ("worker_loss", "job_id"), ("job", "id")):
                connection.execute(text(f"DELETE FROM {table} WHERE {column} IN ({places})"))
            return len(still)

        gone = database.transact(forget)
        if gone is None:
            return removed
        removed += gone
        start = last + 1
        assert start > first


def _unnamed(database: Database, artifacts: Artifacts, old: dict[str, int], except_jobs: str) -> dict[str, int]:
    """Those of the old artifacts that nothing names. except_jobs: condition on jobs whose names do not count."""
    left = dict(old)
    texts: list[str] = []
    for reference in _references(database, except_jobs):
        if reference.startswith(_TEXTS):
            texts.append(reference)
        left.pop(reference.rpartition(":")[2], None)
    seen: set[str] = set()
    while texts and left:
        reference = texts.pop()
        if reference in seen:
            continue
        seen.add(reference)
        with contextlib.suppress(MissingArtifact):
            for inner in named(artifacts.read(reference).decode(errors="replace")):
                left.pop(inner.rpartition(":")[2], None)
                if inner.startswith(_TEXTS):
                    texts.append(inner)
    return left


def _references(database: Database, except_jobs: str) -> Iterator[str]:
    """Every reference in the store, some of them often."""
    for table in ("reference_name", "need"):
        with database.read() as connection:
            yield from connection.execute(text(f"SELECT DISTINCT reference FROM {table}")).scalars().all()
    wanted = f" AND NOT ({except_jobs})" if except_jobs else ""
    queries = (
        f"SELECT j.id, j.params, NULL FROM job j WHERE j.id >= :start{wanted} ORDER BY j.id LIMIT :limit",
        "SELECT job_id, result, inputs FROM record WHERE job_id >= :start ORDER BY job_id LIMIT :limit",
    )
    for query in queries:
        start = 0
        while True:
            with database.read() as connection:
                rows = connection.execute(text(query), {"start": start, "limit": _PAGE}).all()
            for _, first, second in rows:
                yield from named(first)
                yield from named(second)
            if len(rows) < _PAGE:
                break
            start = rows[-1][0] + 1


def _still_old(artifacts: Artifacts, digest: str, before: float) -> bool:
    """Whether nobody has kept it again since it was listed."""
    path = artifacts.folder / digest[:2] / digest
    if artifacts.remote is not None:
        about = artifacts.remote.about(digest)
        return about is not None and about.modified < before
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:
        return False


def _temporaries(artifacts: Artifacts, before: float) -> Iterator[tuple[str, int]]:
    """What writers that died left in the folder."""
    for path in sorted(artifacts.folder.glob(".arriving-*")):
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            if about.st_mtime < before:
                yield path.name, about.st_size
