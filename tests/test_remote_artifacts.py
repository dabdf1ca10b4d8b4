"""Artifacts behind a URL: two hosts see each other's files, whatever becomes of caches and of the line between."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from buckets import BUCKET, Server, serving
from labs import until
from test_supervisor import USER_METHODS, Bench

from netassay.errors import UserError
from netassay.settings import Settings
from netassay.store import artifacts as store
from netassay.store import control
from netassay.store.artifacts import Artifacts, MissingArtifact, named
from netassay.store.remote import Remote, RemoteOutage

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def server(running: Server) -> Server:
    """The server, up and with an empty bucket."""
    if running.process is None:
        running.start()
    for path in running.files.find(BUCKET):
        running.files.rm_file(path)
    return running


@pytest.fixture
def here(server: Server, tmp_path: Path) -> Artifacts:
    return server.artifacts(tmp_path / "here")


@pytest.fixture
def there(server: Server, tmp_path: Path) -> Artifacts:
    return server.artifacts(tmp_path / "there")


def test_what_one_host_keeps_another_reads(here: Artifacts, there: Artifacts, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    digests = [here.put(b"abc"), here.put_file(tmp_path / "file"), here.put(b"")]
    assert digests[0] == ABC
    assert [there.has(f"file:{digest}") for digest in digests] == [True, True, True]
    assert [len(there.read(f"file:{digest}")) for digest in digests] == [3, 3_000_000, 0]
    assert there.path(ABC) == there.folder / "ba" / ABC
    assert server.digests() == sorted(digests)
    assert not list(there.folder.glob(".arriving-*"))


def test_a_missing_artifact_says_where_it_was_looked_for(here: Artifacts) -> None:
    assert not here.has("onnx:" + "0" * 64)
    with pytest.raises(MissingArtifact, match=rf"onnx:0+ is not .*s3://{BUCKET}/artifacts; .*NETASSAY_ARTIFACTS"):
        here.read("onnx:" + "0" * 64)


def test_the_cache_may_be_deleted_at_any_time(here: Artifacts, there: Artifacts) -> None:
    here.put(b"abc")
    assert there.read(ABC) == b"abc"
    for folder in (here.folder, there.folder):
        shutil.rmtree(folder)
    assert here.read(ABC) == there.read(ABC) == b"abc"
    shutil.rmtree(here.folder)
    assert here.put(b"abc") == ABC


@pytest.mark.parametrize("bytes_left", [b"", b"ab", b"abd"], ids=["empty", "short", "other"])
def test_a_damaged_file_in_the_cache_is_fetched_anew(here: Artifacts, there: Artifacts, bytes_left: bytes) -> None:
    here.put(b"abc")
    there.path(ABC).write_bytes(bytes_left)
    assert there.read(ABC) == b"abc", "noticed by the process that had fetched it"
    there.path(ABC).write_bytes(bytes_left)
    assert Artifacts(there.folder, there.remote).read(ABC) == b"abc", "noticed by a process that sees it first"
    there.path(ABC).write_bytes(bytes_left)
    assert there.put(b"abc") == ABC
    assert (there.folder / "ba" / ABC).read_bytes() == b"abc", "noticed when it is kept again"


def test_a_cached_file_costs_no_request_and_one_reading_of_it(here: Artifacts, server: Server) -> None:
    here.put(b"abc")
    server.kill()
    assert here.read(ABC) == b"abc"
    assert Artifacts(here.folder, here.remote).read(ABC) == b"abc"
    checked = dict(here._checked)
    here.read(ABC)
    assert here._checked == checked


def test_what_is_damaged_at_the_remote_is_never_handed_out(here: Artifacts, server: Server) -> None:
    server.files.pipe_file(server.place(ABC), b"abd")
    with pytest.raises(MissingArtifact, match=r"damaged at s3://.*remove that file"):
        here.read(ABC)
    assert not [path for path in here.folder.rglob("*") if path.is_file()]
    server.files.pipe_file(server.place(ABC), b"ab")  # cut short: keeping it again mends it
    here.put(b"abc")
    assert server.files.cat_file(server.place(ABC)) == b"abc"


def test_keeping_again_uploads_only_what_is_old_or_gone(
    here: Artifacts, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.put(b"abc")
    first = server.files.info(server.place(ABC))["LastModified"]
    time.sleep(1.1)  # S3 counts seconds
    here.put(b"abc")
    Artifacts(here.folder, here.remote).put(b"abc")
    assert server.files.info(server.place(ABC))["LastModified"] == first
    monkeypatch.setattr(store, "RENEWED_SECONDS", 0.5)
    Artifacts(here.folder, here.remote).put(b"abc")
    assert server.files.info(server.place(ABC))["LastModified"] > first
    server.files.rm_file(server.place(ABC))
    monkeypatch.undo()
    Artifacts(here.folder, here.remote).put(b"abc")
    assert server.digests() == [ABC]


def test_many_threads_and_processes_share_a_cache(here: Artifacts, there: Artifacts, server: Server) -> None:
    data = [bytes([number]) * 50_000 for number in range(6)]
    digests = [here.put(item) for item in data]
    script = (
        "import sys\nfrom pathlib import Path\nfrom buckets import *\n"
        "kept = Server(int(sys.argv[2])).artifacts(Path(sys.argv[1]))\n"
        "print(sum(len(kept.read(digest)) for digest in sys.argv[3:]))"
    )
    command = [sys.executable, "-c", script, str(there.folder), str(server.port), *digests]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    others = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there.read, digests * 8)) == data * 8
    assert [process.communicate(timeout=60)[0].strip() for process in others] == ["300000"] * 2
    assert sorted(path.name for path in there.folder.rglob("*") if path.is_file()) == sorted(digests)


def test_list_size_and_remove_speak_of_the_remote(here: Artifacts, there: Artifacts, server: Server) -> None:
    began = time.time()
    digests = {here.put(b"a" * size): size for size in (1, 20, 300)}
    server.files.pipe_file(f"{BUCKET}/artifacts/of somebody else", b"not ours")
    assert {kept.digest: kept.bytes for kept in there.list()} == digests
    assert all(began - 2 < kept.modified < time.time() + 2 for kept in there.list())
    gone, *left = digests
    assert here.size(gone) == there.size(f"file:{gone}") == 1
    here.remove(gone)
    here.remove(gone)
    assert sorted(kept.digest for kept in there.list()) == sorted(left)
    assert not here.has(gone)
    assert not here.here(gone)
    for kept in (here, there):
        with pytest.raises(MissingArtifact):
            kept.size(gone)


def test_an_outage_is_sat_out_and_a_line_that_breaks_in_the_middle_begins_anew(
    here: Artifacts, there: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3_000_000)
    digest = here.put(data)
    assert there.remote is not None
    there.remote.patience = 30.0
    files, opened, trouble = there.remote._files, [], [ConnectionResetError("reset"), TimeoutError("no answer")]
    real = files.open

    class Broken:
        def __init__(self, file: Any) -> None:
            self.file, self.close = file, file.close

        def read(self, size: int) -> bytes:
            if self.file.tell():
                raise ConnectionResetError("in the middle")
            return self.file.read(size)

    def troubled(*arguments: Any) -> Any:
        opened.append(arguments)
        if trouble:
            raise trouble.pop()
        return Broken(real(*arguments)) if len(opened) == 3 else real(*arguments)

    monkeypatch.setattr(files, "open", troubled)
    assert there.read(digest) == data
    assert len(opened) == 4
    assert [path.name for path in there.folder.rglob("*") if path.is_file()] == [digest]


def test_a_remote_that_stays_away_is_named_and_nothing_is_said_about_the_file(here: Artifacts, server: Server) -> None:
    server.kill()
    for ask in (here.has, here.read, here.size):
        with pytest.raises(RemoteOutage, match=f"s3://{BUCKET}/artifacts do not answer .*check NETASSAY_ARTIFACTS"):
            ask(ABC)
    with pytest.raises(RemoteOutage):
        here.put(b"abc")
    server.start()
    assert here.put(b"abc") == ABC
    assert server.digests() == [ABC]


def test_a_wrong_bucket_is_no_missing_artifact(server: Server, tmp_path: Path) -> None:
    elsewhere = Artifacts(tmp_path, Remote("s3://labratory/artifacts", patience=0.2))
    for ask in (elsewhere.has, elsewhere.read, lambda _: elsewhere.put(b"abc")):
        with pytest.raises(RemoteOutage, match=r"no such place as s3://labratory/artifacts.*create the bucket"):
            ask(ABC)


def test_without_credentials_it_is_said_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    began = time.monotonic()
    with pytest.raises(RemoteOutage, match=r"refuse us .*check the credentials"):
        server.artifacts(tmp_path, patience=60.0).put(b"abc")
    assert time.monotonic() - began < 20


@pytest.fixture
def shared_folder() -> Iterator[Remote]:
    """Not an object store: fsspec's files in memory stand for a file server's."""
    remote = Remote("memory://share/artifacts")
    remote._files.makedirs("/share", exist_ok=True)
    yield remote
    remote._files.rm("/share", recursive=True)


def test_a_file_system_gets_whole_files_too(tmp_path: Path, shared_folder: Remote) -> None:
    here, there = Artifacts(tmp_path / "here", shared_folder), Artifacts(tmp_path / "there", shared_folder)
    assert there.read(here.put(b"abc")) == b"abc"
    assert [kept.digest for kept in here.list()] == [ABC]
    assert shared_folder._files.find("/share") == [f"/share/artifacts/ba/{ABC}"], "no temporary file is left"
    here.remove(ABC)
    assert not here.has(ABC)


def test_on_a_file_system_a_file_is_written_beside_and_moved(
    tmp_path: Path, shared_folder: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, there = shared_folder._files.put_file, []

    def look(*about: Any, **more: Any) -> None:
        put(*about, **more)
        there.append(shared_folder._files.exists(f"/share/artifacts/ba/{ABC}"))

    monkeypatch.setattr(shared_folder._files, "put_file", look)
    Artifacts(tmp_path / "here", shared_folder).put(b"abc")
    assert there == [False], "while bytes arrived they stood under their name"
    assert shared_folder._files.cat(f"/share/artifacts/ba/{ABC}") == b"abc"


def test_what_is_damaged_in_a_cache_is_not_shared(tmp_path: Path, shared_folder: Remote) -> None:
    here = Artifacts(tmp_path / "cache", shared_folder)
    digest = here.put(b"abc")
    damaged = tmp_path / "cache" / digest[:2] / digest
    damaged.chmod(0o644)
    damaged.write_bytes(b"ab")
    assert Artifacts(tmp_path / "cache").put(b"abc") == digest  # a compute child: it knows of no remote, and trusts it
    with pytest.raises(FileNotFoundError):
        Artifacts(tmp_path / "cache", shared_folder).share(digest)
    assert Artifacts(tmp_path / "elsewhere", shared_folder).read(digest) == b"abc"


@pytest.mark.parametrize("url, says", [
    ("nonsense://place", "neither a folder nor a URL"),
    ("s3://key:secret@place:none/x", "s3://"),
])  # fmt: skip
def test_a_url_that_nobody_can_open_is_refused_in_words(url: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as raised:
        Artifacts(tmp_path, Remote(url, patience=0.1)).has(ABC)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("given, folder, url", [
    ("", "/home/lab/artifacts", "/home/lab/artifacts"),
    ("/srv/artifacts", "/srv/artifacts", "/srv/artifacts"),
    ("file:///srv/the%20artifacts", "/srv/the artifacts", "/srv/the artifacts"),
    ("file://localhost/srv", "/srv", "/srv"),
])  # fmt: skip
def test_a_folder_is_a_folder_however_it_is_written(given: str, folder: str, url: str) -> None:
    config = Settings(home=Path("/home/lab"), artifacts=given)
    assert (str(config.artifacts_folder), config.artifacts_url) == (folder, url)
    assert store.of(config).remote is None
    assert store.of(config) is store.of(config)


def test_a_url_has_a_cache_of_its_own_in_the_home_folder() -> None:
    one, two = (Settings(home=Path("/home/lab"), artifacts=f"s3://bucket/{name}") for name in ("one", "two"))
    assert one.artifacts_url == "s3://bucket/one"
    assert one.artifacts_folder.parent == Path("/home/lab/cache")
    assert one.artifacts_folder != two.artifacts_folder
    with pytest.raises(ValueError, match="three slashes"):
        Settings(artifacts="file://srv/artifacts")


def test_references_are_found_in_any_json_text() -> None:
    network, data, digest = f"onnx:{'1' * 64}", f"data:{'a' * 64}", "b" * 64
    body = json.dumps({"network": network, "nested": [{"x": data}], "text": f"see {network}, not {digest}"})
    assert named(body) == {network, data}
    assert named(None) == named("") == named(f"onnx:{'1' * 65}") == named(f"ONNX:{digest}") == set()


# --- in the supervisor ---------------------------------------------------------------------------------------------


@pytest.fixture
def bench(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A worker whose artifacts lie at the server; what is submitted goes there from a cache of its own."""
    monkeypatch.setenv("NETASSAY_METHODS", str(USER_METHODS))
    store._of.cache_clear()
    (tmp_path / "worker").mkdir()
    found = Bench(tmp_path / "worker", artifacts=server.url)
    assert found.supervisor.kept.remote is not None
    found.supervisor.kept.remote.patience = 0.2
    yield found
    found.supervisor.close()
    store._of.cache_clear()


