"""A VNN-LIB text becomes boxes and linear constraints, exactly, or is refused with the place of the mistake."""

from __future__ import annotations

import gzip
import importlib.util
import math
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from netassay import files, vnnlib
from netassay.fields import ReferenceTo
from netassay.heavy import LazyModule
from netassay.method import InvalidInput, NotApplicable
from netassay.networks import onnx_file
from netassay.store import artifacts
from netassay.store.artifacts import Artifacts
from netassay.vnnlib import Case, Constraint, Property, PropertyError, UnsupportedProperty
from producer import sweeps
from producer.references import ChangedFile, Resolver

PROPERTY = ReferenceTo("vnnlib", shared=False)
ANY = ReferenceTo("onnx", "recipe")


def declared(inputs: int = 1, outputs: int = 1) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


def boxed(inputs: int = 1) -> str:
    return "".join(f"(assert (and (>= X_{i} 0) (<= X_{i} 1)))\n" for i in range(inputs))


def at_most(bound: object, **coefficients: object) -> Constraint:
    """sum of Yj=c at most the bound."""
    return Constraint(
        tuple((int(name[1:]), Fraction(str(c))) for name, c in coefficients.items()), Fraction(str(bound))
    )


def parse(text: str, inputs: int = 1, outputs: int = 2) -> Property:
    return vnnlib.parse(declared(inputs, outputs) + boxed(inputs) + text)


def unsafe(text: str, inputs: int = 1, outputs: int = 2) -> tuple[tuple[Constraint, ...], ...]:
    (case,) = parse(text, inputs, outputs).cases
    return case.unsafe


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_small_property_by_hand() -> None:
    found = vnnlib.parse("""
        ; two inputs, two outputs
        (declare-const X_0 Real)  (declare-const X_1 Real)
        (declare-const Y_0 Real)  (declare-const Y_1 Real) ; the end of a line is a comment
        (assert (<= X_0 0.5)) (assert (>= X_0 -0.5))
        (assert (and (<= X_1 2) (>= X_1 1e-1)))
        (assert (<= Y_0 Y_1))
    """)
    half = Fraction(1, 2)
    case = Case((-half, Fraction(1, 10)), (half, Fraction(2)), ((at_most(0, Y0=1, Y1=-1),),))
    assert found == Property(2, 2, (case,))
    assert found.conjunctions == 1


def test_assertions_are_a_conjunction_and_or_is_a_union() -> None:
    a, b, c = at_most(1, Y0=1), at_most(2, Y1=1), at_most(-3, Y0=-1)
    assert unsafe("(assert (<= Y_0 1)) (assert (<= Y_1 2))") == ((a, b),)
    assert unsafe("(assert (or (<= Y_0 1) (<= Y_1 2)))") == ((a,), (b,))
    assert unsafe("(assert (or (and (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3)))") == ((a, b), (c,))
    assert unsafe("(assert (and (or (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3)))") == ((c, a), (c, b))
    assert unsafe("(assert (= Y_0 1))") == ((a, at_most(-1, Y0=-1)),)
    assert unsafe("(assert (or (<= Y_0 1) (<= Y_0 1)))") == ((a,),)
    assert unsafe("(assert (<= Y_0 1)) (assert (<= 0 1)) (assert (or (<= 1 0) (<= Y_1 2) false))") == ((a, b),)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(<= (+ Y_0 (* 2 Y_1) 3) 5)", at_most(2, Y0=1, Y1=2)),
        ("(<= (- Y_0 Y_1 1) (- 5))", at_most(-4, Y0=1, Y1=-1)),
        ("(>= (- Y_0) (/ 1 4))", at_most(-0.25, Y0=1)),
        ("(<= (* -0.5 (+ Y_0 1) 4) 0)", at_most(2, Y0=-2)),
        ("(<= Y_0 (+ Y_0 (- Y_1) 1))", at_most(1, Y1=1)),
        ("(<= (* 3 2 (/ Y_1 4)) .5e1)", at_most(5, Y1=1.5)),
    ],
)
def test_linear_terms_are_reduced_exactly(text: str, expected: Constraint) -> None:
    assert unsafe(f"(assert {text})") == ((expected,),)


def test_a_union_over_boxes_makes_a_case_for_each_with_all_conjunctions() -> None:
    found = parse("(assert (or (<= X_0 0.25) (>= X_0 0.75))) (assert (or (<= Y_0 1) (<= Y_1 2)))")
    both = ((at_most(1, Y0=1),), (at_most(2, Y1=1),))
    quarter = Fraction(1, 4)
    low, high = Case((0 * quarter,), (quarter,), both), Case((3 * quarter,), (4 * quarter,), both)
    assert set(found.cases) == {low, high}
    # A part of the union that holds no input falls away; the same box twice is one case.
    parted = parse("(assert (or (and (<= X_0 -1) (<= Y_0 1)) (<= Y_0 5) (and (<= X_0 7) (<= Y_1 2))))")
    assert parted.cases == (Case((Fraction(0),), (Fraction(1),), ((at_most(5, Y0=1),), (at_most(2, Y1=1),))),)


