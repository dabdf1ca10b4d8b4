"""What it costs to get records out, and to carry a store: Parquet, export, import.

    python benchmarks/records.py [--jobs 1000000] [--store URL] [--into URL]

Makes a store of that many records (their results are written straight into it: no lab runs), in a fresh folder or in an
empty database of PostgreSQL; then times whole commands, start of Python included, with their peak memory: `results
--out x.parquet`, `export`, and `import` into another store. Checks that the frame has a typed column for each param and
result, and that the imported store has every record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars
from sqlalchemy import text

from netassay.settings import Settings
from netassay.store.database import Database
from netassay.store.dispatching import finish_batches
from netassay.store.running import RECORD
from producer import lab, submission

PAGE = 50_000


def fill(config: Settings, jobs: int) -> None:
    """A batch `computed`, and one of the same jobs, `records`, that finds them done."""
    entry = {"jobs": {"method": "diagnostics.echo", "grid": {"value": {"range": [0, jobs]}}}}
    submission.submit(entry, config, "computed")
    database = Database(config.store_url)
    for start in range(0, jobs, PAGE):
        with database.write() as connection:
            ids = connection.execute(
                text("SELECT ordinal, job_id FROM membership WHERE ordinal >= :start AND ordinal < :stop"),
                {"start": start, "stop": start + PAGE},
            )
            rows = [
                (job, "done", "", "", json.dumps({"square": value * value, "value": value}), 1e-6, time.time(),
                 None, None, None)
                for value, job in ids
            ]  # fmt: skip
            database.insert(connection, "record", RECORD, rows)
    submission.submit(entry, config, "records")
    finish_batches(database)
    database.dispose()


def timed(config: Settings, *words: str) -> str:
    """Seconds and peak memory of one command, in words."""
    command = [sys.executable, "-m", "producer.cli", *words]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **lab.environment_of(config)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, process.stderr and process.stderr.read().decode()
    return f"{seconds:.1f} s, {usage.ru_maxrss / 1024:.0f} MiB"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--jobs", type=int, default=1_000_000)
    options.add_argument("--store", default="")
    options.add_argument("--into", default="")
    wanted = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        config = Settings(home=Path(folder) / "first", store=wanted.store)
        other = Settings(home=Path(folder) / "second", store=wanted.into)
        # In a process of its own: what this one has once held would count as the peak of those it starts.
        filling = multiprocessing.get_context("spawn").Process(target=fill, args=(config, wanted.jobs))
        filling.start()
        filling.join()
        assert filling.exitcode == 0
        frame, moved = Path(folder) / "x.parquet", Path(folder) / "lab.tar"
        print(
            f"{wanted.jobs:,} records to Parquet: {timed(config, 'results', 'records', '--out', str(frame))}",
            flush=True,
        )
        schema = polars.read_parquet_schema(frame)
        assert (schema["value"], schema["square"]) == (polars.Int64, polars.Float64), schema
        assert polars.scan_parquet(frame).select(polars.len()).collect().item() == wanted.jobs
        print(
            f"export: {timed(config, 'export', str(moved), 'records')}; {moved.stat().st_size / 1e6:.0f} MB", flush=True
        )
        print(f"import: {timed(other, 'import', str(moved))}", flush=True)
        database = Database(other.store_url)
        with database.read() as connection:
            assert connection.execute(text("SELECT count(*) FROM record")).scalar_one() == wanted.jobs
        database.dispose()


if __name__ == "__main__":
    main()
