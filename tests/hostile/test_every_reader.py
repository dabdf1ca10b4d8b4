"""Every reader of files under mutated input, for some seconds each; `python -m tests.hostile` does it for longer.

Each runs in a process of its own, so one that dies is a failure like any other. What must hold: an input is accepted,
or refused by an error that is for people; nothing outside is touched, nothing runs, memory and time are bounded.
"""

from __future__ import annotations

import gzip
import io
import random as randomness
from pathlib import Path

import pytest

from hostile import mutations, runs, targets

#: Inputs each; a busy machine reads fewer.
INPUTS, SECONDS = 150, 3.0


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_a_reader_accepts_or_refuses_and_does_nothing_else(name: str, tmp_path: Path) -> None:
    found = runs.run(name, tmp_path, SECONDS, seed=0, most=INPUTS)
    assert found.told() == ""
    assert found.report.inputs >= 5


@pytest.mark.parametrize("name", ["sweep-yaml", "dataset-npz", "network", "property", "export"])
def test_mutations_are_the_same_for_the_same_number(name: str) -> None:
    make = targets.TARGETS[name].make
    if name == "export":  # its valid input holds the times at which it was made
        targets._export()
    assert [len(make(randomness.Random(f"{i}"))) for i in range(5)] == [
        len(make(randomness.Random(f"{i}"))) for i in range(5)
    ]


def test_the_watch_sees_what_python_and_what_c_touch(tmp_path: Path) -> None:
    # In a process of its own: an audit hook stays for good.
    script = f"""
import os, pathlib, sys
from hostile import watch
inside, outside = pathlib.Path({str(tmp_path)!r}) / "in", pathlib.Path({str(tmp_path)!r}) / "out"
inside.mkdir(); outside.mkdir(); (outside / "secret").write_text("x"); (inside / "link").symlink_to(outside / "secret")
seen = watch.Watch(inside, outside, names_files=False)
def touches(act):
    seen.begin()
    act()
    return bool(seen.end())
assert not touches(lambda: (inside / "a").write_text("x"))
assert touches(lambda: (inside / "link").read_text())
assert touches(lambda: open("/etc/hostname").close())
assert touches(lambda: (inside.parent / "b").write_text("x"))
assert touches(lambda: os.system("true"))
assert touches(lambda: os.rename(inside / "a", outside / "a"))
import numpy
numpy.array([1.0]).tofile(inside / "data")
import pyarrow
assert touches(lambda: pyarrow.OSFile(str(outside / "secret")).read())  # opened in C: Python's hook is not asked
memory = watch.Memory()
memory.begin()
held = b"x" * (64 << 20)
del held
assert memory.grown() > 60 << 20
"""
    import os
    import subprocess
    import sys

    paths = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths},
                           capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_what_is_valid_is_accepted(tmp_path: Path) -> None:
    """Else the mutations would never get past the first line of a reader."""
    inside, _ = targets.surroundings(tmp_path)
    valid: dict[str, list[bytes]] = {
        "sweep-json": [targets._dumped(sweep).encode() for sweep in targets.SWEEPS],
        "rows-jsonl": ["\n".join(map(targets._dumped, targets.ROWS)).encode()],
        "rows-csv": [table.encode() for place, table in enumerate(targets._TABLES) if place != 3],
        "instances": [targets._TABLES[3].encode()],
        "dataset-csv": [table.encode() for table in targets._DATASETS],
        "network": [network.SerializeToString() for network in targets.networks()],
        "property": [text.encode() for text in targets._PROPERTIES],
        "property-2": [text.encode() for text in targets._PROPERTIES_2],
    }
    for name in valid.keys() & targets.TARGETS.keys():
        target, inputs = targets.TARGETS[name], valid[name]
        for data in inputs:
            file = inside / f"input{target.suffix}"
            file.write_bytes(data)
            target.read(file)


def test_a_bomb_is_small_and_unpacks_to_much() -> None:
    assert len(mutations.BOMB) < 100_000
    with gzip.GzipFile(fileobj=io.BytesIO(mutations.BOMB)) as stream:
        assert len(stream.read()) == 64 << 20