def test_scaled_bounds_of_inputs_are_bounds() -> None:
    found = vnnlib.parse(
        declared() + "(assert (<= (* -2 X_0) (- 1 2))) (assert (>= 3 (+ X_0 X_0))) (assert (<= Y_0 0))"
    )
    assert (found.cases[0].lower, found.cases[0].upper) == ((Fraction(1, 2),), (Fraction(3, 2),))


def test_capitals_solver_commands_quoted_text_and_a_byte_order_mark_do_not_matter() -> None:
    text = (
        '(set-logic QF_LRA) (set-info :source "a ) in ; text")'
        + declared()
        + boxed()
        + "(assert (<= Y_0 0)) (check-sat)"
    )
    plain = vnnlib.parse(declared() + boxed() + "(assert (<= Y_0 0))")
    assert vnnlib.parse(text) == vnnlib.parse(text.upper()) == vnnlib.parse(text.lower()) == plain
    assert vnnlib.parse(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == plain


def _formula(draw: random.Random, depth: int) -> tuple[str, object]:
    """A random formula over X_0, X_1, Y_0, Y_1 and a function that evaluates it at rational points."""
    kind = draw.choice(["atom"] if depth == 0 else ["atom", "and", "or", "or"])
    if kind != "atom":
        parts = [_formula(draw, depth - 1) for _ in range(draw.randint(1, 3))]
        fold = all if kind == "and" else any
        return f"({kind} {' '.join(text for text, _ in parts)})", lambda p: fold(holds(p) for _, holds in parts)
    bound, sign = Fraction(draw.randint(-8, 8), 4), draw.choice(["<=", ">="])
    if draw.random() < 0.5:
        name = draw.choice(["X_0", "X_1"])
        text, value = name, lambda p: p[name]
    else:
        c = Fraction(draw.randint(-4, 4), 2)
        text, value = f"(+ Y_0 (* {float(c)} Y_1))", lambda p: p["Y_0"] + c * p["Y_1"]
    return f"({sign} {text} {float(bound)})", lambda p: value(p) <= bound if sign == "<=" else value(p) >= bound


def _cases(text: str) -> tuple[Case, ...]:
    """None where no input meets the formula."""
    try:
        return vnnlib.parse(text).cases
    except PropertyError as error:
        if "no input meets" not in error.what:
            raise
        return ()


def test_random_formulas_describe_the_same_set_as_their_disjunctive_form() -> None:
    draw, members, strangers = random.Random(0), 0, 0
    for _ in range(300):
        text, holds = _formula(draw, 3)
        box = "".join(f"(assert (and (>= X_{i} -1) (<= X_{i} 1)))" for i in (0, 1))
        cases = _cases(declared(2, 2) + box + f"(assert (<= Y_0 9)) (assert {text})")
        for _ in range(30):
            point = {name: Fraction(draw.randint(-10, 10), 8) for name in ("X_0", "X_1", "Y_0", "Y_1")}
            x, y = (point["X_0"], point["X_1"]), (point["Y_0"], point["Y_1"])
            inside = any(
                case.contains(x)
                and any(all(one.violation(y) <= 0 for one in conjunction) for conjunction in case.unsafe)
                for case in cases
            )
            expected = max(map(abs, x)) <= 1 and holds(point)
            assert inside == expected, text
            members, strangers = members + inside, strangers + (not inside)
    assert min(members, strangers) > 500


# --- numbers ----------------------------------------------------------------------------------------------------------


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000, places=12))
def test_a_decimal_bound_is_rounded_outward_for_proofs_and_inward_for_counterexamples(number: object) -> None:
    exact = Fraction(str(number))
    case = Case((exact,), (exact + 1,), ())
    (lower,), (upper,) = case.outward()
    assert Fraction(lower) <= exact
    assert Fraction(upper) >= exact + 1
    # No float64 nearer to the exact end is outward too.
    assert exact < Fraction(math.nextafter(lower, math.inf))
    assert exact + 1 > Fraction(math.nextafter(upper, -math.inf))
    low, high = (side[0] for side in case.inward())
    assert low.dtype == np.float32
    assert Fraction(float(low)) >= exact > Fraction(float(np.nextafter(low, np.float32(-np.inf))))
    assert Fraction(float(high)) <= exact + 1 < Fraction(float(np.nextafter(high, np.float32(np.inf))))
    assert case.contains([float(low)])
    assert not case.contains([float(np.nextafter(low, np.float32(-np.inf)))])


