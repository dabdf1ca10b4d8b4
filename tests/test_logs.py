"""What the services write about themselves, for people and for machines."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from labs import KINDS, a_lab, until, variables

from netassay import logs
from netassay.settings import Settings
from producer import lab
from producer import lab as embedded_lab


@pytest.fixture
def configured() -> Iterator[None]:
    logs.configure("test")
    yield
    structlog.reset_defaults()


def test_a_traceback_shows_where_but_not_what_variables_hold(
    configured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(config: Settings) -> None:
        raise RuntimeError("it does not answer")

    config = Settings(broker="redis://netassay:wonderful@host/0", store="postgresql://netassay:splendid@host/db")
    try:
        connect(config)
    except RuntimeError:
        structlog.get_logger().exception("renewal_failed")
    said = capsys.readouterr().out
    assert "in connect" in said
    assert "it does not answer" in said
    assert "wonderful" not in said
    assert "splendid" not in said


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"BROKER": "nonsense"}, "NETASSAY_BROKER is no address of a Redis"),
        ({"BROKER": "redis://127.0.0.1:1/0", "STORE": "sqlite:////proc/none/store.sqlite"}, "the store"),
    ],
)
def test_a_dispatcher_that_cannot_start_says_why_in_a_sentence(
    settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    given = {f"NETASSAY_{name}": value for name, value in ({"HOME": str(tmp_path)} | settings).items()}
    ended = subprocess.run(
        [sys.executable, "-m", "producer.dispatch"], env=os.environ | given, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"the dispatcher cannot start: {told}")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "described, broker",
    [("redis+socket:///run/redis.sock", "redis+socket:///run/redis.sock"), ("redis://netassay:***@host/0", "")],
)
def test_only_the_private_redis_of_a_lab_is_taken_from_its_description(
    described: str, broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.Place, "described", lambda place: {"broker": described})
    assert lab.broker_of(Settings(home=tmp_path)) == broker
    assert lab.broker_of(Settings(home=tmp_path, broker="redis://other/0")) == "redis://other/0"


# --- for machines --------------------------------------------------------------------------------------------------


def events(log: bytes) -> list[dict[str, Any]]:
    """The events of a log, each of which is one line of strict JSON with all that every event has."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = []
    for line in log.splitlines():
        event = json.loads(line, parse_constant=refuse)
        when = datetime.datetime.fromisoformat(event["timestamp"])
        assert event["timestamp"].endswith("Z")
        assert len(event["timestamp"]) == len("2026-01-01T00:00:00.000Z")
        assert abs((datetime.datetime.now(datetime.UTC) - when).total_seconds()) < 3600
        assert event["level"] in ("debug", "info", "warning", "error", "critical")
        assert event["event"]
        assert event["logger"]
        assert event["host"]
        assert event["process"]
        found.append(event)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_every_service_is_an_event_whatever_dies(kind: str) -> None:
    with a_lab(kind, start=False, LOST_AFTER="3") as lab:
        config = lab.config.model_copy(update={"logs": "json"})
        with variables(lab.environment):
            described = embedded_lab.up(config, 2, flower=True, monitor=True)
        lab.submit("deadly", lab.entry("diagnostics.crash", grid={"tag": [1]}))
        lab.submit("printing", lab.entry("diagnostics.echo", grid={"value": list(range(50))}))
        lab.wait("deadly", "printing", seconds=120)
        redis, worker, dispatcher = lab.pid("redis"), lab.pid("worker"), lab.pid("dispatcher")
        lab.kill("redis", signal.SIGTERM)
        until(lambda: b"broker_out" in (lab.home / "logs" / "dispatcher.log").read_bytes() or kind == "embedded")
        lab.restarted("redis", redis)
        lab.kill("worker")
        lab.restarted("worker", worker)
        lab.kill("dispatcher", signal.SIGTERM)
        lab.restarted("dispatcher", dispatcher)
        lab.submit("after", lab.entry("diagnostics.echo", grid={"value": list(range(50, 100))}))
        lab.wait("after", seconds=120)
        urllib.request.urlopen(described["flower"] + "/workers", timeout=30).close()
        urllib.request.urlopen(described["monitor"] + "/metrics", timeout=30).close()
        embedded_lab.down(config)
        of_services: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for log in (lab.home / "logs").glob("*.log"):
            of_services[log.stem] = events(log.read_bytes())
            assert {event["process"] for event in of_services[log.stem]} <= {log.stem}
    (died, *others) = [event for event in of_services["worker"] if event["event"] == "child_died"]
    assert len(others) == 2
    assert died["batch"] == "deadly"
    assert died["chunk"] > 0
    assert died["worker"] > 0
    assert died["logger"] == "netassay.worker"
    signed = [event for event in of_services["worker"] if event["event"] == "signed_on"]
    assert len(signed) >= 2
    assert signed[0]["pid"] == worker
    assert {"service_ended"} <= {event["event"] for event in of_services["lab"]}
    ended = {event["service"] for event in of_services["lab"] if event["event"] == "service_ended"}
    assert {"worker", "dispatcher"} <= ended
    if kind == "embedded":
        assert any("ready to accept connections" in event["event"].lower() for event in of_services["redis"])
        assert "redis" in ended


