"""The monitor: what it says of a lab is what the store says, and it says so when a part of the lab is out."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from labs import KINDS, Lab, a_lab, until, variables
from prometheus_client.parser import text_string_to_metric_families
from services import STORES, RedisServer, new_store
from sqlalchemy import text
from store_by_hand import done, drain, failed, finish, jobs, publish, sign_on, submit, take

from netassay.job import CAUSES, ENDS
from netassay.settings import Settings
from netassay.store import control, measures, reading, running
from netassay.store.database import SCHEMA, Database
from netassay.store.dispatching import key_prefix
from producer import lab as embedded_lab
from producer import monitor as monitoring
from producer.monitor import Monitor, StoreLook

DOCS = Path(__file__).parents[1] / "docs"
Numbers = dict[tuple[str, frozenset[tuple[str, str]]], float]


def fetch(address: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(address, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def parsed(exposition: bytes) -> Numbers:
    """(name, labels) -> value, read by Prometheus' own parser. Each stands there once."""
    found: Numbers = {}
    for family in text_string_to_metric_families(exposition.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            place = sample.name, frozenset(sample.labels.items())
            assert place not in found, place
            found[place] = sample.value
    return found


def of(numbers: Numbers, name: str) -> dict[Any, float]:
    """The values of one name: by its only label, or by the values of its labels in the order of their names."""
    found = {}
    for (called, labels), value in numbers.items():
        if called == name:
            values = tuple(value for _, value in sorted(labels))
            found[values[0] if len(values) == 1 else values] = value
    return found


@contextlib.contextmanager
def watched(kind: str, slots: int = 2, **environment: str) -> Iterator[tuple[Lab, str]]:
    """A lab of this kind with its monitor, which finds it well; and the monitor's address."""
    with a_lab(kind, slots, start=False, **environment) as lab:
        with variables(lab.environment):
            address = embedded_lab.up(lab.config, slots, flower=False, monitor=True)["monitor"]
        until(lambda: fetch(f"{address}/healthz")[0] == 200, what="a lab that is well")
        yield lab, address


def wrong(address: str) -> set[str]:
    """The parts that are not well, by /healthz; each with a reason, and the code says whether there are any."""
    code, body = fetch(f"{address}/healthz")
    about = json.loads(body)
    parts = {part for part, check in about["checks"].items() if not check["well"]}
    assert all(bool(check["reason"]) is not check["well"] for check in about["checks"].values())
    assert about["well"] is not bool(parts)
    assert code == (503 if parts else 200)
    return parts


# --- a lab ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_what_the_store_the_broker_and_the_disk_say(kind: str) -> None:
    with a_lab(kind, LOST_AFTER="3") as lab:
        lab.submit("good", lab.entry("diagnostics.echo", grid={"value": {"range": [0, 400]}}))
        lab.submit("overlapping", lab.entry("diagnostics.echo", grid={"value": {"range": [300, 500]}}))
        lab.submit("bad", lab.entry("diagnostics.fail", {"cause": "error"}, grid={"tag": [1, 2, 3]}))
        lab.submit("deadly", lab.entry("diagnostics.crash", grid={"tag": [1]}))
        lab.wait("good", "overlapping", "bad", "deadly")
        embedded_lab.down(lab.config)
        lab.submit("waiting", lab.entry("diagnostics.sleep", {"seconds": 2.0}, grid={"tag": {"range": [0, 7]}}))
        lab.submit("paused", lab.entry("diagnostics.echo", grid={"value": ["a", "b"]}))
        control.pause(lab.database, "paused")
        until(lambda: not lab.processes(), what="the end of the lab")
        config = lab.config
        with contextlib.ExitStack() as stack:
            if lab.server is None:
                server = RedisServer(lab.home / "own")
                server.start()
                stack.callback(server.kill)
                config = config.model_copy(update={"broker": server.url})
            client = redis.Redis.from_url(config.broker)
            client.rpush(f"{key_prefix(lab.database)}netassay", *"abc")
            artifacts = config.artifacts_folder
            (artifacts / "ab").mkdir(parents=True, exist_ok=True)
            (artifacts / "ab" / ("ab" * 32)).write_bytes(b"x" * 1234)
            monitor = Monitor(config)
            monitor.start()
            stack.callback(monitor.stop)
            until(lambda: monitor.store.summed > 0 and monitor.broker.answer and monitor.disk.answer)
            numbers = parsed(monitor.exposition())
            used = client.info("memory")["used_memory"]

        state = "coalesce(r.state, 'waiting')"
        of_jobs = lab.query(
            f"SELECT b.state, {state}, count(*) FROM batch b JOIN membership m ON m.batch_id = b.id"
            " LEFT JOIN record r ON r.job_id = m.job_id GROUP BY 1, 2"
        )
        expected = {(row[0], row[1]): row[2] for row in of_jobs}
        assert sum(expected.values()) == 400 + 200 + 3 + 1 + 7 + 2
        assert {both: n for both, n in of(numbers, "netassay_jobs").items() if n} == expected
        assert set(of(numbers, "netassay_jobs")) == set(
            itertools.product(measures.BATCH_STATES, ("waiting", "running", *ENDS))
        )
        of_methods = lab.query(
            "SELECT v.name, r.state, count(*) FROM membership m JOIN job j ON j.id = m.job_id"
            " JOIN method_version v ON v.id = j.method_id JOIN record r ON r.job_id = m.job_id GROUP BY 1, 2"
        )
        ended = {both: n for both, n in of(numbers, "netassay_method_jobs").items() if n}
        assert ended == {(row[0], row[1]): row[2] for row in of_methods}
        batches = Counter({"arriving": 0}) | Counter(row[0] for row in lab.query("SELECT state FROM batch"))
        assert {one: n for one, n in of(numbers, "netassay_batches").items() if n} == batches
        chunks = Counter(row[0] for row in lab.query("SELECT state FROM chunk"))
        assert {one: n for one, n in of(numbers, "netassay_chunks").items() if n} == chunks
        ((hint,),) = lab.query("SELECT s.hint FROM segment s JOIN batch b ON b.id = s.batch_id WHERE b.name='waiting'")
        assert of(numbers, "netassay_backlog_seconds") == {(): pytest.approx(7 * hint)}
        assert of(numbers, "netassay_attempts_total") == dict.fromkeys(CAUSES, 0) | {"crash": 3}
        lost = lab.query("SELECT count(*) FROM worker WHERE state = 'lost'")[0][0]
        assert of(numbers, "netassay_worker_losses_total") == {(): lost}
        assert of(numbers, "netassay_workers") == {"alive": 0, "silent": 0}
        assert of(numbers, "netassay_slots") == of(numbers, "netassay_slots_busy") == {(): 0}
        assert of(numbers, "netassay_messages_waiting") == {(): 3}
        assert of(numbers, "netassay_redis_memory_bytes")[()] == pytest.approx(used, rel=0.5)
        assert of(numbers, "netassay_artifacts") == {(): 1}
        assert of(numbers, "netassay_artifacts_bytes") == {(): 1234}
        free = psutil.disk_usage(str(lab.home)).free
        assert of(numbers, "netassay_disk_free_bytes")["home"] == pytest.approx(free, rel=0.05)
        (size,) = of(numbers, "netassay_store_bytes").values()
        if lab.database.sqlite:
            assert size >= Path(lab.database.url.database or "").stat().st_size
        else:
            assert size == pytest.approx(lab.query("SELECT pg_database_size(current_database())")[0][0], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_when_the_worker_is_gone_and_when_it_is_back(kind: str) -> None:
    with watched(kind, LOST_AFTER="3") as (lab, address):
        lab.submit("long", lab.entry("diagnostics.sleep", {"seconds": 60.0}, grid={"tag": [1, 2]}))
        until(lambda: len(lab.started()) == 2, what="two running jobs")
        numbers = until(
            lambda: (
                (found := parsed(fetch(f"{address}/metrics")[1]))
                and of(found, "netassay_slots_busy").get(()) == 2
                and found
            ),
            what="two busy slots",
        )
        assert of(numbers, "netassay_slots") == {(): 2}
        assert of(numbers, "netassay_jobs")["open", "running"] == 2
        # Its supervisor would start another worker at once.
        os.kill(lab.pid("lab"), signal.SIGSTOP)
        try:
            lab.kill("worker")
            until(lambda: wrong(address) == {"workers"}, seconds=20, what="a complaint about the workers")
            numbers = until(
                lambda: (
                    (found := parsed(fetch(f"{address}/metrics")[1]))
                    and of(found, "netassay_worker_losses_total").get(()) == 1
                    and found
                ),
                what="the loss as a number",
            )
            assert of(numbers, "netassay_up")["workers"] == 0
            assert of(numbers, "netassay_slots") == {(): 0}
            assert "netassay worker" in json.loads(fetch(f"{address}/healthz")[1])["checks"]["workers"]["reason"]
        finally:
            os.kill(lab.pid("lab"), signal.SIGCONT)
        until(lambda: wrong(address) == set(), what="a lab that is well again")
        control.cancel(lab.database, "long")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_that_is_out_takes_the_dispatcher_with_it_and_nothing_else(kind: str) -> None:
    with watched(kind) as (lab, address):
        pid = lab.pid("redis")
        if lab.server is None:
            os.kill(lab.pid("lab"), signal.SIGSTOP)  # it would start another Redis at once
        try:
            lab.kill("redis")
            until(lambda: wrong(address) == {"broker", "dispatcher"}, seconds=20, what="a complaint about the broker")
            numbers = parsed(fetch(f"{address}/metrics")[1])
            assert of(numbers, "netassay_up") == {"broker": 0, "dispatcher": 0, "store": 1, "workers": 1, "disk": 1}
            assert not of(numbers, "netassay_messages_waiting")
            assert of(numbers, "netassay_batches")
        finally:
            if lab.server is None:
                os.kill(lab.pid("lab"), signal.SIGCONT)
        lab.restarted("redis", pid)
        until(lambda: wrong(address) == set(), what="a lab that is well again")


def test_it_answers_sensibly_whatever_is_asked_and_slow_clients_hold_up_nobody() -> None:
    with watched("embedded") as (lab, address):
        assert fetch(f"{address}/livez") == (200, b'{"alive":true}')
        assert fetch(f"{address}/livez", Host="elsewhere.example.org")[0] == 200
        assert fetch(f"{address}/metrics", "HEAD") == (200, b"")
        assert [fetch(f"{address}/{path}")[0] for path in ("", "nothing", "metrics/", "%00", "../etc/passwd")] == [
            404, 404, 200, 404, 404,
        ]  # fmt: skip
        assert [fetch(f"{address}/healthz", method)[0] for method in ("POST", "PUT", "DELETE")] == [405] * 3
        host, _, port = address.removeprefix("http://").rpartition(":")
        assert host == "127.0.0.1"
        with contextlib.ExitStack() as stack:
            for sent in [b"", b"GET /metrics HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1000] * 20:
                slow = stack.enter_context(socket.create_connection((host, int(port))))
                slow.sendall(sent)
            began = time.monotonic()
            for _ in range(20):
                assert fetch(f"{address}/healthz")[0] == 200
            assert time.monotonic() - began < 10
            garbage = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            garbage.sendall(b"\x16\x03\x01" + secrets.token_bytes(500) + b"\r\n\r\n")
            received = garbage.recv(100)
            assert not received or received.startswith(b"HTTP/1.1 400")
        assert lab.described()["services"]["monitor"]
        before = lab.kill("monitor")
        lab.restarted("monitor", before)
        until(lambda: fetch(f"{address}/healthz")[0] == 200, what="the monitor at its old address")


# --- its parts -----------------------------------------------------------------------------------------------------


def test_no_password_is_shown_when_nothing_answers(tmp_path: Path) -> None:
    config = Settings(
        home=tmp_path,
        broker="redis://netassay:wonderful@127.0.0.1:1/0",
        store="postgresql://netassay:splendid@127.0.0.1:1/netassay",
    )
    monitor = Monitor(config)
    monitor.start()
    try:
        until(lambda: monitor.store.error and monitor.broker.error, what="both complaints")
        until(lambda: of(parsed(monitor.exposition()), "netassay_up")["disk"], what="a look at the disk")
        said = json.dumps(monitor.health()) + monitor.exposition().decode()
    finally:
        monitor.stop()
    assert "wonderful" not in said
    assert "splendid" not in said
    assert of(parsed(monitor.exposition()), "netassay_up") == {
        "store": 0, "broker": 0, "dispatcher": 0, "workers": 0, "disk": 1,
    }  # fmt: skip
    assert not (tmp_path / "store.sqlite").exists()


def test_a_store_of_another_version_is_not_well(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'store.sqlite'}")
    database.prepare()
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    monitor = Monitor(Settings(home=tmp_path))
    monitor.store.answer = monitor.store.ask(True)
    monitor.store.ended = time.monotonic()
    assert f"schema 9999, this program is of schema {SCHEMA}" in monitor.health()["store"]
    assert monitor.health()["workers"] == "cannot be seen without the store"


def test_a_look_that_hangs_is_told_of_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "LATE_SECONDS", 0.5)
    Database(f"sqlite:///{tmp_path / 'store.sqlite'}").prepare()
    monitor = Monitor(Settings(home=tmp_path, broker="redis://127.0.0.1:1/0"))
    monitor.store.every = monitor.disk.every = 0.05
    gate = []

    def hang(sums: bool) -> Any:
        until(lambda: gate, what="the end of the test")
        raise OSError("over")

    monitor.disk.ask = hang
    monitor.start()
    try:
        until(lambda: monitor.store.answer is not None and monitor.health()["store"] == "", what="the store")
        time.sleep(0.6)
        assert monitor.health()["disk"] == "the disk has not answered yet"
        assert monitor.health()["store"] == ""
    finally:
        gate.append(True)
        monitor.stop()


@pytest.mark.parametrize("kind", STORES)
def test_what_has_ended_only_rises_though_a_retry_takes_it_back(kind: str, tmp_path: Path) -> None:
    with new_store(kind, tmp_path) as database:
        look = StoreLook(database)
        look(True)
        worker = sign_on(database)
        submit(database, "batch", jobs(range(10)))
        drain(database, worker, failed("error"))
        failed_jobs = ("diagnostics.echo", "failed")
        assert look(True).ended[failed_jobs] == 10
        assert control.retry(database, "batch") == 10
        seen = look(True)
        assert seen.sums is not None
        assert seen.sums.methods[failed_jobs] == 0
        assert seen.ended[failed_jobs] == 10
        drain(database, worker, done)
        assert look(True).ended == {failed_jobs: 10, ("diagnostics.echo", "done"): 10,
                                    ("diagnostics.echo", "not_applicable"): 0}  # fmt: skip


@pytest.mark.parametrize("kind", STORES)
def test_jobs_add_up_while_they_run(kind: str, tmp_path: Path) -> None:
    with new_store(kind, tmp_path) as database:
        worker = sign_on(database)
        submit(database, "one", jobs(range(50), seconds=0.5))
        submit(database, "two", jobs(range(40, 70), seconds=0.5))
        finish(database, worker, take(database, worker))
        claim = take(database, worker)
        publish(database, most=3)
        found = measures.measure(database)
        of_batches = {seen.name: seen for seen in reading.batches(database)}
        for state in ("done", "running", "waiting"):
            assert found.jobs["open", state] == sum(getattr(seen, state) for seen in of_batches.values())
        assert found.jobs["open", "running"] == len(claim.tasks) > 0
        assert found.busy == found.chunks["claimed"] == 1
        assert found.chunks["published"] == 3
        left = found.jobs["open", "waiting"]
        assert found.backlog == pytest.approx(0.5 * left)


@pytest.mark.parametrize("kind", STORES)
def test_a_counter_seen_for_the_first_time_is_no_sign_of_life(kind: str, tmp_path: Path) -> None:
    with new_store(kind, tmp_path) as database:
        look = StoreLook(database)
        dead = sign_on(database, "dead")
        assert look(False).moving(10.0) == []
        assert look(False).moving(10.0) == []
        alive = sign_on(database, "new")
        running.renew(database, dead, {})
        assert [worker.id for worker in look(False).moving(10.0)] == [dead, alive]
        time.sleep(0.3)
        running.renew(database, alive, {})
        assert [worker.id for worker in look(False).moving(0.2)] == [alive]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", STORES)
def test_a_scrape_of_a_million_jobs_costs_little(kind: str, tmp_path: Path) -> None:
    """A thousand chunks of a hundred jobs have ended; then there are half a million chunks, as of jobs of a second."""
    with new_store(kind, tmp_path) as database:
        worker = sign_on(database)
        submit(database, "million", jobs(range(1_000_000), seconds=0.02))
        for _ in range(1_000):
            finish(database, worker, take(database, worker))
        found, seconds = _timed(database)
        assert sum(found.jobs.values()) == 1_000_000
        assert found.jobs["open", "done"] == reading.progress(database, "million").done > 80_000
        print(f"{kind}: {sum(found.chunks.values()):,} chunks, median of 9: {1000 * seconds:.1f} ms")
        assert seconds < 0.5
        with database.write() as connection:
            connection.execute(
                text(
                    "INSERT INTO chunk (segment_id, batch_id, start, stop, state) SELECT c.segment_id, c.batch_id,"
                    " c.start, c.stop, c.state FROM chunk c, membership m WHERE m.batch_id = 1 AND m.ordinal < 500"
                )
            )
        found, seconds = _timed(database)
        assert sum(found.chunks.values()) > 500_000
        print(f"{kind}: {sum(found.chunks.values()):,} chunks, median of 9: {1000 * seconds:.1f} ms")
        assert seconds < 10


def _timed(database: Database) -> tuple[measures.Measures, float]:
    """What is measured, and the median of the seconds that it takes."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        found = measures.measure(database)
        times.append(time.perf_counter() - began)
    return found, statistics.median(times)


# --- what the pages say --------------------------------------------------------------------------------------------


def told(tmp_path: Path) -> Numbers:
    """All numbers of a lab of which every part answers, by a monitor that never asks."""
    database = Database(f"sqlite:///{tmp_path / 'store.sqlite'}")
    database.prepare()
    submit(database, "batch", jobs(range(3)))
    monitor = Monitor(Settings(home=tmp_path))
    monitor.store.answer = monitor.store.ask(True)
    monitor.broker.answer = monitoring.BrokerSeen(0.0, 0, 1, "7")
    monitor.disk.answer = monitor.disk.ask(True)
    for look in monitor.looks:
        look.ended = time.monotonic()
    return parsed(monitor.exposition())


def test_the_page_names_every_number_and_its_labels(tmp_path: Path) -> None:
    page = (DOCS / "operations.md").read_text().split("\n| metric |", 1)[1].partition("\n\n")[0]
    named = {}
    for line in page.splitlines()[2:]:
        names, labels, _ = line.strip("|").split("|", 2)
        for name in re.findall(r"`(\w+)`", names):
            named[name] = set(re.findall(r"`(\w+)`", labels))
    there: dict[str, set[str]] = {}
    for name, labels in told(tmp_path):
        there.setdefault(name, set()).update(label for label, _ in labels)
    assert named == there


def test_the_alerts_of_the_page_are_about_numbers_and_labels_that_there_are(tmp_path: Path) -> None:
    numbers = told(tmp_path)
    known = {name for name, _ in numbers} | {"up"}
    values = {(label, value) for _, labels in numbers for label, value in labels} | {("job", "netassay")}
    page = (DOCS / "deployment.md").read_text()
    scraped, rules = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S))
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": [embedded_lab.MONITOR_ADDRESS]}]
    (group,) = rules["groups"]
    assert len(group["rules"]) >= 4
    for rule in group["rules"]:
        assert set(re.findall(r"\b(?:netassay_\w+|up)\b", rule["expr"])) <= known
        assert set(re.findall(r'(\w+)="(\w+)"', rule["expr"])) <= values
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert set(shown) <= {label for label, _ in values}