def test_a_box_without_float32_says_so_and_a_representable_point_is_itself() -> None:
    tenth, half = (Case((Fraction(number),) * 1, (Fraction(number),), ()) for number in ("0.1", "0.5"))
    assert (tenth.inward()[0] > tenth.inward()[1]).all()
    assert [side.tolist() for side in half.inward()] == [[0.5], [0.5]]
    assert [side.tolist() for side in half.outward()] == [[0.5], [0.5]]
    huge = Case((Fraction(-(10**200)),), (Fraction(10**200),), ())
    low, high = (side[0] for side in huge.inward())
    assert low == -high == -np.finfo(np.float32).max


def test_a_violation_is_exact_where_floats_are_not() -> None:
    # 0.1 + 0.2 is 0.30000000000000004 in float64 arithmetic.
    one = at_most("0.3", Y0=1, Y1=1)
    assert one.violation([0.1, 0.2]) == Fraction(0.1) + Fraction(0.2) - Fraction(3, 10) > 0
    assert at_most(0, Y0=1, Y1=-1).violation([1e30, 1e30]) == 0
    assert at_most(0, Y0="1e20", Y1=1).violation([1.0, -1e20]) == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, place, why",
    [
        ("(assert (<= Y_0 1)", "line 5, column 1", "never closed"),
        ("(assert (<= Y_0 1)))", "line 5, column 20", "without an opening"),
        ("(assert\n  (<= Y_7 1))", "line 6, column 7", "Y_7 is not declared before"),
        ("(assert (<= Z 1))", "line 5, column 13", "'z' is no number, and no variable"),
        ("(assert (<= Y_0 nan))", "line 5, column 17", "'nan' is not a finite number"),
        ("(assert (<= Y_0 -inf))", "line 5, column 17", "not a finite number"),
        ("(assert (<= Y_0 1e999999999999))", "line 5, column 17", "too many digits"),
        (f"(assert (<= Y_0 0.{'1' * 500}))", "line 5, column 17", "too many digits"),
        ("(assert (<= Y_0 1e400))", "line 5, column 9", "outside 1e-300"),
        ("(assert (<= Y_0 1 2))", "line 5, column 9", "compares two terms, not 3"),
        ("(assert (<= Y_0 (/ 1 0)))", "line 5, column 17", "division by zero"),
        ("(assert (<= Y_0 (+)))", "line 5, column 17", "+ of nothing"),
        ("(assert (<= Y_0 (max 1 2)))", "line 5, column 17", "'max' is not a term"),
        ("(assert Y_0)", "line 5, column 9", "'y_0' is not a formula"),
        ("(assert ())", "line 5, column 9", "expected a word"),
        ("(assert (<= Y_0 1) (<= Y_0 2))", "line 5, column 1", "takes one formula, not 2"),
        ("(declare-const X_0 Real)", "line 5, column 16", "declared twice, first in line 1, column 16"),
        ("(declare-const W_0 Real)", "line 5, column 16", "neither an input X_i nor an output Y_j"),
        ("(declare-const Y_2 Int)", "line 5, column 20", "only Real is known"),
        ("(prove (<= Y_0 1))", "line 5, column 1", "'prove' is not known"),
        ("(vnnlib-version <2.0>)", "line 5, column 1", "vnnlib-version is of version 2 of the format"),
        ("(declare-network f (declare-input X real [5]))", "line 5, column 1", "declare-network is of version 2"),
        ("hello", "line 5, column 1", "outside of all parentheses"),
        ('(assert (<= Y_0 "1))', "line 5, column 17", "unexpected character"),
        (f"(assert (<= Y_0 (* {'1e300 ' * 300})))", "line 5, column 17", "thousands of digits"),
    ],
)
def test_a_mistake_is_told_with_line_and_column(text: str, place: str, why: str) -> None:
    with pytest.raises(PropertyError) as caught:
        parse(text)
    assert place in caught.value.what
    assert why in caught.value.why
    assert caught.value.cause == "invalid_input"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "declares no variables"),
        ("(declare-const X_0 Real)", "declares no output"),
        ("(declare-const Y_0 Real)", "declares no input"),
        (declared() + "(declare-const X_2 Real)", "X_1 is not declared"),
        (declared(2) + boxed(1) + "(assert (<= X_1 3)) (assert (<= Y_0 0))", "X_1 has no lower bound.*>= X_1"),
        (declared() + "(assert (>= X_0 3)) (assert (<= Y_0 0))", "X_0 has no upper bound"),
        (declared() + boxed(), "says nothing of the outputs"),
        (declared() + boxed() + "(assert (or (<= Y_0 1) (<= X_0 0.5)))", "says nothing of the outputs"),
        (
            declared() + "(assert (>= X_0 1))\n(assert (<= X_0 0.5)) (assert (<= Y_0 0))",
            r"X_0 is at least 1 \(line 3, column 9\) and at most 0.5 \(line 4, column 9\)",
        ),
        (declared() + boxed() + "(assert (<= Y_0 1)) (assert false)", "no input meets"),
        (b"\xff\xfe(", "byte 0 is not UTF-8"),
    ],
)
def test_an_incomplete_or_contradictory_property_says_what_is_missing(text: str | bytes, expected: str) -> None:
    with pytest.raises(PropertyError, match=expected):
        vnnlib.parse(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(assert (<= X_0 Y_0))", "line 5, column 9: a constraint joins inputs and outputs"),
        ("(assert (<= (+ X_0 X_1) 1))", "joins several inputs"),
        ("(assert (<= (* Y_0 Y_1) 1))", "product of variables"),
        ("(assert (<= (/ 1 Y_0) 1))", "division by a variable"),
        ("(assert (< Y_0 1))", "< is not read"),
        ("(assert (not (<= Y_0 1)))", "not is not read"),
    ],
)
def test_what_is_well_written_but_beyond_the_bounds_is_not_applicable(text: str, expected: str) -> None:
    text = declared(2, 2).replace("\n", " ") + "\n" * 4 + text
    with pytest.raises(UnsupportedProperty, match=expected) as caught:
        vnnlib.parse(text)
    assert isinstance(caught.value, NotApplicable)
    vnnlib.check(text.encode())


