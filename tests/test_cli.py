"""The command line as a user types it: one process a call, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from services import RedisServer

from netassay.settings import masked
from netassay.store import dispatching, running
from netassay.store.database import Database
from netassay.store.running import Outcome
from producer import lab

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
        "jobs: {method: verification.certify, params: {network: tangent.onnx, index: 0, radius: 0.1}}",
        ["row 1", "tangent.onnx", "Tan", "the_tangent_node"],
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
    (tmp_path / "tangent.onnx").write_bytes(tangent_network())
    done = cli("submit", sweep(tmp_path, text), code=2)
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".netassay").exists()


def tangent_network() -> bytes:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph([helper.make_node("Tan", ["x"], ["y"], name="the_tangent_node")], "g", [x], [y])
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
    for key in ("not-a-key", "", "ab cd", "f" * 33):
        assert "hexadecimal, 1 to 32 digits" in cli("logs", key, code=2).stderr


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


HEAVY = {
    "torch",
    "pandas",
    "onnx",
    "celery",
    "sqlalchemy",
    "sklearn",
    "polars",
    "pyarrow",
    "psycopg",
    "fsspec",
    "redis",
}


@pytest.mark.parametrize(
    "words", [["--help"], ["methods"], ["methods", "certify"], ["wait", "--help"]], ids=lambda words: " ".join(words)
)
def test_the_light_verbs_import_no_heavy_library(words: list[str]) -> None:
    program = (
        "import sys; from producer.cli import main\n"
        f"sys.argv = ['netassay', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
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


def test_watch_and_wait_end_with_0_if_all_is_done_1_if_some_failed_3_if_cancelled_5_too_early_6_if_paused(
    cli: Cli, tmp_path: Path
) -> None:
    store = Database(f"sqlite:///{tmp_path}/.netassay/store.sqlite")
    for name in ("good", "bad", "stopped"):
        cli("submit", sweep(tmp_path, f"jobs: {{method: diagnostics.echo, params: {{tag: {len(name)}}},"
                            " grid: {value: {range: [0, 3]}}}", f"{name}.yaml"), "--name", name)  # fmt: skip
    cli("watch", "good", "--timeout", "0", code=5)
    cli("wait", "good", "bad", "--timeout", "0", code=5)
    cli("pause", "good")
    assert "netassay resume good" in cli("watch", "good", code=6).stdout
    cli("wait", "good", code=6)
    cli("resume", "good")
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
    for names, code in ((["good"], 0), (["bad"], 1), (["good", "bad"], 1), (["stopped"], 3), (["bad", "stopped"], 3)):
        quiet = cli("wait", *names, "--quiet", code=code)
        assert (quiet.stdout, quiet.stderr) == ("", "")
    assert "no batch is called 'godo'" in cli("wait", "good", "godo", code=2).stderr
    both = cli("wait", "bad", "good", "bad", code=1).stdout
    assert (both.count("bad: 3 jobs"), both.count("good: 3 jobs")) == (1, 1)
    assert "netassay retry bad" in both
    rows = [json.loads(line) for line in cli("results", "bad", "--json").stdout.splitlines()]
    assert {row["message"] for row in rows} == {"first line\nsecond line"}
    assert "second line" in cli("logs", rows[0]["job"]).stdout


def _publish(store: Database, batch: dispatching.OpenBatch) -> dispatching.Message | None:
    with store.write() as connection:
        return dispatching.publish_next(connection, batch, 1)


def test_a_wait_without_any_worker_says_so(cli: Cli, tmp_path: Path) -> None:
    cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
    assert "no worker runs; start one with: netassay up" in cli("wait", "numbers", "--timeout", "4.5", code=5).stderr


def test_batches_are_listed_newest_first_with_what_is_known_of_them(cli: Cli, tmp_path: Path) -> None:
    assert "netassay up" in cli("batches", code=2).stderr
    for number in range(3):
        cli("submit", sweep(tmp_path, ECHO.replace("100", str(10 + number))), "--name", f"batch-{number}",
            "--note", f"[{number}] of three")  # fmt: skip
    cli("pause", "batch-1")
    lines = cli("batches").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["batch", "batch-2", "batch-1", "batch-0"]
    assert "[1] of three" in lines[2]
    assert "paused" in lines[2]
    few = cli("batches", "--limit", "1").stdout
    assert "batch-2" in few
    assert "and 2 older ones" in few
    assert "batch-1" in cli("batches", "--state", "paused").stdout
    assert "states are" in cli("batches", "--state", "asleep", code=2).stderr
    cli("weight", "batch-0", "3")
    assert "weight" in cli("batches").stdout.splitlines()[0]
    cli("weight", "batch-0", "0", code=2)


def test_rows_without_a_method_of_their_own_append_to_a_batch_and_run_afresh(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("value\n1\n2\n")
    (tmp_path / "more.csv").write_text("value\n2\n3\n")
    cli("submit", "rows.csv", "--method", "diagnostics.echo", "--name", "rows")
    assert "exists" in cli("submit", "more.csv", "--method", "diagnostics.echo", "--name", "rows", code=2).stderr
    said = cli("submit", "more.csv", "--method", "diagnostics.echo", "--name", "rows", "--append").stdout
    assert "1 job added, 1 new" in said
    assert "it has 3 now" in said
    both = json.loads(cli("submit", "rows.csv", "more.csv", "--method", "diagnostics.echo", "--name", "both",
                          "--json").stdout)  # fmt: skip
    assert (both["size"], both["new"], both["duplicates"]) == (3, 0, 1)
    words = ("submit", "-", "--name", "piped", "--method", "diagnostics.echo", "--json")
    piped = subprocess.run(
        [sys.executable, "-m", "producer.cli", *words],
        cwd=tmp_path, env=_plain_environment(), input="value\n7\n", capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(piped.stdout)["new"] == 1, piped.stderr


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}


# --- signals and streams -------------------------------------------------------------------------------------------


def ended_by(sent: signal.Signals, folder: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, sent a signal when it writes `here` on standard error; `program` makes it do so."""
    start = f"import sys\nfrom producer.cli import main\n{program}\nsys.argv = ['netassay', *{words!r}]\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        cwd=folder, env=_plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "here\n":
                break
        process.send_signal(sent)
        out, told = process.communicate(timeout=30)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, told)


