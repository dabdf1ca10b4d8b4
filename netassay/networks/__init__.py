"""Networks by reference: load one as a `Graph`, keep a file, find the file a recipe stands for.

A reference is `onnx:<sha-256>` (a file among the artifacts) or `recipe:<sha-256>` (see `netassay.networks.recipes`).
Which file stands for a recipe is told with `given`; a recipe nobody has trained is trained here and now, so that a
single job runs without any lab.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping

from netassay.networks import onnx_file, recipes
from netassay.networks.graph import Graph
from netassay.store import artifacts

#: Graphs kept in memory: enough for the networks of several chunks; a graph is a few times its file.
_KEPT = 32

_given: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("networks_given", default={})  # noqa: B039

#: (folder of artifacts, recipe) -> network, trained by this process.
_trained: dict[tuple[str, str], str] = {}


def load(reference: str) -> Graph:
    """The graph of a network; one object per file, do not write to its arrays.

    Raises NetworkFileError (an InvalidInput) where the file cannot be analysed, MissingArtifact, ValueError for what is
    no reference.
    """
    return _load(resolve(reference))


@functools.lru_cache(maxsize=_KEPT)
def _load(reference: str) -> Graph:
    # The digest alone names the network, whichever folder it came from.
    return onnx_file.read(artifacts.current().read(reference))


def content(reference: str) -> bytes:
    """The bytes of a network's ONNX file. Raises MissingArtifact."""
    return artifacts.current().read(resolve(reference))


def keep(data: bytes) -> str:
    """Keep an ONNX file among the current artifacts; returns its reference. What it holds is for `onnx_file.check`."""
    return f"onnx:{artifacts.current().put(data)}"


def resolve(reference: str) -> str:
    """`onnx:<sha-256>` of a network: itself, the one given for a recipe, or one trained here and now."""
    kind, _, _ = reference.partition(":")
    if kind == "onnx":
        return reference
    if kind != "recipe":
        raise ValueError(f"{reference} is not a network (onnx:<sha-256> or recipe:<sha-256>)")
    known = _given.get().get(reference)
    if known is not None:
        return known
    place = str(artifacts.current().folder), reference
    if place not in _trained:
        from netassay.networks import training  # training imports torch's peers; loading a file needs none of it

        recipe = recipes.from_reference(reference)
        _trained[place] = keep(onnx_file.write(training.train(recipe).graph, reference))
    return _trained[place]


@contextlib.contextmanager
def given(networks: Mapping[str, str]) -> Iterator[None]:
    """Within the block, these files (`onnx:...`) stand for these recipes (`recipe:...`), besides those given before."""
    token = _given.set({**_given.get(), **networks})
    try:
        yield
    finally:
        _given.reset(token)


def short(name: str) -> str:
    """A name for labels of plots: of a bare reference the kind and the first eight digits, else as it is."""
    kind, colon, digest = name.partition(":")
    return f"{kind}:{digest[:8]}" if colon and len(digest) == 64 else name
