"""Jobs that misbehave in ways of their own, each by itself.

A method as a user would add one, for the tests of the supervisor.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sys
import time
from typing import Literal

from netassay.method import Contract, Needs

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
NEEDS = Needs(seconds=0.1, libraries=())
EXAMPLE = {"jobs": [{"method": "poison.alone", "params": {"how": "well"}}]}


_HOARD: list[bytes] = []


class Params(Contract):
    how: Literal["well", "talk", "shared_memory", "fork", "read_input", "close_pipes", "flood", "hoard", "full"]
    path: str = ""
    """a file to write the process of a fork to"""


class Result(Contract):
    pid: int


def run(params: Params) -> Result:
    if params.how == "talk":
        print("x" * 200_000)
        print("the last words of a job")
        os._exit(3)
    elif params.how == "shared_memory":
        kept = []
        while True:  # shared mappings do not count as data, so the child's own limit does not see them
            kept.append(mmap.mmap(-1, 2**24))
            kept[-1].write(b"\x01" * 2**24)
    elif params.how == "fork":
        if not (fork := os.fork()):
            time.sleep(60)
            os._exit(0)
        with open(params.path, "w") as file:
            file.write(str(fork))
        os.kill(os.getpid(), signal.SIGSEGV)
    elif params.how == "read_input":
        print(len(sys.stdin.read()), file=sys.stderr)
        input("anybody there? ")
    elif params.how == "close_pipes":
        os.closerange(3, 256)
        time.sleep(60)
    elif params.how == "hoard":
        _HOARD.append(b"\x01" * 600_000_000)
    elif params.how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif params.how == "flood":
        for _ in range(2000):
            print("y" * 1000)
    return Result(pid=os.getpid())
