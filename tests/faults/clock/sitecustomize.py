"""A wall clock that can be set wrong for one process, never for the machine.

Python imports this at its start where the folder is on PYTHONPATH. While the file <NETASSAY_TEST_CLOCKS>/<process id>
exists, the clock of that process is so many seconds off as it says. Monotonic clocks are left alone, as no operating
system lets those jump.
"""

import os
import time

_folder = os.environ.get("NETASSAY_TEST_CLOCKS")

if _folder:
    _time, _time_ns = time.time, time.time_ns

    def _off() -> float:
        try:
            with open(f"{_folder}/{os.getpid()}", encoding="ascii") as file:
                return float(file.read() or 0)
        except (OSError, ValueError):
            return 0.0

    time.time = lambda: _time() + _off()
    time.time_ns = lambda: _time_ns() + int(1e9 * _off())