def artifact(count: int = 1, **params: object) -> dict[str, object]:
    return {"method": "poison.artifact", "params": params, "grid": {"tag": {"range": [0, count]}}}


def kept_digests(bench: Bench) -> list[str]:
    return sorted(path.name for path in bench.supervisor.kept.folder.rglob("*") if path.is_file())


def test_jobs_find_here_what_their_params_name_and_others_find_what_they_keep(
    bench: Bench, there: Artifacts, server: Server
) -> None:
    reference = f"onnx:{there.put(b'abc')}"
    (record,) = bench.run("one", artifact(network=reference, keep="made"))
    assert record.state == "done", record.message
    assert record.result is not None
    assert record.result["digest"] == hashlib.sha256(b"abc").hexdigest()
    assert record.result["secrets"] == [], "the child opens nothing that is not on its host"
    assert there.read(record.result["kept"]) == b"made"
    assert ABC in kept_digests(bench)


def test_arrays_of_results_are_read_on_another_host(bench: Bench, there: Artifacts) -> None:
    (record,) = bench.run("values", {"method": "poison.values", "params": {"size": 20_000}})
    with store.using(there):
        assert record.array("array")[-1] == 19_999 / 3


def test_a_recipe_brings_the_data_that_it_names(bench: Bench, there: Artifacts) -> None:
    data = f"data:{there.put(b'numbers')}"
    recipe = f"recipe:{there.put(json.dumps({'dataset': data}).encode())}"
    (record,) = bench.run("recipe", artifact(data=recipe))
    assert record.state == "done", record.message
    assert there.put(b"numbers") in kept_digests(bench)


