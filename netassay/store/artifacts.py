"""Artifacts: content-addressed files (networks, recipes, arrays, users' datasets) in a folder.

A file lies at `<folder>/ab/<sha-256>`, ab being the first two hex digits. Files are written beside their place, synced
and renamed into it, so a reader never sees half of one and a crash leaves only a temporary file; the same bytes twice
are one file.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from netassay.errors import UserError
from netassay.settings import settings

_BLOCK = 1 << 20


class MissingArtifact(UserError, LookupError):
    """The store has no file of that digest."""


class Artifacts:
    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, reference: str) -> Path:
        """Path of an artifact by reference (`kind:digest`) or digest. Raises MissingArtifact."""
        digest = reference.rpartition(":")[2]
        path = self.folder / digest[:2] / digest
        if not path.is_file():
            raise MissingArtifact(
                f"{reference} is not among the artifacts in {self.folder}; submit the file again, or point "
                "NETASSAY_ARTIFACTS at the folder that holds it"
            )
        return path

    def has(self, reference: str) -> bool:
        digest = reference.rpartition(":")[2]
        return (self.folder / digest[:2] / digest).is_file()

    def read(self, reference: str) -> bytes:
        return self.path(reference).read_bytes()

    def put(self, data: bytes) -> str:
        """Keep bytes; returns their sha-256 in hexadecimal."""
        digest = hashlib.sha256(data).hexdigest()
        if not self.has(digest):
            with self._temporary() as (file, place):
                file.write(data)
                place(digest)
        return digest

    def put_file(self, source: Path) -> str:
        """Keep a copy of a file; the copy is what is hashed, so a file that changes meanwhile cannot lie."""
        hasher = hashlib.sha256()
        with open(source, "rb") as stream, self._temporary() as (file, place):
            while block := stream.read(_BLOCK):
                hasher.update(block)
                file.write(block)
            digest = hasher.hexdigest()
            if not self.has(digest):
                place(digest)
        return digest

    @contextlib.contextmanager
    def _temporary(self) -> Iterator:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            _sync(self.folder.parent)
        handle, name = tempfile.mkstemp(prefix=".arriving-", dir=self.folder)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(os.fdopen(handle, "wb"))
            stack.callback(lambda: Path(name).unlink(missing_ok=True))

            def place(digest: str) -> None:
                file.flush()
                os.fsync(file.fileno())
                os.chmod(name, 0o644)
                target = self.folder / digest[:2] / digest
                new = not target.parent.is_dir()
                target.parent.mkdir(exist_ok=True)
                os.replace(name, target)
                _sync(target.parent)
                if new:
                    _sync(self.folder)

            yield file, place


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk: a synced file whose name is not is lost by a power cut all the same."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


_current: contextvars.ContextVar[Artifacts | None] = contextvars.ContextVar("artifacts", default=None)


def current() -> Artifacts:
    """The artifacts this process works with: those of `using`, else the lab's."""
    return _current.get() or Artifacts(settings().artifacts_folder)


@contextlib.contextmanager
def using(folder: Path) -> Iterator[Artifacts]:
    """Within the block, `current()` is the artifacts of this folder."""
    artifacts = Artifacts(folder)
    token = _current.set(artifacts)
    try:
        yield artifacts
    finally:
        _current.reset(token)
