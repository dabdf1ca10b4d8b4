"""What the queue itself costs: jobs that do nothing, from submission to the last record.

    python benchmarks/throughput.py [--jobs 100000] [--repeats 3] [--submitters 1] [--store URL --broker URL]

Each repeat is a fresh lab, warmed by 1,000 jobs; with --store and --broker (an empty database of PostgreSQL, a Redis)
it is one host of a cluster, and the store grows from repeat to repeat. With several submitters all submit the same jobs
at once, each under a name of its own; the time is that of the slowest. Times are those of whole commands (`netassay
submit`, start of Python included). Prints seconds to submit, to the last record, to submit again, the submitting
process's peak memory and Redis's.
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


def submit(config: Settings, names: list[str], jobs: int, tag: int) -> tuple[float, list[dict]]:
    """Seconds until the last of these submissions has returned, and what each said."""
    began = time.perf_counter()
    running = []
    for name in names:
        path = config.home / f"{name}.json"
        entry = {"method": "diagnostics.echo", "params": {"tag": tag}, "grid": {"value": {"range": [0, jobs]}}}
        path.write_text(json.dumps({"name": name, "jobs": [entry]}))
        command = [sys.executable, "-m", "producer.cli", "submit", str(path), "--json"]
        environment = {**os.environ, **lab.environment_of(config)}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [json.loads(process.communicate()[0]) for process in running]
    return time.perf_counter() - began, said


def wait(database: Database, name: str) -> reading.Progress:
    while not (seen := reading.progress(database, name)).over:
        time.sleep(0.1)
    return seen


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--jobs", type=int, default=100_000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--submitters", type=int, default=1)
    options.add_argument("--store", default="")
    options.add_argument("--broker", default="")
    wanted = options.parse_args()
    for repeat in range(wanted.repeats):
        with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
            config = Settings(home=Path(folder), store=wanted.store, broker=wanted.broker)
            tag = 2 * repeat + 2 * int(time.time()) if wanted.store else 0
            with lab.running(config) as about:
                database = Database(config.store_url)
                submit(config, [f"warm-{tag}"], 1000, tag=tag + 1)
                wait(database, f"warm-{tag}")
                server = redis.Redis.from_url((wanted.broker or about["broker"]).replace("redis+socket://", "unix://"))
                names = [f"bulk-{tag}-{number}" for number in range(wanted.submitters)]
                began = time.perf_counter()
                submitted, said = submit(config, names, wanted.jobs, tag)
                most = 0
                while not all(reading.progress(database, name).over for name in names):
                    most = max(most, server.info("memory")["used_memory"])
                    time.sleep(0.2)
                ended = time.perf_counter() - began
                assert sum(one["new"] for one in said) == wanted.jobs
                assert all(reading.progress(database, name).done == wanted.jobs for name in names)
                again, said = submit(config, names, wanted.jobs, tag)
                assert all(one["already"] for one in said)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
                print(
                    f"{wanted.jobs:,} jobs: submitted in {submitted:.2f} s, all done after {ended:.2f} s, submitted "
                    f"again in {again:.2f} s; Redis {most / 2**20:.1f} MiB, submitting process {peak:.0f} MiB",
                    flush=True,
                )
                database.dispose()


if __name__ == "__main__":
    main()
