"""Key and result that the first example job of every method must keep: `python tests/golden/regenerate.py` writes them.

A changed key means that stored results of the method are no longer found, a changed result that they are no longer
right. So regenerate only after raising the method's VERSION, after changing its EXAMPLE, or for a new method. `--print`
shows the keys and writes nothing; `--block NAME,NAME` makes importing those libraries fail first.
"""

from __future__ import annotations

import argparse
import importlib.abc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netassay.fields import REFERENCE

KEYS = Path(__file__).with_name("keys.json")
RESULTS = Path(__file__).with_name("results.json")


class _Blocked(importlib.abc.MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{fullname} is blocked", name=fullname)


def example_keys() -> dict[str, dict[str, Any]]:
    """Method -> version, params and key of the first job of its EXAMPLE."""
    from netassay import catalogue
    from netassay.store.artifacts import Artifacts
    from producer import references, sweeps

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in catalogue.names():
            document = sweeps.document(catalogue.get(name).example, base=Path(folder), source=name)
            resolver = references.Resolver(
                document.base, document.networks, Artifacts(Path(folder) / "artifacts"), datasets=document.datasets
            )
            first = next(part for part in sweeps.prepare(document, resolver).segments if part.method == name)
            found[name] = {"version": first.version, "params": first.params[0], "key": first.keys[0].hex()}
    return found


def outline(value: Any) -> Any:
    """A stored result without what depends on the processor: arrays by shape and mean, artifacts by their kind."""
    from netassay.store import storable

    if storable.is_array(value):
        array = storable.load_array(value)
        return {"shape": list(array.shape), "dtype": str(array.dtype), "mean": float(array.mean())}
    if isinstance(value, dict):
        return {name: outline(item) for name, item in value.items()}
    if isinstance(value, list):
        return [outline(item) for item in value]
    return REFERENCE.sub(r"\1", value) if isinstance(value, str) else value


def example_results() -> dict[str, Any]:
    """Method -> outline of the result of the first job of its EXAMPLE that has one."""
    from netassay import catalogue
    from netassay.method import MethodError
    from netassay.store import artifacts, storable
    from producer import references, sweeps

    found = {}
    with tempfile.TemporaryDirectory() as folder, artifacts.using(Path(folder)):
        for name in catalogue.names():
            method = catalogue.get(name)
            document = sweeps.document(method.example, base=Path(folder), source=name)
            resolver = references.Resolver(document.base, document.networks, datasets=document.datasets)
            prepared = sweeps.prepare(document, resolver)
            resolver.commit()
            first = next(part for part in prepared.segments if part.method == name)
            for text in first.params:
                try:
                    result = method.run(method.Params.model_validate_json(text))
                except MethodError:
                    continue
                found[name] = {"params": text, "result": outline(storable.load(storable.dump(result)))}
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", dest="show")
    parser.add_argument("--block", default="")
    arguments = parser.parse_args()
    if arguments.block:
        sys.meta_path.insert(0, _Blocked(arguments.block.split(",")))
    text = json.dumps(example_keys(), indent=1, sort_keys=True) + "\n"
    if arguments.show:
        print(text, end="")
    else:
        KEYS.write_text(text)
        RESULTS.write_text(json.dumps(example_results(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
