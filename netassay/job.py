"""Jobs, their keys, and records: a job with its outcome.

The key of a job is a 128-bit digest of all that determines its result: method, version, and the canonical JSON of its
validated params (sorted names, floats by repr, -0.0 as 0.0, NaN and infinity refused), in which inputs stand by digest.
Names that users gave to inputs and the versions of libraries are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from netassay.method import Contract, Method

#: Why a job failed. The first two are deterministic: the same params fail again, so the failure is kept and reused.
#: The others run again on a new submission or on `retry`.
CAUSES = ("invalid_input", "numerical", "error", "time", "memory", "crash", "dependency", "unstorable", "store")
DETERMINISTIC = frozenset({"invalid_input", "numerical"})
#: The method whose jobs build the network of a recipe: its params hold the recipe, its result the network.
BUILDER = "networks.train"
#: How a job can end; a job without a record is pending, or running where a chunk holds it.
ENDS = ("done", "not_applicable", "failed")


def canonical(params: Contract) -> str:
    """Canonical JSON of validated params. Raises ValueError naming the field that holds NaN or infinity."""
    values = params.model_dump(mode="json")
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise ValueError(f"{_not_finite(values)} is not a finite number") from None
    # Cheap test first: "-0.0" occurs in the text of nearly no job.
    return canonical_json(values) if "-0.0" in text else text


def canonical_json(values: Any) -> str:
    """The one JSON text of plain values: sorted names, no spaces, floats by repr with -0.0 as 0.0, NaN refused."""
    return json.dumps(
        _positive_zeros(values), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def _positive_zeros(value: Any) -> Any:
    if isinstance(value, float):
        return value + 0.0
    if isinstance(value, dict):
        return {name: _positive_zeros(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_positive_zeros(item) for item in value]
    return value


def _not_finite(value: Any, path: str = "") -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for name, item in items if (found := _not_finite(item, f"{path}.{name}".lstrip(".")))), "")


def key_of(method: str, version: int, params_text: str) -> bytes:
    """The 16-byte key of a job from its canonical params."""
    return hashlib.blake2b(f"{method}\n{version}\n{params_text}".encode(), digest_size=16).digest()


def key(method: Method, params: Contract) -> str:
    """The key of a job, in hexadecimal."""
    return key_of(method.name, method.version, canonical(params)).hex()


@dataclass(frozen=True)
class Record:
    """A job with its outcome, as stored.

    params: canonical params, references by digest. names: reference -> the name the user gave it.
    state: pending, running, done, not_applicable or failed. cause, message: of a failure (message also of
    not_applicable). result: fields of `Result`, arrays as stored (use `array`). seconds: run time; of a vectorised
    group, the job's share. inputs: recipe -> digest of the network it stood for. attempts: children that
    died on this job. batches: names of the batches it was found in.
    """

    id: int
    key: str
    method: str
    version: int
    params: dict[str, Any]
    state: str
    result: dict[str, Any] | None = None
    cause: str = ""
    message: str = ""
    seconds: float = 0.0
    finished: float = 0.0
    attempts: int = 0
    names: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    batches: tuple[str, ...] = ()

    def name(self, parameter: str) -> str:
        """The user's name for the reference in this parameter, else its text: `f.onnx` rather than a hash."""
        value = self.params.get(parameter, "")
        return self.names.get(value, str(value))

    def array(self, name: str) -> Any:
        """An array of the result, as numpy. Raises KeyError where the result has no such field."""
        from netassay.store import storable

        if self.result is None:
            raise KeyError(f"job {self.key} has no result (it is {self.state})")
        return storable.load_array(self.result[name])


@dataclass(slots=True)
class Segment:
    """Consecutive jobs of one method that may run together: same shared references, dataset, `group` answer and limits.

    group: short label, such as the user's name of the network. seconds, memory (bytes): the method's prediction for its
    first job. time_limit (seconds), memory_limit (bytes): as the sweep says, else None. group_size: how many jobs one
    `run_many` call may take. recipes: references of recipes whose networks the jobs need. params: canonical JSON.
    """

    method: str
    version: int
    group: str
    seconds: float
    memory: int | None
    time_limit: float | None
    memory_limit: int | None
    group_size: int
    libraries: tuple[str, ...]
    recipes: tuple[str, ...]
    params: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
