"""The memory of a worker, given out to its slots: two jobs that need most of it do not meet."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

#: How often a waiting slot looks whether its jobs are still wanted.
_LOOK = 0.1


class Room:
    """So many bytes, first come, first served: whoever needs much is not passed by those who need little."""

    def __init__(self, size: int) -> None:
        self.size = self._free = size
        self._turns: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, wanted: int, seconds: float, unwanted: Callable[[], bool]) -> Iterator[bool]:
        """So many bytes for the time of the block; False, and none, where they did not become free within `seconds`,
        are more than there are, or `unwanted()` said so meanwhile."""
        taken = self._take(wanted, seconds, unwanted)
        try:
            yield taken
        finally:
            if taken:
                with self._changed:
                    self._free += wanted
                    self._changed.notify_all()

    def _take(self, wanted: int, seconds: float, unwanted: Callable[[], bool]) -> bool:
        if wanted > self.size:
            return False
        turn, deadline = object(), time.monotonic() + seconds
        with self._changed:
            self._turns.append(turn)
            try:
                while self._turns[0] is not turn or wanted > self._free:
                    if time.monotonic() > deadline or unwanted():
                        return False
                    self._changed.wait(_LOOK)
                self._free -= wanted
                return True
            finally:
                self._turns.remove(turn)
                self._changed.notify_all()