SCRIPT = r"""
import logging, sys, threading, warnings
import structlog
from netassay import logs

logs.configure("test", lambda: {"worker": 7})
log = structlog.get_logger("netassay.test")
log.info("said", chunk=3, address="redis://user:wonderful@host/0", number=float("nan"), path=object())
logging.getLogger("library").warning("it costs %d %%", 5)
logging.getLogger("library").info("unheard")
print("two\nlines"); print("half", end=""); print(" and half"); print("to stderr", file=sys.stderr)
warnings.warn("old", DeprecationWarning)
with structlog.contextvars.bound_contextvars(batch="b"):
    try:
        secret = "splendid"
        raise ValueError("postgresql://user:splendid@host/db does not answer")
    except ValueError:
        log.exception("failed")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("\ud800 the end")
"""


def test_whatever_a_process_says_becomes_events_without_passwords() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", SCRIPT],
        env={**os.environ, "NETASSAY_LOGS": "json"},
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr == b""
    assert b"wonderful" not in ended.stdout
    assert b"splendid@" not in ended.stdout
    found = events(ended.stdout)
    assert all(event["process"] == "test" and event["worker"] == 7 for event in found)
    said = [event["event"] for event in found]
    assert said[:6] == ["said", "it costs 5 %", "two", "lines", "half and half", "to stderr"]
    assert "old" in said[6]
    assert said[7:] == ["failed", "uncaught", "uncaught"]
    first, failed = found[0], found[7]
    assert (first["chunk"], first["number"], first["level"]) == (3, "nan", "info")
    assert first["address"] == "redis://user:***@host/0"
    assert (failed["batch"], failed["level"], failed["logger"]) == ("b", "error", "netassay.test")
    assert "Traceback" in failed["exception"]
    assert "postgresql://user:***@host/db does not answer" in failed["exception"]
    assert "ZeroDivisionError" in found[8]["exception"]


@pytest.mark.parametrize("module, why", [
    ("producer.dispatch", "the dispatcher cannot start: NETASSAY_BROKER is no address of a Redis"),
    ("producer.monitor", "the monitor cannot start: nobody can listen at"),
])  # fmt: skip
def test_a_service_that_cannot_start_says_why_in_an_event(module: str, why: str, tmp_path: Path) -> None:
    given = {"NETASSAY_HOME": str(tmp_path), "NETASSAY_BROKER": "nonsense", "NETASSAY_LOGS": "json",
             "NETASSAY_MONITOR": "127.0.0.1:99999999"}  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", module], env=os.environ | given, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    (event,) = events(ended.stdout + ended.stderr)
    assert event["event"] == "cannot_go_on"
    assert event["why"].startswith(why)


def test_what_a_service_prints_in_no_form_at_all_is_put_into_events(tmp_path: Path) -> None:
    log = tmp_path / "redis.log"
    command = ["printf", r'plain\n\377\376 raw\n\n{"event": "mine"}\n[1]\n"text"\nno end']
    service = embedded_lab.Service("redis", command, os.environ, log, relayed=True)
    service.start()
    until(lambda: log.is_file() and b"no end" in log.read_bytes(), what="the log")
    lines = log.read_bytes().splitlines()
    assert json.loads(lines.pop(2)) == {"event": "mine"}
    said = events(b"\n".join(lines))
    assert [event["event"] for event in said] == ["plain", "\ufffd\ufffd raw", "[1]", '"text"', "no end"]
    assert {event["process"] for event in said} == {"redis"}
