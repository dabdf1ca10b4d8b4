"""The key of a job: what it depends on, what it does not, and that it never changes unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from netassay import catalogue, job
from netassay.fields import Count, Radius, Real
from netassay.method import Contract, Method

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
ADVICE = (
    "Stored results of it would no longer be found. If its results may differ now, raise VERSION in its module; if "
    "only its EXAMPLE changed, or it is new, that is fine. Then run: python tests/golden/regenerate.py"
)


class Inner(Contract):
    b: float = 0.0
    a: int = 0


class Params(Contract):
    z: float = 0.0
    real: Real = 0.0
    text: str = ""
    inner: Inner = Inner()
    many: tuple[float, ...] = ()
    anything: Any = None


def method(name: str = "family.name", version: int = 1) -> Method:
    module = ModuleType("made")
    module.__doc__ = "A method."
    module.__dict__.update(VERSION=version, Params=Params, Result=Params, run=lambda params: params, EXAMPLE={})
    return Method.of(name, module)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_key_is_blake2b_of_method_version_and_canonical_json() -> None:
    text = '{"anything":null,"inner":{"a":0,"b":0.0},"many":[],"real":0.5,"text":"é","z":0.0}'
    params = Params(real=0.5, text="é")
    assert job.canonical(params) == text
    assert job.key(method(), params) == hashlib.blake2b(b"family.name\n1\n" + text.encode(), digest_size=16).hexdigest()


def test_a_known_key_stays_itself() -> None:
    assert job.key_of("family.name", 1, '{"a":1}').hex() == "7c0371946ecd32524f853cc608e24675"


def test_key_depends_on_method_version_and_each_param() -> None:
    keys = {
        job.key(method(), Params()),
        job.key(method("family.other"), Params()),
        job.key(method(version=2), Params()),
        job.key(method(), Params(z=1.0)),
        job.key(method(), Params(text="0")),
        job.key(method(), Params(inner=Inner(a=1))),
        job.key(method(), Params(many=(0.0,))),
        job.key(method(), Params(z=math.nextafter(0.0, 1.0))),
    }
    assert len(keys) == 8


def test_key_does_not_depend_on_how_the_same_params_were_written() -> None:
    written = [
        Params(z=1, text="a"),
        Params(text="a", z=1.0, real=0.0),
        Params.model_validate({"inner": {"a": 0, "b": -0.0}, "z": "1", "text": "a"}),
        Params.model_validate_json('{"z": 1e0, "text": "\\u0061", "real": -0.0}'),
    ]
    assert len({job.key(method(), params) for params in written}) == 1


@given(json_values)
def test_canonical_json_loses_nothing(value: Any) -> None:
    assert json.loads(job.canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_canonical_json_ignores_the_order_of_names(value: dict[str, int]) -> None:
    assert job.canonical_json(dict(reversed(value.items()))) == job.canonical_json(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_written_exactly_and_zero_has_no_sign(value: float) -> None:
    text = job.canonical(Params(z=value, many=(value,), anything={"deep": [value]}))
    for read in (json.loads(text)["z"], json.loads(text)["many"][0], json.loads(text)["anything"]["deep"][0]):
        assert read == value
        assert math.copysign(1.0, read) == (1.0 if value == 0.0 else math.copysign(1.0, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "fields, where",
    [
        (lambda value: {"z": value}, "z"),
        (lambda value: {"inner": {"b": value}}, r"inner\.b"),
        (lambda value: {"many": [0.0, value]}, r"many\.1"),
        (lambda value: {"anything": value}, "anything"),
        (lambda value: {"anything": {"deep": [value]}}, r"anything\.deep\.0"),
    ],
)
def test_nan_and_infinity_are_refused_by_the_name_of_their_field(value: float, fields: Any, where: str) -> None:
    with pytest.raises(ValueError, match=f"^{where} is not a finite number$"):
        job.canonical(Params.model_validate(fields(value)))


def test_golden_keys_cover_every_method() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == catalogue.names(), ADVICE


@pytest.mark.parametrize("name", catalogue.names())
def test_golden_keys_stay(name: str, tmp_path: Path) -> None:
    from netassay.store.artifacts import Artifacts
    from producer import references, sweeps

    golden = json.loads(GOLDEN.read_text()).get(name)
    assert golden is not None, f"{name} has no golden key. {ADVICE}"
    document = sweeps.document(catalogue.get(name).example, base=tmp_path)
    resolver = references.Resolver(document.base, document.networks, Artifacts(tmp_path / "artifacts"))
    first = next(part for part in sweeps.prepare(document, resolver).segments if part.method == name)
    found = {"version": first.version, "params": first.params[0], "key": first.keys[0].hex()}
    assert found == golden, f"the first example of {name} has another key. {ADVICE}"


class Numbers(Contract):
    count: Count = 1
    radius: Radius = 0.0
    maybe: int | None = None
    shape: tuple[int, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    rates: Mapping[str, float] | None = None
    order: Literal[1, 2] = 1
    either: float | Literal["auto"] = "auto"
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    switch: bool = False
    truth: bool | int = 0
    also: int | bool = 0


@pytest.mark.parametrize("truth", [True, False, np.True_, np.False_], ids=repr)
@pytest.mark.parametrize(
    "given",
    [
        lambda truth: {"count": truth},
        lambda truth: {"radius": truth},
        lambda truth: {"maybe": truth},
        lambda truth: {"shape": [1, truth]},
        lambda truth: {"pair": (0, truth)},
        lambda truth: {"rates": {"a": truth}},
        lambda truth: {"order": truth},
        lambda truth: {"either": truth},
        lambda truth: {"inner": {"a": truth}},
        lambda truth: {"many": [{}, {"b": truth}]},
    ],
)
def test_true_and_false_are_no_numbers(given: Callable[[Any], dict[str, Any]], truth: Any) -> None:
    """As 1 and 0 they would share the key of another job, which nobody asked for."""
    with pytest.raises(ValidationError, match=f"is {str(bool(truth)).lower()}, must be a number"):
        Numbers.model_validate(given(truth))


def test_true_and_false_are_refused_in_stored_json_too() -> None:
    with pytest.raises(ValidationError, match="is true, must be a number"):
        Numbers.model_validate_json('{"count": true}')


def test_a_field_that_may_be_true_or_false_still_may() -> None:
    found = Numbers(switch=True, truth=True, also=False)
    assert (found.switch, found.truth, found.also) == (True, True, False)
    assert json.loads(job.canonical(found))["truth"] is True


def test_what_else_stands_for_a_number_still_does() -> None:
    found = Numbers.model_validate({"count": "3", "radius": 2, "shape": [np.int64(4), 5.0], "order": 2})
    assert (found.count, found.radius, found.shape, found.order) == (3, 2.0, (4, 5), 2)
    assert type(found.radius) is float
    assert Numbers.model_json_schema()["properties"]["maybe"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
