"""The catalogue of methods: the folder tree is the registry.

`netassay/methods/<family>/<name>.py` is the method `<family>.<name>`. A user's own come from folders of the same shape
named in NETASSAY_METHODS, and from entry points of the group `netassay.methods` (name = method name, value = module).
A name given twice is an error; listing imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from netassay.errors import UserError
from netassay.method import Method

_BUILT_IN = Path(__file__).parent / "methods"


class UnknownMethod(UserError, LookupError):
    """No method of that name; the message offers the nearest ones."""

    def __init__(self, name: str) -> None:
        self.nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        super().__init__(f"no method is called {name!r}{hint} (list them: netassay methods)")


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
def _sources(user_folders: str) -> dict[str, Path | str]:
    """Method name -> its file, or the dotted module of an entry point."""
    sources: dict[str, Path | str] = dict(_modules_below(_BUILT_IN))
    found: list[tuple[str, Path | str]] = []
    for folder in filter(None, user_folders.split(os.pathsep)):
        found += _modules_below(Path(folder)).items()
    found += [(point.name, point.value) for point in importlib.metadata.entry_points(group="netassay.methods")]
    for name, source in found:
        if name in sources:
            raise ValueError(f"two methods are called {name}: {sources[name]} and {source}; rename one")
        sources[name] = source
    return sources


def _all() -> dict[str, Path | str]:
    return _sources(os.environ.get("NETASSAY_METHODS", ""))


def names() -> list[str]:
    """Names of all methods, sorted. Imports none of them."""
    return sorted(_all())


def claim(name: str) -> str:
    """First line of a method's docstring, read from its source without importing it."""
    source = _find(name)
    if isinstance(source, str):
        spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None:
            raise UnknownMethod(name)
        source = Path(spec.origin)
    return (ast.get_docstring(ast.parse(source.read_bytes())) or "").partition("\n")[0]


def _find(name: str) -> Path | str:
    try:
        return _all()[name]
    except KeyError:
        raise UnknownMethod(name) from None


def get(name: str) -> Method:
    """The method of that name.

    Raises UnknownMethod with the nearest names, TypeError where its module lacks a part of a method.
    """
    return _load(name, _find(name))


@functools.cache
def _load(name: str, source: Path | str) -> Method:
    if isinstance(source, str):
        return Method.of(name, importlib.import_module(source))
    if source.is_relative_to(_BUILT_IN):
        return Method.of(name, importlib.import_module(f"netassay.methods.{name}"))
    spec = importlib.util.spec_from_file_location(f"netassay_user_methods.{name}", source)
    if spec is None or spec.loader is None:
        raise UnknownMethod(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return Method.of(name, module)


def search(text: str) -> list[str]:
    """Names of the methods in whose name or first line every word of `text` occurs, ignoring case."""
    words = text.lower().split()
    return [name for name in names() if all(word in f"{name} {claim(name)}".lower() for word in words)]
