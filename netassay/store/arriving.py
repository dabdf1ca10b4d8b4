"""The jobs of a batch on their way into the tables, before anybody sees the batch: of a submission, or of an import.

A crash on the way leaves jobs that belong to no batch (whoever asks for them next finds and uses them) and a batch row
in state `arriving`, which is never dispatched.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from sqlalchemy import Connection, text

from netassay.job import BUILDER, ENDS, Segment
from netassay.method import time_limit
from netassay.store.database import PATIENCE, Database, StoreError, slices
from netassay.store.reset import make_ready


@dataclass(frozen=True)
class Opened:
    """A batch as it was seen; while size and digest are the same, so are its jobs."""

    id: int
    size: int
    digest: bytes


def opened(connection: Connection, name: str) -> Opened | None:
    row = connection.execute(
        text("SELECT id, size, digest FROM batch WHERE name = :name AND state <> 'arriving'"), {"name": name}
    ).one_or_none()
    return None if row is None else Opened(row.id, row.size, bytes(row.digest))


def recipe_of(params: str) -> str:
    """The recipe that a job of the builder builds."""
    return json.loads(params)["recipe"]


#: The dispatcher divides by a weight: none may be 0, or so far from the others that they stand still.
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000
#: A name is typed, and shown in a line; a note is a page at most.
LONGEST_NAME, LONGEST_NOTE = 200, 10_000
# Neither UTF-8 nor PostgreSQL has them all; the others would write on a terminal what is not there.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
#: More would not be read; and each is a word of a line.
MOST_TAGS = 20
_TAG = re.compile(r"[\w.:/=+@-]{1,50}")


def check_weight(weight: Any) -> None:
    """Raises StoreError for what is no share of the slots."""
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if not is_number or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise StoreError(f"a weight of {str(weight)[:50]} is outside {LEAST_WEIGHT}..{MOST_WEIGHT}")


def check_name(name: Any) -> None:
    """Raises StoreError for what a batch cannot be called."""
    if not isinstance(name, str):
        wrong = "is no text"
    elif not name:
        wrong = "is empty"
    elif len(name) > LONGEST_NAME:
        wrong = f"has {len(name):,} characters, at most {LONGEST_NAME} are possible"
    elif not name.isprintable():
        wrong = f"holds {next(one for one in name if not one.isprintable())!a}, which cannot be printed"
    elif name != name.strip():
        wrong = "begins or ends with a space"
    elif name.startswith("-"):
        wrong = "begins with a dash, as options do"
    else:
        return
    raise StoreError(
        f"a batch cannot be called {ascii(name)[:80]}: the name {wrong}; give it another (submit: --name NAME, import: "
        "--rename SUFFIX)"
    )


def check_note(note: Any) -> None:
    """Raises StoreError for what cannot be kept as a note."""
    if not isinstance(note, str):
        raise StoreError(f"the note is no text but {type(note).__name__}")
    if len(note) > LONGEST_NOTE:
        raise StoreError(f"the note has {len(note):,} characters, at most {LONGEST_NOTE:,} are kept; shorten it")
    if bad := _NO_TEXT.search(note):
        raise StoreError(f"the note holds {bad[0]!a}, which is no text; leave it out")


def check_submitter(submitter: Any) -> None:
    """Raises StoreError for what cannot be the name of a submitter; empty is nobody in particular."""
    if not isinstance(submitter, str):
        raise StoreError(f"the submitter is no text but {type(submitter).__name__}")
    if len(submitter) > LONGEST_NAME or not submitter.isprintable() or submitter != submitter.strip():
        raise StoreError(
            f"nobody can be called {ascii(submitter)[:80]}: a submitter is a name of at most {LONGEST_NAME} printable "
            "characters without a space at its ends; set NETASSAY_SUBMITTER"
        )


def check_tags(tags: Any) -> None:
    """Raises StoreError for what cannot be kept as tags."""
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise StoreError(f"tags are a list of words, not {type(tags).__name__}")
    for tag in tags:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise StoreError(
                f"{ascii(tag)[:80]} is no tag: a tag is a word of at most 50 letters, digits and any of . _ : / = + @ -"
            )
    if len(tags) > MOST_TAGS:
        raise StoreError(f"{len(tags)} tags are too many, a batch keeps {MOST_TAGS}")


def joined(tags: Sequence[str]) -> str:
    """Tags as their column holds them, each once."""
    return " ".join(dict.fromkeys(tags))


@dataclass(frozen=True)
class Particulars:
    """What is said of a batch beside its jobs. weight: its share of the slots among its submitter's batches."""

    weight: float = 1.0
    note: str = ""
    submitter: str = ""
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises StoreError for what cannot be kept. `begin` asks too: this is for what is done before it."""
        check_weight(self.weight)
        check_note(self.note)
        check_submitter(self.submitter)
        check_tags(self.tags)


def begin(database: Database, name: str, digest: bytes, size: int, particulars: Particulars = Particulars()) -> int:
    """Make a batch that is open to nobody yet. Returns its id. Raises StoreError for a name or particulars that cannot
    be kept."""
    check_name(name)
    particulars.check()
    with database.write(beside=True, lasting=True) as connection:
        return connection.execute(
            text(
                "INSERT INTO batch (name, digest, state, weight, size, submitted_at, note, submitter, tags)"
                " VALUES (:name, :digest, 'arriving', :weight, :size, :now, :note, :submitter, :tags) RETURNING id"
            ),
            {"name": name, "digest": digest, "weight": float(particulars.weight), "size": size, "now": time.time(),
             "note": particulars.note, "submitter": particulars.submitter, "tags": joined(particulars.tags)},
        ).scalar_one()  # fmt: skip


@dataclass
class Arrival:
    """The jobs of one submission on their way into the tables, in submission order.

    base: ordinal of the first. ids: of the jobs; known: those the store had before. builders: recipe -> job that builds
    it, where that is not one of them.

    Other submissions, and workers, write at the same time: nothing here is looked at by them before the batch is open,
    but for `job_key`, into which all write in the order of the keys.
    Each step goes on from those before it, through a crash of PostgreSQL: all are lasting.
    """

    database: Database
    segments: Sequence[Segment]
    progress: Callable[[float], None]
    batch_id: int
    base: int
    names: Mapping[str, str]
    ids: list[int] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    methods: dict[tuple[str, int], int] = field(default_factory=dict)
    builders: dict[str, int] = field(default_factory=dict)
    rerun: int = 0

    def write_jobs(self) -> None:
        """Give each job its id: that of the store where it knows the key, else a new one with its rows."""
        keys = [key for segment in self.segments for key in segment.keys]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.ids = [0] * len(keys)
        self.database.persist(PATIENCE, lambda: self._find(keys, order))
        self.progress(0.1)
        self._allot()
        self._insert_jobs()
        self._insert_keys(keys, order)

    def _insert(self, table: str, columns: Sequence[str], rows: list[tuple], ignore: bool = False) -> int:
        """Rows in a transaction of their own. At a second try, after an outage, some may be there already."""
        tries = itertools.count()
        return self.database.transact(
            lambda connection: self.database.insert(connection, table, columns, rows, ignore or next(tries) > 0),
            beside=True,
            lasting=True,
        )

    def _find(self, keys: list[bytes], order: list[int]) -> None:
        with self.database.read() as connection:
            if connection.execute(text("SELECT 1 FROM job_key LIMIT 1")).one_or_none() is None:
                return
            for piece in slices(order):
                found = ids_of(self.database, connection, [keys[place] for place in piece])
                if found:
                    for place in piece:
                        if known := found.get(keys[place]):
                            self.ids[place] = known
                            self.known.add(known)

    def _allot(self) -> None:
        new = self.ids.count(0)

        def take(connection: Connection) -> int:
            return connection.execute(
                text("UPDATE lab SET value = value + :n WHERE name = 'next_job' RETURNING value"), {"n": new}
            ).scalar_one()

        following = self.database.transact(take, beside=True, lasting=True) - new
        for place, known in enumerate(self.ids):
            if not known:
                self.ids[place] = following
                following += 1

    def _insert_jobs(self) -> None:
        self.methods = self.database.transact(
            lambda connection: _method_ids(connection, self.segments), beside=True, lasting=True
        )
        jobs = (
            (key, self.methods[segment.method, segment.version], params)
            for segment in self.segments
            for key, params in zip(segment.keys, segment.params, strict=True)
        )
        for start in range(0, len(self.ids), 10_000):
            piece = zip(self.ids[start : start + 10_000], itertools.islice(jobs, 10_000), strict=True)
            rows = [(job_id, *job) for job_id, job in piece if job_id not in self.known]
            self._insert("job", ("id", "key", "method_id", "params"), rows)
            self.progress(0.1 + 0.4 * start / len(self.ids))

    def _insert_keys(self, keys: list[bytes], order: list[int]) -> None:
        """Keys of the new jobs; where a rival submission was faster, its job is used and ours deleted."""
        new = [place for place in order if self.ids[place] not in self.known]
        for piece in slices(new):
            rows = [(keys[place], self.ids[place]) for place in piece]
            if self._insert("job_key", ("key", "job_id"), rows, ignore=True) == len(rows):
                continue
            found = self.database.persist(PATIENCE, functools.partial(self._look_up, keys, piece))
            lost = [place for place in piece if found[keys[place]] != self.ids[place]]
            self.database.transact(
                functools.partial(_delete_jobs, jobs=[self.ids[place] for place in lost]), beside=True, lasting=True
            )
            for place in lost:
                self.ids[place] = found[keys[place]]
                self.known.add(self.ids[place])
        self.progress(0.75)

    def _look_up(self, keys: list[bytes], places: Sequence[int]) -> dict[bytes, int]:
        with self.database.read() as connection:
            return ids_of(self.database, connection, [keys[place] for place in places])

    def write_memberships(self) -> None:
        for start in range(0, len(self.ids), 10_000):
            piece = self.ids[start : start + 10_000]
            rows = [(self.batch_id, self.base + start + place, job_id) for place, job_id in enumerate(piece)]
            self._insert("membership", ("batch_id", "ordinal", "job_id"), rows)
            self.progress(0.75 + 0.25 * start / len(self.ids))

    def place(self, connection: Connection, batch_id: int) -> None:
        """Within the transaction that opens it: segments, names, and the counts of what has ended already."""
        rows, needs = self._segment_rows(batch_id)
        _write_segments(self.database, connection, rows, needs)
        self.database.insert(
            connection,
            "reference_name",
            ("batch_id", "reference", "name"),
            [(batch_id, reference, called) for reference, called in self.names.items()],
            ignore=True,  # of a batch that is appended to the first name stays
        )
        if self.known:
            _count_ended(connection, batch_id, self.base)

    def _segment_rows(self, batch_id: int) -> tuple[list[tuple], list[list[tuple[str, int]]]]:
        """Rows of the segments, and of each the (recipe, job that builds it) it needs."""
        rows, needs, start = [], [], self.base
        builders = dict(self.builders)
        for segment in self.segments:
            stop = start + len(segment.keys)
            wanted = [(recipe, builders[recipe]) for recipe in segment.recipes]
            for offset, params in enumerate(segment.params if segment.method == BUILDER else ()):
                builders[recipe_of(params)] = self.ids[start - self.base + offset]
            rows.append(
                (
                    batch_id, start, stop, start, self.methods[segment.method, segment.version], segment.group,
                    segment.seconds, segment.time_limit or time_limit(segment.seconds),
                    segment.memory_limit or segment.memory, segment.group_size, " ".join(segment.libraries),
                    int(bool(wanted)),
                )
            )  # fmt: skip
            needs.append(wanted)
            start = stop
        return rows, needs


def _delete_jobs(connection: Connection, jobs: Sequence[int]) -> None:
    if jobs:
        connection.execute(text(f"DELETE FROM job WHERE id IN ({', '.join(map(str, jobs))})"))


def ids_of(database: Database, connection: Connection, keys: Sequence[bytes]) -> dict[bytes, int]:
    if database.sqlite:
        statement = f"SELECT key, job_id FROM job_key WHERE key IN ({','.join('?' * len(keys))})"
        found = connection.exec_driver_sql(statement, tuple(keys))
    else:
        found = connection.exec_driver_sql("SELECT key, job_id FROM job_key WHERE key = ANY(%s)", (list(keys),))
    return {bytes(key): job_id for key, job_id in found}


def method_id_of(connection: Connection, name: str, version: int) -> int:
    """Row of a method's version, made where it is new."""
    values = {"name": name, "version": version}
    connection.execute(
        text("INSERT INTO method_version (name, version) VALUES (:name, :version) ON CONFLICT DO NOTHING"), values
    )
    return connection.execute(
        text("SELECT id FROM method_version WHERE name = :name AND version = :version"), values
    ).scalar_one()


