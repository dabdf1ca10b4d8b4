"""Taking records out on the command line: results, plot, export, import, gc; one process a call."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import polars as pl
import pytest
from store_by_hand import rows

from netassay import catalogue
from netassay.store import dispatching, running
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database
from netassay.store.running import Outcome
from producer import show, wording
from producer.cli import results

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def cli(folder: Path) -> Cli:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}

    def call(*words: str, code: int = 0, home: str = ".netassay") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "producer.cli", *words],
            cwd=folder, env=environment | {"NETASSAY_HOME": home}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


def validated(verb: str, line: str) -> Any:
    value = json.loads(line)
    jsonschema.validate(value, json.loads((SCHEMAS / f"{verb}.json").read_text()))
    return value


def store_in(folder: Path) -> Database:
    return Database(f"sqlite:///{folder / 'store.sqlite'}")


@pytest.fixture(scope="module")
def filled(cli: Cli, folder: Path) -> Database:
    """Two batches, run by hand: 30 echoes, and 4 jobs of another method of which one failed."""
    for name, text in (
        ("echo", "jobs: {method: diagnostics.echo, grid: {value: {range: [0, 30]}, tag: [1]}}"),
        ("burn", "jobs: {method: diagnostics.burn, grid: {seconds: [0.1, 0.2, 0.3, 0.4]}}"),
    ):
        (folder / f"{name}.yaml").write_text(text)
        cli("submit", f"{name}.yaml")
    store = store_in(folder / ".netassay")
    worker = running.sign_on(store, "worker", "host", 1, 1)
    with store.read() as connection:
        batches = dispatching.open_batches(connection)
    for batch in batches:
        while message := publish(store, batch):
            claim = running.claim(store, worker, message.chunk_id)
            assert claim is not None
            ends = []
            for task in claim.tasks:
                params = json.loads(task.params)
                if batch.name == "burn":
                    end = Outcome(task.id, "failed", "time", "too long") if params["seconds"] == 0.3 else None
                    ends.append(end or Outcome(task.id, "done", result='{"seconds":5}', seconds=params["seconds"]))
                else:
                    value = params["value"]
                    ends.append(Outcome(task.id, "done", result=json.dumps({"value": value, "square": value**2})))
            running.finish(store, worker, claim, ends)
    return store


def publish(store: Database, batch: dispatching.OpenBatch) -> dispatching.Message | None:
    with store.write() as connection:
        return dispatching.publish_next(connection, batch, 1)


def lines(done: subprocess.CompletedProcess[str]) -> list[Any]:
    """The records in what was printed, each with the columns that its method's Params and Result say."""
    found = [validated("results", line) for line in done.stdout.splitlines()]
    for row in found:
        method = catalogue.get(row["method"])
        about = {"job", "method", "state", "seconds", "cause", "message"}
        params = {f"params.{name}" if name in about else name for name in method.Params.model_fields}
        taken = about | params
        result = {f"result.{name}" if name in taken else name for name in method.Result.model_fields}
        assert row.keys() == taken | (result if row["state"] == "done" else set())
    return found


def test_a_word_is_a_batch_or_else_a_method(cli: Cli, filled: Database, folder: Path) -> None:
    assert [row["result.value"] for row in lines(cli("results", "echo", "--json"))] == list(range(30))
    assert len(lines(cli("results", "diagnostics.*", "--json"))) == 34
    assert len(lines(cli("results", "diagnostics.burn", "--state", "failed", "--json"))) == 1
    assert len(lines(cli("results", "--cause", "time", "--json"))) == 1
    assert len(lines(cli("results", "--since", "1h", "--json"))) == 34
    tomorrow = time.strftime("%Y-%m-%d", time.localtime(time.time() + 2 * 86400))
    assert not lines(cli("results", "--since", tomorrow, "--json"))
    (folder / "folder.csv").mkdir()
    os.mkfifo(folder / "pipe.csv")
    for words, said in (
        (["diagnostics.ecko"], ["diagnostics.echo", "no batch is called", "burn"]),
        (["--network", "f.onnx"], ["no network is called 'f.onnx'"]),
        (["echo", "--since", "yesterday"], ["7d", "2026-01-31"]),
        (["echo", "--state", "well"], ["not_applicable"]),
        (["echo", "--cause", "bad luck"], ["crash"]),
        (["echo", "--since", "nand"], ["is no time", "7d"]),
        *(
            (["echo", *words, "valeu"], ["no column valeu;", "attempts"])
            for words in (
                ["--columns"],
                ["--json", "--columns"],
                ["--out", "x.jsonl", "--columns"],
                ["--state", "failed", "--columns"],
                ["--by"],
                ["--by", "tag", "--columns"],
            )
        ),
        (["echo", "--out", "nowhere/x.csv"], ["nowhere is no folder"]),
        (["echo", "--out", "folder.csv"], ["folder.csv is a folder"]),
        (["echo", "--out", "pipe.csv"], ["pipe.csv is a device or a pipe"]),
        (["echo", "--out", "x.xlsx"], [".parquet"]),
        (["echo", "--csv", "--json"], ["one of --json, --csv, --out and --vnncomp"]),
    ):
        told = cli("results", *words, code=2).stderr
        assert not [word for word in said if word not in told], (words, told)
    assert (folder / "pipe.csv").is_fifo()
    assert not (folder / "x.jsonl").exists()


