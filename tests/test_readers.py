"""Files in every format become the same jobs, and what is wrong with one is said with its line, all at once."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from netassay.settings import Settings
from netassay.store.artifacts import Artifacts
from netassay.store.database import StoreError
from producer import plain, readers, submission, sweeps
from producer.references import Resolver
from producer.sweeps import BadSweep, Document, Prepared

ECHO, SLEEP, FAIL = "diagnostics.echo", "diagnostics.sleep", "diagnostics.fail"


def prepared(document: Document, skip_invalid: bool = False) -> Prepared:
    resolver = Resolver(document.base, document.networks, Artifacts(Path("none")))
    return sweeps.prepare(document, resolver, skip_invalid)


def params(found: Prepared) -> list[dict[str, Any]]:
    return [json.loads(text) for segment in found.segments for text in segment.params]


def keys(found: Prepared) -> list[bytes]:
    return [key for segment in found.segments for key in segment.keys]


def refused(files: list[Any], method: str = "", stdin: bytes | None = None) -> BadSweep:
    with pytest.raises(BadSweep) as caught:
        prepared(readers.read(files, method, io.BytesIO(stdin) if stdin is not None else None))
    return caught.value


# --- formats --------------------------------------------------------------------------------------------------------


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "semicolons.csv": lambda rows: "\ufeff" + as_csv(rows, ";"),
    "rows.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "rows.ndjson": lambda rows: "\n\n".join(
        json.dumps({"method": SLEEP, "params": row, "limits": {"seconds": 60}}) for row in rows
    ),
    "rows.json": lambda rows: json.dumps(rows, indent=1),
    "one_line.json": json.dumps,
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "rows.yaml": yaml.safe_dump,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_every_format_gives_the_same_jobs_from_a_file_and_from_standard_input(
    tmp_path: Path, name: str, packed: bool
) -> None:
    rows = [{"seconds": place / 8, "tag": place} for place in range(20)]
    data = FORMATS[name](rows).encode()
    data = gzip.compress(data) if packed else data
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(data)
    expected = prepared(sweeps.document({"jobs": [{"method": SLEEP, "params": row} for row in rows]}, base=tmp_path))
    from_file = readers.read([path], SLEEP)
    assert from_file.name == name.partition(".")[0]
    assert sum(entry.rows for entry in from_file.jobs) == 20
    assert keys(prepared(from_file)) == keys(expected)
    from_stdin = readers.read(["-"], SLEEP, io.BytesIO(data))
    assert (from_stdin.name, keys(prepared(from_stdin))) == ("", keys(expected))


def bad_lines(name: str, places: list[int]) -> list[int]:
    """Where rows 10, 500 and 1000 of 1,000 stand in each format."""
    match name:
        case "rows.csv" | "rows.tsv" | "semicolons.csv":
            return [place + 1 for place in places]
        case "rows.ndjson":
            return [2 * place - 1 for place in places]
        case "rows.json":  # a bracket, then four lines each
            return [4 * place - 2 for place in places]
        case "one_line.json":
            return [1] * len(places)
        case "rows.yaml":
            return [2 * place - 1 for place in places]
        case _:
            return places


@pytest.mark.parametrize("name", FORMATS)
def test_three_bad_rows_among_a_thousand_are_told_at_once_with_line_and_field(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"seconds": place / 8, "tag": place} for place in range(1, 1001)]
    rows[9]["seconds"], rows[499]["tag"], rows[999]["seconds"] = -1, 0.5, "soon"
    path = tmp_path / name
    path.write_text(FORMATS[name](rows))
    bad = refused([path], SLEEP)
    assert [(error.row, error.field) for error in bad.errors] == list(
        zip(bad_lines(name, [10, 500, 1000]), ["seconds", "tag", "seconds"], strict=True)
    )
    assert bad.total == 3
    assert f"{path.name}: 3 errors, nothing was submitted" in str(bad)
    for line, message in zip(
        bad_lines(name, [10, 500, 1000]),
        ["seconds is -1, must be at least 0.0", "tag is 0.5, must be a whole", "seconds is 'soon', must be a number"],
        strict=True,
    ):  # fmt: skip
        assert f"line {line:,}: {message}" in str(bad)
    kept = prepared(readers.read([path], SLEEP), skip_invalid=True)
    assert (kept.count, kept.refused, len(kept.errors)) == (997, 3, 3)


def test_the_same_fault_in_many_rows_is_told_five_times_and_then_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("seconds\n" + "-1\n" * 400 + "-2\n")
    bad = refused([tmp_path / "rows.csv"], SLEEP)
    assert [(error.row, error.rows) for error in bad.errors] == [(2, 1), (3, 1), (4, 1), (5, 1), (6, 396), (402, 1)]
    assert bad.total == 401


def test_rows_that_are_no_rows_are_refused_singly(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('value,tag\n1,1\n2\n3,3,3\n"4"x,4\n5,5\n')
    assert [(error.row, error.message) for error in refused([tmp_path / "rows.csv"], ECHO).errors] == [
        (3, "has 1 cell, the header has 2"),
        (4, "has 3 cells, the header has 2"),
        (5, "has text behind a closing quote; a quote within a cell is doubled, and the cell put in quotes"),
    ]
    (tmp_path / "rows.jsonl").write_text(
        '{"value": 1}\n[2]\n{"value": 3\n{"value": NaN}\n{"value": 5, "value": 5}\n6\n'
    )
    told = [(error.row, error.message) for error in refused([tmp_path / "rows.jsonl"], ECHO).errors]
    assert [row for row, _ in told] == [2, 3, 4, 5, 6]
    for (_, message), words in zip(
        told,
        ["is [2], must be an object", "is not JSON: Expecting", "NaN is not a JSON number", "'value' is given twice",
         "is 6, must be an object"],
        strict=True,
    ):  # fmt: skip
        assert words in message
    assert prepared(readers.read([tmp_path / "rows.jsonl"], ECHO), skip_invalid=True).count == 1
    (tmp_path / "rows.json").write_text('[{"value": 1},\n{"value": NaN}, 7,\n{"value": 4, "value": 4}, {"value": 5}]')
    assert [(error.row, error.message[:12]) for error in refused([tmp_path / "rows.json"], ECHO).errors] == [
        (2, "NaN is not a"),
        (2, "is 7, must b"),
        (3, "'value' is g"),
    ]


def test_an_unknown_column_is_told_once_and_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("valu,tag\n" + "1,1\n" * 500)
    (tmp_path / "rows.jsonl").write_text('{"value": 1, "tog": 1}\n' * 500)
    bad = refused([tmp_path / "rows.csv"], ECHO)
    assert [(error.row, error.field, error.rows) for error in bad.errors] == [(0, "valu", 1), (0, "value", 1)]
    assert "valu is not a parameter of diagnostics.echo; nearest: value" in str(bad)
    assert "value is missing; give it as a column" in str(bad)
    bad = refused([tmp_path / "rows.jsonl"], ECHO)
    assert [(error.row, error.field, error.rows) for error in bad.errors] == [(1, "tog", 500)]
    assert "tog is not a parameter of diagnostics.echo; nearest: tag" in str(bad)


def test_duplicated_rows_are_kept_once_and_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("value\n1\n2\n1\n\n2\n3\n")
    found = prepared(readers.read([tmp_path / "rows.csv"], ECHO))
    assert (found.count, found.duplicates) == (3, 2)


@pytest.mark.parametrize("length", [2**16 - 12, 2**16 - 11, 2**16 - 10, 2**17, 10**6])
def test_a_json_list_may_be_cut_anywhere_by_the_blocks_it_is_read_in(length: int) -> None:
    texts = ["a" * length, "é" * length, "\U0001f600" * 40_000, "z"]
    for text in (
        json.dumps([{"value": one} for one in texts], ensure_ascii=False, indent=2),
        json.dumps([{"value": one} for one in texts], ensure_ascii=False),
    ):
        found = params(prepared(readers.read(["-"], ECHO, io.BytesIO(text.encode()))))
        assert [one["value"] for one in found] == texts


def test_lines_are_counted_right_in_a_json_list_of_many_blocks() -> None:
    rows: list[dict[str, Any]] = [{"value": place} for place in range(20_000)]
    rows[19_998] = {"value": None}
    bad = refused(["-"], ECHO, json.dumps(rows, indent=1).encode())
    assert [(error.row, error.field) for error in bad.errors] == [(3 * 19_998 + 2, "value")]


# --- cells ----------------------------------------------------------------------------------------------------------


def test_cells_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    text = "method;seconds;hold_lock;value;message;cause;tag\n"
    text += f"{SLEEP};1e-2;yes;;;;\n{SLEEP};.5;0;;;;7\n{ECHO};;;007;;;\n{ECHO};;;no;;;\n"
    text += f'{ECHO};;;"""7""";;;\n{FAIL};;;;2;error;\n{FAIL};;;;no;error;\n{FAIL};;;;"a;\nb";error;\n'
    (tmp_path / "rows.csv").write_text(text)
    found = params(prepared(readers.read([tmp_path / "rows.csv"])))
    assert [(one["seconds"], one["hold_lock"], one["tag"]) for one in found[:2]] == [(0.01, True, 0), (0.5, False, 7)]
    assert [one["value"] for one in found[2:5]] == [7, "no", "7"]
    assert [one["message"] for one in found[5:]] == ["2", "no", "a;\nb"]


def test_limits_of_rows_are_theirs_and_else_the_entrys(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "value,limits.seconds,limits.memory\n1,5,\n2,,1GB\n3,2.5,500MB\n4,,\n5,5,\n6,-1,\n"
    )
    (tmp_path / "sweep.yaml").write_text(
        f"jobs: {{method: {ECHO}, rows: rows.csv, limits: {{seconds: 9, memory: 1MB}}}}"
    )
    found = prepared(readers.read([tmp_path / "sweep.yaml"]), skip_invalid=True)
    assert [(part.time_limit, part.memory_limit, len(part.keys)) for part in found.segments] == [
        (5.0, 10**6, 2),
        (9.0, 10**9, 1),
        (2.5, 5 * 10**8, 1),
        (9.0, 10**6, 1),
    ]
    assert "rows.csv line 7: limits seconds is -1" in str(found.errors[0])


def test_rows_may_be_nested_and_of_several_methods(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        f'{{"method": "{ECHO}", "params": {{"value": 1}}, "limits": {{"seconds": 5}}}}\n'
        f'{{"method": "{SLEEP}", "seconds": 2, "limits.seconds": 6}}\n'
        '{"value": 3}\n'
        '{"method": "no.such", "value": 3}\n'
    )
    bad = refused([tmp_path / "rows.jsonl"])
    assert [(error.row, error.field) for error in bad.errors] == [(3, "method"), (4, "")]
    assert "line 3: method is missing; give `method` in the row, or --method NAME" in str(bad)
    assert "line 4: no method is called 'no.such'" in str(bad)
    found = prepared(readers.read([tmp_path / "rows.jsonl"], ECHO), skip_invalid=True)
    assert [(part.method, part.time_limit) for part in found.segments] == [(ECHO, 5.0), (SLEEP, 6.0), (ECHO, None)]
    assert found.refused == 1


def test_a_csv_file_without_method_asks_for_one_once(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("value\n1\n2\n")
    assert str(refused([tmp_path / "rows.csv"])).splitlines() == [
        "rows.csv: 1 error, nothing was submitted",
        "  the file: method is missing; give it as --method NAME, or add a column `method`",
    ]


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "message": st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1),
            "tag": st.integers(-9, 9),
        }
    ),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.sampled_from([",", ";", "\t"]))
def test_rows_written_in_any_format_have_the_same_keys(rows: list[dict[str, Any]], delimiter: str) -> None:
    texts = {
        "a.csv": as_csv([{**row, "cause": "error"} for row in rows], delimiter),
        "a.jsonl": "\n".join(json.dumps({**row, "cause": "error"}) for row in rows),
        "a.json": json.dumps([{**row, "cause": "error"} for row in rows], ensure_ascii=False),
        "a.yaml": yaml.safe_dump([{**row, "cause": "error"} for row in rows]),
        "b.yaml": yaml.safe_dump({"jobs": [{"method": FAIL, "params": {**row, "cause": "error"}} for row in rows]}),
    }
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_bytes(text.encode())
            found.add(tuple(keys(prepared(readers.read([Path(folder) / name], FAIL)))))
    assert len(found) == 1


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_survive_every_format(values: list[float]) -> None:
    found = set()
    for write in (as_csv, FORMATS["rows.jsonl"], FORMATS["rows.json"]):
        text = write([{"value": value} for value in values]).encode()
        found.add(tuple(keys(prepared(readers.read(["-"], ECHO, io.BytesIO(text))))))
    assert len(found) == 1


# --- several files --------------------------------------------------------------------------------------------------


def test_files_and_patterns_together_are_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, folder in enumerate(["a", "b", "b/c"]):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"s{place}.yaml").write_text(f"jobs: {{method: {ECHO}, params: {{value: {place}}}}}")
    (tmp_path / "rows.csv").write_text("value\n8\n9\n")
    document = readers.read(
        ["rows.csv", "**/*.yaml", "-"], ECHO, io.BytesIO(b"name: piped\njobs: {params: {value: p}}")
    )
    assert (document.name, document.source, len(document.jobs)) == ("piped", "5 files", 5)
    assert [one["value"] for one in params(prepared(document))] == [8, 9, 0, 2, 1, "p"]  # b/c/ comes before b/s1.yaml
    assert readers.read(["a/*.yaml"]).name == "s0"
    assert readers.read(["a/*.yaml", "rows.csv"], ECHO).name == ""


def test_errors_of_several_files_are_told_together_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("jobs: [\n")
    (tmp_path / "two.yaml").write_text("job: []")
    bad = str(refused(["one.yaml", "two.yaml"]))
    assert "2 files: 3 errors" in bad
    assert "one.yaml: line 2, column 1: " in bad
    assert "two.yaml: the document: `job` is not known here; nearest: jobs" in bad
    (tmp_path / "one.yaml").write_text(f"jobs: {{method: {ECHO}, grid: {{value: [.nan]}}}}")
    (tmp_path / "two.csv").write_text("value,tag\n1,x\n")
    bad = str(refused(["one.yaml", "two.csv"], ECHO))
    assert "one.yaml, entry 1 (diagnostics.echo), row 1 (value=nan): value is nan, must be a finite number" in bad
    assert "two.csv, line 2: tag is 'x', must be a whole number" in bad


def test_paths_and_names_belong_to_the_file_they_stand_in(tmp_path: Path) -> None:
    # Both folders have a nets/f.onnx and call it `mine`; what each file means is in its own folder.
    for folder in ("a", "b"):
        (tmp_path / folder / "nets").mkdir(parents=True)
        (tmp_path / folder / "nets" / "f.onnx").write_bytes(folder.encode())
        (tmp_path / folder / "sweep.yaml").write_text(
            "networks: {mine: nets/f.onnx}\n"
            "jobs: {method: networks.describe, grid: {network: [mine, nets/f.onnx, gone.onnx]}}"
        )
    document = readers.read([tmp_path / "a" / "sweep.yaml", tmp_path / "b" / "sweep.yaml"])
    assert [entry.base for entry in document.jobs] == [tmp_path / "a", tmp_path / "b"]
    resolver = Resolver(document.base, document.networks, Artifacts(tmp_path / "artifacts"))
    asked: list[Path] = []
    resolver._file = lambda value, wanted, name: asked.append(resolver._path(value)) or f"onnx:{len(asked):064d}"  # type: ignore[func-returns-value, method-assign]
    assert sweeps.prepare(document, resolver).count == 6
    assert asked == [
        tmp_path / folder / name for folder in "ab" for name in ("nets/f.onnx", "nets/f.onnx", "gone.onnx")
    ]


def test_an_empty_name_is_no_folder() -> None:
    """As a path it would be the working folder."""
    for what in ("", ["a.yaml", ""]):
        with pytest.raises(submission.CannotSubmit, match="the name of a file is empty; give a path"):
            submission.document(what)


def test_nothing_is_kept_of_a_batch_that_cannot_be(tmp_path: Path) -> None:
    config = Settings(home=tmp_path / "lab")
    rows = [{"value": 1}]
    for wrong in ({"name": "a\nb"}, {"name": "a", "weight": 0.0}, {"name": "a", "note": "\0"}):
        with pytest.raises(StoreError):
            submission.submit(rows, config, method=ECHO, **wrong)
    (tmp_path / "-x.yaml").write_text(f"jobs: {{method: {ECHO}, params: {{value: 1}}}}")
    with pytest.raises(StoreError, match="a batch cannot be called '-x': the name begins with a dash"):
        submission.submit(str(tmp_path / "-x.yaml"), config)
    assert submission.submit(str(tmp_path / "-x.yaml"), config, "x")[1].new == 1  # nothing of it was there


def test_true_and_false_are_no_numbers_in_any_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"seconds": true}\n{"seconds": 1}\n')
    (tmp_path / "b.csv").write_text("seconds\ntrue\n1\n")
    assert "line 1: seconds is true, must be a number" in str(refused([tmp_path / "a.jsonl"], SLEEP))
    assert "line 2: seconds is 'true', must be a number" in str(refused([tmp_path / "b.csv"], SLEEP))
    for row in ({"seconds": True}, {"seconds": np.True_}, {"seconds": np.array([False])[0]}):
        with pytest.raises(BadSweep, match=r"seconds is (true|false), must be a number"):
            prepared(submission.document([row], SLEEP))


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["value\n1\n2\n"])
    writer.start()
    assert prepared(readers.read([tmp_path / "pipe"], ECHO)).count == 2
    writer.join()


def test_a_recipe_in_many_rows_is_read_once_and_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netassay.networks.recipes import Recipe

    parsed: list[Any] = []
    parse = Recipe.parse
    monkeypatch.setattr(Recipe, "parse", lambda mapping, **more: parsed.append(mapping) or parse(mapping, **more))
    rows = [{"network": {"dataset": "digits", "epochs": 1}, "spectra": bool(place % 2)} for place in range(100)]
    for name in ("rows.jsonl", "rows.csv"):
        parsed.clear()
        (tmp_path / name).write_text(FORMATS[name](rows))
        found = prepared(readers.read([tmp_path / name], "networks.describe"))
        assert [part.method for part in found.segments] == ["networks.train", "networks.describe"]
        assert (found.count, found.duplicates, len(parsed)) == (3, 98, 1)


@pytest.mark.parametrize(
    "files, expected",
    [
        (["none/*.yaml"], "none/*.yaml: matches no file in "),
        (["none.yaml"], "none.yaml: cannot be read: No such file"),
        ([], "the files: are missing; give at least one"),
        (["-", "-"], "standard input: is given twice"),
        (["empty"], "empty: is a folder without an instances.csv; give its files themselves"),
    ],
)
def test_files_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert expected in str(refused(files))


# --- VNN-COMP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instances.csv", "acasxu_instances.csv"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_instances_file_and_its_folder_are_verification_jobs_with_their_limits(
    tmp_path: Path, name: str, ending: str
) -> None:
    lines = [
        f"nets/n{net}.onnx{ending}, props/p{prop}.vnnlib{ending}, {100 + prop}" for net in (1, 2) for prop in (1, 2)
    ]
    (tmp_path / name).write_text("\r\n".join(lines))
    for given_as in (tmp_path / name, tmp_path):
        document = readers.read([given_as])
        (entry,) = document.jobs
        assert (entry.method, entry.rows, entry.base, document.name) == (
            "verification.verify", 4, tmp_path, name.removesuffix(".csv"),
        )  # fmt: skip
        assert entry.table is not None
        line, row = list(entry.table)[2]
        assert line == 3
        assert {name: text.strip() for name, text in row.items()} == {  # type: ignore[union-attr]
            "network": f"nets/n2.onnx{ending}",
            "property": f"props/p1.vnnlib{ending}",
            "limits.seconds": "101",
        }


# --- hostile and broken input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "the document: is None, must be a mapping"),
        (b"value,tag\n", "has a header but no rows"),
        (b"[]", "is empty, there are no rows in it"),
        (b"value,tag,value\n1,2,3\n", "line 1: column 'value' is given twice"),
        (b",value\n1,2\n", "line 1: column 1 has no name (pandas"),
        (b"value,tag\n1,2\n\xe9,3\n", "line 3: is not UTF-8: byte 0xe9 at offset 14; save the file as UTF-8"),
        (b'{"value": 1}\n{"value": "\xe9"}\n', "line 2: is not UTF-8: byte 0xe9 at offset 24"),
        (b'[{"value": 1},\n{"value": "\xe9"}]', "line 2: is not UTF-8: byte 0xe9 at offset 26"),
        (b"name: caf\xe9\njobs: []", "line 1: is not UTF-8: byte 0xe9 at offset 9"),
        (b"value\r1\r2\r", "line 1: has a carriage return inside a cell; end lines with a line feed"),
        (b"jobs: {method: diagnostics.echo, params: {value: " + b"9" * 5000 + b"}}", "a number of more than 4,300"),
        (b"- value: 1\n- vale: 2\n", "line 2: vale is not a parameter of diagnostics.echo; nearest: value"),
        (b"[1, 2]", "is 1, must be an object (a mapping) of params"),
        (b"value\n1\n\x00\n", "line 3: holds a NUL byte at offset 8"),
        ("value\n1\n".encode("utf-16"), "it looks like UTF-16: save the file as UTF-8"),
        (bytes(range(256)), "holds a NUL byte at offset 0"),
        (pickle.dumps([1]), "is a Python pickle; jobs can be given as YAML, JSON, JSON Lines, CSV"),
        (b"PAR1\x15\x04", "is a Parquet file; jobs can be given as YAML"),
        (b"\x1f\x8b\x08\x00garbage", "cannot be unpacked, it is damaged or cut off"),
        (gzip.compress(b"value\n" + b"1\n" * 10**5)[:-40], "cannot be unpacked, it is damaged or cut off"),
        (b'{"jobs": [{"method": "diagnostics.echo", "method": "x"}]}', "'method' is given twice in one object"),
        (b'{"jobs": [{"method": "diagnostics.echo", "params": {"value": NaN}}]}', "NaN is not a JSON number"),
        (b'{\n"jobs": [{]}', "line 2, column 11: is not JSON: "),
        (b'{"jobs": ' + b"[" * 150 + b"]" * 150 + b"}", "is nested more than 100 deep"),
        (b'{"jobs": ' + b"[" * 10**6, "is nested more than 100 deep"),
        (b'{"value": ' + b"[" * 150 + b"]" * 150 + b"}", "line 1: is nested more than 100 deep"),
        (b"jobs: " + b"[" * 10**6, "is nested more than 100 deep"),
        (b"- " * 10**6, "is nested more than 100 deep"),
        (b"jobs: &a [*a]", "*a stands for a value that it is part of"),
        (b'[{"value": 1}, {"value": 2} {"value": 3}]', "is not JSON: '{\"value\": ' where ']' or ',' must stand"),
        (b'[{"value": 1}] x', "there is text behind the end of the list"),
        (b'[{"value": 1}, {"value": ', "is not JSON: Expecting value"),
        (b'value\n1\n"2\n3\n4\n', "line 3: opens a quote that is never closed"),
        (b'{"value": 1' + b"0" * 5000 + b"}", "a number of 5,001 digits is more than can be read"),
        (b"value\n1" + b"0" * 400 + b"\n", "value is 1000000"),
        (b'{"value": "\\ud800"}', "half a surrogate pair"),
    ],
)  # fmt: skip
def test_bad_bytes_are_refused_in_words(data: bytes, expected: str) -> None:
    bad = refused(["-"], ECHO, data)
    assert expected in str(bad)
    assert bad.total >= 1


GOOD = [
    b"jobs:\n- {method: diagnostics.echo, params: {tag: 1}, grid: {value: {range: [0, 3]}}, limits: {seconds: 5}}\n",
    b"name: n\njobs: {method: diagnostics.echo, random: {count: 3, seed: 1, draw: {value: {normal: [0, 1]}}}}\n",
    b'{"jobs": [{"method": "diagnostics.echo", "zip": {"value": [1, 2], "tag": {"linspace": [0, 1, 2]}}}]}',
    b'[{"value": 1}, {"method": "diagnostics.echo", "params": {"value": 2}, "limits": {"memory": "1MB"}}]',
    b'{"value": 1, "limits.seconds": 3}\n{"value": "x", "tag": 4}\n',
    b'value;tag;limits.memory\n1;2;1GB\n"a;""b";;\n',
]


@given(
    st.binary(max_size=60)
    | st.text("[]{}:,-&*!|>'\"#%@`?~ \n\tab01.e<=", max_size=60).map(str.encode)
    | st.builds(
        lambda data, at, cut, new: data[: at % len(data)] + new + data[at % len(data) + cut :],
        st.sampled_from(GOOD),
        st.integers(0, 200),
        st.integers(0, 9),
        st.binary(max_size=3) | st.sampled_from(b'{ ] [ " \n :  &a  *a << null -1 1e999 .inf'.split(b" ")),
    )
)
@settings(max_examples=600, deadline=None)
def test_whatever_the_bytes_they_are_jobs_or_a_refusal(data: bytes) -> None:
    told: list[str] = []
    try:
        prepared(readers.read(["-"], ECHO, io.BytesIO(data)))
    except BadSweep as bad:
        told = [error.message for error in bad.errors] or [""]
    assert "" not in told


def test_a_zip_and_a_network_are_no_sweeps(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.xlsx", "w") as archive:
        archive.writestr("a", "b")
    assert "is a zip archive (as .xlsx and .npz are); jobs can be given as" in str(refused([tmp_path / "rows.xlsx"]))
    (tmp_path / "f.onnx").write_bytes(b"\x08\x07")
    assert "is a network; name it in a sweep" in str(refused([tmp_path / "f.onnx"]))


def test_a_file_that_breaks_off_is_refused_though_invalid_rows_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"value": 1}\n' * 10**5)[:-20])
    with pytest.raises(BadSweep, match="damaged or cut off"):
        prepared(readers.read([tmp_path / "rows.jsonl.gz"], ECHO), skip_invalid=True)


BOMBS = {
    "lists": "a: &a [" + "x," * 9 + "x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghij")) + "jobs: *j\n",
    "merges": "a: &a {k: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n" for a, b in itertools.pairwise("abcdefghij")),
    "plain": "jobs: [" + "1," * 4_000_000 + "]",
}  # fmt: skip

REFUSE = """
import resource, sys, time
from producer import readers
from producer.sweeps import BadSweep
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    readers.read([sys.argv[1]], "diagnostics.echo")
except BadSweep as error:
    print(str(error).splitlines()[1])
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def refused_within(path: Path, seconds: float, memory: float) -> str:
    done = subprocess.run([sys.executable, "-c", REFUSE, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message, measured = done.stdout.splitlines()
    took, grown = map(float, measured.split())
    assert took < seconds, took
    assert grown < memory, grown
    return message


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_stands_for_gigabytes_is_refused_quickly(tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMBS[name])
    # Measured: 2 ms for what aliases multiply, 0.9 s for a million values written out; 30 MB at most.
    message = refused_within(tmp_path / "bomb.yaml", 1 if name != "plain" else 4, 2e8)
    assert "grows beyond 1,000,000 values" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "sweep.yaml", "noname"])
