"""Datasets: bundled with scikit-learn, drawn by a generator, or a user's own file; split the same way everywhere.

A dataset is named by a plain name from this table, by `generator:<sha-256>` (see `netassay.data.generators`) or by
`data:<sha-256>` (see `netassay.data.files`); the last two are digests of artifacts.

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
Generators and files are not scaled unless they say so: their values may lie outside of [0, 1].

Splits: example i of the set (in scikit-learn's order, or the file's) belongs to `test` where i % 3 == 2, else to
`train`; `all` is both. An index always counts within its split. Sizes, shapes and classes of the bundled sets come from
a table, those of the others from whoever has read them (`register`) or from the artifact, so that a sweep can be
checked by a process that has neither NumPy nor scikit-learn loaded.

Limit: iris and wine are sorted by class, and so may a user's file be; every third example keeps the classes balanced,
but a short range of indices may hold one class only. A file whose rows repeat with period 3 is split badly: shuffle it.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.data.splits import SPLITS, Facts, known, part
from netassay.heavy import np, sklearn_datasets
from netassay.method import InvalidInput
from netassay.store import artifacts

if TYPE_CHECKING:
    import numpy

__all__ = [
    "SPLITS", "Dataset", "Facts", "called", "check_index", "classes", "facts", "is_known", "is_reference", "load",
    "memory", "names", "register", "shape", "size",
]  # fmt: skip

_TABLE = {
    "breast_cancer": Facts(569, (30,), 2),
    "digits": Facts(1797, (1, 8, 8), 10),
    "iris": Facts(150, (4,), 3),
    "wine": Facts(178, (13,), 3),
}
#: Of references, whose digest fixes them: facts, and the user's names for messages.
_registered: dict[str, Facts] = {}
_called: dict[str, str] = {}
#: Datasets of artifacts kept in memory, each up to 2 GiB: the jobs of a chunk share one, a training takes two splits.
_KEPT = 2


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split of a dataset. Both arrays are read-only.

    x: (n, *shape), float64 holding float32 numbers, of the bundled sets in [0, 1]. y: (n,), int64 labels 0..classes-1.
    """

    name: str
    split: str
    x: numpy.ndarray
    y: numpy.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.y)


def names() -> list[str]:
    """Names of all bundled datasets, sorted."""
    return sorted(_TABLE)


def is_reference(name: str) -> bool:
    """Whether it is text of the form of a reference to a generator or a file; what follows the colon is not checked."""
    return name.startswith(("data:", "generator:"))


def register(reference: str, facts: Facts, name: str = "") -> None:
    """Make facts of a reference known to this process, so that no artifact is read for them. name: for messages."""
    _registered[reference] = facts
    if name:
        _called[reference] = name


def is_known(name: str) -> bool:
    """Whether the facts of a dataset are known to this process without reading an artifact."""
    return name in _TABLE or name in _registered


def called(name: str) -> str:
    """A dataset's name for messages: that of the user's file where this process knows it, never a whole digest."""
    kind, colon, digest = name.partition(":")
    return _called.get(name, f"{kind}:{digest[:8]}" if colon else name)


def facts(name: str) -> Facts:
    """Size, shape and classes of a dataset; of a reference nobody registered, read from the artifact.

    Raises InvalidInput for an unknown dataset, MissingArtifact.
    """
    found = _TABLE.get(name) or _registered.get(name)
    if found is not None:
        return found
    if not is_reference(name):
        raise InvalidInput(f"there is no dataset {name!r}", what_to_try=f"one of {', '.join(names())}")
    content = artifacts.current().read(name)
    found = facts_of(name, content)
    register(name, found)
    return found


def facts_of(reference: str, content: bytes) -> Facts:
    """Size, shape and classes that an artifact's bytes hold. Raises InvalidInput where they are no such dataset."""
    from netassay.data import files, generators

    if reference.startswith("data:"):
        return files.facts(content)
    try:
        return generators.parse(json.loads(content)).facts()
    except (ValueError, AttributeError, RecursionError) as error:  # no JSON, no mapping, nested without end
        raise InvalidInput(
            f"{called(reference)} cannot be read",
            f"{error!s:.1000}",
            "submit the generator again, to a worker of this version",
        ) from None


def size(name: str, split: str = "all") -> int:
    """Number of examples in a split. Raises InvalidInput for an unknown dataset or split, MissingArtifact."""
    return facts(name).of(split)


def shape(name: str) -> tuple[int, ...]:
    """Shape of one example. Raises as `facts`."""
    return facts(name).shape


def classes(name: str) -> int:
    """Number of classes. Raises as `facts`."""
    return facts(name).classes


def memory(name: str) -> int:
    """Bytes that loading a split takes beyond what comes with the libraries; 0 where the facts are not known.

    32 for each number; measured at the peak: up to 24 (draws or artifact, float32 and float64, a copy of the split).
    """
    about = _registered.get(name)
    return 0 if about is None else 32 * about.size * math.prod(about.shape)


def check_index(name: str, split: str, index: int) -> int:
    """The index, if the split has such an example.

    Raises ValueError with the range that is allowed, or saying which datasets and splits there are: for validators,
    which should ask `is_known` first, since of a reference nobody registered the artifact is read (MissingArtifact).
    """
    try:
        n = size(name, split)
    except InvalidInput as error:
        raise ValueError(str(error)) from None
    if not 0 <= index < n:
        raise ValueError(f"index {index} is outside {called(name)} ({split}), which has {n} examples: 0..{n - 1}")
    return index


def load(name: str, split: str = "all") -> Dataset:
    """A split of a dataset; bundled ones are kept in memory for the life of the process, some of the others too.

    Raises InvalidInput where there is none, MissingArtifact.
    """
    known(split)
    if is_reference(name):
        return _load_artifact(name, split)
    facts(name)
    return _load_bundled(name, split)


@functools.cache
def _load_bundled(name: str, split: str) -> Dataset:
    raw = getattr(sklearn_datasets, f"load_{name}")()
    x = np.asarray(raw.data, dtype=np.float64)
    if name == "digits":
        x = x / 16.0
    else:
        low, high = x.min(axis=0), x.max(axis=0)
        x = (x - low) / (high - low)
    x = x.astype(np.float32).astype(np.float64).reshape(len(x), *_TABLE[name].shape)
    y = np.asarray(raw.target, dtype=np.int64)
    return Dataset(name, split, part(x, split), part(y, split), _TABLE[name].classes)


@functools.lru_cache(maxsize=_KEPT)
def _load_artifact(reference: str, split: str) -> Dataset:
    # The digest alone names the dataset, whichever folder it came from.
    from netassay.data import files, generators

    content = artifacts.current().read(reference)
    about = facts_of(reference, content)
    register(reference, about)
    if reference.startswith("data:"):
        table = files.load(content)
        x, y = table.x, table.y
    else:
        x, y = generators.draw(generators.parse(json.loads(content)))
    return Dataset(reference, split, part(x, split), part(y, split), about.classes)
