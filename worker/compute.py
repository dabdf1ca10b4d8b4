"""A compute child as its supervisor sees it: a process, two pipes, a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from worker.limits import cause_of_exit, resident

#: How much of its output is kept of a child that died.
LOG_BYTES = 64 * 1024
#: Importing torch from a cold disk takes a minute; nothing sane takes longer.
PREPARE_SECONDS = 300.0
#: How often a waiting supervisor looks at the clock, the child's memory and the requests to stop.
_TICK = 0.1
#: Settings that hold addresses and passwords; a child gets neither.
_PRIVATE = ("NETASSAY_BROKER", "NETASSAY_STORE")


class ChildDied(Exception):
    """The child ended, or was killed, in the middle of something. cause as in `netassay.job.CAUSES`."""

    def __init__(self, cause: str, message: str, log: str) -> None:
        super().__init__(message)
        self.cause, self.message, self.log = cause, message, log


class Stopped(Exception):
    """The supervisor was asked to stop at once; the child has been killed."""


class Child:
    """A spawned compute process. Not thread-safe: it belongs to one slot."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self.libraries: set[str] = set()
        self.about: dict[str, Any] = {}
        results, results_end = os.pipe()
        log, log_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.child", str(results_end), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log_end,
                stderr=log_end,
                pass_fds=(results_end,),
                env=_environment(),
            )
        finally:
            os.close(results_end)
            os.close(log_end)
        self._results, self._log = results, log
        self._lines, self._partial, self._tail = [], bytearray(), bytearray()  # type: list[bytes], bytearray, bytearray
        self._selector = selectors.DefaultSelector()
        for end in (results, log):
            os.set_blocking(end, False)
            self._selector.register(end, selectors.EVENT_READ)
        self.base = 0

    def prepare(self, libraries: Sequence[str], stop: Callable[[], bool]) -> None:
        """Import what jobs will need, before limits are set and clocks run. Raises ChildDied, Stopped."""
        missing = set(libraries) - self.libraries
        if missing or not self.about:
            wanted = {"libraries": sorted(missing), "artifacts": str(self.artifacts), "threads": 1}
            self.send({"prepare": wanted})
            self.about |= json.loads(self.line(time.monotonic() + PREPARE_SECONDS, None, stop))["ready"]
            self.libraries |= missing
        self.base = resident(self.process.pid)

    def send(self, request: dict[str, Any]) -> None:
        data = (json.dumps(request, separators=(",", ":")) + "\n").encode()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is noticed, and named, by the next read
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def line(self, deadline: float, memory: int | None, stop: Callable[[], bool]) -> bytes:
        """The next line of results.

        Raises ChildDied where the child ends, is past `deadline` (monotonic) or its family holds more than `memory`
        bytes resident beyond what it held when prepared; Stopped as soon as `stop()` says so. It is dead then.
        """
        look = 0.0
        while not self._lines:
            now = time.monotonic()
            if stop():
                self.kill()
                raise Stopped
            if now > deadline:
                self._give_up("time", "it was still running at its time limit")
            if memory is not None and now >= look:
                held = resident(self.process.pid) - self.base
                if held > memory:
                    self._give_up("memory", f"it held {held / 2**20:,.0f} MiB, its limit is {memory / 2**20:,.0f} MiB")
                look = now + 2.5 * _TICK
            if not self._pump(min(_TICK, max(0.0, deadline - now))):
                code = self.process.wait()
                cause, message = cause_of_exit(code)
                raise ChildDied(cause, message, self._close())
        return self._lines.pop(0)

    def _pump(self, timeout: float) -> bool:
        """Read what has come; False at the end of the results."""
        for key, _ in self._selector.select(timeout):
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
                *whole, rest = self._partial.split(b"\n")
                if whole:
                    self._lines += map(bytes, whole)
                    self._partial = bytearray(rest)
        return True

    def _give_up(self, cause: str, message: str) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        raise ChildDied(cause, message, self._close())

    def kill(self) -> str:
        """End it now. Returns the tail of its log."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return self._close()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _close(self) -> str:
        for _ in self._rest_of_log():
            pass
        self._selector.close()
        for end in (self._results, self._log):
            with contextlib.suppress(OSError):
                os.close(end)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        return bytes(self._tail).decode(errors="replace")

    def _rest_of_log(self) -> Iterator[None]:
        while True:
            try:
                data = os.read(self._log, 1 << 16)
            except OSError:
                return
            if not data:
                return
            self._tail += data
            del self._tail[:-LOG_BYTES]
            yield


def _environment() -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {name: value for name, value in os.environ.items() if name not in _PRIVATE} | threads
