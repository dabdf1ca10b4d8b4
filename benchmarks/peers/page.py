"""The page of the documentation, and the machine it names, from the figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from producer import lab

Figures = dict[str, Any]

#: What is asked of these figures: see `verdicts`.
SUBMISSION_CELERY, SUBMISSION_RQ, TRIVIAL_CELERY, EFFICIENCY, SCALING = 15.0, 4.0, 15.0, 0.97, 0.95


def machine() -> dict[str, str]:
    """What the figures hold for."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc") else None
    redis = subprocess.run([lab.redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("celery", "kombu", "redis", "rq")}
    return {
        "cores": str(lab.cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "processor": model[1].strip() if model else platform.machine(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "Redis server": (re.search(r"v=(\S+)", redis) or [redis, redis])[1],
        **versions,
    }


def text(figures: Figures) -> str:
    """The whole page, of the sections that were measured."""
    words = f"Machine: {_machine(figures['machine'])}. `fdatasync` of 100 bytes on its disk takes {_sync(figures)}."
    machine = "\n\n".join(_filled(part) for part in (words, figures.get("note", "")) if part)
    parts = [_HEAD.format(machine=machine, repeats=figures["repeats"])]
    for name, section in (("submission", _submission), ("rates", _rates), ("efficiency", _efficiency)):
        if name in figures:
            parts.append(section(figures[name]))
    parts.append(_acceptance(figures))
    return "\n".join(parts)


_HEAD = """# Benchmarks

netassay beside plain Celery, RQ and a bare `multiprocessing.Pool`: what the lab's records, limits and recovery cost,
and what submission in bulk buys. This page is written by `make bench` (some 30 minutes):

```sh
python benchmarks/peers --json figures.json --page docs/benchmarks.md
```

{machine}

All systems are measured in turn, up to {repeats} times, each time with services started anew and warmed; cells are
medians (least .. most). No process holds torch. The jobs are the same function for all: `diagnostics.burn` spends CPU
time, not time of day, so what else runs on the machine stretches all alike.
"""


def _machine(about: dict[str, str]) -> str:
    named = {"cores", "memory", "processor", "system"}
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name not in named)
    return f"{about['cores']} cores ({about['processor']}), {about['memory']}, {about['system']}; {versions}"


def _sync(figures: Figures) -> str:
    took = sorted(figures["disk"]["milliseconds"])
    return f"{statistics.median(took):.2f} ms, one in ten more than {took[int(0.9 * len(took))]:.2f} ms"


def _filled(words: str, indent: str = "") -> str:
    return textwrap.fill(words, 120, subsequent_indent=indent, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median and range."""
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({show(min(values))} .. {show(max(values))})"


def rate(figures: Sequence[Figures]) -> list[float]:
    """Jobs a second of each repeat."""
    return [one["jobs"] / one["seconds"] for one in figures]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- submission ---------------------------------------------------------------------------------------------------

_SUBMITTERS = {
    "netassay submit": "`netassay submit`, the whole command",
    "netassay in Python": "`submission.submit` in Python",
    "celery always": "Celery, a loop of `delay`",
    "rq always": "RQ, `enqueue_many` by the thousand",
    "celery everysec": "Celery",
    "rq everysec": "RQ",
    "celery no": "Celery",
    "rq no": "RQ",
}


def _submission(found: dict[str, list[Figures]]) -> str:
    rows = []
    for name, called in _SUBMITTERS.items():
        for key in (name, f"{name}, full"):
            if key not in found:
                continue
            figures = found[key]
            kept = name.partition(" ")[2] if name.partition(" ")[2] in _KEPT else ""
            jobs = figures[0]["jobs"]
            redis = statistics.median(one["redis"] for one in figures) / jobs
            rows.append(
                [
                    called,
                    _KEPT.get(kept, "synced"),
                    f"{jobs:,}",
                    str(len(figures)),
                    _spread([one["seconds"] for one in figures], lambda value: f"{value:.2f}"),
                    _spread(rate(figures), _number),
                    f"{redis:,.0f}" if redis else "0",
                    f"{statistics.median(one['peak'] for one in figures) / 2**20:.0f}",
                ]
            )
    head = ["", "on return the jobs are", "N", "runs", "seconds", "jobs/s", "bytes a job in Redis", "peak MiB"]
    full = f"\n{_FULL}\n" if "celery always, full" in found else ""
    return f"{_SUBMISSION}\n{_table(head, rows)}{full}"


_KEPT = {"always": "synced (appendfsync always)", "everysec": "synced within 1 s (everysec)", "no": "in memory only"}
_FULL = (
    "The run of 100,000 with Celery, synced, was made once; the ratio at the end of the page takes that one. Other rows"
    "\nwith a smaller N show their own rate."
)
_SUBMISSION = """## Submission

Jobs that do nothing, into a store or Redis of its own with nothing in it, nobody working on them. Ours returns when
all jobs are synced to disk; what compares with it are the peers on a Redis that syncs before it answers. The other two
settings of Redis are there to be fair: a power cut takes up to a second of jobs, or all. Of the peers only the loop is
timed, without the start of Python; Celery has no result backend here (with one it subscribes to a channel a job, and is
slower).
"""


# --- end to end ---------------------------------------------------------------------------------------------------


def _rates(found: dict[str, dict[str, list[Figures]]]) -> str:
    kinds = list(found["netassay"])
    rows = [
        [name, *(_spread(rate(of[kind]), _number) if kind in of else "" for kind in kinds)]
        for name, of in found.items()
    ]
    sizes = [
        [name, *(f"{of[kind][0]['jobs']:,}" if kind in of else "" for kind in kinds)] for name, of in found.items()
    ]
    ours = found["netassay"]
    ratios = [
        [f"netassay / {name}", *(f"{_ratio(ours[kind], of[kind]):.3g}" if kind in of else "" for kind in kinds)]
        for name, of in found.items()
        if name in ("Celery", "RQ", "RQ without forks", "Pool")
    ]
    if (singly := found.get("netassay, one by one")) and "Celery" in found:
        both = [kind if kind in singly and kind in found["Celery"] else "" for kind in kinds]
        cells = [f"{_ratio(singly[kind], found['Celery'][kind]):.3g}" if kind else "" for kind in both]
        ratios.append(["netassay, one by one / Celery", *cells])
    redis = ", ".join(
        f"{name} {max(one['redis'] for figures in of.values() for one in figures) / 2**20:.1f} MiB"
        for name, of in found.items()
        if name in ("netassay", "Celery", "RQ")
    )
    head = ["jobs/s", *kinds]
    tables = [_table(head, rows), _table(["ratio of medians", *kinds], ratios), _table(["N", *kinds], sizes)]
    return "\n".join([_RATES, *tables, f"Most that Redis held in these runs: {redis}.\n"])


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures]) -> float:
    return statistics.median(rate(ours)) / statistics.median(rate(theirs))


_RATES = """## End to end

From the start of the submission to the last result, two processes computing, the submitting process on the same two
cores. netassay is an embedded lab, Flower and monitor included. Celery: prefork, acknowledged late, taken one by one,
results in Redis, a loop of `delay`. RQ: its pool of two workers, which fork for each job (without forks:
SimpleWorker), `enqueue_many`. Redis syncs once a second for all. Pool: spawned, `imap_unordered` with chunks of a
tenth of a second; it keeps nothing, and a job that dies hangs it. A trivial job squares a number; for us it is
`diagnostics.echo`, of which one call takes a thousand, and one by one `diagnostics.burn` of 0 s.
"""


# --- efficiency ---------------------------------------------------------------------------------------------------


def _efficiency(found: dict[str, list[Figures]]) -> str:
    rows = [
        [
            name, f"{figures[0]['jobs']:,}", _spread([one["seconds"] for one in figures], lambda value: f"{value:.2f}"),
            _spread(rate(figures), lambda value: f"{value:.3f}"),
            _spread([one["cpu"] for one in figures], lambda value: f"{value:.2f}") if "cpu" in figures[0] else "",
        ]
        for name, figures in found.items()
    ]  # fmt: skip
    head = ["jobs of 100 ms", "N", "seconds", "jobs/s", "CPU seconds beside the jobs"]
    lines = [
        f"* efficiency with two slots, lab / Pool: {_spread(efficiency(found, 2), _share)};",
        f"* with one slot: {_spread(efficiency(found, 1), _share)};",
        f"* two slots against one: {_spread(_twice(found, 'netassay, {} slots'), _share)} x, the Pool (the machine's"
        f" own scaling): {_spread(_twice(found, 'Pool of {}'), _share)} x, the first over the second:"
        f" {_spread(scaling(found), _share)}.",
    ]
    return f"{_EFFICIENCY}\n{_table(head, rows)}\nRepeat by repeat, each run against its neighbours:\n\n" + "\n".join(
        [*(_filled(line, "  ") for line in lines), ""]
    )


def _share(value: float) -> str:
    return f"{value:.3f}"


def efficiency(found: dict[str, list[Figures]], slots: int) -> list[float]:
    """Rate in the lab over that of the Pool, of each repeat."""
    return [
        ours / bare
        for ours, bare in zip(rate(found[f"netassay, {slots} slots"]), rate(found[f"Pool of {slots}"]), strict=True)
    ]


def _twice(found: dict[str, list[Figures]], name: str) -> list[float]:
    return [
        two / one for one, two in zip(rate(found[name.format(1)]), rate(found[name.format(2)]), strict=True)
    ]  # fmt: skip


def scaling(found: dict[str, list[Figures]]) -> list[float]:
    """How much two slots gain on one, over how much two processes do on this machine, of each repeat."""
    return [
        ours / bare for ours, bare in zip(_twice(found, "netassay, {} slots"), _twice(found, "Pool of {}"), strict=True)
    ]


_EFFICIENCY = """## Efficiency

Jobs that burn 100 ms of CPU time, in a lab with Flower and monitor idle and in a bare Pool (one job a message), with
one slot and with two: what a cluster owner loses to the lab. Timed from the call of `submission.submit` to the last
result; the last column is what all processes of the lab but its compute children spent.
"""


# --- what was asked -----------------------------------------------------------------------------------------------


def verdicts(figures: Figures) -> dict[str, tuple[float, float]]:
    """What was asked of these figures -> (measured, wanted at least); ratios of medians, or medians of ratios."""
    found = {}
    if "submission" in figures:
        of = figures["submission"]
        ours = statistics.median(rate(of["netassay submit"]))
        peers = {
            peer: statistics.median(rate(of.get(f"{peer} always, full", of[f"{peer} always"])))
            for peer in ("celery", "rq")
        }
        found["durable submission, `netassay submit` / Celery"] = (ours / peers["celery"], SUBMISSION_CELERY)
        found["durable submission, `netassay submit` / RQ"] = (ours / peers["rq"], SUBMISSION_RQ)
    if "rates" in figures:
        kinds = figures["rates"]
        ratio = _ratio(kinds["netassay"]["trivial"], kinds["Celery"]["trivial"])
        found["trivial jobs end to end, a thousand a call, netassay / Celery"] = (ratio, TRIVIAL_CELERY)
    if "efficiency" in figures:
        of = figures["efficiency"]
        found["jobs of 100 ms, netassay / Pool"] = (statistics.median(efficiency(of, 2)), EFFICIENCY)
        found["two slots against one, netassay / Pool"] = (statistics.median(scaling(of)), SCALING)
    return found


def _acceptance(figures: Figures) -> str:
    rows = [
        [
            name,
            f"{measured:.3f}" if wanted < 2 else f"{measured:.1f}",
            f"{wanted:g}",
            "yes" if measured >= wanted else "no",
        ]
        for name, (measured, wanted) in verdicts(figures).items()
    ]
    return "## Targets\n\n" + _table(["ratio", "measured", "target, at least", "met"], rows)
