"""Write a batch: jobs, keys, memberships, segments. Until the last transaction nobody sees any of it.

A crash before that leaves jobs that belong to no batch (a later submission finds and uses them) and a batch row in
state `arriving`, which is never dispatched.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy import Connection, text

from netassay import faults
from netassay.job import BUILDER, DETERMINISTIC
from netassay.method import time_limit
from netassay.store.database import Database, Outage, StoreError, slices
from netassay.store.reset import forget_records, make_ready


class Segment(Protocol):
    """Consecutive jobs of one method, version, networks and limits; `producer.sweeps` makes them."""

    method: str
    version: int
    group: str
    seconds: float
    memory: int | None
    time_limit: float | None
    memory_limit: int | None
    group_size: int
    libraries: tuple[str, ...]
    recipes: tuple[str, ...]
    params: list[str]
    keys: list[bytes]


class NameTaken(StoreError):
    """A batch of that name holds other jobs."""


@dataclass(frozen=True)
class Submitted:
    """What a submission did. already: the very same batch was there; new: jobs not known to the store before;
    rerun: known jobs whose failure (time, memory, crash, ...) is worth another try."""

    batch_id: int
    name: str
    size: int
    new: int
    known: int
    rerun: int = 0
    already: bool = False
    reopened: bool = False


def digest_of(segments: Sequence[Segment]) -> bytes:
    """Digest of a batch's ordered keys."""
    hasher = hashlib.blake2b(digest_size=16)
    for segment in segments:
        hasher.update(b"".join(segment.keys))
    return hasher.digest()


def submit(
    database: Database,
    name: str,
    segments: Sequence[Segment],
    names: Mapping[str, str],
    weight: float = 1.0,
    progress: Callable[[float], None] = lambda share: None,
) -> Submitted:
    """Add a batch durably: when this returns, neither a killed process nor a power cut loses a job.

    The same name with the same jobs adds nothing (a cancelled batch is opened again); with other jobs it raises
    NameTaken.
    """
    digest = digest_of(segments)
    size = sum(len(segment.keys) for segment in segments)
    with database.read() as connection:
        found = _rival(connection, name, digest)
    if found:
        return _again(database, found, name, size)
    batch_id = _arrive(database, name, digest, weight, size)
    arrival = _Arrival(database, segments, progress)
    try:
        ids = arrival.write_jobs()
        rerun = _forget_retryable(database, sorted(arrival.known))
        _write_memberships(database, batch_id, ids, progress)
        rows, needs = _segment_rows(batch_id, segments, ids, arrival.methods)
        faults.reach("submit.arriving")
        with database.write(durable=True) as connection:
            found = _rival(connection, name, digest)
            if not found:
                _write_segments(database, connection, rows, needs)
                database.insert(
                    connection,
                    "reference_name",
                    ("batch_id", "reference", "name"),
                    [(batch_id, reference, called) for reference, called in names.items()],
                )
                if arrival.known:
                    _count_ended(connection, batch_id)
                opened = connection.execute(
                    text("UPDATE batch SET state = 'open' WHERE id = :id AND length(digest) > 0"), {"id": batch_id}
                ).rowcount
                if not opened:
                    raise StoreError("this submission stood still so long that it was taken for dead; submit it again")
    except BaseException:
        # Ctrl-C too. Where the store is out, `discard_abandoned` finds the batch later; one that did open stays.
        with contextlib.suppress(*Outage):
            discard(database, batch_id)
        raise
    if found:
        discard(database, batch_id)
        return _again(database, found, name, size)
    faults.reach("submit.opened")
    return Submitted(batch_id, name, size, new=size - len(arrival.known), known=len(arrival.known), rerun=rerun)


def _rival(connection: Connection, name: str, digest: bytes) -> int | None:
    """Id of the batch of this name and these jobs. Raises NameTaken where its jobs are others."""
    row = connection.execute(
        text("SELECT id, digest, size FROM batch WHERE name = :name AND state <> 'arriving'"), {"name": name}
    ).one_or_none()
    if row is None:
        return None
    if bytes(row.digest) != digest:
        raise NameTaken(
            f"a batch called {name!r} exists and holds other jobs ({row.size:,}); submit under another --name"
        )
    return row.id