def test_products_of_disjunctions_are_bounded_and_refused_quickly() -> None:
    many = "".join(f"(assert (or (<= Y_0 {i}) (<= Y_1 {i})))" for i in range(60))
    began = time.perf_counter()
    with pytest.raises(UnsupportedProperty, match="more than 100,000 cases"):
        parse(many)
    assert time.perf_counter() - began < 10


def test_one_form_of_millions_of_words_is_refused_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vnnlib, "WORDS", 1000)
    parse("(assert (<= (+" + " Y_0" * 996 + ") 1))")
    with pytest.raises(PropertyError, match=r"line 5, column 1: the form has more than 1,000 words"):
        parse("(assert (<= (+" + " Y_0" * 1000 + ") 1))")
    # Words of forms before do not count: they are gone.
    parse("(assert (<= Y_0 1))" * 400)


def test_a_thousand_boxes_with_hundreds_of_inputs_are_read() -> None:
    box = "".join(f"(assert (and (>= X_{i} 0) (<= X_{i} 1)))" for i in range(300))
    outputs = " ".join(f"(<= Y_{j} Y_0)" for j in range(1, 1000))
    found = vnnlib.parse(declared(300, 1000) + box + f"(assert (or {outputs}))")
    assert [len(case.unsafe) for case in found.cases] == [999]
    boxes = " ".join(f"(and (>= X_0 {i}) (<= X_0 {i + 1}) (<= Y_0 {i}))" for i in range(1000))
    assert len(vnnlib.parse(declared() + f"(assert (or {boxes}))").cases) == 1000


def test_deep_nesting_is_refused_without_recursion() -> None:
    deep = "(and " * 90 + "(<= Y_0 1)" + ")" * 90
    assert unsafe(f"(assert {deep})") == ((at_most(1, Y0=1),),)
    for text in ("(" * 1_000_000, "(assert " + "(or " * 1_000_000 + "(<= Y_0 1)" + ")" * 1_000_001):
        with pytest.raises(PropertyError, match="nested more than 100 deep"):
            parse(text)


def test_a_file_of_a_gigabyte_and_a_gzip_bomb_are_refused_by_size(tmp_path: Path) -> None:
    with open(tmp_path / "large.vnnlib", "wb") as stream:
        stream.truncate(10**9)
    with open(tmp_path / "bomb.vnnlib.gz", "wb") as packed, gzip.GzipFile(fileobj=packed, mode="wb") as stream:
        for _ in range(100):
            stream.write(b" " * 2**20)
    assert (tmp_path / "bomb.vnnlib.gz").stat().st_size < 2**20
    for name, verb in (("large.vnnlib", "holds"), ("bomb.vnnlib.gz", "unpacks to")):
        began = time.perf_counter()
        with pytest.raises(PropertyError, match=f"{verb} more than 32 MiB"):
            vnnlib.from_file(tmp_path / name)
        assert time.perf_counter() - began < 5


