"""Verdicts are true, stand by independent evaluation, and are the same for every grouping."""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

from netassay import networks, vnnlib  # noqa: E402
from netassay.job import Record  # noqa: E402
from netassay.method import Failure, InvalidInput, NotApplicable  # noqa: E402
from netassay.methods.verification import verify  # noqa: E402
from netassay.networks import evaluate, onnx_file  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape, Scale  # noqa: E402
from netassay.store import artifacts  # noqa: E402
from producer.references import Resolver  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


def kept(graph: Graph) -> str:
    return networks.keep(onnx_file.write(graph, "test"))


def dense(*layers: tuple[Sequence, Sequence], shape: tuple[int, ...] | None = None) -> str:
    """Dense layers with ReLU between them, constants of float32, on a flattened input of `shape`."""
    inputs = np.asarray(layers[0][0]).shape[1]
    shape = shape or (inputs,)
    operations: list = [] if len(shape) == 1 else [Reshape("flatten", "x", "f", (inputs,))]
    at = operations[-1].target if operations else "x"
    for place, layer in enumerate(layers):
        weight, bias = (np.asarray(array, np.float32).astype(np.float64) for array in layer)
        if place:
            operations.append(Relu(f"relu{place}", at, f"a{place}", (weight.shape[1],)))
            at = f"a{place}"
        operations.append(Dense(f"d{place}", at, f"z{place}", (len(bias),), weight, bias))
        at = f"z{place}"
    return kept(Graph(tuple(operations), "x", at, shape, operations[-1].shape))


def text_of(boxes: Sequence[Sequence[tuple[object, object]]], unsafe: str, outputs: int) -> str:
    """A property: the union of boxes (of one box: its bounds), and a formula over the outputs."""
    names = [f"X_{i}" for i in range(len(boxes[0]))] + [f"Y_{j}" for j in range(outputs)]
    parts = [
        "(and " + " ".join(f"(>= X_{i} {low}) (<= X_{i} {high})" for i, (low, high) in enumerate(box)) + ")"
        for box in boxes
    ]
    lines = [f"(declare-const {name} Real)" for name in names]
    return "\n".join([*lines, f"(assert (or {' '.join(parts)}))", f"(assert {unsafe})"])


def property_of(text: str) -> str:
    return f"vnnlib:{artifacts.current().put(text.encode())}"


def ask(network: str, boxes: Sequence[Sequence[tuple[object, object]]], unsafe: str, **more: object) -> verify.Params:
    outputs = int(np.prod(networks.load(network).output_shape))
    return verify.Params(network=network, property=property_of(text_of(boxes, unsafe, outputs)), **more)  # type: ignore[arg-type]


def verdict(network: str, boxes: Sequence[Sequence[tuple[object, object]]], unsafe: str, **more: object) -> str:
    return verify.run(ask(network, boxes, unsafe, **more)).verdict


