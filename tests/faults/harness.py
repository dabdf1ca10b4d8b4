"""A fault run: rounds of work under accidents, each judged when it has come to rest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from labs import variables

from netassay import catalogue
from netassay.settings import settings
from netassay.store import control, reading

from . import accidents, oracle
from .accidents import Ground, Hit, Missed, Points
from .oracle import Case, Verdict
from .postgres import missing
from .site import METHODS, Site
from .workload import Batch, Stream

#: Kills in a round: enough to overlap in many ways, few enough to find the one that did it.
ROUND_KILLS = 50
#: Batches on their way while accidents happen.
OPEN_BATCHES = 5
#: Seconds in which a round has to come to rest once accidents are over.
REST_SECONDS = 300.0
#: A command that takes so long hangs.
HUNG_SECONDS = 300.0
#: Of the things that happen, so many are deaths at a step of the code.
POINT_SHARE = 0.35
#: A submission is tried again so long.
SUBMIT_SECONDS = 600.0


@dataclass
class Plan:
    """What a run is asked to do. kills: how many processes are to be killed; pause: seconds between two accidents."""

    lab: str
    kills: int
    lost_after: float
    seed: int
    pause: tuple[float, float] = (1.0, 3.0)
    without: str = ""
    stop: bool = False
    evidence: Path | None = None
    slow: float = float("inf")
    """evidence is kept of a round with a recovery that took longer, in seconds"""
    points: bool = True
    only: tuple[str, ...] = ()
    """names of accidents; empty: all"""
    rest: float = REST_SECONDS
    minutes: float = float("inf")
    """after which the run ends, even if fewer were killed"""
    deadline: float = float("inf")
    """the same on the monotonic clock, set when it begins"""


@dataclass
class Outcome:
    """What a run came to; written to JSON as it stands."""

    plan: dict[str, Any]
    command: str
    machine: str
    began: str
    seconds: float = 0.0
    load: float = 0.0
    """mean load average of the machine at the ends of the rounds"""
    rounds: int = 0
    jobs: int = 0
    batches: int = 0
    runs: int = 0
    taken_over: int = 0
    again: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    hits: list[dict[str, Any]] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(hit["kill"] for hit in self.hits)

    @property
    def violations(self) -> list[str]:
        return self.lost + self.doubled + self.other

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str))


def machine() -> str:
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{psutil.cpu_count()} cores, {memory} GB, {platform.system()}, Python {platform.python_version()}"


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


class Round:
    """Some work, some accidents, a rest, a verdict."""

    def __init__(self, site: Site, plan: Plan, number: int, fired: Mapping[str, int]) -> None:
        self.site, self.plan, self.number = site, plan, number
        seed = plan.seed * 1000 + number
        self.draw = random.Random(f"schedule {seed}")
        self.stream = Stream(seed, site.folder / f"side-{number}.log", f"r{number}", first=number * 100_000_000)
        self.lock = threading.RLock()
        self.ending = threading.Event()
        self.quiet = threading.Event()
        """set: no accidents for now"""
        self.hits: list[Hit] = []
        self.snapshots: list[tuple[float, dict[int, tuple]]] = []
        self._lost: dict[int, tuple[int, float, float]] = {}
        """worker -> its process, and between which two looks it came to be lost"""
        self._looked = -math.inf
        self.failures: list[str] = []
        self._names: dict[int, str] = {}
        self._before: int = site.query("SELECT coalesce(max(id), 0) AS id FROM job")[0].id
        self._killed: list[Batch] = []
        self._imports = 0
        ground = Ground(site, random.Random(f"aim {seed}"), self.names, self._document, self._carried)
        self.ground, self.points = ground, Points(ground)
        self.points.fired.update(fired)
        kinds = [kind() for kind in accidents.WEIGHTS if not plan.only or kind.name in plan.only]
        self.kinds = [kind for kind in kinds if not kind.impossible(site)]
        self.threads: list[threading.Thread] = []

    # --- what the accidents ask for -------------------------------------------------------------------------------

    def names(self, jobs: Iterable[int]) -> frozenset[str]:
        """What the side log calls these jobs."""
        wanted = [job for job in jobs if job not in self._names]
        if wanted:
            rows = self.site.query(
                "SELECT j.id, j.params, v.name FROM job j JOIN method_version v ON v.id = j.method_id"
                f" WHERE j.id IN ({', '.join(map(str, wanted))})"
            )
            for row in rows:
                found = catalogue.get(row.name)
                self._names[row.id] = found.module.name(found.Params.model_validate_json(row.params))
        return frozenset(self._names[job] for job in jobs if job in self._names)

    def _document(self) -> Path:
        """A batch for a submitter that is going to be killed; somebody submits it again later."""
        with self.lock:
            batch = self.stream.next()
            self._killed.append(batch)
        batch.tries += 1
        return batch.write(self.site.scratch)

    def _carried(self) -> Path:
        """A batch in the file of another store, for an import that is going to be killed; it is repeated later."""
        with self.lock:
            batch = self.stream.next()
            self._killed.append(batch)
            self._imports += 1
        batch.tries += 1
        path, home = batch.write(self.site.scratch), self.site.scratch / f"other-{batch.name}"
        away = {"HOME": str(home), "STORE": "", "BROKER": "", "ARTIFACTS": str(home / "artifacts")}
        carried = self.site.scratch / f"{batch.name}.tar"
        for arguments in (("submit", str(path)), ("export", str(carried), batch.name)):
            process = self.site.command(*arguments, **away)
            _, said = process.communicate(timeout=HUNG_SECONDS)
            if process.returncode:
                raise RuntimeError(f"netassay {' '.join(arguments)}: {said[-500:]}")
        shutil.rmtree(home, ignore_errors=True)
        batch.path = carried
        return carried

    # --- the work -------------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """Submit it until it is accepted: until the command has ended with 0."""
        path = batch.path or batch.write(self.site.scratch)
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            verb = (
                ("import", str(path)) if path.suffix == ".tar" else ("submit", str(path), "--weight", str(batch.weight))
            )
            batch.tries += 1
            process = self.site.command(*verb)
            try:
                _, said = process.communicate(timeout=HUNG_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                said = f"it hung for {HUNG_SECONDS:.0f} s"
                self.failures.append(f"netassay {' '.join(verb)} hung for {HUNG_SECONDS:.0f} s")
            if process.returncode == 0:
                if batch.accepted is None:
                    batch.accepted = time.monotonic()
                return
            if process.returncode != 4 and "Traceback" in said:
                self.failures.append(f"netassay {' '.join(verb)} ended with {process.returncode}: {said[-800:]}")
            if time.monotonic() > deadline or process.returncode == 2:
                self.failures.append(f"{batch.name} could not be submitted: {process.returncode}: {said[-800:]}")
                return
            time.sleep(0.3)

    def _open(self) -> int:
        """Batches that were accepted and are not over."""
        with self.lock:
            batches = [batch for batch in self.stream.made if batch.accepted is not None and batch.cancelled is None]
        return sum(not reading.progress(self.site.direct, batch.name).over for batch in batches[-8:])

    def work(self) -> None:
        """Keep some batches on their way, and do to them what people do, until the accidents are over."""
        while not self.ending.wait(0.7):
            try:
                if self._open() >= OPEN_BATCHES:
                    continue
                with self.lock:
                    killed = self._killed.pop(0) if self._killed else None
                    batch = killed or self.stream.next()
                self.submit(batch)
                if batch.accepted is not None:
                    self.meddle(batch)
            except Exception as error:  # the store is away
                if not self._away(error):
                    self.failures.append(f"the work stopped: {type(error).__name__}: {error}")
                time.sleep(0.5)

    @staticmethod
    def _away(error: Exception) -> bool:
        return any(word in type(error).__name__ for word in ("Operational", "Interface", "DBAPI", "Internal"))

    def meddle(self, batch: Batch) -> None:
        """What people do to a batch on its way."""
        direct, draw = self.site.direct, random.Random(f"meddle {batch.name} {self.plan.seed}")
        what = draw.choice(["nothing", "again", "again", "weight", "pause", "retry", "cancel"])
        with self.site.retrying() as again:
            if what == "again":
                self.submit(batch)
            elif what == "weight":
                again(lambda: control.set_weight(direct, batch.name, draw.choice([0.2, 2.0, 5.0])))
            elif what in ("pause", "cancel"):
                began = time.monotonic()
                stir = control.pause if what == "pause" else control.cancel
                again(lambda: stir(direct, batch.name))
                self.ending.wait(draw.uniform(0.5, 3.0))
                again(lambda: control.resume(direct, batch.name))
                batch.stirred.append((began, time.monotonic() + 3.0))
            elif what == "retry":
                self.ending.wait(5.0)
                batch.retries += 1
                again(lambda: control.retry(direct, batch.name))

    def observe(self) -> None:
        """Look at the records now and then, to see whether one that is there changes."""
        while not self.ending.wait(1.0):
            with contextlib.suppress(Exception):
                self.snapshot()
            with contextlib.suppress(Exception):
                self.note_losses()

    def note_losses(self) -> None:
        at = time.monotonic()
        rows = self.site.query("SELECT id, pid FROM worker WHERE state = 'lost'")
        for row in rows:
            if row.id not in self._lost:
                self._lost[row.id] = (row.pid, self._looked, time.monotonic())
        self._looked = at

    def snapshot(self) -> None:
        rows = self.site.query(
            "SELECT job_id, finished_at, worker_id, state FROM record WHERE job_id > :before", before=self._before
        )
        seen = {row.job_id: (row.finished_at, row.worker_id, row.state) for row in rows}
        self.snapshots.append((time.monotonic(), seen))

    # --- the accidents --------------------------------------------------------------------------------------------

    def suffer(self, kills: int) -> None:
        """Let things happen until so many processes have been killed."""
        weights = [1.0 if self.plan.only else accidents.WEIGHTS[type(kind)] for kind in self.kinds]
        calm = kills // 2
        cancelled = False
        until = min(time.monotonic() + 60 + 20 * kills, self.plan.deadline)
        while (done := sum(hit.kill for hit in self.hits)) < kills and time.monotonic() < until:
            if not cancelled and done >= calm and kills >= 10:
                cancelled = True
                self.cancel_quietly()
            due = time.monotonic() + self.draw.uniform(*self.plan.pause)
            point = self.points.next() if self.plan.points and self.draw.random() < POINT_SHARE else None
            kind = self.draw.choices(self.kinds, weights)[0]
            try:
                hit = self.points.strike(point) if point else kind.strike(self.ground)
            except Missed:
                time.sleep(0.1)
                continue
            except Exception as error:
                if not self._away(error):
                    self.failures.append(
                        f"an accident went wrong: {point or kind.name}: {type(error).__name__}: {error}"
                    )
                hit = None
            if hit is not None:
                self.note(hit)
            while True:
                for fired in self.points.poll():
                    self.note(fired)
                if time.monotonic() >= due:
                    break
                time.sleep(0.02)

    def note(self, hit: Hit) -> None:
        self.hits.append(hit)
        where = f" ({hit.doing})" if hit.doing != "-" else ""
        say(f"{self.plan.lab} round {self.number}: {hit.kind}{where}, {sum(h.kill for h in self.hits)} kills")

    def cancel_quietly(self) -> None:
        """Wait until all is well, and cancel a batch whose jobs run, of which another holds some."""
        self.points.disarm()
        self.ground.settle()
        self.site.heal()
        with self.lock:
            doomed = self.stream.sleepers("doomed", 24)
            start = doomed.entries[0]["grid"]["tag"]["range"][0]
            kept = self.stream.sleepers("kept", 3, start)
        doomed.weight = kept.weight = 50.0
        for batch in (doomed, kept):
            self.submit(batch)
        deadline = time.monotonic() + 30
        only = set(doomed.jobs) - set(kept.jobs)
        while not only & self.site.witness.started() and time.monotonic() < deadline:
            time.sleep(0.05)
        if doomed.accepted is not None:
            control.cancel(self.site.direct, doomed.name)
            doomed.cancelled, doomed.watched = time.monotonic(), True
            time.sleep(oracle.GONE_SECONDS + 1.0)

    # --- all of it ------------------------------------------------------------------------------------------------

    def run(self, kills: int) -> Verdict:
        self.site.witness.follow(self.stream.log)
        for _ in range(2):
            self.submit(self.stream.next())
        # Two submitters: under load one would not keep the slots at work.
        for action in (self.work, self.work, self.observe):
            thread = threading.Thread(target=action, daemon=True)
            thread.start()
            self.threads.append(thread)
        try:
            self.suffer(kills)
        finally:
            self.points.disarm()
            self.ending.set()
            for thread in self.threads:
                thread.join()
            self.ground.settle()
        for fired in self.points.poll():
            self.note(fired)
        accidents_over = time.monotonic()
        try:
            self.site.heal()
        except TimeoutError as error:
            self.failures.append(str(error))
        healed = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(self.submit, self._killed))
        submitted = time.monotonic()
        late = self.rest()
        say(
            f"{self.plan.lab} round {self.number}: healed after {healed - accidents_over:.0f} s, all submitted after"
            f" {submitted - healed:.0f} s, at rest after {time.monotonic() - submitted:.0f} s"
        )
        self.site.witness.look()
        self.snapshot()
        self.recoveries()
        verdict = oracle.judge(self.case())
        verdict.other += self.failures + self.site.surprises + self.site.witness.errors
        self.site.surprises, self.site.witness.errors = [], []
        if late:
            verdict.other.append(late)
        return verdict

    def case(self) -> Case:
        self.note_losses()
        accepted = [batch for batch in self.stream.made if batch.tries]
        lost: dict[int, list[tuple[float, float]]] = {}
        for pid, not_yet, seen in self._lost.values():
            lost.setdefault(pid, []).append((not_yet, seen))
        return Case(accepted, self.hits, self.site.witness, self.site.direct, lost, self.snapshots)

    def rest(self) -> str:
        """Wait until everything that was accepted has come to an end. Says what has not, in time."""
        deadline = time.monotonic() + self.plan.rest
        while True:
            with contextlib.suppress(Exception):
                open_ones = [
                    seen
                    for batch in self.stream.made
                    if batch.accepted is not None and batch.cancelled is None
                    for seen in [reading.progress(self.site.direct, batch.name)]
                    if not seen.over
                ]
                held = self.site.query("SELECT count(*) AS n FROM running")[0].n
                if not open_ones and not held:
                    return ""
                if time.monotonic() > deadline:
                    chunks = self.site.query(
                        "SELECT c.id, c.batch_id, c.start, c.stop, c.state, c.worker_id, w.state AS worker, w.pid"
                        " FROM chunk c LEFT JOIN worker w ON w.id = c.worker_id WHERE c.state <> 'finished' LIMIT 8"
                    )
                    return (
                        f"no rest {self.plan.rest:.0f} s after the last accident: {held} jobs held, open: "
                        f"{[f'{seen.name} ({seen.state})' for seen in open_ones]}, chunks {[tuple(c) for c in chunks]},"
                        f" {self.site.state()}"
                    )
            if time.monotonic() > deadline + 60:
                return "the store did not answer after the last accident"
            time.sleep(0.3)

    def recoveries(self) -> None:
        """How long each accident was felt.

        From the accident until the side log has the first start or end of one of the jobs that the victims held, in a
        process that was not theirs; where they held none, until any job starts. None where nothing was left to run.
        """
        witness = self.site.witness
        lines = sorted(witness.lines)
        for hit in self.hits:
            theirs = {pid for pid, worker in witness.parent.items() if worker in hit.workers and worker in hit.victims}
            theirs.update(hit.victims)
            for at, event, job, pid in lines:
                if at <= hit.at or pid in theirs:
                    continue
                if job in hit.held if hit.held else event == "start":
                    hit.recovery = at - hit.at
                    break


def run(plan: Plan, report: Path | None = None, command: str = "") -> Outcome:
    """All rounds of a plan. Raises RuntimeError where this machine lacks what the kind of lab needs."""
    if plan.lab == "cluster" and (why := missing()):
        raise RuntimeError(why)
    with _own_methods():
        return _run(plan, report, command)


@contextlib.contextmanager
def _own_methods() -> Iterator[None]:
    """The methods of the harness are known to this process as well, in all its threads."""
    with variables({"NETASSAY_METHODS": str(METHODS)}):
        settings.cache_clear()
        try:
            yield
        finally:
            settings.cache_clear()


def _run(plan: Plan, report: Path | None, command: str) -> Outcome:
    apart = ("evidence", "slow", "deadline")
    about = {key: value for key, value in dataclasses.asdict(plan).items() if key not in apart}
    outcome = Outcome(about, command, machine(), time.strftime("%Y-%m-%d"))
    began, number = time.monotonic(), 0
    plan.deadline = began + 60 * plan.minutes
    while outcome.kills < plan.kills and not (plan.stop and outcome.violations) and time.monotonic() < plan.deadline:
        with Site(plan.lab, plan.lost_after, plan.without) as site:
            outcome.notes = site.notes
            while outcome.kills < plan.kills and time.monotonic() < plan.deadline:
                number += 1
                one = Round(site, plan, number, outcome.points)
                before = oracle.jobs_in_store(site.direct)
                verdict = one.run(min(ROUND_KILLS, plan.kills - outcome.kills))
                _add(outcome, one, verdict, oracle.jobs_in_store(site.direct) - before)
                outcome.seconds = time.monotonic() - began
                outcome.load += (os.getloadavg()[0] - outcome.load) / outcome.rounds
                say(
                    f"{plan.lab} round {number}: {verdict.jobs} jobs, {len(one.hits)} accidents, "
                    f"lost {len(verdict.lost)}, doubled {len(verdict.doubled)}, other {len(verdict.other)}; "
                    f"{outcome.kills} of {plan.kills} kills"
                )
                if report is not None:
                    outcome.write(report)
                if verdict.violations or max((hit.recovery or 0.0 for hit in one.hits), default=0.0) > plan.slow:
                    place = plan.evidence or Path(tempfile.gettempdir()) / "netassay-faults"
                    keep(place / f"{plan.lab}-{plan.seed}-{number}", one, verdict)
                if verdict.violations:
                    for violation in verdict.violations[:20]:
                        say(f"  {violation}")
                    break
    outcome.seconds = time.monotonic() - began
    if report is not None:
        outcome.write(report)
    return outcome


def _add(outcome: Outcome, one: Round, verdict: Verdict, new_jobs: int) -> None:
    outcome.rounds += 1
    outcome.jobs += verdict.jobs
    outcome.batches += verdict.batches
    outcome.runs += verdict.runs
    outcome.taken_over += verdict.taken_over
    outcome.again += verdict.again
    if new_jobs != verdict.jobs:
        verdict.other.append(f"the store has {new_jobs} new jobs, {verdict.jobs} different ones were submitted")
    outcome.lost += verdict.lost
    outcome.doubled += verdict.doubled
    outcome.other += verdict.other
    outcome.points = dict(one.points.fired)
    for hit in one.hits:
        about = {"kind": hit.kind, "kill": hit.kill, "doing": hit.doing, "recovery": hit.recovery, "round": one.number}
        outcome.hits.append(about)


def keep(place: Path, one: Round, verdict: Verdict) -> None:
    """A folder of evidence: what was wrong, what happened, the side log, the logs and the store."""
    shutil.rmtree(place, ignore_errors=True)
    one.site.keep_evidence(place)
    parents = one.site.witness.parent
    (place / "violations.txt").write_text("\n".join(verdict.violations))
    (place / "accidents.json").write_text(
        json.dumps([dataclasses.asdict(hit) for hit in one.hits], default=list, indent=1)
    )
    (place / "processes.json").write_text(json.dumps({"worker of": parents, "gone": one.site.witness.gone}, indent=1))
    (place / "batches.json").write_text(
        json.dumps([dataclasses.asdict(b) for b in one.stream.made], default=str, indent=1)
    )
    say(f"  evidence in {place}")