def test_a_reference_to_nothing_fails_its_own_job_and_says_where_it_was_looked_for(
    bench: Bench, there: Artifacts
) -> None:
    nothing, something = f"onnx:{'0' * 64}", f"onnx:{there.put(b'abc')}"
    jobs = {**artifact(), "grid": {"data": [something, nothing, "", f"file:{ABC}"]}}
    records = bench.run("mixed", jobs)
    assert [record.state for record in records] == ["done", "failed", "done", "done"]
    assert records[1].cause == "store"
    assert records[1].message.startswith(f"{nothing} is not among the artifacts at s3://{BUCKET}/artifacts; submit")


def test_a_text_that_looks_like_a_reference_is_a_text(bench: Bench) -> None:
    text = f"onnx:{'0' * 64}"
    (record,) = bench.run("echo", {"method": "diagnostics.echo", "params": {"value": text}})
    assert record.state == "done", record.message
    assert record.result is not None
    assert record.result["value"] == text


def test_a_cache_that_is_deleted_under_a_job_costs_it_nothing(bench: Bench, there: Artifacts, tmp_path: Path) -> None:
    reference = f"onnx:{there.put(b'abc')}"
    records = bench.run("swept", artifact(6, network=reference, sweep=str(tmp_path / "swept")))
    assert [record.state for record in records] == ["done"] * 6, records[0].message
    assert (tmp_path / "swept").exists()


