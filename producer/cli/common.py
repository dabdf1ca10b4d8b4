"""What the verbs share: options, the store, signs of life, JSON."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from netassay.settings import Settings
    from netassay.store.database import Database

#: Exit codes; 0 is fine. Where several apply (to the batches of one `wait`, say) it is the highest.
SOME_FAILED, BAD_INPUT, CANCELLED, NO_ANSWER, TIMED_OUT, PAUSED = 1, 2, 3, 4, 5, 6
#: How long a shell waits for names of batches.
COMPLETION_SECONDS = 2.0


def batch_names(incomplete: str) -> list[str]:
    """For the shell: the newest batches whose names start so; none where the store does not answer."""
    from sqlalchemy import text

    from producer.lab import within

    def ask() -> list[str]:
        with open_store().read() as connection:
            statement = text("SELECT name FROM batch WHERE state <> 'arriving' ORDER BY id DESC LIMIT 1000")
            return [name for name in connection.execute(statement).scalars() if name.startswith(incomplete)]

    try:
        return within(COMPLETION_SECONDS, ask, "the store does not answer")
    except Exception:  # whatever it is, a person in the middle of a line must not see it
        return []


def method_names(incomplete: str) -> list[str]:
    """For the shell: the methods whose names start so."""
    from netassay import catalogue

    try:
        return [name for name in catalogue.names() if name.startswith(incomplete)]
    except Exception:  # as above
        return []


def causes(incomplete: str) -> list[str]:
    """For the shell: the causes of failure that start so."""
    from netassay.job import CAUSES

    return [cause for cause in CAUSES if cause.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
BatchName = Annotated[str, typer.Argument(metavar="BATCH", help="Name of a batch.", autocompletion=batch_names)]


def read_settings() -> Settings:
    """The settings of this process. Raises BadSettings naming each variable that is wrong."""
    from netassay.settings import settings

    return settings()


def open_store() -> Database:
    """The records, ready to use. Raises StoreError where there are none yet."""
    from netassay.store.database import Database, StoreError

    config = read_settings()
    database = Database(config.store_url)
    if not database.exists():
        raise StoreError(
            f"there is no lab in {config.root} yet; start one with: netassay up (or set NETASSAY_HOME / NETASSAY_STORE)"
        )
    database.prepare()
    return database


def end_in_order() -> None:
    """Let SIGTERM end this verb as Ctrl-C does, which removes what it has written by then."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def working(words: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error for what may take longer than two seconds; gone when it is over."""
    from rich.progress import Progress

    from producer.show import errors

    # Where there is no terminal, Rich would leave an empty line.
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bars:
        bar = bars.add_task(words, total=None)  # until the first share is known it only shows that something goes on
        yield lambda share: bars.update(bar, total=1.0, completed=share)


@contextmanager
def busy(words: str) -> Iterator[None]:
    """A sign of life on standard error for what says nothing while it goes on."""
    from producer.show import errors

    with errors.status(f"{words} ..."):
        yield


def print_output(verb: str, value: Any) -> None:
    """What the verb says to a machine, held against its model in `producer.cli.output`."""
    from producer.cli.output import OUTPUTS

    print_json(OUTPUTS[verb].model_validate(value).model_dump())


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    from producer.wording import strict

    print(json.dumps(strict(value), default=str, ensure_ascii=False, allow_nan=False))
