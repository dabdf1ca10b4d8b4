"""What can happen to a lab. Each accident is a small class: `strike` does it, and says whom it hit and at what.

An accident that needs time (a stop, an outage) goes on in the background, so accidents overlap.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import redis

from netassay import faults

from .site import Site
from .witness import alive

#: How long an accident waits for a victim that holds work, where it wants one.
AIM_SECONDS = 3.0


@dataclass
class Hit:
    """An accident that happened. Times are of the monotonic clock."""

    kind: str
    kill: bool
    at: float
    until: float
    """when the disturbance itself was over; what it takes to recover comes on top"""
    victims: tuple[int, ...] = ()
    """processes that died or were stopped"""
    workers: tuple[int, ...] = ()
    """workers that died, were stopped, or whose children died"""
    doing: str = "-"
    held: frozenset[str] = frozenset()
    """jobs in the hands of the victims, as the store knew them"""
    store: bool = False
    """whether the store itself, or the way to it, was hit"""
    forgets: bool = False
    """whether the store may have lost its last moments"""
    recovery: float | None = None


class Missed(Exception):
    """There was nobody to hit."""


@dataclass
class Ground:
    """What accidents need to know. skipped: why kinds of accident cannot happen here."""

    site: Site
    draw: random.Random
    names: Callable[[Iterable[int]], frozenset[str]]
    """what the side log calls these jobs (ids)"""
    document: Callable[[], Path] | None = None
    """a batch to submit in order to be killed"""
    carried: Callable[[], Path] | None = None
    """a file to import in order to be killed"""
    threads: list[threading.Thread] = field(default_factory=list)

    def held(self, workers: Iterable[int]) -> frozenset[str]:
        """Jobs that these workers hold, as the store knows; empty where it does not answer."""
        places = ", ".join(map(str, workers)) or "0"
        try:
            rows = self.site.query(
                "SELECT r.job_id FROM running r JOIN chunk c ON c.id = r.chunk_id JOIN worker w ON w.id = c.worker_id"
                f" WHERE w.pid IN ({places}) AND w.state = 'alive' ORDER BY r.job_id LIMIT 3000"
            )
            return self.names([row.job_id for row in rows])
        except Exception:
            return frozenset()

    def fragile(self) -> frozenset[str] | None:
        """Jobs in hand that one more death could condemn though they are innocent; None where the store is away."""
        try:
            rows = self.site.query(
                "SELECT job_id, (SELECT count(*) FROM attempt a WHERE a.job_id = r.job_id AND a.spent = 0) AS deaths,"
                " (SELECT coalesce(max(losses), 0) FROM worker_loss l WHERE l.job_id = r.job_id) AS losses"
                " FROM running r"
            )
        except Exception:
            return None
        return self.names([row.job_id for row in rows if row.deaths + max(0, row.losses - 2) >= 2])

    def background(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        self.threads.append(thread)

    def settle(self) -> None:
        """Wait until what goes on in the background is over."""
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def doing(self, pid: int) -> str:
        """What a compute child is at, by the side log."""
        jobs = self.site.witness.open(pid)
        return "in group" if len(jobs) > 1 else "holding" if jobs else "idle"

    def doing_worker(self, worker: int, held: frozenset[str]) -> str:
        children = [pid for pid, parent in self.site.children().items() if parent == worker]
        words = {self.doing(pid) for pid in children}
        return next((word for word in ("in group", "holding") if word in words), "holding" if held else "idle")


def _kill(*pids: int, number: int = signal.SIGKILL) -> float:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return time.monotonic()


class Accident:
    """An accident. name: in the report; kill: counted among the kills; kinds: of labs in which it can happen."""

    name: ClassVar[str]
    kill: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("embedded", "cluster")

    def impossible(self, site: Site) -> str:
        """Why it cannot happen at this site; empty where it can."""
        return "" if site.kind in self.kinds else f"not in a lab of kind {site.kind}"

    def strike(self, ground: Ground) -> Hit:
        """Do it. Raises Missed where there is nobody to hit at the moment."""
        raise NotImplementedError

    def hit(self, ground: Ground, at: float, until: float | None = None, **about: object) -> Hit:
        return Hit(self.name, self.kill, at, at if until is None else until, **about)  # type: ignore[arg-type]


def _aimed(ground: Ground, candidates: Callable[[], list[int]], busy: Callable[[int], bool]) -> int:
    """A process to hit, most often one that holds work. Raises Missed."""
    wanted = ground.draw.random() < 0.85
    deadline = time.monotonic() + AIM_SECONDS
    found: list[int] = []
    while time.monotonic() < deadline:
        found = sorted(candidates())
        good = [pid for pid in found if busy(pid)]
        if good or (found and not wanted):
            return ground.draw.choice(good or found)
        time.sleep(0.05)
    raise Missed


class WorkerKilled(Accident):
    name = "worker killed"

    def choose(self, ground: Ground) -> tuple[int, frozenset[str], str]:
        """A worker, the jobs it holds and what it does, none of whose jobs is innocent and near its last start."""
        for _ in range(20):
            pid = _aimed(ground, ground.site.workers, lambda pid: bool(ground.held([pid])))
            held, fragile = ground.held([pid]), ground.fragile()
            if fragile is not None and not held & fragile:
                return pid, held, ground.doing_worker(pid, held)
            time.sleep(0.1)
        raise Missed

    def strike(self, ground: Ground) -> Hit:
        pid, held, doing = self.choose(ground)
        return self.hit(ground, _kill(pid), victims=(pid,), workers=(pid,), held=held, doing=doing)


class ChildKilled(Accident):
    name = "compute child killed"

    def strike(self, ground: Ground) -> Hit:
        site = ground.site
        for _ in range(20):
            pid = _aimed(ground, lambda: list(site.children()), lambda pid: bool(site.witness.open(pid)))
            fragile, jobs = ground.fragile(), site.witness.open(pid)
            if fragile is not None and not fragile & set(jobs):
                break
            time.sleep(0.1)
        else:
            raise Missed
        doing, worker = ground.doing(pid), site.witness.parent.get(pid, 0)
        at = _kill(pid)
        return self.hit(ground, at, victims=(pid,), workers=(worker,), held=frozenset(jobs), doing=doing)


class DispatcherKilled(Accident):
    name = "dispatcher killed"

    def strike(self, ground: Ground) -> Hit:
        found = ground.site.services("dispatcher")
        if not found:
            raise Missed
        pid = ground.draw.choice(found)
        doing = _backlog(ground)
        return self.hit(ground, _kill(pid), victims=(pid,), doing=doing)


def _backlog(ground: Ground) -> str:
    """Whether chunks were published and nobody had claimed them."""
    with contextlib.suppress(Exception):
        return "holding" if ground.site.query("SELECT 1 FROM chunk WHERE state = 'published' LIMIT 1") else "idle"
    return "-"


class LabKilled(Accident):
    """The supervisor of a host: all it started ends with it, and somebody starts it again."""

    name = "lab killed"

    def strike(self, ground: Ground) -> Hit:
        site = ground.site
        hosts = [host for host in site.hosts() if site.described(host)]
        fragile = ground.fragile()
        if not hosts or fragile is None:
            raise Missed
        host = ground.draw.choice(hosts)
        about = site.described(host)
        worker = about["services"].get("worker", 0)
        held = ground.held([worker])
        if held & fragile:
            raise Missed
        doing = ground.doing_worker(worker, held)
        site.killed.add(about["pid"])
        at = _kill(about["pid"])
        return self.hit(ground, at, victims=(about["pid"], worker), workers=(worker,), held=held, doing=doing)


class RedisKilled(Accident):
    name = "Redis killed"

    def strike(self, ground: Ground) -> Hit:
        site, doing = ground.site, _backlog(ground)
        if site.server is None:
            found = site.services("redis")
            if not found:
                raise Missed
            return self.hit(ground, _kill(*found), victims=tuple(found), doing=doing)
        with site.broker_lock:
            site.server.kill()
            at = time.monotonic()
            time.sleep(ground.draw.uniform(0.0, 1.5))
            self.damage(site)
            site.server.start()
        return self.hit(ground, at, time.monotonic(), doing=doing)

    def damage(self, site: Site) -> None:
        """What happens to its file before it is started again."""


class RedisTailLost(RedisKilled):
    """The end of the append-only file is lost, in the middle of a command, as by a crash of the machine."""

    name = "Redis killed, tail of its file lost"
    kinds = ("cluster",)  # where the lab starts its Redis again, nobody has the time to damage the file

    def damage(self, site: Site) -> None:
        assert site.server is not None
        files = sorted(site.server.folder.glob("appendonlydir/*.incr.aof"))
        if files:
            size = files[-1].stat().st_size
            os.truncate(files[-1], max(0, size - 1 - size // 3))


class RedisTailLostAtHome(Accident):
    """As above, of the private Redis of a lab: it is stopped first, so that it is not started again before its file is
    cut; then the whole lab goes, and comes back."""

    name = "Redis killed, tail of its file lost"
    kinds = ("embedded",)

    def strike(self, ground: Ground) -> Hit:
        site = ground.site
        with site.not_tended() as free:
            about = site.described(site.lab) if free else {}
            fragile = ground.fragile()
            if not about or fragile is None:
                raise Missed
            worker = about["services"].get("worker", 0)
            held, doing = ground.held([worker]), _backlog(ground)
            if held & fragile:
                raise Missed
            site.killed.add(about["pid"])
            at = _kill(about["pid"])
            deadline = time.monotonic() + 5
            while any(alive(pid) for pid in about["services"].values()) and time.monotonic() < deadline:
                time.sleep(0.02)
            for file in sorted((site.home / "redis").glob("appendonlydir/*.incr.aof"))[-1:]:
                size = file.stat().st_size
                os.truncate(file, max(0, size - 1 - size // 3))
        return self.hit(ground, at, victims=(about["pid"], worker), workers=(worker,), held=held, doing=doing)


class RedisWiped(Accident):
    name = "Redis wiped (FLUSHALL)"
    kill = False

    def strike(self, ground: Ground) -> Hit:
        doing = _backlog(ground)
        try:
            with contextlib.closing(redis.Redis.from_url(ground.site.broker, socket_timeout=5)) as client:
                client.flushall()
        except (redis.RedisError, OSError, ValueError) as error:
            raise Missed from error
        return self.hit(ground, time.monotonic(), doing=doing)


class PostgresCrashed(Accident):
    """`pg_ctl stop -m immediate`, and a start: commits that nobody asked to be synced may be forgotten."""

    name = "PostgreSQL crashed"
    kinds = ("cluster",)

    def strike(self, ground: Ground) -> Hit:
        site, doing = ground.site, _backlog(ground)
        assert site.postgres is not None
        with site.store_lock:
            at = time.monotonic()
            site.postgres.crash()
            time.sleep(ground.draw.uniform(0.0, 2.0))
            site.postgres.start()
            site.direct.dispose()
        return self.hit(ground, at, time.monotonic(), doing=doing, store=True, forgets=True)


class SubmitterKilled(Accident):
    """Killed at any moment between its start and its end."""

    name = "submitter killed"

    def strike(self, ground: Ground) -> Hit:
        assert ground.document is not None
        process = ground.site.command("submit", str(ground.document()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ground.draw.uniform(0.2, 1.2))
        ended = process.poll() is not None
        process.kill()
        at = time.monotonic()
        process.communicate()
        if ended:
            raise Missed
        return self.hit(ground, at, victims=(process.pid,), doing="holding")


class WorkerStopped(WorkerKilled):
    """SIGSTOP, and SIGCONT before anybody takes it for lost."""

    name = "worker stopped, within its lease"
    kill = False

    def seconds(self, ground: Ground) -> float:
        return ground.draw.uniform(0.3, 0.85) * ground.site.lost_after

    def strike(self, ground: Ground) -> Hit:
        pid, held, doing = self.choose(ground)
        seconds = self.seconds(ground)
        at = _kill(pid, number=signal.SIGSTOP)

        def wake() -> None:
            time.sleep(seconds)
            _kill(pid, number=signal.SIGCONT)

        ground.background(wake)
        return self.hit(ground, at, at + seconds, victims=(pid,), workers=(pid,), held=held, doing=doing)


class WorkerFrozen(WorkerStopped):
    """SIGSTOP beyond its lease: it is taken for lost, and wakes to late results."""

    name = "worker stopped, beyond its lease"

    def seconds(self, ground: Ground) -> float:
        # Often so long that others have done its jobs when it wakes.
        return ground.site.lost_after + ground.draw.uniform(1.5, 15.0)


class DiskFull(Accident):
    """Where the store lies no byte is left for some seconds; of an embedded lab the logs and Redis lie there too."""

    name = "disk full"
    kill = False

    def impossible(self, site: Site) -> str:
        return "" if site.disk else "no small disk could be mounted"

    def strike(self, ground: Ground) -> Hit:
        site = ground.site
        assert site.disk is not None
        seconds, ballast, doing = ground.draw.uniform(2.0, 6.0), site.disk / "ballast", _backlog(ground)
        if ballast.exists():
            raise Missed
        at = time.monotonic()
        site.fill_disk()

        def clear() -> None:
            time.sleep(seconds)
            ballast.unlink()
            if site.postgres is not None:  # a server that cannot write its log gives up
                time.sleep(1.0)
                with site.store_lock:
                    if not site.postgres.running():
                        site.postgres.start()
                        site.direct.dispose()

        ground.background(clear)
        # PostgreSQL without room for its log ends as by a crash.
        return self.hit(ground, at, at + seconds, doing=doing, store=True, forgets=site.postgres is not None)


class ClockJumps(Accident):
    """The wall clock of one process is an hour off, for a while."""

    name = "clock jumps by an hour"
    kill = False

    def strike(self, ground: Ground) -> Hit:
        site = ground.site
        found = site.workers() + site.services("dispatcher") + list(site.children())
        if not found:
            raise Missed
        pid, seconds = ground.draw.choice(found), ground.draw.uniform(3.0, 20.0)
        file = site.clocks / str(pid)
        file.write_text(str(ground.draw.choice([-3600, 3600])))
        at = time.monotonic()

        def mend() -> None:
            time.sleep(seconds)
            file.unlink(missing_ok=True)

        ground.background(mend)
        return self.hit(ground, at, at + seconds, doing="-")


class _BadWay(Accident):
    """Something happens on the way to Redis, or to PostgreSQL."""

    kill = False
    kinds = ("cluster",)
    to_store: ClassVar[bool]

    def strike(self, ground: Ground) -> Hit:
        way = ground.site.store_way if self.to_store else ground.site.broker_way
        assert way is not None
        doing, at = _backlog(ground), time.monotonic()
        kind = ground.draw.choice(["stall", "cut", "reset", "half-open"])
        until = at
        if kind == "stall":
            seconds = ground.draw.uniform(1.0, 6.0)
            until = at + seconds
            ground.background(lambda: way.stall(seconds))
        elif kind == "cut":
            way.truncate()
        elif kind == "reset":
            way.reset()
        else:
            seconds = ground.draw.uniform(4.0, 12.0)
            until = at + seconds
            way.half_open(ground.draw.choice(["client", "service"]), seconds)
        return self.hit(ground, at, until, doing=doing, store=self.to_store)


class WayToRedis(_BadWay):
    name = "way to Redis stalls, cuts, resets or half-open"
    to_store = False


class WayToStore(_BadWay):
    name = "way to PostgreSQL stalls, cuts, resets or half-open"
    to_store = True


@dataclass
class Points:
    """Deaths at the very steps where something could be lost; dealt out evenly, many at a time.

    A point that is armed waits for the first process to come by; those of submitters and imports get one started.
    """

    ground: Ground
    armed: dict[str, float] = field(default_factory=dict)
    fired: dict[str, int] = field(default_factory=lambda: dict.fromkeys(faults.POINTS, 0))
    died: queue.SimpleQueue[Hit] = field(default_factory=queue.SimpleQueue)
    """submitters and imports that died at their points"""

    def next(self) -> str | None:
        """The point that has had least, of those that are not armed."""
        free = [point for point in faults.POINTS if point not in self.armed]
        fewest = min((self.fired[point] for point in free), default=0)
        found = [point for point in free if self.fired[point] == fewest]
        return self.ground.draw.choice(found) if found else None

    def strike(self, point: str) -> Hit | None:
        """Arm it, or start who dies there, and do what makes somebody come by: returns the hit, if that is one."""
        ground = self.ground
        if point.startswith(("submit.", "import.")):
            self.armed[point] = time.monotonic()
            ground.background(lambda: self._at_command(point))
            return None
        (ground.site.armed / point).touch()
        self.armed[point] = time.monotonic()
        if point == "dispatch.unpublished":  # a message has to get lost
            (ground.site.armed / "worker.popped").touch()
            self.armed.setdefault("worker.popped", time.monotonic())
        with contextlib.suppress(Missed):
            if point == "dispatch.reclaimed":
                return WorkerKilled().strike(ground)
            if point == "dispatch.forgotten":
                return RedisWiped().strike(ground)
            if point in ("worker.died", "worker.reported"):
                return ChildKilled().strike(ground)
        return None

    def _at_command(self, point: str) -> None:
        ground = self.ground
        verb, _, _ = point.partition(".")
        made = ground.document if verb == "submit" else ground.carried
        try:
            if made is None:
                return
            process = ground.site.command(verb, str(made()), CRASH_AT=point)
            try:
                process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return
            if process.returncode == -signal.SIGKILL:
                now = time.monotonic()
                self.died.put(Hit(f"at {point}", True, now, now, (process.pid,), doing="holding"))
        finally:
            self.armed.pop(point, None)

    def poll(self) -> list[Hit]:
        """Who has died at an armed point since the last look."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.died.get_nowait())
                self.fired[found[-1].kind.removeprefix("at ")] += 1
        for file in list(self.ground.site.armed.iterdir()):
            point, _, number = file.name.rpartition(".")
            if not number.isdigit():
                continue
            # It was renamed at the moment of the death.
            pid, at = int(number), time.monotonic() - max(0.0, time.time() - file.stat().st_ctime)
            file.unlink()
            self.armed.pop(point, None)
            self.fired[point] += 1
            worker = point.startswith("worker.")
            held = self.ground.held([pid]) if worker else frozenset()
            found.append(Hit(f"at {point}", True, at, at, (pid,), (pid,) if worker else (), "holding", held=held))
        return found

    def disarm(self) -> None:
        for file in self.ground.site.armed.iterdir():
            if not file.name.rpartition(".")[2].isdigit():
                file.unlink(missing_ok=True)
                self.armed.pop(file.name, None)


#: How often each happens beside the others; deaths at points come on top.
WEIGHTS: dict[type[Accident], float] = {
    WorkerKilled: 10,
    ChildKilled: 13,
    DispatcherKilled: 5,
    SubmitterKilled: 4,
    LabKilled: 2,
    RedisKilled: 3,
    RedisTailLost: 2,
    RedisTailLostAtHome: 1.5,
    RedisWiped: 3,
    PostgresCrashed: 3,
    WorkerStopped: 2,
    WorkerFrozen: 2,
    DiskFull: 1.5,
    ClockJumps: 2,
    WayToRedis: 3,
    WayToStore: 3,
}
