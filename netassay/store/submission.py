"""Submit a batch: all of it or nothing, new or behind what a batch of the name holds, as often as one likes."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, TextClause, text

from netassay import faults
from netassay.job import BUILDER, DETERMINISTIC, Segment
from netassay.store.arriving import (
    MOST_TAGS,
    Arrival,
    Opened,
    Particulars,
    begin,
    check_name,
    discard,
    ids_of,
    joined,
    opened,
    recipe_of,
)
from netassay.store.database import PATIENCE, Database, Outage, StoreError, slices
from netassay.store.reset import forget_records


class NameTaken(StoreError):
    """A batch of that name holds other jobs."""


@dataclass(frozen=True)
class Submitted:
    """What a submission did. size: of the batch; new: jobs not known to the store before; rerun: known jobs that get
    a new start; already: the batch had all these jobs; appended: jobs added to a batch that was there."""

    batch_id: int
    name: str
    size: int
    new: int
    known: int
    rerun: int = 0
    already: bool = False
    reopened: bool = False
    appended: int = 0


class _Changed(Exception):
    """Another submission opened or extended the batch of this name meanwhile: look again."""


def digest_of(segments: Sequence[Segment]) -> bytes:
    """Digest of a batch's ordered keys."""
    return _digest(segment.keys for segment in segments)


def _digest(*parts: Iterable[Sequence[bytes]]) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for keys in itertools.chain(*parts):
        hasher.update(b"".join(keys))
    return hasher.digest()


def submit(
    database: Database,
    name: str,
    segments: Sequence[Segment],
    names: Mapping[str, str],
    particulars: Particulars = Particulars(),
    progress: Callable[[float], None] = lambda share: None,
    append: bool = False,
    fresh: bool = False,
) -> Submitted:
    """Add a batch durably: when this returns, neither a killed process nor a power cut loses a job.

    The same name with the same jobs adds nothing (a cancelled batch is opened again). With other jobs it raises
    NameTaken, unless `append`: then those the batch does not hold are put behind its own; its weight and
    submitter stay, a note replaces its note, tags are added. `fresh`: jobs whose outcome is known run again, in every
    batch that holds them. Raises StoreError too for a name or particulars that cannot be kept.
    """
    check_name(name)
    particulars.check()
    order = _Order(database, name, segments, names, particulars, fresh, progress)
    while True:
        found = database.persist(PATIENCE, lambda: _named(database, name))
        if found is not None and found.digest == digest_of(segments):
            return _again(database, found, name, fresh, said=particulars if append else None)
        if found is not None and not append:
            raise _taken(name, found)
        try:
            if found is None:
                return _submit(order)
            return _append(order, found)
        except _Changed:
            continue


@dataclass(frozen=True)
class _Order:
    """What was asked for."""

    database: Database
    name: str
    segments: Sequence[Segment]
    names: Mapping[str, str]
    particulars: Particulars
    fresh: bool
    progress: Callable[[float], None]


def _submit(order: _Order) -> Submitted:
    """A batch of its own. Raises _Changed where another opened under its name first."""
    digest = digest_of(order.segments)
    with _arriving(order, order.segments, digest) as arrival:

        def open_it(connection: Connection) -> None:
            rival = opened(connection, order.name)
            if (
                rival is not None and rival.id != arrival.batch_id
            ):  # its own: done at a first try, whose answer got lost
                raise _Changed
            if rival is None:
                arrival.place(connection, arrival.batch_id)
                shown = connection.execute(
                    text("UPDATE batch SET state = 'open' WHERE id = :id AND size >= 0"), {"id": arrival.batch_id}
                ).rowcount
                if not shown:
                    raise _dead()

        order.database.transact(open_it, durable=True)
    faults.reach("submit.opened")
    size = len(arrival.ids)
    known = len(arrival.known)
    return Submitted(arrival.batch_id, order.name, size, new=size - known, known=known, rerun=arrival.rerun)


