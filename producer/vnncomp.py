"""Results as the competition of verifiers (VNN-COMP) keeps them: a line an instance, and the counterexamples.

    FOLDER/results.csv        category,network,property,seconds of preparation,result,seconds
    FOLDER/CATEGORY/NETWORK_PROPERTY.counterexample.gz

result: sat, unsat, unknown, timeout or error. Preparation is no step of its own here: 0. A counterexample is one list
of pairs, ((X_0 0.5) (X_1 ...) ... (Y_0 ...)), a pair a line; its numbers are the float32 ones, written so that they
read back as they were.

Reference: Bak, Liu, Johnson. The second international verification of neural networks competition (VNN-COMP 2021):
summary and results. 2021. (The format is that of the competition's scripts since 2022.)
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from netassay.errors import UserError
from netassay.job import Record
from netassay.store import reading
from netassay.store.database import Database
from netassay.store.reading import Query
from netassay.store.transfer import beside

#: What a job that did not end with a verdict counts as. Time is the only cause that is no fault of the tool.
_CAUSES = {"time": "timeout"}
_VERDICTS = ("sat", "unsat", "unknown")
#: Bytes of a file's name that file systems take, less the ending and what tells two of one name apart.
_LONGEST = 200


def write(
    database: Database, query: Query, folder: Path, category: str, progress: Callable[[int], None] = lambda done: None
) -> Counter[str]:
    """Write all of these jobs that have ended. Returns how often each result stands there, and `open` for jobs without
    an end, which are left out. Counterexamples of an earlier writing that are none any more are removed.

    Raises UserError where none of them asks a property of a network, and where two ask the same, as one line can hold
    one answer only.
    """
    counts = _counted(database, query)
    place = folder / _word(category)
    place.mkdir(parents=True, exist_ok=True)
    kept: set[Path] = set()
    with beside(folder / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        for done, record in enumerate(reading.find(database, query), 1):
            result = _result(record) if _asks(record) else "open"
            if result != "open":
                lines.writerow([category, *_names(record), 0, result, f"{record.seconds:.6f}"])
            if result == "sat":
                _keep(record, place, kept)
            progress(done)
    for path in place.glob("*.counterexample.gz"):
        if path not in kept:
            path.unlink()
    return counts


def _counted(database: Database, query: Query) -> Counter[str]:
    """How often each result occurs. Raises UserError as `write` does, before anything is written."""
    counts: Counter[str] = Counter()
    asked: set[tuple[str, ...]] = set()
    for record in filter(_asks, reading.find(database, query)):
        counts[_result(record)] += 1
        names = _names(record)
        if names in asked:
            raise UserError(
                f"{names[1]} is asked of {names[0]} more than once, with other parameters or in another batch, and "
                "results of the competition have one line for it; name one batch in which each instance stands once"
            )
        asked.add(names)
    if not counts:
        raise UserError(
            "none of these jobs asks a property of a network, so there is nothing to write; name a batch of jobs that "
            "have both, as an instances.csv makes them"
        )
    return counts


def _asks(record: Record) -> bool:
    return {"network", "property"} <= set(record.params)


def _names(record: Record) -> tuple[str, str]:
    """The files, as the user named them."""
    return record.name("network"), record.name("property")


def _result(record: Record) -> str:
    if record.result is not None:
        verdict = record.result.get("verdict")
        return verdict if verdict in _VERDICTS else "unknown"
    if record.state == "not_applicable":
        return "unknown"
    return _CAUSES.get(record.cause, "error") if record.state == "failed" else "open"


def _keep(record: Record, folder: Path, kept: set[Path]) -> None:
    name = _word("_".join(re.sub(r"(\.onnx|\.vnnlib)?(\.gz)?$", "", PurePosixPath(one).name) for one in _names(record)))
    path = folder / f"{name}.counterexample.gz"
    if path in kept:  # files of one name from different folders
        path = folder / f"{name}_{record.key[:12]}.counterexample.gz"
    kept.add(path)
    values = [
        f"({letter}_{place} {float(value)!r})"
        for letter, array in (("X", record.array("counterexample")), ("Y", record.array("output")))
        for place, value in enumerate(array.ravel())
    ]
    with beside(path) as temporary:
        # No time of writing in it: the same result is the same file.
        temporary.write_bytes(gzip.compress(("(" + "\n".join(values) + ")").encode(), mtime=0))


def _word(text: str) -> str:
    """Fit for the name of a file: whatever a user calls a network, nothing is written outside the folder."""
    word = re.sub(r"[^\w.+-]", "_", text).lstrip(".").encode()[:_LONGEST].decode(errors="ignore")
    return word or "_"
