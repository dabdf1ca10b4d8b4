"""The text of a CSV cell or of a command line's option, read by the type of its field.

A field of text keeps what is written: `2` and `no` stay text. One that takes numbers, true or false, or null reads
them; lists and mappings are written as JSON or YAML (`[8, 8]`, `{dataset: digits}`). Where a field takes numbers as
well as text, text that looks like a number stands in quotes of its own: `"2"`. What a field cannot read stays text, and
its validation says what it must be.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

from pydantic.fields import FieldInfo

from netassay.fields import ReferenceTo
from netassay.method import Contract
from producer import plain

_WHOLE = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = ("null", "~", "none")


def readers(params: type[Contract]) -> dict[str, Callable[[str], Any]]:
    """Field -> what reads its text."""
    return {name: reader(about) for name, about in params.model_fields.items()}


def reader(about: FieldInfo) -> Callable[[str], Any]:
    """What reads the text of one field. It never raises: text that it cannot read is returned as it is."""
    kinds = set(_kinds(about.annotation))
    if any(isinstance(mark, ReferenceTo) for mark in about.metadata):
        kinds = kinds - {"text"} | {"reference"}
    if kinds == {"text"}:
        return str
    return functools.partial(_read, kinds)


def _kinds(annotation: Any) -> Iterator[str]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *marks = typing.get_args(annotation)
        if any(isinstance(mark, ReferenceTo) for mark in marks):
            yield "reference"
        else:
            yield from _kinds(inner)
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _kinds(part)
    elif origin is typing.Literal:
        for value in typing.get_args(annotation):
            yield from _kinds(type(value))
    elif annotation is type(None):
        yield "nothing"
    elif not isinstance(annotation, type) or origin is not None:
        yield "structure"
    elif issubclass(annotation, bool):
        yield "truth"
    elif issubclass(annotation, int | float):
        yield "number"
    elif issubclass(annotation, str | Enum | PurePath):
        yield "text"
    else:
        yield "structure"


def _read(kinds: set[str], text: str) -> Any:
    bare = text.strip()
    if "number" in kinds:
        try:
            if _WHOLE.fullmatch(bare):
                return int(bare)
            if _NUMBER.fullmatch(bare) or ("text" not in kinds and _NOT_FINITE.fullmatch(bare)):
                return float(bare.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:  # more digits than Python reads
            return text
    word = bare.lower()
    if "truth" in kinds and word in _TRUTHS:
        return _TRUTHS[word]
    if "truth" in kinds and "number" not in kinds and bare in ("0", "1"):
        return bare == "1"
    if "nothing" in kinds and word in _NOTHING:
        return None
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'" and "text" in kinds
    if quoted or (bare[:1] in ("[", "{") and kinds & {"structure", "reference"}):
        return _structure(bare)
    if "reference" in kinds:
        return bare
    return text if "text" in kinds or "structure" not in kinds else _structure(bare)


@functools.lru_cache(maxsize=4096)
def _structure(text: str) -> Any:
    """One value for one text: a recipe that stands in many rows is then known to the resolver by its identity."""
    try:
        return plain.load_yaml(text).value
    except plain.Unreadable:
        return text