def replayed(network: str, point: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(networks.content(network), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    return session.run(None, {given.name: point.reshape(shape)})[0].ravel()


def is_unsafe(reference: str, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the pair lies in the unsafe set, in exact arithmetic."""
    return any(
        case.contains(x.ravel().tolist())
        and any(all(one.violation(y.tolist()) <= 0 for one in conjunction) for conjunction in case.unsafe)
        for case in vnnlib.load(reference).cases
    )


def decided(results: Sequence) -> list[tuple]:
    points = [None if result.counterexample is None else result.counterexample.tobytes() for result in results]
    return [(r.verdict, r.by, r.arithmetic, r.refuted, r.violation, p) for r, p in zip(results, points, strict=True)]


#: |x| = relu(x) + relu(-x).
@pytest.fixture(scope="module")
def absolute() -> str:
    return dense(([[1], [-1]], [0, 0]), ([[1, 1]], [0]))


# --- small cases by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, unsafe, expected",
    [
        ((-1, 1), "(<= Y_0 -0.01)", "unsat"),
        ((-1, 1), "(>= Y_0 1.001)", "unsat"),
        ((-1, 1), "(>= Y_0 1)", "sat"),  # at both corners, and nowhere else
        ((-1, 1), "(<= Y_0 0)", "sat"),  # at 0 only
        ((-1, 0.5), "(>= Y_0 0.75)", "sat"),
        ((0.25, 1), "(<= Y_0 0.2)", "unsat"),
        ((-1, 1), "(and (>= Y_0 0.9) (<= Y_0 0.1))", "unsat"),  # each can be met, the two together on no part
        ((-1, 1), "(and (>= Y_0 0.9) (<= Y_0 -0.1))", "unsat"),  # the second cannot
        ((-1, 1), "(or (>= Y_0 1.5) (<= Y_0 -0.5))", "unsat"),
        ((-1, 1), "(or (>= Y_0 1.5) (<= Y_0 0.5))", "sat"),
        ((0.5, 0.5), "(= Y_0 0.5)", "sat"),
    ],
)
def test_the_absolute_value_is_decided_by_hand(
    absolute: str, box: tuple[float, float], unsafe: str, expected: str
) -> None:
    assert verdict(absolute, [[box]], unsafe) == expected


def test_coefficients_so_small_that_they_underflow_prove_nothing() -> None:
    network = dense(([[1.2e-24, 1.2e-24]], [1.5e-24]))
    at = -100.1
    weight, bias = (Fraction(float(np.float32(number))) for number in (1.2e-24, 1.5e-24))
    assert 2 * weight * Fraction(str(at)) + bias < 0, "unsafe in exact arithmetic"
    for coefficient in ("1", "2e-300"):
        assert verdict(network, [[(at, at)] * 2], f"(<= (* {coefficient} Y_0) 0)") != "unsat"


def test_what_is_split_knows_its_conjunctions_its_boxes_and_its_budget(absolute: str) -> None:
    alone = {"samples": 0, "steps": 0, "restarts": 1}
    # Of two conjunctions only the second can be met, and only where no corner and no middle of the box is.
    either = "(or (and (>= Y_0 0.9) (<= Y_0 0.1)) (and (>= Y_0 0.3) (<= Y_0 0.31)))"
    met = verify.run(ask(absolute, [[(-1, 1)]], either, **alone))
    assert (met.verdict, met.by) == ("sat", "splitting")
    assert 0.3 <= abs(float(met.counterexample[0])) <= 0.31
    assert met.refuted < met.pairs == 2
    both = "(and (>= Y_0 0.9) (<= Y_0 0.1))"
    boxes = [[(-1, 1)], [(-2, 1)], [(-1, 2)]]
    whole = verify.run(ask(absolute, boxes, both, **alone))
    assert (whole.verdict, whole.by, whole.left) == ("unsat", "splitting", 0)
    assert whole.depth > 0
    assert whole.trace[-1, 1] > 0
    short = verify.run(ask(absolute, boxes, both, budget=2, **alone))
    assert (short.verdict, short.nodes) == ("unknown", 2)
    assert short.left > 0
    assert short.margin <= 0
    assert short.trace is not None


def test_a_union_of_boxes_is_safe_only_where_every_box_is(absolute: str) -> None:
    safe, also, not_safe = [(0.5, 1)], [(-1, -0.5)], [(-0.25, 0.25)]
    result = verify.run(ask(absolute, [safe, also], "(<= Y_0 0.375)"))
    assert (result.verdict, result.boxes, result.pairs, result.refuted) == ("unsat", 2, 2, 2)
    assert result.margins == pytest.approx([0.125, 0.125], abs=1e-5)
    assert result.margin == min(result.margins)
    result = verify.run(ask(absolute, [safe, not_safe, also], "(or (<= Y_0 0.375) (>= Y_0 1.5))"))
    assert (result.verdict, result.boxes, result.pairs, result.refuted) == ("sat", 3, 6, 5)
    assert abs(result.counterexample[0]) <= 0.25


def test_inputs_are_numbered_row_major_and_outputs_too() -> None:
    weight = np.arange(1, 7)[None]
    network = dense((weight, [0]), shape=(1, 2, 3))
    for place in range(6):
        box = [(0, 0)] * place + [(0, 1)] + [(0, 0)] * (5 - place)
        result = verify.run(ask(network, [box], f"(>= Y_0 {place + 1})"))
        assert result.verdict == "sat"
        assert result.counterexample.shape == (1, 2, 3)
        assert result.counterexample.ravel().tolist() == [float(i == place) for i in range(6)]
        assert verdict(network, [box], f"(>= Y_0 {place + 1.001})") == "unsat"


def test_coefficients_of_any_size_and_decimals_decide_alike(absolute: str) -> None:
    for scale in ("1", "0.1", "3e-7", "1e-250", "1e250", "0.3333333333333333333333333333"):
        for threshold, expected in (("1.001", "unsat"), ("0.999", "sat")):
            unsafe = f"(>= (* {scale} Y_0) (* {scale} {threshold}))"
            assert verdict(absolute, [[(-1, 1)]], unsafe) == expected, (scale, threshold)


def test_a_coefficient_that_float64_cannot_hold_is_paid_for() -> None:
    # y - y' + (1/3) y'' over exact y, y', y'': the decimal is above the float64 nearest to it or below.
    network = dense((np.eye(3), np.zeros(3)))
    box = [(1, 1), (1, 1), (2**40, 2**40)]
    for c in ("0.1", "0.3", "0.7"):
        exact, rounded = Fraction(c) * 2**40, Fraction(float(c)) * 2**40
        assert exact != rounded
        between = (exact + rounded) / 2
        number = f"(/ {between.numerator} {between.denominator})"
        # Unsafe from the middle between the exact and the rounded value: whichever side is exact decides.
        upward = verdict(network, [box], f"(>= (+ Y_0 (- Y_1) (* {c} Y_2)) {number})")
        assert upward == ("sat" if exact >= between else "unknown")


# --- floating point ---------------------------------------------------------------------------------------------------


def test_a_verdict_may_hold_in_float32_only() -> None:
    """x + 2^25 - 2^25 is x in real arithmetic, and 0 for |x| <= 1 in float32."""
    network = dense(([[1]], [2**25]), ([[1]], [-(2**25)]))
    result = verify.run(ask(network, [[(1, 1)]], "(<= Y_0 0.5)"))
    assert (result.verdict, result.arithmetic, result.violation) == ("sat", "float32", -0.5)
    assert result.output.tolist() == [0.0]
    # What holds in real arithmetic is not called proven, for the float32 runtime says otherwise.
    assert verdict(network, [[(1, 1)]], "(>= Y_0 1)") == "unknown"
    assert verdict(network, [[(1, 1)]], "(>= Y_0 1000)") == "unsat"
    exact = dense(([[1]], [2]), ([[1]], [-2]))
    assert verify.run(ask(exact, [[(1, 1)]], "(>= Y_0 0.999999999)")).arithmetic == "real and float32"


def test_what_float32_may_round_away_is_proven_by_no_bound() -> None:
    """Both networks are 1 in real arithmetic; float32 sums lose the 1 beside 2^25, or do not, as their order is."""
    whole = {"budget": 0}  # what is split is proven for real arithmetic only, and says so
    once = dense(([[1, 2**25, -(2**25)]], [0]))
    assert verdict(once, [[(1, 1)] * 3], "(<= Y_0 0.5)", **whole) != "unsat"
    assert verify.run(ask(once, [[(1, 1)] * 3], "(<= Y_0 0.5)")).arithmetic in ("real", "float32")
    assert verdict(once, [[(1, 1)] * 3], "(<= Y_0 -1000)") == "unsat"
    # The first two of these neurons cancel; only linear bounds see that, so intervals prove nothing anyway.
    first = ([[1], [1], [0], [0]], [2, 2, 2**25, 1])
    for large, expected in ((2**25, ("sat", "unknown")), (2**23, ("unknown",)), (2**3, ("unsat",))):
        neurons = (first[0], [2, 2, large, 1])
        network = dense(neurons, ([[1, -1, 1, 1]], [-large]))
        assert verdict(network, [[(0, 1)]], "(<= Y_0 0.5)", bounds="ibp", **whole) == "unknown" or "sat" in expected
        assert verdict(network, [[(0, 1)]], "(<= Y_0 0.5)", **whole) in expected
        if large == 2**23:
            split = verify.run(ask(network, [[(0, 1)]], "(<= Y_0 0.5)"))
            assert (split.verdict, split.by, split.arithmetic) == ("unsat", "splitting", "real")


def test_a_decimal_bound_is_neither_left_by_a_counterexample_nor_rounded_away(absolute: str) -> None:
    # The float32 nearest to 0.1 lies above it, that nearest to 0.7 below.
    above, below = float(np.float32(0.1)), float(np.float32(0.7))
    assert Fraction(above) > Fraction("0.1")
    assert Fraction(below) < Fraction("0.7")
    for box, unsafe, expected in (
        ((0.1, 0.2), "(<= Y_0 0.1)", "unknown"),
        ((0.1, 0.2), f"(<= Y_0 {above!r})", "sat"),
        ((0.1, 0.2), "(<= Y_0 0.0999)", "unsat"),
        ((0.6, 0.7), "(>= Y_0 0.7)", "unknown"),
        ((0.6, 0.7), f"(>= Y_0 {below!r})", "sat"),
        ((0.6, 0.7), "(>= Y_0 0.7001)", "unsat"),
        # No float32 is 0.1, so there is nothing to replay.
        ((0.1, 0.1), "(<= Y_0 1)", "unknown"),
        ((0.1, 0.1), "(<= Y_0 0)", "unsat"),
    ):
        assert verdict(absolute, [[box]], unsafe) == expected, (box, unsafe)


def test_where_a_float32_evaluation_may_overflow_nothing_is_proven() -> None:
    # 3e38 x - 3e38 x + 1 is 1 in exact arithmetic, and NaN or infinite in float32 for x = 4.
    network = dense(([[3e38], [3e38]], [0, 0]), ([[1e-38, -1e-38]], [1]))
    for box, expected in ((0.25, "unsat"), (4, "unknown")):
        result = verify.run(ask(network, [[(0, box)]], "(<= Y_0 -100)", budget=0))
        assert result.verdict == expected
    assert verdict(network, [[(-(10**39), 10**39)]], "(<= Y_0 -100)", budget=0) == "unknown"
    split = verify.run(ask(network, [[(0, 4)]], "(<= Y_0 -100)"))
    assert (split.verdict, split.arithmetic) == ("unsat", "real")


# --- independent evaluation -------------------------------------------------------------------------------------------


def random_network(generator: np.random.Generator, kind: str) -> str:
    if kind == "dense":
        widths = [3, *generator.integers(3, 9, size=generator.integers(1, 4)), 3]
        return dense(
            *(
                (generator.normal(size=(b, a)) / np.sqrt(a), generator.normal(size=b) / 4)
                for a, b in itertools.pairwise(widths)
            )
        )
    operations = (
        Scale("scale", "x", "s", (1, 2, 2), np.float64(2.0), np.float64(-0.5)),
        Conv("conv", "s", "c", (2, 2, 2), generator.normal(size=(2, 1, 3, 3)).astype(np.float32).astype(np.float64),
             np.zeros(2), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        Relu("relu", "c", "a", (2, 2, 2)),
        Reshape("flatten", "a", "f", (8,)),
        Dense("dense", "f", "y", (3,), generator.normal(size=(3, 8)).astype(np.float32) * 1.0, np.zeros(3)),
    )  # fmt: skip
    return kept(Graph(operations, "x", "y", (1, 2, 2), (3,)))


def random_question(generator: np.random.Generator, network: str, **more: object) -> verify.Params:
    """Up to three small boxes, and up to three conjunctions of constraints near the outputs met there."""
    graph = networks.load(network)
    inputs = int(np.prod(graph.input_shape))
    centre, width = generator.uniform(-1, 1, size=inputs), generator.choice([0.02, 0.1, 0.4])
    boxes = []
    for _ in range(generator.integers(1, 4)):
        at = centre + generator.uniform(-0.2, 0.2, size=inputs)
        boxes.append([(round(float(v), 6), round(float(v + width), 6)) for v in at])
    points = torch.tensor(centre.reshape(1, *graph.input_shape))
    outputs = networks.evaluate.forward(graph, points).flatten().numpy()
    conjunctions = []
    for _ in range(generator.integers(1, 4)):
        constraints = []
        for _ in range(generator.integers(1, 3)):
            c = generator.choice([-2, -1, 1, 2], size=3) * generator.permutation([1, 1, generator.integers(2)])
            bound = float(c @ outputs) - generator.choice([0.1, 0.5, 1.5]) * generator.random()
            terms = " ".join(f"(* {v} Y_{j})" for j, v in enumerate(c))
            constraints.append(f"(<= (+ {terms} 0) {bound:.6f})")
        conjunctions.append(f"(and {' '.join(constraints)})")
    return ask(network, boxes, f"(or {' '.join(conjunctions)})", **more)


@pytest.fixture(scope="module")
def asked() -> list[list[verify.Params]]:
    generator = np.random.default_rng(0)
    found = []
    for kind in ["dense"] * 8 + ["conv"] * 4:
        network = random_network(generator, kind)
        found.append([random_question(generator, network, samples=200, steps=15) for _ in range(12)])
    return found


@pytest.fixture(scope="module")
def answered(asked: list[list[verify.Params]]) -> list[list[verify.Result]]:
    return [verify.run_many(params) for params in asked]


def test_no_sampled_point_is_unsafe_where_unsat_was_said(asked: list, answered: list) -> None:
    generator = torch.Generator().manual_seed(0)
    counts: Counter[str] = Counter()
    for params, result in zip(itertools.chain(*asked), itertools.chain(*answered), strict=True):
        counts[result.verdict] += 1
        graph = networks.load(params.network)
        number = 0
        for case in vnnlib.load(params.property).cases:
            lower, upper = (torch.tensor(side).reshape(graph.input_shape) for side in case.outward())
            share = torch.rand(3000, *graph.input_shape, generator=generator, dtype=torch.float64)
            share[::2] = share[::2].round()
            outputs = networks.evaluate.forward(graph, lower + share * (upper - lower)).flatten(1)
            for conjunction in case.unsafe:
                c = torch.tensor([[float(dict(one.coefficients).get(j, 0)) for j in range(3)] for one in conjunction])
                bound = torch.tensor([float(one.bound) for one in conjunction], dtype=torch.float64)
                violation = (outputs @ c.double().T - bound).amax(1)
                # The margin bounds one constraint of the conjunction, and so the largest violation, from below.
                assert float(violation.min()) >= result.margins[number]
                if result.verdict == "unsat":
                    assert float(violation.min()) > 0
                number += 1
        assert number == result.pairs
        assert result.refuted == (result.margins > 0).sum()
        assert (result.verdict == "unsat") == (result.margin > 0)
    assert min(counts[one] for one in ("sat", "unsat")) > 20, counts


def test_every_counterexample_lies_in_its_box_and_is_unsafe_in_onnxruntime(asked: list, answered: list) -> None:
    seen = 0
    for params, result in zip(itertools.chain(*asked), itertools.chain(*answered), strict=True):
        assert (result.counterexample is not None) == (result.verdict == "sat") == (result.output is not None)
        if result.verdict == "sat":
            seen += 1
            assert result.counterexample.dtype == np.float32
            output = replayed(params.network, result.counterexample)
            assert output.tolist() == result.output.tolist()
            assert is_unsafe(params.property, result.counterexample, output)
            assert result.violation <= 0
        elif result.violation is not None:
            assert result.violation > 0
    assert seen > 20


def test_verdicts_are_the_same_for_every_grouping(asked: list, answered: list) -> None:
    for params, together in zip(asked[::3], answered[::3], strict=True):
        alone = [verify.run(one) for one in params]
        assert decided(alone) == decided(together)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one.margins, other.margins, rtol=1e-9, atol=1e-9)
        order = np.random.default_rng(1).permutation(len(params)).tolist()
        shuffled = [
            result for start in range(0, len(order), 5)
            for result in verify.run_many([params[place] for place in order[start : start + 5]])
        ]  # fmt: skip
        assert decided(shuffled) == decided([together[place] for place in order])


def test_a_property_too_large_for_one_call_is_bounded_in_parts(monkeypatch: pytest.MonkeyPatch, asked: list) -> None:
    expected = [verify.run_many(params) for params in asked[:4]]
    monkeypatch.setattr(verify, "_BOXES", 2)
    monkeypatch.setattr(verify, "_ROWS", 2)
    monkeypatch.setattr(verify, "_COEFFICIENTS", 40)
    for params, results in zip(asked[:4], expected, strict=True):
        assert decided(verify.run_many(params)) == decided(results)


def test_a_bound_within_rounding_of_a_decision_is_computed_alone(monkeypatch: pytest.MonkeyPatch, asked: list) -> None:
    params = asked[0]
    expected = decided(verify.run_many(params))
    sizes: list[int] = []
    lower = verify.backward.lower

    def counting(graph: Graph, region: verify.Box, *rest: object, **more: object) -> object:
        sizes.append(len(region))
        return lower(graph, region, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(verify.backward, "lower", counting)
    # With a band this wide every bound is near a decision.
    monkeypatch.setattr(verify.backward, "NOISE", 1e30)
    assert decided(verify.run_many(params)) == expected
    assert sizes[0] > 1
    assert set(sizes[1:]) == {1}
    assert len(sizes) >= 1 + sizes[0]


def test_tighter_bounds_refute_more_and_never_say_otherwise(asked: list) -> None:
    refuted = Counter[str]()
    for params in itertools.chain(*asked):
        results = {}
        for bounds in ("ibp", "crown_ibp", "crown"):
            chosen = params.model_copy(update={"bounds": bounds, "samples": 0, "steps": 0, "budget": 0})
            results[bounds] = verify.run(chosen)
            refuted[bounds] += results[bounds].refuted
            assert results[bounds].by in (
                {"ibp", "attack", None} if bounds == "ibp" else {"ibp", "attack", "crown", None}
            )
        assert {result.verdict for result in results.values()} not in ({"sat", "unsat"}, {"sat", "unsat", "unknown"})
    assert refuted["ibp"] < refuted["crown_ibp"] <= refuted["crown"]


def test_the_attack_finds_a_narrow_corner_that_the_middle_does_not_show() -> None:
    # The unsafe outputs lie within 1e-3 of one corner of a box with 8 inputs: 1 in 10^20 of its points.
    weight = np.array([[1, -1, 1, 1, -1, -1, 1, -1]])
    network = dense((weight, [0]), ([[1.0]], [0.0]))
    result = verify.run(ask(network, [[(-1, 1)] * 8], "(>= Y_0 7.999)", samples=0))
    assert result.verdict == "sat"
    assert result.counterexample.tolist() == weight[0].tolist()


def test_corners_are_among_the_samples() -> None:
    """A network that is 0 but near one corner of its box: no gradient leads there, and intervals have no corners."""
    weight = np.array([[1, -1, 1, 1, -1, -1]])
    network = dense((weight, [-5.75]), ([[1.0]], [0.0]))
    question = ask(network, [[(-1, 1)] * 6], "(>= Y_0 0.1)", bounds="ibp", samples=800, seed=3)
    result = verify.run(question)
    assert (result.verdict, result.by) == ("sat", "attack")
    assert float(result.counterexample @ weight[0]) >= 5.85
    assert verify.run(question.model_copy(update={"samples": 0, "budget": 0})).verdict == "unknown"


# --- what does not apply ----------------------------------------------------------------------------------------------


def test_an_operator_without_bounds_is_named_with_its_node() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
            helper.make_node("Hardmax", ["h"], ["y"], name="odd"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.ones((1, 1), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    network = networks.keep(model.SerializeToString())
    params = verify.Params(network=network, property=property_of(text_of([[(0, 1)]], "(<= Y_0 0)", 1)))
    with pytest.raises(NotApplicable, match=r"odd.*Hardmax"):
        verify.run(params)
    failures = verify.run_many([params, params])
    assert {failure.cause for failure in failures if isinstance(failure, Failure)} == {"not_applicable"}


def test_what_does_not_fit_fails_alone_and_says_why(absolute: str) -> None:
    good = ask(absolute, [[(-1, 1)]], "(<= Y_0 -1)")

    def asking(text: str) -> verify.Params:
        return good.model_copy(update={"property": property_of(text)})

    simple = text_of([[(0, 1)]], "(<= Y_0 0)", 1)
    cases = [
        (asking(text_of([[(0, 1)] * 2], "(<= Y_0 0)", 1)), "invalid_input", "is about 2 inputs, the network has 1"),
        (asking(text_of([[(0, 1)]], "(<= Y_0 Y_1)", 2)), "invalid_input", "is about 2 outputs, the network has 1"),
        (asking(simple + "(assert (<= X_0 Y_0))"), "not_applicable", "joins inputs and outputs"),
        (asking(simple + "(assert (<= (* Y_0 Y_0) 1))"), "not_applicable", "product of variables"),
        (asking(simple + "(assert (not (<= Y_0 1)))"), "not_applicable", "not is not read"),
        (asking("(assert"), "invalid_input", "line 1, column 1"),
    ]
    ends = verify.run_many([good, *(params for params, _, _ in cases), good])
    assert decided([ends[0], ends[-1]]) == decided([verify.run(good)] * 2)
    for (params, cause, words), end in zip(cases, ends[1:-1], strict=True):
        assert isinstance(end, Failure)
        assert end.cause == cause
        assert words in end.message
        with pytest.raises(NotApplicable if cause == "not_applicable" else InvalidInput):
            verify.run(params)


def test_a_file_that_is_no_network_is_invalid() -> None:
    network = networks.keep(b"not a network")
    params = verify.Params(network=network, property=property_of(text_of([[(0, 1)]], "(<= Y_0 0)", 1)))
    with pytest.raises(InvalidInput, match="not an ONNX file"):
        verify.run(params)


def test_of_a_sum_too_long_for_float32_bounds_real_arithmetic_is_proven() -> None:
    network = dense((np.ones((170_000, 1)), np.zeros(170_000)), (np.ones((1, 170_000)), [0]))
    result = verify.run(ask(network, [[(0, 1)]], "(<= Y_0 -1)"))
    assert (result.verdict, result.arithmetic) == ("unsat", "real")


def other(kind: str) -> str:
    """A network 2 -> 3 -> 1 with one operator between two products; its reference."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node(kind, ["h"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"]),
    ]
    constants = {"w": [[1, -1, 0.5], [1, 2, -1]], "b": [0, 0.5, -0.5], "v": [[1], [-1], [2]]}
    tensors = [numpy_helper.from_array(np.array(of, np.float32), name) for name, of in constants.items()]
    info = helper.make_tensor_value_info
    ends = [info("x", TensorProto.FLOAT, ["n", 2])], [info("y", TensorProto.FLOAT, ["n", 1])]
    graph = helper.make_graph(nodes, kind, *ends, tensors)
    opset = helper.make_opsetid("", 20)
    return networks.keep(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())


