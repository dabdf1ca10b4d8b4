"""What is seen of the jobs from outside: their side log as it grows, and the processes that run them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from worker.limits import family

#: Seconds between two looks at the log and at the processes; on a busy machine it may be more.
LOOK_SECONDS = 0.05


@dataclass
class Run:
    """One start of a job. stop: when its end line was written; None where it wrote none: it raised, or died."""

    job: str
    pid: int
    start: float
    stop: float | None = None
    over: float | None = None
    """when its process was seen to be gone, or to have begun something else; None while neither is so"""
    lived: float | None = None
    """of a process that was seen to be gone: when it was last seen to be there"""

    @property
    def end(self) -> float:
        """When it ran no more, as far as can be seen from outside; for ever where that was not seen."""
        known = [moment for moment in (self.stop, self.over) if moment is not None]
        return min(known, default=float("inf"))


@dataclass
class Witness:
    """Reads side logs as they are written. workers: process ids of the workers there are now."""

    workers: Callable[[], Iterable[int]]
    runs: dict[str, list[Run]] = field(default_factory=dict)
    """job -> its runs in the order of the log"""
    lines: list[tuple[float, str, str, int]] = field(default_factory=list)
    """time, `start` or `end`, job, process: all lines"""
    parent: dict[int, int] = field(default_factory=dict)
    """compute child -> its worker"""
    gone: dict[int, float] = field(default_factory=dict)
    """process -> when it was seen to be gone"""
    errors: list[str] = field(default_factory=list)
    """why it could not look; it looks again"""

    def __post_init__(self) -> None:
        self._open: dict[int, list[Run]] = {}
        self._there: dict[int, float] = {}
        self._file: Path | None = None
        self._read, self._rest = 0, b""
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self._thread.start()

    def follow(self, path: Path) -> None:
        """Read this log from here on; what was seen of others is forgotten."""
        with self._lock:
            self._file, self._read, self._rest = path, 0, b""
            self.runs, self.lines, self._open = {}, [], {}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def open(self, pid: int) -> list[str]:
        """Jobs that this process has started and not ended."""
        with self._lock:
            return [run.job for run in self._open.get(pid, ())]

    def started(self) -> set[str]:
        with self._lock:
            return set(self.runs)

    def look(self) -> None:
        """Read what is new now. Raises nothing for a line that a killed process left unfinished."""
        now = time.monotonic()
        for worker in list(self.workers()):
            for pid in family(worker)[1:]:
                self.parent.setdefault(pid, worker)
        with self._lock:
            if self._file is not None:
                self._append()
            for pid, runs in list(self._open.items()):
                if alive(pid):
                    self._there[pid] = now
                    continue
                self.gone.setdefault(pid, now)
                for run in runs:
                    run.over, run.lived = now, max(run.start, self._there.get(pid, run.start))
                del self._open[pid]

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:  # without eyes everything looks like a violation
                self.errors.append(f"the witness could not look: {type(error).__name__}: {error}")

    def _append(self) -> None:
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError), open(self._file, "rb") as file:
            file.seek(self._read)
            data = file.read()
            self._read += len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._take(line)

    def _take(self, line: bytes) -> None:
        # A process killed in the middle of its write leaves the beginning of a line, and the next one goes on there.
        place = line.rfind(b'{"job"')
        try:
            found = json.loads(line[max(place, 0) :])
            event, job, pid, at = found["event"], found["job"], found["pid"], found["monotonic"]
        except (ValueError, KeyError, TypeError):
            return
        self.lines.append((at, event, job, pid))
        runs = self._open.setdefault(pid, [])
        if event == "start":
            # A process writes the starts of a group at one moment, and has no other job open then.
            for run in [run for run in runs if run.start != at]:
                run.over = at
                runs.remove(run)
            run = Run(job, pid, at)
            self.runs.setdefault(job, []).append(run)
            if job.startswith("fail "):
                run.over = at  # it raises at once, writes no end, and its process goes on
            else:
                runs.append(run)
            return
        ended = next((run for run in runs if run.job == job), None)
        if ended is not None:
            ended.stop = at
            runs.remove(ended)
            return
        # It ended, and its process did, between two looks.
        for run in reversed(self.runs.get(job, [])):
            if run.pid == pid and run.stop is None:
                run.stop = at
                return


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
