"""How the services write their logs: a line an event, for people or for machines (`NETASSAY_LOGS=json`).

As JSON every line is an object with `timestamp` (ISO 8601, UTC, milliseconds), `level`, `event`, `logger`, `process`
(which service), `pid`, `host`, and the fields of the event: `worker`, `chunk`, `batch` where they are known,
`exception` as text. What libraries log, warn of or print goes the same way. In neither form are values of variables in
tracebacks, for settings hold passwords; and as JSON passwords in addresses are masked wherever they stand.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, TextIO

import structlog

from netassay.settings import masked, settings

#: A printed line without end is cut here: whoever prints a bar without line breaks must not fill the memory.
LONGEST_LINE = 1 << 16


def as_json() -> bool:
    return settings().logs == "json"


class _Lines(structlog.PrintLogger):
    """Lines on standard output; where the disk that takes them is full, they are lost, and nothing else with them."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def configure(process: str, about: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Write this process's logs as the settings say. process: what it is called in them; about: what to add to each
    event. Once a process; as JSON it takes over the root logger, warnings, uncaught exceptions, and what is printed."""
    if as_json():
        _configure_json(process, about)
        return
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Where Rich is installed, structlog would print the local variables of each frame, and settings hold
            # passwords.
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        logger_factory=lambda *_: _Lines(),
    )


def complain(words: str) -> None:
    """Say on standard error, or as an event where logs are JSON, why this process cannot go on."""
    if as_json():
        structlog.get_logger("netassay").error("cannot_go_on", why=words)
    else:
        print(words, file=sys.stderr, flush=True)


def line(process: str, event: str, **fields: Any) -> str:
    """One line of JSON, with its end, as the services write them."""
    about = {"timestamp": _now(), "level": "info", "event": event, "logger": "output", "process": process}
    return _render(None, "", {**about, "host": socket.gethostname(), **fields}) + "\n"


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03}Z"


def _configure_json(process: str, about: Callable[[], Mapping[str, Any]]) -> None:
    fixed = {"process": process, "pid": os.getpid(), "host": socket.gethostname()}

    def stamp(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("timestamp", _now())
        # What an event says of itself counts more; what it tells everybody's fields by is not its own to change.
        return {**about(), **event, **fixed}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        stamp,
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=("category", "stream")), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("netassay").setLevel(logging.INFO)
    # What cannot be written (a full disk) would be told on standard error, which is on its way here.
    logging.raiseExceptions = False
    warnings.showwarning = _warn
    sys.excepthook = _uncaught
    threading.excepthook = lambda failed: _uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)
    sys.stdout, sys.stderr = _Printed("stdout"), _Printed("stderr")


def _render(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    return json.dumps(_plain(event), default=lambda value: masked(repr(value)))


def _plain(value: Any) -> Any:
    """The same with passwords masked, and without numbers that JSON does not know."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("py.warnings").warning("%s", message, extra={"category": category.__name__})


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger("netassay").critical("uncaught", exc_info=(kind, error or kind(), trace))


class _Printed(io.TextIOBase):
    """A stream whose lines become events: what libraries print must not break a log that machines read."""

    def __init__(self, name: str) -> None:
        self._name, self._left, self._lock = name, "", threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, words: str) -> int:
        with self._lock:
            *lines, self._left = (self._left + words).split("\n")
            if len(self._left) > LONGEST_LINE:
                lines, self._left = [*lines, self._left], ""
        for one in filter(str.strip, lines):
            logging.getLogger("output").warning("%s", one.rstrip(), extra={"stream": self._name})
        return len(words)

    def flush(self) -> None:
        pass
