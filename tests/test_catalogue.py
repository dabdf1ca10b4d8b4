"""The folder tree is the registry."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import netassay.methods
from netassay import catalogue
from netassay.errors import UserError

METHOD = '''"""{claim}"""
from netassay.method import Contract
VERSION = 1
EXAMPLE = {{"jobs": []}}
class Params(Contract):
    x: int = 0
class Result(Contract):
    x: int
def run(params: Params) -> Result:
    return Result(x=params.x + 1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user's own methods, with `mine.increment` in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "increment.py").write_text(METHOD.format(claim="One more."))
    monkeypatch.setenv("NETASSAY_METHODS", str(tmp_path))
    yield tmp_path
    catalogue._sources.cache_clear()


def test_every_module_of_a_family_is_a_method_and_nothing_else() -> None:
    root = Path(netassay.methods.__path__[0])
    found = {f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py") if not path.stem.startswith("_")}
    found |= {f"{path.parent.parent.name}.{path.parent.name}" for path in root.glob("*/[a-z]*/__init__.py")}
    assert set(catalogue.names()) == found
    assert catalogue.names() == sorted(catalogue.names())


@pytest.mark.parametrize("name", catalogue.names())
def test_claim_read_from_the_source_is_the_modules_own(name: str) -> None:
    assert catalogue.claim(name) == catalogue.get(name).claim


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(catalogue.UnknownMethod, match=r"'diagnostics.ekko'; nearest: diagnostics\.echo"):
        catalogue.get("diagnostics.ekko")


def test_search_wants_every_word_in_any_case() -> None:
    assert "diagnostics.sleep" in catalogue.search("SLEEPS job")
    assert catalogue.search("sleeps zebra") == []


def test_a_users_folder_adds_methods(folder: Path) -> None:
    assert "mine.increment" in catalogue.names()
    method = catalogue.get("mine.increment")
    assert method.run(method.Params(x=1)) == method.Result(x=2)
    assert catalogue.claim("mine.increment") == "One more."


def test_a_package_and_not_its_private_modules_is_a_method(folder: Path) -> None:
    (folder / "mine" / "large").mkdir()
    (folder / "mine" / "large" / "__init__.py").write_text(METHOD.format(claim="A package."))
    (folder / "mine" / "_helper.py").write_text("")
    (folder / "mine" / "notes.txt").write_text("")
    (folder / "_hidden").mkdir()
    (folder / "_hidden" / "method.py").write_text("")
    mine = set(catalogue.names()) - set(catalogue._modules_below(Path(netassay.methods.__path__[0])))
    assert mine == {"mine.increment", "mine.large"}


def test_a_name_given_twice_is_an_error(folder: Path) -> None:
    (folder / "diagnostics").mkdir()
    (folder / "diagnostics" / "echo.py").write_text(METHOD.format(claim="Another echo."))
    with pytest.raises(ValueError, match=r"two methods are called diagnostics\.echo.*rename one"):
        catalogue.names()


def test_two_folders_of_the_same_name_clash_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETASSAY_METHODS", f"{folder}{os.pathsep}{folder}")
    with pytest.raises(ValueError, match=r"two methods are called mine\.increment"):
        catalogue.names()


def test_a_module_that_lacks_a_part_says_which(folder: Path) -> None:
    (folder / "mine" / "empty.py").write_text("VERSION = 1")
    with pytest.raises(TypeError, match=r"mine\.empty .*lacks a docstring, Params, Result, run, EXAMPLE"):
        catalogue.get("mine.empty")


def test_an_entry_point_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("other.echo", "netassay.methods.diagnostics.echo", "netassay.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    catalogue._sources.cache_clear()
    try:
        assert "other.echo" in catalogue.names()
        assert catalogue.get("other.echo").name == "other.echo"
        assert catalogue.claim("other.echo") == catalogue.claim("diagnostics.echo")
    finally:
        catalogue._sources.cache_clear()


def points(monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    found = [importlib.metadata.EntryPoint("other.echo", module, catalogue.GROUP) for module in modules.values()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    catalogue._sources.cache_clear()


def test_two_packages_with_a_method_of_one_name_give_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, one="netassay.methods.diagnostics.echo", other="netassay.methods.diagnostics.sleep")
    try:
        assert "other.echo" not in catalogue.names()
        assert "both give a method of this name" in catalogue.broken()["other.echo"]
        with pytest.raises(catalogue.BrokenMethod, match=r"other\.echo cannot be used"):
            catalogue.get("other.echo")
        assert catalogue.get("diagnostics.echo").version == 1
    finally:
        catalogue._sources.cache_clear()


def test_the_same_entry_point_found_twice_is_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, one="netassay.methods.diagnostics.echo", again="netassay.methods.diagnostics.echo")
    try:
        assert "other.echo" in catalogue.names()
        assert catalogue.broken() == {}
    finally:
        catalogue._sources.cache_clear()


def test_folders_given_by_a_program_stand_in_for_those_of_the_environment(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    (other / "theirs").mkdir(parents=True)
    (other / "theirs" / "increment.py").write_text(METHOD.format(claim="Another one."))
    with catalogue.using(str(other)):
        assert {"theirs.increment"} == {name for name in catalogue.names() if name.endswith("increment")}
        with pytest.raises(catalogue.UnknownMethod):
            catalogue.get("mine.increment")
    assert "mine.increment" in catalogue.names()
    with catalogue.using(""):
        assert "mine.increment" in catalogue.names()


def test_errors_that_a_user_can_mend_are_told_as_such(folder: Path) -> None:
    (folder / "mine" / "raises.py").write_text('"""One that raises."""\nraise OSError(5, "no such device")\n')
    with pytest.raises(UserError, match=r"OSError: .*no such device \(in .*raises\.py, line 2\); mend its module"):
        catalogue.get("mine.raises")
    (folder / "diagnostics").mkdir()
    (folder / "diagnostics" / "echo.py").write_text(METHOD.format(claim="Another echo."))
    catalogue._sources.cache_clear()
    with pytest.raises(UserError, match="rename one"):
        catalogue.names()
