"""Following batches until they rest: the one loop behind `watch`, `wait` and a notebook's bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from producer import lab
from producer.wording import duration

if TYPE_CHECKING:
    from netassay.settings import Settings
    from netassay.store.database import Database
    from netassay.store.reading import Progress
    from producer.notebook import Bar

#: How often batches that do not move are asked whether anybody works on them.
QUIET_SECONDS = 3.0
#: How often a waiting process looks: at first, and when it has waited for `_SOON` seconds.
_TICK, _LATER_TICK, _SOON = 0.1, 0.3, 5.0


@dataclass(frozen=True)
class Look:
    """How the batches that are followed stand, in the order in which they were named.

    quiet: why nothing happens and how to mend that, where it is known. outage: why the store did not answer; the
    batches are those of the look before then.
    """

    batches: list[Progress]
    quiet: str = ""
    outage: str = ""


def follow(database: Database, config: Settings, names: Sequence[str], timeout: float | None = None) -> Iterator[Look]:
    """Look after look, until all these batches are over or paused, or `timeout` seconds have passed.

    There is one look at least, and the last is how they stand at the end. An outage of the store is waited out, but
    not at the first look. Raises NoSuchBatch before it waits for any.
    """
    from netassay.store import reading
    from netassay.store.database import Outage

    batches = [reading.progress(database, name) for name in names]
    quiet = outage = ""
    began = asked = time.monotonic()
    while True:
        yield Look(batches, quiet, outage)
        passed = time.monotonic() - began
        if all(batch.resting for batch in batches) or (timeout is not None and passed >= timeout):
            return
        tick = _TICK if passed < _SOON else _LATER_TICK
        time.sleep(tick if timeout is None else min(tick, timeout - passed))
        try:
            before = sum(batch.ended for batch in batches)
            batches = [batch if batch.resting else reading.progress(database, batch.name) for batch in batches]
            outage = ""
            if sum(batch.ended for batch in batches) != before:
                quiet, asked = "", time.monotonic()
            elif time.monotonic() - asked >= QUIET_SECONDS:
                quiet = "" if lab.anybody_works(config, database) else _how_to_start(config)
                asked = time.monotonic()
        except Outage as error:
            outage = f"the store does not answer ({str(error.orig).strip()})"


def show(looks: Iterable[Look], bar: Bar) -> list[Progress]:
    """Each look on the bar, and once what it says. Returns how the batches stood at the last."""
    paces: dict[str, Pace] = {}
    told = {""}
    last: list[Progress] = []
    for look in looks:
        last = look.batches
        for batch in last:
            bar.show(batch, paces.setdefault(batch.name, Pace(batch)).words(batch))
        for words in (look.quiet, look.outage):
            if words not in told:
                told.add(words)
                bar.say(words)
    return last


def _how_to_start(config: Settings) -> str:
    if lab.on_cluster(config):
        return "no worker runs; start one with: netassay up, or netassay worker, on a host of the cluster"
    return "no worker runs; start one with: netassay up (in Python: producer.up())"


class Pace:
    """How fast a batch goes, from how it stood when this was made."""

    def __init__(self, progress: Progress) -> None:
        self._began, self._first = time.monotonic(), progress.ended

    def words(self, progress: Progress) -> str:
        """`230/s, 12.5 s left`; empty where nothing can be said yet, or nothing more happens."""
        passed = time.monotonic() - self._began
        rate = (progress.ended - self._first) / passed if passed > 0.5 else 0.0
        if rate <= 0 or progress.resting or progress.state != "open":
            return ""
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        return f"{speed}, {duration((progress.size - progress.ended) / rate)} left"
