"""Every verb with `--json`, called for real, prints one value that its published schema accepts; errors too."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from labs import embedded
from typer.main import get_command
from typer.testing import CliRunner

from netassay import catalogue
from producer.cli import app, output

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
ECHO = "jobs: {method: diagnostics.echo, grid: {value: {range: [0, 30]}}}"
FAIL = "jobs: {method: diagnostics.fail, params: {cause: error}, grid: {tag: {range: [0, 3]}}}"
CRASH = "jobs: {method: diagnostics.crash, grid: {tag: {range: [0, 1]}}}"


def validated(verb: str, line: str) -> Any:
    """The value in this line, after it was held against the published schema of the verb."""
    value = json.loads(line)
    schema = json.loads((SCHEMAS / f"{verb}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema)
    return value


@dataclass
class Cli:
    folder: Path
    environment: dict[str, str]

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "producer.cli", *words],
            cwd=self.folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *words: str, code: int = 0, as_error: bool = False) -> Any:
        (line,) = self(*words, "--json", code=code).stdout.splitlines()
        return validated("error" if as_error else words[0], line)


@pytest.fixture
def alone(tmp_path: Path) -> Cli:
    """The command line in an empty folder without a lab."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
    return Cli(tmp_path, environment)


@pytest.fixture(scope="module")
def lab() -> Iterator[Cli]:
    """The command line in the folder of a lab that is not started yet, with sweeps to submit."""
    with embedded(start=False) as found:
        for name, text in (("echo", ECHO), ("fail", FAIL), ("crash", CRASH)):
            (found.home / f"{name}.yaml").write_text(text)
        yield Cli(found.home, {**os.environ, "NETASSAY_HOME": str(found.home)})


def test_the_published_schemas_are_those_of_the_code() -> None:
    assert {file.stem for file in SCHEMAS.glob("*.json")} == set(output.OUTPUTS)
    stale = [verb for verb in output.OUTPUTS if (SCHEMAS / f"{verb}.json").read_text() != output.schema(verb)]
    assert not stale, "publish them: make schemas"


def test_every_verb_that_takes_json_has_a_schema_and_the_other_way_round() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    takes = {name for name, command in commands.items() if any("--json" in one.opts for one in command.params)}
    assert takes == set(output.OUTPUTS) - {"error"}
    assert set(commands) - takes <= {"worker", "dispatch", "monitor", "plot"}, (
        "these print nothing for a machine to read"
    )


def test_a_day_in_a_lab(lab: Cli) -> None:
    assert lab.json("status")["works"] is False
    up = lab.json("up", "--slots", "1", "--no-flower")
    assert set(up["services"]) == {"redis", "worker", "dispatcher", "monitor"}
    assert up["monitor"].startswith("http://127.0.0.1:")
    assert [lab.json("submit", f"{name}.yaml")["new"] for name in ("echo", "fail", "crash")] == [30, 3, 1]
    waited = lab.json("wait", "echo", "fail", "crash", code=1)
    assert waited["outcome"] == "failed"
    assert [(batch["name"], batch["done"], batch["failed"]) for batch in waited["batches"]] == [
        ("echo", 30, 0),
        ("fail", 0, 3),
        ("crash", 0, 1),
    ]
    (group,) = lab.json("watch", "fail", code=1)["failures"]
    assert (group["cause"], group["jobs"]) == ("error", 3)
    assert lab.json("logs", group["example_key"])["attempts"] == []
    (group,) = lab.json("watch", "crash", code=1)["failures"]
    died = lab.json("logs", group["example_key"][:12])
    assert (died["cause"], len(died["attempts"])) == ("crash", 3)
    assert lab.json("retry", "crash", "--failed-with", "time") == {"batch": "crash", "jobs": 0}
    status = lab.json("status")
    assert (status["works"], len(status["workers"]), len(status["batches"])) == (True, 1, 3)
    doctor = lab.json("doctor")
    assert doctor["fine"], [check for check in doctor["checks"] if check["state"] != "ok"]
    assert {check["state"] for check in doctor["checks"]} == {"ok"}
    assert lab.json("down") == {"stopped": True, "home": up["home"]}
    assert lab.json("down")["stopped"] is False


