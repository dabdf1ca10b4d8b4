"""Any outcome becomes JSON that every database takes, and comes back as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from netassay.store import storable
from netassay.store.artifacts import Artifacts

safe_text = st.text(
    st.characters(
        exclude_categories=["Cs"], exclude_characters=[chr(c) for c in (*range(9), 11, 12, *range(14, 32), 127)]
    )
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | safe_text,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(safe_text.filter(lambda name: name != "float"), inner, max_size=4)
    ),
    max_leaves=12,
)


def round_trip(value: Any) -> Any:
    return storable.load(storable.dump({"value": value}))["value"]


@given(plain)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert round_trip(value) == value


@given(st.text())
def test_any_text_becomes_json_without_what_databases_refuse(value: str) -> None:
    dumped = storable.dump({"value": value})
    dumped.encode()  # no lone surrogate
    assert "\\u0000" not in dumped
    assert not storable._UNSAFE.search(json.loads(dumped)["value"])


def test_controls_and_lone_surrogates_are_escaped_readably() -> None:
    assert storable.text("a\x00b\x1bc\ud800d\ttab\nline") == "a\\x00b\\x1bc\\ud800d\ttab\nline"


def test_long_text_keeps_its_ends_and_says_what_was_cut() -> None:
    text = storable.text("a" * 60 + "b" * 40 + "c" * 60, limit=100)
    assert text == "a" * 50 + "\n... 60 characters cut ...\n" + "c" * 50


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_nan_and_infinity_come_back_and_never_stand_bare_in_the_json(value: float) -> None:
    dumped = storable.dump({"deep": [{"value": value}]})
    json.loads(dumped, parse_constant=pytest.fail)
    back = storable.load(dumped)["deep"][0]["value"]
    assert back == value or (math.isnan(back) and math.isnan(value))


@given(
    hnp.arrays(
        st.sampled_from(["<f8", ">f8", "<f4", "<f2", "<i8", ">i4", "<u2", "|b1", "|u1", "<c16"]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
    )
)
def test_arrays_come_back_bit_by_bit(array: np.ndarray) -> None:
    back = storable.load_array(round_trip(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == np.ascontiguousarray(array).tobytes()


def test_a_strided_array_is_stored_by_its_values() -> None:
    array = np.arange(24.0).reshape(4, 6).T[::2]
    assert np.array_equal(storable.load_array(round_trip(array)), array)


def test_arrays_above_the_limit_become_artifacts(artifacts: Artifacts) -> None:
    small = np.zeros(storable.INLINE_ARRAY_BYTES, np.uint8)
    large = np.arange(storable.INLINE_ARRAY_BYTES + 1, dtype=np.uint8)
    assert not round_trip(small)["array"].startswith("array:")
    stored = round_trip(large)
    assert stored["array"].startswith("array:")
    assert artifacts.has(stored["array"])
    assert np.array_equal(storable.load_array(stored), large)


def test_numpy_scalars_are_plain_numbers() -> None:
    assert round_trip([np.float32(0.5), np.int64(3), np.bool_(True), np.array(2.0)]) == [0.5, 3, True, 2.0]


def test_plain_lists_read_as_arrays() -> None:
    assert storable.load_array([1.0, 2.0]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "value, kind",
    [(object(), "object"), ({1, 2}, "set"), (b"bytes", "bytes"), (1j, "complex"), (np.array([None]), "object")],
)
def test_what_cannot_be_stored_is_refused_by_the_name_of_its_field(value: Any, kind: str) -> None:
    with pytest.raises(storable.Unstorable, match=rf"outer\.1.*{kind}"):
        storable.dump({"outer": [0, value]})