# --- version 2 --------------------------------------------------------------------------------------------------------

version_2 = pytest.mark.skipif(importlib.util.find_spec("vnnlib") is None, reason="the package vnnlib is not installed")


def network(inputs: str = "[1,1]", outputs: str = "[1,2]", kind: str = "float32") -> str:
    declared = f"(declare-input X {kind} {inputs})\n (declare-output Y {kind} {outputs}))\n"
    return f"(vnnlib-version <2.0>)\n(declare-network f\n {declared}"


def second(text: str, bounds: str = "(assert (>= X[0,0] 0.0)) (assert (<= X[0,0] 1.0))\n") -> Property:
    return vnnlib.parse(network() + bounds + text)


def translated(text: str) -> str:
    """Formulas of version 1 over X_i and Y_j in version 2, over tensors of shape (1, n)."""
    text = re.sub(r"\b([XY])_(\d+)", r"\1[0,\2]", text).replace("(= ", "(== ")
    return re.sub(r"(?<=[ (])-?\d+(?=[ )])", lambda number: f"{number[0]}.0", text)


@version_2
@pytest.mark.parametrize(
    "text",
    [
        "(assert (<= Y_0 Y_1))",
        "(assert (or (and (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3)))",
        "(assert (and (or (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3)))",
        "(assert (= Y_0 -0.1))",
        "(assert (<= (+ Y_0 (* 2 Y_1) 3) 5))",
        "(assert (<= (- Y_0 Y_1 1) (- 5)))",
        "(assert (>= (- Y_0) 0.25))",
        "(assert (<= (* -0.5 (+ Y_0 1) 4) 0))",
        "(assert (or (and (<= X_0 0.25) (<= Y_0 1)) (and (>= X_0 0.75) (<= Y_1 -1))))",
        "(assert (<= (* 2 X_0) 0.679857769)) (assert (<= Y_0 3.991125645861615))",
    ],
)
def test_the_same_in_version_1_and_in_version_2_is_one_property(text: str) -> None:
    assert second(translated(text)) == parse(text)


@version_2
def test_random_formulas_are_the_same_property_in_both_versions() -> None:
    draw, same = random.Random(1), 0
    for _ in range(200):
        text, _ = _formula(draw, 3)
        box = "".join(f"(assert (>= X_{i} -1)) (assert (<= X_{i} 1))" for i in (0, 1))
        body = box + f"(assert (<= Y_0 9)) (assert {text})"
        try:
            first = vnnlib.parse(declared(2, 2) + body)
        except PropertyError:  # no input meets it
            with pytest.raises(PropertyError, match="no input meets"):
                vnnlib.parse(network("[1,2]") + translated(body))
            continue
        assert vnnlib.parse(network("[1,2]") + translated(body)) == first, text
        same += 1
    assert same > 100


@version_2
def test_tensors_are_flattened_in_row_major_order_and_a_tensor_without_dimensions_is_one_number() -> None:
    places = [(i, j, k) for i in range(2) for j in range(3) for k in range(2)]
    bounds = "".join(
        f"(assert (and (>= X[{i},{j},{k}] {number}.0) (<= X[{i},{j},{k}] {number}.5)))"
        for number, (i, j, k) in enumerate(places)
    )
    found = vnnlib.parse(
        network("[2,3,2]", "[]", kind="real") + bounds + "(assert (<= Y 0.1)) ; the end, without a line"
    )
    assert (found.inputs, found.outputs) == (12, 1)
    assert found.cases[0].lower == tuple(map(Fraction, range(12)))
    assert found.cases[0].unsafe == ((at_most("0.1", Y0=1),),)


@version_2
def test_the_numbers_of_version_2_are_exact() -> None:
    digits = "0.1000000000000000055511151231257827021181583404541015624"
    found = second(f"(assert (<= (* 3.0 Y[0,0]) {digits})) (assert (>= Y[0,1] -{digits}))")
    assert Fraction(digits) != Fraction(float(digits))
    bound = Fraction(digits)
    assert [one.bound for one in found.cases[0].unsafe[0]] == [bound, bound]
    # The names of tensors are anybody's, a Real is a real, and letters outside of ASCII may stand in a comment.
    other = network().replace("X", "image").replace("Y float32", "label_2 Real") + "; \u00e9 \u4e2d\n"
    body = "(assert (>= image[0,0] 0.0)) (assert (<= image[0,0] 1.0)) (assert (<= label_2[0,1] 0.5))"
    assert vnnlib.parse(other + body) == second("(assert (<= Y[0,1] 0.5))")


