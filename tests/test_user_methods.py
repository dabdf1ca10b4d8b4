"""A user's own method, in a folder or as an installed package, is a method like any other, with no edit here."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import labs
import pytest
from labs import Lab, until, variables

import producer
from netassay import catalogue
from netassay.settings import settings
from producer.lab import environment_of
from producer.sweeps import BadSweep

METHOD = '''"""A power of a number.

    power = x^exponent

x is any number, the exponent a whole one. Cost: none to speak of.

Reference: Euclid. Elements. 300 BC.
"""

from netassay.figure import Axis, Figure, Line, Panel
from netassay.fields import Count, Real
from netassay.method import Contract, Needs
{imports}
VERSION = {version}
NEEDS = Needs(seconds=0.001, libraries=())
EXAMPLE = {{"jobs": [{{"method": "{name}", "params": {{"x": 3}}, "grid": {{"exponent": [1, 2, 3]}}}}]}}


class Params(Contract):
    x: Real
    exponent: Count = 2


class Result(Contract):
    power: float
    by: int


def run(params: Params) -> Result:
    return Result(power=params.x**params.exponent, by=VERSION)


def plot(records: list) -> Figure:
    line = Line(x=[r.params["x"] for r in records], y=[r.result["power"] for r in records])
    return Figure(title="Powers", panels=[Panel(marks=[line], x=Axis(label="x"), y=Axis(label="power"))])
'''
PYPROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "numbers-of-mine"
version = "1.2"

[project.entry-points."netassay.methods"]
"numbers.power" = "numbers_of_mine.power"
{more}
"""


@dataclass(frozen=True)
class Added:
    """One method beyond those of the tree. file: its module, as a lab sees it. environment: what makes it known."""

    name: str
    file: Path
    environment: dict[str, str]

    def write(self, version: int, imports: str = "") -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Python takes compiled code for current where size and second of its source are the same.
        shutil.rmtree(self.file.parent / "__pycache__", ignore_errors=True)
        self.file.write_text(METHOD.format(name=self.name, version=version, imports=imports))

    def entry(self, **rest: object) -> dict[str, object]:
        return {"method": self.name, **rest}


def in_folder(folder: Path) -> Added:
    added = Added("mine.power", folder / "mine" / "power.py", {"NETASSAY_METHODS": str(folder)})
    added.write(1)
    return added


def as_package(folder: Path, more: str = "") -> Added:
    """A package, built and installed by pip into a folder of its own."""
    source, site = folder / "source", folder / "site"
    (source / "numbers_of_mine").mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT.format(more=more))
    # Listing methods must not import a package: this one would be noticed.
    (source / "numbers_of_mine" / "__init__.py").write_text("import os\nos.environ['NUMBERS_OF_MINE'] = 'imported'\n")
    Added("numbers.power", source / "numbers_of_mine" / "power.py", {}).write(1)
    pip = "pip install --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check"
    subprocess.run(
        [sys.executable, "-m", *pip.split(), "--target", str(site), str(source)], check=True, capture_output=True
    )
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return Added("numbers.power", site / "numbers_of_mine" / "power.py", {"PYTHONPATH": paths})


KINDS = {"folder": in_folder, "package": as_package}


@pytest.fixture(params=KINDS, scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Added]:
    """The method, known to this process and to all that it starts."""
    found = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    with known(found):
        yield found


@pytest.fixture
def added(installed: Added) -> Added:
    """The same, as it was first."""
    installed.write(1)
    return installed


class known(AbstractContextManager):
    """An added method is in the catalogue for the time of the block."""

    def __init__(self, added: Added) -> None:
        self.added = added
        self.variables = variables(added.environment)

    def __enter__(self) -> None:
        self.variables.__enter__()
        self.paths = list(sys.path)
        sys.path[:0] = filter(None, self.added.environment.get("PYTHONPATH", "").split(os.pathsep))
        self.forget()

    def __exit__(self, *error: object) -> None:
        self.variables.__exit__(*error)
        sys.path[:] = self.paths
        self.forget()

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.startswith(("numbers_of_mine", "netassay_user_methods"))]:
            del sys.modules[name]
        importlib.invalidate_caches()
        settings.cache_clear()
        catalogue._sources.cache_clear()
        catalogue._load.cache_clear()


