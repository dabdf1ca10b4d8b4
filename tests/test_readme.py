"""The method and the sweeps that the README shows. Its tour is typed by test_tour, its links are held by test_docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from producer import sweeps
from producer.references import Resolver

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_method_is_listed_runs_and_is_drawn(tmp_path: Path) -> None:
    path, source = re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL)[0]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
    environment["NETASSAY_METHODS"] = "my_methods"
    program = (
        "import json, pathlib\n"
        "from netassay import catalogue\n"
        "from netassay.job import Record\n"
        "from producer import drawing, references, sweeps\n"
        "method = catalogue.get('weights.small_share')\n"
        "resolver = references.in_process()\n"
        "prepared = sweeps.prepare(sweeps.document(method.example, pathlib.Path('.')), resolver)\n"
        "segment = prepared.segments[-1]\n"
        "records = []\n"
        "for place, text in enumerate(segment.params):\n"
        "    result = method.run(method.Params.model_validate_json(text))\n"
        "    about = (place, '', method.name, 1, json.loads(text), 'done')\n"
        "    records.append(Record(*about, result=dict(result), names=prepared.names))\n"
        "shares = [record.result['share'] for record in records]\n"
        "assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1, shares\n"
        "drawing.draw(method.plot(records), 'figure.svg')\n"
    )
    listed = subprocess.run(
        [sys.executable, "-m", "producer.cli", "methods", "weights"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Share of a network's weights that are nearly zero." in listed.stdout
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_the_sweep_it_shows_is_the_one_it_submits() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown == [(ROOT / "examples" / "first.yaml").read_text()]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_sweep_is_valid(path: Path, artifacts: object) -> None:
    document = sweeps.read(path)
    prepared = sweeps.prepare(document, Resolver(document.base, document.networks))
    rows = sum(entry.rows for entry in document.jobs)
    assert prepared.count >= rows > 0
    assert document.name