def test_tables_are_cut_and_say_so(cli: Cli, filled: Database) -> None:
    told = cli("results", "echo", "--limit", "5").stdout
    assert "25 more" in told
    assert len(told.splitlines()) == 7
    assert "more" not in cli("results", "echo", "--limit", "0").stdout
    assert "no such records" in cli("results", "echo", "--state", "failed").stdout
    summary = cli("results", "--by", "method", "--columns", "square", "--json").stdout
    assert [json.loads(line)["jobs"] for line in summary.splitlines()] == [30, 3]
    assert "mean square" in cli("results", "echo", "--by", "tag", "--csv").stdout


def test_each_method_has_a_table_of_its_own_with_as_many_columns_as_there_is_room_for(
    cli: Cli, filled: Database
) -> None:
    first, second = cli("results", "--limit", "0").stdout.split("\n\n")
    assert (first.split()[0], second.split()[0]) == ("diagnostics.echo", "diagnostics.burn")
    assert len(first.splitlines()) == 32
    assert second.splitlines()[1].split() == [
        "job", "state", "busy", "params.seconds", "tag", "result.seconds", "seconds", "cause", "message",
    ]  # fmt: skip
    rows = [
        {"job": f"{n:012}", "state": "done", "tag": 1, "x": n, "y": -n, "why": "", "word": "w" * n} for n in (1, 39)
    ]
    for width, names in ((80, ["job", "state", "tag", "x", "y", "word"]), (65, ["job", "x", "y", "word"]),
                         (61, ["job", "state", "tag", "x", "y"]), (5, ["job"])):  # fmt: skip
        assert results._that_fit(results._columns(rows), rows, ("job",), width) == names
    for width in (80, 160):
        shown = results._that_fit(list(rows[0]), rows, ("job",), width)
        table = show.table(shown, [[show.cell(row[name]) for name in shown] for row in rows])
        with show.console.capture() as seen:
            show.console.print(table, width=width)
        assert len(seen.get().splitlines()) == 3, "a row is a line"


def test_what_has_no_room_is_named(cli: Cli, filled: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"job": "a" * 12, "method": "some.method", "message": "m" * 40, "x": 1}]
    monkeypatch.setattr(show.console, "width", 50)
    with show.console.capture() as seen:
        results._show_methods(rows)
    assert "no room for: message; --columns shows" in seen.get()
    summary = [{"tag": 1, "jobs": 2, **{f"mean of number {number}": 1.5 for number in range(9)}}]
    with show.console.capture() as seen:
        results._print_fitting(list(summary[0]), summary, always=("tag", "jobs"))
    header, row, left_out = seen.get().splitlines()[:3]
    assert header.split()[:2] == ["tag", "jobs"]
    assert row.split()[:2] == ["1", "2"]
    assert left_out.startswith("no room for: mean of number")


def test_a_summary_says_nothing_of_arrays() -> None:
    array = wording.plain({"array": "", "dtype": "float64", "shape": [2, 3]})
    assert array == "array 2x3"
    rows = [{"state": "done", "tag": 1, "word": "array 1", "margins": array}]
    assert show.summary(rows, ["tag"], []) == [{"tag": 1, "jobs": 1, "array 1": "100.0%"}]


def test_any_value_makes_a_group_and_labels_say_what_they_are_of() -> None:
    rows = [
        {"state": "done", "widths": widths, "exact": exact, "verdict": verdict, "bound": bound}
        for widths, exact, verdict, bound in (
            ([8, 8], True, "certified", 1.0), ([8, 8], False, "", 2.0), ([8], False, "certified", float("nan")),
        )
    ]  # fmt: skip
    assert show.summary(rows, ["widths"], ["exact", "verdict", "bound"])[0] == {
        "widths": "[8, 8]", "jobs": 2, "exact=true": "50.0%", "certified": "50.0%", "verdict=": "50.0%",
        "mean bound": 1.5,
    }  # fmt: skip
    assert show.summary(rows[1:], ["widths"], ["exact"])[0] == {"widths": "[8, 8]", "jobs": 1, "exact=false": "100.0%"}
    assert [line["jobs"] for line in show.summary(rows + rows, ["bound"], ["exact"])] == [2, 2, 2]


