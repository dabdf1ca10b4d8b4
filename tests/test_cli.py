"""The command line as a user types it: one process a call, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from netassay.store import dispatching, running
from netassay.store.database import Database
from netassay.store.running import Outcome

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}

    def call(*words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "producer.cli", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        if code is not None:
            assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def sweep(folder: Path, text: str, name: str = "sweep.yaml") -> str:
    (folder / name).write_text(text)
    return name


ECHO = "jobs: {method: diagnostics.echo, grid: {value: {range: [0, 100]}}}"
BAD = {
    "unknown method offers the nearest": (
        "jobs: {method: diagnostics.ecko, params: {value: 1}}",
        ["entry 1", "diagnostics.ecko", "nearest: diagnostics.echo"],
    ),
    "unknown field": ("jobs: {method: diagnostics.echo, params: {value: 1, valeu: 2}}", ["valeu"]),
    "out of range names row and field": (
        "jobs: {method: verification.certify, params: {network: {dataset: digits}, index: 0},"
        " grid: {radius: [0.1, -1]}}",
        ["row 2", "radius is -1", "at least 0"],
    ),
    "NaN": (
        "jobs: {method: verification.certify, params: {network: {dataset: digits}, index: 0, radius: .nan}}",
        ["row 1", "radius is nan"],
    ),
    "index outside the data": (
        "jobs: {method: verification.certify, params: {network: {dataset: digits}, radius: 0.1},"
        " grid: {index: [3, 599]}}",
        ["row 2", "index 599", "0..598"],
    ),
    "missing file": (
        "jobs: {method: networks.describe, params: {network: missing.onnx}}",
        ["row 1", "network", "missing.onnx", "no such file"],
    ),
    "corrupt ONNX": (
        "jobs: {method: networks.describe, params: {network: corrupt.onnx}}",
        ["row 1", "corrupt.onnx", "not an ONNX file"],
    ),
    "pickled model is refused with the way out": (
        "jobs: {method: networks.describe, params: {network: model.pt}}",
        ["row 1", "model.pt", "pickle can run code", "torch.onnx.export"],
    ),
    "unsupported operator names its node": (
        "jobs: {method: verification.certify, params: {network: sine.onnx, index: 0, radius: 0.1}}",
        ["row 1", "sine.onnx", "Sin", "the_sine_node"],
    ),
    "not YAML": ("jobs: [", ["line"]),
    "no jobs": ("name: empty", ["jobs"]),
}


@pytest.mark.parametrize("text, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error_and_nothing_is_stored(
    cli: Cli, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "corrupt.onnx").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "sine.onnx").write_bytes(sine_network())
    done = cli("submit", sweep(tmp_path, text), code=2)
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".netassay").exists()


def sine_network() -> bytes:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["y"], name="the_sine_node")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]).SerializeToString()


def test_one_bad_row_stops_all_unless_it_may_be_skipped(cli: Cli, tmp_path: Path) -> None:
    text = "jobs: {method: diagnostics.burn, grid: {seconds: [0.1, -1, 0.2]}}"
    file = sweep(tmp_path, text)
    cli("submit", file, code=2)
    done = cli("submit", file, "--skip-invalid", "--json")
    said = json.loads(done.stdout)
    assert (said["size"], said["refused"]) == (2, 1)


def test_submission_works_with_no_lab_and_says_how_to_start_one(cli: Cli, tmp_path: Path) -> None:
    file = sweep(tmp_path, ECHO)
    assert "netassay up" in cli("submit", file, "--name", "a").stdout
    assert "nothing was added" in cli("submit", file, "--name", "a").stdout
    again = json.loads(cli("submit", file, "--name", "b", "--json").stdout)
    assert (again["new"], again["known"]) == (0, 100)
    other = cli("submit", sweep(tmp_path, ECHO.replace("100", "99"), "other.yaml"), "--name", "a", code=2)
    assert "'a' exists" in other.stderr
    assert "--name" in other.stderr
    status = json.loads(cli("status", "--json").stdout)
    assert [(batch["name"], batch["size"], batch["waiting"]) for batch in status["batches"]] == [
        ("b", 100, 100),
        ("a", 100, 100),
    ]


def test_dry_run_shows_limits_and_stores_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("submit", sweep(tmp_path, ECHO), "--dry-run")
    assert "100 jobs; nothing was stored" in done.stdout
    assert "1 min 00 s" in done.stdout
    assert not (tmp_path / ".netassay").exists()


def test_unknown_names_are_answered_with_what_exists(cli: Cli, tmp_path: Path) -> None:
    assert "netassay up" in cli("watch", "nothing", code=2).stderr
    cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
    assert "numbers" in cli("watch", "nomber", code=2).stderr
    assert "causes are" in cli("retry", "numbers", "--failed-with", "bad luck", code=2).stderr
    assert "No such command" in cli("sumbit", code=2).stderr
    assert "no job's key" in cli("logs", "ffffffffffff", code=2).stderr
    assert "hexadecimal" in cli("logs", "not-a-key", code=2).stderr


def test_one_job_runs_in_this_process_without_a_lab(cli: Cli, tmp_path: Path) -> None:
    said = json.loads(cli("run", "diagnostics.echo", "value=7", "--json").stdout)
    assert said["result"]["square"] == 49
    assert "failed as asked" in cli("run", "diagnostics.fail", "cause=numerical", code=2).stderr


def test_methods_are_listed_searched_and_shown(cli: Cli) -> None:
    listed = cli("methods").stdout
    assert "verification.certify" in listed
    assert "dynamics.trainability_fractal" in listed
    assert cli("methods", "fractal").stdout.count("\n") == 1
    shown = cli("methods", "verification.certify").stdout
    assert all(words in shown for words in ("radius", "Reference:", "example sweep"))
    assert "nearest" in cli("methods", "verification.certifi", code=2).stderr


@pytest.mark.parametrize("words", [["--help"], ["methods"]], ids=lambda words: words[0])
def test_the_light_verbs_import_no_heavy_library(cli: Cli, words: list[str]) -> None:
    program = (
        "import sys; from producer.cli import main\n"
        f"sys.argv = ['netassay', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "found = {'torch', 'pandas', 'onnx', 'celery', 'sqlalchemy', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(found)}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_settings_that_make_no_sense_are_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", "status"],
        cwd=tmp_path, env=os.environ | {"NETASSAY_SLOTS": "many"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "NETASSAY_SLOTS" in done.stderr
    assert "Traceback" not in done.stderr


def test_watch_ends_with_0_if_all_is_done_1_if_not_and_3_if_cancelled(cli: Cli, tmp_path: Path) -> None:
    store = Database(f"sqlite:///{tmp_path}/.netassay/store.sqlite")
    for name in ("good", "bad", "stopped"):
        cli("submit", sweep(tmp_path, f"jobs: {{method: diagnostics.echo, params: {{tag: {len(name)}}},"
                            " grid: {value: {range: [0, 3]}}}", f"{name}.yaml"), "--name", name)  # fmt: skip
    cli("watch", "good", "--timeout", "0", code=1)
    worker = running.sign_on(store, "worker", "host", 1, 1)
    with store.read() as connection:
        batches = dispatching.open_batches(connection)
    for batch in batches:
        while message := _publish(store, batch):
            claim = running.claim(store, worker, message.chunk_id)
            assert claim is not None
            ends = [
                Outcome(task.id, "failed", "error", "first line\nsecond line") if batch.name == "bad" else
                Outcome(task.id, "done", result="{}")
                for task in claim.tasks
            ]  # fmt: skip
            if batch.name != "stopped":
                running.finish(store, worker, claim, ends)
            else:
                break
    cli("cancel", "stopped")
    running.sign_off(store, worker)
    cli("watch", "good", code=0)
    cli("watch", "good", "--json", code=0)
    failed = cli("watch", "bad", code=1).stdout
    assert "3 failed with cause error" in failed
    cli("watch", "stopped", code=3)
    rows = [json.loads(line) for line in cli("results", "bad", "--json").stdout.splitlines()]
    assert {row["message"] for row in rows} == {"first line\nsecond line"}
    assert "second line" in cli("logs", rows[0]["job"]).stdout


def _publish(store: Database, batch: dispatching.OpenBatch) -> dispatching.Message | None:
    with store.write() as connection:
        return dispatching.publish_next(connection, batch, 1)
