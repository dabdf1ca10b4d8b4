"""A disk without room: what fails for want of it comes back by itself, and takes nothing else with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
import services
from labs import alive, until

from .site import Site


@pytest.fixture
def site() -> Iterator[Site]:
    services.require_redis()
    with Site("embedded") as found:
        if found.disk is None:
            services.absent(found.notes[0])
        yield found


@contextlib.contextmanager
def full(site: Site) -> Iterator[None]:
    """No byte is left where the lab lives, for the time of the block."""
    ballast = site.fill_disk()
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.timeout(600)
def test_a_dispatcher_that_dies_while_the_disk_is_full_is_started_again(site: Site) -> None:
    about = site.described(site.lab)
    with full(site):
        os.kill(about["services"]["dispatcher"], signal.SIGKILL)
        time.sleep(4.0)
        assert alive(about["pid"]), "the lab has died of it"
    site.lab.submit("after", {"method": "diagnostics.echo", "grid": {"value": {"range": [0, 50]}}})
    site.lab.wait("after")
    assert site.described(site.lab)["pid"] == about["pid"]
    dispatcher = until(lambda: site.services("dispatcher"), what="the new dispatcher in the description")
    assert dispatcher != [about["services"]["dispatcher"]]


@pytest.mark.timeout(600)
def test_a_worker_at_work_while_the_disk_is_full_signs_on_no_second_time(site: Site) -> None:
    worker = site.described(site.lab)["services"]["worker"]
    tags = {"range": [0, 40]}
    site.lab.submit("during", {"method": "diagnostics.sleep", "params": {"seconds": 0.2}, "grid": {"tag": tags}})
    until(lambda: site.query("SELECT 1 FROM running"), what="jobs to run")
    with full(site):
        time.sleep(2.0)
    site.lab.wait("during")
    assert site.surprises == []
    assert site.lab.progress("during").done == 40
    assert site.described(site.lab)["services"]["worker"] == worker
