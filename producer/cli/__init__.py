"""The command line: `netassay VERB`. Heavy imports stay inside the verbs that need them.

Exit codes: 0 fine; 1 some jobs failed, or `doctor` found something missing; 2 bad input or settings, nothing was done;
3 the batch was cancelled; 4 the disk or the store would not; 5 the time to wait is over; 6 the batch is paused;
130 interrupted. With `--json` an error is a JSON object on standard output as well, see `producer.cli.output.Error`.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from netassay import __version__
from netassay.errors import NoAnswer, UserError
from producer.cli import batches, lab, methods, results, stores
from producer.cli.common import BAD_INPUT, NO_ANSWER, print_output


class _Ended(BaseException):
    """Carries what Typer would make an exit code of before `main` sees it."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _Ended from error


app = typer.Typer(
    name="netassay",
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A bulk laboratory for neural networks: submit jobs by the thousand, watch them, keep every result.",
)
_PANELS = {"The lab": lab, "Methods": methods, "Batches": batches, "Records": results, "Stores": stores}
for _panel, _module in _PANELS.items():
    for _verb in _module.verbs.registered_commands:
        _verb.rich_help_panel = _panel
    app.add_typer(_module.verbs)


def main() -> None:
    """Entry point: errors that a user can mend are one message and an exit code, not a traceback."""
    _open_streams()
    try:
        # Outside standalone mode the code of `typer.Exit` is returned. The name is also that of the variable by which
        # shells ask for completions, _NETASSAY_COMPLETE.
        code = app(prog_name="netassay", standalone_mode=False) or 0
        sys.stdout.flush()
    except _Ended as ended:
        code = _end(ended.__cause__)
    except (Exception, KeyboardInterrupt) as error:
        code = _end(error)
    sys.exit(code)


def _open_streams() -> None:
    """Give streams that the shell closed (`<&-`) back as empty ones, before a file that is opened takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def _end(error: BaseException | None) -> int:
    """The exit code for this error, which is told, or raised where it is our own mistake."""
    rows: Sequence[object] = ()
    match error:
        case typer.Abort() | KeyboardInterrupt():
            words, code = "interrupted", 130
        case BrokenPipeError() if _nobody_reads():
            _discard_output()
            return 0
        case UserError():
            words, code = str(error), NO_ANSWER if isinstance(error, NoAnswer) else BAD_INPUT
            rows = getattr(error, "errors", ())
        case typer.TyperException():
            # Without any words it comes after the help.
            words, code = error.format_message() or "name one of these verbs", BAD_INPUT
        case Exception() if outside := _trouble_outside(error):
            words, code = outside, NO_ANSWER
        case _:
            assert error is not None
            raise error
    try:
        print(f"netassay: {_harmless(words)}", file=sys.stderr)
        if "--json" in sys.argv:
            print_output("error", {"error": words, "exit_code": code, "rows": [str(row) for row in rows]})
        sys.stdout.flush()
    except OSError:  # such as the full disk that is told of
        _discard_output()
    return code


def _harmless(words: str) -> str:
    """With control characters written out: what is quoted from a file must not reach the terminal as commands."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in words)


def _nobody_reads() -> bool:
    """Whether the other end of our output is gone: other pipes may break too."""
    watch = select.poll()
    for stream in (sys.stdout, sys.stderr):
        watch.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0))


def _discard_output() -> None:
    """What is left in the buffers would fail once more when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def _trouble_outside(error: Exception) -> str | None:
    """What to say of a disk or database that would not; None where the error is our own."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room or mend the rights, then do the same again"
    database = sys.modules.get("sqlalchemy.exc")  # not imported for verbs that need no store
    if database is not None and isinstance(error, database.OperationalError):
        return (
            f"the store does not answer ({error.orig}); see that its disk has room and its database is up, then do the "
            "same again: what is done already is not done twice"
        )
    return None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"netassay {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
