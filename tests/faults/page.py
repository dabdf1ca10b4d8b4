"""docs/faults.md, from the results of fault runs.

python -m tests.faults.page build/faults/*.json --page docs/faults.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]

INTRODUCTION = """# Faults

What becomes of jobs when processes are killed, services crash and connections go bad. This page is written by
`make faults`, which runs the harness of `tests/faults/` for as long as shown below; shorter runs of it are among the
tests.

A seeded stream of overlapping batches (short and long jobs, jobs that vectorise, fail, kill their process, allocate
without end, hang or spin in C) meets a seeded series of accidents, one every few seconds, which overlap. Most are aimed
at processes that hold work. After some fifty kills a round comes to rest, and an oracle compares what `netassay submit`
accepted, what the store says, and what the jobs themselves wrote to a synced log:

* lost: a job that was accepted and has no end;
* doubled: a job that ran twice at the same time without a takeover on record, or to its end a second time though
  nothing had happened that allows it, or whose record was overwritten;
* other: a wrong end or value, counters that differ from the rows, too many starts (a culprit three, a mate two), a
  cancelled batch that starts something after 2 s or runs after 5 s, jobs added by a second submission, a command that
  hangs.
"""

RECOVERY = """Recovery is the time from the accident until the side log has the first start or end of a job that the
victim held, in a process that was not the victim's; where it held none, until the next start of any job. Accidents that
come meanwhile are not subtracted.
"""

LIMITS = """## What is not covered

* A machine that loses power: processes are killed, disks are not. PostgreSQL is crashed by `pg_ctl stop -m immediate`.
* The end of a half-open connection that is told nothing is reset after 4 to 12 s: the kernel of a proxy acknowledges
  what comes, so TCP_USER_TIMEOUT (30 s) never acts. Lost packets are not made.
* The disk that is full holds the store; of an embedded lab its logs and its Redis as well. The side log lies elsewhere,
  as a job that cannot write its own log has failed.
