"""The README's tour, typed as it stands by somebody who has nothing but the examples: on an embedded lab, and with only
the three settings of a cluster changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars
import pytest
from labs import KINDS, Lab, a_lab

from netassay.store import reading

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
#: The sections that are typed, in this order; `## For a team` has the three settings, with hosts of nobody's.
TYPED = ("Five minutes", "How to write a method")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].partition("\n## ")[0]


@dataclass(frozen=True)
class Step:
    """One block of the page: what is typed into the shell or into Python, or a file that is saved (its `path`)."""

    language: str
    code: str
    path: str = ""

    @property
    def typed(self) -> str:
        if self.path:
            return f"mkdir -p {Path(self.path).parent}\ncat > {self.path} <<'END OF FILE'\n{self.code}END OF FILE"
        return self.code if self.language == "sh" else f"python - <<'END OF PYTHON'\n{self.code}END OF PYTHON"


STEPS = [
    Step(language, code, path)
    for title in TYPED
    for path, language, code in re.findall(r"(?:<!-- example: (\S+) -->\n)?```(\w+)\n(.*?)```", section(title), re.S)
    if language in ("sh", "python")
]


@dataclass
class Tour:
    """A finished tour. said: what each step wrote, both streams together."""

    lab: Lab
    kind: str
    folder: Path
    said: list[str]

    def after(self, command: str) -> str:
        """What the one step wrote in which this command stands."""
        (place,) = (place for place, step in enumerate(STEPS) if command in step.code)
        return self.said[place]

    def counts(self, batch: str) -> tuple[int, int, int]:
        """(jobs, done, failed)"""
        found = self.lab.progress(batch)
        return found.size, found.done, found.failed


@pytest.fixture(scope="module", params=KINDS)
def tour(request: pytest.FixtureRequest) -> Iterator[Tour]:
    with a_lab(request.param, start=False) as lab:
        folder = lab.home / "here"
        folder.mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / ".venv").symlink_to(sys.prefix)
        lab.home = folder / ".netassay"  # where a lab lies whose user says nothing about it
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
        if lab.server is not None:
            three = {"BROKER": lab.server.url, "STORE": lab.store, "ARTIFACTS": lab.config.artifacts}
            environment |= {f"NETASSAY_{name}": value for name, value in three.items()}
        script = "set -e\n" + "".join(f"echo '=== step {place}'\n{step.typed}\n" for place, step in enumerate(STEPS))
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{lab.logs()}"
        said = re.split(r"^=== step \d+\n", done.stdout, flags=re.MULTILINE)[1:]
        yield Tour(lab, request.param, folder, said)


def test_the_lab_comes_up_and_says_what_can_be_asked(tour: Tour) -> None:
    said = tour.after("netassay doctor")
    assert "lab up in" in said
    assert "all is well" in said
    assert "networks.describe" in said
    assert "radius of a ball, in units of the input" in " ".join(said.split())  # of the method's own table of fields


def test_the_sweep_runs_to_its_end_and_the_figure_is_drawn(tour: Tour) -> None:
    said = tour.after("--dry-run")
    assert "402 jobs; nothing was stored (dry run)" in said
    assert "batch first: 402 jobs, 402 new" in said
    assert "first: 402 jobs, 402 done; finished" in said
    certified = {}
    for line in said.splitlines():
        if match := re.match(r"(standard|certified) +(0\.0[25]) +100 +([\d.]+)%", line):
            certified[match[1], float(match[2])] = float(match[3])
    header = next(line for line in said.splitlines() if line.startswith("network "))
    assert header.split()[:4] == ["network", "radius", "jobs", "certified"]
    assert len(certified) == 4
    assert certified["standard", 0.02] > certified["standard", 0.05]
    assert certified["certified", 0.05] > certified["standard", 0.05]
    assert "<svg" in (tour.folder / "first.svg").read_text()


def test_records_come_out_as_a_table_as_parquet_and_as_csv(tour: Tour) -> None:
    said = tour.after("certified.parquet")
    assert "... and 395 more" in said
    assert "200 records: certified.parquet" in said
    frame = polars.read_parquet(tour.folder / "certified.parquet")
    assert frame.height == 200
    assert frame.schema["radius"] == polars.Float64
    assert set(frame["verdict"]) <= {"certified", "falsified", "unknown"}
    assert polars.read_csv(tour.folder / "first.csv", infer_schema_length=None).height == 402


def test_rows_with_a_mistake_are_refused_with_their_line_and_the_others_run(tour: Tour) -> None:
    said = tour.after("cat > rows.csv")
    assert "2410" in said  # parameters of the network that was written by PyTorch
    assert said.count("line 4: radius is -1, must be at least 0.0") == 2
    assert said.index("1 error, nothing was submitted") < said.index("exit code 2") < said.index("batch rows: 2 jobs")
    assert tour.counts("rows") == (2, 2, 0)


def test_failures_are_explained_retried_and_cancelled_with_the_exit_codes_of_the_page(tour: Tour) -> None:
    said = tour.after("--name trouble")
    assert "exit code 1: some jobs failed" in said
    assert "b58f055d90ad: failed with cause error" in said
    assert "raise _RAISED[params.cause](params.message)" in said
    assert "1 job of trouble gets a new start" in said
    assert [line for line in said.splitlines() if line.startswith("nap")][-4:] == [
        "nap paused; go on with: netassay resume nap",
        "nap goes on",
        "nap cancelled",
        "nap: 1 job, 0 done, 1 cancelled; cancelled",
    ]
    assert "exit code 3: cancelled" in said


def test_a_batch_from_python_ends_in_a_frame_and_a_figure(tour: Tour) -> None:
    assert "certified" in tour.after("batch.frame()")
    assert tour.counts("mine") == (150, 150, 0)
    assert "<svg" in (tour.folder / "mine.svg").read_text()


def test_a_method_of_ones_own_is_listed_runs_and_is_drawn(tour: Tour) -> None:
    said = tour.after("netassay plot shares")
    assert "Share of a network's weights that are nearly zero." in said
    assert tour.counts("shares") == (3, 3, 0)
    shares = [record.result["share"] for record in tour.lab.records("shares") if record.result]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]
    assert (tour.folder / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_all_records_are_where_the_settings_say_and_no_process_is_left(tour: Tour) -> None:
    names = {batch.name for batch in reading.batches(tour.lab.database)}
    assert names == {"first", "rows", "trouble", "nap", "mine", "shares"}
    assert (tour.lab.home / "store.sqlite").exists() == (tour.kind == "embedded")
    assert (tour.lab.home / "artifacts").exists() == (tour.kind == "embedded")
    assert not tour.lab.processes()