@pytest.fixture(params=labs.KINDS, scope="module")
def started(request: pytest.FixtureRequest, installed: Added) -> Iterator[Lab]:
    with labs.a_lab(request.param, slots=1, METHODS=installed.environment.get("NETASSAY_METHODS", "")) as found:
        yield found


@pytest.fixture
def lab(started: Lab, added: Added) -> Lab:
    """The lab, in which no child has loaded the method."""
    renew_children(started)
    return started


def renew_children(lab: Lab) -> None:
    for child in lab.children():
        os.kill(child, signal.SIGKILL)
    until(lambda: not any(map(labs.alive, lab.children())), what="the children to end")


# --- in the catalogue ---------------------------------------------------------------------------------------------


def test_it_is_listed_searched_and_shown_without_being_imported(added: Added) -> None:
    os.environ.pop("NUMBERS_OF_MINE", None)
    assert added.name in catalogue.names()
    assert catalogue.claim(added.name) == producer.methods("power of number")[added.name] == "A power of a number."
    assert "NUMBERS_OF_MINE" not in os.environ, "listing imported the package"
    assert catalogue.broken() == {}
    command = [sys.executable, "-m", "producer.cli", "methods", added.name]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(words in shown for words in ("power = x^exponent", "exponent", "Euclid"))
    assert producer.method(added.name).doc.startswith("A power of a number.")


def test_it_runs_in_this_process_and_its_params_are_checked(added: Added) -> None:
    assert producer.run(added.name, x=3).power == 9  # type: ignore[attr-defined]
    with pytest.raises(BadSweep, match="exponent is 0, must be at least 1"):
        producer.run(added.name, x=3, exponent=0)


BROKEN = {
    "numbers.gone": ("numbers_of_mine.gone", "there is no module numbers_of_mine.gone"),
    "numbers.nowhere": ("no_such_package.method", "there is no module no_such_package.method"),
    "numbers.part": ("numbers_of_mine.power:run", "no name of a module"),
    "nodot": ("numbers_of_mine.power", "must be family.name"),
}


def test_broken_entry_points_are_listed_with_the_reason_and_break_no_other(tmp_path: Path) -> None:
    more = "\n".join(f'"{name}" = "{value}"' for name, (value, _) in BROKEN.items())
    with known(as_package(tmp_path, more + '\n"diagnostics.echo" = "numbers_of_mine.power"')):
        assert {"numbers.power", "diagnostics.echo"} <= set(catalogue.names())
        assert not BROKEN.keys() & set(catalogue.names())
        broken, listed = catalogue.broken(), producer.methods()
        for name, (_, reason) in BROKEN.items():
            assert reason in broken[name], broken[name]
            assert "numbers-of-mine 1.2" in broken[name], "which package is to be mended"
            assert listed[name].startswith("(broken)")
            with pytest.raises(catalogue.BrokenMethod, match=f"{name} cannot be used"):
                catalogue.get(name)
        (hidden,) = [reason for name, reason in broken.items() if name.startswith("diagnostics.echo of")]
        assert "rename" in hidden
        assert catalogue.claim("diagnostics.echo") != "A power of a number.", "a package must not replace ours"
        assert catalogue.get("numbers.power").version == 1


def test_a_package_that_raises_at_import_is_named_with_its_line(tmp_path: Path) -> None:
    package = as_package(tmp_path)
    package.write(1, imports="import no_such_library")
    with known(package):
        assert "numbers.power" in catalogue.names()
        with pytest.raises(
            catalogue.BrokenMethod, match=r"No module named 'no_such_library' \(in .*power\.py, line \d+"
        ):
            catalogue.get("numbers.power")
        with pytest.raises(BadSweep, match="no_such_library"):
            producer.submit([{"x": 1}], "nothing", method="numbers.power")


def test_a_file_that_is_no_python_is_listed_as_broken_and_the_others_work(tmp_path: Path) -> None:
    added = in_folder(tmp_path)
    (tmp_path / "mine" / "half.py").write_text('"""Half a method."""\ndef run(:\n')
    with known(added):
        assert "SyntaxError" in catalogue.broken()["mine.half"]
        assert "half.py, line 2" in producer.methods()["mine.half"]
        assert producer.run("mine.power", x=2).power == 4  # type: ignore[attr-defined]


