"""The page of the benchmarks says what the figures say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    about = importlib.util.spec_from_file_location("peers_page", PEERS / "page.py")
    assert about is not None
    assert about.loader is not None
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


def runs(*rates: float, jobs: int = 1000) -> list[dict[str, Any]]:
    """Figures of runs at so many jobs a second."""
    return [{"jobs": jobs, "seconds": jobs / rate, "redis": 900 * jobs, "peak": 50 << 20, "cpu": 0.5} for rate in rates]


@pytest.fixture
def figures() -> dict[str, Any]:
    return {
        "machine": {"cores": "2", "memory": "24 GiB", "processor": "AMD", "system": "Linux 6", "Python": "3.11"},
        "repeats": 3,
        "disk": {"milliseconds": [1.0, 2.0, 3.0]},
        "submission": {
            "netassay submit": runs(40_000, 48_000, 60_000),
            "netassay in Python": runs(60_000),
            "celery always": runs(400, 500),
            "celery always, full": runs(480),
            "rq always": runs(10_000, 8_000, 12_000),
        },
        "rates": {
            "netassay, one by one": {"trivial": runs(2_200)},
            "netassay": {"trivial": runs(20_000, 22_000, 90_000), "1 ms": runs(1_000)},
            "Celery": {"trivial": runs(500, 2_000, 550), "1 ms": runs(500)},
            "RQ": {"trivial": runs(50)},
            "Pool": {"trivial": runs(10**6), "1 ms": runs(2_000)},
        },
        "efficiency": {
            "Pool of 1": runs(10.0, 8.0, 10.0),
            "netassay, 1 slots": runs(9.8, 7.9, 9.9),
            "Pool of 2": runs(20.0, 10.0, 19.0),
            "netassay, 2 slots": runs(19.0, 9.8, 18.62),
        },
    }


def test_what_was_asked_for_is_judged_by_medians(page: ModuleType, figures: dict[str, Any]) -> None:
    assert {name: measured for name, (measured, _) in page.verdicts(figures).items()} == pytest.approx(
        {
            "durable submission, `netassay submit` / Celery": 100.0,
            "durable submission, `netassay submit` / RQ": 4.8,
            "trivial jobs end to end, a thousand a call, netassay / Celery": 40.0,
            # Of each repeat 0.95, 0.98, 0.98. Two slots gain 19/9.8, 9.8/7.9, 18.62/9.9 on one; the Pool 2, 1.25, 1.9.
            "jobs of 100 ms, netassay / Pool": 0.98,
            "two slots against one, netassay / Pool": (18.62 / 9.9) / 1.9,
        }
    )


def test_the_page_shows_median_and_range_and_what_was_missed(page: ModuleType, figures: dict[str, Any]) -> None:
    text = page.text(figures)
    assert "| netassay | 22,000 (20,000 .. 90,000) | 1,000 |" in text
    assert "| netassay / Celery | 40 | 2 |" in text
    assert "| netassay, one by one / Celery | 4 |  |" in text
    assert "| jobs of 100 ms, netassay / Pool | 0.980 | 0.97 | yes |" in text
    figures["efficiency"]["netassay, 2 slots"] = runs(18.0, 9.0, 17.0)
    assert "| jobs of 100 ms, netassay / Pool | 0.900 | 0.97 | no |" in page.text(figures)


def test_the_page_leaves_out_what_was_not_measured(page: ModuleType, figures: dict[str, Any]) -> None:
    del figures["submission"], figures["efficiency"]
    text = page.text(figures)
    assert "## End to end" in text
    assert "## Submission" not in text
    assert "## Efficiency" not in text
