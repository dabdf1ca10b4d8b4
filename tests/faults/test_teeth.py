"""The harness has teeth: without a guard of ours, or with plain Celery in our place, it reports what goes wrong."""

from __future__ import annotations

import pytest
import services

from . import harness, plain_celery
from .accidents import ChildKilled, WorkerFrozen, WorkerKilled
from .harness import Plan


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_claim_jobs_of_overlapping_batches_run_twice() -> None:
    services.require_redis()
    plan = Plan(
        "embedded", 10, 3.0, seed=1, without="claim", stop=True, points=False, only=(ChildKilled.name,), rest=40
    )
    assert harness.run(plan).doubled


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_fence_a_late_writer_overwrites_or_miscounts() -> None:
    services.require_redis()
    only = (WorkerFrozen.name, ChildKilled.name)
    plan = Plan("embedded", 60, 3.0, seed=1, without="fence", stop=True, points=False, only=only, rest=40)
    assert harness.run(plan).violations


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_reconciler_jobs_are_lost() -> None:
    services.require_redis()
    plan = Plan(
        "embedded", 5, 3.0, seed=1, without="reconciler", stop=True, points=False, only=(WorkerKilled.name,), rest=30
    )
    assert harness.run(plan).lost


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_plain_celery_loses_jobs_under_the_same_kills() -> None:
    services.require_redis()
    found = plain_celery.assay(jobs=4000, kills=25, seed=1)
    assert found.kills == 25
    assert len(found.lost) > found.left, "what still lies in Redis is late, not lost"