def test_a_line_of_two_gigabytes_is_refused_without_being_read(tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as file:
        file.write(
            {"rows.jsonl": b'{"value": "', "rows.json": b'[{"value": "', "sweep.yaml": b"name: "}.get(name, b"x")
        )
        file.write(b"a" * 2**25)  # and a hole behind it: two gigabytes that take no room
        file.truncate(2 * 2**30)
    message = refused_within(tmp_path / name, 4, 2e8)
    assert "16 MiB" in message


def test_standard_input_without_line_ends_is_not_read_to_its_end() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"a" * size

    stream = Endless()
    with pytest.raises(BadSweep, match="longer than 16 MiB"):
        readers.read(["-"], ECHO, stream)  # type: ignore[arg-type]
    assert stream.given < 2 * plain.LONGEST


def test_a_row_that_an_open_quote_makes_endless_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('value\n1\n"2\n' + f"{'x' * 1000}\n" * 20_000)
    bad = refused([tmp_path / "rows.csv"], ECHO)
    assert "line 3: begins a row longer than 16 MiB; is a quote missing?" in str(bad)


# --- cost -----------------------------------------------------------------------------------------------------------

PREPARE = """
import resource, sys, time
from pathlib import Path
from producer import readers, references, sweeps
document = readers.read([sys.argv[1]], "diagnostics.echo")
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
prepared = sweeps.prepare(document, references.Resolver(Path()))
print(prepared.count, time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "one_line.json"])
def test_a_hundred_thousand_rows_of_a_file_are_prepared_in_about_a_second_and_little_memory(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(FORMATS[name]([{"value": value, "tag": value % 7} for value in range(100_000)]))
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path / name)], capture_output=True, text=True, timeout=60, check=True
    )
    count, seconds, resident = done.stdout.split()
    assert int(count) == 100_000
    # Measured: 0.55 s (JSON Lines) to 0.68 s (a JSON list), and 25 MB, on one core; a grid takes 0.36 s.
    assert float(seconds) < 2.8
    assert int(resident) < 50_000_000


@pytest.mark.parametrize("text", [
    "!!map [1]", "x: !!map 1", "x: !!bool maybe", "x: !!int ''", "x: !!timestamp x", "x: !!float x", "x: !!omap 1",
    "x: !!timestamp 2001-99-99", "x: !!set [1]", "x: !!pairs 1", "x: !!binary é",
])  # fmt: skip
def test_a_tag_that_does_not_fit_its_text_is_not_yaml(text: str) -> None:
    with pytest.raises(plain.Unreadable):
        plain.load_yaml(text)