def _method_ids(connection: Connection, segments: Sequence[Segment]) -> dict[tuple[str, int], int]:
    """Rows of all method versions that these segments are of, in an order that two submissions share."""
    return {
        (name, version): method_id_of(connection, name, version)
        for name, version in sorted({(segment.method, segment.version) for segment in segments})
    }


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
            text("SELECT id FROM segment WHERE batch_id = :id AND start >= :start ORDER BY start"),
            {"id": rows[0][0], "start": rows[0][1]},
        ).scalars()
        database.insert(
            connection,
            "need",
            ("segment_id", "reference", "job_id"),
            [(place, reference, job) for place, wanted in zip(found, needs, strict=True) for reference, job in wanted],
        )


#: Jobs left between ended ones, in more runs than this in a segment, would each travel in a tiny chunk of their own.
MOST_RUNS = 50


def _count_ended(connection: Connection, batch_id: int, base: int) -> None:
    """Jobs from `base` on that ended in earlier batches are counted here and now, not sent around to be found done.

    Everybody waits meanwhile, and segments may be a hundred thousand: none of them is asked for by itself.
    """
    place = {"b": batch_id, "base": base}
    jobs = "segment s JOIN membership m ON m.batch_id = s.batch_id AND m.ordinal >= s.start AND m.ordinal < s.stop"
    ended: dict[int, dict[str, int]] = {}
    for segment, state, number in connection.execute(
        text(
            f"SELECT s.id, r.state, count(*) FROM {jobs} JOIN record r ON r.job_id = m.job_id"
            " WHERE s.batch_id = :b AND s.start >= :base GROUP BY s.id, r.state"
        ),
        place,
    ):
        ended.setdefault(segment, {})[state] = number
    if not ended:
        return
    ranges = {
        row.id: (row.start, row.stop)
        for row in connection.execute(
            text("SELECT id, start, stop FROM segment WHERE batch_id = :b AND start >= :base ORDER BY start"), place
        )
        if row.id in ended
    }
    partly = [one for one, (start, stop) in ranges.items() if sum(ended[one].values()) < stop - start]
    left: dict[int, list[int]] = {}
    for piece in slices(partly, 1_000):
        for segment, ordinal in connection.execute(
            text(
                f"SELECT s.id, m.ordinal FROM {jobs} WHERE s.id IN ({', '.join(map(str, piece))})"
                " AND NOT EXISTS (SELECT 1 FROM record r WHERE r.job_id = m.job_id) ORDER BY m.ordinal"
            )
        ):
            left.setdefault(segment, []).append(ordinal)
    # The others are cut as usual: their chunks find the ended jobs as they pass.
    counted = [one for one in ranges if _runs(left.get(one, [])) <= MOST_RUNS]
    if not counted:
        return
    for piece in slices(counted, 1_000):
        connection.execute(text(f"UPDATE segment SET next = stop WHERE id IN ({', '.join(map(str, piece))})"))
    connection.execute(
        text(
            "INSERT INTO chunk (segment_id, batch_id, start, stop, state, done, not_applicable, failed)"
            " VALUES (:s, :b, :start, :stop, 'finished', :done, :not_applicable, :failed)"
        ),
        [
            {"s": one, "b": batch_id, "start": ranges[one][0], "stop": ranges[one][1], **dict.fromkeys(ENDS, 0),
             **ended[one]}
            for one in counted
        ],
    )  # fmt: skip
    if ordinals := [ordinal for one in counted for ordinal in left.get(one, [])]:
        make_ready(connection, batch_id, ordinals)


def _runs(ordinals: Sequence[int]) -> int:
    """How many runs of neighbours there are."""
    return bool(ordinals) + sum(after - before > 1 for before, after in itertools.pairwise(ordinals))


def discard(database: Database, batch_id: int) -> None:
    """Remove a batch that never opened; its jobs stay, for whoever asks for them next."""

    # The batch row goes last: whoever dies on the way leaves something that is found and removed. With a negative size
    # a batch cannot open: its submission may be slow rather than dead, and must not open what is half removed.
    def some(connection: Connection) -> bool:
        arriving = connection.execute(
            text("UPDATE batch SET size = -1 WHERE id = :id AND state = 'arriving'"), {"id": batch_id}
        ).rowcount
        if not arriving:
            return False
        deleted = connection.execute(
            text(
                "DELETE FROM membership WHERE batch_id = :id AND ordinal IN"
                " (SELECT ordinal FROM membership WHERE batch_id = :id LIMIT 10000)"
            ),
            {"id": batch_id},
        ).rowcount
        if not deleted:
            connection.execute(text("DELETE FROM batch WHERE id = :id"), {"id": batch_id})
        return bool(deleted)

    while database.transact(some):
        pass


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
