"""How long ten short jobs wait behind an open batch of a million.

    python benchmarks/fairness.py [--trials 50] [--jobs 1000000] [--behind sleep] [--slots 2] [--store URL --broker URL]

A batch of a million jobs (`sleep`: 1 ms each, in chunks of two seconds; `echo`: as fast as they go) is open and busy
all the time; another takes its place where it ends. A trial submits a batch of 10 jobs of 10 ms under a new name, by
the Python call behind `netassay submit`, at a moment drawn at random, and waits for its last record. A trial during
which the great batch ended does not count and is made again. Without --store and --broker the lab is an embedded one;
with them (an empty database of PostgreSQL, a Redis) one host of a cluster.

Prints of all trials: seconds from the start of the submission to its return, to the first job's claim, to the last
record; median, 95th percentile (the least value that 95 % of the trials do not exceed), largest.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import text

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab, submission

#: What the great batch consists of. `tag` is left to tell one batch from the next.
BEHIND = {
    "echo": {"method": "diagnostics.echo", "params": {"log": ""}},
    "sleep": {"method": "diagnostics.sleep", "params": {"seconds": 0.001}},
    "burn": {"method": "diagnostics.burn", "params": {"seconds": 0.001}},
}
TEN = {"method": "diagnostics.burn", "params": {"seconds": 0.01}}
#: Between two looks at the store; a trial is late by no more.
LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Trial:
    """Seconds from the start of a submission until it returned, a slot took its first job, the last record was in."""

    submitted: float
    claimed: float
    ended: float


@dataclass
class Great:
    """The batch in whose shadow the others live, again and again a new one. first: where the numbers of all jobs start,
    so that a store may be used for several runs."""

    config: Settings
    database: Database
    kind: str
    jobs: int
    number: int = 0
    trials: int = 0
    first: int = field(default_factory=lambda: int(time.time()) % 1_000_000 * 1_000_000)

    @property
    def name(self) -> str:
        return f"great-{self.first}-{self.number}"

    def submit(self) -> None:
        self.number += 1
        base = self.first + self.number * self.jobs
        varied = {"value" if self.kind == "echo" else "tag": {"range": [base, base + self.jobs]}}
        submission.submit({"name": self.name, "jobs": [{**BEHIND[self.kind], "grid": varied}]}, self.config)

    def busy(self) -> bool:
        """Whether it is open, some of it has run, and a good deal is left."""
        seen = reading.progress(self.database, self.name)
        return seen.state == "open" and seen.ended > 0 and seen.size - seen.ended > seen.size // 100


def trial(great: Great) -> Trial | None:
    """One small batch, from submission to its last record. None where the great batch did not last so long."""
    great.trials += 1
    name, first = f"ten-{great.first}-{great.trials}", great.first + 10 * great.trials
    jobs = {**TEN, "grid": {"tag": {"range": [first, first + 10]}}}
    claimed = math.nan
    began = time.perf_counter()
    submission.submit({"name": name, "jobs": [jobs]}, great.config)
    submitted = time.perf_counter() - began
    while (seen := reading.progress(great.database, name)).ended < seen.size:
        if math.isnan(claimed) and taken(great.database, name):
            claimed = time.perf_counter() - began
        time.sleep(LOOK_SECONDS)
    ended = time.perf_counter() - began
    assert (seen.done, seen.size) == (10, 10), seen
    return Trial(submitted, ended if math.isnan(claimed) else claimed, ended) if great.busy() else None


def taken(database: Database, name: str) -> bool:
    """Whether a slot has had a chunk of this batch."""
    query = (
        "SELECT count(*) FROM chunk c JOIN batch b ON b.id = c.batch_id"
        " WHERE b.name = :name AND c.state IN ('claimed', 'finished')"
    )
    with database.read() as connection:
        return bool(connection.execute(text(query), {"name": name}).scalar_one())


def measure(great: Great, trials: int, seed: int = 0) -> list[Trial]:
    """So many trials at a lab that runs."""
    draw = random.Random(seed)
    found: list[Trial] = []
    great.submit()
    for _ in range(10 * trials):
        if len(found) == trials:
            break
        while not great.busy():
            if reading.progress(great.database, great.name).over:
                great.submit()
            time.sleep(LOOK_SECONDS)
        time.sleep(draw.uniform(0.5, 2.5))  # at any moment of the chunks that run
        if great.busy() and (made := trial(great)) is not None:
            found.append(made)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--trials", type=int, default=50)
    options.add_argument("--jobs", type=int, default=1_000_000)
    options.add_argument("--behind", choices=sorted(BEHIND), default="sleep")
    options.add_argument("--slots", type=int, default=2)
    options.add_argument("--store", default="")
    options.add_argument("--broker", default="")
    wanted = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        config = Settings(home=Path(folder), store=wanted.store, broker=wanted.broker)
        with lab.running(config, wanted.slots):
            database = Database(config.store_url)
            try:
                found = measure(Great(config, database, wanted.behind, wanted.jobs), wanted.trials)
            finally:
                database.dispose()
    kind = "cluster" if wanted.store else "embedded"
    behind = f"{wanted.jobs:,} x {wanted.behind}"
    print(f"{kind}, {wanted.slots} slots, behind {behind}: {len(found)} trials, load {os.getloadavg()[0]:.1f}")
    for what in ("submitted", "claimed", "ended"):
        values = [getattr(one, what) for one in found]
        print(
            f"  {what:>9}: median {statistics.median(values):.2f} s, 95 % {percentile(values, 0.95):.2f} s,"
            f" largest {max(values):.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
