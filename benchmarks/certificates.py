"""Certificates in bulk through the lab against the same calls without it: `verification.certify` of a 784-256-256-10
network (`certify_bulk.wide`), 1,000 images at as many radii as the jobs ask for, nearly all decided by CROWN.

    python benchmarks/certificates.py [--jobs 10000] [--repeats 3] [--slots 2]

Directly: as many processes as the lab has slots call `certify.run_many` on groups of the method's own size, which they
take from one queue; each holds the libraries and the network already. Through the lab: an embedded one, warmed by a
batch of its own; from the call of `submission.submit` to the last record. One torch thread in every process. Both in
turn; prints seconds of each run, the ratio lab / direct of each pair, and the median. The verdicts of both ways are
counted and must be the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from certify_bulk import wide

from netassay import networks
from netassay.methods.verification import certify
from netassay.networks import onnx_file
from netassay.settings import Settings
from netassay.store import artifacts, reading
from netassay.store.database import Database
from producer import lab, submission

IMAGES = 1_000


def radii(jobs: int, repeat: int) -> list[float]:
    """As many as the jobs need, near 0.001, and others in each repeat: a job that was done is not done again."""
    return [round(5e-4 + 1e-4 * place + 1e-7 * repeat, 9) for place in range(-(-jobs // IMAGES))]


def direct(folder: Path, network: str, tasks: SimpleQueue, results: SimpleQueue) -> None:
    """A process that certifies what it is given until it is told to end."""
    torch.set_num_threads(1)
    with artifacts.using(folder):
        certify.run(certify.Params(network=network, index=0, radius=1e-4, split="all"))
        results.put("ready")
        while (group := tasks.get()) is not None:
            params = [certify.Params(network=network, index=index, radius=r, split="all") for index, r in group]
            results.put(Counter(getattr(outcome, "verdict", "failed") for outcome in certify.run_many(params)))


def directly(folder: Path, network: str, wanted: list[tuple[int, float]], processes: int) -> tuple[float, Counter]:
    """Seconds, and how often each verdict was reached."""
    context, size = multiprocessing.get_context("spawn"), certify.NEEDS.group
    tasks, results = context.SimpleQueue(), context.SimpleQueue()
    running = [
        context.Process(target=direct, args=(folder, network, tasks, results), daemon=True) for _ in range(processes)
    ]
    for process in running:
        process.start()
    for _ in running:
        results.get()
    groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    began, found = time.perf_counter(), Counter()
    for group in groups:
        tasks.put(group)
    for _ in groups:
        found.update(results.get())
    seconds = time.perf_counter() - began
    for _ in running:
        tasks.put(None)
    for process in running:
        process.join()
    return seconds, found


def through_lab(config: Settings, network: str, name: str, indices: int, of: list[float]) -> tuple[float, Counter]:
    """Seconds from the submission to the last record, and how often each verdict was reached."""
    entry = {
        "method": "verification.certify",
        "params": {"network": network, "split": "all"},
        "grid": {"radius": of, "index": {"range": [0, indices]}},
    }
    began = time.perf_counter()
    submission.submit({"name": name, "jobs": [entry]}, config)
    database = Database(config.store_url)
    while not (seen := reading.progress(database, name)).over:
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    assert seen.done == seen.size, seen
    verdicts = Counter(
        record.result["verdict"] for record in reading.records(database, name) if record.result is not None
    )
    database.dispose()
    return seconds, verdicts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--jobs", type=int, default=10_000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--slots", type=int, default=2)
    wanted = options.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        config = Settings(home=Path(folder))
        with artifacts.using(config.artifacts_folder):
            network = networks.keep(onnx_file.write(wide(), "wide"))
        with lab.running(config, slots=wanted.slots):
            through_lab(config, network, "warm", 500, [1e-4])
            for repeat in range(wanted.repeats):
                of = radii(wanted.jobs, repeat)
                indices = min(IMAGES, wanted.jobs)
                pairs = [(index, radius) for radius in of for index in range(indices)]
                alone, expected = directly(config.artifacts_folder, network, pairs, wanted.slots)
                queued, found = through_lab(config, network, f"bulk{repeat}", indices, of)
                if found != expected:
                    raise SystemExit(f"the lab found {dict(found)}, the calls {dict(expected)}")
                ratios.append(queued / alone)
                print(
                    f"{len(pairs):,} certificates: directly {alone:.2f} s, through the lab {queued:.2f} s, ratio "
                    f"{ratios[-1]:.3f}   {dict(found)}",
                    flush=True,
                )
    print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
