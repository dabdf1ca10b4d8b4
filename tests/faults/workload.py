"""What is submitted in a fault run: a seeded stream of batches of diagnostics, and what must come of each job.

Short and long jobs, jobs that vectorise, that fail, kill their process, take memory without end, hang, and spin in C;
with limits small enough that they end in seconds. Batches overlap: one may hold jobs of an earlier one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netassay import catalogue

#: Seconds after which a hanging job is killed.
HANG_LIMIT = 1
#: Seconds that a job of a tenth of a second may take: enough on a loaded machine, and less than a worker may be stopped
#: with the default settings without being taken for lost.
TIGHT_LIMIT = 6.0
#: Bytes an endless allocation may take.
MEMORY_LIMIT = 150_000_000
#: How a job may end that has brought its process down three times, or was killed from outside the third time: of a
#: SIGKILL the lab says that it is most often the kernel's, out of memory.
KILLED = ("failed:crash", "failed:memory")
#: Params of one batch lie below this number of tags.
TAGS = 100_000


@dataclass(frozen=True)
class Expected:
    """A job that was submitted. ends: how it may end, as a state or `failed:cause`; culprit: it is its own fault."""

    name: str
    ends: tuple[str, ...]
    culprit: bool = False


@dataclass
class Batch:
    """A batch of the stream, and what became of submitting it."""

    name: str
    entries: Sequence[Mapping[str, Any]]
    jobs: dict[str, Expected]
    weight: float = 1.0
    path: Path | None = None
    accepted: float | None = None
    """when `netassay submit` said so (monotonic)"""
    tries: int = 0
    """submissions that were begun; each may give failed jobs a new start"""
    retries: int = 0
    cancelled: float | None = None
    """when it was cancelled for good"""
    watched: bool = False
    """its cancellation was in a quiet moment, and is held against the clock"""
    apart: bool = False
    """no later batch of the stream takes jobs of it"""
    stirred: list[tuple[float, float]] = field(default_factory=list)
    """from, to: it was paused or cancelled for a while"""

    def write(self, folder: Path) -> Path:
        self.path = folder / f"{self.name}.json"
        self.path.write_text(json.dumps({"name": self.name, "jobs": self.entries}))
        return self.path


def entry(method: str, params: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    return {"method": method, "params": dict(params), **rest}


def _names(method: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = catalogue.get(method)
    return [found.module.name(found.Params(**row)) for row in rows]


@dataclass
class Stream:
    """Batches, one after another, from a seed. log: the side log of their jobs."""

    seed: int
    log: Path
    tag: str
    """in the names of batches"""
    first: int = 0
    """tags below are others'"""
    made: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def next(self) -> Batch:
        """The next batch: some 15 seconds of work for one slot."""
        draw, number = self.draw, len(self.made)
        base = self.first + number * TAGS
        batch = Batch(f"{self.tag}-{number}", [], {}, weight=draw.choice([0.5, 1.0, 1.0, 3.0]))
        entries: list[dict[str, Any]] = []
        for part in (self._quick, self._short, self._tight, self._long, self._company):
            entries += part(batch, base)
        for part, likely in ((self._failing, 0.7), (self._crashing, 0.5), (self._swelling, 0.4), (self._hanging, 0.6)):
            if draw.random() < likely:
                entries += part(batch, base)
        draw.shuffle(entries)
        near = [one for one in self.made[-4:] if not one.apart]
        if near and draw.random() < 0.5:
            other = draw.choice(near)
            shared = draw.sample(list(other.entries), k=min(3, len(other.entries)))
            entries[len(entries) // 2 : len(entries) // 2] = [dict(one) for one in shared]
            for one in shared:
                for name in self._called(one):
                    batch.jobs[name] = other.jobs[name]
        batch.entries = entries
        self.made.append(batch)
        return batch

    def sleepers(self, name: str, jobs: int, start: int | None = None) -> Batch:
        """A batch of jobs that sleep three seconds each, for a cancellation. start: its first tag; where it is that of
        another such batch, the two share their jobs."""
        start = self.first + len(self.made) * TAGS if start is None else start
        batch = Batch(f"{self.tag}-{name}", [], {}, apart=True)
        one = entry("diagnostics.sleep", {"seconds": 3.0}, grid={"tag": {"range": [start, start + jobs]}})
        batch.entries = [self.add(batch, one, ("done",))]
        self.made.append(batch)
        return batch

    # --- the parts of a batch ------------------------------------------------------------------------------------

    def _rows(self, one: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The params of an entry with at most one range or list as its grid, or a zip of lists."""
        params = dict(one["params"])
        if "zip" in one:
            axes = one["zip"]
            return [{**params, **dict(zip(axes, values, strict=True))} for values in zip(*axes.values(), strict=True)]
        for axis, values in one.get("grid", {}).items():
            found = range(*values["range"]) if isinstance(values, Mapping) else values
            return [{**params, axis: value} for value in found]
        return [params]

    def _called(self, one: Mapping[str, Any]) -> list[str]:
        return _names(one["method"], self._rows(one))

    def add(self, batch: Batch, one: dict[str, Any], ends: tuple[str, ...], culprit: bool = False) -> dict[str, Any]:
        """An entry whose jobs write to the side log, and what is expected of each of them."""
        one["params"]["log"] = str(self.log)
        batch.jobs |= {name: Expected(name, ends, culprit) for name in self._called(one)}
        return one

    def _quick(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        number = self.draw.randrange(50, 500)
        one = entry("diagnostics.echo", {"tag": base}, grid={"value": {"range": [0, number]}})
        return [self.add(batch, one, ("done",))]

    def _short(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        tags = {"range": [base, base + self.draw.randrange(20, 60)]}
        one = entry("diagnostics.sleep", {"seconds": 0.05}, grid={"tag": tags})
        return [self.add(batch, one, ("done",))]

    def _tight(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        tags = {"range": [base, base + self.draw.randrange(10, 30)]}
        one = entry("diagnostics.sleep", {"seconds": 0.1}, grid={"tag": tags}, limits={"seconds": TIGHT_LIMIT})
        return [self.add(batch, one, ("done",))]

    def _long(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        seconds = round(self.draw.uniform(1.0, 3.0), 2)
        tags = {"range": [base, base + self.draw.randrange(1, 4)]}
        one = entry(
            "diagnostics.sleep", {"seconds": seconds, "hold_lock": self.draw.random() < 0.5}, grid={"tag": tags}
        )
        return [self.add(batch, one, ("done",))]

    def _company(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        """Jobs that share a call, in the midst of which some of them spoil it for all."""
        number = self.draw.randrange(8, 25)
        spoiling = {self.draw.randrange(number)} if self.draw.random() < 0.5 else set()
        axes = {"tag": list(range(base, base + number)), "spoil": [place in spoiling for place in range(number)]}
        one = entry("company.sleep", {"seconds": 0.1}, zip=axes)
        self.add(batch, one, ("done",))
        for place in spoiling:
            (name,) = _names("company.sleep", [{**one["params"], "tag": base + place, "spoil": True}])
            batch.jobs[name] = Expected(name, KILLED, culprit=True)
        return [one]

    def _failing(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        ends = {
            "invalid_input": "failed:invalid_input",
            "numerical": "failed:numerical",
            "not_applicable": "not_applicable",
            "error": "failed:error",
            "unstorable": "failed:unstorable",
        }
        found = []
        for cause in self.draw.sample(list(ends), k=3):
            one = entry("diagnostics.fail", {"cause": cause, "tag": base})
            found.append(self.add(batch, one, (ends[cause],)))
        return found

    def _crashing(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        by = self.draw.choice(["SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM", "exit"])
        one = entry("diagnostics.crash", {"by": by, "tag": base})
        return [self.add(batch, one, KILLED, culprit=True)]

    def _swelling(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        one = entry("diagnostics.allocate", {"endless": True, "tag": base}, limits={"memory": MEMORY_LIMIT})
        return [self.add(batch, one, KILLED, culprit=True)]

    def _hanging(self, batch: Batch, base: int) -> list[dict[str, Any]]:
        if self.draw.random() < 0.3:
            one = entry("diagnostics.sleep", {"seconds": 60.0, "hold_lock": True, "tag": base})
        else:
            busy = self.draw.choice(["python", "c", "c_without_lock"])
            one = entry("diagnostics.burn", {"seconds": 60.0, "busy": busy, "tag": base})
        one["limits"] = {"seconds": HANG_LIMIT}
        return [self.add(batch, one, ("failed:time", *KILLED), culprit=True)]
