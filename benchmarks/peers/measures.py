"""What is measured: each function returns figures, in seconds and bytes: a list for each item, of one a repeat.

Everything that is compared is measured in turn, repeat by repeat: what else the machine does in the meantime meets all.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import systems
from systems import HERE, TRIVIAL, System

from netassay.settings import Settings
from producer import lab

#: Seconds of CPU time of the jobs, and how the page calls them.
KINDS = {TRIVIAL: "trivial", 0.001: "1 ms", 0.01: "10 ms", 0.1: "100 ms", 1.0: "1 s"}
#: Jobs of each kind, as many as take each system some seconds; where one is missing, the system is not measured.
JOBS: dict[str, dict[float, int]] = {
    "netassay": {TRIVIAL: 100_000, 0.001: 10_000, 0.01: 1_000, 0.1: 120, 1.0: 12},
    "netassay, one by one": {TRIVIAL: 30_000},
    "Celery": {TRIVIAL: 4_000, 0.001: 2_500, 0.01: 1_000, 0.1: 120, 1.0: 12},
    "RQ": {TRIVIAL: 200, 0.001: 200, 0.01: 200, 0.1: 100, 1.0: 12},
    "RQ without forks": {TRIVIAL: 4_000, 0.001: 2_500, 0.01: 800},
    "Pool": {TRIVIAL: 5_000_000, 0.001: 10_000, 0.01: 1_000, 0.1: 120, 1.0: 12},
}
SYSTEMS: dict[str, Callable[[], contextlib.AbstractContextManager[System]]] = {
    "netassay": systems.netassay,
    "Celery": systems.celery,
    "RQ": systems.rq,
    "RQ without forks": lambda: systems.rq(forks=False),
    "Pool": systems.pool,
}
#: What is submitted at once, and what of it is enough to know a peer's rate.
SUBMITTED = 100_000
SUBMITTED_FEWER = {
    ("celery", "always"): 5_000,
    ("celery", "everysec"): 10_000,
    ("celery", "no"): 10_000,
    ("rq", "always"): SUBMITTED,
    ("rq", "everysec"): 20_000,
    ("rq", "no"): 20_000,
}
#: Of jobs of 100 ms, so many a slot.
EFFICIENCY_JOBS = 300

Say = Callable[[str], None]
Figures = dict[str, Any]


def rates(repeats: int, share: float, say: Say) -> Figures:
    """End to end: from the start of the submission (a process that has its imports) to the last result."""
    found: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(repeats):
        for name, start in SYSTEMS.items():
            with start() as system:
                first = 1
                for seconds, jobs in JOBS[name].items():
                    found[name][KINDS[seconds]].append(_run(system, seconds, first, max(2, int(share * jobs))))
                    first += 10**6
                if name == "netassay":
                    # The same method, asked for jobs that take no time: they do not vectorise, each is a call.
                    singly = "netassay, one by one"
                    jobs = max(2, int(share * JOBS[singly][TRIVIAL]))
                    found[singly][KINDS[TRIVIAL]].append(_run(system, 0.0, first, jobs))
            last = {
                kind: f"{figures[-1]['jobs'] / figures[-1]['seconds']:,.0f}" for kind, figures in found[name].items()
            }
            say(f"jobs a second, {repeat + 1} of {repeats}: {name}: {last}")
    return {name: dict(kinds) for name, kinds in found.items()}


def _run(system: System, seconds: float, first: int, jobs: int) -> Figures:
    run = system.run(seconds, first, jobs)
    return {"jobs": jobs, "seconds": run.seconds, "submitting": run.submitting, "redis": run.redis}


def submission(repeats: int, share: float, say: Say) -> Figures:
    """Seconds to submit jobs that do nothing, nobody working on them, and the peak memory of the submitting process.

    Ours is over when its jobs are synced to disk; the peers are measured against a Redis that syncs each write, one
    that does so once a second, and one that keeps nothing.
    """

    def of(jobs: int) -> int:
        return max(1000, int(share * jobs))

    found: dict[str, list[Figures]] = defaultdict(list)

    def keep(name: str, figures: Figures) -> None:
        found[name].append(figures)
        say(f"submission: {name}: {figures['jobs']:,} in {figures['seconds']:.2f} s, {figures['peak'] / 2**20:.0f} MiB")

    for repeat in range(repeats):
        keep("netassay submit", _command(of(SUBMITTED)))
        keep("netassay in Python", _ours(of(SUBMITTED)))
        for durability in systems.DURABILITIES:
            for peer in ("celery", "rq"):
                keep(f"{peer} {durability}", _peer(peer, durability, of(SUBMITTED_FEWER[peer, durability])))
        if repeat == repeats // 2:  # minutes, where the disk is slow: once is enough
            keep("celery always, full", _peer("celery", "always", of(SUBMITTED)))
    return dict(found)


def _command(jobs: int) -> Figures:
    """The whole command, start of Python included."""
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        sweep = Path(folder) / "sweep.json"
        entry = {"method": "diagnostics.echo", "grid": {"value": {"range": [0, jobs]}}}
        sweep.write_text(json.dumps({"name": "bench", "jobs": [entry]}))
        command = [sys.executable, "-m", "producer.cli", "submit", str(sweep), "--json"]
        environment = {**os.environ, **lab.environment_of(Settings(home=Path(folder) / "lab"))}
        process = subprocess.run(
            # Through a small process, so that the peak is the command's own.
            [sys.executable, "-S", str(HERE / "peak.py"), *command],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        seconds, peak = json.loads(process.stderr.splitlines()[-1])
        assert json.loads(process.stdout)["new"] == jobs
        return {"jobs": jobs, "seconds": seconds, "peak": peak, "redis": 0}


def _ours(jobs: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        sent = systems.submitted("netassay", TRIVIAL, 0, jobs, lab.environment_of(Settings(home=Path(folder))))
    return {"jobs": jobs, "seconds": sent.seconds, "peak": sent.peak, "redis": 0}


def _peer(peer: str, durability: str, jobs: int) -> Figures:
    with systems.redis_server(durability) as server:
        # Without a result backend: with one, Celery subscribes to a channel for each job it sends, and takes longer.
        variables = systems.celery_variables(server, results=False) | systems.rq_variables(server)
        sent = systems.submitted(peer, TRIVIAL, 0, jobs, variables)
        return {"jobs": jobs, "seconds": sent.seconds, "peak": sent.peak, "redis": server.most()}


def efficiency(repeats: int, share: float, say: Say) -> Figures:
    """Jobs that burn 100 ms of CPU time, in the lab (Flower idle) and in a bare Pool, with one slot and with two.

    cpu: CPU seconds of all the lab's processes but its compute children, in the run.
    """
    found: dict[str, list[Figures]] = defaultdict(list)
    for repeat in range(repeats):
        for slots in (1, 2):
            jobs = max(4, int(share * EFFICIENCY_JOBS * slots))
            with systems.pool(slots) as bare:
                found[f"Pool of {slots}"].append(_run(bare, 0.1, 1, jobs))
            with systems.netassay(slots) as ours:
                before = ours.cpu()
                figures = _run(ours, 0.1, 1, jobs)
                found[f"netassay, {slots} slots"].append(figures | {"cpu": ours.cpu()[1] - before[1]})
        pairs = {name: f"{figures[-1]['jobs'] / figures[-1]['seconds']:.3f}" for name, figures in found.items()}
        say(f"jobs of 100 ms a second, {repeat + 1} of {repeats}: {pairs}")
    return dict(found)


def disk(say: Say) -> Figures:
    """Milliseconds that the disk of the temporary folder takes to sync a small write, of 200."""
    took = []
    with tempfile.NamedTemporaryFile(prefix="nabench-") as file:
        for _ in range(200):
            file.write(b"x" * 100)
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    say(f"a sync takes {sorted(took)[100]:.2f} ms")
    return {"milliseconds": took}