def test_files_hold_all_rows_with_typed_columns(cli: Cli, filled: Database, folder: Path) -> None:
    assert "34 records" in cli("results", "--out", "all.parquet").stdout
    found = pl.read_parquet(folder / "all.parquet")
    assert (found.height, found.schema["value"], found.schema["params.seconds"]) == (34, pl.Int64, pl.Float64)
    assert found["batches"].to_list() == [["echo"]] * 30 + [["burn"]] * 4
    cli("results", "--out", "all.csv")
    printed = cli("results", "--csv").stdout
    assert (folder / "all.csv").read_text() == printed
    assert len(list(csv.DictReader(io.StringIO(printed)))) == 34
    assert cli("results", "echo", "--csv", "--columns", "value,square").stdout.splitlines()[:4] == [
        "value,square", "0,0.0", "1,1.0", "2,4.0",
    ]  # fmt: skip
    assert cli("results", "--columns", "job,job,value", "--csv").stdout.startswith("job,value\n")
    chosen = cli("results", "--columns", "batches,result.seconds", "--json").stdout.splitlines()
    assert [json.loads(line) for line in chosen[28:]] == [
        *[{"batches": ["echo"], "result.seconds": None}] * 2,
        *({"batches": ["burn"], "result.seconds": seconds} for seconds in (5, 5, None, 5)),
    ]
    cli("results", "echo", "--out", "echo.jsonl")
    assert (folder / "echo.jsonl").read_text() == cli("results", "echo", "--json").stdout
    cli("results", "echo", "--out", "echo.json")
    assert json.loads((folder / "echo.json").read_text()) == lines(cli("results", "echo", "--json"))
    (folder / "linked.json").symlink_to("behind.json")
    cli("results", "echo", "--out", "linked.json")
    assert (folder / "linked.json").is_symlink()
    assert (folder / "behind.json").read_text() == (folder / "echo.json").read_text()
    cli("results", "--by", "method", "--out", "by.parquet")
    assert pl.read_parquet(folder / "by.parquet")["jobs"].to_list() == [30, 3]


def test_a_figure_across_batches(cli: Cli, filled: Database, folder: Path) -> None:
    cli("plot", "diagnostics.echo", "--out", "echo.svg")
    assert (folder / "echo.svg").read_text().startswith("<svg")
    cli("plot", "diagnostics.ec*")
    assert (folder / "diagnostics.ec-.png").read_bytes().startswith(b"\x89PNG")
    assert "no such records" in cli("plot", "diagnostics.echo", "--since", "0m", code=2).stderr
    assert "nowhere is no folder" in cli("plot", "diagnostics.echo", "--out", "nowhere/x.png", code=2).stderr


def test_a_store_goes_from_one_home_to_another(cli: Cli, filled: Database, folder: Path) -> None:
    out = validated("export", cli("export", "lab.tar", "--json").stdout)
    assert (out["batches"], out["jobs"], out["records"]) == (2, 34, 34)
    brought = validated("import", cli("import", "lab.tar", "--json", home="cluster").stdout)
    assert (brought["batches"], brought["new"], brought["records"]) == (2, 34, 34)
    assert cli("results", "echo", "--json", home="cluster").stdout == cli("results", "echo", "--json").stdout
    assert "2 were there" in cli("import", "lab.tar", home="cluster").stdout
    assert "nothing was added" in cli("submit", "echo.yaml", home="cluster").stdout
    cli("submit", "burn.yaml", "--name", "echo", home="other")
    assert "--rename" in cli("import", "lab.tar", code=2, home="other").stderr
    assert "echo is called echo-laptop here" in cli("import", "lab.tar", "--rename", "-laptop", home="other").stdout
    assert "not an export" in cli("import", "echo.yaml", code=2, home="other").stderr
    assert "no batch is called" in cli("export", "some.tar", "nothing", code=2).stderr
    assert not (folder / "some.tar").exists()
    assert "nowhere is no folder" in cli("export", "nowhere/some.tar", code=2).stderr


def test_garbage_is_shown_and_then_removed(cli: Cli, filled: Database, folder: Path) -> None:
    kept = Artifacts(folder / ".netassay" / "artifacts")
    digest = kept.put(b"of nobody")
    os.utime(kept.path(digest), (0, 0))
    for words, there in ((["--dry-run"], True), ([], False)):
        told = validated("gc", cli("gc", "--json", *words).stdout)
        assert (told["dry_run"], told["artifacts"], told["bytes"]) == (there, [{"digest": digest, "bytes": 9}], 9)
        assert kept.has(digest) is there
    assert "removed 0 jobs" in cli("gc").stdout
    assert len(rows(filled, "SELECT id FROM job")) == 34
