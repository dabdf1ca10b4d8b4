"""`netassay doctor`: each thing that can be missing or wrong is named, with what mends it, within seconds."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from buckets import serving
from services import RedisServer, new_database
from sqlalchemy import text

from netassay import disk
from netassay.settings import Settings
from netassay.store import running
from netassay.store.database import SCHEMA, Database
from producer import doctor, lab


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def prepared(config: Settings) -> Database:
    """The store of `config`, with its tables."""
    database = Database(config.store_url)
    database.prepare()
    return database


def look(name: str, config: Settings) -> doctor.Check:
    """What one look says, as `examine` would take it up."""
    return doctor._look(name, lambda: doctor._LOOKS[name](config))


def states(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_in_an_empty_folder_only_the_lab_is_missing_and_nothing_is_made(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", "doctor", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    found = {check["name"]: check["state"] for check in said["checks"]}
    assert done.returncode == 1
    assert not said["fine"]
    assert {name for name, state in found.items() if state in ("missing", "wrong")} == {"lab"}
    assert next(check["mend"] for check in said["checks"] if check["name"] == "lab") == "netassay up"
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_be_read_are_the_first_thing_to_mend(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", "doctor"],
        cwd=tmp_path, env=os.environ | {"NETASSAY_SLOTS": "many"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "NETASSAY_SLOTS" in done.stdout


# --- the broker ----------------------------------------------------------------------------------------------------


def test_a_broker_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://lab:secret@127.0.0.1:{probe.getsockname()[1]}/0"
    began = time.monotonic()
    checks = doctor.examine(Settings(home=tmp_path, broker=url))
    assert time.monotonic() - began < 20
    found = states(checks)
    assert found["Redis"] == "wrong"
    assert [found[name] for name in ("Redis settings", "Redis rights", "dispatcher", "clock")] == ["unknown"] * 4
    assert "lab:***@127.0.0.1" in next(check.found for check in checks if check.name == "Redis")
    assert "secret" not in str(checks)


def test_a_broker_or_a_store_that_says_nothing_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LOOK_SECONDS", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        config = Settings(home=tmp_path, broker=f"redis://{address}/0", store=f"postgresql://{address}/records")
        for name in ("Redis", "store"):
            began = time.monotonic()
            check = look(name, config)
            assert time.monotonic() - began < 3
            assert check.state == "wrong"
            assert "answer" in check.found


@pytest.fixture
def careless(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that evicts what it pleases and forgets all when it ends."""
    server = RedisServer(tmp_path / "redis", "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    server.start()
    yield server
    server.kill()


def test_a_redis_that_may_lose_messages_is_wrong_and_what_is_told_mends_it(
    careless: RedisServer, config: Settings
) -> None:
    config = config.model_copy(update={"broker": careless.url})
    check = look("Redis settings", config)
    assert (check.state, check.found) == ("wrong", "maxmemory-policy allkeys-lru, appendonly no")
    client = redis.Redis(port=careless.port)
    for command in check.mend.split(", and in")[0].split(" && "):
        client.execute_command(*command.removeprefix("redis-cli ").split())
    assert look("Redis settings", config).state == "ok"


def test_a_user_without_rights_is_told_which_are_lacking(
    careless: RedisServer, config: Settings, prepared: Database
) -> None:
    client = redis.Redis(port=careless.port)
    client.execute_command("ACL", "SETUSER", "lab", "on", ">secret", "~netassay:*", "&*", "+@all", "-brpop", "-publish")
    config = config.model_copy(update={"broker": careless.url.replace("//", "//lab:secret@")})
    check = look("Redis rights", config)
    assert check.state == "wrong"
    assert "the user lab may not BRPOP, PUBLISH" in check.found
    client.execute_command(*check.mend.removeprefix("redis-cli ").replace("'", "").split())
    assert look("Redis rights", config).state == "ok"
    wrong = config.model_copy(update={"broker": careless.url.replace("//", "//lab:guess@")})
    assert "refuses us" in look("Redis", wrong).found
    assert client.keys("*doctor*") == []


@pytest.mark.skipif(not shutil.which("redis-server") or not shutil.which("sha256sum"), reason="no redis-server")
def test_the_user_of_a_cluster_may_all_that_the_doctor_tries(
    tmp_path: Path, config: Settings, prepared: Database
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = Path(__file__).parents[1] / "docker" / "redis" / "start.sh"
    server = subprocess.Popen(
        ["sh", str(start), "--port", port, "--bind", "127.0.0.1", "--dir", str(tmp_path)],
        env=os.environ | {"REDIS_PASSWORD": "secret", "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        config = config.model_copy(update={"broker": f"redis://netassay:secret@127.0.0.1:{port}/0"})
        deadline = time.monotonic() + 20
        while look("Redis", config).state != "ok":
            assert time.monotonic() < deadline, look("Redis", config)
            time.sleep(0.1)
        found = {name: look(name, config).state for name in ("Redis settings", "Redis rights", "dispatcher", "clock")}
    finally:
        server.terminate()
        server.wait()
    assert found == {"Redis settings": "ok", "Redis rights": "ok", "dispatcher": "missing", "clock": "ok"}


def test_a_dispatcher_shows_by_what_it_reads(careless: RedisServer, config: Settings, prepared: Database) -> None:
    config = config.model_copy(update={"broker": careless.url})
    check = look("dispatcher", config)
    assert (check.state, check.mend) == ("missing", "netassay dispatch, on one host of the cluster")
    environment = {**os.environ, **lab.environment_of(config)}
    process = subprocess.Popen(lab.dispatcher_command(), env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while look("dispatcher", config).state != "ok":
            assert time.monotonic() < deadline, look("dispatcher", config)
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()


# --- the store -----------------------------------------------------------------------------------------------------


def test_a_store_that_is_sound_is_shown_with_its_schema(config: Settings, prepared: Database) -> None:
    check = look("store", config)
    assert (check.state, f"schema {SCHEMA}" in check.found) == ("ok", True)


def test_a_store_of_a_newer_program_and_a_file_that_is_none_are_wrong(config: Settings, prepared: Database) -> None:
    with prepared.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert "newer netassay" in look("store", config).found
    prepared.dispose()
    for file in config.root.iterdir():
        file.unlink()
    (config.root / "store.sqlite").write_bytes(b"not a database at all" * 100)
    assert look("store", config).state == "wrong"


def test_a_disk_that_is_nearly_full_is_wrong(config: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "ROOM", 10**18)
    assert "GB free" in look("store", config).found
    assert look("store", config).state == "wrong"


def test_a_folder_of_somebody_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # For root, who may write everywhere, the system's answer to anybody else.
    monkeypatch.setattr(os, "access", functools.partial(os.access, effective_ids=True))
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        checks = [look(name, Settings(home="/netassay/home")) for name in ("store", "artifacts")]
    finally:
        os.seteuid(user)
    for check in checks:
        assert (check.state, check.found) == ("wrong", "/ cannot be written to")
        assert check.mend.startswith("chown ")


def test_postgresql_is_asked_for_its_version_and_our_rights(tmp_path: Path) -> None:
    with new_database() as url:
        config = Settings(home=tmp_path, store=url)
        assert "no records yet" in look("store", config).found
        Database(url).prepare()
        assert f"schema {SCHEMA}" in look("store", config).found
        assert look("clock", config).state == "ok"
        assert look("workers", config).mend.startswith("netassay worker")
    absent = look("store", config)
    assert (absent.state, "does not exist" in absent.found) == ("wrong", True)


def test_a_store_that_refuses_is_told_without_its_password(tmp_path: Path) -> None:
    config = Settings(home=tmp_path, store="postgresql://lab:secret@127.0.0.1:1/records")
    checks = doctor.examine(config)
    assert states(checks)["store"] == "wrong"
    assert "secret" not in str(checks)


def test_artifacts_on_s3_are_written_and_read_for_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        config = Settings(home=tmp_path / "home", artifacts=server.url)
        check = look("artifacts", config)
        assert check.state == "ok", check
        assert server.digests() == []
        assert not config.root.exists()
        monkeypatch.setattr(doctor, "LOOK_SECONDS", 4.0)
        server.kill()
        began = time.monotonic()
        assert look("artifacts", config).state == "wrong"
        assert time.monotonic() - began < 5


# --- the host ------------------------------------------------------------------------------------------------------

MOUNTS = """\
/dev/vda1 / ext4 rw 0 0
server:/export /home nfs4 rw 0 0
/dev/vdb1 /home/ann/scratch xfs rw 0 0
//box/share /mnt/my\\040share cifs rw 0 0
sshfs#me@host /mnt/far fuse.sshfs rw 0 0
tmpfs /mnt/far tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    "path, kind, network",
    [
        ("/var/lab", "ext4", False),
        ("/home/ann/lab", "nfs4", True),
        ("/home/ann/scratch/lab", "xfs", False),
        ("/home/ann/scratchy", "nfs4", True),
        ("/mnt/my share/lab", "cifs", True),
        ("/mnt/far/lab", "tmpfs", False),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(path: str, kind: str, network: bool) -> None:
    assert doctor.file_system(Path(path), MOUNTS) == kind
    assert bool(doctor.NETWORK_FILE_SYSTEMS.match(kind)) == network


def test_a_home_on_a_network_disk_is_wrong_unless_records_and_messages_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda path, mounts: "nfs4")
    assert look("home folder", Settings(home=tmp_path)).state == "wrong"
    away = Settings(home=tmp_path, broker="redis://h", store="postgresql://h/d")
    assert look("home folder", away).state == "ok"


def test_a_socket_path_that_is_too_long_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    check = look("socket", Settings(home=tmp_path))
    assert (check.state, check.mend) == ("wrong", "export TMPDIR=/tmp")


def test_more_slots_than_memory_for_them_is_wrong_and_the_number_told_is_right(tmp_path: Path) -> None:
    check = look("memory and cores", Settings(home=tmp_path, slots=10, memory=2_000_000_000))
    assert (check.state, check.mend) == ("wrong", "export NETASSAY_SLOTS=4")
    assert look("memory and cores", Settings(home=tmp_path, slots=4, memory=2_000_000_000)).state == "ok"
    assert look("memory and cores", Settings(home=tmp_path, memory=10**18)).state == "wrong"


def test_a_worker_without_a_sign_of_life_is_not_alive(
    config: Settings, prepared: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look("workers", config).state == "missing"
    monkeypatch.setattr(doctor, "STILL_SECONDS", 0.5)
    running.sign_on(prepared, "ghost", "host", 1, 1)
    check = look("workers", config)
    assert (check.state, "ghost" in check.found) == ("missing", True)


def test_a_worker_of_another_version_is_named(config: Settings, prepared: Database) -> None:
    running.sign_on(prepared, "worker-1", "old-host", 1, 1)
    assert look("versions", config).state == "ok"
    running.provenance_id(prepared, "digest", json.dumps({"host": "old-host", "netassay": "0.0.1"}))
    check = look("versions", config)
    assert (check.state, "old-host has netassay 0.0.1" in check.found) == ("wrong", True)


# --- users' methods ------------------------------------------------------------------------------------------------

GOOD = '''"""A good one."""
from netassay.method import Contract
VERSION = 1
class Params(Contract): ...
class Result(Contract): ...
def run(params): return Result()
EXAMPLE = {"jobs": []}
'''
BROKEN = {
    "raises": ("import no_such_module", "no_such_module"),
    "exits": ("import sys; sys.exit(3)", ""),
    "is no method": ("VERSION = 1", "lacks"),
    "is no Python": ("def (", "SyntaxError"),
    "dies": ("import os; os._exit(7)", "7"),
}


@pytest.mark.parametrize("source, words", BROKEN.values(), ids=BROKEN)
def test_a_method_of_a_user_that_cannot_be_imported_is_named(tmp_path: Path, source: str, words: str) -> None:
    family = tmp_path / "mine" / "weights"
    family.mkdir(parents=True)
    (family / "good.py").write_text(GOOD)
    config = Settings(home=tmp_path, methods=str(tmp_path / "mine"))
    assert look("methods", config).state == "ok"
    (family / "odd.py").write_text(source)
    check = look("methods", config)
    assert check.state == "wrong"
    assert "weights.odd" in check.found
    assert "weights.good" not in check.found
    assert words in check.found


def test_a_method_whose_import_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "METHODS_SECONDS", 8.0)
    family = tmp_path / "mine" / "weights"
    family.mkdir(parents=True)
    (family / "slow.py").write_text("import time; time.sleep(3600)")
    check = look("methods", Settings(home=tmp_path, methods=str(tmp_path / "mine")))
    assert (check.state, "weights.slow" in check.found) == ("wrong", True)


def test_a_folder_of_methods_that_is_not_there_is_wrong(tmp_path: Path) -> None:
    check = look("methods", Settings(home=tmp_path, methods=str(tmp_path / "none")))
    assert (check.state, str(tmp_path / "none") in check.found) == ("wrong", True)