SLEEPS = """
import time
def sleep(seconds, real=time.sleep):
    print("here", file=sys.stderr, flush=True)
    real(seconds)
time.sleep = sleep
"""
EXPORTS = """
import time
from netassay.store import transfer
def write(self, batches):
    print("here", file=sys.stderr, flush=True)
    time.sleep(30)
transfer._Export.write = write
"""


def test_an_interrupted_verb_says_so(cli: Cli, tmp_path: Path) -> None:
    cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
    done = ended_by(signal.SIGINT, tmp_path, SLEEPS, "wait", "numbers", "--json")
    assert done.returncode == 130
    assert json.loads(done.stdout) == {"error": "interrupted", "exit_code": 130, "rows": []}
    assert set(done.stderr.splitlines()) <= {"here", "netassay: interrupted"}
    done = ended_by(signal.SIGTERM, tmp_path, EXPORTS, "export", "lab.tar")
    assert (done.returncode, done.stderr) == (130, "netassay: interrupted\n")
    assert not list(tmp_path.glob("*lab.tar*"))


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    netassay = f'netassay() {{ "{sys.executable}" -m producer.cli "$@"; }}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{netassay}; {command}"],
        cwd=folder, env=_plain_environment(), capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_streams_that_end_early_or_are_closed(cli: Cli, tmp_path: Path) -> None:
    sweep(tmp_path, ECHO.replace("100", "3000"))
    assert cli("submit", "sweep.yaml", "--name", "numbers").stderr == ""
    for command, code, told in (
        ("netassay results --json | head -1", 0, ""),
        ("netassay results --csv | head -1", 0, ""),
        ("netassay status --json | true", 0, ""),
        ("netassay status | true", 0, ""),
        ("netassay methods >&-", 0, ""),
        ("netassay results --json >&-", 0, ""),
        ("netassay wait numbers --timeout 0 <&- >&- 2>&-", 5, ""),
        ("netassay submit sweep.yaml --dry-run <&-", 0, ""),
        ("netassay submit - --name nothing --method diagnostics.echo <&-", 2, "standard input"),
        ("netassay wach >&-", 2, "netassay: No such command"),
    ):
        done = shell(tmp_path, command)
        assert done.returncode == code, (command, done.stderr)
        assert (told in done.stderr) if told else done.stderr == "", (command, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("words", ["status --json", "status", "methods --json", "results --csv"])
def test_output_that_cannot_be_written_is_one_message(cli: Cli, tmp_path: Path, words: str) -> None:
    cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
    done = shell(tmp_path, f"netassay {words} > /dev/full")
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1), done.stderr
    assert "No space left on device" in done.stderr


# --- completion ----------------------------------------------------------------------------------------------------