def test_batches_without_a_lab(alone: Cli) -> None:
    (alone.folder / "echo.yaml").write_text(ECHO)
    (alone.folder / "half.yaml").write_text("jobs: {method: diagnostics.burn, grid: {seconds: [0.1, -1, 0.1]}}")
    dry = alone.json("submit", "echo.yaml", "--dry-run")
    assert [(row["method"], row["jobs"]) for row in dry["rows"]] == [("diagnostics.echo", 30)]
    said = alone.json(
        "submit", "echo.yaml", "--note", "first [bold] try", "--weight", "2", "--tag", "paper", "--tag", "seed=1"
    )
    assert (said["size"], said["works"]) == (30, False)
    half = alone.json("submit", "half.yaml", "--skip-invalid")
    assert (half["size"], half["refused"], half["duplicates"]) == (1, 1, 1)
    assert alone.json("pause", "echo") == {"batch": "echo", "changed": True, "state": "paused"}
    assert alone.json("wait", "echo", code=6)["outcome"] == "paused"
    assert alone.json("resume", "echo")["state"] == "open"
    assert alone.json("weight", "echo", "0.5") == {"batch": "echo", "weight": 0.5}
    assert alone.json("wait", "echo", "--timeout", "0.2", code=5)["outcome"] == "timeout"
    assert alone.json("cancel", "echo")["state"] == "cancelled"
    assert alone.json("cancel", "echo")["changed"] is False
    assert alone.json("wait", "echo", code=3)["outcome"] == "cancelled"
    listed = alone.json("batches")
    assert [(batch["name"], batch["weight"], batch["note"]) for batch in listed] == [
        ("half", 1.0, ""),
        ("echo", 0.5, "first [bold] try"),
    ]
    assert [batch["tags"] for batch in listed] == [[], ["paper", "seed=1"]]
    (submitter,) = {batch["submitter"] for batch in listed}
    assert submitter == getpass.getuser()
    assert [batch["name"] for batch in alone.json("batches", "--tag", "paper", "--submitter", submitter)] == ["echo"]
    assert alone.json("batches", "--tag", "pap") == alone.json("batches", "--submitter", "nobody") == []
    refused = alone.json("submit", "echo.yaml", "--tag", "two words", code=2, as_error=True)
    assert "is no tag" in refused["error"]
    assert "nobody called" in alone.json("share", "nobody", code=2, as_error=True)["error"]
    assert alone.json("share", submitter, "3") == {"submitters": [{"name": submitter, "weight": 3.0}]}
    assert alone.json("share", "guest", "0.5")["submitters"] == [{"name": "guest", "weight": 0.5}]
    assert [one["name"] for one in alone.json("share")["submitters"]] == sorted([submitter, "guest"])
    assert [batch["name"] for batch in alone.json("batches", "e*", "--state", "cancelled")] == ["echo"]
    assert alone.json("batches", "x*") == []
    saved = alone.json("backup", "backups")
    assert (saved["batches"], saved["jobs"], saved["records"]) == (2, 31, 0)
    alone.environment["NETASSAY_HOME"] = "elsewhere"
    assert alone.json("restore", "backups")["batches"] == 2
    assert alone.json("restore", saved["path"])["skipped"] == 2
    assert alone.json("batches") == listed
    assert "holds no backup" in alone.json("restore", ".", code=2, as_error=True)["error"]


def test_methods_and_one_job(alone: Cli) -> None:
    names = [line["name"] for line in alone.json("methods")]
    assert names == sorted(names)
    certify = alone.json("methods", "verification.certify")
    assert [reference[:5] for reference in certify["references"]] == ["Zhang", "Gowal", "Madry"]
    (radius,) = [field for field in certify["fields"] if field["name"] == "radius"]
    assert radius == {
        "name": "radius", "type": "number", "bounds": ">= 0.0", "required": True, "default": None,
        "meaning": "radius of a ball, in units of the input",
    }  # fmt: skip
    assert alone.json("run", "diagnostics.echo", "value=7")["result"] == {"value": 7, "square": 49}


@pytest.mark.parametrize("name", catalogue.names())
def test_each_method_is_told_in_full(name: str) -> None:
    (line,) = CliRunner().invoke(app, ["methods", name, "--json"]).stdout.splitlines()
    about = validated("methods", line)
    assert about["name"] == name
    assert about["answers"]
    untold = [field["name"] for field in about["fields"] if field["type"] == "anything" and not field["meaning"]]
    assert not untold, "a field of any type has to say what it is"
    if not name.startswith("diagnostics."):
        assert about["references"]


ERRORS: dict[str, tuple[list[str], int, str]] = {
    "no store": (["watch", "nothing"], 2, "netassay up"),
    "unknown method": (["methods", "verification.certifi"], 2, "nearest"),
    "unknown option": (["status", "--jsn"], 2, "--jsn"),
    "no file": (["submit"], 2, "FILE"),
    "no option's value": (["submit", "x.yaml", "--weight", "nan"], 2, "--weight"),
    "a number that is none": (["weight", "big", "heavy"], 2, "WEIGHT"),
    "a negative limit": (["batches", "--limit", "-1"], 2, "--limit"),
    "a failure of the job": (["run", "diagnostics.fail", "cause=numerical"], 2, "failed as asked"),
    "no such file": (["submit", "missing.yaml"], 2, "missing.yaml"),
}


@pytest.mark.parametrize("words, code, part", ERRORS.values(), ids=ERRORS)
def test_an_error_is_an_object_with_the_exit_code(alone: Cli, words: list[str], code: int, part: str) -> None:
    said = alone.json(*words, code=code, as_error=True)
    assert part in said["error"]
    assert said["exit_code"] == code


def test_an_error_of_a_sweep_lists_its_rows(alone: Cli) -> None:
    (alone.folder / "bad.yaml").write_text("jobs: {method: diagnostics.burn, grid: {seconds: [0.1, -1, -2]}}")
    rows = alone.json("submit", "bad.yaml", code=2, as_error=True)["rows"]
    assert len(rows) == 2
    assert all("seconds" in row for row in rows)


def test_numbers_that_json_does_not_know_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    from producer.cli.common import print_output

    result = {"nan": float("nan"), "list": [float("inf"), 1.0]}
    print_output("run", {"method": "a.b", "key": "00", "seconds": 0.0, "result": result})
    said = validated("run", capsys.readouterr().out)
    assert said["result"] == {"nan": {"float": "nan"}, "list": [{"float": "inf"}, 1.0]}