@version_2
@pytest.mark.parametrize(
    "text, place, why",
    [
        ("(assert (<= Z[0,0] 1.0))", "line 6", "undeclared variable, 'Z'"),
        ("(assert (<= y[0,0] 1.0))", "line 6", "undeclared variable, 'y'"),
        ("(assert\n (<= Y[0,7] 1.0))", "line 7", "Index 7 is out of bounds for dimension 1 with size 2"),
        ("(assert (<= Y[0] 1.0))", "line 6", "Expected 2 indices but encountered 1"),
        ("(assert (<= Y[-1,0] 1.0))", "line 6", "'-1' is no dimension and no index"),
        ("(assert (<= Y[0.5,0] 1.0))", "line 6", "'0.5' is no dimension and no index"),
        ("(assert (<= Y[0,99999999999999999999] 1.0))", "line 6", "has too many digits"),
        ("(assert (<= Y[0,0] 1))", "line 6", "type mismatch"),
        ("(assert (<= Y[0,0] nan))", "line 6", "undeclared variable, 'nan'"),
        ("(assert (<= Y[0,0] 1e999999999999))", "line 6:", "syntax error: 'e999999999999'"),
        (f"(assert (<= Y[0,0] {'9' * 350}.0))", "line 6", "has too many digits"),
        (f"(assert (<= Y[0,0] 0.{'0' * 330}1))", "", "a number is too large or too small"),
        ("(assert (<= Y[0,0] 1.0)", "line 6", "syntax error at the end of the text"),
        ("(assert (<= Y[0,0] 1.0)))", "line 6", "syntax error: ')'"),
        ("(assert (not (<= Y[0,0] 1.0)))", "line 6", "syntax error: 'not'"),
        ("(assert (<= Y[0,0] 1.0)) ; \0 (assert", "line 6", "unexpected character"),
        ("(assert (<= \u00e9 1.0))", "line 6", "unexpected character"),
        (
            "(assert (<= X[0,0] -0.5)) (assert (<= Y[0,0] 1.0))",
            "at most -0.5 (line 6)",
            "X[0,0] is at least 0 (line 5)",
        ),
        ("", "", "every input of its box would be a counterexample"),
    ],
)
def test_a_mistake_in_version_2_is_told_with_its_line(text: str, place: str, why: str) -> None:
    with pytest.raises(PropertyError) as caught:
        second(text)
    assert place in str(caught.value)
    assert why in caught.value.why


@version_2
@pytest.mark.parametrize(
    "text, expected",
    [
        (
            network() + "(assert (<= X[0,0] 1.0)) (assert (<= Y[0,0] 1.0))",
            r"input X\[0,0\] has no lower bound.*>= X\[0,0\]",
        ),
        (network("[10000,100000]") + "(assert (<= X[0,0] 1.0))", "X is too large: it is declared with 1,000,000,000"),
        (network("[1,0]") + "(assert (<= Y[0,0] 1.0))", "Dimensions must be positive"),
        (network("[1.5]") + "(assert (<= Y[0,0] 1.0))", "line 3: '1.5' is no dimension"),
        (network().replace("2.0", "3.0") + "(assert (<= Y[0,0] 1.0))", "but found version <3.0>"),
        (network().replace("Y", "X") + "(assert (<= X[0,0] 1.0))", "Variable names must be unique"),
        (network().replace("<2.0>", "<99999999999999999999.0>") + "(assert (<= Y[0,0] 1.0))", "too large or too small"),
        ("(vnnlib-version <2.0>)", "syntax error at the end"),
    ],
)
def test_an_incomplete_property_of_version_2_says_what_is_missing(text: str, expected: str) -> None:
    with pytest.raises(PropertyError, match=expected):
        vnnlib.parse(text)


@version_2
@pytest.mark.parametrize(
    "text, expected",
    [
        ("(assert (<= X[0,0] Y[0,0]))", "line 6: a constraint joins inputs and outputs"),
        ("(assert (<= (* Y[0,0] Y[0,1]) 1.0))", "line 6: a product of variables"),
        ("(assert (< Y[0,0] 1.0))", "line 6: < is not read"),
        ("(assert (or (!= Y[0,0] 1.0) (<= Y[0,1] 0.0)))", "line 6: != is not read"),
    ],
)
def test_formulas_of_version_2_beyond_the_bounds_are_not_applicable(text: str, expected: str) -> None:
    with pytest.raises(UnsupportedProperty, match=expected):
        second(text)


