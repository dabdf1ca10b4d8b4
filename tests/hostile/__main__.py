"""The long run: `python -m tests.hostile --minutes 30`.

Every target in turn, each in a process of its own, with our mutations and, for a third of the time, with atheris where
it is installed (`pip install atheris`). What was found lies in the folder of the findings, each with the input that
shows it; an input is read again by `--again FILE --only TARGET`. Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hostile import runs

#: Targets whose readers are ours and in Python: of these atheris sees which branches an input reaches.
GUIDED = ("sweep-yaml", "sweep-json", "rows-jsonl", "rows-csv", "instances", "property", "dataset-artifact", "export")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "netassay-hostile")
    parser.add_argument("--again", type=Path, help="read this input once, with the target of --only, and show its end")
    asked = parser.parse_args()
    if asked.again:
        return runs.again(asked.only[0], asked.again)
    asked.findings.mkdir(parents=True, exist_ok=True)
    seconds = 60 * asked.minutes
    names = asked.only or runs.names()
    plan = [(name, "mutation", 1.0) for name in names]
    if importlib.util.find_spec("atheris"):
        plan = [(name, "mutation", 2 / 3) for name in names]
        guided = [name for name in names if name in GUIDED]
        plan += [(name, "atheris", len(names) / max(1, len(guided)) / 3) for name in guided]
    # A round an hour: starting a process costs seconds.
    rounds = max(1, int(asked.minutes // 60))
    total = runs.Total()
    for turn in range(rounds):
        for name, engine, share in plan:
            time_ = seconds * share / len(names) / rounds
            found = runs.run(name, asked.findings, time_, seed=asked.seed + turn, engine=engine)
            total.add(found, engine)
            print(json.dumps({"engine": engine, **found.about()}), flush=True)
    print(total.table())
    (asked.findings / "report.json").write_text(json.dumps(total.as_json(), indent=1))
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
