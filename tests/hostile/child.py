"""One process that reads hostile input until its time is over: `python -m hostile.child TARGET FOLDER ...`.

The input in hand always lies in FOLDER/inside, so a process that dies leaves behind what it died of; FOLDER/report.json
is a `Report`, written each second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random as randomness
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Beyond what the process holds at its start; a backstop, so that a fault does not take the machine.
BACKSTOP = 3 << 30
#: CPU seconds that one small input may take.
SLOW = 10.0


@dataclasses.dataclass
class Report:
    """inputs: read in all; accepted: without any error; faults: signature -> (how often, what, its smallest input)."""

    target: str
    inputs: int = 0
    accepted: int = 0
    peak: int = 0
    slowest: float = 0.0
    faults: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


class Reading:
    """A target, the place where it reads, and what has been found."""

    def __init__(self, name: str, folder: Path, findings: Path) -> None:
        from hostile import targets, watch

        self.target, self.targets, self.signature = targets.TARGETS[name], targets, watch.signature
        self.inside, outside = targets.surroundings(folder)
        os.chdir(self.inside)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.inside / "tmp")
        self.file = self.inside / f"input{self.target.suffix}"
        self.findings, self.report = findings, Report(name)
        self.place, self.told = folder / "report.json", 0.0
        self.slow = SLOW
        # What is imported at first use is, before anybody watches.
        quiet = randomness.Random(0)
        for _ in range(40):
            self.file.write_bytes(self.target.make(quiet))
            self._read()
        self.watch, self.memory = watch.Watch(self.inside, outside, self.target.names_files), watch.Memory()
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + BACKSTOP, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def _read(self) -> BaseException | None:
        try:
            self.target.read(self.file)
        except BaseException as error:
            return error
        return None

    def one(self, data: bytes) -> None:
        """Read one input, and note what must not be."""
        self.file.write_bytes(data)
        self.memory.begin()
        self.watch.begin()
        began = time.process_time()
        error = self._read()
        seconds = time.process_time() - began
        trespasses, grown = self.watch.end(), self.memory.grown()
        report = self.report
        report.inputs += 1
        report.accepted += error is None
        report.peak, report.slowest = max(report.peak, grown), max(report.slowest, seconds)
        if isinstance(error, KeyboardInterrupt):
            raise error
        if error is not None and not isinstance(error, self.targets.FOR_PEOPLE):
            self._fault(self.signature(error, self._mine), f"{type(error).__name__}: {error}", data)
        elif error is not None and not str(error).strip():
            self._fault(f"no message: {type(error).__name__}", "an error without a message", data)
        elif error is not None and len(str(error)) > 20_000:
            self._fault("a message of more than 20,000 characters", str(error)[:500], data)
        if trespasses:
            self._fault(f"touched: {trespasses[0].split(' ')[0]}", "; ".join(trespasses)[:500], data)
        if grown > self.target.memory:
            self._fault("memory", f"{grown >> 20} MiB for an input of {len(data):,} bytes", data)
        if seconds > self.slow:
            self._fault("time", f"{seconds:.1f} s of CPU for an input of {len(data):,} bytes", data)

        if time.monotonic() > self.told + 1:
            self.tell()

    def tell(self) -> None:
        partial = self.place.with_suffix(".part")
        partial.write_text(json.dumps(dataclasses.asdict(self.report)))
        partial.replace(self.place)
        self.told = time.monotonic()

    @staticmethod
    def _mine(file: str) -> bool:
        return any(f"/{part}/" in file for part in ("netassay", "producer", "worker")) and "site-packages" not in file

    def _fault(self, sort: str, what: str, data: bytes) -> None:
        count, known, place = self.report.faults.get(sort, (0, "", ""))
        if not place or len(data) < Path(place).stat().st_size:
            word = "".join(letter if letter.isalnum() else "-" for letter in sort)[:80]
            place = str(self.findings / f"{self.target.name}-{word}{self.target.suffix}")
            Path(place).write_bytes(data)
            known = what[:500]
        self.report.faults[sort] = [count + 1, known, place]


def by_mutation(reading: Reading, number: int, seconds: float, most: int) -> None:
    """Our own mutations of valid inputs, which know the formats; the same for the same number."""
    end, place = time.monotonic() + seconds, 0
    while time.monotonic() < end and place < most:
        reading.one(reading.target.make(randomness.Random(f"{number}/{place}")))
        place += 1


def by_atheris(reading: Reading, number: int, seconds: float) -> None:
    """libFuzzer's own mutations of valid inputs, led by the branches of our Python that they reach; never returns."""
    import atheris

    corpus = reading.findings / "corpus" / reading.target.name
    corpus.mkdir(parents=True, exist_ok=True)
    reading.slow = 6 * SLOW  # every branch is counted
    random = randomness.Random(number)
    for place in range(100):
        (corpus / str(place)).write_bytes(reading.target.make(random))
    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={number}",
        "-rss_limit_mb=0",
        "-max_len=65536",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, "-handle_segv=0", str(corpus)], reading.one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    parser.add_argument("findings", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--most", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    given_ = parser.parse_args()
    if given_.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["netassay", "producer"]):
            reading = Reading(given_.target, given_.folder, given_.findings)
        by_atheris(reading, given_.seed, given_.seconds)
    reading = Reading(given_.target, given_.folder, given_.findings)
    by_mutation(reading, given_.seed, given_.seconds, given_.most)
    reading.tell()


if __name__ == "__main__":
    main()