def _append(order: _Order, found: Opened) -> Submitted:
    """Jobs behind those of a batch. Raises _Changed where it is no longer as it was found."""
    there, kept = _keys_of(order.database, found.id), []
    holds = set(there)
    for segment in order.segments:
        fresh = [place for place, key in enumerate(segment.keys) if key not in holds]
        if fresh:
            kept.append(_part(segment, fresh) if len(fresh) < len(segment.keys) else segment)
    if not kept:
        return _again(order.database, found, order.name, order.fresh, order.segments, order.particulars)
    digest = _digest([there], (segment.keys for segment in kept))
    with _arriving(order, kept, digest, base=found.size) as arrival:

        def join(connection: Connection) -> None:
            now = opened(connection, order.name)
            if now == Opened(found.id, arrival.base + len(arrival.ids), digest):
                return  # done at a first try, whose answer got lost
            if now != found:
                raise _Changed
            here = connection.execute(
                text("SELECT 1 FROM batch WHERE id = :id AND size >= 0"), {"id": arrival.batch_id}
            ).one_or_none()
            if here is None:
                raise _dead()
            connection.execute(
                text("UPDATE membership SET batch_id = :to WHERE batch_id = :id"),
                {"to": found.id, "id": arrival.batch_id},
            )
            arrival.place(connection, found.id)
            connection.execute(text("DELETE FROM batch WHERE id = :id"), {"id": arrival.batch_id})
            connection.execute(
                text(
                    "UPDATE batch SET size = :size, digest = :digest, tags = :tags,"
                    " note = CASE WHEN :note = '' THEN note ELSE :note END,"
                    " state = CASE WHEN state IN ('finished', 'cancelled') THEN 'open' ELSE state END"
                    " WHERE id = :id"
                ),
                {"id": found.id, "size": arrival.base + len(arrival.ids), "digest": digest,
                 "note": order.particulars.note, "tags": _more_tags(connection, found.id, order.particulars.tags)},
            )  # fmt: skip

        order.database.transact(join, durable=True)
    faults.reach("submit.opened")
    added, known, rerun = len(arrival.ids), len(arrival.known), arrival.rerun
    if order.fresh:  # those it held already too
        held = [key for segment in order.segments for key in segment.keys if key in holds]
        rerun += _forget(order.database, _ids_in(order.database, found.id, held), kept=())
    return Submitted(
        found.id, order.name, found.size + added, new=added - known, known=known, rerun=rerun, appended=added
    )


def _more_tags(connection: Connection, batch_id: int, tags: Sequence[str]) -> str:
    """The batch's tags and these, as many as are kept."""
    there = connection.execute(text("SELECT tags FROM batch WHERE id = :id"), {"id": batch_id}).scalar_one()
    return joined(list(dict.fromkeys([*there.split(), *tags]))[:MOST_TAGS])


def _part(segment: Segment, places: Sequence[int]) -> Segment:
    """The segment with the jobs at these places only."""
    result = copy.copy(segment)
    result.keys = [segment.keys[place] for place in places]
    result.params = [segment.params[place] for place in places]
    return result


def _keys_of(database: Database, batch_id: int) -> list[bytes]:
    """Keys of a batch's jobs in their order."""
    with database.read() as connection:
        rows = connection.execution_options(stream_results=True).execute(
            text(
                "SELECT j.key FROM membership m JOIN job j ON j.id = m.job_id WHERE m.batch_id = :id ORDER BY m.ordinal"
            ),
            {"id": batch_id},
        )
        return [bytes(key) for key in rows.scalars()]


def _named(database: Database, name: str) -> Opened | None:
    with database.read() as connection:
        return opened(connection, name)


def _taken(name: str, found: Opened) -> NameTaken:
    return NameTaken(
        f"a batch called {name!r} exists and holds other jobs ({found.size:,}); submit under another --name, or with "
        "--append to put those it does not hold behind its own"
    )


def _dead() -> StoreError:
    return StoreError("this submission stood still so long that it was taken for dead; submit it again")


