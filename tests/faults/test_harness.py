"""Short fault runs in the ordinary suite, longer ones among the evidence. `make faults` is the long form."""

from __future__ import annotations

import pytest
import services
from labs import KINDS

from . import harness, postgres
from .harness import Outcome, Plan


def ran(plan: Plan) -> Outcome:
    services.require_redis()
    if plan.lab == "cluster" and (why := postgres.missing()):
        services.absent(why)
    return harness.run(plan)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_hail_of_accidents_loses_and_doubles_nothing(kind: str) -> None:
    outcome = ran(Plan(kind, kills=6, lost_after=3.0, seed=11, stop=True))
    assert outcome.kills >= 6
    assert outcome.runs >= outcome.jobs > 100
    assert outcome.violations == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [12, 13])
def test_a_long_hail_of_accidents_loses_and_doubles_nothing(seed: int, kind: str) -> None:
    outcome = ran(Plan(kind, kills=60, lost_after=3.0, seed=seed, stop=True))
    assert outcome.kills >= 60
    assert outcome.violations == []