@pytest.mark.parametrize("kind", ["Tanh", "Sigmoid", "Gelu", "Sin", "LeakyRelu", "HardSwish", "Softplus", "Abs"])
def test_networks_of_any_function_are_decided_around_their_least_value(kind: str) -> None:
    network = other(kind)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 201), np.linspace(-1, 1, 201)), -1).reshape(-1, 2)
    graph = networks.load(network)
    least = float(evaluate.forward(graph, torch.from_numpy(grid)).min())
    box = [(-1, 1), (-1, 1)]
    below, above = (verify.run(ask(network, [box], f"(<= Y_0 {least + gap:.9f})")) for gap in (-0.05, 0.01))
    assert (below.verdict, above.verdict) == ("unsat", "sat")
    assert kind in ("LeakyRelu", "Abs") or below.arithmetic == "real"  # nobody knows a runtime's tanh


def test_a_graph_that_is_not_its_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = dense(([[1]], [0]))
    wrong = networks.load(dense(([[1.001]], [0])))
    monkeypatch.setattr(verify.networks, "load", lambda reference: wrong)
    with pytest.raises(InvalidInput, match="not what onnxruntime computes"):
        verify.run(ask(network, [[(0, 1)]], "(<= Y_0 -1)"))


# --- the competition's own instances ----------------------------------------------------------------------------------

