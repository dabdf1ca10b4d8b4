"""Fixtures for all tests, and an environment that no lab on this machine can reach into."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before anything imports torch: one thread, so that tests time what a slot of a worker would take.
os.environ["OMP_NUM_THREADS"] = "1"

_HOME = tempfile.mkdtemp(prefix="netassay-tests-")
for _name in ("BROKER", "STORE", "ARTIFACTS", "METHODS", "SLOTS", "LOST_AFTER", "MEMORY"):
    os.environ.pop(f"NETASSAY_{_name}", None)
os.environ["NETASSAY_HOME"] = _HOME

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from netassay.store.artifacts import Artifacts, using  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture
def artifacts(tmp_path: Path) -> Iterator[Artifacts]:
    """An empty folder of artifacts, current within the test."""
    with using(tmp_path / "artifacts") as found:
        yield found
