"""How worker and dispatcher write their logs: a line an event, for people; no values of variables in tracebacks."""

from __future__ import annotations

import structlog


def configure() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Where Rich is installed, structlog would print the local variables of each frame, and settings hold
            # passwords.
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )
