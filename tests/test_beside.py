"""Times of other tools are read from a CSV file, or refused with line and column, and drawn beside a batch's own."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from netassay import beside, catalogue
from netassay.beside import Times
from netassay.errors import UserError
from netassay.job import Record
from producer import drawing

TABLE = """onnx,vnnlib,timeout,verdict,basis,first,second,seconds of a third,empty
f.onnx,prop_1.vnnlib,116,unsat,unanimous,unsat:9.5,timeout:116.2,1e-1,
f.onnx,prop_2.vnnlib,116,sat,checked witness,sat:0.5,sat:2,,
g.onnx,prop_1.vnnlib,116,unknown,,unknown,error,timeout,
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Times]:
    def of(text: str) -> Times:
        (tmp_path / "times.csv").write_text(text, encoding="utf-8")
        return beside.read(tmp_path / "times.csv")

    return of


def test_a_tool_is_a_column_with_times_and_decides_what_it_says_sat_or_unsat_of(read: Callable[[str], Times]) -> None:
    found = read(TABLE)
    one, two, three = ("f.onnx", "prop_1.vnnlib"), ("f.onnx", "prop_2.vnnlib"), ("g.onnx", "prop_1.vnnlib")
    assert found.instances == {one, two, three}
    assert found.tools == {"first": {one: 9.5, two: 0.5}, "second": {two: 2.0}, "seconds of a third": {one: 0.1}}


def test_instances_are_told_by_names_of_files_whatever_their_folders(tmp_path: Path) -> None:
    text = "property,NETWORK,tool\nvnnlib/p.vnnlib.gz,./onnx/f.onnx.gz,unsat:1\n"
    (tmp_path / "times.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()))
    assert beside.read(tmp_path / "times.csv.gz").tools == {"tool": {("f.onnx", "p.vnnlib"): 1.0}}
    assert beside.instance("C:\\nets\\f.onnx", "p.vnnlib") == ("f.onnx", "p.vnnlib")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("sat:2,", "sat:2s,", r"line 3, column 'second': 'sat:2s' is no time of a tool; it must be verdict:seconds"),
        ("sat:0.5", "sat", "line 3, column 'first': 'sat' is no time of a tool; it must be verdict:seconds"),
        ("sat:0.5", "sat:-1", "line 3, column 'first': 'sat:-1' is no time of a tool; seconds are finite"),
        ("sat:0.5", "sat:nan", "line 3, column 'first': 'sat:nan' .* seconds are finite"),
        ("sat:0.5", "sat:1e999999999", "line 3, column 'first': .* seconds are finite"),
        ("sat:0.5", "holds:1", "line 3, column 'first': .* 'holds' is no verdict"),
        ("sat:0.5,sat:2", "sat:0.5", "line 3: it has 8 cells, the header has 9"),
        ("f.onnx,prop_2", "f.onnx,prop_1", r"line 3: f\.onnx and prop_1\.vnnlib stand in line 2 too"),
        ("f.onnx,prop_2.vnnlib", "f.onnx,", "line 3, column 'vnnlib': it is empty"),
        ("onnx,vnnlib", "file,vnnlib", "line 1: no columns are called onnx or network"),
        ("timeout,verdict", "network,verdict", "line 1: 2 columns are called onnx or network"),
        ("second,", "first,", "line 1: column 7 is given twice: 'first'"),
        ("second,", ",", "line 1: column 7 has no name"),
        ("unanimous", '"unanimous', "line 4: this is no CSV"),
    ],
)
def test_a_bad_table_is_refused_with_line_and_column(
    read: Callable[[str], Times], old: str, new: str, expected: str
) -> None:
    assert TABLE.count(old) >= 1
    with pytest.raises(UserError, match=expected):
        read(TABLE.replace(old, new, 1))