@version_2
@pytest.mark.parametrize(
    "old, new, expected",
    [
        (
            "(declare-network f",
            "(declare-network g (declare-input A float32 [1]) (declare-output B float32 [1]))\n(declare-network f",
            "2 networks",
        ),
        ("(declare-output", "(declare-input Z float32 [3]) (declare-output", "declares 2 inputs: X, Z"),
        ("[1,2])", "[1,2]) (declare-output Z float32 [3])", "declares 2 outputs: Y, Z"),
        ("(declare-output", '(declare-hidden H float32 [3] "node") (declare-output', "declares 1 hidden nodes: H"),
        ("Y float32", "Y float64", "Y is of another type"),
        ("X float32", "X float99", "X is of another type"),
    ],
)
def test_networks_of_version_2_beyond_the_bounds_are_not_applicable(old: str, new: str, expected: str) -> None:
    text = (network() + "(assert (<= Y[0,0] 1.0))").replace(old, new, 1)
    with pytest.raises(UnsupportedProperty, match=expected) as caught:
        vnnlib.parse(text)
    assert isinstance(caught.value, NotApplicable)
    vnnlib.check(text.encode())


@version_2
def test_what_would_exhaust_the_parser_of_version_2_never_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "(and " * 90 + "(<= Y[0,0] 1.0)" + ")" * 90
    assert second(f"(assert {deep})") == second("(assert (<= Y[0,0] 1.0))")
    for text in ("(" * 100_000, "[" * 100_000, "(assert " + "(or " * 100_000 + "(<= Y[0,0] 1.0)" + ")" * 100_001):
        with pytest.raises(PropertyError, match="line 6: parentheses are nested more than 100 deep"):
            second(text)
    monkeypatch.setattr(vnnlib, "WORDS", 1000)
    with pytest.raises(PropertyError, match="the text has more than 1,000 words"):
        second("(assert (<= Y[0,0] 1.0))" * 400)


def test_without_its_package_version_2_can_be_submitted_and_a_job_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vnnlib", None)
    monkeypatch.setattr(vnnlib, "vnnlib_2", LazyModule("vnnlib"))
    text = network() + "(assert (>= X[0,0] 0.0)) (assert (<= X[0,0] 1.0)) (assert (<= Y[0,0] 1.0))"
    vnnlib.check(text.encode())
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vnnlib>=1\.0\.2'"):
        vnnlib.parse(text)
    # What needs no parser to be wrong is refused by anybody.
    with pytest.raises(PropertyError, match="nested more than"):
        vnnlib.check((text + "(" * 200).encode())
    # And nobody who reads version 1 needs it.
    parse("(assert (<= Y_0 1))")


@pytest.mark.parametrize("before", ["", "\n \t", "; a comment (with brackets\n", ";;;;" * 10_000 + "\n;x\n  "])
def test_a_version_is_told_by_the_first_words_whatever_comments_stand_before(before: str) -> None:
    assert vnnlib._IS_VERSION_2.match(before + network())
    assert not vnnlib._IS_VERSION_2.match(before + declared() + "; (vnnlib-version <2.0>)")
    assert not vnnlib._IS_VERSION_2.match(before + "; (vnnlib-version <2.0>)\n" + declared())


# --- files and references ---------------------------------------------------------------------------------------------

GOOD = declared() + boxed() + "(assert (<= Y_0 0))\n"


