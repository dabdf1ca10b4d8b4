"""A real S3 interface for tests: moto's server as a process on loopback, which forgets everything when it is killed."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from labs import until, variables

from netassay.store.artifacts import Artifacts
from netassay.store.remote import Remote

BUCKET = "laboratory"


@dataclass
class Server:
    """The server, at one port as long as the test lasts."""

    port: int
    process: subprocess.Popen[bytes] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/artifacts"

    def start(self, bucket: bool = True) -> None:
        """Start it, empty, with the bucket."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers, what="the S3 server")
        if bucket:
            self.files.mkdir(BUCKET)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
            return True
        return False

    @property
    def files(self) -> Any:
        """The server as a file system, to look behind the scenes."""
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def artifacts(self, cache: Path, patience: float = 0.5) -> Artifacts:
        return Artifacts(cache, Remote(self.url, patience))

    def place(self, digest: str) -> str:
        return f"{BUCKET}/artifacts/{digest[:2]}/{digest}"

    def digests(self) -> list[str]:
        return sorted(path.rpartition("/")[2] for path in self.files.find(f"{BUCKET}/artifacts"))


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server for the time of the block, to which this process and those it starts are sent by their environment."""
    pytest.importorskip("moto", reason="pip install 'netassay[dev]'")
    pytest.importorskip("s3fs", reason="pip install 'netassay[s3]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Without botocore's own retries, some eight seconds each, a dead server is one that is known to be dead.
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 5},
    }
    environment = {
        "FSSPEC_S3": json.dumps(options),
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = Server(port)
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = options  # fsspec reads the environment when it is imported
    try:
        with variables(environment):
            server.start()
            yield server
    finally:
        server.kill()
        if before is None:
            fsspec.config.conf.pop("s3", None)
        else:
            fsspec.config.conf["s3"] = before