def _again(database: Database, batch_id: int, name: str, size: int) -> Submitted:
    with database.write(durable=True) as connection:
        reopened = connection.execute(
            text("UPDATE batch SET state = 'open', reason = '' WHERE id = :id AND state = 'cancelled'"),
            {"id": batch_id},
        ).rowcount
    return Submitted(batch_id, name, size, new=0, known=size, already=True, reopened=bool(reopened))


def _arrive(database: Database, name: str, digest: bytes, weight: float, size: int) -> int:
    with database.write() as connection:
        return connection.execute(
            text(
                "INSERT INTO batch (name, digest, state, weight, size, submitted_at)"
                " VALUES (:name, :digest, 'arriving', :weight, :size, :now) RETURNING id"
            ),
            {"name": name, "digest": digest, "weight": weight, "size": size, "now": time.time()},
        ).scalar_one()


@dataclass
class _Arrival:
    """The jobs of one submission on their way into the tables, in submission order."""

    database: Database
    segments: Sequence[Segment]
    progress: Callable[[float], None]
    known: set[int] = field(default_factory=set)
    methods: dict[tuple[str, int], int] = field(default_factory=dict)

    def write_jobs(self) -> list[int]:
        """Ids of the jobs in order: those the store knew (collected in `known`), and new ones."""
        keys = [key for segment in self.segments for key in segment.keys]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        ids: list[int] = [0] * len(keys)
        self._find(keys, order, ids)
        self.progress(0.1)
        self._allot(ids)
        self._insert_jobs(ids)
        self._insert_keys(keys, order, ids)
        return ids

    def _find(self, keys: list[bytes], order: list[int], ids: list[int]) -> None:
        with self.database.read() as connection:
            if connection.execute(text("SELECT 1 FROM job_key LIMIT 1")).one_or_none() is None:
                return
            for piece in slices(order):
                found = _ids_of(self.database, connection, [keys[place] for place in piece])
                if found:
                    for place in piece:
                        if known := found.get(keys[place]):
                            ids[place] = known
                            self.known.add(known)

    def _allot(self, ids: list[int]) -> None:
        new = ids.count(0)
        with self.database.write() as connection:
            last = connection.execute(
                text("UPDATE lab SET value = value + :n WHERE name = 'next_job' RETURNING value"), {"n": new}
            ).scalar_one()
        following = last - new
        for place, known in enumerate(ids):
            if not known:
                ids[place] = following
                following += 1

    def _insert_jobs(self, ids: list[int]) -> None:
        methods = self.methods = _method_ids(self.database, self.segments)
        jobs = (
            (key, methods[segment.method, segment.version], params)
            for segment in self.segments
            for key, params in zip(segment.keys, segment.params, strict=True)
        )
        for start in range(0, len(ids), 10_000):
            piece = zip(ids[start : start + 10_000], itertools.islice(jobs, 10_000), strict=True)
            rows = [(job_id, *job) for job_id, job in piece if job_id not in self.known]
            with self.database.write() as connection:
                self.database.insert(connection, "job", ("id", "key", "method_id", "params"), rows)
            self.progress(0.1 + 0.4 * start / len(ids))

    def _insert_keys(self, keys: list[bytes], order: list[int], ids: list[int]) -> None:
        """Keys of the new jobs; where a rival submission was faster, its job is used and ours deleted."""
        new = [place for place in order if ids[place] not in self.known]
        for piece in slices(new):
            rows = [(keys[place], ids[place]) for place in piece]
            with self.database.write() as connection:
                if self.database.insert(connection, "job_key", ("key", "job_id"), rows, ignore=True) == len(rows):
                    continue
                found = _ids_of(self.database, connection, [keys[place] for place in piece])
                lost = [place for place in piece if found[keys[place]] != ids[place]]
                for place in lost:
                    connection.execute(text("DELETE FROM job WHERE id = :id"), {"id": ids[place]})
            for place in lost:
                ids[place] = found[keys[place]]
                self.known.add(ids[place])
        self.progress(0.75)


