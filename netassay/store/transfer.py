"""A store, or some of its batches, as one file: out of one lab and into another, whatever databases they use.

The file is a tar archive:

    batches/000001/segments.jsonl.gz   its segments in order, with the recipes each needs
    batches/000001/names.jsonl.gz      what the user called its references
    batches/000001/jobs.jsonl.gz       a line a job, in the batch's order: key, params as stored, record, attempts
    workers.jsonl.gz, provenance.jsonl.gz
    artifacts/<sha-256>                every file that a job, a record or a recipe names
    manifest.json                      the batches, counts, and the digest of each member but the artifacts
    manifest.sha256                    last: a file that was cut short has none

Jobs travel under their keys, for ids differ between stores. What runs, or waits, is pending in the file. A batch opens
at the end of its own import in one transaction, so it is there whole or not at all; what a killed import leaves behind
belongs to no batch, and the next one finds and uses it.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Connection, Row, text

from netassay import __version__, faults
from netassay.errors import UserError
from netassay.job import BUILDER, DETERMINISTIC, Segment, key_of
from netassay.store import arriving, running, storable
from netassay.store.artifacts import Artifacts, MissingArtifact, named
from netassay.store.control import batch_id_of
from netassay.store.database import Database, Outage, StoreError, slices

#: Raised when an older netassay could not read what is written now.
FORMAT = 2
_PAGE = 10_000
_BLOCK = 1 << 20
#: No job, record or segment comes near it: results are cut and arrays kept apart long before.
_LONGEST_LINE = 256 << 20
#: Artifacts up to this size are brought in through memory, larger ones through a temporary file.
_IN_MEMORY = 16 << 20
_MEMBER = re.compile(r"^(?:batches/\d{6,}/(?:segments|names|jobs)|workers|provenance)\.jsonl\.gz$")
_ARTIFACT = re.compile(r"^artifacts/([0-9a-f]{64})$")
#: Kinds of artifacts that name others.
_TEXTS = ("recipe:", "generator:")

Progress = Callable[[float], None]
#: Keeps the artifact of a reference; returns a file with its bytes, None where it is damaged. Raises MissingArtifact.
Keep = Callable[[str], Path | None]
T = TypeVar("T", bound="_Line")


class NotAnExport(StoreError):
    """The file is not one that `export` wrote, or not as it wrote it; nothing was brought in."""


class BatchesDiffer(StoreError):
    """Batches of the same names with other jobs are there; nothing was brought in."""


@dataclass(frozen=True)
class Exported:
    """What went out. bytes: of the file; missing: artifacts that are named but not there, or damaged."""

    path: str
    batches: int
    jobs: int
    records: int
    artifacts: int
    bytes: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Brought:
    """What came in. skipped: batches that were there; jobs: rows of the batches that came; new: jobs, and records,
    attempts and artifacts, that the store did not have; renamed: name in the file -> name here."""

    batches: int
    skipped: int
    jobs: int
    new: int
    records: int
    attempts: int
    artifacts: int
    renamed: dict[str, str] = field(default_factory=dict)


# --- the lines of the file ----------------------------------------------------------------------------------------


# What the columns hold: PostgreSQL's have 32 bits where not said otherwise.
_Whole = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Number = Annotated[int, Field(ge=0, lt=2**63)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Batch(_Line):
    name: str
    digest: str
    state: Literal["open", "paused", "cancelled", "finished"]
    reason: str
    judged: _Whole
    weight: Annotated[float, Field(ge=arriving.LEAST_WEIGHT, le=arriving.MOST_WEIGHT)]
    size: _Whole
    submitted_at: float
    note: str
    # Not in archives of format 1.
    submitter: str = ""
    tags: list[str] = []

    @property
    def particulars(self) -> arriving.Particulars:
        return arriving.Particulars(self.weight, self.note, self.submitter, tuple(self.tags))


class _Segment(_Line):
    start: _Whole
    stop: _Whole
    method: str
    version: _Whole
    label: str
    hint: float
    time_limit: float
    memory_limit: _Number | None
    group_size: Annotated[_Whole, Field(ge=1)]
    libraries: str
    needs: list[str]


class _Name(_Line):
    reference: str
    name: str


class _Record(_Line):
    state: Literal["done", "not_applicable", "failed"]
    cause: str
    message: str
    result: str | None
    seconds: float
    finished_at: float
    worker: _Number | None
    provenance: _Number | None
    inputs: str | None


class _Attempt(_Line):
    token: str
    worker: _Number | None
    started_at: float
    ended_at: float
    cause: str
    alone: _Whole
    message: str
    log: str
    spent: _Whole


class _Job(_Line):
    key: str
    params: str
    record: _Record | None = None
    attempts: list[_Attempt] = []
    losses: _Whole = 0


class _Worker(_Line):
    number: _Number
    name: str
    host: str
    pid: _Whole
    slots: _Whole
    started_at: float


class _Provenance(_Line):
    number: _Number
    digest: str
    body: str


class _Manifest(_Line):
    format: Literal["netassay export"]
    version: int
    netassay: str
    created_at: float
    batches: list[_Batch]
    jobs: int
    records: int
    artifacts: int
    missing: list[str]
    members: dict[str, str]
    apart: bool = False
    """its files lie beside it: it is part of a backup"""


# --- out ----------------------------------------------------------------------------------------------------------


def export(
    database: Database,
    artifacts: Artifacts,
    path: Path,
    batches: Sequence[str] = (),
    progress: Progress = lambda share: None,
    keep: Keep | None = None,
) -> Exported:
    """Write these batches (else all), their jobs, records and files to `path`, as they are at one moment.

    keep: where the files go instead, each by its reference.
    The file appears when it is whole; one that was there is replaced. Memory holds a page of jobs and the digests of
    the artifacts. Raises NoSuchBatch, BadTarget, OSError.
    """
    with beside(path) as temporary:
        with open(temporary, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                written = _Export(database, artifacts, archive, temporary.parent, progress, keep).write(batches)
            stream.flush()
            os.fsync(stream.fileno())
        size = temporary.stat().st_size
    return Exported(
        str(path), len(written.batches), written.jobs, written.records, written.artifacts, size, tuple(written.missing)
    )


class BadTarget(UserError):
    """A file that cannot be written where it is asked for; nothing was done."""


def target(path: Path | str) -> Path:
    """The file that is written when `path` is: behind symbolic links.

    Raises BadTarget where its folder is none, or where something stands there that is no regular file and must not be
    replaced by one: a folder, a device, a pipe.
    """
    path = Path(path)
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a ring
        raise BadTarget(f"{path} leads nowhere ({error}); write elsewhere") from None
    if path.is_dir():
        raise BadTarget(f"{path} is a folder; name a file in it, or write elsewhere")
    if path.exists() and not path.is_file():
        raise BadTarget(f"{path} is a device or a pipe; write to a file")
    if not found.parent.is_dir():
        raise BadTarget(f"{found.parent} is no folder; make it, or write elsewhere")
    return found


@contextlib.contextmanager
def beside(path: Path | str) -> Iterator[Path]:
    """A temporary file in the folder of `path`, renamed to it when the block ends well. Raises BadTarget."""
    whole = target(path)
    try:
        # Cut: the name of the temporary one may not be too long where that of the file is not.
        handle, name = tempfile.mkstemp(prefix=f".{whole.name[:40]}-", dir=whole.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(whole.parent)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # As a file made by open() would be: the temporary one is for its owner alone.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(whole)
    finally:
        temporary.unlink(missing_ok=True)


class _Export:
    """folder: where there is room for the largest table, packed."""

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        archive: tarfile.TarFile,
        folder: Path,
        progress: Progress,
        keep: Keep | None,
    ) -> None:
        self.keep = keep or self._pack
        self.packs = keep is None
        self.database, self.artifacts, self.archive, self.progress = database, artifacts, archive, progress
        self.folder = folder
        self.digests: dict[str, str] = {}
        self.references: set[str] = set()
        self.workers: set[int] = set()
        self.provenance: set[int] = set()
        self.jobs = self.records = self.whole = 0

    def write(self, names: Sequence[str]) -> _Manifest:
        chosen = [batch_id_of(self.database, name) for name in dict.fromkeys(names)]
        heads = []
        # One snapshot from the first row to the last.
        with self.database.read() as connection:
            rows = _batch_rows(connection, chosen)
            self.whole = sum(row.size for row in rows)
            for number, row in enumerate(rows, 1):
                folder = f"batches/{number:06}"
                heads.append(_head(row))
                self._table(f"{folder}/segments", _segments(connection, row.id))
                self._table(f"{folder}/names", self._named(connection, row.id))
                self._table(f"{folder}/jobs", self._jobs(connection, row.id))
            self._table("workers", _workers(connection, self.workers))
            self._table("provenance", _provenances(connection, self.provenance))
        kept, missing = self._files()
        manifest = _Manifest(
            format="netassay export",
            version=FORMAT,
            netassay=__version__,
            created_at=time.time(),
            batches=heads,
            jobs=self.jobs,
            records=self.records,
            artifacts=kept if self.packs else 0,
            missing=missing,
            members=self.digests,
            apart=not self.packs,
        )
        text = manifest.model_dump_json(indent=1).encode()
        self._add("manifest.json", io.BytesIO(text), len(text))
        seal = hashlib.sha256(text).hexdigest().encode()
        self._add("manifest.sha256", io.BytesIO(seal), len(seal))
        self.progress(1.0)
        return manifest

    def _table(self, name: str, lines: Iterable[_Line]) -> None:
        # A member's size stands before it: it is written beside first.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=3, mtime=0) as packed:
                for line in lines:
                    packed.write(line.model_dump_json(exclude_defaults=True).encode() + b"\n")
            size = file.tell()
            file.seek(0)
            self.digests[f"{name}.jsonl.gz"] = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._add(f"{name}.jsonl.gz", file, size)

    def _add(self, name: str, file: IO[bytes], size: int) -> None:
        about = tarfile.TarInfo(name)
        about.size, about.mode, about.mtime = size, 0o644, int(time.time())
        self.archive.addfile(about, file)

    def _named(self, connection: Connection, batch_id: int) -> Iterator[_Name]:
        rows = connection.execute(
            text("SELECT reference, name FROM reference_name WHERE batch_id = :id ORDER BY reference"), {"id": batch_id}
        )
        for row in rows:
            self.references.add(row.reference)
            yield _Name(reference=row.reference, name=row.name)

    def _jobs(self, connection: Connection, batch_id: int) -> Iterator[_Job]:
        start = 0
        while True:
            rows = connection.execute(
                text(
                    "SELECT m.ordinal, j.id, j.key, j.params, r.state, r.cause, r.message, r.result, r.seconds,"
                    " r.finished_at, r.worker_id, r.provenance_id, r.inputs, w.losses FROM membership m"
                    " JOIN job j ON j.id = m.job_id LEFT JOIN record r ON r.job_id = m.job_id"
                    " LEFT JOIN worker_loss w ON w.job_id = m.job_id"
                    " WHERE m.batch_id = :id AND m.ordinal >= :start ORDER BY m.ordinal LIMIT :limit"
                ),
                {"id": batch_id, "start": start, "limit": _PAGE},
            ).all()
            attempts = self._attempts(connection, [row.id for row in rows])
            for row in rows:
                for part in (row.params, row.result, row.inputs):
                    self.references |= named(part)
                yield _Job(
                    key=bytes(row.key).hex(),
                    params=row.params,
                    record=self._record(row) if row.state else None,
                    attempts=attempts.get(row.id, []),
                    losses=row.losses or 0,
                )
            self.jobs += len(rows)
            self.progress(0.9 * self.jobs / max(1, self.whole))
            if len(rows) < _PAGE:
                return
            start = rows[-1].ordinal + 1

    def _record(self, row: Row) -> _Record:
        self.records += 1
        self.workers |= {row.worker_id} - {None}
        self.provenance |= {row.provenance_id} - {None}
        return _Record(
            state=row.state,
            cause=row.cause,
            message=row.message,
            result=row.result,
            seconds=row.seconds,
            finished_at=row.finished_at,
            worker=row.worker_id,
            provenance=row.provenance_id,
            inputs=row.inputs,
        )

    def _attempts(self, connection: Connection, ids: Sequence[int]) -> dict[int, list[_Attempt]]:
        found: dict[int, list[_Attempt]] = {}
        for piece in slices(ids, 5_000):
            rows = connection.execute(
                text(
                    "SELECT job_id, token, worker_id, started_at, ended_at, cause, alone, message, log, spent"
                    f" FROM attempt WHERE job_id IN ({_places(piece)}) ORDER BY id"
                )
            )
            for job_id, token, worker, started, ended, cause, alone, message, log, spent in rows:
                self.workers |= {worker} - {None}
                found.setdefault(job_id, []).append(
                    _Attempt(
                        token=token, worker=worker, started_at=started, ended_at=ended, cause=cause, alone=alone,
                        message=message, log=log, spent=spent,
                    )
                )  # fmt: skip
        return found

    def _files(self) -> tuple[int, list[str]]:
        """Add every artifact that is named. Returns how many, and those that are not there or damaged."""
        kept: set[str] = set()
        missing: list[str] = []
        left = sorted(self.references)
        while left:
            reference = left.pop()
            digest = reference.rpartition(":")[2]
            if digest in kept or reference in missing:
                continue
            try:
                path = self.keep(reference)
            except (MissingArtifact, FileNotFoundError):
                path = None
            if path is None:
                missing.append(reference)
                continue
            kept.add(digest)
            if reference.startswith(_TEXTS):
                left += named(path.read_text(errors="replace"))
        return len(kept), missing

    def _pack(self, reference: str) -> Path | None:
        path, digest = self.artifacts.path(reference), reference.rpartition(":")[2]
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return None
            size = file.tell()
            file.seek(0)
            self._add(f"artifacts/{digest}", file, size)
        return path


def _batch_rows(connection: Connection, chosen: Sequence[int]) -> Sequence[Row]:
    only = f" AND id IN ({_places(chosen)})" if chosen else ""
    return connection.execute(
        text(
            "SELECT id, name, digest, state, reason, judged, weight, size, submitted_at, note,"
            " submitter, tags FROM batch"
            f" WHERE state <> 'arriving'{only} ORDER BY id"
        )
    ).all()


def _head(row: Row) -> _Batch:
    return _Batch(
        name=row.name,
        digest=bytes(row.digest).hex(),
        state=row.state,
        reason=row.reason,
        judged=row.judged,
        weight=row.weight,
        size=row.size,
        submitted_at=row.submitted_at,
        note=row.note,
        submitter=row.submitter,
        tags=row.tags.split(),
    )


def _segments(connection: Connection, batch_id: int) -> Iterator[_Segment]:
    needs: dict[int, list[str]] = {}
    for place, reference in connection.execute(
        text(
            "SELECT n.segment_id, n.reference FROM need n JOIN segment s ON s.id = n.segment_id"
            " WHERE s.batch_id = :id ORDER BY n.segment_id, n.reference"
        ),
        {"id": batch_id},
    ):
        needs.setdefault(place, []).append(reference)
    rows = connection.execute(
        text(
            "SELECT s.id, s.start, s.stop, v.name, v.version, s.label, s.hint, s.time_limit, s.memory_limit,"
            " s.group_size, s.libraries FROM segment s JOIN method_version v ON v.id = s.method_id"
            " WHERE s.batch_id = :id ORDER BY s.start"
        ),
        {"id": batch_id},
    )
    for row in rows:
        yield _Segment(
            start=row.start,
            stop=row.stop,
            method=row.name,
            version=row.version,
            label=row.label,
            hint=row.hint,
            time_limit=row.time_limit,
            memory_limit=row.memory_limit,
            group_size=row.group_size,
            libraries=row.libraries,
            needs=needs.get(row.id, []),
        )


def _workers(connection: Connection, ids: set[int]) -> Iterator[_Worker]:
    for piece in slices(sorted(ids)):
        rows = connection.execute(
            text(f"SELECT id, name, host, pid, slots, started_at FROM worker WHERE id IN ({_places(piece)})")
        )
        for number, name, host, pid, slots, started_at in rows:
            yield _Worker(number=number, name=name, host=host, pid=pid, slots=slots, started_at=started_at)


def _provenances(connection: Connection, ids: set[int]) -> Iterator[_Provenance]:
    for piece in slices(sorted(ids)):
        rows = connection.execute(text(f"SELECT id, digest, body FROM provenance WHERE id IN ({_places(piece)})"))
        for number, digest, body in rows:
            yield _Provenance(number=number, digest=digest, body=body)


def _places(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))


# --- in -----------------------------------------------------------------------------------------------------------


def bring(
    database: Database,
    artifacts: Artifacts,
    path: Path,
    rename: str = "",
    progress: Progress = lambda share: None,
    apart: bool = False,
) -> Brought:
    """Take in what `export` wrote. Once more, it adds nothing; after a kill, it does the rest.

    A job that is known here by its key is used, and the record it has stays. Of a job that a batch here holds and that
    has no record, only answers are taken (done, not applicable, deterministic failures): whoever gave it a new start
    here wants no old failure. A batch whose name and jobs are those of one here is skipped; one whose name is taken by
    other jobs gets `rename` behind its name.

    apart: its files, which do not lie in it, were brought already. The whole file is checked first. Raises NotAnExport,
    BatchesDiffer: nothing was brought in then. A batch in hand
    takes the memory of its arriving.
    """
    with _opened(path) as archive:
        if archive.manifest.apart and not apart:
            raise NotAnExport(f"{path} is part of a backup, its files lie beside it; use: netassay restore")
        archive.check(lambda share: progress(0.3 * share))
        heads = archive.manifest.batches
        names = _names_for(database, heads, rename)
        new_files = archive.bring_files(artifacts, lambda share: progress(0.3 + 0.2 * share))
        going = [number for number, name in names.items() if name is not None]
        workers: dict[int, int] = {}
        provenances: dict[int, int] = {}
        if going:
            workers = {line.number: _worker_id(database, line) for line in archive.lines("workers", _Worker)}
            provenances = {
                line.number: running.provenance_id(database, line.digest, line.body)
                for line in archive.lines("provenance", _Provenance)
            }
        counts = _Counts()
        total = sum(heads[number - 1].size for number in going) or 1
        for number in going:
            done = counts.jobs

            def told(share: float, size: int = heads[number - 1].size, done: int = done) -> None:
                progress(0.5 + 0.5 * (done + share * size) / total)

            _Arriving(database, archive, number, names[number] or "", workers, provenances, counts, told).bring()
    renamed = {heads[n - 1].name: name for n, name in names.items() if name and name != heads[n - 1].name}
    return Brought(
        counts.batches,
        len(heads) - counts.batches,
        counts.jobs,
        counts.new,
        counts.records,
        counts.attempts,
        new_files,
        renamed,
    )


def contents(path: Path) -> dict[str, str]:
    """Name -> digest of the batches in what `export` wrote. Raises NotAnExport."""
    with _opened(path) as archive:
        return {head.name: head.digest for head in archive.manifest.batches}


@dataclass
class _Counts:
    batches: int = 0
    jobs: int = 0
    new: int = 0
    records: int = 0
    attempts: int = 0


def _names_for(database: Database, heads: Sequence[_Batch], rename: str) -> dict[int, str | None]:
    """Number of each batch in the file -> its name here, or None where it is there already."""
    with database.read() as connection:
        there = {
            row.name: bytes(row.digest).hex()
            for row in connection.execute(text("SELECT name, digest FROM batch WHERE state <> 'arriving'"))
        }
    names: dict[int, str | None] = {}
    taken = []
    for number, head in enumerate(heads, 1):
        for name in dict.fromkeys((head.name, head.name + rename)):
            arriving.check_name(name)
            if there.get(name) == head.digest:
                names[number] = None
                break
            if name not in there:
                names[number] = name
                there[name] = head.digest
                break
        else:
            taken.append(head.name)
    if taken:
        shown = ", ".join(map(repr, taken[:5])) + (f" and {len(taken) - 5} more" if len(taken) > 5 else "")
        raise BatchesDiffer(
            f"here are batches called {shown} with other jobs; nothing was imported: import with --rename SUFFIX, "
            "which puts SUFFIX behind those names"
        )
    return names


def _worker_id(database: Database, line: _Worker) -> int:
    """Row of the worker that did the work, made where it is new; it is not alive here."""
    values = line.model_dump(exclude={"number"})

    def find(connection: Connection) -> int:
        same = "name = :name AND host = :host AND pid = :pid AND started_at = :started_at"
        there = connection.execute(text(f"SELECT id FROM worker WHERE {same} ORDER BY id LIMIT 1"), values).scalar()
        if there is not None:
            return there
        return connection.execute(
            text(
                "INSERT INTO worker (name, host, pid, slots, schema, state, started_at)"
                " VALUES (:name, :host, :pid, :slots, '', 'stopped', :started_at) RETURNING id"
            ),
            values,
        ).scalar_one()

    return database.transact(find, lasting=True)


@dataclass
class _Arriving:
    """One batch of the file on its way in: as a submission, with records before it opens."""

    database: Database
    archive: _Archive
    number: int
    name: str
    workers: Mapping[int, int]
    provenances: Mapping[int, int]
    counts: _Counts
    progress: Progress

    def bring(self) -> None:
        database, head = self.database, self.archive.manifest.batches[self.number - 1]
        segments = self._read()
        names = {line.reference: line.name for line in self.archive.of_batch(self.number, "names", _Name)}
        batch_id = arriving.begin(database, self.name, bytes.fromhex(head.digest), head.size, head.particulars)
        opened = False
        try:
            arrival = arriving.Arrival(database, segments, lambda share: self.progress(share / 2), batch_id, 0, names)
            arrival.write_jobs()
            new = head.size - len(arrival.known)
            self._write_records(arrival.ids)
            arrival.write_memberships()
            # Any of them may have a record now, and is to be counted.
            arrival.known.update(arrival.ids)
            faults.reach("import.arriving")
            opened = database.transact(lambda connection: self._open(connection, arrival, head), durable=True)
        finally:
            if not opened:
                with contextlib.suppress(*Outage):
                    arriving.discard(database, batch_id)
        faults.reach("import.opened")
        if opened:
            self.counts.batches += 1
            self.counts.jobs += head.size
            self.counts.new += new

    def _read(self) -> list[Segment]:
        segments = []
        jobs = self.archive.of_batch(self.number, "jobs", _Job)
        for line in self.archive.of_batch(self.number, "segments", _Segment):
            asked = Segment(
                line.method, line.version, line.label, line.hint, None, line.time_limit, line.memory_limit,
                line.group_size, tuple(line.libraries.split()), tuple(line.needs), [], [],
            )  # fmt: skip
            for _ in range(line.stop - line.start):
                job = next(jobs)
                asked.params.append(job.params)
                asked.keys.append(bytes.fromhex(job.key))
            segments.append(asked)
        return segments

    def _write_records(self, ids: Sequence[int]) -> None:
        jobs = self.archive.of_batch(self.number, "jobs", _Job)
        for start in range(0, len(ids), 5_000):
            piece = {job_id: next(jobs) for job_id in ids[start : start + 5_000]}
            ended = {job_id: job for job_id, job in piece.items() if job.record or job.attempts or job.losses}
            if ended:
                records, attempts = self.database.transact(functools.partial(self._keep, jobs=ended), lasting=True)
                self.counts.records += records
                self.counts.attempts += attempts
            self.progress(0.5 + 0.5 * start / len(ids))

    def _keep(self, connection: Connection, jobs: Mapping[int, _Job]) -> tuple[int, int]:
        """Records and attempts of these jobs, as far as they are news here. Returns how many of each."""
        places = _places(jobs)
        held = _ids(
            connection,
            "SELECT DISTINCT m.job_id FROM membership m JOIN batch b ON b.id = m.batch_id"
            f" WHERE b.state <> 'arriving' AND m.job_id IN ({places})",
        )
        busy = _ids(connection, f"SELECT job_id FROM running WHERE job_id IN ({places})")
        tried = _ids(connection, f"SELECT DISTINCT job_id FROM attempt WHERE job_id IN ({places})")
        records, attempts, losses = [], [], []
        for job_id, job in jobs.items():
            record = job.record
            if record is not None and job_id not in busy and (job_id not in held or _is_answer(record)):
                records.append(
                    (
                        job_id, record.state, record.cause, record.message, record.result, record.seconds,
                        record.finished_at, self.workers.get(record.worker or 0),
                        self.provenances.get(record.provenance or 0), record.inputs,
                    )
                )  # fmt: skip
            if job_id in held or job_id in busy or job_id in tried:
                continue
            if job.losses:
                losses.append((job_id, job.losses))
            for one in job.attempts:
                attempts.append(
                    (
                        job_id, 0, one.token, self.workers.get(one.worker or 0), one.started_at, one.ended_at,
                        one.cause, one.alone, one.message, one.log, one.spent,
                    )
                )  # fmt: skip
        insert = self.database.insert
        insert(connection, "worker_loss", ("job_id", "losses"), losses, ignore=True)
        return (
            insert(connection, "record", running.RECORD, records, ignore=True),
            insert(
                connection,
                "attempt",
                ("job_id", "chunk_id", "token", "worker_id", "started_at", "ended_at", "cause", "alone", "message",
                 "log", "spent"),
                attempts,
            ),
        )  # fmt: skip

    def _open(self, connection: Connection, arrival: arriving.Arrival, head: _Batch) -> bool:
        """Show the batch to everybody. False where the same one was opened meanwhile. Raises BatchesDiffer."""
        rival = arriving.opened(connection, self.name)
        if rival is not None:
            if rival.id == arrival.batch_id:
                return True  # done at a first try, whose answer got lost
            if rival.digest.hex() != head.digest:
                raise BatchesDiffer(
                    f"a batch called {self.name!r} with other jobs was submitted meanwhile; import again"
                )
            return False
        arrival.place(connection, arrival.batch_id)
        ended = connection.execute(
            text("SELECT coalesce(sum(done + not_applicable + failed), 0) FROM chunk WHERE batch_id = :id"),
            {"id": arrival.batch_id},
        ).scalar_one()
        # Of what had ended there, some may have been given a new start here.
        state = "open" if head.state == "finished" and ended < head.size else head.state
        opened = connection.execute(
            text(
                "UPDATE batch SET state = :state, reason = :reason, judged = :judged, submitted_at = :at"
                " WHERE id = :id AND size >= 0"
            ),
            {"state": state, "reason": head.reason, "judged": head.judged, "at": head.submitted_at,
             "id": arrival.batch_id},
        ).rowcount  # fmt: skip
        if not opened:
            raise StoreError("this import stood still so long that it was taken for dead; import again")
        return True


def _ids(connection: Connection, query: str) -> set[int]:
    return set(connection.execute(text(query)).scalars())


def _is_answer(record: _Record) -> bool:
    return record.state != "failed" or record.cause in DETERMINISTIC


# --- the file, distrusted -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(path, mode="r:"))
        except tarfile.TarError as error:
            raise NotAnExport(
                f"{path} is not an export of a store ({error}); write one with: netassay export FILE"
            ) from None
        except OSError as error:
            raise NotAnExport(f"{path} cannot be read: {error.strerror or error}; check its name and rights") from None
        yield _Archive(Path(path), archive)


def _parsed(model: type[T], text: bytes) -> T:
    """Raises ValidationError, ValueError for a text that PostgreSQL would refuse. Lone surrogates are no JSON here."""
    found = model.model_validate_json(text)
    # In JSON a NUL is always an escape, and most lines have none.
    if rb"\u0000" in text and _has_nul(found.model_dump()):
        raise ValueError("a text has a NUL in it")
    return found


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nul, value.values())) or any(map(_has_nul, value))
    return any(map(_has_nul, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value


def _first(error: ValidationError) -> str:
    """The first of its errors in words."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'text'}: {first['msg']}"


