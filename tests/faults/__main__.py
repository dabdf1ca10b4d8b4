"""`python -m tests.faults`: a fault run, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--lab", choices=["embedded", "cluster"], default="embedded")
    parser.add_argument("--kills", type=int, default=40, help="processes to kill; other accidents come on top")
    parser.add_argument("--lost-after", type=float, default=10.0, help="seconds after which a worker is given up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, nargs=2, default=(1.0, 3.0), help="seconds between two accidents")
    parser.add_argument("--without", default="", help="a guard to switch off: fence, claim, reconciler")
    parser.add_argument("--only", action="append", default=[], help="an accident by its name; again for more")
    parser.add_argument("--no-points", action="store_true", help="no deaths at steps of the code")
    parser.add_argument("--rest", type=float, default=300.0, help="seconds in which a round has to come to rest")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long, whatever is left")
    parser.add_argument("--stop", action="store_true", help="stop at the first round with a violation")
    parser.add_argument("--evidence", type=Path, help="folder for what is kept of a round with a violation")
    parser.add_argument("--slow", type=float, default=float("inf"), help="keep evidence of recoveries above this")
    parser.add_argument("--report", type=Path, help="where to write what came of it: .json, or a page (.md)")
    asked = parser.parse_args()

    def leave(*_: object) -> None:
        print("SIGTERM: ending what was started", file=sys.stderr, flush=True)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
    # No lab of this machine may reach into the run, nor the run into that lab.
    home = tempfile.mkdtemp(prefix="netassay-faults-")
    for name in [name for name in os.environ if name.startswith("NETASSAY_")]:
        del os.environ[name]
    os.environ["NETASSAY_HOME"] = home
    os.environ["OMP_NUM_THREADS"] = "1"
    from . import harness, page

    plan = harness.Plan(
        asked.lab, asked.kills, asked.lost_after, asked.seed, tuple(asked.pause), asked.without, asked.stop,
        asked.evidence, asked.slow, not asked.no_points, tuple(asked.only), asked.rest, asked.minutes,
    )  # fmt: skip
    as_page = asked.report is not None and asked.report.suffix == ".md"
    try:
        command = f"python -m tests.faults {shlex.join(_without_places(sys.argv[1:]))}"
        outcome = harness.run(plan, None if as_page else asked.report, command)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if as_page:
        asked.report.write_text(page.page([dataclasses.asdict(outcome)]))
    print(page.summary(outcome))
    return 1 if outcome.violations else 0


def _without_places(arguments: list[str]) -> list[str]:
    """The command line without the files it writes: what the run is, wherever it is repeated."""
    places = [place for place, word in enumerate(arguments) if word in ("--report", "--evidence", "--slow")]
    return [word for place, word in enumerate(arguments) if place not in places and place - 1 not in places]


if __name__ == "__main__":
    sys.exit(main())
