"""`python -I -S producer/tether.py PARENT COMMAND...`: run a command that ends when its parent does, kill -9 included.

On Linux the kernel sees to it and this process becomes the command; elsewhere it stays as the command's parent and
watches its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; survives exec
        if os.getppid() != parent:
            return 1
        os.execvp(command[0], command)
    import subprocess
    import time

    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            child.kill()
        time.sleep(0.5)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
