"""The side log: what jobs themselves witness, written where no part of the lab can lose or double it.

A job with a `log` appends one JSON line before its work and one after it. The file is opened with O_APPEND, written in
one call and synced, so lines of many processes do not mix and outlive a killed process or machine. A test compares
them with the store: which jobs really started, how often, in which process.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

SideLog = Annotated[str, Field(description="path of a side log to append a start and an end line to; empty: none")]
Tag = Annotated[int, Field(description="any number; makes jobs distinct that are otherwise the same")]


@dataclass(frozen=True)
class Line:
    """event: `start` or `end`. monotonic: seconds of that host's monotonic clock, comparable on one host only."""

    job: str
    event: str
    pid: int
    monotonic: float


def append(path: str, event: str, jobs: Sequence[str]) -> None:
    """Append one line for each job, in one synced write. Does nothing where `path` is empty."""
    if not path or not jobs:
        return
    now = time.monotonic()
    lines = [json.dumps({"job": job, "event": event, "pid": os.getpid(), "monotonic": now}) + "\n" for job in jobs]
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, "".join(lines).encode())
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def witnessed(path: str, job: str) -> Iterator[None]:
    """A start line before the block, an end line after it unless it raises or the process dies."""
    append(path, "start", [job])
    yield
    append(path, "end", [job])


def read(path: str | Path) -> list[Line]:
    """All lines in the order written; none where there is no file. A last line cut by a power loss is left out."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return []
    return [Line(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]