* Clocks jump for Python code (`time.time`) of one process, by an hour; monotonic clocks do not.
* One machine: workers of two hosts are two folders on it.
"""


def summary(result: Any) -> str:
    """Some lines about a run, for a terminal."""
    points = ", ".join(f"{point} {count}" for point, count in result.points.items() if count)
    lines = [
        f"{result.kills} kills and {len(result.hits) - result.kills} other accidents in {result.rounds} rounds,"
        f" {result.seconds:.0f} s: {result.jobs} jobs in {result.batches} batches, {result.runs} starts",
        f"lost {len(result.lost)}, doubled {len(result.doubled)}, other {len(result.other)}",
        f"deaths at points: {points or 'none'}",
        *result.notes,
        *result.violations[:20],
    ]
    return "\n".join(lines)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def _times(values: Sequence[float]) -> str:
    if not values:
        return "- | - | -"
    return f"{statistics.median(values):.1f} s | {quantile(values, 0.95):.1f} s | {max(values):.1f} s"


def _recoveries(hits: Sequence[Result]) -> list[float]:
    return [hit["recovery"] for hit in hits if hit["recovery"] is not None]


def _totals(results: Sequence[Result]) -> list[str]:
    lines = [
        "| lab | a worker is lost after | kills | other accidents | batches | jobs | starts | lost | doubled | other |"
        " recovery from kills: median | 95 % | most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        kills = [hit for hit in one["hits"] if hit["kill"]]
        plan, wrong = one["plan"], [len(one[key]) for key in ("lost", "doubled", "other")]
        cells = [plan["lab"], f"{plan['lost_after']:g} s", len(kills), len(one["hits"]) - len(kills)]
        cells += [f"{one[key]:,}" for key in ("batches", "jobs", "runs")] + wrong + [_times(_recoveries(kills))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _by_kind(one: Result, select: Callable[[str], bool]) -> list[str]:
    lines = [
        "| accident | how often | victim idle | holding work | in a group | recovery: median | 95 % | most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds: dict[str, list[Result]] = defaultdict(list)
    for hit in one["hits"]:
        if select(hit["kind"]):
            kinds[hit["kind"]].append(hit)
    for kind, hits in sorted(kinds.items(), key=lambda item: -len(item[1])):
        doing = [sum(hit["doing"] == word for hit in hits) for word in ("idle", "holding", "in group")]
        lines.append(f"| {kind} | {len(hits)} | {' | '.join(map(str, doing))} | {_times(_recoveries(hits))} |")
    return lines


def _points(results: Sequence[Result]) -> list[str]:
    names = [f"{one['plan']['lab']}, {one['plan']['lost_after']:g} s" for one in results]
    points = list(results[0]["points"])
    lines = [f"| point | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for point in points:
        lines.append(f"| `{point}` | {' | '.join(str(one['points'].get(point, 0)) for one in results)} |")
    return lines


def _teeth(plain: Sequence[Sequence[Result]], blunt: Sequence[Result]) -> list[str]:
    lines = []
    for runs in plain:
        kills, jobs = sum(run["kills"] for run in runs), sum(run["jobs"] for run in runs)
        lost = sum(max(0, len(run["lost"]) - run["left"]) for run in runs)
        never = sum(run["never_started"] for run in runs)
        again = sum(run["again"] for run in runs)
        lines += [
            f"Plain Celery (`acks_late`, prefork of 2, prefetch 1, Redis with an append-only file), the worker killed"
            f" {kills} times in {len(runs)} runs of {jobs // max(1, len(runs)):,} jobs:"
            f" **{lost} of {jobs:,} jobs lost** ({never} of them never started), {again} ran to their end again."
            " `python -m tests.faults.plain_celery`",
            "",
        ]
    if blunt:
        lines += [
            "With one of our own guards switched off the oracle has to find something:",
            "",
            "| guard off | lab | kills | lost | doubled | other | for example |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in blunt:
            found = [*one["doubled"], *one["lost"], *one["other"]]
            example = (found[0] if found else "nothing was found").replace("|", "/").split("\n")[0][:160]
            lines.append(
                f"| `{one['plan']['without']}` | {one['plan']['lab']} | {sum(hit['kill'] for hit in one['hits'])} |"
                f" {len(one['lost'])} | {len(one['doubled'])} | {len(one['other'])} | {example} |"
            )
        lines.append("")
    return lines


def merged(results: Sequence[Result]) -> list[Result]:
    """Runs of one kind of lab with the same settings as one, their commands below each other."""
    found: dict[tuple[str, float, str], dict[str, Any]] = {}
    for one in results:
        key = one["plan"]["lab"], one["plan"]["lost_after"], one["plan"]["without"]
        if key not in found:
            found[key] = {**one, "parts": [one]}
            continue
        whole = found[key]
        whole["parts"] = [*whole["parts"], one]
        for name in ("rounds", "jobs", "batches", "runs", "taken_over", "again", "seconds"):
            whole[name] += one[name]
        for name in ("lost", "doubled", "other", "hits", "notes"):
            whole[name] = [*whole[name], *one[name]]
        whole["points"] = {point: count + one["points"].get(point, 0) for point, count in whole["points"].items()}
    return list(found.values())


def _told(one: Result) -> str:
    """A command with what it took, and where it was ended early, how far it came."""
    kills = sum(hit["kill"] for hit in one["hits"])
    short = f", ended after {kills} kills" if kills < one["plan"]["kills"] else ""
    load = f", load average {one['load']:.0f}" if one.get("load") else ""
    return f"# {one['seconds'] / 60:.0f} minutes{short}{load}\n{one['command']}"


def page(results: Sequence[Result], plain: Sequence[Sequence[Result]] = ()) -> str:
    """The text of docs/faults.md. results: of fault runs; plain: of plain Celery."""
    results = merged(results)
    whole = [one for one in results if not one["plan"]["without"]]
    blunt = [one for one in results if one["plan"]["without"]]
    whole.sort(key=lambda one: (one["plan"]["lost_after"], one["plan"]["lab"] != "embedded"))
    lines = [INTRODUCTION]
    if whole:
        first = whole[0]
        lines += [
            f"Measured on {first['machine']}, {first['began']}; load averages stand beside the commands.",
            "",
            *_totals(whole),
            "",
        ]
        lines += [RECOVERY, "```"]
        lines += [_told(part) for one in whole for part in one["parts"]]
        lines += ["```", ""]
        taken, again = sum(one["taken_over"] for one in whole), sum(one["again"] for one in whole)
        lines += [
            f"With one effect each, {taken} {'job' if taken == 1 else 'jobs'} ran for two at a time after the first",
            f"worker was declared lost, and {again} ran to their end more than once, as an accident took the first",
            "result before it was stored.",
            "",
        ]
        notes = sorted({note for one in whole for note in one["notes"]})
        lines += [f"Not possible on this machine: {note}." for note in notes] + ([""] if notes else [])
        for one in whole:
            lines += [f"## By kind: {one['plan']['lab']}, lost after {one['plan']['lost_after']:g} s", ""]
            lines += _by_kind(one, lambda kind: not kind.startswith("at "))
            lines.append("")
        lines += ["## Deaths at each step", "", "A process dies exactly there:", "", *_points(whole), ""]
        wrong = [(one, violation) for one in whole for key in ("lost", "doubled", "other") for violation in one[key]]
        if wrong:
            lines += ["## What was found", ""]
            lines += [f"* {one['plan']['lab']}: {violation.splitlines()[0][:300]}" for one, violation in wrong[:40]]
            lines.append("")
    if blunt or plain:
        lines += ["## Teeth", "", *_teeth(plain, blunt)]
    lines.append(LIMITS)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.page", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, required=True)
    asked = parser.parse_args()
    read = [json.loads(path.read_text()) for path in asked.results]
    plain = [one for one in read if isinstance(one, list)]
    asked.page.write_text(page([one for one in read if isinstance(one, dict)], plain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
