"""Ten short jobs behind a great open batch wait some seconds, not for its end, in both kinds of lab."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from labs import a_lab, until, variables

from netassay.store import control, reading


def benchmark() -> ModuleType:
    """The measurement itself, of which this is a short run."""
    path = Path(__file__).parent.parent / "benchmarks" / "fairness.py"
    spec = importlib.util.spec_from_file_location("fairness", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["fairness"] = found  # its dataclasses look there
    spec.loader.exec_module(found)
    return found


@pytest.mark.timeout(600)  # some 25 s on an idle machine
@pytest.mark.parametrize("kind", ["embedded", pytest.param("cluster", marks=pytest.mark.slow)])
def test_ten_short_jobs_behind_fifty_thousand_wait_some_seconds(kind: str) -> None:
    fairness = benchmark()
    with a_lab(kind) as lab, variables(lab.environment):
        great = fairness.Great(lab.config, lab.database, "sleep", 50_000)
        trials = fairness.measure(great, trials=5)
        left = reading.progress(lab.database, great.name)
        assert (left.state, left.size) == ("open", 50_000)
        # Of 50 trials on an idle machine 95 % take 5 s at most; this one may be ten times as slow.
        assert len(trials) == 5
        assert sorted(trial.ended for trial in trials)[2] < 20.0
        control.cancel(lab.database, great.name)
        until(lambda: not reading.progress(lab.database, great.name).running, what="the end of what runs")
        names = [seen.name for seen in reading.batches(lab.database) if seen.name.startswith("ten-")]
        assert len(names) >= 5
        assert lab.violations(*names) == []
