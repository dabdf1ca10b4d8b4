"""Artifacts at a place that hosts share through fsspec: `s3://bucket/prefix`, `gs://...`, `sftp://host/folder` ...

Files lie there as in a folder of artifacts, `<prefix>/ab/<sha-256>`, so one can be copied to the other by any tool.
Options and credentials are fsspec's own: the environment variables FSSPEC_<PROTOCOL>_<OPTION> (FSSPEC_S3_ENDPOINT_URL),
and what the library behind it reads (AWS_ACCESS_KEY_ID, ~/.aws).

Readers never see half a file: an object store shows an object once it is whole; elsewhere the file is written beside
its place and moved. Whoever reads still compares the digest.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from netassay.errors import NoAnswer, UserError

#: Where an upload becomes visible at its end, all at once; a move would be a second copy there.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"})
#: For so long a remote that does not answer is asked again, beyond what its own library tries.
PATIENCE_SECONDS = 10.0
_BLOCK = 1 << 20

T = TypeVar("T")


class RemoteOutage(NoAnswer, OSError):
    """The remote artifacts do not answer, or refuse us: nothing can be said about what is there."""


@dataclass(frozen=True)
class Kept:
    """An artifact as it lies somewhere. modified: seconds since 1970, of that place's clock."""

    digest: str
    bytes: int
    modified: float


def never() -> bool:
    return False


class Remote:
    """A place behind fsspec. Threads may share it. Raises UserError where nothing can be reached by such a URL.

    patience: seconds for which an outage is sat out before RemoteOutage is raised.
    """

    def __init__(self, url: str, patience: float = PATIENCE_SECONDS) -> None:
        import fsspec
        from fsspec.dircache import DirCache

        self.url, self.patience = url.rstrip("/"), patience
        login, at, _ = self.url.partition("://")[2].partition("/")[0].rpartition("@")
        self._login = login + at
        try:
            # An instance of its own, without memory of listings: others add to this place.
            self._files, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        except ImportError as error:
            extra = "pip install 'netassay[s3]'" if self.url.startswith(("s3:", "s3a:")) else self._hidden(error)
            raise UserError(f"artifacts at {self} need a package that is not installed: {extra}") from error
        except Exception as error:
            raise UserError(
                f"NETASSAY_ARTIFACTS is neither a folder nor a URL that fsspec opens: {self} ({self._hidden(error)}); "
                "give such as /srv/artifacts or s3://bucket/prefix, its credentials in AWS_* or FSSPEC_S3_* variables"
            ) from error
        self._files.dircache = DirCache(use_listings_cache=False)
        protocol = self._files.protocol
        self._whole = not _OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def __str__(self) -> str:
        """The URL without user and password."""
        return self._hidden(self.url)

    def _hidden(self, words: object) -> str:
        """Words of others about this place, without the user and password that may stand in its URL."""
        return str(words).replace(self._login, "") if self._login else str(words)

    def read(self, digest: str, give_up: Callable[[], bool] = never) -> Iterator[bytes]:
        """The bytes of an artifact, in blocks; nobody has compared them with the digest.

        Raises FileNotFoundError, RemoteOutage. An outage in the middle is not sat out: begin again.
        """
        file = self._ask(lambda: self._files.open(self._place(digest), "rb"), give_up)
        with contextlib.closing(file):
            while block := self._ask(lambda: file.read(_BLOCK), give_up, patience=0.0):
                yield block

    def write(self, digest: str, source: Path, give_up: Callable[[], bool] = never) -> None:
        """Keep a copy of a file under this digest. Raises RemoteOutage; the error of a source that cannot be read."""
        source.open("rb").close()
        place = self._place(digest)

        def copy() -> None:
            if self._whole:
                self._files.put_file(str(source), place)
                return
            self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
            beside = f"{self._root}/.arriving-{secrets.token_hex(8)}"
            try:
                self._files.put_file(str(source), beside)
                self._files.mv(beside, place)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._files.rm_file(beside)
                raise

        try:
            self._ask(copy, give_up)
        except FileNotFoundError as error:
            raise self._absent(error) from error

    def about(self, digest: str, give_up: Callable[[], bool] = never) -> Kept | None:
        """Size and age of an artifact, None where it is not there. Raises RemoteOutage."""
        try:
            return _kept(digest, self._ask(lambda: self._files.info(self._place(digest)), give_up))
        except FileNotFoundError:
            self.look(give_up)
            return None

    def look(self, give_up: Callable[[], bool] = never) -> None:
        """Whether the place itself is there: a bucket that is misspelt must not pass for one without artifacts.

        Raises RemoteOutage.
        """
        places = self._root.split("/")
        folders = ["/".join(places[:count]) for count in range(len(places), 0, -1)]
        for folder in filter(None, folders):
            if self._ask(lambda folder=folder: self._files.exists(folder), give_up):  # type: ignore[misc]
                return
        raise self._absent(None)

    def list(self) -> Iterator[Kept]:
        """All artifacts that lie there, in no order. Raises RemoteOutage."""
        for path, about in self._ask(lambda: self._files.find(self._root, detail=True), never).items():
            name = path.rpartition("/")[2]
            if is_digest(name) and about.get("type") == "file":
                yield _kept(name, about)

    def remove(self, digest: str) -> None:
        """Remove an artifact; nothing where it is not there. Raises RemoteOutage."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._files.rm_file(self._place(digest)), never)

    def _place(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"

    def _ask(self, question: Callable[[], T], give_up: Callable[[], bool], patience: float | None = None) -> T:
        """Ask, again for a while where there is no answer. Raises FileNotFoundError, RemoteOutage."""
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        pause = 0.1
        while True:
            try:
                return question()
            except FileNotFoundError:
                raise
            except Exception as error:
                # The libraries behind fsspec raise errors of all families when a network fails. What asking again
                # cannot mend is told at once.
                hopeless = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
                if hopeless or give_up() or time.monotonic() + pause > deadline:
                    raise self._outage(error, hopeless) from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _outage(self, error: Exception, refused: bool) -> RemoteOutage:
        words = type(error).__name__ + (f": {self._hidden(error)}" if str(error) else "")
        if refused:
            return RemoteOutage(
                f"the artifacts at {self} refuse us ({words}); check the credentials (AWS_* or FSSPEC_* variables) and "
                "that they may list, read, write and delete there"
            )
        return RemoteOutage(
            f"the artifacts at {self} do not answer ({words}); check NETASSAY_ARTIFACTS and the network, then do the "
            "same again"
        )

    def _absent(self, error: Exception | None) -> RemoteOutage:
        words = f" ({self._hidden(error)})" if error is not None and str(error) else ""
        return RemoteOutage(
            f"there is no such place as {self}{words}; create the bucket or folder, or check NETASSAY_ARTIFACTS"
        )


def is_digest(name: str) -> bool:
    """Whether a file's name is a sha-256 in hexadecimal."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _kept(digest: str, about: dict[str, Any]) -> Kept:
    """What fsspec's `info` says; each kind of file system has its own word for when a file was written."""
    found = next((about[name] for name in ("LastModified", "mtime", "last_modified", "updated") if about.get(name)), 0)
    if isinstance(found, str):
        found = datetime.datetime.fromisoformat(found)
    modified = found.timestamp() if isinstance(found, datetime.datetime) else float(found)
    return Kept(digest, int(about.get("size") or 0), modified)
