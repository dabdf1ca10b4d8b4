"""From what users write for a network or dataset to the reference that stands in keys: a file, a recipe, a name.

A sweep's files are read and checked while its rows are validated, but copied into the artifacts only by `commit`, when
every row is known to be good: nothing is stored on bad input.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netassay import data, job
from netassay.errors import UserError
from netassay.fields import REFERENCE, ReferenceTo
from netassay.method import InvalidInput
from netassay.store import artifacts
from netassay.store.artifacts import Artifacts
from producer import wording

if TYPE_CHECKING:
    from netassay.data import files


class ChangedFile(UserError, ValueError):
    """A file is not what it was when the sweep was checked."""


class Resolver:
    """Turns a value of a reference field into a finished reference; pydantic's validation context calls it.

    Takes a finished reference whose artifact is kept, a name from `networks`, the path of an ONNX file, a recipe as a
    mapping, or `{recipe: ...}`; for a property the path of a VNN-LIB file, or `{vnnlib: text}`; for a dataset a
    bundled name, a name from `datasets`, the path of an .npz, .csv or .parquet file, `{file: path, ...}` or
    `{generator: kind, ...}`. Values seen before cost a look-up: files are read once for each kind of field.

    base: the folder that relative paths start from. networks, datasets: the sweep's own names. store: where artifacts
    are kept; None: the lab's. at_once: keep each file and recipe as soon as it is resolved, instead of at `commit`.

    names: reference -> the user's name for it: the key in `networks` or `datasets`, else the file's name, else such as
    `mlp-ibp-seed0`; never the same name for two references.
    """

    def __init__(
        self,
        base: Path,
        networks: Mapping[str, Any] | None = None,
        store: Artifacts | None = None,
        at_once: bool = False,
        datasets: Mapping[str, Any] | None = None,
    ) -> None:
        self.base, self.networks, self.at_once = Path(base), dict(networks or {}), at_once
        self.datasets = dict(datasets or {})
        self.store = store if store is not None else artifacts.current()
        self.names: dict[str, str] = {}
        # (value, kind of field) -> (value, reference or empty, what is wrong or empty)
        self._found: dict[tuple[Any, ReferenceTo], tuple[Any, str, str]] = {}
        self._files: dict[str, Path] = {}
        self._recipes: dict[str, str] = {}  # and other texts: reference -> text
        self._tables: dict[str, tuple[Path, files.File]] = {}
        self._read: dict[tuple[Path, files.File], str] = {}
        self._kept: set[str] = set()
        self._scopes: dict[tuple[Path, int, int], Any] = {}

    def enter(self, base: Path, networks: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
        """Take relative paths from `base`, and names from these, from here on: each file of a sweep has its own."""
        self.base, self.networks, self.datasets = base, dict(networks), dict(datasets)
        # The mappings are kept beside the answers, so that their ids stay their own.
        scope = (base, id(networks) if networks else 0, id(datasets) if datasets else 0)
        *_, self._found = self._scopes.setdefault(scope, (networks, datasets, {}))

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
        sources = {reference: (path, None) for reference, path in self._files.items()}
        for reference, (path, options) in {**sources, **self._tables}.items():
            if reference in self._kept:
                continue
            # The bytes hashed here are the bytes written, so a file that changes meanwhile cannot lie about its digest.
            # Datasets are read twice for that: they are too large to be held until all rows are validated.
            try:
                data = _content(reference, path, options)
            except (OSError, InvalidInput):
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
        if "vnnlib" in wanted.kinds and not (isinstance(value, str) and REFERENCE.match(value)):
            return self._property(value)
        if "data" in wanted.kinds and not (isinstance(value, str) and REFERENCE.match(value)):
            return self._dataset(value, wanted, name)
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
        resolved = reference in self._files or reference in self._recipes or reference in self._tables
        if not resolved and not self.store.has(reference):
            raise ValueError(
                f"{reference} is not among the artifacts in {self.store}; give the file or recipe itself, or "
                "point NETASSAY_ARTIFACTS at the folder that holds it"
            )
        if kind == "onnx" and wanted.analysable and reference not in self._files:
            from netassay.networks import onnx_file

            try:
                onnx_file.check(self.store.read(reference), analysable=True)
            except onnx_file.NetworkFileError as error:
                raise ValueError(f"{name or reference}: {error}") from None
        if kind in ("data", "generator") and not data.is_known(reference):
            try:
                data.register(reference, data.facts_of(reference, self.store.read(reference)))
            except InvalidInput as error:
                raise ValueError(f"{name or reference}: {error}") from None
        if name:
            self._call(reference, [name])
        return reference

    def _path(self, value: str) -> Path:
        """Of a file that is there only packed, the packed one: the competition's lists name files as unpacked."""
        path = self._from_base(value)
        packed = path.parent / f"{path.name}.gz"
        return packed if not path.exists() and _is_file(packed) else path

    def _from_base(self, value: str) -> Path:
        """Raises ValueError where the system knows no such name: it is too long, say."""
        path = self.base / os.path.expanduser(value)
        try:
            path.exists()
        except OSError as error:
            raise ValueError(f"{value[:60]!r}... cannot be a file: {error.strerror}") from None
        return path

    def _file(self, value: str, wanted: ReferenceTo, name: str) -> str:
        path = self._path(value)
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

        recipe = Recipe.parse(mapping, resolve=self)
        text = job.canonical(recipe)
        reference = f"recipe:{_digest(text.encode())}"
        self._recipes.setdefault(reference, text)
        label = f"{recipe.architecture.kind}-{recipe.training.kind}-seed{recipe.seed}"
        usual = recipe.dataset == Recipe.model_fields["dataset"].default
        self._call(reference, [name, label, *([] if usual else [f"{label}-{data.called(recipe.dataset)}"])])
        return reference

    def _property(self, value: Any) -> str:
        """The reference of a property: the path of a file, or `{vnnlib: text}`."""
        from netassay import vnnlib

        path, name = None, ""
        try:
            if isinstance(value, str):
                path = self._path(value)
                if not path.is_file():
                    raise ValueError(f"{value!r} is {'a folder' if path.is_dir() else 'no file'} ({path})")
                name, content = value, vnnlib.from_file(path)
            elif isinstance(value, Mapping) and set(value) == {"vnnlib"} and isinstance(value["vnnlib"], str):
                name, content = "the text", value["vnnlib"].encode()
            else:
                raise ValueError(
                    f"is {wording.short(value)}, must be the path of a .vnnlib file, or {{vnnlib: its text}}"
                )
            vnnlib.check(content)
        except OSError as error:
            raise ValueError(f"{value} cannot be read: {error.strerror or error}; check its permissions") from None
        except vnnlib.PropertyError as error:
            raise ValueError(f"{name}: {error}") from None
        reference = f"vnnlib:{_digest(content)}"
        if path is None:
            self._recipes.setdefault(reference, content.decode())
            comment = next((line[1:].strip() for line in content.decode().splitlines() if line.startswith(";")), "")
            self._call(reference, [comment if len(comment) <= 40 else "", "property"])
        else:
            self._files.setdefault(reference, path)
            self._call(reference, [path.name, str(value)])
        return reference

    def _dataset(self, value: Any, wanted: ReferenceTo, name: str) -> str:
        """What stands for a dataset: the name of a bundled one, else the reference of a generator or a file.

        Its facts are registered, so that validators can check against them before anything is kept.
        """
        if isinstance(value, Mapping) and "generator" in value:
            from netassay.data import generators

            generator = generators.parse(value)
            text = generators.text(generator)
            reference = f"generator:{_digest(text.encode())}"
            self._recipes.setdefault(reference, text)
            self._call(reference, [name, generator.generator, f"{generator.generator}-seed{generator.seed}"])
            data.register(reference, generator.facts(), self.names[reference])
            return reference
        if isinstance(value, str) and value in self.datasets and not name:
            if value in data.names():
                raise ValueError(f"{value!r} under `datasets` is the name of a bundled dataset; choose another name")
            return self._resolve(self.datasets[value], wanted, name=value)
        if isinstance(value, str) and value in data.names():
            return value
        return self._table(value, name)

    def _table(self, value: Any, name: str) -> str:
        """The reference of a dataset in a file: its path, or `{file: path, ...}`."""
        from netassay.data import files

        if isinstance(value, Mapping) and "file" in value:
            options = files.parse(value)
        elif isinstance(value, str):
            options = files.File(file=value)
        else:
            raise ValueError(
                f"is {wording.short(value)}, must be the name of a dataset, the path of an .npz, .csv or .parquet "
                "file, {file: path, ...} or {generator: kind, ...}"
            )
        path = self._from_base(options.file)
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "no such file"
            near = wording.nearest(options.file, [*self.datasets, *data.names()])
            raise ValueError(
                f"there is no dataset {options.file!r}; try one of {', '.join([*data.names(), *self.datasets])}, a "
                f"generator such as {{generator: two_moons}}, or the path of a file ({kind}: {path}){near}"
            )
        # Rows of a file hold equal mappings that are not one object, and a dataset is too large to be read for each.
        if (path, options) in self._read:
            return self._read[path, options]
        try:
            content = files.content(files.read(path, options))
        except OSError as error:
            raise ValueError(
                f"{options.file} cannot be read: {error.strerror or error}; check its permissions"
            ) from None
        except files.DatasetFileError as error:
            raise ValueError(f"{options.file}: {error}") from None
        reference = f"data:{_digest(content)}"
        self._read[path, options] = reference
        self._tables.setdefault(reference, (path, options))
        self._call(reference, [name, path.name, options.file])
        data.register(reference, files.facts(content), self.names[reference])
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


def _content(reference: str, path: Path, options: files.File | None) -> bytes:
    """The bytes of a user's file that are kept under this reference. options: of a dataset."""
    if options is not None:
        from netassay.data import files

        return files.content(files.read(path, options))
    if reference.startswith("vnnlib:"):
        from netassay import vnnlib

        return vnnlib.from_file(path)
    from netassay.networks import onnx_file

    return onnx_file.from_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long once `.gz` stands behind it
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