@pytest.fixture
def store(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.vnnlib").write_text(GOOD)
    (tmp_path / "packed.vnnlib.gz").write_bytes(gzip.compress(GOOD.encode()))
    return tmp_path


def test_a_file_its_gzip_and_its_text_are_one_property(folder: Path, store: Artifacts) -> None:
    resolver = Resolver(folder, {}, store)
    reference = resolver("p.vnnlib", PROPERTY)
    assert reference.startswith("vnnlib:")
    values = ["packed.vnnlib.gz", "packed.vnnlib", str(folder / "p.vnnlib"), {"vnnlib": GOOD}]
    assert {resolver(value, PROPERTY) for value in values} == {reference}
    assert resolver.names[reference] == "p.vnnlib"
    assert not store.folder.exists()
    resolver.commit()
    assert store.read(reference) == GOOD.encode()
    assert Resolver(folder, {}, store)(reference, PROPERTY) == reference
    with artifacts.using(store.folder):
        assert vnnlib.load(reference) == vnnlib.parse(GOOD)
    with pytest.raises(ValueError, match="not the reference of a property"):
        vnnlib.load("onnx:" + "0" * 64)


def test_a_text_is_called_by_its_first_comment(folder: Path, store: Artifacts) -> None:
    resolver = Resolver(folder, {}, store)
    first, second = resolver({"vnnlib": "; never left\n" + GOOD}, PROPERTY), resolver({"vnnlib": GOOD}, PROPERTY)
    assert (resolver.names[first], resolver.names[second]) == ("never left", "property")


def test_a_property_that_changes_after_it_was_checked_is_not_stored(folder: Path, store: Artifacts) -> None:
    resolver = Resolver(folder, {}, store)
    resolver("p.vnnlib", PROPERTY)
    (folder / "p.vnnlib").write_text(GOOD + "(assert (<= Y_0 -1))")
    with pytest.raises(ChangedFile, match=r"p\.vnnlib changed"):
        resolver.commit()
    assert not store.folder.exists()


def test_what_is_no_property_is_refused_when_it_is_submitted(folder: Path, store: Artifacts) -> None:
    (folder / "cut.vnnlib").write_text(GOOD[:-4])
    (folder / "cut.vnnlib.gz").write_bytes(gzip.compress(GOOD.encode())[:-12])
    (folder / "mixed.vnnlib").write_text(GOOD + "(assert (<= X_0 Y_0))")
    resolver = Resolver(folder, {"p": "p.vnnlib"}, store)
    for value, expected in (
        ("cut.vnnlib", r"cut\.vnnlib: .*line 4, column 1: this parenthesis is never closed"),
        ("cut.vnnlib.gz", "gzip archive is damaged or cut"),
        ("absent.vnnlib", "is no file"),
        (".", "is a folder"),
        (3, "is 3, must be the path of a .vnnlib file"),
        ({"text": "x"}, "must be the path of a .vnnlib file"),
        ({"vnnlib": "(assert"}, "the text: .*line 1, column 1"),
        ("onnx:" + "0" * 64, "is a reference of kind onnx, but this field takes vnnlib"),
    ):
        with pytest.raises(ValueError, match=expected):
            resolver(value, PROPERTY)
    # Beyond the bounds is for the job to say.
    assert resolver("mixed.vnnlib", PROPERTY).startswith("vnnlib:")


def _network(folder: Path) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.ones((1, 1), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def test_a_packed_network_is_the_network(folder: Path, store: Artifacts) -> None:
    data = _network(folder)
    (folder / "f.onnx").write_bytes(data)
    (folder / "g.onnx.gz").write_bytes(gzip.compress(data))
    resolver = Resolver(folder, {}, store)
    assert resolver("f.onnx", ANY) == resolver("g.onnx.gz", ANY) == resolver("g.onnx", ANY)
    resolver.commit()
    assert store.read(resolver("g.onnx", ANY)) == data
    onnx.load_model_from_string(store.read(resolver("g.onnx", ANY)))


def test_a_network_that_unpacks_to_too_much_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bomb.onnx.gz").write_bytes(gzip.compress(bytes(20 * 2**20)))
    monkeypatch.setattr(onnx_file, "LARGEST", 10 * 2**20)
    with pytest.raises(InvalidInput, match="unpacks to more than 10 MiB"):
        onnx_file.from_file(folder / "bomb.onnx.gz")
    (folder / "cut.onnx.gz").write_bytes(gzip.compress(_network(folder))[:-9])
    with pytest.raises(InvalidInput, match="damaged or cut"):
        onnx_file.from_file(folder / "cut.onnx.gz")


def test_a_file_is_read_up_to_its_limit_and_not_a_byte_further(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    for name, content in (("plain", data), ("packed", gzip.compress(data) + gzip.compress(data)[:0])):
        (tmp_path / name).write_bytes(content)
        assert files.read(tmp_path / name, len(data)) == data
        with pytest.raises(files.Unreadable):
            files.read(tmp_path / name, len(data) - 1)
    (tmp_path / "two").write_bytes(gzip.compress(data) + gzip.compress(data))
    assert files.read(tmp_path / "two", 2 * len(data)) == data * 2
    (tmp_path / "short").write_bytes(b"\x1f")
    assert files.read(tmp_path / "short", 10) == b"\x1f"


def test_jobs_of_one_network_travel_together_whatever_their_properties(folder: Path, store: Artifacts) -> None:
    (folder / "f.onnx").write_bytes(_network(folder))
    (folder / "q.vnnlib").write_text(GOOD + "(assert (<= Y_0 -1))")
    entry = {
        "method": "verification.verify",
        "params": {"network": "f.onnx"},
        "grid": {"property": ["p.vnnlib", "q.vnnlib"]},
    }
    document = sweeps.document({"jobs": [entry]}, base=folder)
    prepared = sweeps.prepare(document, Resolver(folder, {}, store))
    (segment,) = prepared.segments
    assert len(segment.keys) == 2
    assert segment.group == "f.onnx"
    assert sorted(prepared.names.values()) == ["f.onnx", "p.vnnlib", "q.vnnlib"]
