"""The command line: `netassay VERB`. Heavy imports stay inside the verbs that need them.

Exit codes: 0 fine; 1 some jobs failed, or `doctor` found something missing; 2 bad input or settings, nothing was done;
3 the batch was cancelled; 4 the disk or the store would not; 5 the time to wait is over; 6 the batch is paused;
130 interrupted. With `--json` an error is a JSON object on standard output as well, see `producer.cli.output.Error`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from netassay import __version__
from netassay.errors import NoAnswer, UserError
from producer.cli import batches, lab, methods, results, stores
from producer.cli.common import BAD_INPUT, NO_ANSWER, print_output

app = typer.Typer(
    name="netassay",
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
    try:
        # Outside standalone mode the code of `typer.Exit` is returned. The name is also that of the variable by which
        # shells ask for completions, _NETASSAY_COMPLETE.
        sys.exit(app(prog_name="netassay", standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        _refuse("interrupted", 130)
    except BrokenPipeError:
        sys.exit(0)
    except UserError as error:
        code = NO_ANSWER if isinstance(error, NoAnswer) else BAD_INPUT
        _refuse(str(error), code, [str(row) for row in getattr(error, "errors", ())])
    except typer.TyperException as error:
        _refuse(str(getattr(error, "message", error)), BAD_INPUT)
    except Exception as error:
        words = _trouble_outside(error)
        if words is None:
            raise
        _refuse(words, NO_ANSWER)


def _refuse(words: str, code: int, rows: Sequence[str] = ()) -> NoReturn:
    print(f"netassay: {words}", file=sys.stderr)
    if "--json" in sys.argv:
        print_output("error", {"error": words, "exit_code": code, "rows": list(rows)})
    sys.exit(code)


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