def _again(
    database: Database,
    found: Opened,
    name: str,
    fresh: bool,
    segments: Sequence[Segment] | None = None,
    said: Particulars | None = None,
) -> Submitted:
    """The batch has all these jobs (of these segments, else just these): open it again if it was cancelled.

    said: by whoever appends; note and tags are taken though no job is new.
    """
    rerun = 0
    if fresh:
        wanted = [key for segment in segments for key in segment.keys] if segments is not None else None
        rerun = _forget(database, _ids_in(database, found.id, wanted), kept=())

    def reopen(connection: Connection) -> int:
        if said is not None and (said.note or said.tags):
            connection.execute(
                text(
                    "UPDATE batch SET tags = :tags, note = CASE WHEN :note = '' THEN note ELSE :note END WHERE id = :id"
                ),
                {"id": found.id, "note": said.note, "tags": _more_tags(connection, found.id, said.tags)},
            )
        return connection.execute(
            text("UPDATE batch SET state = 'open', reason = '' WHERE id = :id AND state = 'cancelled'"),
            {"id": found.id},
        ).rowcount

    reopened = database.transact(reopen, durable=True)
    return Submitted(
        found.id, name, found.size, new=0, known=found.size, rerun=rerun, already=True, reopened=bool(reopened)
    )


def _ids_in(database: Database, batch_id: int, keys: Sequence[bytes] | None) -> list[int]:
    """Ids of a batch's jobs, of those with these keys if given, sorted."""
    with database.read() as connection:
        if keys is None:
            held = connection.execute(text("SELECT job_id FROM membership WHERE batch_id = :id"), {"id": batch_id})
            return sorted(held.scalars())
        return sorted(job_id for piece in slices(keys) for job_id in ids_of(database, connection, piece).values())


@contextlib.contextmanager
def _arriving(order: _Order, segments: Sequence[Segment], digest: bytes, base: int = 0) -> Iterator[Arrival]:
    """A batch with its jobs and memberships written, open to nobody yet; discarded where the block raises."""
    database, size = order.database, sum(len(segment.keys) for segment in segments)
    batch_id = database.persist(PATIENCE, lambda: begin(database, order.name, digest, size, order.particulars))
    try:
        arrival = Arrival(database, segments, order.progress, batch_id, base, order.names)
        arrival.builders = _built_elsewhere(order, segments)
        arrival.write_jobs()
        kept = () if order.fresh else tuple(sorted(DETERMINISTIC))
        arrival.rerun = _forget(database, sorted(arrival.known), kept, done=order.fresh)
        arrival.write_memberships()
        faults.reach("submit.arriving")
        yield arrival
    except BaseException:
        # Ctrl-C too. Where the store is out, `discard_abandoned` finds the batch later; one that did open stays.
        with contextlib.suppress(*Outage):
            discard(database, batch_id)
        raise


def _built_elsewhere(order: _Order, segments: Sequence[Segment]) -> dict[str, int]:
    """Recipe -> job that builds it, for builders that are asked for but not among what is written now."""
    here = {key for segment in segments if segment.method == BUILDER for key in segment.keys}
    keys = {
        key: recipe_of(params)
        for segment in order.segments
        if segment.method == BUILDER
        for key, params in zip(segment.keys, segment.params, strict=True)
        if key not in here
    }
    if not keys:
        return {}
    with order.database.read() as connection:
        return {
            keys[key]: job_id
            for piece in slices(list(keys))
            for key, job_id in ids_of(order.database, connection, piece).items()
        }


def _forget(database: Database, known: list[int], kept: Sequence[str], done: bool = True) -> int:
    """Give known jobs a new start: those that failed, but for these causes; `done`: also those that did not fail."""
    forgotten = 0
    excepted = ", ".join(f"'{cause}'" for cause in ("", *kept))
    wanted = "1 = 1" if done else f"state = 'failed' AND cause NOT IN ({excepted})"
    for piece in slices(known, 5_000):
        query = text(f"SELECT job_id FROM record WHERE {wanted} AND job_id IN ({', '.join(map(str, piece))})")

        def find(query: TextClause = query) -> list[int]:
            with database.read() as connection:
                return list(connection.execute(query).scalars())

        # Mostly there is none: to look needs no turn at the store.
        if ended := database.persist(PATIENCE, find):
            forgotten += database.transact(functools.partial(forget_records, jobs=ended), lasting=True)
    return forgotten