def test_a_method_written_while_a_process_runs_is_found_by_it(tmp_path: Path) -> None:
    with known(in_folder(tmp_path)):
        with pytest.raises(catalogue.UnknownMethod):
            catalogue.get("mine.later")
        Added("mine.later", tmp_path / "mine" / "later.py", {}).write(7)
        assert catalogue.get("mine.later").version == 7


# --- in a lab -----------------------------------------------------------------------------------------------------


def test_it_validates_runs_and_plots_in_a_lab(added: Added, lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(BadSweep, match="exponent is 0, must be at least 1"):
        producer.submit([{"x": 1, "exponent": 0}], "bad", method=added.name, settings=lab.config)
    rows = [{"x": x, "exponent": 3} for x in range(50)]
    batch = producer.submit(rows, "powers", method=added.name, settings=lab.config)
    assert batch.wait(timeout=labs.PATIENCE, bar=False).done == 50
    frame = batch.frame()
    assert frame["power"].to_list() == [x**3 for x in range(50)]
    batch.plot().save(tmp_path / "powers.svg")
    assert "Powers" in (tmp_path / "powers.svg").read_text()


def test_a_method_upgraded_under_a_running_lab_is_run_as_upgraded(added: Added, lab: Lab, tmp_path: Path) -> None:
    def submit(name: str, *xs: int) -> None:
        """From a process of its own, which sees the module as it is now; this one has loaded it."""
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"name": name, "jobs": added.entry(grid={"x": xs})}))
        environment = os.environ | environment_of(lab.config)
        command = [sys.executable, "-m", "producer.cli", "submit", str(path)]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    submit("before", 11, 12, 13)
    lab.wait("before")
    added.write(2)
    submit("after", 11, 12, 13)
    lab.wait("after")
    assert lab.query("SELECT count(*) FROM attempt")[0][0] == 0, "no child died of it"
    assert [record.result for record in lab.records("after")] == [{"power": x**2, "by": 2} for x in (11, 12, 13)]
    assert [record.result for record in lab.records("before")] == [{"power": x**2, "by": 1} for x in (11, 12, 13)]


#: What is wrong with a method -> what the pause says. Each of the three in both labs and by both ways, in six runs
#: instead of twelve, three of them among the long ones: a batch waits a quarter of a minute before it pauses.
LACKS = {
    "gone": ["cannot load", "resume the batch"],
    "import": ["cannot load", "No module named 'not_on_this_worker'", "install what it needs", "resume the batch"],
    "exit": ["cannot load", "SystemExit", "mend its module"],
}


@pytest.mark.parametrize(
    "installed, started, what",
    [
        ("folder", "embedded", "gone"),
        ("folder", "cluster", "import"),
        ("package", "cluster", "exit"),
        pytest.param("folder", "embedded", "exit", marks=pytest.mark.slow),
        pytest.param("package", "embedded", "import", marks=pytest.mark.slow),
        pytest.param("package", "cluster", "gone", marks=pytest.mark.slow),
    ],
    indirect=["installed", "started"],
)
def test_a_batch_whose_method_no_worker_can_load_pauses_itself_and_goes_on_when_one_can(
    added: Added, lab: Lab, what: str
) -> None:
    words = LACKS[what]
    batch = producer.submit([{"x": 21}, {"x": 22}], f"before-{what}", method=added.name, settings=lab.config)
    until(lambda: batch.progress().over)
    match what:
        case "gone":
            added.file.unlink()
        case "import":
            added.write(1, imports="import not_on_this_worker")
        case "exit":
            added.write(1, imports="raise SystemExit(3)")
    renew_children(lab)
    first = {"gone": 31, "import": 41, "exit": 51}[what]  # no other case has computed them
    paused = producer.submit([{"x": first}, {"x": first + 1}], what, method=added.name, settings=lab.config)
    until(lambda: paused.progress().state == "paused")
    message = paused.progress().reason
    assert paused.progress().waiting == 2, "no job is to blame"
    if what == "gone":
        in_package = ["there is no module", "numbers-of-mine 1.2"]
        words = [*words, *(["NETASSAY_METHODS", "package installed"] if lab.config.methods else in_package)]
    assert not [word for word in words if word not in message], message
    added.write(1)
    paused.resume()
    assert paused.wait(timeout=labs.PATIENCE, bar=False).done == 2
