"""Weighted round robin in seconds of work: whose turn it is among those who have something to do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

#: A turn counts as no less, or one whose jobs take no time would last for ever.
LEAST_TURN = 1e-3


class Turns(Generic[K]):
    """What each has had, by its weight; the next turn is of the one who has had least.

    A newcomer starts level with the least served, not with a claim on all the time before it came, and has the first
    turn among equals; and it starts behind the newcomers before it: whoever brings one small thing after another must
    not keep all else waiting.
    """

    def __init__(self) -> None:
        self._had: dict[K, float] = {}
        self._weights: Mapping[K, float] = {}
        self._begun: set[K] = set()
        self._newcomer = 0.0

    def present(self, weights: Mapping[K, float]) -> None:
        """Those who have something to do now, with their weights; of all others it is forgotten what they had."""
        start = max(min((self._had[one] for one in weights if one in self._had), default=0.0), self._newcomer)
        self._had = {one: self._had.get(one, start) for one in weights}
        self._begun &= self._had.keys()
        self._weights = weights

    def next(self, among: Iterable[K]) -> K:
        """Whose turn it is of these, who are all present."""
        # By their order in the end: the same every time.
        ranked = enumerate(among)
        return min(ranked, key=lambda one: (self._had[one[1]], one[1] in self._begun, one[0]))[1]

    def took(self, one: K, seconds: float) -> None:
        """It had a turn of so many seconds."""
        at, seconds = self._had[one], max(seconds, LEAST_TURN)
        self._had[one] = at + seconds / self._weights[one]
        if one not in self._begun:
            self._begun.add(one)
            self._newcomer = max(at, self._newcomer) + seconds / sum(self._weights.values())
