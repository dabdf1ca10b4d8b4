"""From what users write for a network to the reference that stands in keys: a file, a recipe, or a name for one.

A sweep's files are read and checked while its rows are validated, but copied into the artifacts only by `commit`, when
every row is known to be good: nothing is stored on bad input.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netassay import job
from netassay.errors import UserError
from netassay.fields import REFERENCE, ReferenceTo
from netassay.store import artifacts
from netassay.store.artifacts import Artifacts
from producer import wording


class ChangedFile(UserError, ValueError):
    """A file is not what it was when the sweep was checked."""


class Resolver:
    """Turns a value of a reference field into a finished reference; pydantic's validation context calls it.

    Takes a finished reference whose artifact is kept, a name from `networks`, the path of an ONNX file, a recipe as a
    mapping, or `{recipe: ...}`. Values seen before cost a look-up: files are read once for each kind of field.

    base: the folder that relative paths start from. networks: the sweep's own names. store: where artifacts are kept;
    None: the lab's. at_once: keep each file and recipe as soon as it is resolved, instead of at `commit`.

    names: reference -> the user's name for it: the key in `networks`, else the file's name, else such as
    `mlp-ibp-seed0`; never the same name for two references.
    """

    def __init__(
        self,
        base: Path,
        networks: Mapping[str, Any] | None = None,
        store: Artifacts | None = None,
        at_once: bool = False,
    ) -> None:
        self.base, self.networks, self.at_once = Path(base), dict(networks or {}), at_once
        self.store = store if store is not None else artifacts.current()
        self.names: dict[str, str] = {}
        # (value, kind of field) -> (value, reference or empty, what is wrong or empty)
        self._found: dict[tuple[Any, ReferenceTo], tuple[Any, str, str]] = {}
        self._files: dict[str, Path] = {}
        self._recipes: dict[str, str] = {}
        self._kept: set[str] = set()

    def __call__(self, value: Any, wanted: ReferenceTo) -> str:
        """The reference of `value` for a field marked `wanted`.

        Raises ValueError saying what is wrong with the value and what to try.
        """
        # A mapping has no hash: its id is the key, and it is kept beside the answer so that the id stays its own.
        known = (value if isinstance(value, str) else id(value), wanted)
        found = self._found.get(known)
        if found is None:
            try:
                found = (value, self._resolve(value, wanted, name=""), "")
            except ValueError as error:
                found = (value, "", str(error))
            self._found[known] = found
            if self.at_once and not found[2]:
                self.commit()
        _, reference, wrong = found
        if wrong:
            raise ValueError(wrong)
        return reference

    def commit(self) -> None:
        """Keep all files and recipes resolved so far as artifacts; doing so again does nothing.

        Raises ChangedFile where a file changed since it was checked; files before it have been kept, which is harmless.
        """
        for reference, text in self._recipes.items():
            if reference not in self._kept:
                self.store.put(text.encode())
                self._kept.add(reference)
        for reference, path in self._files.items():
            if reference in self._kept:
                continue
            from netassay.networks import onnx_file

            # The bytes hashed here are the bytes written, so a file that changes meanwhile cannot lie about its digest.
            try:
                data = onnx_file.from_file(path)
            except (OSError, onnx_file.NetworkFileError):
                data = b""
            if _digest(data) != reference.partition(":")[2]:
                raise ChangedFile(
                    f"{path} changed or went away while the sweep was read; nothing was submitted, submit it again"
                )
            self.store.put(data)
            self._kept.add(reference)

    def _resolve(self, value: Any, wanted: ReferenceTo, name: str) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            if REFERENCE.match(value):
                return self._finished(value, wanted, name)
            if value in self.networks and not name:
                return self._resolve(self.networks[value], wanted, name=value)
            return self._file(value, wanted, name)
        if isinstance(value, Mapping):
            inner = value["recipe"] if set(value) == {"recipe"} else value
            if not isinstance(inner, Mapping):
                raise ValueError(f"recipe is {wording.short(inner)}, must be a mapping such as {{dataset: digits}}")
            return self._recipe(inner, wanted, name)
        raise ValueError(
            f"is {wording.short(value)}, must be a name from `networks`, the path of an .onnx file, or a recipe"
        )

    def _finished(self, reference: str, wanted: ReferenceTo, name: str) -> str:
        kind = reference.partition(":")[0]
        if kind not in wanted.kinds:
            raise ValueError(f"is a reference of kind {kind}, but this field takes {' or '.join(wanted.kinds)}")
        if reference not in self._files and reference not in self._recipes and not self.store.has(reference):
            raise ValueError(
                f"{reference} is not among the artifacts in {self.store.folder}; give the file or recipe itself, or "
                "point NETASSAY_ARTIFACTS at the folder that holds it"
            )
        if kind == "onnx" and wanted.analysable and reference not in self._files:
            from netassay.networks import onnx_file

            try:
                onnx_file.check(self.store.read(reference), analysable=True)
            except onnx_file.NetworkFileError as error:
                raise ValueError(f"{name or reference}: {error}") from None
        if name:
            self._call(reference, [name])
        return reference

    def _file(self, value: str, wanted: ReferenceTo, name: str) -> str:
        path = self.base / os.path.expanduser(value)
        if not path.is_file():
            named = wording.nearest(value, self.networks) or "; write its path from the sweep file's folder"
            kind = "is a folder" if path.is_dir() else "no such file"
            raise ValueError(
                f"{value!r} is neither a name under `networks` nor a file ({kind}: {path}){'' if name else named}"
            )
        if "onnx" not in wanted.kinds:
            raise ValueError(f"{value!r} is a file, but this field takes {' or '.join(wanted.kinds)}; give a mapping")
        from netassay.networks import onnx_file  # with onnx itself: only sweeps that name a file pay for it

        try:
            data = onnx_file.from_file(path)
            onnx_file.check(data, wanted.analysable)
        except OSError as error:
            raise ValueError(f"{value} cannot be read: {error.strerror or error}; check its permissions") from None
        except onnx_file.NetworkFileError as error:
            raise ValueError(f"{value}: {error}") from None
        reference = f"onnx:{_digest(data)}"
        self._files.setdefault(reference, path)
        self._call(reference, [name, path.name, value])
        return reference

    def _recipe(self, mapping: Mapping[str, Any], wanted: ReferenceTo, name: str) -> str:
        if "recipe" not in wanted.kinds:
            raise ValueError(f"is a recipe, but this field takes {' or '.join(wanted.kinds)}")
        from netassay.networks.recipes import Recipe

        recipe = Recipe.parse(mapping)
        text = job.canonical(recipe)
        reference = f"recipe:{_digest(text.encode())}"
        self._recipes.setdefault(reference, text)
        parts = (recipe.architecture.kind, recipe.training.kind, f"seed{recipe.seed}")
        self._call(reference, [name, "-".join(parts)])
        return reference

    def _call(self, reference: str, candidates: list[str]) -> None:
        """Name a reference by the first candidate that no other reference has."""
        if reference in self.names:
            return
        taken = set(self.names.values())
        wishes = [candidate for candidate in candidates if candidate]
        with_digest = f"{wishes[-1]}-{reference.partition(':')[2][:8]}"
        self.names[reference] = next((wish for wish in wishes if wish not in taken), with_digest)


def in_process() -> Resolver:
    """For a single job run in this process: paths from the working folder, files kept as soon as resolved."""
    return Resolver(Path.cwd(), at_once=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
