"""Artifacts: content-addressed files (networks, recipes, arrays, users' datasets) in a folder or behind a URL.

A file lies at `<folder>/ab/<sha-256>`, ab being the first two hex digits. Files are written beside their place, synced
and renamed into it, so a reader never sees half of one and a crash leaves only a temporary file; the same bytes twice
are one file.

Where the artifacts lie behind a URL (`netassay.store.remote`), the folder is this host's cache of them. What is read is
fetched into it, what is kept goes both ways. Any number of processes may share the cache, and it may be deleted at any
time. The digest of a cached file is compared once by each process, and again when its size, age or inode change: a file
that a full disk cut short, or that somebody wrote to, is fetched anew.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from netassay.errors import UserError
from netassay.settings import Settings, settings
from netassay.store.remote import Kept, Remote, RemoteOutage, is_digest, never

_BLOCK = 1 << 20
#: How often a download is begun again that broke off, or brought other bytes than its name says.
_DOWNLOADS = 3
#: What lies behind a URL for longer than this is uploaded again when it is kept again, so that its age tells those who
#: clean up that somebody wants it. Both times together stay well below the age at which they remove anything.
RENEWED_SECONDS = 12 * 3600.0
#: For so long what was seen there is taken to be there still, by this process.
SEEN_SECONDS = 3600.0
#: Artifacts whose presence is remembered: some 100 bytes each.
_REMEMBERED = 100_000
#: A reference in a JSON text, of whatever kind: networks, arrays, recipes, datasets.
_REFERENCES = re.compile(r"(?<![a-z])[a-z]+:[0-9a-f]{64}(?![0-9a-f])")
#: Kinds of artifacts that are JSON texts themselves and may name others.
_TEXTS = ("recipe:", "generator:")


class MissingArtifact(UserError, LookupError):
    """The store has no file of that digest."""


class Artifacts:
    """The artifacts in a folder; with `remote`, those behind it, the folder being this host's cache.

    Threads may share it. Where there is a remote, all that asks it raises RemoteOutage when it does not answer.
    """

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        self.folder, self.remote = Path(folder), remote
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._shared: dict[str, float] = {}
        # One thread fetches a file, the others wait for it; two files that share a lock wait for each other.
        self._fetching = tuple(threading.Lock() for _ in range(64))

    def __str__(self) -> str:
        """Where they are, for people."""
        return str(self.remote or self.folder)

    def path(self, reference: str, give_up: Callable[[], bool] = never) -> Path:
        """Path of an artifact by reference (`kind:digest`) or digest, fetched if need be. Raises MissingArtifact."""
        digest = _digest(reference)
        path = self._path(digest)
        if self.remote is not None:
            if not self._sound(digest):
                self._fetch(self.remote, reference, give_up)
        elif not path.is_file():
            raise MissingArtifact(
                f"{reference} is not among the artifacts in {self.folder}; submit the file again, or point "
                "NETASSAY_ARTIFACTS at the folder that holds it"
            )
        return path

    def has(self, reference: str) -> bool:
        """Whether everybody can read it: what only the cache of this host holds does not count."""
        digest = _digest(reference)
        if self.remote is None:
            return self._path(digest).is_file()
        return self.remote.about(digest) is not None

    def here(self, reference: str) -> bool:
        """Whether its file lies on this host."""
        return self._path(_digest(reference)).is_file()

    def read(self, reference: str) -> bytes:
        return self.path(reference).read_bytes()

    def put(self, data: bytes) -> str:
        """Keep bytes; returns their sha-256 in hexadecimal."""

        def write() -> str:
            digest = hashlib.sha256(data).hexdigest()
            if not self._renew(digest):
                with self._temporary() as (file, place):
                    file.write(data)
                    place(digest)
            return digest

        return self._keep(write)

    def put_file(self, source: Path) -> str:
        """Keep a copy of a file; the copy is what is hashed, so a file that changes meanwhile cannot lie."""

        def write() -> str:
            hasher = hashlib.sha256()
            with open(source, "rb") as stream, self._temporary() as (file, place):
                while block := stream.read(_BLOCK):
                    hasher.update(block)
                    file.write(block)
                digest = hasher.hexdigest()
                if not self._renew(digest):
                    place(digest)
            return digest

        return self._keep(write)

    def fetch(self, references: Iterable[str], give_up: Callable[[], bool] = never) -> dict[str, str]:
        """Bring artifacts to this host, with those that recipes among them name; nothing to do without a remote.

        Returns reference -> why for those that are not to be had. Raises RemoteOutage, soon after `give_up()` says so;
        OSError where this host cannot keep them.
        """
        absent: dict[str, str] = {}
        if self.remote is None:
            return absent
        left, seen = list(references), set()
        while left:
            reference = left.pop()
            if reference in seen:
                continue
            seen.add(reference)
            try:
                path = self.path(reference, give_up)
            except MissingArtifact as error:
                absent[reference] = str(error)
                continue
            if reference.startswith(_TEXTS):
                left += named(path.read_text(errors="replace"))
        return absent

    def share(self, reference: str, give_up: Callable[[], bool] = never) -> None:
        """See to it that others can read what lies on this host; nothing to do without a remote.

        Raises FileNotFoundError where it does not lie here, or damaged; RemoteOutage.
        """
        digest, now = _digest(reference), time.monotonic()
        if self.remote is None or now < self._shared.get(digest, -1.0):
            return
        path = self._path(digest)
        there = self.remote.about(digest, give_up)
        # By the clocks of two hosts: an hour between them does no harm.
        old = there is not None and time.time() - there.modified > RENEWED_SECONDS
        if there is None or old or there.bytes != path.stat().st_size:
            if not self._sound(digest):  # what is there may be better
                raise FileNotFoundError(path)
            self.remote.write(digest, path, give_up)
        self._remember(digest)

    def list(self) -> Iterator[Kept]:
        """All artifacts, in no order; of the remote where there is one."""
        if self.remote is not None:
            yield from self.remote.list()
            return
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if is_digest(path.name):
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    yield Kept(path.name, about.st_size, about.st_mtime)

    def size(self, reference: str) -> int:
        """Bytes of an artifact. Raises MissingArtifact."""
        digest = _digest(reference)
        if self.remote is None:
            return self.path(digest).stat().st_size
        there = self.remote.about(digest)
        if there is None:
            raise _missing(reference, self.remote)
        return there.bytes

    def remove(self, reference: str) -> None:
        """Remove an artifact, from the cache too; nothing where it is not there. Other hosts' caches may keep it."""
        digest = _digest(reference)
        self._shared.pop(digest, None)
        if self.remote is not None:
            self.remote.remove(digest)
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest

    def _keep(self, write: Callable[[], str]) -> str:
        if self.remote is None:
            return write()
        for _ in range(_DOWNLOADS - 1):
            with contextlib.suppress(FileNotFoundError):  # the cache was deleted under our hands
                digest = write()
                self.share(digest)
                return digest
        digest = write()
        self.share(digest)
        return digest

    def _renew(self, digest: str) -> bool:
        """Whether a file is here already; it is young again then, for those that clean up by age."""
        there = self._sound(digest) if self.remote is not None else self._path(digest).is_file()
        if there:
            with contextlib.suppress(OSError):  # another user's, in a shared folder
                os.utime(self._path(digest))
                self._note(digest)
        return there

    def _sound(self, digest: str) -> bool:
        """Whether the cache holds the file, with the bytes that its name says; if not, it is removed."""
        path = self._path(digest)
        try:
            mark = _mark(path)
            if self._checked.get(digest) == mark:
                return True
            with open(path, "rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return False
        if right:
            self._note(digest, mark)
        else:
            path.unlink(missing_ok=True)
        return right

    def _fetch(self, remote: Remote, reference: str, give_up: Callable[[], bool]) -> None:
        digest = _digest(reference)
        with self._fetching[hash(digest) % len(self._fetching)]:
            for left in reversed(range(_DOWNLOADS)):
                if self._sound(digest) or self._download(remote, reference, left > 0, give_up):
                    return
        raise MissingArtifact(
            f"{reference} is damaged at {remote}: its bytes have another digest than its name says; remove that file "
            "there, then submit again what it came from"
        )

    def _download(self, remote: Remote, reference: str, again: bool, give_up: Callable[[], bool]) -> bool:
        """Whether the right bytes came; `again`: there will be another try where a download breaks off."""
        digest, hasher = _digest(reference), hashlib.sha256()
        blocks = remote.read(digest, give_up)
        try:
            block = next(blocks, b"")
        except FileNotFoundError:
            remote.look(give_up)
            raise _missing(reference, remote) from None
        try:
            with self._temporary() as (file, place):
                while block:
                    hasher.update(block)
                    file.write(block)
                    block = next(blocks, b"")
                if hasher.hexdigest() == digest:
                    place(digest)
                    self._remember(digest)
                    return True
        except (FileNotFoundError, RemoteOutage):  # the cache was deleted under our hands; or the line broke
            if not again or give_up():
                raise
        return False

    def _note(self, digest: str, mark: tuple[int, int, int] | None = None) -> None:
        """That the file in the cache has the right bytes, as long as it looks like this."""
        if self.remote is not None:
            if len(self._checked) >= _REMEMBERED:
                self._checked.clear()
            self._checked[digest] = mark or _mark(self._path(digest))

    def _remember(self, digest: str) -> None:
        """That the remote has it."""
        if len(self._shared) >= _REMEMBERED:
            self._shared.clear()
        self._shared[digest] = time.monotonic() + SEEN_SECONDS

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
                target = self._path(digest)
                new = not target.parent.is_dir()
                target.parent.mkdir(exist_ok=True)
                os.replace(name, target)
                _sync(target.parent)
                if new:
                    _sync(self.folder)
                self._note(digest)

            yield file, place


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk: a synced file whose name is not is lost by a power cut all the same."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def named(text: str | None) -> set[str]:
    """The references in a JSON text; a text that only looks like one is among them."""
    return set(_REFERENCES.findall(text)) if text else set()


def _digest(reference: str) -> str:
    return reference.rpartition(":")[2]


def _mark(path: Path) -> tuple[int, int, int]:
    """What changes when somebody writes to a file."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _missing(reference: str, remote: Remote) -> MissingArtifact:
    return MissingArtifact(
        f"{reference} is not among the artifacts at {remote}; submit the file again, or point NETASSAY_ARTIFACTS at "
        "the place that holds it"
    )


def of(config: Settings) -> Artifacts:
    """The artifacts that the settings name; one object for all who ask in this process."""
    return _of(config.artifacts_url, config.artifacts_folder, os.getpid())


@functools.lru_cache(maxsize=8)
def _of(url: str, folder: Path, pid: int) -> Artifacts:
    # A process that was forked needs its own: connections do not survive that.
    return Artifacts(folder, Remote(url) if "://" in url else None)


_current: contextvars.ContextVar[Artifacts | None] = contextvars.ContextVar("artifacts", default=None)


def current() -> Artifacts:
    """The artifacts this process works with: those of `using`, else the lab's."""
    return _current.get() or of(settings())


@contextlib.contextmanager
def using(artifacts: Artifacts | Path) -> Iterator[Artifacts]:
    """Within the block, `current()` is these artifacts, or those of this folder."""
    chosen = artifacts if isinstance(artifacts, Artifacts) else Artifacts(artifacts)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
