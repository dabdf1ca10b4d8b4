"""Verbs of methods: methods, run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from producer.cli.common import AsJson, busy, method_names, print_output, read_settings

if TYPE_CHECKING:
    from netassay.method import Contract, Method


verbs = typer.Typer()


@verbs.command()
def methods(
    name: Annotated[
        str, typer.Argument(help="A method's name, or words to search for.", autocompletion=method_names)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the methods, search them, or show one: its text, fields, reference and example."""
    from netassay import catalogue

    names = catalogue.names()
    if name in names:
        _show_method(name, as_json)
        return
    broken = catalogue.broken()
    found = catalogue.search(name) if name else names
    ill = {one: why for one, why in broken.items() if all(word in one.lower() for word in name.lower().split())}
    if not found and not ill:
        raise catalogue.UnknownMethod(name)
    lines = {one: catalogue.claim(one) for one in found if one not in ill}
    if as_json:
        good = [{"name": one, "claim": claim} for one, claim in lines.items()]
        print_output("methods", good + [{"name": one, "claim": "", "broken": why} for one, why in ill.items()])
        return
    _print_columns(lines)
    if ill:
        print("\nthese cannot be used:")
        _print_columns(ill)
    if not name:
        print("\none of them: netassay methods NAME; those about something: netassay methods WORD")


def _print_columns(lines: Mapping[str, str]) -> None:
    """Names and what is said of them, not wider than the terminal. Without Rich, whose import would take longer than
    the rest of the verb."""
    import shutil
    import sys
    import textwrap

    width = max(map(len, lines), default=0)
    room = max(40, shutil.get_terminal_size().columns - width - 2) if sys.stdout.isatty() else 10_000
    for name, words in lines.items():
        first, *rest = textwrap.wrap(words, room) or [""]
        print(f"{name:<{width}}  {first}".rstrip())
        for line in rest:
            print(f"{'':<{width}}  {line}")


def _show_method(name: str, as_json: bool) -> None:
    from netassay import catalogue

    method = catalogue.get(name)
    fields, answers = list(_fields(method.Params)), list(_fields(method.Result))
    if as_json:
        about = {
            "name": name, "version": method.version, "doc": method.doc, "references": _references(method),
            "fields": fields, "answers": answers, "params": method.Params.model_json_schema(),
            "result": method.Result.model_json_schema(mode="serialization"), "example": dict(method.example),
        }  # fmt: skip
        print_output("methods", about)
        return
    import yaml

    from producer.show import console, table

    print(f"{name} (version {method.version})\n\n{method.doc}\n")
    rows = [(one["name"], f"{one['type']} {one['bounds']}".strip(), _default(one), one["meaning"]) for one in fields]
    console.print(table(("field", "type and bounds", "default", "meaning"), rows))
    print()
    rows = [(one["name"], f"{one['type']} {one['bounds']}".strip(), "", one["meaning"]) for one in answers]
    console.print(table(("result", "type and bounds", "", "meaning"), rows))
    print("\nexample sweep:\n")
    print(yaml.safe_dump(json.loads(json.dumps(method.example)), sort_keys=False, default_flow_style=None))
    print(f"save it as FILE: netassay submit FILE --dry-run; one job here and now: netassay run {name} field=value ...")


def _default(field: Mapping[str, Any]) -> str:
    return "required" if field["required"] else json.dumps(field["default"])


def _references(method: Method) -> list[str]:
    """The `Reference:` paragraphs of its text, each on one line."""
    found = re.findall(r"^Reference: (.*?)(?=\n\s*\n|\nReference: |\Z)", method.doc, re.MULTILINE | re.DOTALL)
    return [" ".join(one.split()) for one in found]


def _fields(contract: type[Contract]) -> Iterator[dict[str, Any]]:
    """Name, type, bounds, default and meaning of each field; those of a contract within it with dotted names."""
    schema = contract.model_json_schema(mode="serialization" if contract.__name__ == "Result" else "validation")
    yield from _rows(schema, schema.get("$defs", {}), _kinds(contract), "")


def _rows(
    schema: Mapping[str, Any], known: Mapping[str, Any], kinds: Mapping[str, str], prefix: str
) -> Iterator[dict[str, Any]]:
    required = schema.get("required", ())
    for name, about in schema.get("properties", {}).items():
        inner = known.get(about.get("$ref", "").rpartition("/")[2])
        words = [about.get("description", ""), kinds.get(name, "")]
        yield {
            "name": prefix + name,
            "type": "mapping" if inner and "properties" in inner else _type(about, known),
            "bounds": _bounds(about),
            "required": name in required and "default" not in about,
            "default": about.get("default"),
            "meaning": "; ".join(dict.fromkeys(filter(None, words))),
        }
        if inner and not prefix:  # deeper ones are told by the text
            yield from _rows(inner, known, {}, f"{prefix}{name}.")


def _kinds(contract: type[Contract]) -> dict[str, str]:
    """What the type of each field says of itself, units above all: a field's own text stands before it."""
    import typing

    from pydantic.fields import FieldInfo

    kinds = {}
    for name, hint in typing.get_type_hints(contract, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, FieldInfo) and mark.description:
                kinds[name] = mark.description
    return kinds


def _type(about: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        return _type(known[name], known) if "enum" in known.get(name, {}) else name
    if "enum" in about:
        return " | ".join(map(str, about["enum"]))
    if "const" in about:
        return repr(about["const"])
    if options := about.get("anyOf") or about.get("oneOf"):
        return " or ".join(f"{_type(one, known)} {_bounds(one)}".strip() for one in options)
    if about.get("type") == "array" and about.get("items"):
        return f"list of {_type(about['items'], known)} {_bounds(about['items'])}".strip()
    return about.get("type", "anything")


_SIGNS = {
    "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "like",
    "minLength": "length >=", "maxLength": "length <=", "minItems": "items >=", "maxItems": "items <=",
}  # fmt: skip


def _bounds(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{sign} {about[key]}" for key, sign in _SIGNS.items() if key in about)


@verbs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="Name of a method.", autocompletion=method_names)],
    as_json: AsJson = False,
) -> None:
    """Run one job in this process, without any lab: netassay run METHOD field=value ..."""
    from netassay import catalogue, job
    from netassay.store import storable
    from producer import sweeps

    read_settings()
    found = catalogue.get(method)
    params = sweeps.parameters(found, context.args)
    started = time.perf_counter()
    with busy(f"running {method}"):
        result = found.run(params)
    seconds = time.perf_counter() - started
    fields = json.loads(storable.dump(result))
    if as_json:
        print_output("run", {"method": method, "key": job.key(found, params), "seconds": seconds, "result": fields})
        return
    from producer.show import cell, console, table
    from producer.wording import duration, plain

    rows = [(name, cell(plain(value)) if not isinstance(value, str) else value) for name, value in fields.items()]
    console.print(table(("result", "value"), rows))
    print(f"{method} took {duration(seconds)}")