def _is_object(body: str) -> bool:
    """Whether a text is a JSON object that every reader of records can read and print."""
    try:
        found = json.loads(body, parse_constant=_no_number)
        if "\\u" in body:
            json.dumps(found, ensure_ascii=False).encode()  # lone surrogates
        if '"float"' in body:
            storable.load(body)
    except (ValueError, TypeError, RecursionError):
        return False
    return isinstance(found, dict)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


class _Archive:
    """An export that is open for reading. Raises NotAnExport where it is not whole, or not what it says it is."""

    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self.path, self._archive = path, archive
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            for member in archive:
                known = _MEMBER.match(member.name) or _ARTIFACT.match(member.name)
                if not (known or member.name in ("manifest.json", "manifest.sha256")) or not member.isreg():
                    raise self._wrong(f"it holds {member.name!r}, which no export does")
                if member.name in self._members:
                    raise self._wrong(f"it holds {member.name!r} twice")
                self._members[member.name] = member
        except (tarfile.TarError, OSError) as error:
            raise self._wrong(f"it is cut short or damaged ({error})") from None
        self.manifest = self._manifest()

    def _wrong(self, why: str) -> NotAnExport:
        return NotAnExport(
            f"{self.path} is not an export as netassay wrote it: {why}; nothing was imported: copy it again, or write "
            "it again with: netassay export FILE"
        )

    def _manifest(self) -> _Manifest:
        if "manifest.json" not in self._members or "manifest.sha256" not in self._members:
            raise self._wrong("its end is missing")
        text = self._file("manifest.json").read()
        if hashlib.sha256(text).hexdigest().encode() != self._file("manifest.sha256").read():
            raise self._wrong("its manifest was changed")
        try:
            version = json.loads(text).get("version")
            if isinstance(version, int) and version > FORMAT:
                raise NotAnExport(
                    f"{self.path} was written by a newer netassay (format {version}, this one reads {FORMAT}); nothing "
                    "was imported: upgrade this installation"
                )
            manifest = _parsed(_Manifest, text)
        except ValidationError as error:
            raise self._wrong(f"its manifest makes no sense ({_first(error)})") from None
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"its manifest makes no sense ({error})") from None
        except AttributeError:
            raise self._wrong("its manifest makes no sense (it is no mapping)") from None
        for head in manifest.batches:
            try:
                arriving.check_name(head.name)
                head.particulars.check()
            except StoreError as error:
                raise self._wrong(str(error)) from None
        return manifest

    def _file(self, name: str) -> IO[bytes]:
        file = self._archive.extractfile(self._members[name])
        assert file is not None
        return file

    def of_batch(self, number: int, table: str, model: type[T]) -> Iterator[T]:
        return self.lines(f"batches/{number:06}/{table}", model)

    def lines(self, table: str, model: type[T]) -> Iterator[T]:
        name = f"{table}.jsonl.gz"
        try:
            with gzip.open(self._file(name)) as unpacked:
                while line := unpacked.readline(_LONGEST_LINE):
                    if not line.endswith(b"\n"):
                        raise self._wrong(f"{name} has a line without end")
                    yield _parsed(model, line)
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(f"{name} cannot be unpacked ({error})") from None
        except ValidationError as error:
            raise self._wrong(f"{name} has a line that makes no sense ({_first(error)})") from None
        except ValueError as error:
            raise self._wrong(f"{name} has a line that makes no sense ({error})") from None

    def check(self, progress: Progress) -> None:
        """Read all of it once, and hold it against what it says of itself."""
        manifest = self.manifest
        tables = {name for name in self._members if _MEMBER.match(name)}
        wanted = {f"batches/{number:06}/{table}.jsonl.gz" for number in range(1, len(manifest.batches) + 1)
                  for table in ("segments", "names", "jobs")}  # fmt: skip
        if tables != set(manifest.members) or tables != wanted | {"workers.jsonl.gz", "provenance.jsonl.gz"}:
            raise self._wrong("its members are not those of its manifest")
        files = self._artifacts()
        if len(files) != manifest.artifacts:
            raise self._wrong(f"it holds {len(files):,} artifacts, its manifest says {manifest.artifacts:,}")
        whole, passed = sum(member.size for member in self._members.values()) or 1, 0
        for name, member in self._members.items():
            expected = manifest.members.get(name) or files.get(name)
            if expected and self._digest(name) != expected:
                raise self._wrong(f"the bytes of {name} are not those of its digest")
            passed += member.size
            progress(0.5 * passed / whole)
        names = [head.name for head in manifest.batches]
        if len(set(names)) < len(names):
            raise self._wrong("two of its batches have one name")
        for _ in self.lines("workers", _Worker):
            pass
        for line in self.lines("provenance", _Provenance):
            if not _is_object(line.body):
                raise self._wrong(f"provenance {line.number} is no JSON object")
        jobs = sum(head.size for head in manifest.batches)
        records = passed = 0
        for number, head in enumerate(manifest.batches, 1):
            records += self._check_batch(number, head)
            passed += head.size
            progress(0.5 + 0.5 * passed / max(1, jobs))
        if (jobs, records) != (manifest.jobs, manifest.records):
            raise self._wrong("it holds other numbers of jobs or records than its manifest says")

    def _artifacts(self) -> dict[str, str]:
        """Member -> digest."""
        return {name: match[1] for name in self._members if (match := _ARTIFACT.match(name))}

    def _digest(self, name: str) -> str:
        try:
            hasher, file = hashlib.sha256(), self._file(name)
            while block := file.read(_BLOCK):
                hasher.update(block)
            return hasher.hexdigest()
        except (OSError, tarfile.TarError) as error:
            raise self._wrong(f"{name} cannot be read ({error})") from None

    def _check_batch(self, number: int, head: _Batch) -> int:
        """Keys are those of the jobs, the digest is that of the keys, segments follow on each other, what they need is
        built in front of them. Returns the number of records."""
        for _ in self.of_batch(number, "names", _Name):
            pass
        hasher, records, stop = hashlib.blake2b(digest_size=16), 0, 0
        built: set[str] = set()
        jobs = self.of_batch(number, "jobs", _Job)
        for segment in self.of_batch(number, "segments", _Segment):
            if segment.start != stop or segment.stop <= segment.start or not built.issuperset(segment.needs):
                raise self._wrong(f"the segments of batch {head.name!r} do not fit together")
            stop = segment.stop
            for _ in range(segment.start, segment.stop):
                job = next(jobs, None)
                if job is None:
                    raise self._wrong(f"batch {head.name!r} has fewer jobs than it says")
                key = key_of(segment.method, segment.version, job.params)
                if key.hex() != job.key:
                    raise self._wrong(f"the key {job.key} in batch {head.name!r} is not that of its job")
                if segment.method == BUILDER:
                    built.add(self._recipe(job))
                self._check_texts(job)
                records += job.record is not None
                hasher.update(key)
        if stop != head.size or next(jobs, None) is not None:
            raise self._wrong(f"batch {head.name!r} has another number of jobs than it says")
        if hasher.hexdigest() != head.digest:
            raise self._wrong(f"the jobs of batch {head.name!r} are not those of its digest")
        return records

    def _recipe(self, job: _Job) -> str:
        try:
            return str(arriving.recipe_of(job.params))
        except (ValueError, LookupError, TypeError):
            raise self._wrong(f"job {job.key} builds no recipe") from None

    def _check_texts(self, job: _Job) -> None:
        """JSON texts that a reader of records would choke on."""
        texts: dict[str, str | None] = {"params": job.params}
        if job.record is not None:
            texts |= {"result": job.record.result, "inputs": job.record.inputs}
        for what, body in texts.items():
            if body is not None and not _is_object(body):
                raise self._wrong(f"`{what}` of job {job.key} is no JSON object")

    def bring_files(self, artifacts: Artifacts, progress: Progress) -> int:
        """Keep the artifacts that are not there yet. Returns how many."""
        files = self._artifacts()
        new = 0
        for place, (name, digest) in enumerate(files.items(), 1):
            new += not artifacts.has(digest)
            # Kept again where it was there: that makes it young, for those that clean up by age.
            if self._members[name].size <= _IN_MEMORY:
                artifacts.put(self._file(name).read())
            else:
                with tempfile.NamedTemporaryFile() as file:
                    shutil.copyfileobj(self._file(name), file, _BLOCK)
                    file.flush()
                    artifacts.put_file(Path(file.name))
            progress(place / len(files))
        return new
