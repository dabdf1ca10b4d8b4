"""How batches and figures show themselves: a bar on a terminal, HTML and pictures in a notebook.

Everything is drawn offline and without widgets: a notebook that is opened again shows what it showed last.
"""

from __future__ import annotations

import base64
import html
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from netassay.figure import Figure
    from netassay.store.reading import FailureGroup, Progress

#: Parts of a batch's bar, from the left, and their colours; as in `producer.drawing`, told apart by everyone.
_PARTS = (("done", "#0072B2"), ("not_applicable", "#9AA0A6"), ("failed", "#D55E00"), ("running", "#56B4E9"))
_MESSAGE = 200


class Bar(Protocol):
    """Shows how batches stand, for the time of a `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what was shown last."""

    def show(self, progress: Progress, pace: str, failures: Sequence[FailureGroup] = ()) -> None:
        """One of the batches as it stands now."""

    def say(self, words: str) -> None:
        """A line that stays."""


def bar(wanted: bool) -> Bar:
    """The bar for where this process shows things; a silent one where none is wanted."""
    if not wanted:
        return Silent()
    if in_notebook():
        return _Notebook()
    from producer.show import errors

    return Terminal(errors)  # standard error: what a script prints stays clean


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    # Hosted notebooks have shells derived from this one; to import it would cost every script IPython.
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


@dataclass(frozen=True)
class Silent:
    """Shows nothing; what is said goes to standard error, or nowhere."""

    says: bool = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, progress: Progress, pace: str, failures: Sequence[FailureGroup] = ()) -> None:
        return

    def say(self, words: str) -> None:
        if self.says:
            print(words, file=sys.stderr, flush=True)


class Terminal:
    """Rich's bars, one a batch; where the console is no terminal, what is said and nothing else."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        # The names of batches are text, not Rich's markup.
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress, pace: str, failures: Sequence[FailureGroup] = ()) -> None:
        notes = [pace] if pace else []
        notes += [f"{progress.failed:,} failed"] if progress.failed else []
        notes += [progress.state] if progress.state in ("paused", "cancelled") else []
        if progress.name not in self._rows:
            self._rows[progress.name] = self._bars.add_task(progress.name, total=progress.size, note="")
        # The size of a batch grows when jobs are appended to it.
        row = self._rows[progress.name]
        self._bars.update(row, total=progress.size, completed=progress.ended, note=", ".join(notes))

    def say(self, words: str) -> None:
        self._bars.console.print(words, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Notebook:
    """One output that is replaced while the batch goes on, in HTML: needs no widgets."""

    said: list[str] = field(default_factory=list)
    _shown: Any = None
    _last: tuple[Progress, str, Sequence[FailureGroup]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, progress: Progress, pace: str, failures: Sequence[FailureGroup] = ()) -> None:
        self._last = (progress, pace, failures)
        self._display(batch_html(progress, failures, pace, self.said))

    def say(self, words: str) -> None:
        self.said.append(words)
        if self._last is not None:
            self.show(*self._last)

    def _display(self, text: str) -> None:
        from IPython.display import HTML, display

        if self._shown is None:
            self._shown = display(HTML(text), display_id=True)
        else:
            self._shown.update(HTML(text))


def batch_html(
    progress: Progress, failures: Sequence[FailureGroup] = (), pace: str = "", said: Sequence[str] = ()
) -> str:
    """A batch: name, state, bar, counts, failures by cause. All that users wrote is escaped."""
    head = f"<b>{_text(progress.name)}</b> &middot; {progress.size:,} jobs &middot; {_text(progress.state)}"
    if progress.reason:
        head += f" ({_text(progress.reason)})"
    if note := getattr(progress, "note", ""):
        head += f"<br><i>{_text(note)}</i>"
    parts = "".join(
        f'<div title="{name.replace("_", " ")}" style="width:{100 * getattr(progress, name) / progress.size:.4f}%;'
        f'background:{colour}"></div>'
        for name, colour in _PARTS
        if progress.size and getattr(progress, name)
    )
    counts = [(name.replace("_", " "), getattr(progress, name), colour) for name, colour in _PARTS]
    told = [
        f'<span style="color:{colour}">&#9632;</span> {number:,} {name}'
        for name, number, colour in counts
        if number or name == "done"
    ]
    if progress.waiting:
        told.append(f"{progress.waiting:,} {'cancelled' if progress.state == 'cancelled' else 'waiting'}")
    told += [_text(pace)] if pace else []
    lines = [
        '<div style="max-width:48em">',
        f"<div>{head}</div>",
        '<div style="display:flex;height:0.6em;margin:0.4em 0;background:rgba(128,128,128,0.25);border-radius:0.3em;'
        f'overflow:hidden">{parts}</div>',
        f"<div>{' &middot; '.join(told)}</div>",
        *(f"<div><i>{_text(words)}</i></div>" for words in said),
    ]
    if failures:
        rows = "".join(
            f'<tr><td style="text-align:left">{_text(group.cause)}</td><td>{group.jobs:,}</td>'
            f"<td><code>{_text(group.example_key[:12])}</code></td>"
            f'<td style="text-align:left">{_text(group.example.partition(chr(10))[0][:_MESSAGE])}</td></tr>'
            for group in failures
        )
        columns = ("cause", "jobs", "e.g.", "message")
        header = "".join(f'<th style="text-align:left">{column}</th>' for column in columns)
        lines.append(f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>")
    return "\n".join([*lines, "</div>"])


def _text(words: Any) -> str:
    return html.escape(str(words), quote=True)


@dataclass(frozen=True)
class Drawing:
    """A figure that shows itself in a notebook: alive where Vega-Lite is known (JupyterLab), else as a picture."""

    figure: Figure

    def save(self, path: str | Path) -> Path:
        """Write it as .png, .svg or .json, by the suffix. Raises CannotDraw, and BadTarget where no file can be."""
        from netassay.store import transfer
        from producer import drawing

        transfer.target(path)
        return drawing.draw(self.figure, path)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        from producer import drawing

        words = f"{self.figure.title}: {len(self.figure.panels)} panels"
        if not self.figure.panels:
            return {"text/plain": f"{self.figure.title}: {self.figure.caption or 'nothing to draw'}"}, {}
        specification = drawing.to_vega_lite(self.figure)
        png = drawing.to_png(specification)
        # Bytes 16 to 24 of a PNG file are its width and height; it is drawn at two pixels a point.
        width, height = struct.unpack(">II", png[16:24])
        bundle = {
            f"application/vnd.vegalite.v{drawing.VEGA_LITE.partition('.')[0]}+json": specification,
            "image/png": base64.b64encode(png).decode(),
            "text/plain": words,
        }
        return bundle, {"image/png": {"width": width // 2, "height": height // 2}}
