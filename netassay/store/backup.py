"""A backup of a store while it is in use, and the way back.

A backup is a folder, and may hold many, for which files are copied once:

    20261121T194012.345Z.tar    what `transfer.export` writes of all batches at one moment, without their files
    20261121T194012.345Z.json   the manifest: versions, the digest of the former, the artifacts it needs; written last
    artifacts/ab/<sha-256>      the artifacts of all backups in the folder

So it is of the same form for SQLite and PostgreSQL, and what was saved of one can be restored to the other. Nobody
waits for it: it reads one snapshot. What runs at that moment is pending in it; a submission that has not been accepted
is not in it. What a store learns anew is left out: its id (two labs must not share keys in Redis), timings, the claims
of workers; and so are the shares of submitters, which are of the lab, not of its batches.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from sqlalchemy import text

from netassay import __version__
from netassay.store import transfer
from netassay.store.artifacts import Artifacts, MissingArtifact
from netassay.store.database import SCHEMA, Database, StoreError
from netassay.store.transfer import Progress

#: Raised when an older netassay could not restore what is written now.
FORMAT = 1
_STAMP = re.compile(r"\d{8}T\d{6}\.\d{3}Z")


class NotABackup(StoreError):
    """The folder holds no backup, or not as it was written; no batch was restored."""


class NotEmpty(StoreError):
    """The store holds batches that are not of the backup; nothing was restored."""


_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["netassay backup"]
    version: int
    netassay: str
    store_schema: str
    created_at: float
    sha256: _Digest
    batches: Annotated[int, Field(ge=0)]
    jobs: Annotated[int, Field(ge=0)]
    records: Annotated[int, Field(ge=0)]
    artifacts: list[_Digest]
    missing: list[str]


@dataclass(frozen=True)
class Saved:
    """What was saved. path: of the manifest; artifacts: that it needs; copied: those of them that were not in the
    folder; bytes: written now; missing: artifacts that are named but not there, or damaged."""

    path: str
    batches: int
    jobs: int
    records: int
    artifacts: int
    copied: int
    bytes: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restored:
    """What came back. path: the manifest it is of; skipped: batches that a restore before had brought back."""

    path: str
    batches: int
    skipped: int
    jobs: int
    records: int
    attempts: int
    artifacts: int


def save(database: Database, artifacts: Artifacts, folder: Path, progress: Progress = lambda share: None) -> Saved:
    """Write a backup of all batches, with their files, into the folder. It is there when its manifest is.

    Raises OSError, an Outage, RemoteOutage: no backup was added then, unless only the last sync of the folder failed;
    files that were copied serve the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = Artifacts(folder / "artifacts")
    kept: list[str] = []
    copied = written = 0

    def keep(reference: str) -> Path | None:
        nonlocal copied, written
        digest = reference.rpartition(":")[2]
        if not there.has(digest):
            source = artifacts.path(reference)
            # Damaged, it may be a good copy of another one, which the folder has or is to have: hence not put first.
            if _digest_of(source) != digest or there.put_file(source) != digest:
                return None
            copied, written = copied + 1, written + there.size(digest)
        kept.append(digest)
        return there.path(digest)

    moment = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03}Z"
    records, manifest = folder / f"{stamp}.tar", folder / f"{stamp}.json"
    try:
        out = transfer.export(database, artifacts, records, progress=progress, keep=keep)
        about = _Manifest(
            format="netassay backup",
            version=FORMAT,
            netassay=__version__,
            store_schema=SCHEMA,
            created_at=moment,
            sha256=_digest_of(records),
            batches=out.batches,
            jobs=out.jobs,
            records=out.records,
            artifacts=sorted(kept),
            missing=list(out.missing),
        )
        with transfer.beside(manifest) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(about.model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
        _sync(folder)
    except BaseException:
        if not manifest.exists():
            records.unlink(missing_ok=True)
        raise
    size = out.bytes + manifest.stat().st_size + written
    return Saved(str(manifest), out.batches, out.jobs, out.records, len(kept), copied, size, out.missing)


def restore(database: Database, artifacts: Artifacts, path: Path, progress: Progress = lambda share: None) -> Restored:
    """Bring a backup into an empty store: the newest of a folder, or the one of this manifest.

    After a kill, the same again does the rest. Raises NotABackup, NotEmpty: no batch was brought back then.
    """
    manifest, about = _read(path)
    records = manifest.with_suffix(".tar")
    there = Artifacts(manifest.parent / "artifacts")
    _check(records, about, there)
    _refuse_others(database, transfer.contents(records))
    for place, digest in enumerate(about.artifacts, 1):
        if artifacts.put_file(there.path(digest)) != digest:
            raise NotABackup(
                f"the file {there.path(digest)} of the backup is damaged: its bytes have another digest than its name "
                "says; no batch was restored: copy it again, or restore an older backup of the folder by its .json file"
            )
        progress(0.4 * place / len(about.artifacts))
    brought = transfer.bring(
        database, artifacts, records, progress=lambda share: progress(0.4 + 0.6 * share), apart=True
    )
    return Restored(
        str(manifest),
        brought.batches,
        brought.skipped,
        brought.jobs,
        brought.records,
        brought.attempts,
        len(about.artifacts),
    )


def _read(path: Path) -> tuple[Path, _Manifest]:
    """The manifest at this path, or the newest in this folder, and where it stands."""
    if path.is_dir():
        found = sorted(one for one in path.glob("*.json") if _STAMP.fullmatch(one.stem))
        if not found:
            raise NotABackup(f"{path} holds no backup; write one with: netassay backup FOLDER")
        path = found[-1]
    try:
        written = path.read_text(encoding="utf-8")
        about = _Manifest.model_validate_json(written)
    except OSError as error:
        raise NotABackup(f"{path} cannot be read: {error.strerror or error}; check its name and rights") from None
    except (ValidationError, UnicodeDecodeError):
        raise NotABackup(
            f"{path} is not the manifest of a backup, or of a newer netassay; no batch was restored: name the folder "
            "that `netassay backup` wrote to, or upgrade this installation"
        ) from None
    if about.version > FORMAT:
        raise NotABackup(
            f"{path} was written by a newer netassay (format {about.version}, this one reads {FORMAT}); upgrade this "
            "installation"
        )
    return path, about


def _check(records: Path, about: _Manifest, there: Artifacts) -> None:
    try:
        right = _digest_of(records) == about.sha256
    except OSError as error:
        raise NotABackup(f"{records} cannot be read: {error.strerror or error}; copy it again") from None
    if not right:
        raise NotABackup(
            f"{records} has other bytes than its manifest says; copy it again, or restore an older backup of the "
            "folder by its .json file"
        )
    for digest in about.artifacts:
        try:
            there.path(digest)
        except MissingArtifact:
            raise NotABackup(f"the file {digest} is missing in {there.folder}; copy the whole folder again") from None


def _refuse_others(database: Database, ours: dict[str, str]) -> None:
    with database.read() as connection:
        found = connection.execute(text("SELECT name, digest FROM batch WHERE state <> 'arriving' ORDER BY id"))
        others = [row.name for row in found if ours.get(row.name) != bytes(row.digest).hex()]
    if others:
        shown = ", ".join(map(repr, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise NotEmpty(
            f"the store {database} holds batches that are not of this backup ({shown}); restore into an empty one "
            "(another NETASSAY_HOME or NETASSAY_STORE)"
        )


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