def _ids_of(database: Database, connection: Connection, keys: Sequence[bytes]) -> dict[bytes, int]:
    mark = "?" if database.sqlite else "%s"
    statement = f"SELECT key, job_id FROM job_key WHERE key IN ({','.join([mark] * len(keys))})"
    return {bytes(key): job_id for key, job_id in connection.exec_driver_sql(statement, tuple(keys))}


def method_id_of(connection: Connection, name: str, version: int) -> int:
    """Row of a method's version, made where it is new."""
    values = {"name": name, "version": version}
    connection.execute(
        text("INSERT INTO method_version (name, version) VALUES (:name, :version) ON CONFLICT DO NOTHING"), values
    )
    return connection.execute(
        text("SELECT id FROM method_version WHERE name = :name AND version = :version"), values
    ).scalar_one()


def _method_ids(database: Database, segments: Sequence[Segment]) -> dict[tuple[str, int], int]:
    """Rows of all method versions that these segments are of."""
    with database.write() as connection:
        return {
            (name, version): method_id_of(connection, name, version)
            for name, version in dict.fromkeys((segment.method, segment.version) for segment in segments)
        }


def _forget_retryable(database: Database, known: list[int]) -> int:
    """A new submission runs again what failed for reasons that may pass."""
    if not known:
        return 0
    forgotten = 0
    kept = ", ".join(f"'{cause}'" for cause in sorted(DETERMINISTIC))
    for piece in slices(known, 5_000):
        places = ", ".join(map(str, piece))
        with database.write() as connection:
            failed = connection.execute(
                text(
                    f"SELECT job_id FROM record WHERE state = 'failed' AND cause NOT IN ({kept})"
                    f" AND job_id IN ({places})"
                )
            ).scalars()
            forgotten += forget_records(connection, list(failed))
    return forgotten


def _write_memberships(database: Database, batch_id: int, ids: list[int], progress: Callable[[float], None]) -> None:
    for start in range(0, len(ids), 10_000):
        rows = [(batch_id, start + place, job_id) for place, job_id in enumerate(ids[start : start + 10_000])]
        with database.write() as connection:
            database.insert(connection, "membership", ("batch_id", "ordinal", "job_id"), rows)
        progress(0.75 + 0.25 * start / len(ids))


def _segment_rows(
    batch_id: int, segments: Sequence[Segment], ids: list[int], methods: Mapping[tuple[str, int], int]
) -> tuple[list[tuple], list[list[tuple[str, int]]]]:
    """Rows of the segments, and of each the (recipe, job that builds it) it needs."""
    rows, needs, start = [], [], 0
    builders: dict[str, int] = {}
    for segment in segments:
        stop = start + len(segment.keys)
        wanted = [(recipe, builders[recipe]) for recipe in segment.recipes]
        for offset, params in enumerate(segment.params if segment.method == BUILDER else ()):
            builders[recipe_of(params)] = ids[start + offset]
        rows.append(
            (
                batch_id, start, stop, start, methods[segment.method, segment.version], segment.group, segment.seconds,
                segment.time_limit or time_limit(segment.seconds),
                segment.memory_limit or segment.memory, segment.group_size, " ".join(segment.libraries),
                int(bool(wanted)),
            )
        )  # fmt: skip
        needs.append(wanted)
        start = stop
    return rows, needs


def recipe_of(params: str) -> str:
    """The recipe that a job of the builder builds."""
    return json.loads(params)["recipe"]


