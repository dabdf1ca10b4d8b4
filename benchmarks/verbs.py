"""How long the quick verbs take as whole commands: `python benchmarks/verbs.py [--repeats 5]`.

One call of each is a warm-up; prints the median and the range of the others, beside that of a Python that does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SWEEP = "jobs: {method: diagnostics.echo, grid: {value: {range: [0, 100]}}}\n"
NETASSAY = [sys.executable, "-m", "producer.cli"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "netassay --help": [*NETASSAY, "--help"],
    "netassay methods": [*NETASSAY, "methods"],
    "netassay submit sweep.yaml --dry-run (100 jobs)": [*NETASSAY, "submit", "sweep.yaml", "--dry-run"],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--repeats", type=int, default=5)
    repeats = options.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sweep.yaml").write_text(SWEEP)
        for name, command in COMMANDS.items():
            took = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
                took.append(time.perf_counter() - began)
            kept = took[1:]
            print(f"{name:<50} median {statistics.median(kept):.3f} s  ({min(kept):.3f} .. {max(kept):.3f})")


if __name__ == "__main__":
    main()
