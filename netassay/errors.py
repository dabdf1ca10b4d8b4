"""The errors that are for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Its message says what happened, why, and what to try: it is shown as it is, without a traceback."""


class NoAnswer(UserError):
    """A database, a broker or an object store does not answer, or refuses us: once that is mended, the same will do."""
