"""What is known of a dataset without its numbers, and which of its examples belong to which split.

Example i belongs to `test` where i % 3 == 2, else to `train`; `all` is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netassay.heavy import np
from netassay.method import InvalidInput

if TYPE_CHECKING:
    import numpy

SPLITS = ("all", "train", "test")
#: An example is a test example where its number leaves the remainder `TEST` on division by `PERIOD`.
PERIOD, TEST = 3, 2

#: `none`: as they are. `minmax`: (x - low) / (high - low) of each feature over the whole set, a feature that never
#: changes becomes 0. `unit`: divided by the largest absolute value of the whole set, so that zeros stay zeros.
Scale = Literal["none", "minmax", "unit"]


@dataclass(frozen=True)
class Facts:
    """size: number of examples in both splits together. shape: of one example. classes: how many."""

    size: int
    shape: tuple[int, ...]
    classes: int

    def of(self, split: str) -> int:
        """Number of examples in a split. Raises InvalidInput for an unknown one."""
        known(split)
        tests = (self.size - TEST + PERIOD - 1) // PERIOD
        return {"all": self.size, "test": tests, "train": self.size - tests}[split]


def known(split: str) -> None:
    """Raises InvalidInput for an unknown split."""
    if split not in SPLITS:
        raise InvalidInput(f"there is no split {split!r}", what_to_try=f"one of {', '.join(SPLITS)}")


def part(array: numpy.ndarray, split: str) -> numpy.ndarray:
    """The examples of a split, along the first axis: a copy that cannot be written, in C order."""
    is_test = np.arange(len(array)) % PERIOD == TEST
    chosen = {"all": slice(None), "train": ~is_test, "test": is_test}[split]
    # A copy: the caller and the other splits keep their own arrays. Read-only: all callers share this one.
    copied = np.array(array[chosen], order="C")
    copied.setflags(write=False)
    return copied


def scaled(x: numpy.ndarray, scale: Scale) -> numpy.ndarray:
    """x (n, ...), float64, scaled as asked and not yet rounded: float64."""
    if scale == "minmax":
        low, high = x.min(axis=0), x.max(axis=0)
        # Halves first: the range of numbers near the ends of float64 would overflow.
        spread = high / 2 - low / 2
        return np.where(spread > 0, (x / 2 - low / 2) / np.where(spread > 0, spread, 1.0), 0.0)
    if scale == "unit":
        largest = float(np.abs(x).max())
        return x / largest if largest > 0 else x
    return x
