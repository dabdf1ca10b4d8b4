"""A compute child as its supervisor sees it: a process, two pipes, a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from worker.limits import cause_of_exit, resident

#: How much of its output is kept of a child that died.
LOG_BYTES = 64 * 1024
#: Importing torch from a cold disk takes a minute; nothing sane takes longer.
PREPARE_SECONDS = 300.0
#: How often a waiting supervisor looks at the clock and the requests to stop.
_TICK = 0.1
#: How often it looks at the memory of the child; quick groups are over before, and RLIMIT_DATA holds meanwhile.
_LOOK = 0.25
#: What a child may take to end after it has closed its end of the results.
_END_SECONDS = 2.0
#: Variables that hold addresses and passwords, by how they begin and by a word in them; a child gets none of them.
_PRIVATE = (
    "NETASSAY_BROKER", "NETASSAY_STORE", "NETASSAY_ARTIFACTS", "FSSPEC_", "AWS_", "AZURE_", "GOOGLE_", "BOTO_", "PG",
    "REDIS", "POSTGRES", "CELERY_", "FLOWER_",
)  # fmt: skip
_SECRET = re.compile(
    r"(^|_)(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIALS?|(ACCESS|API|PRIVATE)_KEY|AUTH)(_|$)", re.IGNORECASE
)


class ChildDied(Exception):
    """The child ended, or was killed, in the middle of something. cause as in `netassay.job.CAUSES`.

    code: its exit status as `subprocess` gives it; None where the supervisor killed it.
    """

    def __init__(self, cause: str, message: str, log: str, code: int | None = None) -> None:
        super().__init__(message)
        self.cause, self.message, self.log, self.code = cause, message, log, code

    @property
    def limited(self) -> bool:
        """The supervisor killed it because it was beyond a limit."""
        return self.code is None and self.cause in ("time", "memory")


class Stopped(Exception):
    """The supervisor was asked to stop at once; the child has been killed."""


class Child:
    """A spawned compute process. Not thread-safe: it belongs to one slot. OSError where none can be started.

    base: bytes resident when it was prepared last, which limits count from; clean: those that its imports took.
    started: monotonic.
    """

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self.libraries: set[str] = set()
        self.about: dict[str, Any] = {}
        with contextlib.ExitStack() as unless_started, contextlib.ExitStack() as ends:
            # Before the process: once that runs, nothing that needs a descriptor may fail.
            self._selector = selectors.DefaultSelector()
            unless_started.callback(self._selector.close)
            results, results_end = _pipe(unless_started, ends)
            log, log_end = _pipe(unless_started, ends)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.child", str(results_end), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log_end,
                stderr=log_end,
                pass_fds=(results_end,),
                env=_environment(artifacts),
                process_group=0,  # so that what a job starts can be killed with it
            )
            unless_started.pop_all()
        self._results, self._log = results, log
        self._lines, self._partial, self._tail = [], bytearray(), bytearray()  # type: list[bytes], bytearray, bytearray
        assert self.process.stdin is not None
        self._jobs, self._unsent = self.process.stdin.fileno(), bytearray()
        for end in (results, log, self._jobs):
            os.set_blocking(end, False)
        for end in (results, log):
            self._selector.register(end, selectors.EVENT_READ)
        self._closed = False
        self.base = self.clean = 0
        self.started = time.monotonic()

    def prepare(self, libraries: Sequence[str], stop: Callable[[], bool]) -> None:
        """Import what jobs will need, before limits are set and clocks run. Raises ChildDied, Stopped."""
        missing = set(libraries) - self.libraries
        if missing or not self.about:
            before = resident(self.process.pid) if self.about else 0
            wanted = {"libraries": sorted(missing), "artifacts": str(self.artifacts), "threads": 1}
            self.send({"prepare": wanted})
            self.about |= json.loads(self.line(time.monotonic() + PREPARE_SECONDS, None, stop))["ready"]
            self.libraries |= missing
            self.clean += resident(self.process.pid) - before
        self.base = resident(self.process.pid)

    def send(self, request: dict[str, Any]) -> None:
        """Give it work. What the pipe does not take now is sent by `line`: one that does not read holds nobody up."""
        self._drain_log()
        self._tail.clear()  # what earlier jobs said is not these jobs' log
        if not self._unsent:
            self._selector.register(self._jobs, selectors.EVENT_WRITE)
        self._unsent += (json.dumps(request, separators=(",", ":")) + "\n").encode()
        self._push()

    def _push(self) -> None:
        try:
            del self._unsent[: os.write(self._jobs, self._unsent)]
        except BlockingIOError:
            return
        except BrokenPipeError:  # its death is noticed, and named, by the next read
            self._unsent.clear()
        if not self._unsent:
            self._selector.unregister(self._jobs)

    def line(self, deadline: float, memory: int | None, stop: Callable[[], bool]) -> bytes:
        """The next line of results.

        Raises ChildDied where the child ends, is past `deadline` (monotonic) or its family holds more than `memory`
        bytes resident beyond what it held when prepared; Stopped as soon as `stop()` says so. It is dead then.
        """
        look, late = time.monotonic() + _LOOK, 0.0
        while not self._lines:
            now = time.monotonic()
            if stop():
                self.kill()
                raise Stopped
            if now > deadline:
                # This process may have been stopped itself for so long, and the results lie in the pipe.
                late = late or now
                if not self._pump(_TICK if self._partial else 0.0):
                    self._ended()
                if self._lines:
                    break
                if not self._partial or now - late > _END_SECONDS:
                    self._give_up("time", "it was still running at its time limit")
                continue
            if memory is not None and now >= look:
                held = resident(self.process.pid) - self.base
                if held > memory:
                    self._give_up("memory", f"it held {held / 2**20:,.0f} MiB, its limit is {memory / 2**20:,.0f} MiB")
                look = now + _LOOK
            # A job's own forks may hold the pipe open after the child has died, hence both questions.
            ended = not self.alive
            if not self._pump(min(_TICK, max(0.0, deadline - now))) or (ended and not self._lines):
                self._ended()
        return self._lines.pop(0)

    def _pump(self, timeout: float) -> bool:
        """Read what has come; False at the end of the results."""
        for key, _ in self._selector.select(timeout):
            if key.fd == self._jobs:
                self._push()
                continue
            try:
                data = os.read(key.fd, 1 << 18)
            except BlockingIOError:
                continue
            if key.fd == self._log:
                if not data:
                    self._selector.unregister(self._log)
                self._tail += data
                del self._tail[:-LOG_BYTES]
            elif not data:
                return False
            else:
                self._partial += data
                if b"\n" in data:
                    *whole, rest = self._partial.split(b"\n")
                    self._lines += map(bytes, whole)
                    self._partial = bytearray(rest)
        return True

    def _ended(self) -> NoReturn:
        """Name the death of a child that has closed its results, or is gone."""
        try:
            code = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._give_up("crash", "the process closed its pipes in the middle of the job")
        self._kill_group()
        cause, message = cause_of_exit(code)
        raise ChildDied(cause, message, self._close(), code)

    def _give_up(self, cause: str, message: str) -> NoReturn:
        raise ChildDied(cause, message, self.kill())

    def kill(self) -> str:
        """End it now, with all it has started in its group. Returns the tail of its log."""
        if self.process.returncode is None:
            self._kill_group()
            self.process.wait()
        return self._close()

    def _kill_group(self) -> None:
        # Only before the child is waited for, or at once after: later its number may be another's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def alive(self) -> bool:
        if self.process.returncode is None and self.process.poll() is not None:
            self._kill_group()
        return self.process.returncode is None

    def _close(self) -> str:
        if not self._closed:  # twice would close what others have opened under these numbers since
            self._closed = True
            self._drain_log()
            self._selector.close()
            os.close(self._results)
            os.close(self._log)
            assert self.process.stdin is not None
            self.process.stdin.close()
        return bytes(self._tail).decode(errors="replace")

    def _drain_log(self) -> None:
        """Read what is there, a pipe full at most: somebody may still be writing."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                self._tail += os.read(self._log, LOG_BYTES)
                del self._tail[:-LOG_BYTES]


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe, the closing of its two ends left to these stacks."""
    start, end = os.pipe()
    reading.callback(os.close, start)
    writing.callback(os.close, end)
    return start, end


def _environment(artifacts: Path) -> dict[str, str]:
    """Ours, without what opens doors. The artifacts are those of this host, for what a job starts as well."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    rest = {
        name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE) and not _SECRET.search(name)
    }
    return rest | threads | {"NETASSAY_ARTIFACTS": str(artifacts)}
