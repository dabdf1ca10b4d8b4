"""Runs of a target in a process of its own, and what they add up to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hostile.child import Report

ROOT = Path(__file__).resolve().parents[2]
#: Wall seconds after which one input counts as endless; the machine may be busy.
HANGS = 60.0
#: And after which one that has read nothing yet will not; on a busy machine atheris takes a minute for its imports.
STARTS = 300.0


def names() -> list[str]:
    from hostile import targets

    return list(targets.TARGETS)


@dataclasses.dataclass
class Found:
    """What a run found. died: how the process ended, where it did not end by itself."""

    report: Report
    died: str = ""

    @property
    def faults(self) -> dict[str, list[Any]]:
        return self.report.faults

    def about(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.report), "died": self.died}

    def told(self) -> str:
        lines = [f"{sort}: {count} times, such as {what} ({place})" for sort, (count, what, place) in
                 self.faults.items()]  # fmt: skip
        return "\n".join([*lines, *([self.died] if self.died else [])])


def run(
    name: str, findings: Path, seconds: float, *, seed: int = 0, most: int = 10**9, engine: str = "mutation"
) -> Found:
    """Read mutated inputs for so long, or so many. A process that dies or hangs is a fault with its last input."""
    folder = Path(tempfile.mkdtemp(prefix="na-hostile-"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system",
        "NETASSAY_HOME": str(folder / "home"),
    }  # fmt: skip
    command = [
        sys.executable, "-P", "-m", "hostile.child", name, str(folder), str(findings),
        "--seconds", str(seconds), "--seed", str(seed), "--most", str(most), "--engine", engine,
    ]  # fmt: skip
    try:
        with open(findings / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            hung = _watched(process, folder)
        report, died = Report(name), ""
        with contextlib.suppress(OSError, ValueError, TypeError):
            report = Report(**json.loads((folder / "report.json").read_text()))
        # libFuzzer ends its process itself, by a code of its own.
        ended = process.returncode < 0 if engine == "atheris" else process.returncode != 0
        if hung or not report.inputs or ended:
            died = "it hung" if hung else f"the process ended with {process.returncode}"
            for input_ in (folder / "inside").glob("input*"):
                place = findings / f"{name}-died{input_.suffix}"
                shutil.copyfile(input_, place)
                died += f"; its last input: {place}"
            died += f"; {(findings / f'{name}.log').read_text(errors='replace')[-600:]}"
        return Found(report, died)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(process: subprocess.Popen, folder: Path) -> bool:
    """Wait for its end; True where it had to be killed because one input took too long."""
    began = time.time()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            return False
        newest = max((path.stat().st_mtime for path in (folder / "inside").glob("input*")), default=0.0)
        if time.time() - (newest or began) > (HANGS if newest else STARTS):
            process.kill()
            process.wait()
            return True


def again(name: str, file: Path) -> int:
    """Read one input without any watch, and let it end as it does."""
    from hostile import targets

    with tempfile.TemporaryDirectory(prefix="na-hostile-") as folder:
        inside, _ = targets.surroundings(Path(folder))
        os.chdir(inside)
        target = targets.TARGETS[name]
        shutil.copyfile(file, inside / f"input{target.suffix}")
        target.read(inside / f"input{target.suffix}")
    print("it was accepted")
    return 0


@dataclasses.dataclass
class Total:
    """Sums over all runs: (target, engine) -> inputs, accepted, peak in bytes, slowest in seconds."""

    rows: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, found: Found, engine: str) -> None:
        report = found.report
        row = self.rows.setdefault((report.target, engine), [0, 0, 0, 0.0])
        row[0] += report.inputs
        row[1] += report.accepted
        row[2], row[3] = max(row[2], report.peak), max(row[3], report.slowest)
        if told := found.told():
            self.faults.append(f"{report.target}: {told}")

    def table(self) -> str:
        head = f"{'target':20} {'engine':9} {'inputs':>9} {'accepted':>9} {'peak MiB':>9} {'slowest s':>9}"
        lines = [
            f"{name:20} {engine:9} {row[0]:9,.0f} {row[1]:9,.0f} {int(row[2]) >> 20:9,} {row[3]:9.2f}"
            for (name, engine), row in self.rows.items()
        ]
        return "\n".join([head, *lines, f"{sum(row[0] for row in self.rows.values()):,.0f} inputs", *self.faults])

    def as_json(self) -> dict[str, Any]:
        return {"rows": [[*key, *row] for key, row in self.rows.items()], "faults": self.faults}
