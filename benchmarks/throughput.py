"""What the queue itself costs: jobs that do nothing, from submission to the last record.

    python benchmarks/throughput.py [--jobs 100000] [--repeats 3]

Each repeat is a fresh lab, warmed by 1,000 jobs. Times are those of whole commands (`netassay submit`, start of Python
included). Prints seconds to submit, to the last record, to submit again, the submitting process's peak memory and
Redis's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab


def submit(home: Path, name: str, jobs: int, tag: int) -> tuple[float, dict]:
    path = home / f"{name}.yaml"
    entry = {"method": "diagnostics.echo", "params": {"tag": tag}, "grid": {"value": {"range": [0, jobs]}}}
    path.write_text(json.dumps({"name": name, "jobs": [entry]}))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", "submit", str(path), "--json"],
        check=True, env={**os.environ, "NETASSAY_HOME": str(home)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return time.perf_counter() - began, json.loads(done.stdout)


def wait(database: Database, name: str) -> reading.Progress:
    while not (seen := reading.progress(database, name)).over:
        time.sleep(0.1)
    return seen


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--jobs", type=int, default=100_000)
    options.add_argument("--repeats", type=int, default=3)
    wanted = options.parse_args()
    for _ in range(wanted.repeats):
        with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
            home = Path(folder)
            with lab.running(Settings(home=home)) as about:
                database = Database(Settings(home=home).store_url)
                submit(home, "warm", 1000, tag=1)
                wait(database, "warm")
                server = redis.Redis.from_url(about["broker"].replace("redis+socket://", "unix://"))
                began = time.perf_counter()
                submitted, _ = submit(home, "bulk", wanted.jobs, tag=0)
                most = 0
                while not (seen := reading.progress(database, "bulk")).over:
                    most = max(most, server.info("memory")["used_memory"])
                    time.sleep(0.2)
                ended = time.perf_counter() - began
                again, said = submit(home, "bulk", wanted.jobs, tag=0)
                assert (seen.done, said["already"]) == (wanted.jobs, True)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
                print(
                    f"{wanted.jobs:,} jobs: submitted in {submitted:.2f} s, all done after {ended:.2f} s, submitted "
                    f"again in {again:.2f} s; Redis {most / 2**20:.1f} MiB, submitting process {peak:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
