"""A private PostgreSQL that may be killed: a cluster of its own in a folder of its own, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psycopg

#: Small, and quick to come back: a crash leaves little to replay.
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "64MB",
    "max_connections": "200",
    "min_wal_size": "32MB",
    "max_wal_size": "64MB",
    "logging_collector": "off",
}


def binaries() -> Path | None:
    """The folder with initdb and postgres; None where there is none."""
    found = [Path(path).parent for path in filter(None, [shutil.which("initdb")])]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((path for path in found if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _as_other() -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid():
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]


def missing() -> str:
    """Why no private PostgreSQL can be had here; empty where one can."""
    if binaries() is None:
        return "no initdb and postgres on this machine"
    if not os.geteuid():
        if not shutil.which("setpriv"):
            return "PostgreSQL does not run as root, and there is no setpriv to become another user"
        with contextlib.suppress(KeyError):
            import pwd

            pwd.getpwnam("postgres")
            return ""
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


class Postgres:
    """A cluster in an empty folder; `start` it. settings: parameters of the server."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.data, self.settings = folder, folder / "data", {**_OPTIONS, **settings}
        self.log = folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        if not os.geteuid():
            shutil.chown(folder, "postgres", "postgres")
        folder.chmod(0o700)
        self._do("initdb", "--pgdata", self.data, "--auth", "trust", "--username", "netassay", "--encoding", "UTF8",
                 "--locale", "C", "--no-sync", "--wal-segsize", "4")  # fmt: skip

    def _do(self, name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        folder = binaries()
        assert folder is not None
        # A folder with the server alone has no pg_dump; the path has.
        program = folder / name if (folder / name).exists() else name
        command = [*_as_other(), str(program), *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=check, timeout=120)

    def url(self, port: int | None = None, database: str = "netassay") -> str:
        """Of the lab's database: directly, or by way of another port."""
        return f"postgresql://netassay@127.0.0.1:{port or self.port}/{database}"

    def running(self) -> bool:
        return self._do("pg_ctl", "status", "-D", self.data, check=False).returncode == 0

    def start(self) -> None:
        """Start it and wait until it answers. Raises where it does not within a minute."""
        options = " ".join(f"-c {name}={value}" for name, value in self.settings.items())
        options += f" -p {self.port} -k {self.folder}"
        deadline = time.monotonic() + 60
        while True:
            self._do("pg_ctl", "start", "-D", self.data, "-l", self.log, "-W", "-o", options, check=False)
            with contextlib.suppress(psycopg.Error):
                until = time.monotonic() + 10
                while time.monotonic() < until:
                    with contextlib.suppress(psycopg.OperationalError):
                        with psycopg.connect(self.url(database="postgres"), autocommit=True) as server:
                            if not server.execute("SELECT 1 FROM pg_database WHERE datname = 'netassay'").fetchone():
                                server.execute("CREATE DATABASE netassay")
                            return
                    time.sleep(0.1)
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {self.log.read_text()[-2000:]}")

    def crash(self) -> None:
        """End all its processes at once, as a crash would: nothing is written any more."""
        self._do("pg_ctl", "stop", "-D", self.data, "-m", "immediate", check=False)

    def stop(self) -> None:
        self.crash()
