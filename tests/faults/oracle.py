"""The oracle of a fault run: what contradicts the promises, in sentences.

It compares what was submitted and accepted, what the store says at rest, what the jobs themselves wrote to their side
log, and which accidents happened. It is told of no success by the lab.

Lost: a job that was accepted and has no end. Doubled: a job that ran twice at the same time, or to its end a second
time, where nothing had happened that allows it; or whose record was overwritten. Other: the rest.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labs import called, right_result
from sqlalchemy import text

from netassay.job import ENDS, Record
from netassay.store import reading
from netassay.store.database import Database

from .accidents import Hit
from .witness import Run, Witness
from .workload import Batch, Expected

#: A cancelled batch starts nothing new after so many seconds, and its running jobs are gone after so many.
QUIET_SECONDS, GONE_SECONDS = 2.0, 5.0
#: What a worker may take to notice that the store is there again, or that it was given up: its waits are as long.
AFTERMATH_SECONDS = 20.0
#: What a PostgreSQL that crashes may forget: thrice wal_writer_delay by its manual, and a slow machine.
FORGOTTEN_SECONDS = 5.0
#: Slack of what is seen from outside: two looks at the processes, and a slow machine.
LOOK_SLACK = 0.5
#: Starts of a job that ends its process each time, and of one that was merely in its group.
MOST_STARTS, MATE_STARTS = 3, 2


@dataclass
class Verdict:
    """What one round came to."""

    jobs: int = 0
    batches: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    taken_over: int = 0
    """jobs that ran for two at a time after a takeover on record, with one effect"""
    again: int = 0
    """jobs that ran to their end more than once, with one effect, as an accident took the first result"""

    @property
    def violations(self) -> list[str]:
        return self.lost + self.doubled + self.other


@dataclass
class Case:
    """What the oracle looks at: one round."""

    batches: Sequence[Batch]
    hits: Sequence[Hit]
    witness: Witness
    database: Database
    lost_workers: Mapping[int, Sequence[tuple[float, float]]]
    """process of a worker -> between which two looks at the store it came to be lost there, each time"""
    snapshots: Sequence[tuple[float, Mapping[int, tuple]]] = ()
    """records as they were seen on the way: when, and job id -> (finished_at, worker, state)"""


def judge(case: Case) -> Verdict:
    """Everything that is wrong with a round that has come to rest."""
    verdict = Verdict(batches=len(case.batches))
    holders: dict[str, list[Batch]] = defaultdict(list)
    expected: dict[str, Expected] = {}
    for batch in case.batches:
        for name, job in batch.jobs.items():
            holders[name].append(batch)
            expected[name] = job
    records: dict[str, Record] = {}
    for batch in case.batches:
        if batch.accepted is None:
            continue
        try:
            found = {called(record): record for record in reading.records(case.database, batch.name)}
        except Exception as error:
            verdict.lost.append(f"batch {batch.name} was accepted and is not there: {error}")
            continue
        verdict.lost += [
            f"{name} of {batch.name} was accepted and is not there" for name in batch.jobs if name not in found
        ]
        verdict.other += [
            f"{batch.name} holds {name}, which nobody submitted" for name in found if name not in batch.jobs
        ]
        records |= found
        shared = sum(len(holders[name]) > 1 for name in batch.jobs) if batch.cancelled is not None else 0
        verdict.other += _counts(case.database, batch, shared)
    verdict.jobs, verdict.runs = len(expected), sum(map(len, case.witness.runs.values()))
    attempts: dict[int, list[int]] = defaultdict(list)
    for row in _ask(case.database, "SELECT job_id, alone FROM attempt"):
        attempts[row.job_id].append(row.alone)
    for name, record in records.items():
        if name in expected:
            _end(verdict, expected[name], record, holders[name])
            _starts(verdict, case, expected[name], record, holders[name], attempts[record.id])
    for name in set(case.witness.runs) - set(records):
        verdict.other.append(f"{name} ran and is in no batch that was accepted")
    _cancellations(verdict, case)
    _overwritten(verdict, case, records, holders)
    held = _ask(case.database, "SELECT count(*) AS n FROM running")[0].n
    if held:
        verdict.other.append(f"{held} jobs are held though all is at rest")
    return verdict


def _ask(database: Database, statement: str, **values: Any) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(text(statement), values).all())


def _end(verdict: Verdict, job: Expected, record: Record, holders: Sequence[Batch]) -> None:
    """One end, of those that are right for this job, with the right value."""
    end = record.state + (f":{record.cause}" if record.cause else "")
    if record.state not in ENDS:
        if any(batch.cancelled is None for batch in holders):
            verdict.lost.append(f"{job.name} never ended ({record.state})")
    elif end not in job.ends:
        verdict.other.append(f"{job.name} ended {end}, not {' or '.join(job.ends)}: {record.message[:300]}")
    elif record.state == "done" and record.result != (right := _right(record)):
        verdict.other.append(f"{job.name} has the result {record.result}, not {right}")


def _right(record: Record) -> dict[str, Any]:
    """The result it must have, from its params alone."""
    if record.method == "company.sleep":
        return {"seconds": record.params["seconds"]}
    return right_result(record)


def _starts(
    verdict: Verdict, case: Case, job: Expected, record: Record, holders: Sequence[Batch], attempts: Sequence[int]
) -> None:
    """How often it was started, and that no two of its runs were at the same time.

    attempts: of each child that died on it, whether it was alone.
    """
    runs = sorted(case.witness.runs.get(job.name, ()), key=lambda run: run.start)
    if record.state == "done" and not any(run.stop is not None for run in runs):
        verdict.other.append(f"{job.name} is done but never ran to its end")
    overlaps = False
    for earlier, later in itertools.combinations(runs, 2):
        if earlier.pid == later.pid or later.start >= earlier.end:
            continue
        # A process that died is seen to be gone by the next look only.
        if earlier.stop is None and later.start > _end_by_death(case, earlier) - LOOK_SLACK:
            continue
        if _taken_over(case, earlier, later):
            overlaps = True
        else:
            verdict.doubled.append(
                f"{job.name} ran twice at the same time: from {earlier.start:.2f} to {earlier.end:.2f} in process"
                f" {earlier.pid}, from {later.start:.2f} in {later.pid}"
            )
    verdict.taken_over += overlaps
    fresh = 1 + sum(batch.tries - 1 + batch.retries for batch in holders) + max(0, len(holders) - 1)
    disturbed = sum(_disturbed(case, run, holders) for run in runs)
    most = 1
    if job.culprit or any(attempts):
        most = MOST_STARTS
    elif attempts or job.name.startswith("fail "):  # a call that raises for a group: each of it once more, alone
        most = MATE_STARTS
    if all(end in ("done", "not_applicable") for end in job.ends) and not attempts:
        fresh = 1  # nothing gives these a new start
    if len(runs) > most * fresh + disturbed:
        said = f"{job.name} was started {len(runs)} times; {most} are allowed" + (f" x {fresh}" if fresh > 1 else "")
        said += f", and {disturbed} for accidents" if disturbed else ""
        (verdict.doubled if sum(run.stop is not None for run in runs) > 1 else verdict.other).append(said)
    verdict.again += sum(run.stop is not None for run in runs) > 1


def _end_by_death(case: Case, run: Run) -> float:
    """Until when its process is known to have run: it was hit, or seen for the last time, whichever was first."""
    killed = [hit.at for hit in case.hits if run.pid in hit.victims or case.witness.parent.get(run.pid) in hit.victims]
    return min([moment for moment in killed if moment >= run.start] + [run.end if run.lived is None else run.lived])


def _taken_over(case: Case, earlier: Run, later: Run) -> bool:
    """Whether it is on record that the first was given up: its worker as lost, or a store that forgot its claim."""
    worker = case.witness.parent.get(earlier.pid)
    losses = case.lost_workers.get(worker, ()) if worker is not None else ()
    if any(earlier.start <= seen and not_yet <= later.start for not_yet, seen in losses):
        return True
    return any(hit.forgets and hit.at >= earlier.start - 2.0 and hit.at <= later.start for hit in case.hits)


def _disturbed(case: Case, run: Run, holders: Sequence[Batch]) -> bool:
    """Whether something happened around this run for which it may have to be done again without being counted."""
    worker = case.witness.parent.get(run.pid)
    before, after = run.start - LOOK_SLACK, min(run.end, run.start + 70.0) + AFTERMATH_SECONDS
    for hit in case.hits:
        if hit.at > after or hit.until + AFTERMATH_SECONDS < before:
            continue
        # What happens to a child is an attempt, and counted.
        if hit.store or (worker in hit.workers and run.pid not in hit.victims):
            return True
    return any(start <= after and stop >= before for batch in holders for start, stop in batch.stirred)


def _counts(database: Database, batch: Batch, shared: int) -> list[str]:
    """Counters against rows, by statements that share nothing with those of the store.

    A cancelled batch counts no more; so many of its jobs may have come to their end for others since.
    """
    seen = reading.progress(database, batch.name)
    rows = _ask(
        database,
        "SELECT coalesce(r.state, '') AS state, count(*) AS jobs FROM batch b JOIN membership m ON m.batch_id = b.id"
        " LEFT JOIN record r ON r.job_id = m.job_id WHERE b.name = :name AND b.state <> 'arriving' GROUP BY 1",
        name=batch.name,
    )
    found = {row.state: row.jobs for row in rows}
    wrong = [
        f"{batch.name} counts {getattr(seen, state)} {state}, its records say {found.get(state, 0)}"
        for state in ENDS
        if not 0 <= found.get(state, 0) - getattr(seen, state) <= shared
    ]
    if not sum(found.values()) == seen.size == len(batch.jobs):
        wrong.append(
            f"{batch.name} has {sum(found.values())} jobs, says {seen.size}, and {len(batch.jobs)} were submitted"
        )
    return wrong


def _cancellations(verdict: Verdict, case: Case) -> None:
    """Of a batch that was cancelled in a quiet moment nothing starts after 2 s, and nothing runs after 5 s."""
    for batch in case.batches:
        if batch.cancelled is None or not batch.watched:
            continue
        wanted = {name for other in case.batches if other.cancelled is None for name in other.jobs}
        for name in sorted(set(batch.jobs) - wanted):
            for run in case.witness.runs.get(name, ()):
                if run.start > batch.cancelled + QUIET_SECONDS:
                    verdict.other.append(f"{name} started {run.start - batch.cancelled:.1f} s after its cancellation")
                elif run.end > batch.cancelled + GONE_SECONDS + LOOK_SLACK:
                    verdict.other.append(f"{name} still ran {GONE_SECONDS:.0f} s after its cancellation")


def _overwritten(
    verdict: Verdict, case: Case, records: Mapping[str, Record], holders: Mapping[str, Sequence[Batch]]
) -> None:
    """A record is written once: what was seen on the way is what is there, but for jobs that were given a new start,
    and for a store that forgot what it had just been told."""
    names = {record.id: name for name, record in records.items()}
    seen: dict[int, tuple[float, tuple]] = {}
    for moment, snapshot in case.snapshots:
        for job_id, row in snapshot.items():
            if job_id not in names:
                continue
            first, before = seen.setdefault(job_id, (moment, row))
            if before == row:
                continue
            seen[job_id] = moment, row
            others = holders[names[job_id]]
            anew = any(batch.tries > 1 or batch.retries for batch in others) or len(others) > 1
            if anew and "failed" in (before[2], row[2]):
                continue
            if any(hit.forgets and hit.at - FORGOTTEN_SECONDS <= first <= hit.until for hit in case.hits):
                continue
            verdict.doubled.append(f"the record of {names[job_id]} was overwritten: {before} became {row}")


def jobs_in_store(database: Database) -> int:
    """Jobs that the store knows by their key: those that were submitted, each once. A submission that dies while it
    writes leaves rows in `job` that no key leads to; `netassay gc` removes them."""
    return int(_ask(database, "SELECT count(*) AS n FROM job_key")[0].n)
