"""What worker and dispatcher write about themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from netassay import logs
from netassay.settings import Settings
from producer import lab


@pytest.fixture
def configured() -> Iterator[None]:
    logs.configure()
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
