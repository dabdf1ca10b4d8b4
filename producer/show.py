"""Tables and bars on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from producer.wording import Shape, counted, strict

if TYPE_CHECKING:
    from netassay.store.reading import Progress
    from producer.doctor import Check

#: Columns of what is written to a file or a pipe, where there is no window to fit.
PIPE_WIDTH = 160
#: Columns between those of a table.
GAP = 2


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


console = _console()
errors = _console(stderr=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = (), title: str = "") -> Table:
    result = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        # As text: what a user called something must not be taken for markup.
        result.add_row(*(item if isinstance(item, Text) else Text(str(item)) for item in row))
    return result


def batch_line(batch: Progress) -> str:
    """One batch in words: `digits: 5,373 jobs, 5,370 done, 3 failed; finished`."""
    parts = [counted(batch.size, "job"), f"{batch.done:,} done"]
    parts += [f"{batch.not_applicable:,} not applicable"] if batch.not_applicable else []
    parts += [f"{batch.failed:,} failed"] if batch.failed else []
    parts += [f"{batch.running:,} running"] if batch.running else []
    if batch.waiting:
        parts.append(f"{batch.waiting:,} {'cancelled' if batch.state == 'cancelled' else 'waiting'}")
    reason = f" ({batch.reason})" if batch.reason else ""
    return f"{batch.name}: {', '.join(parts)}; {batch.state}{reason}"


def batch_table(batches: Iterable[Progress]) -> Table:
    """Batches as rows; columns that say nothing of any of them are left out."""
    counts = ("jobs", "done", "not applicable", "failed", "running", "waiting")
    shown = []
    for batch in batches:
        numbers = (batch.size, batch.done, batch.not_applicable, batch.failed, batch.running, batch.waiting)
        cells = dict(zip(counts, (f"{number:,}" if number else "" for number in numbers), strict=True))
        state = f"{batch.state} ({cell(batch.reason)})" if batch.reason else batch.state
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.submitted_at))
        weight = "" if batch.weight == 1 else f"{batch.weight:g}"
        shown.append(
            {
                "batch": batch.name,
                **cells,
                "state": state,
                "weight": weight,
                "submitted": when,
                "by": cell(batch.submitter) if len({one.submitter for one in batches}) > 1 else "",
                "tags": " ".join(batch.tags),
                "note": cell(batch.note),
            }
        )
    always = ("batch", "jobs", "done", "state")
    columns = [name for name in (shown[0] if shown else always) if name in always or any(row[name] for row in shown)]
    return table(columns, [[row[name] for name in columns] for row in shown], right=(*counts, "weight"))


_COLOURS = {"ok": "green", "missing": "yellow", "wrong": "red", "unknown": "dim"}


def check_table(checks: Iterable[Check]) -> Table:
    """What a doctor saw, a row a check; what mends it stands below what was found."""
    rows = []
    for check in checks:
        words = Text(check.found)
        if check.mend:
            words.append(f"\n-> {check.mend}", style="bold")
        rows.append((check.name, Text(check.state, style=_COLOURS[check.state]), words))
    return table(("what", "state", "found"), rows)


def summary(rows: Iterable[dict[str, Any]], by: Sequence[str], of: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the `by` columns among done jobs: their number; of each column in `of` (else of
    each result but arrays) the mean where it is numeric, and the share of each value where it is a word or true/false.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    seen: dict[str, None] = {}
    for row in rows:
        seen |= dict.fromkeys(row)
        if row["state"] == "done" and all(name in row for name in by):
            groups.setdefault(tuple(_group(row[name]) for name in by), []).append(row)
    members = [row for group in groups.values() for row in group]
    arrays = {name for row in members for name, value in row.items() if isinstance(value, Shape)}
    values = {
        name: list(dict.fromkeys(row[name] for row in members if isinstance(row.get(name), str | bool)))
        for name in (of or [name for name in seen if name not in (*by, *_ABOUT) and name not in arrays])
    }
    result = []
    for key, group in groups.items():
        line: dict[str, Any] = dict(zip(by, key, strict=True)) | {"jobs": len(group)}
        for name, words in values.items():
            if 0 < len(words) <= 6:
                for word in words:
                    if word is False and True in words:
                        continue
                    share = sum(row.get(name) == word for row in group) / len(group)
                    label = f"{name}={word if isinstance(word, str) else json.dumps(word)}"
                    line[label if not word or word is True or word in line else word] = f"{share:.1%}"
            elif numbers := [row[name] for row in group if isinstance(row.get(name), int | float)]:
                line[f"mean {name}"] = sum(numbers) / len(numbers)
        result.append(line)
    return result


def _group(value: Any) -> Any:
    """What tells a value from others: a list has no hash, and NaN is not even itself."""
    if isinstance(value, list | dict) or value != value:
        return json.dumps(strict(value), ensure_ascii=False)
    return value


#: Columns that say where a row comes from rather than what it found.
_ABOUT = ("job", "method", "state", "cause", "message")


def cell(value: Any) -> str:
    """A value for a narrow column."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value).partition("\n")[0]
    return text if len(text) <= 40 else f"{text[:37]}..."
