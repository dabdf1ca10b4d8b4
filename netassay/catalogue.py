"""The catalogue of methods: the folder tree is the registry.

`netassay/methods/<family>/<name>.py` is the method `<family>.<name>`. A user's own come from folders of the same shape
named in NETASSAY_METHODS, and from entry points of the group `netassay.methods` (name = method name, value = module).
Listing imports nothing, the packages of entry points included.

Two files of one name are an error. An installed package never hides a method of the tree or of a folder, and one that
cannot be used costs nobody else a method: it is among the `broken`.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from netassay.errors import UserError
from netassay.method import Method

GROUP = "netassay.methods"
_BUILT_IN = Path(__file__).parent / "methods"
_NAME = re.compile(r"^[^\W\d]\w*\.[^\W\d]\w*$")


class UnknownMethod(UserError, LookupError):
    """No method of that name; the message offers the nearest ones."""

    def __init__(self, name: str) -> None:
        self.nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        super().__init__(f"no method is called {name!r}{hint} (list them: netassay methods)")


class MethodClash(UserError, ValueError):
    """Two files give methods of one name."""


class BrokenMethod(UserError, TypeError):
    """A method of that name is known, but its module cannot be imported or is none.

    reason: why not, without what to try. `__cause__`: what the module raised.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the method {name} cannot be used: {reason}; mend its module, or install what it needs")


@dataclass(frozen=True)
class _Point:
    """The module of an entry point, found but not imported."""

    module: str
    file: Path


@dataclass(frozen=True)
class _Sources:
    """usable: name -> its file or entry point. broken: name (or name and package) -> why it cannot be used."""

    usable: dict[str, Path | _Point] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


_folders: contextvars.ContextVar[str] = contextvars.ContextVar("folders", default="")


@contextlib.contextmanager
def using(folders: str) -> Iterator[None]:
    """Within the block, the user's folders are these, written as in NETASSAY_METHODS; empty: as it says."""
    token = _folders.set(folders)
    try:
        yield
    finally:
        _folders.reset(token)


def _modules_below(folder: Path) -> dict[str, Path]:
    found = {}
    for family in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not family.is_dir() or not family.name.isidentifier() or family.name.startswith("_"):
            continue
        for entry in sorted(family.iterdir()):
            source = entry / "__init__.py" if entry.is_dir() else entry
            stem = entry.name.removesuffix(".py")
            if source.suffix == ".py" and source.is_file() and stem.isidentifier() and not stem.startswith("_"):
                found[f"{family.name}.{stem}"] = source
    return found


@functools.cache
def _sources(user_folders: str) -> _Sources:
    sources = _Sources(dict(_modules_below(_BUILT_IN)))
    for folder in filter(None, user_folders.split(os.pathsep)):
        for name, file in _modules_below(Path(folder)).items():
            if name in sources.usable:
                raise MethodClash(f"two methods are called {name}: {sources.usable[name]} and {file}; rename one")
            sources.usable[name] = file
    points: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    for name, given in points.items():
        _add_points(sources, name, given)
    return sources


def _add_points(sources: _Sources, name: str, points: list[importlib.metadata.EntryPoint]) -> None:
    taken = sources.usable.get(name)
    if taken is not None:
        for point in points:
            sources.broken[f"{name} of {_package(point)}"] = f"{name} is {taken} here; rename the entry point"
        return
    if len({point.value for point in points}) > 1:
        packages = " and ".join(sorted(map(_package, points)))
        sources.broken[name] = f"{packages} both give a method of this name; uninstall or rename one"
        return
    found = _found(points[0])
    if isinstance(found, str):
        sources.broken[name] = f"{found} (entry point of {_package(points[0])})"
    else:
        sources.usable[name] = found


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"the package {point.dist.name} {point.dist.version}" if point.dist else "an installed package"


def _found(point: importlib.metadata.EntryPoint) -> _Point | str:
    """Where the module of an entry point lies, or why it is no method's."""
    if not _NAME.match(point.name):
        return f"{point.name!r} is no name of a method: it must be family.name"
    if not all(part.isidentifier() for part in point.value.split(".")):
        return f"{point.value!r} is no name of a module"
    try:
        spec = _spec(point.value)
    except Exception as error:  # finders of editable installations are code of others
        return f"the module {point.value} cannot be found: {type(error).__name__}: {error}"
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return f"there is no module {point.value}"
    return _Point(point.value, Path(spec.origin))


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is to be had from. Unlike `importlib.util.find_spec`, imports none of the packages around it."""
    first, *parts = module.split(".")
    spec = importlib.util.find_spec(first)
    for end in range(len(parts)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join([first, *parts[: end + 1]])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _all() -> _Sources:
    return _sources(_folders.get() or os.environ.get("NETASSAY_METHODS", ""))


def names() -> list[str]:
    """Names of all methods, sorted. Imports none of them. Raises MethodClash."""
    return sorted(_all().usable)


def broken() -> dict[str, str]:
    """Methods that are there but cannot be used, as far as can be seen without importing them: name -> why not."""
    sources = _all()
    found = dict(sources.broken)
    for name, source in sources.usable.items():
        try:
            _docstring(source)
        except (OSError, SyntaxError, ValueError) as error:
            found[name] = _why(error)
    return dict(sorted(found.items()))


def claim(name: str) -> str:
    """First line of a method's docstring, read from its source without importing it; empty where it has none or cannot
    be read (see `broken`)."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        return _docstring(_find(name)).partition("\n")[0]
    return ""


def _docstring(source: Path | _Point) -> str:
    file = source.file if isinstance(source, _Point) else source
    return _docstring_in(file, file.stat().st_mtime_ns)


@functools.cache
def _docstring_in(file: Path, changed: int) -> str:
    """changed: when the file did, so that it is parsed anew then."""
    return ast.get_docstring(ast.parse(file.read_bytes(), filename=str(file))) or ""


def _find(name: str) -> Path | _Point:
    sources = _all()
    if name not in sources.usable:
        # A method that was written, or a package installed, since this process looked.
        _sources.cache_clear()
        importlib.invalidate_caches()
        sources = _all()
    try:
        return sources.usable[name]
    except KeyError:
        if name in sources.broken:
            raise BrokenMethod(name, sources.broken[name]) from None
        raise UnknownMethod(name) from None


def get(name: str) -> Method:
    """The method of that name.

    Raises UnknownMethod with the nearest names, BrokenMethod where its module cannot be imported or lacks a part of a
    method.
    """
    return _load(name, _find(name))


@functools.cache
def _load(name: str, source: Path | _Point) -> Method:
    try:
        return _import(name, source)
    except (Exception, SystemExit) as error:  # a module may well call sys.exit
        raise BrokenMethod(name, _why(error)) from error


def _import(name: str, source: Path | _Point) -> Method:
    if isinstance(source, _Point):
        return Method.of(name, importlib.import_module(source.module))
    if source.is_relative_to(_BUILT_IN):
        return Method.of(name, importlib.import_module(f"netassay.methods.{name}"))
    spec = importlib.util.spec_from_file_location(f"netassay_user_methods.{name}", source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return Method.of(name, module)


def _why(error: BaseException) -> str:
    """`ImportError: no module named x (in /folder/mine/method.py, line 3)`."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error.msg} (in {error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    return f"{words} (in {frames[-1].filename}, line {frames[-1].lineno})" if frames else words


def search(text: str) -> list[str]:
    """Names of the methods in whose name or first line every word of `text` occurs, ignoring case."""
    words = text.lower().split()
    return [name for name in names() if all(word in f"{name} {claim(name)}".lower() for word in words)]