def completed(shell: str, folder: Path, *words: str) -> set[str]:
    """What a shell is offered for the last of these words."""
    line = " ".join(("netassay", *words))
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-m", "producer.cli"],
        cwd=folder, env=_plain_environment() | asked | {"_NETASSAY_COMPLETE": f"complete_{shell}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    if shell == "zsh":  # _arguments '*: :(("one":"help" "two":"help"))'
        return {found.partition("\\:")[0] for found in re.findall(r'"([^"]*)":"', done.stdout)} or set(
            re.findall(r'"([^":]+)"', done.stdout)
        )
    return {found.partition("\t")[0] for found in done.stdout.splitlines() if found}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_batches_and_methods(cli: Cli, tmp_path: Path, shell: str) -> None:
    assert completed(shell, tmp_path, "watch", "nu") == set(), "there is no store yet, and no complaint"
    cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
    assert completed(shell, tmp_path, "wa") == {"watch", "wait"}
    assert completed(shell, tmp_path, "submit", "--we") == {"--weight"}
    verbs = {"bash": ["watch", "pause", "resume"], "zsh": ["cancel", "retry"], "fish": ["weight", "wait", "results"]}
    for verb in verbs[shell]:
        assert completed(shell, tmp_path, verb, "nu") == {"numbers"}, verb
    assert completed(shell, tmp_path, "methods", "verification.ce") == {"verification.certify"}
    assert completed(shell, tmp_path, "run", "diagnostics.e") == {"diagnostics.echo"}
    assert completed(shell, tmp_path, "retry", "numbers", "--failed-with", "inv") == {"invalid_input"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "netassay"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m producer.cli "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(netassay --show-completion bash)"; complete -p netassay;'
        " COMP_WORDS=(netassay retr); COMP_CWORD=1; _netassay_completion netassay; echo ${COMPREPLY[@]}"
    )
    environment = _plain_environment() | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    registered, offered = done.stdout.splitlines()
    assert "_netassay_completion netassay" in registered
    assert offered == "retry"


# --- services and secrets ------------------------------------------------------------------------------------------


def test_up_says_in_seconds_that_broker_or_store_do_not_answer_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    silent = {
        "NETASSAY_BROKER": ("redis://lab:secret@127.0.0.1:1/0", "the broker redis://lab:***@127.0.0.1:1/0"),
        "NETASSAY_STORE": ("postgresql://lab:secret@127.0.0.1:1/records", "the store postgresql://lab:***@127.0.0.1:1"),
    }
    for name, (url, words) in silent.items():
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "producer.cli", "up", "--json"],
            cwd=tmp_path, env=_plain_environment() | {name: url}, capture_output=True, text=True,
        )  # fmt: skip
        assert time.monotonic() - began < 20
        assert done.returncode == 4, done.stderr
        assert words in done.stderr
        assert "secret" not in done.stdout + done.stderr
        assert not (tmp_path / ".netassay").exists()


def test_a_broker_that_says_nothing_is_given_up() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        with pytest.raises(lab.LabError, match="does not answer"):
            lab.reach_broker(f"redis://127.0.0.1:{deaf.getsockname()[1]}/0", seconds=0.5)
        assert time.monotonic() - began < 3
    with pytest.raises(lab.LabError, match="no address of a Redis"):
        lab.reach_broker("amqp://guest:secret@localhost")


@pytest.mark.parametrize(
    "address, shown",
    [
        ("redis://:pass@host:1/0", "redis://:***@host:1/0"),
        ("rediss://user:p:a@ss@host/0", "rediss://user:***@host/0"),
        ("redis+socket:///tmp/redis.sock", "redis+socket:///tmp/redis.sock"),
        ("postgresql://user:pass@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user@host/db?password=pass&sslmode=require", "postgresql://user@host/db?password=***&sslmode=require"),
        ("postgresql://user:pa/ss@host/db", "postgresql://user:***@host/db"),
        ("redis://host:6379/0?password=p@ss", "redis://host:6379/0?password=***"),
        ("'redis://:pass@host:1/0' is down, host:2 too", "'redis://:***@host:1/0' is down, host:2 too"),
        ("sqlite:////folder/store.sqlite", "sqlite:////folder/store.sqlite"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert masked(address) == shown


def test_worker_and_dispatcher_started_by_hand_are_a_lab(cli: Cli, tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    server.start()
    environment = _plain_environment() | {"NETASSAY_BROKER": server.url}
    assert "there is no broker" in cli("worker", code=2).stderr
    (tmp_path / "worker.py").write_text("raise SystemExit('a file of the user was taken for the worker')")
    verbs = (["dispatch"], ["worker", "--slots", "1"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "producer.cli", *verb],
            cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for verb in verbs
    ]  # fmt: skip
    try:
        cli("submit", sweep(tmp_path, ECHO), "--name", "numbers")
        cli("wait", "numbers", "--timeout", "60", code=0)
        for process in processes:
            process.terminate()
        assert [process.wait(30) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
        server.kill()


def test_a_log_that_grows_is_cut_and_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "LOG_BYTES", 1000)
    log = tmp_path / "worker.log"
    with open(log, "ab", buffering=0) as service:
        service.write(b"a" * 1000)
        lab.bound_logs(tmp_path)
        assert not log.with_suffix(".log.1").exists()
        service.write(b"b")
        lab.bound_logs(tmp_path)
        service.write(b"c")
    assert log.read_bytes() == b"c"
    assert log.with_suffix(".log.1").read_bytes() == b"a" * 1000 + b"b"
