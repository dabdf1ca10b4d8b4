"""From text to plain values (mappings, lists, text, numbers), with bounds on what a few bytes may grow into.

YAML's aliases let a kilobyte stand for gigabytes, nesting can exhaust the stack of a parser written in C, and JSON
readers take a key given twice, or NaN, without a word. Here each of these is refused, in words.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

#: Bytes of a whole YAML or JSON document, and of one line or row of a file of rows, which is read as a stream.
LONGEST = 16 * 2**20
#: Values in a document, each alias counted as what it stands for, and how deep they may be nested.
MOST_VALUES, DEEPEST = 1_000_000, 100


class Unreadable(ValueError):
    """Text that is not what it should be. line, column: where, from 1; 0 where that is not known."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class Loaded(NamedTuple):
    """A YAML document. lines: where the items begin, if it is a list."""

    value: Any
    lines: list[int]


# --- bytes ------------------------------------------------------------------------------------------------------------


def decode(data: bytes, line: int = 1, offset: int = 0) -> str:
    """The text in UTF-8 bytes that begin at this line and byte of their file. Raises Unreadable."""
    if b"\0" in data:
        at = data.index(b"\0")
        utf_16 = at < 2 or data[:2] in (b"\xff\xfe", b"\xfe\xff")
        advice = "it looks like UTF-16: save the file as UTF-8" if utf_16 else "is this a text file?"
        place = line + data.count(b"\n", 0, at)
        raise Unreadable(f"holds a NUL byte at offset {offset + at:,}; {advice}", place)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = line + data.count(b"\n", 0, error.start)
        raise Unreadable(
            f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}; save the file as UTF-8 "
            "(of a Latin-1 file: iconv -f latin1 -t utf-8)",
            place,
        ) from None


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice, and reads 1e-3 as a number as YAML 1.2 does (1.1 makes it text)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        # Of a list or text under the tag !!map, what is to be refused is told below.
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(name, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice, first in line {seen[key]}", name.start_mark
                )
            if isinstance(key, typing.Hashable):
                seen[key] = name.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str | bytes) -> Loaded:
    """The values of one YAML document. Raises Unreadable."""
    try:
        _measure(yaml.parse(text, Loader=_Loader))
        loader = _Loader(text)  # a subclass of the safe loader: makes plain values only
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        wrong = " ".join(part for part in (error.problem, error.context) if part) or "is not YAML"
        raise Unreadable(wrong, *((mark.line + 1, mark.column + 1) if mark else ())) from None
    except Unreadable:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # What PyYAML's own constructors raise where a tag and its text do not fit: !!bool maybe, !!timestamp x.
        if "integer string conversion" in str(error):
            raise Unreadable("a number of more than 4,300 digits is more than can be read") from None
        raise Unreadable(f"is not YAML: {' '.join(str(error).split())}") from None
    items = node.value if isinstance(node, yaml.SequenceNode) else ()
    return Loaded(value, [item.start_mark.line + 1 for item in items])


def _measure(events: Iterable[Any]) -> None:
    """Refuse what is too large or too deep, before anything is built: libyaml's composer is recursive, in C."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # of each collection not yet closed: its anchor, the values before it
    values = 0
    for event in events:
        if isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, values))
            values += 1
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
            if len(open_) > DEEPEST:
                raise Unreadable(f"is nested more than {DEEPEST} deep; is a bracket missing?", *_place(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(anchor == event.anchor for anchor, _ in open_):
                raise Unreadable(f"*{event.anchor} stands for a value that it is part of", *_place(event))
            values += sizes.get(str(event.anchor), 1)
        if values > MOST_VALUES:
            raise Unreadable(
                f"the document grows beyond {MOST_VALUES:,} values, each alias counted as what it stands for; use a "
                "range, or write the rows as CSV or JSONL",
                *_place(event),
            )


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


# --- JSON -------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise Unreadable(f"{twice!r} is given twice in one object")
    return found


def _constant(name: str) -> Any:
    raise Unreadable(f"{name} is not a JSON number; a field without a value is left out or null")


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python's guard against quadratic time
        raise Unreadable(f"a number of {len(digits):,} digits is more than can be read") from None


#: JSON as its standard has it: no key twice, no NaN.
json_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole)


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises Unreadable, with line and column where they are known."""
    try:
        value = json_decoder.decode(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not JSON: {error.msg}", error.lineno, error.colno) from None
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    check_depth(value, text)
    return value


TOO_DEEP = f"is nested more than {DEEPEST} deep; is a bracket missing?"


def check_depth(value: Any, text: str) -> None:
    """Raise Unreadable where a value is nested too deep. text: its JSON, which nearly always tells at once."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inside = (item for values in level for item in (values.values() if isinstance(values, dict) else values))
        level = [item for item in inside if isinstance(item, dict | list)]
        if not level:
            return
    raise Unreadable(TOO_DEEP)