def test_while_the_remote_is_out_jobs_wait_and_those_that_need_nothing_run(
    bench: Bench, there: Artifacts, server: Server
) -> None:
    reference = f"onnx:{there.put(b'abc')}"
    bench.submit("waits", artifact(3, network=reference))
    bench.submit("runs", {"method": "diagnostics.echo", "grid": {"value": {"range": [0, 5]}}})
    server.kill()
    for _ in range(4):
        if chunk := bench.publish():
            bench.supervisor.run(chunk)
    assert [record.state for record in bench.records("waits")] == ["pending"] * 3
    assert bench.query("SELECT count(*) FROM attempt")[0][0] == 0
    server.start()
    server.artifacts(there.folder).put(b"abc")
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    assert [record.state for record in bench.records("waits")] == ["done"] * 3
    assert [record.state for record in bench.records("runs")] == ["done"] * 5


def in_a_thread(bench: Bench, chunk: int | None) -> threading.Thread:
    thread = threading.Thread(target=bench.supervisor.run, args=(chunk,))
    thread.start()
    return thread


def test_results_are_held_until_others_can_read_what_they_name(bench: Bench, there: Artifacts, server: Server) -> None:
    bench.submit("held", artifact(2, keep="made"))
    server.kill()
    thread = in_a_thread(bench, bench.publish())
    until(lambda: kept_digests(bench), what="the job's own file")
    time.sleep(0.5)
    assert thread.is_alive()
    assert [record.state for record in bench.records("held")] == ["running", "pending"]
    server.start()
    thread.join(30)
    while chunk := bench.publish():
        bench.supervisor.run(chunk)
    records = bench.records("held")
    assert [record.state for record in records] == ["done"] * 2
    assert all(record.result and there.read(record.result["kept"]) == b"made" for record in records)


