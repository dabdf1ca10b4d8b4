"""What the lab costs: a batch of certifications against the same jobs called directly on all cores.

    python benchmarks/overhead.py [--radii 12] [--repeats 3]

Direct: one process a core, warm (libraries imported, networks loaded), each with every n-th group of a method's size,
calling `run_many`. Lab: warm likewise, from the start of `netassay submit` to the last record in the store. The two in
turn; prints each time and the ratio, pair by pair.
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

os.environ["OMP_NUM_THREADS"] = "1"

from netassay import catalogue, networks
from netassay.settings import Settings
from netassay.store import artifacts, reading
from netassay.store.database import Database
from producer import lab

NETWORKS = {kind: {"dataset": "digits", "training": {"kind": kind}} for kind in ("standard", "spectral", "ibp")}
METHOD = "verification.certify"


def sweep(name: str, radii: list[float], images: int, seed: int) -> dict:
    entry = {
        "method": METHOD,
        "params": {"dataset": "digits", "split": "all", "seed": seed},
        "grid": {"network": list(NETWORKS), "radius": radii, "index": {"range": [0, images]}},
    }
    return {"name": name, "networks": NETWORKS, "jobs": [entry]}


def through_lab(home: Path, document: dict) -> float:
    """Seconds from submit to the last record."""
    path = home / "sweep.yaml"
    path.write_text(json.dumps(document))
    database = Database(Settings(home=home).store_url)
    began = time.perf_counter()
    command = [sys.executable, "-m", "producer.cli", "submit", str(path), "--json"]
    subprocess.run(command, check=True, env={**os.environ, "NETASSAY_HOME": str(home)}, stdout=subprocess.DEVNULL)
    while not reading.progress(database, document["name"]).over:
        time.sleep(0.05)
    return time.perf_counter() - began


def serve(home: str, given: dict[str, str], inbox: multiprocessing.Queue, outbox: multiprocessing.Queue) -> None:
    """A process of the direct call: groups of params in, seconds out."""
    import torch

    torch.set_num_threads(1)
    method = catalogue.get(METHOD)
    with artifacts.using(Settings(home=Path(home)).artifacts_folder), networks.given(given):
        for groups in iter(inbox.get, None):
            began = time.perf_counter()
            for group in groups:
                method.run_many([method.Params.model_validate_json(text) for text in group])
            outbox.put(time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--radii", type=int, default=12)
    options.add_argument("--images", type=int, default=1797)
    options.add_argument("--repeats", type=int, default=3)
    wanted = options.parse_args()
    cores = os.cpu_count() or 1
    radii = [round(0.1 * (place + 1) / wanted.radii, 6) for place in range(wanted.radii)]
    with tempfile.TemporaryDirectory(prefix="nabench-") as folder:
        home = Path(folder)
        with lab.running(Settings(home=home), slots=cores):
            through_lab(home, sweep("warm", radii[:2], 300, seed=0))
            database = Database(Settings(home=home).store_url)
            given = {}
            for record in reading.records(database, "warm"):
                given |= record.inputs
            context = multiprocessing.get_context("spawn")
            outbox: multiprocessing.Queue = context.Queue()
            inboxes = [context.Queue() for _ in range(cores)]
            helpers = [
                context.Process(target=serve, args=(folder, given, inbox, outbox), daemon=True) for inbox in inboxes
            ]
            for helper in helpers:
                helper.start()
            ratios = []
            for repeat in range(wanted.repeats + 1):
                document = sweep(f"run-{repeat}", radii, wanted.images if repeat else 100, seed=repeat + 1)
                took = through_lab(home, document)
                texts = [
                    (record.params["network"], json.dumps(record.params))
                    for record in reading.records(database, document["name"])
                    if record.method == METHOD
                ]
                method = catalogue.get(METHOD)
                size = method.needs(method.Params.model_validate_json(texts[0][1])).group
                groups = [
                    [text for name, text in texts if name == network][start : start + size]
                    for network in given
                    for start in range(0, sum(name == network for name, _ in texts), size)
                ]
                began = time.perf_counter()
                for place, inbox in enumerate(inboxes):
                    inbox.put(groups[place::cores])
                busy = [outbox.get() for _ in inboxes]
                direct = time.perf_counter() - began
                if not repeat:
                    continue  # warm-up
                ratios.append(took / direct)
                allowed = 1.2 * direct + 2.0
                print(
                    f"{len(texts):,} jobs: direct {direct:.1f} s (busy {', '.join(f'{b:.1f}' for b in busy)}), "
                    f"lab {took:.1f} s, ratio {ratios[-1]:.3f}; 1.2 x + 2 s would be {allowed:.1f} s",
                    flush=True,
                )
            for inbox in inboxes:
                inbox.put(None)
            for helper in helpers:
                helper.join()
            print(
                f"ratio lab / direct: {min(ratios):.3f} .. {sorted(ratios)[len(ratios) // 2]:.3f} .. {max(ratios):.3f}"
            )


if __name__ == "__main__":
    main()
