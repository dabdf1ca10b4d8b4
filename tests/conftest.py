"""Fixtures for all tests, and an environment that no lab on this machine can reach into."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
import tempfile

# Before anything imports torch: one thread, so that tests time what a slot of a worker would take.
os.environ["OMP_NUM_THREADS"] = "1"

_HOME = tempfile.mkdtemp(prefix="netassay-tests-")
for _name in [_name for _name in os.environ if _name.startswith("NETASSAY_")]:
    if not _name.startswith("NETASSAY_TEST_"):
        del os.environ[_name]
os.environ["NETASSAY_HOME"] = _HOME

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from netassay.settings import settings  # noqa: E402
from netassay.store.artifacts import Artifacts, using  # noqa: E402

# Its default of 0.2 s an example is no promise of ours, and beside other tests no example keeps to it.
hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_unconfigure() -> None:
    if "services" in sys.modules:
        sys.modules["services"].drop_kept()
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes or use databases come first: they wait a lot, so that those that compute run
    beside them; and where files run at once, none of the long ones is left for the end."""
    items.sort(key=lambda item: not _waits(item.path))  # stable: nothing else changes its place


@functools.cache
def _waits(path: Path) -> bool:
    return bool(re.search(r"^(import|from) (labs|services|subprocess)\b", path.read_text(), re.MULTILINE))


@pytest.fixture(autouse=True)
def _settings_of_the_environment() -> Iterator[None]:
    """A process reads its settings once; what a test has set in the environment must not outlive it there."""
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def artifacts(tmp_path: Path) -> Iterator[Artifacts]:
    """An empty folder of artifacts, current within the test."""
    with using(tmp_path / "artifacts") as found:
        yield found
