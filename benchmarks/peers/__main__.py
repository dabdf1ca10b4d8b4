"""netassay beside plain Celery, RQ and a bare multiprocessing.Pool, on this machine, in one run, in turn.

    python benchmarks/peers [--json FILE] [--page docs/benchmarks.md] [--repeats 5] [--only submission,rates,efficiency]

Needs the extra `bench` (RQ) and a Redis server on PATH; starts services of its own, in temporary folders. About 25
minutes; `--share 0.02 --repeats 1` tries everything out in two. `--from FILE` measures nothing and prints what an
earlier run wrote with --json.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import measures
import page

SECTIONS = ("submission", "rates", "efficiency")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--share", type=float, default=1.0, help="of the jobs, for a trial")
    options.add_argument("--only", default=",".join(SECTIONS))
    options.add_argument("--json", type=Path, help="where to write every single figure")
    options.add_argument("--page", type=Path, help="where to write the page of the documentation")
    options.add_argument("--note", help="what else is to be known of this run, for the page")
    options.add_argument("--from", type=Path, dest="earlier", help="figures of an earlier run")
    wanted = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    if wanted.earlier:
        figures = json.loads(wanted.earlier.read_text())
    else:
        figures = measure(wanted.only.split(","), wanted.repeats, wanted.share)
    if wanted.note:
        figures["note"] = wanted.note
    if wanted.json:
        wanted.json.write_text(json.dumps(figures, indent=1) + "\n")
    text = page.text(figures)
    if wanted.page:
        wanted.page.write_text(text)
    print(text)


def measure(sections: list[str], repeats: int, share: float) -> measures.Figures:
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {words}", flush=True)

    figures: measures.Figures = {"machine": page.machine(), "repeats": repeats, "disk": measures.disk(say)}
    if "submission" in sections:
        figures["submission"] = measures.submission(repeats, share, say)
    if "rates" in sections:
        figures["rates"] = measures.rates(repeats, share, say)
    if "efficiency" in sections:
        figures["efficiency"] = measures.efficiency(repeats, share, say)
    return figures | {"minutes": (time.monotonic() - began) / 60}


if __name__ == "__main__":
    main()