def test_what_is_no_table_of_times_is_refused(read: Callable[[str], Times], tmp_path: Path) -> None:
    for text, expected in (
        ("", "is empty"),
        ("onnx,vnnlib,timeout\nf,p,116\n", "no column of times: in none of onnx, vnnlib, timeout"),
        ("onnx,vnnlib," + ",".join(f"t{i}" for i in range(14)) + "\nf,p" + ",1" * 14 + "\n", "14 columns of times"),
    ):
        with pytest.raises(UserError, match=expected):
            read(text)
    (tmp_path / "large.csv").touch()
    with open(tmp_path / "large.csv", "wb") as stream:
        stream.truncate(10**9)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n")
    for name, expected in (
        ("large.csv", "more than 32 MiB"),
        ("picture.csv", "not UTF-8"),
        ("none.csv", "No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(UserError, match=expected):
            beside.read(tmp_path / name)


def record(number: int, network: str, wanted: str, verdict: str, seconds: float) -> Record:
    return Record(
        id=number, key=f"{number:032x}", method="verification.verify", version=1,
        params={"network": f"onnx:{number}", "property": f"vnnlib:{number}"},
        state="failed" if verdict == "failed" else "done", seconds=seconds,
        result=None if verdict == "failed" else {"verdict": verdict, "margin": -1.0, "violation": 0.5},
        names={f"onnx:{number}": network, f"vnnlib:{number}": wanted},
    )  # fmt: skip


RECORDS = [
    record(1, "onnx/f.onnx", "vnnlib/prop_1.vnnlib.gz", "unsat", 0.0),
    record(2, "onnx/f.onnx", "vnnlib/prop_2.vnnlib", "unknown", 60.0),
    record(3, "onnx/h.onnx", "vnnlib/prop_1.vnnlib", "sat", 0.25),
    record(4, "onnx/g.onnx", "vnnlib/prop_1.vnnlib", "failed", 90.0),
]


def test_each_tool_is_a_line_over_the_instances_that_both_have(read: Callable[[str], Times], tmp_path: Path) -> None:
    draw = catalogue.get("verification.verify").drawn(read(TABLE))
    assert draw is not None
    figure = draw(RECORDS)
    (panel,) = (one for one in figure.panels if one.title.startswith("Decided"))
    # h.onnx is not in the table, and of what is in both the batch decided one; times begin at a millisecond.
    assert {mark.label: (mark.x, mark.y) for mark in panel.marks} == {
        "this batch": ([0.001], [1]),
        "first": ([0.5, 9.5], [1, 2]),
        "second": ([2.0], [1]),
        "seconds of a third": ([0.1], [1]),
    }
    assert "the 3 instances that times.csv has too" in figure.caption
    assert figure.caption.startswith("2 of 4 instances decided.")
    # The other panels are those of the usual figure.
    plain = catalogue.get("verification.verify").drawn()
    assert plain is not None
    assert [one for one in figure.panels if one is not panel] == [
        one for one in plain(RECORDS).panels if one.title != "Decided"
    ]
    drawing.draw(figure, tmp_path / "figure.svg")
    assert "seconds of a third" in (tmp_path / "figure.svg").read_text()


def test_tools_and_batches_without_an_instance_in_common_are_refused(read: Callable[[str], Times]) -> None:
    times = read(TABLE)
    draw = catalogue.get("verification.verify").drawn(times)
    assert draw is not None
    with pytest.raises(UserError, match=r"has none of these instances.*h\.onnx with prop_1\.vnnlib here, f\.onnx with"):
        draw(RECORDS[2:3])
    with pytest.raises(UserError, match=r"prop_1\.vnnlib is asked of f\.onnx more than once"):
        draw([*RECORDS, record(5, "f.onnx", "prop_1.vnnlib", "unsat", 1.0)])
    with pytest.raises(UserError, match="none here"):
        draw([])
    assert catalogue.get("diagnostics.echo").drawn(times) is None
    assert catalogue.get("diagnostics.echo").drawn() is not None


def test_a_tool_called_as_ours_keeps_its_line(read: Callable[[str], Times]) -> None:
    panel, _ = beside.cactus(RECORDS, read(TABLE.replace("first", "this batch")), lambda one: one.id == 1)
    assert [mark.label for mark in panel.marks][:2] == ["this batch", "this batch (times.csv)"]


def test_more_lines_than_colours_are_dashed() -> None:
    panel = beside.within({f"tool {place}": [1.0, 2.0] for place in range(9)}, "")
    assert [mark.dashed for mark in panel.marks] == [False] * 7 + [True] * 2
