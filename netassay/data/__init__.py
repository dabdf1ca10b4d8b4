"""Datasets by name: the labelled sets bundled with scikit-learn, split the same way everywhere.

=============  =======  ===========  =======  =====================================================
name           size     shape        classes  scaled to [0, 1] by
=============  =======  ===========  =======  =====================================================
digits         1797     (1, 8, 8)    10       dividing by 16, the largest grey value a pixel can have
iris           150      (4,)         3        min-max of each feature over the whole set
wine           178      (13,)        3        min-max of each feature over the whole set
breast_cancer  569      (30,)        2        min-max of each feature over the whole set
=============  =======  ===========  =======  =====================================================

Every value is a float32 number, rounded once after scaling and kept as float64: what a user can feed to a float32
network is then the very point that an analysis asks about, and a ball of radius 0 around it is not empty in float32.

Splits: example i of the set (in scikit-learn's order) belongs to `test` where i % 3 == 2, else to `train`; `all` is
both. An index always counts within its split. Sizes, shapes and classes come from a table, so that a sweep can be
checked by a process that has neither NumPy nor scikit-learn loaded.

Limit: iris and wine are sorted by class; every third example keeps the classes balanced, but a short range of indices
may hold one class only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import np, sklearn_datasets
from netassay.method import InvalidInput

if TYPE_CHECKING:
    import numpy

SPLITS = ("all", "train", "test")
#: An example is a test example where its number leaves the remainder `_TEST` on division by `_PERIOD`.
_PERIOD, _TEST = 3, 2


@dataclass(frozen=True)
class _Facts:
    size: int
    shape: tuple[int, ...]
    classes: int


_TABLE = {
    "breast_cancer": _Facts(569, (30,), 2),
    "digits": _Facts(1797, (1, 8, 8), 10),
    "iris": _Facts(150, (4,), 3),
    "wine": _Facts(178, (13,), 3),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split of a dataset. Both arrays are read-only.

    x: (n, *shape), float64 holding float32 numbers in [0, 1]. y: (n,), int64 labels 0..classes-1.
    """

    name: str
    split: str
    x: numpy.ndarray
    y: numpy.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.y)


def names() -> list[str]:
    """Names of all datasets, sorted."""
    return sorted(_TABLE)


def size(name: str, split: str = "all") -> int:
    """Number of examples in a split. Raises InvalidInput for an unknown dataset or split."""
    n = _facts(name, split).size
    tests = (n - _TEST + _PERIOD - 1) // _PERIOD
    return {"all": n, "test": tests, "train": n - tests}[split]


def shape(name: str) -> tuple[int, ...]:
    """Shape of one example. Raises InvalidInput for an unknown dataset."""
    return _facts(name).shape


def classes(name: str) -> int:
    """Number of classes. Raises InvalidInput for an unknown dataset."""
    return _facts(name).classes


def check_index(name: str, split: str, index: int) -> int:
    """The index, if the split has such an example.

    Raises ValueError with the range that is allowed, or saying which datasets and splits there are: for validators.
    """
    try:
        n = size(name, split)
    except InvalidInput as error:
        raise ValueError(str(error)) from None
    if not 0 <= index < n:
        raise ValueError(f"index {index} is outside {name} ({split}), which has {n} examples: 0..{n - 1}")
    return index


def load(name: str, split: str = "all") -> Dataset:
    """A split of a dataset, kept in memory for the life of the process. Raises InvalidInput where there is none."""
    _facts(name, split)
    return _load(name, split)


@functools.cache
def _load(name: str, split: str) -> Dataset:
    raw = getattr(sklearn_datasets, f"load_{name}")()
    x = np.asarray(raw.data, dtype=np.float64)
    if name == "digits":
        x = x / 16.0
    else:
        low, high = x.min(axis=0), x.max(axis=0)
        x = (x - low) / (high - low)
    x = x.astype(np.float32).astype(np.float64).reshape(len(x), *_TABLE[name].shape)
    y = np.asarray(raw.target, dtype=np.int64)
    is_test = np.arange(len(y)) % _PERIOD == _TEST
    chosen = {"all": slice(None), "train": ~is_test, "test": is_test}[split]
    # A copy: `scikit-learn` and the other splits keep their own arrays. Read-only: all callers share this one.
    x, y = np.array(x[chosen], order="C"), np.array(y[chosen], order="C")
    x.setflags(write=False)
    y.setflags(write=False)
    return Dataset(name, split, x, y, _TABLE[name].classes)


def _facts(name: str, split: str = "all") -> _Facts:
    if name not in _TABLE:
        raise InvalidInput(f"there is no dataset {name!r}", what_to_try=f"one of {', '.join(names())}")
    if split not in SPLITS:
        raise InvalidInput(f"there is no split {split!r}", what_to_try=f"one of {', '.join(SPLITS)}")
    return _TABLE[name]