BENCHMARKS = Path(
    os.environ.get("NETASSAY_BENCHMARKS", Path(__file__).resolve().parents[3] / "shared" / "benchmarks")
)  # beside the repository
#: Instances of each kind of verdict that the bounds or the attack reach, and one beyond them.
INSTANCES = [
    ("test", "test_sat.onnx", "test_prop.vnnlib", "sat"),
    ("test", "test_unsat.onnx", "test_prop.vnnlib", "unsat"),
    ("test", "test_nano.onnx", "test_nano.vnnlib", "unsat"),
    ("acasxu", "ACASXU_run2a_1_1_batch_2000.onnx", "prop_1.vnnlib", None),
    ("acasxu", "ACASXU_run2a_2_1_batch_2000.onnx", "prop_2.vnnlib", "sat"),
    ("acasxu", "ACASXU_run2a_1_9_batch_2000.onnx", "prop_4.vnnlib", None),
    ("acasxu", "ACASXU_run2a_1_1_batch_2000.onnx", "prop_6.vnnlib", None),
    ("acasxu", "ACASXU_run2a_2_9_batch_2000.onnx", "prop_8.vnnlib", "sat"),
    ("mnistfc", "mnist-net_256x2.onnx", "prop_2_0.03.vnnlib", "unsat"),
    ("mnistfc", "mnist-net_256x2.onnx", "prop_7_0.03.vnnlib", "sat"),
]


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the competition's files are not here (NETASSAY_BENCHMARKS)")
@pytest.mark.parametrize("category", ["test", "acasxu", "mnistfc"])
def test_instances_of_the_competition_are_decided_as_its_tools_did(category: str) -> None:
    folder = BENCHMARKS / category
    with open(folder / "verdicts.csv", newline="") as stream:
        truth = {(row["onnx"], row["vnnlib"]): row["verdict"] for row in csv.DictReader(stream)}
    resolver = Resolver(folder, at_once=True)
    for of, network, wanted, expected in INSTANCES:
        if of != category:
            continue
        params = verify.Params.model_validate({"network": network, "property": wanted}, context={"resolve": resolver})
        result = verify.run(params)
        known = truth[network, wanted]
        assert result.verdict in (known, "unknown"), (network, wanted)
        if category == "acasxu":
            assert result.verdict == known
        assert expected in (None, result.verdict), (network, wanted, result.verdict)
        if result.verdict == "sat":
            output = replayed(params.network, result.counterexample)
            assert is_unsafe(params.property, result.counterexample, output)