def _write_segments(
    database: Database, connection: Connection, rows: list[tuple], needs: list[list[tuple[str, int]]]
) -> None:
    columns = (
        "batch_id", "start", "stop", "next", "method_id", "label", "hint", "time_limit",
        "memory_limit", "group_size", "libraries", "waiting",
    )  # fmt: skip
    database.insert(connection, "segment", columns, rows)
    if any(needs):
        found = connection.execute(
            text("SELECT id FROM segment WHERE batch_id = :id ORDER BY start"), {"id": rows[0][0]}
        ).scalars()
        database.insert(
            connection,
            "need",
            ("segment_id", "reference", "job_id"),
            [(place, reference, job) for place, wanted in zip(found, needs, strict=True) for reference, job in wanted],
        )


#: Jobs left between ended ones, in more runs than this in a segment, would each travel in a tiny chunk of their own.
MOST_RUNS = 50


def _count_ended(connection: Connection, batch_id: int) -> None:
    """Jobs that ended in earlier batches are counted here and now, not sent around to be found done."""
    segments = connection.execute(
        text("SELECT id, start, stop FROM segment WHERE batch_id = :id ORDER BY start"), {"id": batch_id}
    ).all()
    for segment in segments:
        place = {"b": batch_id, "s": segment.id, "start": segment.start, "stop": segment.stop}
        within = "m.batch_id = :b AND m.ordinal >= :start AND m.ordinal < :stop"
        ended: dict[str, int] = dict(
            connection.execute(
                text(
                    "SELECT r.state, count(*) FROM membership m JOIN record r ON r.job_id = m.job_id"
                    f" WHERE {within} GROUP BY r.state"
                ),
                place,
            ).all()
        )
        if not ended:
            continue
        rest = connection.execute(
            text(
                f"SELECT m.ordinal FROM membership m WHERE {within}"
                " AND NOT EXISTS (SELECT 1 FROM record r WHERE r.job_id = m.job_id) ORDER BY m.ordinal"
            ),
            place,
        ).scalars()
        ordinals = list(rest)
        runs = bool(ordinals) + sum(after - before > 1 for before, after in itertools.pairwise(ordinals))
        if runs > MOST_RUNS:
            continue  # cut as usual: its chunks find the ended jobs as they pass
        connection.execute(text("UPDATE segment SET next = stop WHERE id = :s"), place)
        connection.execute(
            text(
                "INSERT INTO chunk (segment_id, batch_id, start, stop, state, done, not_applicable, failed)"
                " VALUES (:s, :b, :start, :stop, 'finished', :done, :not_applicable, :failed)"
            ),
            {"done": 0, "not_applicable": 0, "failed": 0, **ended, **place},
        )
        if ordinals:
            make_ready(connection, batch_id, ordinals)


def discard(database: Database, batch_id: int) -> None:
    """Remove a batch that never opened; its jobs stay, for whoever asks for them next."""
    # The batch row goes last: whoever dies on the way leaves something that is found and removed. Without its
    # digest a batch cannot open: its submission may be slow rather than dead, and must not open what is half removed.
    deleted = True
    while deleted:
        with database.write() as connection:
            arriving = connection.execute(
                text("UPDATE batch SET digest = x'' WHERE id = :id AND state = 'arriving'"), {"id": batch_id}
            ).rowcount
            if not arriving:
                return
            deleted = bool(
                connection.execute(
                    text(
                        "DELETE FROM membership WHERE batch_id = :id AND ordinal IN"
                        " (SELECT ordinal FROM membership WHERE batch_id = :id LIMIT 10000)"
                    ),
                    {"id": batch_id},
                ).rowcount
            )
            if not deleted:
                connection.execute(text("DELETE FROM batch WHERE id = :id"), {"id": batch_id})


#: A submission of a million jobs takes half a minute; one that has been arriving for so long has died on the way.
ABANDONED_SECONDS = 3600.0


def discard_abandoned(database: Database) -> int:
    """Remove what submissions left behind that died on the way. Returns how many."""
    with database.read() as connection:
        found = connection.execute(
            text("SELECT id FROM batch WHERE state = 'arriving' AND submitted_at < :then"),
            {"then": time.time() - ABANDONED_SECONDS},
        ).scalars()
        dead = list(found)
    for batch_id in dead:
        discard(database, batch_id)
    return len(dead)
