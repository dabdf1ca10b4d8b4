"""A category of the competition from its instances.csv to its results: submitted, computed, and written as it keeps
them."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnxruntime
from labs import Lab, a_lab
from sqlalchemy import text

from netassay.errors import UserError
from netassay.job import Record
from netassay.networks import onnx_file
from netassay.networks.graph import Dense, Graph, Relu
from netassay.store.reading import Query
from producer import lab as embedded_lab
from producer import vnncomp

#: |x| on [-1, 1]: what is unsafe, and what has to come out.
PROPERTIES = {
    "prop_0.5": ("(>= Y_0 0.5)", "sat"),
    "prop_0.7": ("(>= Y_0 0.7)", "sat"),
    "prop_2": ("(>= Y_0 1.5)", "unsat"),
    "prop_3": ("(<= Y_0 -0.1)", "unsat"),
}


@pytest.fixture(scope="module")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    one, two = np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]])
    graph = Graph(
        (
            Dense("a", "x", "z", (2,), one, np.zeros(2)),
            Relu("r", "z", "h", (2,)),
            Dense("b", "h", "y", (1,), two, np.zeros(1)),
        ),
        "x", "y", (1,), (1,),
    )  # fmt: skip
    (folder / "onnx").mkdir()
    (folder / "onnx" / "absolute.onnx").write_bytes(onnx_file.write(graph, "absolute"))
    (folder / "vnnlib").mkdir()
    for number, (name, (unsafe, _)) in enumerate(PROPERTIES.items()):
        text = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 -1))(assert (<= X_0 1))"
        packed = number % 2 == 1
        path = folder / "vnnlib" / f"{name}.vnnlib{'.gz' if packed else ''}"
        data = f"{text}(assert {unsafe})".encode()
        path.write_bytes(gzip.compress(data) if packed else data)
    lines = [f"onnx/absolute.onnx,vnnlib/{name}.vnnlib,{30 + place}\n" for place, name in enumerate(PROPERTIES)]
    (folder / "instances.csv").write_text("".join(lines))
    return folder


def cli(lab: Lab, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", *words],
        env={**os.environ, **embedded_lab.environment_of(lab.config)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with a_lab("embedded") as found:
        yield found


def test_a_category_becomes_the_competitions_results(lab: Lab, category: Path, tmp_path: Path) -> None:
    cli(lab, "submit", str(category / "instances.csv"), "--name", "absolute")
    cli(lab, "wait", "absolute")
    said = cli(lab, "results", "absolute", "--vnncomp", str(tmp_path / "out")).stdout
    assert "4 instances" in said
    assert "2 sat" in said
    with open(tmp_path / "out" / "results.csv", newline="") as stream:
        lines = list(csv.reader(stream))
    assert [len(line) for line in lines] == [6] * 4
    assert {line[0] for line in lines} == {"absolute"}
    found = {Path(line[2]).name.partition(".vnnlib")[0]: line[4] for line in lines}
    assert found == {name: expected for name, (_, expected) in PROPERTIES.items()}
    assert all(float(line[5]) > 0 for line in lines)
    session = onnxruntime.InferenceSession(category / "onnx" / "absolute.onnx")
    files = sorted((tmp_path / "out" / "absolute").iterdir())
    assert [file.name for file in files] == [
        "absolute_prop_0.5.counterexample.gz",
        "absolute_prop_0.7.counterexample.gz",
    ]
    for file, threshold in zip(files, (0.5, 0.7), strict=True):
        text = gzip.decompress(file.read_bytes()).decode()
        assert (text[:2], text[-2:]) == ("((", "))"), "the competition's own reader asks for that"
        pairs = dict(re.findall(r"\((\w+) ([-\d.e]+)\)", text))
        x = np.array([[float(pairs["X_0"])]], dtype=np.float32)
        assert float(x[0, 0]) == float(pairs["X_0"]), "a float32, written so that it reads back"
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        assert float(y.ravel()[0]) == float(pairs["Y_0"])
        assert float(pairs["Y_0"]) >= threshold
    # The same again is the same, byte for byte, and what is no counterexample any more is gone.
    before = {file: file.read_bytes() for file in files}
    (tmp_path / "out" / "absolute" / "old_prop.counterexample.gz").write_bytes(b"")
    cli(lab, "results", "absolute", "--vnncomp", str(tmp_path / "out"))
    assert {file: file.read_bytes() for file in (tmp_path / "out" / "absolute").iterdir()} == before


def test_each_instance_has_the_time_that_its_line_gives_it(lab: Lab, tmp_path: Path) -> None:
    """A folder as the competition packs it: everything in gzip, and one instance that takes longer than it may."""
    numbers = np.random.default_rng(0)
    widths = [8, 50, 50, 50, 50, 1]
    nodes: list[Dense | Relu] = []
    for place, (n, m) in enumerate(itertools.pairwise(widths)):
        weight = numbers.normal(size=(m, n)) * np.sqrt(2 / n)
        nodes.append(Dense(f"d{place}", "x" if not place else f"h{place}", f"z{place}", (m,), weight, np.zeros(m)))
        if m > 1:
            nodes.append(Relu(f"r{place}", f"z{place}", f"h{place + 1}", (m,)))
    graph = Graph(tuple(nodes), "x", f"z{len(widths) - 2}", (8,), (1,))
    (tmp_path / "hard.onnx.gz").write_bytes(gzip.compress(onnx_file.write(graph, "hard")))
    box = "".join(f"(declare-const X_{i} Real)(assert (>= X_{i} -1))(assert (<= X_{i} 1))" for i in range(8))
    session = onnxruntime.InferenceSession(onnx_file.write(graph, "hard"))
    points = numbers.uniform(-1, 1, size=(10_000, 8)).astype(np.float32)
    most = max(float(session.run(None, {session.get_inputs()[0].name: point[None]})[0].max()) for point in points)
    for name, above in (("near", 2.0), ("far", 1e6)):  # beyond what is reached, and far beyond what bounds allow
        asked = f"{box}(declare-const Y_0 Real)(assert (>= Y_0 {above * most:.6f}))"
        (tmp_path / f"{name}.vnnlib.gz").write_bytes(gzip.compress(asked.encode()))
    (tmp_path / "instances.csv").write_text("hard.onnx,near.vnnlib,0.5\nhard.onnx,far.vnnlib,47.5\n")
    cli(lab, "submit", str(tmp_path), "--name", "limited")
    cli(lab, "wait", "limited", code=1)
    with lab.database.engine.connect() as connection:
        limits = connection.execute(
            text("SELECT start, time_limit FROM segment WHERE batch_id = (SELECT id FROM batch WHERE name = 'limited')")
        ).all()
    assert sorted(limits) == [(0, 0.5), (1, 47.5)]
    said = cli(lab, "results", "limited", "--vnncomp", str(tmp_path / "out")).stdout
    assert "1 timeout" in said
    with open(tmp_path / "out" / "results.csv", newline="") as stream:
        found = {Path(line[2]).name.partition(".")[0]: line[4] for line in csv.reader(stream)}
    assert found == {"near": "timeout", "far": "unsat"}


def test_a_batch_is_drawn_beside_other_tools(lab: Lab, category: Path, tmp_path: Path) -> None:
    cli(lab, "submit", str(category), "--name", "absolute")
    cli(lab, "wait", "absolute")
    lines = [
        f"absolute.onnx,{name}.vnnlib,{said}:{place}.5\n" for place, (name, (_, said)) in enumerate(PROPERTIES.items())
    ]
    (tmp_path / "times.csv").write_text("onnx,vnnlib,some tool\n" + "".join(lines))
    cli(lab, "plot", "absolute", "--beside", str(tmp_path / "times.csv"), "--out", str(tmp_path / "figure.svg"))
    assert "some tool" in (tmp_path / "figure.svg").read_text()
    (tmp_path / "times.csv").write_text("onnx,vnnlib,some tool\nf.onnx,p.vnnlib,unsat:x\nf.onnx,q.vnnlib,1\n")
    said = cli(lab, "plot", "absolute", "--beside", str(tmp_path / "times.csv"), code=2).stderr
    assert "line 2, column 'some tool'" in said


def test_what_is_no_question_is_refused_and_options_that_contradict_too(lab: Lab, tmp_path: Path) -> None:
    lab.submit("echo", lab.entry("diagnostics.echo", {"tag": 1}, grid={"value": {"range": [0, 3]}}))
    lab.wait("echo")
    with pytest.raises(UserError, match="none of these jobs asks a property"):
        vnncomp.write(lab.database, Query(batch="echo"), tmp_path / "none", "echo")
    assert not (tmp_path / "none").exists()
    assert "leave out" in cli(lab, "results", "echo", "--vnncomp", str(tmp_path), "--by", "state", code=2).stderr
    assert "give one of" in cli(lab, "results", "echo", "--vnncomp", str(tmp_path), "--csv", code=2).stderr


def record(state: str, cause: str = "", result: dict | None = None) -> Record:
    return Record(1, "00", "verification.verify", 1, {"network": "a", "property": "b"}, state, result, cause)


def test_every_end_of_a_job_has_its_word() -> None:
    ends = {
        "unsat": record("done", result={"verdict": "unsat"}),
        "timeout": record("failed", "time"),
        "error": record("failed", "crash"),
        "unknown": record("not_applicable"),
        "open": record("pending"),
    }
    assert {vnncomp._result(one): one for one in ends.values()} == ends


def test_an_instance_that_stands_twice_is_refused_by_name(lab: Lab, category: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "twice.yaml"
    files = f"network: {category}/onnx/absolute.onnx, property: {category}/vnnlib/prop_2.vnnlib"
    sweep.write_text(f"jobs: {{method: verification.verify, params: {{{files}}}, grid: {{seed: [1, 2]}}}}")
    cli(lab, "submit", str(sweep), "--name", "twice")
    cli(lab, "wait", "twice")
    said = cli(lab, "results", "twice", "--vnncomp", str(tmp_path / "out"), code=2).stderr
    assert "prop_2.vnnlib" in said
    assert "more than once" in said
    assert not (tmp_path / "out").exists()


def test_names_of_files_stay_within_their_folder() -> None:
    assert vnncomp._word("../../etc/passwd") == "_.._etc_passwd"
    assert "/" not in vnncomp._word("a/b\\c:d")
    assert vnncomp._word("...") == "_"
    assert len(vnncomp._word("\u0416" * 300).encode()) <= 200