# --- plot -------------------------------------------------------------------------------------------------------------


def record(number: int, network: str, wanted: str, result: dict | None, seconds: float = 0.5) -> Record:
    return Record(
        id=number, key=f"{number:032x}", method="verification.verify", version=1,
        params={"network": f"onnx:{network}", "property": f"vnnlib:{wanted}"},
        state="failed" if result is None else "done", result=result, seconds=seconds,
        names={f"onnx:{network}": network, f"vnnlib:{wanted}": wanted},
    )  # fmt: skip


def test_the_plot_counts_every_instance_once() -> None:
    kinds = [("unsat", 1.0, 2.0), ("sat", -1.0, -0.5), ("unknown", -3.0, 0.25), ("unknown", -np.inf, None)]
    records = []
    for number, (network, wanted) in enumerate(itertools.product(("a", "b", "c"), ("prop_2", "prop_10"))):
        said, margin, violation = kinds[number % 4]
        result = {"verdict": said, "margin": margin, "violation": violation}
        records.append(record(number, network, wanted, None if number == 5 else result, seconds=0.1 * number))
    figure = verify.plot(records)
    bars, within, open_ = figure.panels
    # By property, which are fewer, in the order a person counts.
    assert bars.marks[0].x == ["prop_2", "prop_10"]
    assert {mark.label: mark.y for mark in bars.marks} == {
        "unsat": [2, 0], "sat": [0, 1], "unknown": [1, 1], "no result": [0, 1],
    }  # fmt: skip
    assert {mark.label: (mark.x, mark.y) for mark in within.marks} == {
        "unsat": ([0.001, pytest.approx(0.4)], [1, 2]),
        "sat": ([pytest.approx(0.1)], [1]),
    }
    assert [(mark.label, mark.x, mark.y) for mark in open_.marks] == [("prop_2", [0.25], [3.0])]
    assert figure.caption.startswith("3 of 6 instances decided")