def test_a_result_whose_artifact_was_lost_before_it_was_shared_is_no_result(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = bench.supervisor.kept
    share = kept.share

    def too_late(*arguments: Any) -> None:
        shutil.rmtree(kept.folder)
        share(*arguments)

    monkeypatch.setattr(kept, "share", too_late)
    (record,) = bench.run("lost", artifact(keep="made"))
    assert (record.state, record.cause) == ("failed", "store")
    assert "neither on the worker's host nor at s3://" in record.message
    monkeypatch.undo()
    monkeypatch.setenv("NETASSAY_METHODS", str(USER_METHODS))
    assert control.retry(bench.database, "lost", "store") == 1
    bench.supervisor.run(bench.publish() or 0)
    assert bench.records("lost")[0].state == "done"


def test_a_worker_that_has_to_end_meanwhile_gives_these_jobs_back_and_keeps_the_others(
    bench: Bench, server: Server
) -> None:
    bench.submit("ends", {"method": "poison.artifact", "grid": {"tag": [0, 1], "keep": ["", "made"]}})
    bench.supervisor.run(bench.publish() or 0)  # the first goes alone
    server.kill()
    thread = in_a_thread(bench, bench.publish())
    until(lambda: kept_digests(bench), what="the job's own file")
    time.sleep(0.5)
    assert thread.is_alive()
    bench.supervisor.stop()
    bench.supervisor._stop_at = time.monotonic()
    thread.join(20)
    assert not thread.is_alive()
    assert [record.state for record in bench.records("ends")] == ["done", "pending", "done", "pending"]
    assert bench.query("SELECT count(*) FROM running")[0][0] == 0
