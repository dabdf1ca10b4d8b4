"""Pydantic's errors in plain sentences: which field, what is wrong with it, what to try. Values for people and JSON."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

_LONGEST = 60
_FINITE = "a finite number"
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}


def explain(error: ValidationError) -> list[tuple[str, str]]:
    """(field, sentence) of every field that `error` names; the field is empty where several together are wrong.

    A field that may have one of several types yields one sentence, not one for each type.
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    for one in error.errors(include_url=False):
        place = one["loc"]
        # Behind the name of a field stand the keys of its own structure, or of a union the type that was tried.
        field = str(place[0]) if place else ""
        given, wrongs = found.setdefault(field, (one["input"], []))
        wrong = _wrong(
            one, inside=".".join(map(str, place[1:])) if len(place) > 1 and one["input"] is not given else ""
        )
        if wrong not in wrongs:
            wrongs.append(wrong)
    return [(field, _sentence(given, wrongs)) for field, (given, wrongs) in found.items()]


def _sentence(given: Any, wrongs: list[str]) -> str:
    musts = [wrong.removeprefix("must be ") for wrong in wrongs if wrong.startswith("must be ")]
    others = [wrong for wrong in wrongs if not wrong.startswith("must be ")]
    if _FINITE in musts:  # of NaN, a union's other types have nothing to add
        musts = [_FINITE]
    elif _KINDS["float"] in musts:
        musts = [must for must in musts if must != _KINDS["int"]]
    if not musts:
        return "; ".join(others)
    return "; ".join([f"is {short(given)}, must be {' or '.join(musts)}", *others])


def _wrong(error: Mapping[str, Any], inside: str) -> str:
    """What is wrong, as `must be ...` where the value given is to stand before it."""
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    prefix = f"{inside}: " if inside else ""
    if kind == "value_error":
        return f"{prefix}{context['error']}"
    if kind == "missing":
        return f"{prefix}is missing"
    if kind == "extra_forbidden":
        return f"{prefix}is not a name known here"
    must = _must(kind, context, given)
    if must is None:
        return prefix + error["msg"][:1].lower() + error["msg"][1:]
    return f"{inside} is {short(given)}, must be {must}" if inside else f"must be {must}"


def _must(kind: str, context: Mapping[str, Any], given: Any) -> str | None:
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]}"
    if kind == "finite_number":
        return _FINITE
    if kind == "no_truth":
        return _KINDS["float"]
    if kind in ("literal_error", "enum"):
        quoted = " (write it in quotes)" if not isinstance(given, str) and f"'{given}'" in context["expected"] else ""
        return context["expected"] + quoted
    if kind == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    base = kind.partition("_")[0]
    if kind == "int_from_float":
        return _KINDS["int"]
    if kind.endswith(("_type", "_parsing")) and base in _KINDS:
        quotes = " (write it in quotes)" if base == "string" and isinstance(given, int | float) else ""
        return _KINDS[base] + quotes
    return None


def short(value: Any) -> str:
    """A value in a few characters: text in quotes, long things cut. No more of it is looked at than is shown."""
    text = ""
    for piece in _pieces(value, quoted=True):
        text += piece
        if len(text) > _LONGEST:
            return text[: _LONGEST - 3] + "..."
    return text


def _pieces(value: Any, quoted: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        start = value[: _LONGEST + 1]
        yield repr(start) if quoted else start
    elif isinstance(value, Mapping):
        yield "{"
        for place, (name, item) in enumerate(value.items()):
            yield f"{', ' if place else ''}{str(name)[: _LONGEST + 1]}: "
            yield from _pieces(item)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for place, item in enumerate(value):
            yield ", " if place else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, bool):  # as people write it
        yield str(value).lower()
    elif isinstance(value, int) and value.bit_length() > 14_000:  # Python writes no more than 4,300 digits
        yield "a number of thousands of digits"
    else:
        yield repr(value) if quoted and isinstance(value, int | float) else str(value)


def counted(number: int, word: str) -> str:
    """`1 job`, `1,000 jobs`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def strict(value: Any) -> Any:
    """The same for JSON, which knows no NaN: it is written as in the store, `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


class Shape(str):
    """What is shown of an array: `array 3x4`."""


def plain(value: Any) -> Any:
    """A field of a result as it is shown: of an array, its shape."""
    if isinstance(value, Mapping) and "array" in value and "dtype" in value:
        return Shape(f"array {'x'.join(map(str, value['shape']))}")
    return value


def nearest(name: str, names: Iterable[str]) -> str:
    """`; nearest: a, b`, or nothing where no name is near."""
    close = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def unknown_field(field: str, model: type[BaseModel], owner: str) -> str:
    """What to say of a field that a method or recipe does not have."""
    known = list(model.model_fields)
    return f"is not a parameter of {owner}{nearest(field, known)} (it takes: {', '.join(known) or 'none'})"


def duration(seconds: float) -> str:
    """`850 ms`, `12.3 s`, `4 min 05 s`, `3 h 20 min`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def size(number: float) -> str:
    """`850 B`, `12.3 MB`: a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
