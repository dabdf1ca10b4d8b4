"""What the pages say, held against the code: links, verbs, settings, exit codes, and every example of a sweep."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.main import get_command

from netassay.settings import Settings
from netassay.store.artifacts import Artifacts
from producer import readers, sweeps
from producer.cli import app, common
from producer.references import Resolver

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
OPERATIONS, SWEEPS = PAGES["docs/operations.md"], PAGES["docs/sweeps.md"]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(mark, language, content) of each block; the mark is the HTML comment on the line before it, or empty."""
    return iter(re.findall(r"(?:<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def table(page: str, first: str) -> dict[str, str]:
    """First cell -> the rest of the line, of the table whose header begins with `first`."""
    rows = page.split(f"\n| {first} |", 1)[1].partition("\n\n")[0].splitlines()[2:]
    return {cells[0].strip(): "|".join(cells[1:]).strip() for cells in (row.strip("|").split("|") for row in rows)}


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings: small letters, spaces to hyphens, other marks left out."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[name])):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        there = target.is_relative_to(ROOT) and target.exists()
        if not there or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set(), {"README.md"}
    while left:
        name = left.pop()
        reached.add(name)
        links = re.findall(r"\]\(([^)\s#]+)", prose(PAGES[name]))
        left |= {os.path.normpath(Path(name).parent / link) for link in links} & PAGES.keys() - reached
    assert reached == set(PAGES)


# --- verbs, exit codes, settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_verb_and_option_that_a_page_uses_exists(name: str) -> None:
    shell = "\n".join(content for _, language, content in blocks(PAGES[name]) if language in ("sh", "ini"))
    lines = [line.partition(" #")[0] for line in shell.splitlines() if not line.startswith("#")]
    lines += re.findall(r"`(netassay [^`]+)`", prose(PAGES[name]))
    used = [command for line in lines for command in re.findall(r"(?<![\w.-])netassay ([a-z][^|<>;&]*)", line)]
    for line in used:
        verb, *words = line.split()
        assert verb in COMMANDS, f"not a verb: netassay {line}"
        known = {option for one in COMMANDS[verb].params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        # What else stands behind `run` are the fields of methods.
        assert options <= known or verb == "run", f"not its options: netassay {line}"


def test_the_table_of_verbs_names_them_all_in_the_order_of_the_help() -> None:
    assert [name.strip("`") for name in table(OPERATIONS, "verb")] == list(COMMANDS)


def test_the_table_of_exit_codes_is_that_of_the_command_line() -> None:
    constants = {value for word, value in vars(common).items() if word.isupper() and type(value) is int}
    assert constants == {common.SOME_FAILED, common.BAD_INPUT, common.CANCELLED, common.NO_ANSWER, common.TIMED_OUT,
                         common.PAUSED}  # fmt: skip
    said = {int(code): meaning for code, meaning in table(OPERATIONS, "exit code").items()}
    assert said.keys() == constants | {0, 130}
    assert "some jobs failed" in said[common.SOME_FAILED]
    assert "bad input" in said[common.BAD_INPUT]
    assert "cancelled" in said[common.CANCELLED]
    assert "disk" in said[common.NO_ANSWER]
    assert "the time" in said[common.TIMED_OUT]
    assert "paused" in said[common.PAUSED]
    assert "interrupted" in said[130]


def test_the_table_of_settings_names_each_field_and_no_other() -> None:
    named = [name.strip("`") for name in table(OPERATIONS, "variable")]
    assert sorted(named) == sorted(f"NETASSAY_{name.upper()}" for name in Settings.model_fields)


def test_the_table_of_causes_names_them_all() -> None:
    from netassay.job import CAUSES

    assert sorted(re.findall(r"`(\w+)`", " ".join(table(OPERATIONS, "cause")))) == sorted(CAUSES)


def test_every_variable_that_a_page_names_is_a_setting() -> None:
    known = {f"NETASSAY_{name.upper()}" for name in Settings.model_fields}
    named = {name for page in PAGES.values() for name in re.findall(r"NETASSAY_[A-Z_]+", page)}
    assert named <= known


# --- the tree -------------------------------------------------------------------------------------------------------


def test_what_the_tree_of_the_architecture_names_is_there() -> None:
    tree = next(content for _, _, content in blocks(PAGES["docs/architecture.md"]) if content.startswith("netassay/"))
    folder, named = Path(), []
    for line in tree.splitlines():
        inside, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folder = folder if inside else Path(name)
        named.append(folder / name if inside else folder)
    assert not [path for path in named if not (ROOT / path).exists()]
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/__init__.py")}
    assert packages - {Path("tests")} <= set(named)


# --- docs/sweeps.md -------------------------------------------------------------------------------------------------

EXAMPLES = [
    (dict(part.strip().partition(": ")[::2] for part in mark.split(";")), language, content)
    for mark, language, content in blocks(SWEEPS)
]
"""(what the mark says, language, content) of the blocks of the page, in order."""


def network(seed: int) -> bytes:
    """(batch, 64) -> (batch, 10), so that it takes the digits."""
    weight = np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return made.SerializeToString()


def unsafe(threshold: int) -> str:
    names = [f"X_{i}" for i in range(64)] + [f"Y_{j}" for j in range(10)]
    lines = [f"(declare-const {name} Real)" for name in names]
    lines += [f"(assert (and (>= {name} 0) (<= {name} 1)))" for name in names[:64]]
    return "\n".join([*lines, f"(assert (>= Y_0 {threshold}))\n"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What somebody has who follows the page: its files, saved under their names, two networks, a benchmark."""
    for place, name in enumerate(["nets/a.onnx", "nets/b.onnx", "benchmark/onnx/net.onnx"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(network(place))
    (tmp_path / "benchmark" / "vnnlib").mkdir()
    for place, name in enumerate(["first", "second"]):
        (tmp_path / "benchmark" / "vnnlib" / f"{name}.vnnlib").write_text(unsafe(100 + place))
    for about, _, content in EXAMPLES:
        if name := about.get("file") or about.get("refused"):
            (tmp_path / name).write_text(content)
    (tmp_path / "sweeps").mkdir()
    shutil.copy(tmp_path / "sizes.yaml", tmp_path / "sweeps")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("about", [about for about, *_ in EXAMPLES if "jobs" in about], ids=lambda about: about["file"])
def test_every_example_of_a_sweep_makes_as_many_jobs_as_the_page_says(
    about: dict[str, str], folder: Path, artifacts: Artifacts
) -> None:
    document = readers.read([about["file"]], about.get("method", ""))
    found = sweeps.prepare(document, Resolver(document.base, document.networks, datasets=document.datasets))
    assert (found.count, found.duplicates) == (int(about["jobs"]), 0)


def test_every_block_of_the_page_is_looked_at() -> None:
    saved = {about["file"] for about, *_ in EXAMPLES if "file" in about}
    wrong = {about["refused"] for about, *_ in EXAMPLES if "refused" in about}
    told = {about["said"] for about, *_ in EXAMPLES if "said" in about}
    assert len(saved) + len(wrong) + len(told) == sum(language != "sh" for _, language, _ in EXAMPLES)
    assert wrong == told
    # What makes no jobs of its own is what another one reads.
    apart = {about["file"] for about, *_ in EXAMPLES if "file" in about and "jobs" not in about}
    assert all(any(f"rows: {name}" in content for *_, content in EXAMPLES) for name in apart)


def netassay(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "about", [about for about, *_ in EXAMPLES if "refused" in about], ids=lambda one: one["refused"]
)
def test_mistakes_are_told_in_the_words_of_the_page(about: dict[str, str], folder: Path) -> None:
    method = f"--method {about['method']}" if "method" in about else ""
    done = netassay(folder, f"netassay submit {about['refused']} {method}")
    (told,) = [content for one, _, content in EXAMPLES if one.get("said") == about["refused"]]
    assert (done.returncode, done.stdout, done.stderr) == (common.BAD_INPUT, "", told)
    assert not (folder / ".netassay").exists()


def test_the_commands_of_the_page_can_be_typed_and_store_nothing(folder: Path) -> None:
    commands = "\n".join(content for _, language, content in EXAMPLES if language == "sh")
    done = netassay(folder, commands)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing was stored (dry run)") == commands.count("--dry-run") == 6
    assert not (folder / ".netassay").exists()
