"""What a process that reads hostile input touches: files by Python, files by C, memory, time.

Python's own opens, processes and sockets are seen by an audit hook, which cannot be taken out again. Libraries in C
open files behind its back: for these the folder `outside`, which every hostile path points to, is watched by inotify.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Events that no reader has any reason for.
_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "pickle.find_class", "os.chown",
    "os.putenv", "os.unsetenv", "ftplib.connect", "urllib.Request", "webbrowser.open", "os.setxattr",
)  # fmt: skip
#: Events that change a file; the first argument is its path, of renames and links the second one too.
_CHANGING = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "os.utime",
    "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.unpack_archive",
)  # fmt: skip
_LISTING = ("os.listdir", "os.scandir", "os.chdir")

_IN_ACCESS, _IN_MODIFY, _IN_ATTRIB, _IN_OPEN, _IN_CREATE, _IN_DELETE = 0x1, 0x2, 0x4, 0x20, 0x100, 0x200
_IN_NONBLOCK = 0o4000


class Watch:
    """Collects what this process does beyond `inside`, from `begin` on.

    inside: the one folder it may write to. outside: a folder that nothing may touch. names_files: the input names files
    for its reader, as a sweep does, so reading elsewhere is its right; writing never is.
    """

    def __init__(self, inside: Path, outside: Path, names_files: bool) -> None:
        self.inside, self.names_files = os.path.realpath(inside), names_files
        self.trespasses: list[str] = []
        self.active = False
        code = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *(path for path in sys.path if path)}
        self._readable = tuple(
            {os.path.realpath(path) for path in code} | {"/usr/lib", "/usr/share", "/lib", "/etc/localtime"}
        )
        self._inotify = None if names_files else _inotify(outside)
        self._thread = threading.get_ident()
        sys.addaudithook(self._hook)

    def begin(self) -> None:
        self.trespasses = []
        self._changes()
        self.active = True

    def end(self) -> list[str]:
        """What it touched that it may not, in words."""
        self.active = False
        return [*self.trespasses, *self._changes()]

    def _changes(self) -> list[str]:
        if self._inotify is None:
            return []
        with contextlib.suppress(BlockingIOError):
            seen = os.read(self._inotify, 65536)
            return [f"something in the folder outside was touched: {seen[16:80]!r}"]
        return []

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _FORBIDDEN:
            self.trespasses.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            changing = bool(mode and set(str(mode)) & set("wax+")) or bool(
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
            self._look(event, path, changing)
        elif event in _CHANGING:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else 1]:
                self._look(event, path, True)
        elif event in _LISTING:
            self._look(event, arguments[0], False)

    def _look(self, event: str, path: Any, changing: bool) -> None:
        if isinstance(path, int) or path is None:
            return
        name = os.fsdecode(path)
        # By where it really is: a link inside that leads outside is no way out.
        real = os.path.realpath(name)
        if _within(real, self.inside) or (real == "/dev/null"):
            return
        if not changing:
            if self.names_files or any(_within(real, prefix) for prefix in self._readable):
                return
            if real.startswith(("/proc/", "/sys/")) or real in ("/dev/urandom", "/dev/random"):
                return
        self.trespasses.append(f"{event} {'to change' if changing else 'to read'} {name!r:.200}")


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _inotify(folder: Path) -> int | None:
    """A descriptor from which events of this folder are read; None where the system has no inotify."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = libc.inotify_init1(_IN_NONBLOCK)
    except (OSError, AttributeError):
        return None
    wanted = _IN_ACCESS | _IN_MODIFY | _IN_ATTRIB | _IN_OPEN | _IN_CREATE | _IN_DELETE
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(folder), wanted) < 0:
        return None
    return descriptor


class Memory:
    """The peak of this process's resident memory since `begin`, in bytes above where it stood then."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        try:
            self._clear: int | None = os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError:
            self._clear = None
        self._before = 0

    def begin(self) -> None:
        if self._clear is not None:
            with contextlib.suppress(OSError):
                os.write(self._clear, b"5")
        self._before = self._value(b"VmRSS:")

    def grown(self) -> int:
        return self._value(b"VmHWM:") - self._before

    def _value(self, name: bytes) -> int:
        text = os.pread(self._status, 8192, 0)
        return int(text.partition(name)[2].split(None, 1)[0]) << 10


def signature(error: BaseException, mine: Callable[[str], bool]) -> str:
    """The same for the same fault: the type of the error, and the innermost of our own lines that it came through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if mine(file):
            place = f"{Path(file).name}:{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__} in {place}"
