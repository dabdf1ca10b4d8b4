"""The supervisor of a worker: slots that run chunks, and one thread that renews and listens.

A slot takes a chunk from claim to commit:

1. claim it in the store; whoever loses the race has nothing to do;
2. fetch the artifacts that its jobs name, where these lie behind a URL, and send the jobs to the child in groups,
   knowing at every moment which group runs, since when, and its limits; quick groups several at once, as many as those
   just before have shown to be quick;
3. a child that dies or is killed while a group runs: write an attempt for each job of it, then run these jobs one by
   one in a fresh child; a job whose child dies while it runs alone is tried again alone, until it has had three
   starts. Past its own limit of time or memory while alone, it has failed;
4. past the chunk's time budget, when paused or shut down: give the rest back;
5. share the artifacts that results name, then write all outcomes in one transaction fenced by the claim's token; while
   the remote or the store is out, keep them and try again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import structlog
from sqlalchemy import text

from netassay import __version__, disk, faults
from netassay.method import TIME_FACTOR
from netassay.settings import Settings
from netassay.store import artifacts, dispatching, running, storable
from netassay.store.database import SCHEMA, Database, Outage
from netassay.store.dispatching import CHUNK_SECONDS, LEAST_SECONDS, release
from netassay.store.remote import RemoteOutage
from netassay.store.running import MOST_STARTS, Claim, Death, Outcome, StaleToken, Task
from worker.compute import Child, ChildDied, Stopped
from worker.limits import memory_of_slots, resident
from worker.room import Room

log = structlog.get_logger("netassay.worker")

T = TypeVar("T")

#: A chunk is given back after this long, at the next end of a group.
BUDGET_SECONDS = 2 * CHUNK_SECONDS
#: Groups are sent together as long as they take no more than this, each as slow as the slowest of the request before.
#: What was sent cannot be called back: budget and pause wait for it.
AHEAD_SECONDS = 0.5
#: And no more than so many, whatever the last ones took: so much slow work may hide behind quick work.
AHEAD_GROUPS = 16
#: Signs of life a second. The dispatcher waits ten seconds and more, so several may be lost.
RENEW_SECONDS = 1.0
#: A slot waits so long for memory that others hold, then gives its chunk to whoever has room.
ROOM_SECONDS = 10.0
#: A method that could not be loaded is tried again, in a fresh child, after this long.
LACK_SECONDS = 10.0
#: A child is replaced between chunks when it has kept so many bytes of what it computed, or is so old: libraries leak.
LEAK_BYTES, CHILD_SECONDS = 512 << 20, 3600.0
#: How often a child may be killed from outside while it imports, before the chunk is given back.
PREPARATIONS = 3
#: Pause before a chunk is given back for which nothing could be done here: it is soon published again.
SHORT_SECONDS = 1.0
#: How often a job is run again because somebody deleted the cache of artifacts between the fetching and its start.
MOST_FETCHES = 3
#: What the system says where it is short of processes, memory or descriptors, which passes.
_SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
#: Signals that a program brings upon itself, each time anew: a library built for another processor, say.
_OWN_FAULTS = (signal.SIGILL, signal.SIGSEGV, signal.SIGFPE)


@dataclass
class Work:
    """Jobs to run in one call; fresh: in a child that has run nothing before; apart: their group broke down."""

    tasks: list[Task]
    fresh: bool = False
    apart: bool = False


@dataclass
class Slot:
    """What one thread holds at the moment; the renewing thread reads `chunk_id` and `current` and sets `stop`."""

    supervisor: Supervisor
    child: Child | None = None
    chunk_id: int | None = None
    current: tuple[int, ...] = ()
    busy: float = 0.0
    """seconds of this chunk in which the child computed"""
    telling: bool = True
    """whether `busy` says what the jobs that ended took: no child died or was stopped in the middle of others"""
    ahead: int = 1
    """how many groups the next request may have"""
    absent: dict[str, str] = field(default_factory=dict)
    """reference that the jobs of this chunk name -> why it is not to be had"""
    swept: int = 0
    """how often the cache was deleted under jobs of this chunk"""
    stop: str = ""
    """'' run on; 'after': end after the current jobs; 'now': kill them, they go back; 'lost': kill them, drop all"""

    def run(self, chunk_id: int) -> None:
        """Run a chunk from claim to commit. Never raises for what a job does."""
        faults.reach("worker.popped")
        supervisor = self.supervisor
        if supervisor.short_of_disk():
            self._wait(SHORT_SECONDS)
            return  # its message is gone, the dispatcher notices and publishes it again
        database, worker_id = supervisor.database, supervisor.worker_id
        token = running.new_token()
        # To the end: a claim whose answer was lost holds its chunk, and nobody takes a chunk from a worker that lives.
        claim = self._insist(chunk_id, lambda: running.claim(database, worker_id, chunk_id, token), held=0)
        if claim is None:
            return
        faults.reach("worker.claimed")
        self.chunk_id, self.stop = chunk_id, ""
        self.busy, self.telling, self.ahead = 0.0, True, 1
        self.absent, self.swept = {}, 0
        outcomes: list[Outcome] = []
        try:
            for outcome in self._run(claim):
                outcomes.append(outcome)
        except StaleToken:
            log.warning("chunk_taken_over", chunk=chunk_id)
            self.chunk_id = None
            return
        except Exception as error:
            # A bug here must not leave the chunk claimed for ever, nor send it round and round.
            log.exception("supervisor_failed", chunk=chunk_id)
            settled = {outcome.job_id for outcome in outcomes}
            message = f"its supervisor failed: {type(error).__name__}: {error}"
            outcomes += [Outcome(t.id, "failed", "error", message) for t in claim.tasks if t.id not in settled]
        faults.reach("worker.computed")
        try:
            if self.stop != "lost" or not faults.guarded("fence"):
                if claim.tasks and not outcomes:
                    # As it was, without a trace: closing it would leave an empty chunk in the store, each second one
                    # of a worker that can do nothing with what waits.
                    self._insist(chunk_id, lambda: self._release(claim), held=0)
                else:
                    self._keep(claim, self._share(claim, outcomes), worker_id)
        except StaleToken:
            log.warning("late_results_dropped", chunk=chunk_id, jobs=len(outcomes))
        except Exception as error:
            log.exception("results_refused", chunk=chunk_id, jobs=len(outcomes))
            self._keep_refusal(claim, outcomes, worker_id, error)
        finally:
            self.chunk_id = None
        faults.reach("worker.committed")

    def _fetch(self, claim: Claim, works: Sequence[Work]) -> None:
        """Bring the artifacts that these jobs name to this host: the child opens nothing that is not here.

        One that is not to be had is for the job to stumble over: a text may look like a reference and be none. Raises
        _Out.
        """
        kept = self.supervisor.kept
        if kept.remote is None:
            return
        wanted = set(claim.given.values())
        for work in works:
            wanted.update(*(artifacts.named(task.params) for task in work.tasks))
        try:
            self.absent = kept.fetch(wanted, lambda: bool(self.stop) or self.supervisor.stopping)
        except OSError as error:
            raise _Out(str(error)) from error

    def _share(self, claim: Claim, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes whose artifacts others can read: no record may name what lies on this host only.

        Through an outage again and again, until this worker has to end or the chunk is not wanted any more; what could
        not be shared by then is left out, and its jobs go back.
        """
        kept = self.supervisor.kept
        if kept.remote is None:
            return outcomes
        params = {task.id: task.params for task in claim.tasks}
        shared = []
        for outcome in outcomes:
            # What it was given is there already, or is none of ours.
            made = artifacts.named(outcome.result) - artifacts.named(params[outcome.job_id]) if outcome.result else ()
            try:
                lost = [reference for reference in sorted(made) if not self._shared(claim, reference, len(outcomes))]
            except RemoteOutage:
                self.telling = False
                continue
            if lost:
                message = (
                    f"its result names {lost[0]}, which is neither on the worker's host nor at {kept}; most likely the "
                    f"cache {kept.folder} was deleted meanwhile: retry it"
                )
                outcome = replace(outcome, state="failed", cause="store", message=message, result=None)
            shared.append(outcome)
        return shared

    def _shared(self, claim: Claim, reference: str, held: int) -> bool:
        """Whether others can read it now. Raises RemoteOutage where that cannot be waited for."""

        def unwanted() -> bool:
            return self.stop in ("now", "lost") or self.supervisor.overdue()

        kept, pause = self.supervisor.kept, 0.1
        while True:
            try:
                kept.share(reference, unwanted)
                return True
            except FileNotFoundError:
                return kept.has(reference)
            except RemoteOutage as error:
                about = {"chunk": claim.chunk_id, "held": held, "error": str(error)}
                if unwanted():
                    log.error("artifacts_out_to_the_end", **about)
                    raise
                log.warning("artifacts_out", **about, again_in=pause)
                _sleep(pause, unwanted)
                pause = min(2 * pause, 5.0)

    def _keep(self, claim: Claim, outcomes: list[Outcome], worker_id: int) -> None:
        """Commit; through an outage of the store, hold the results and try again until the worker has to end."""
        database = self.supervisor.database
        about = self.child.about if self.child else {}
        # One of 0 seconds was never begun: what its job needs is missing, or the store refused its result.
        seconds = self._seconds_a_job(claim, sum(outcome.seconds > 0 for outcome in outcomes))

        def keep() -> None:
            running.finish(database, worker_id, claim, outcomes, self.supervisor.provenance_of(about), seconds)

        self._insist(claim.chunk_id, keep, held=len(outcomes))

    def _seconds_a_job(self, claim: Claim, jobs: int) -> float | None:
        """What a job of this chunk took, of which so many were computed; None where that cannot be told."""
        if not jobs or not self.telling:
            return None
        seconds = max(self.busy / jobs, LEAST_SECONDS)
        # The first few jobs of a method that wants company say little about what each takes in a full group.
        if seconds > claim.seconds and jobs < min(claim.group_size, 8) and self.busy < 1.0:
            return None
        return seconds

    def _keep_refusal(self, claim: Claim, outcomes: list[Outcome], worker_id: int, refusal: Exception) -> None:
        """Let the jobs fail whose results the store will not have; if it will not have that either, give them back."""
        message = f"the store would not take its result: {type(refusal).__name__}: {refusal}"
        try:
            self._keep(claim, [Outcome(o.job_id, "failed", "store", message) for o in outcomes], worker_id)
        except StaleToken:
            log.warning("late_results_dropped", chunk=claim.chunk_id, jobs=len(outcomes))
        except Exception:
            log.exception("results_lost", chunk=claim.chunk_id, jobs=len(outcomes))
            self._wait(SHORT_SECONDS)
            while not self.supervisor.overdue():
                try:
                    return self._insist(claim.chunk_id, lambda: self._release(claim), held=0)
                except Exception:  # as long as this worker lives, nobody else would give the chunk back
                    log.exception("chunk_not_released", chunk=claim.chunk_id, again_in=SHORT_SECONDS)
                    _sleep(SHORT_SECONDS, self.supervisor.overdue)

    def _release(self, claim: Claim) -> None:
        """Give the whole chunk back: nobody takes a chunk from a worker that lives."""
        with self.supervisor.database.write() as connection:
            ours = connection.execute(
                text("SELECT 1 FROM chunk WHERE id = :id AND token = :token AND state = 'claimed'"),
                {"id": claim.chunk_id, "token": claim.token},
            ).one_or_none()
            if ours:
                release(connection, claim.chunk_id)

    def _insist(self, chunk_id: int, action: Callable[[], T], held: int) -> T | None:
        """Do something to the store, through an outage again and again. held: results that wait for it.

        Once the worker is overdue it is given up: the chunk goes to others when this worker has signed off or is lost.
        """
        pause = 0.1
        while True:
            try:
                return action()
            except Outage as error:
                about = {"chunk": chunk_id, "held": held, "error": str(error.orig)}
                if self.supervisor.overdue():
                    log.error("store_out_to_the_end", **about)
                    return None
                log.warning("store_out", **about, again_in=pause)
                _sleep(pause, self.supervisor.overdue)
                pause = min(2 * pause, 5.0)

    def _wait(self, seconds: float) -> None:
        _sleep(seconds, lambda: bool(self.stop) or self.supervisor.stopping)

    def _run(self, claim: Claim) -> Iterator[Outcome]:
        """The outcomes of a chunk, as far as it is run here and now; the rest goes back."""
        supervisor = self.supervisor
        known = supervisor.lacking.get(claim.method_id)
        if known is not None and time.monotonic() - known < LACK_SECONDS:
            self._wait(SHORT_SECONDS)
            return
        wanted = self._limits(claim, claim.group_size)[1]
        began = time.monotonic()
        with supervisor.room.reserve(wanted, ROOM_SECONDS, lambda: bool(self.stop) or supervisor.stopping) as fits:
            if fits:
                yield from self._jobs(claim)
                self._recycle()
                return
        log.warning("no_room", chunk=claim.chunk_id, wanted=wanted, of=supervisor.room.size)
        self._wait(SHORT_SECONDS if time.monotonic() - began < ROOM_SECONDS else 0.0)

    def _lacks(self, claim: Claim, reason: str) -> None:
        """This version of a method is not to be had here: its jobs are for others."""
        log.error("method_lacking", method=claim.method, version=claim.version, chunk=claim.chunk_id, why=reason)
        supervisor, line = self.supervisor, reason.partition("\n")[0]
        supervisor.lacking[claim.method_id] = time.monotonic()
        database, worker_id = supervisor.database, supervisor.worker_id
        self._insist(claim.chunk_id, lambda: running.lacks(database, worker_id, claim.method_id, line), held=0)

    def _has(self, claim: Claim) -> None:
        """It is to be had, whatever was said before."""
        if self.supervisor.lacking.pop(claim.method_id, None) is not None:
            database, worker_id = self.supervisor.database, self.supervisor.worker_id
            self._insist(claim.chunk_id, lambda: running.has(database, worker_id, claim.method_id), held=0)

    def _recycle(self) -> None:
        """Let a child go that has kept what it should not have, or is old: the next chunk starts another."""
        child = self.child
        if child is None or not child.alive:
            return
        kept, age = resident(child.process.pid) - child.clean, time.monotonic() - child.started
        if kept > LEAK_BYTES or age > CHILD_SECONDS:
            log.info("child_recycled", kept=kept, age=round(age))
            self._drop_child()

    def _jobs(self, claim: Claim) -> Iterator[Outcome]:
        queue, fresh = self._plan(claim), False
        deaths = {task.id: task.deaths for task in claim.tasks}
        budget = time.monotonic() + BUDGET_SECONDS
        while queue:
            if self.stop or self.supervisor.stopping:
                return
            # Given back, these would be put together again, break down again, and so on for ever.
            if time.monotonic() > budget and not queue[0].apart:
                return
            if deaths[queue[0].tasks[0].id] >= MOST_STARTS:
                task = queue.popleft().tasks[0]
                message = f"its process died {deaths[task.id]} times while it ran; see its attempts (netassay logs)"
                yield Outcome(task.id, "failed", "crash", message)
                continue
            try:
                yield from self._serve(claim, self._next(queue), queue)
            except Stopped:
                self.telling = False
                return
            except _Short as short:
                log.error("no_child_now", chunk=claim.chunk_id, error=str(short), given_back_in=SHORT_SECONDS)
                self._wait(SHORT_SECONDS)
                return
            except _Out as out:
                log.error("artifacts_out", chunk=claim.chunk_id, error=str(out), given_back_in=SHORT_SECONDS)
                self._wait(SHORT_SECONDS)
                return
            except _Lacking as lacking:
                if fresh:
                    self._lacks(claim, str(lacking))
                    self._wait(SHORT_SECONDS)
                    return
                # It may have changed since the child loaded it.
                fresh = queue[0].fresh = True
            except _Unfit as unfit:
                log.error("child_unfit", chunk=claim.chunk_id, error=str(unfit))
                for task in unfit.tasks:
                    yield Outcome(task.id, "failed", "error", str(unfit))
            except _Died as death:
                yield from self._after_death(claim, death, deaths, queue)

    def _plan(self, claim: Claim) -> deque[Work]:
        plain = [task for task in claim.tasks if not task.suspect]
        size = max(1, claim.group_size)
        groups = [Work(plain[start : start + size]) for start in range(0, len(plain), size)]
        # Each alone, and in a fresh child if one died of it; not all its mates too: importing torch takes seconds.
        suspect = [task for task in claim.tasks if task.suspect]
        alone = [Work([task], fresh=place == 0 or task.deaths != 1) for place, task in enumerate(suspect)]
        return deque(groups + alone)

    def _next(self, queue: deque[Work]) -> list[Work]:
        """The work of the next request: one group, or `ahead` quick ones."""
        works = [queue.popleft()]
        while queue and len(works) < self.ahead and not works[0].fresh and not queue[0].fresh:
            works.append(queue.popleft())
        return works

    def _serve(self, claim: Claim, works: list[Work], queue: deque[Work]) -> Iterator[Outcome]:
        """Run groups in the child; what did not get its turn goes back to the head of the queue."""
        left, again = deque(works), deque[Work]()
        # Whatever ends this request early says nothing about the next.
        self.ahead, slowest, asked = 1, 0.0, None
        try:
            self._fetch(claim, works)
            try:
                child = self._fit_child(claim, fresh=works[0].fresh)
            except ChildDied as death:
                if _killed(death):
                    raise _Short(f"{PREPARATIONS} children were killed while they imported: {death.message}") from None
                left.clear()
                raise _Unfit(death, [task for work in works for task in work.tasks]) from None
            limits = [self._limits(claim, len(work.tasks)) for work in works]
            groups = [
                {"memory": memory, "jobs": [[task.id, task.params] for task in work.tasks]}
                for work, (_, memory) in zip(works, limits, strict=True)
            ]
            child.send({"method": claim.method, "version": claim.version, "given": claim.given, "groups": groups})
            asked = time.monotonic()
            for seconds, memory in limits:
                work, start = left[0], time.monotonic()
                self.current = tuple(task.id for task in work.tasks)
                began = time.time()
                try:
                    # The child's own RLIMIT_DATA acts first; this one is for what that cannot see, hence later.
                    held = int(1.1 * memory) + (128 << 20)
                    line = child.line(start + seconds, held, self._must_stop)
                except ChildDied as death:
                    left.popleft()
                    raise _Died(work, death, began) from None
                left.popleft()
                slowest = max(slowest, time.monotonic() - start)
                ended = [self._explained(Outcome(*values)) for values in json.loads(line)]
                if any(outcome.state == "lacking" for outcome in ended):
                    left.appendleft(work)
                    self._drop_child()
                    raise _Lacking(ended[0].message)
                self._has(claim)
                if any(outcome.state == "short" for outcome in ended) and self.supervisor.short_of_disk():
                    self._drop_child()  # it is at the next group already
                    yield from (outcome for outcome in ended if outcome.state != "short")
                    raise _Short(next(outcome.message for outcome in ended if outcome.state == "short"))
                ended = [replace(one, state="failed") if one.state == "short" else one for one in ended]
                apart = {outcome.job_id for outcome in ended if len(work.tasks) > 1 and _apart(outcome)}
                apart |= self._robbed(ended, apart)
                yield from (outcome for outcome in ended if outcome.job_id not in apart)
                again.extend(Work([task], apart=True) for task in work.tasks if task.id in apart)
                if any(outcome.cause == "memory" for outcome in ended):
                    self._drop_child()  # whatever an allocation failed in may be half done
                    return
            fitting = int(AHEAD_SECONDS / max(slowest, LEAST_SECONDS))
            self.ahead = max(1, min(2 * len(works), AHEAD_GROUPS, fitting))
        finally:
            if asked is not None:
                self.busy += time.monotonic() - asked
            self.current = ()
            queue.extendleft(reversed(left))
            queue.extendleft(reversed(again))

    def _explained(self, outcome: Outcome) -> Outcome:
        """Its child knows that an artifact was not on this host; here it is known why."""
        if outcome.cause != "store":
            return outcome
        digests = ((reference.rpartition(":")[2], why) for reference, why in self.absent.items())
        message = next((why for digest, why in digests if digest in outcome.message), outcome.message)
        return replace(outcome, message=message)

    def _robbed(self, ended: Sequence[Outcome], apart: set[int]) -> set[int]:
        """Jobs to run again, as the cache of artifacts was deleted after theirs had been fetched."""
        kept = self.supervisor.kept
        if kept.remote is None or self.swept >= MOST_FETCHES:
            return set()
        why = set(self.absent.values())
        folder = str(kept.folder)
        swept = {
            outcome.job_id
            for outcome in ended
            if outcome.job_id not in apart
            and (
                (outcome.cause == "store" and outcome.message not in why)
                or (outcome.cause == "error" and "FileNotFoundError" in outcome.message and folder in outcome.message)
            )
        }
        self.swept += bool(swept)
        return swept

    def _limits(self, claim: Claim, jobs: int) -> tuple[float, int]:
        """Seconds and bytes for one call with so many jobs.

        Those of a group are the sums of its members', as far as that is still a limit: a thousand jobs of a minute each
        must not hide a hanging one for a day, nor their memory be more than there is. Past them the jobs run one by
        one, each with its own limits, so a tighter limit of the group costs time but no result.
        """
        memory = claim.memory_limit or self.supervisor.memory
        if jobs == 1:
            return claim.time_limit, memory
        expected = TIME_FACTOR * jobs * claim.seconds
        return (
            min(jobs * claim.time_limit, max(claim.time_limit, expected)),
            max(memory, min(jobs * memory, self.supervisor.memory)),
        )

    def _fit_child(self, claim: Claim, fresh: bool) -> Child:
        """A child that has imported what the jobs need. Raises ChildDied where none can be had, _Short, Stopped."""
        for tries_left in reversed(range(PREPARATIONS)):
            try:
                return self._child(claim, fresh)
            except ChildDied as death:
                self.child = None
                # Killed from outside (by a kernel out of memory, say) while it imported: the next may be luckier.
                if not tries_left or death.code is None or death.code >= 0:
                    raise
            except OSError as error:
                if error.errno in _SHORTAGES:
                    raise _Short(f"no process could be started: {error}") from error
                raise ChildDied("error", f"no process could be started: {error}", "") from error
        raise AssertionError("unreachable")

    def _child(self, claim: Claim, fresh: bool) -> Child:
        if self.child is not None and (fresh or not self.child.alive):
            self._drop_child()
        if self.child is None:
            self.child = Child(self.supervisor.kept.folder)
        child = self.child
        child.prepare(claim.libraries, self._must_stop)
        return child

    def _drop_child(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None

    def _must_stop(self) -> bool:
        if self.stop in ("now", "lost") or self.supervisor.overdue():
            self.child = None  # `Child.line` kills it
            return True
        return False

    def _after_death(self, claim: Claim, died: _Died, deaths: dict[int, int], queue: deque[Work]) -> Iterator[Outcome]:
        self.child, self.telling = None, False
        tasks, death = died.work.tasks, died.death
        log.warning("child_died", chunk=claim.chunk_id, jobs=len(tasks), cause=death.cause, why=death.message)
        report = Death(
            job_ids=tuple(task.id for task in tasks),
            started_at=died.began,
            ended_at=time.time(),
            cause=death.cause,
            message=death.message,
            log=storable.text(death.log),
        )
        database, worker_id = self.supervisor.database, self.supervisor.worker_id
        faults.reach("worker.died")
        self._insist(claim.chunk_id, lambda: running.report_death(database, worker_id, claim, report), held=0)
        faults.reach("worker.reported")
        for task in tasks:
            deaths[task.id] += 1
        # Beyond its own limit it will be again. A SIGKILL from outside is another matter: the kernel, out of memory,
        # may have picked this process for what others took.
        if len(tasks) == 1 and (death.limited or deaths[tasks[0].id] >= MOST_STARTS):
            yield Outcome(tasks[0].id, "failed", death.cause, death.message + _last_words(death.log))
            return
        # One after another in a fresh child each time one dies: the culprit shows itself, its mates are done.
        queue.extendleft(Work([task], fresh=place == len(tasks) - 1) for place, task in enumerate(reversed(tasks)))


def _apart(outcome: Outcome) -> bool:
    """Of a group: whether this job is to run by itself, because the call raised or took more memory than it may."""
    return outcome.state == "apart" or outcome.cause == "memory"


def _killed(death: ChildDied) -> bool:
    """From outside, by another than its supervisor."""
    return death.code is not None and death.code < 0 and -death.code not in _OWN_FAULTS


def _is_gone(pid: int) -> bool:
    """Whether there is no such process, or one that has ended and that its parent has not asked about yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _sleep(seconds: float, enough: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not enough() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _last_words(text: str) -> str:
    lines = text.strip().splitlines()[-5:]
    return "\n" + storable.text("\n".join(lines), 2000) if lines else ""


class _Died(Exception):
    def __init__(self, work: Work, death: ChildDied, began: float) -> None:
        self.work, self.death, self.began = work, death, began


class _Short(Exception):
    """The host has no room for a child, or on its disk, at the moment; no job is to blame, and none fails."""


class _Lacking(Exception):
    """The child has not this version of the method."""


class _Out(Exception):
    """The artifacts that jobs need cannot be fetched at the moment; no job is to blame, and none fails."""


class _Unfit(Exception):
    """The child ended by itself before it had run a job: something that these jobs need is missing or broken here."""

    def __init__(self, death: ChildDied, tasks: list[Task]) -> None:
        self.tasks = tasks
        super().__init__(f"a compute child could not be started: {death.message}{_last_words(death.log)}")


@dataclass
class Supervisor:
    """One worker process: its place in the store, its slots."""

    settings: Settings
    slots: int
    database: Database = field(init=False)
    kept: artifacts.Artifacts = field(init=False)
    worker_id: int = field(init=False, default=0)
    memory: int = field(init=False)
    """bytes a job may use beyond its imports where neither its method nor its sweep says"""
    room: Room = field(init=False)
    lacking: dict[int, float] = field(init=False, default_factory=dict)
    """version of a method (its id) that could not be loaded here -> when that was seen last, monotonic"""
    stopping: bool = field(init=False, default=False)
    _stop_at: float = field(init=False, default=float("inf"))
    _short: bool = field(init=False, default=False)
    _outdated: bool = field(init=False, default=False)
    _held: dict[int, Slot] = field(init=False, default_factory=dict)
    _known: dict[str, int] = field(init=False, default_factory=dict)
    _done: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.database = Database(self.settings.store_url)
        self.kept = artifacts.of(self.settings)
        self.room = Room(memory_of_slots(self.settings.memory))
        self.memory = self.room.size // self.slots

    @property
    def name(self) -> str:
        return f"{socket.gethostname()}-{os.getpid()}"

    def start(self, predecessor: int = 0) -> None:
        """Sign on and begin to renew. predecessor: process of a worker of this host that has died."""
        self.database.prepare()
        if predecessor and _is_gone(predecessor) and faults.guarded("reconciler"):
            # Whoever started us saw it end; a dispatcher would have to wait until that is certain.
            with contextlib.suppress(*Outage):
                for worker, chunks in dispatching.bury(self.database, socket.gethostname(), predecessor).items():
                    log.warning("predecessor_lost", worker=worker, chunks=chunks)
        self._sign_on()
        threading.Thread(target=self._renew, name="renew", daemon=True).start()

    def _sign_on(self) -> None:
        self.worker_id = running.sign_on(
            self.database, self.name, socket.gethostname(), os.getpid(), self.slots, self.room.size
        )
        self.lacking.clear()
        log.info("signed_on", worker=self.worker_id, slots=self.slots, memory_a_slot=self.memory)

    def run(self, chunk_id: int) -> None:
        """Run a chunk in the slot of the calling thread."""
        if self.stopping:
            return  # its message is gone, the dispatcher notices and publishes it again
        thread = threading.get_ident()
        slot = self._held.get(thread)
        if slot is None:
            slot = self._held.setdefault(thread, Slot(self))
        slot.run(chunk_id)

    def overdue(self) -> bool:
        """The grace after SIGTERM is over."""
        return time.monotonic() > self._stop_at

    def stop(self) -> None:
        """Begin to shut down: slots end after their current jobs, or are cut off after the grace."""
        self._stop_at = time.monotonic() + self.settings.grace
        self.stopping = True

    def close(self) -> None:
        """Shut down: no children, no claims, a good-bye in the store."""
        self._done.set()
        for slot in self._held.values():
            slot._drop_child()
        if not self._outdated:
            running.sign_off(self.database, self.worker_id)

    def short_of_disk(self) -> bool:
        """Whether results, or what a job writes meanwhile, may find no room: nothing more is begun then."""
        folders = (self.kept.folder, Path(tempfile.gettempdir()))
        short = next((folder for folder in folders if disk.is_short(folder)), None)
        if (short is not None) != self._short:
            self._short = short is not None
            log.warning("disk_short" if short else "disk_has_room_again", folder=str(short or self.kept.folder))
        return short is not None

    def _end_outdated(self, schema: str) -> None:
        log.error("outdated", store=schema, known=SCHEMA, mend="upgrade this installation; this worker ends")
        self._outdated = True
        self._done.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def _renew(self) -> None:
        stray: frozenset[int] = frozenset()
        while not self._done.wait(RENEW_SECONDS):
            slots = [slot for slot in list(self._held.values()) if slot.chunk_id is not None]
            current = {slot.chunk_id: slot.current for slot in slots if slot.chunk_id is not None}
            try:
                renewal = running.renew(self.database, self.worker_id, current)
                if renewal.schema:
                    for slot in slots:
                        slot.stop = "lost"
                    self._end_outdated(renewal.schema)
                    return
                if renewal.lost:
                    log.warning("was_given_up", worker=self.worker_id)
                    for slot in slots:
                        slot.stop = "lost"
                    self._sign_on()
                    continue
                # Once seen it may be a claim that a slot has just made; for a second it is not.
                if again := renewal.stray & stray:
                    log.warning("chunks_given_back", chunks=sorted(again))
                    running.give_back(self.database, self.worker_id, again)
                stray = renewal.stray
            except Outage as error:
                log.warning("store_out", error=str(error.orig))
                continue
            except Exception:
                # Without this thread the worker is soon given up, and works on without knowing it.
                log.exception("renewal_failed")
                continue
            for slot in slots:
                if slot.chunk_id in renewal.cancelled:
                    slot.stop = "now"
                elif slot.chunk_id in renewal.paused and not slot.stop:
                    slot.stop = "after"

    def provenance_of(self, about: dict[str, Any]) -> int | None:
        """Id of the row that says with what a child computed."""
        if not about:
            return None
        body = json.dumps({**about, "netassay": __version__, "host": socket.gethostname()}, sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()
        if digest not in self._known:
            self._known[digest] = running.provenance_id(self.database, digest, body)
        return self._known[digest]
