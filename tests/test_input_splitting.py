"""Branch and bound over inputs against exact minima (MILP), sampling, and cases by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

torch = pytest.importorskip("torch")

from netassay.networks.graph import Dense, Graph, Operation, Relu, Reshape  # noqa: E402
from netassay.numerics.branch_and_bound import inputs  # noqa: E402
from netassay.numerics.branch_and_bound.inputs import Query  # noqa: E402

Weights = Sequence[tuple[np.ndarray, np.ndarray]]


def network(weights: Weights, last_relu: bool = False) -> Graph:
    """Dense layers with a ReLU between each two, behind a flatten."""
    size = weights[0][0].shape[1]
    operations: list[Operation] = [Reshape("flat", "x", "v0", (size,))]
    for number, (weight, bias) in enumerate(weights, 1):
        before = f"v{number - 1}" if number == 1 else f"r{number - 1}"
        operations.append(Dense(f"d{number}", before, f"v{number}", (len(bias),), weight, bias))
        if number < len(weights) or last_relu:
            operations.append(Relu(f"a{number}", f"v{number}", f"r{number}", (len(bias),)))
    return Graph(tuple(operations), "x", operations[-1].target, (1, size), operations[-1].shape)


def drawn(sizes: Sequence[int], seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return [
        (draw.normal(size=(n, m)) / math.sqrt(m) * 1.5, draw.normal(size=n) * 0.3) for m, n in itertools.pairwise(sizes)
    ]


def outputs(weights: Weights, points: np.ndarray) -> np.ndarray:
    for weight, bias in weights[:-1]:
        points = np.maximum(points @ weight.T + bias, 0)
    return points @ weights[-1][0].T + weights[-1][1]


def query(
    lower: Sequence[float], upper: Sequence[float], *conjunctions: Sequence[tuple[Sequence[float], float]]
) -> Query:
    """conjunctions: of (c, b)."""
    constraints = [(owner, c, b) for owner, one in enumerate(conjunctions) for c, b in one]
    rows = torch.tensor([c for _, c, _ in constraints], dtype=torch.float64)
    unit = 2.0 ** -torch.floor(torch.log2(rows.abs().amax(1)))
    bound = torch.tensor([b for *_, b in constraints], dtype=torch.float64)
    ends = (torch.tensor(end, dtype=torch.float64) for end in (lower, upper))
    return Query(*ends, rows * unit[:, None], bound * unit, torch.tensor([owner for owner, *_ in constraints]))


def search(
    weights: Weights, asked: Query, budget: int = 20_000, graph: Graph | None = None, batch: int = inputs.BATCH
) -> tuple[inputs.Answer, list[np.ndarray]]:
    """What comes of it, and the points it found; a judge accepts what float64 says is unsafe."""
    graph = graph or network(weights)
    found: list[np.ndarray] = []

    def judge(point: torch.Tensor, conjunction: int) -> bool:
        assert bool((point >= asked.lower).all() & (point <= asked.upper).all())
        of = asked.owners == conjunction
        values = asked.rows[of].numpy() @ outputs(weights, point.numpy()[None])[0] - asked.bound[of].numpy()
        if bool((values <= 0).all()):
            found.append(point.numpy())
        return bool((values <= 0).all())

    stack = inputs.layers(graph, torch.float64)
    assert stack is not None
    return inputs.search(graph, stack, asked, judge, budget, seed=0, batch=batch), found


def minimum(weights: Weights, lower: np.ndarray, upper: np.ndarray, c: np.ndarray) -> float:
    """min c.f over the box by mixed-integer programming, to 1e-7: an independent and exact answer.

    Variables: x, then of each hidden layer z >= 0 and a binary; z >= w x + b, z <= w x + b - l (1 - a), z <= u a.
    """
    sizes = [len(lower), *(len(bias) for _, bias in weights[:-1])]
    total = sizes[0] + 2 * sum(sizes[1:])
    low, high, integral = np.zeros(total), np.ones(total), np.zeros(total)
    low[: sizes[0]], high[: sizes[0]] = lower, upper
    rows, least, most = [], [], []
    before, place, box = 0, sizes[0], (lower, upper)
    for weight, bias in weights[:-1]:
        n = len(bias)
        middle, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
        below, above = (weight @ middle + bias + sign * (np.abs(weight) @ half + 1e-9) for sign in (-1, 1))
        high[place : place + n], integral[place + n : place + 2 * n] = np.maximum(above, 0), 1
        for i in range(n):
            row = np.zeros(total)
            row[before : before + weight.shape[1]], row[place + i] = -weight[i], 1
            rows.append(row)
            least.append(bias[i])
            most.append(np.inf)
            row = row.copy()
            row[place + n + i] = -min(below[i], 0)
            rows.append(row)
            least.append(-np.inf)
            most.append(bias[i] - min(below[i], 0))
            row = np.zeros(total)
            row[place + i], row[place + n + i] = 1, -max(above[i], 0)
            rows.append(row)
            least.append(-np.inf)
            most.append(0)
        box, before, place = (np.maximum(below, 0), np.maximum(above, 0)), place, place + 2 * n
    cost = np.zeros(total)
    cost[before : before + weights[-1][0].shape[1]] = c @ weights[-1][0]
    solved = milp(
        cost, constraints=LinearConstraint(np.array(rows), np.array(least), np.array(most)), integrality=integral,
        bounds=Bounds(low, high), options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert solved.status == 0
    return float(solved.fun + c @ weights[-1][1])


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_between_refuted_and_met_is_the_exact_minimum(seed: int) -> None:
    size = 1 + seed % 3
    weights = drawn([size, 8, 8, 3], seed)
    c = np.random.default_rng(100 + seed).normal(size=3)
    lower, upper = -np.ones(size), np.ones(size)
    exact = minimum(weights, lower, upper, c)
    refuted, none = search(weights, query(lower.tolist(), upper.tolist(), [(c.tolist(), exact - 1e-3)]))
    assert not none
    assert float(refuted.margins) > 0
    assert refuted.open == 0
    met, points = search(weights, query(lower.tolist(), upper.tolist(), [(c.tolist(), exact + 1e-3)]))
    assert met.found
    assert c @ outputs(weights, points[-1][None])[0] <= exact + 1e-3


def test_of_a_conjunction_one_row_refutes_a_part_and_of_a_disjunction_all_have_to() -> None:
    # f = (|x|, x) on [-1, 1]: |x| >= 0.9 and x <= 0.5 and x >= -0.5 meet nowhere, though each is met, and any two.
    weights = [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, 1.0], [1.0, -1.0]]), np.zeros(2))]
    far, low, high = ([-1.0, 0.0], -0.9), ([0.0, 1.0], 0.5), ([0.0, -1.0], 0.5)
    answer, points = search(weights, query([-1], [1], [far, low, high]))
    assert float(answer.margins) > 0
    assert not points
    answer, points = search(weights, query([-1], [1], [far, low, high], [far, low]))
    assert answer.found
    assert points[-1][0] <= -0.9
    answer, _ = search(weights, query([-1], [1], [far, low, high], [([-1.0, 0.0], -1.25)]))
    assert bool((answer.margins > 0).all())
    assert float(answer.margins[1]) == pytest.approx(0.25)


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_bounds_of_every_part_hold_and_clipping_keeps_every_unsafe_point(seed: int, size: int, tight: bool) -> None:
    weights = drawn([size, 6, 5, 2], seed)
    draw = np.random.default_rng(seed)
    points = draw.uniform(-1, 1, size=(2000, size))
    values = outputs(weights, points)
    # The lowest few of the sample are unsafe: their parts must stay open, and they within them.
    first, second = np.quantile(values[:, 0], 0.02), np.quantile(values[:, 1], 0.5 if tight else 1.0)
    asked = query(
        [-1] * size, [1] * size, [([1, 0], first), ([0, 1], second)], [([1, -1], np.quantile(values @ [1, -1], 0.01))]
    )
    graph = network(weights)
    stack = inputs.layers(graph, torch.float64)
    assert stack is not None
    one = inputs._Search(graph, stack, asked, lambda *_: False, 400, 0, 32)
    all_rows = values @ asked.rows.numpy().T - asked.bound.numpy()
    unsafe = np.stack([(all_rows[:, :2] <= 0).all(1), all_rows[:, 2] <= 0], 1)
    with torch.no_grad():
        while one.open and one.answer.parts < 400:
            parts = one._taken()
            one.answer.parts += len(parts)
            linear, states = one.bounder(parts)
            for number in range(len(parts)):
                low, high = parts.lower[number].numpy(), parts.upper[number].numpy()
                within = ((points >= low) & (points <= high)).all(1)
                planes = points[within] @ linear.a[number].numpy().T
                assert bool((all_rows[within] >= linear.least[number].numpy()).all())
                # The plane lies below the network, not only its minimum.
                corner = np.where(linear.a[number].numpy() > 0, low, high)
                constant = linear.least[number].numpy() - (linear.a[number].numpy() * corner).sum(1)
                assert bool((all_rows[within] >= planes + constant - 1e-12).all())
            margins = torch.maximum(parts.margins, one._of_conjunctions(linear.least))
            parts = inputs._Parts(parts.lower, parts.upper, states, margins, parts.depth)
            kept, rest = one._clipped(parts, linear)
            for number in range(len(parts)):
                low, high = parts.lower[number].numpy(), parts.upper[number].numpy()
                within = ((points >= low) & (points <= high)).all(1)
                asks = np.isfinite(parts.margins[number].numpy()) & (parts.margins[number].numpy() <= 0)
                bad = points[within & (unsafe & asks).any(1)]
                inside = [
                    bool(((point >= kept.lower.numpy()) & (point <= kept.upper.numpy())).all(1).any()) for point in bad
                ]
                assert all(inside), "an unsafe point was cut off"
            if len(kept):
                one._split(kept, rest)


def test_the_bound_rises_with_the_parts_and_the_budget_ends_it() -> None:
    weights = drawn([4, 20, 20, 1], 7)
    lower = [-1.0] * 4
    exact = minimum(weights, -np.ones(4), np.ones(4), np.ones(1))
    asked = query(lower, [1.0] * 4, [([1.0], exact - 1e-4)])
    short, _ = search(weights, asked, budget=20, batch=8)
    assert short.parts == 20
    assert short.open > 0
    assert float(short.margins) <= 0
    whole, _ = search(weights, asked, budget=200_000)
    assert float(whole.margins) > 0
    assert whole.open == 0
    bounds = [bound for _, bound in whole.trace]
    assert bounds == sorted(bounds)
    assert whole.trace[-1][0] == whole.parts
    assert bounds[-1] == float(whole.margins)


def test_the_same_question_gets_the_same_answer() -> None:
    weights = drawn([3, 12, 12, 2], 5)
    asked = query(
        [-1] * 3, [1] * 3, [([1.0, -1.0], minimum(weights, -np.ones(3), np.ones(3), np.array([1.0, -1.0])) - 1e-2)]
    )
    one, two = (search(weights, asked)[0] for _ in range(2))
    assert (one.parts, one.deepest, one.trace) == (two.parts, two.deepest, two.trace)
    assert torch.equal(one.margins, two.margins)


def test_a_climb_finds_what_hides_behind_a_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat at 1 but for a dent near one point of [-1, 1]^5, of which one in 10^5 points sees anything."""
    centre = np.array([0.3, -0.2, 0.5, 0.1, -0.6])
    # dent = relu(0.5 - sum |x - centre|), the network 1 - 3 dent: below 0 within 1/6 of the centre.
    first = np.concatenate([np.eye(5), -np.eye(5)])
    weights = [
        (first, np.concatenate([-centre, centre])),
        (-np.ones((1, 10)), np.array([0.5])),
        (np.array([[-3.0]]), np.array([1.0])),
    ]
    monkeypatch.setattr(inputs, "CLIMB_AFTER", 0)
    answer, points = search(weights, query([-1] * 5, [1] * 5, [([1.0], 0.0)]), budget=1)
    assert answer.found
    assert np.abs(points[-1] - centre).sum() <= 1 / 6


def test_layers_compose_what_lies_between_two_relus_and_refuse_what_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = drawn([3, 4, 2], 1)
    graph = network(weights, last_relu=True)
    stack = inputs.layers(graph, torch.float64)
    assert stack is not None
    assert len(stack) == 3, "a last ReLU has the identity behind it"
    points = np.random.default_rng(0).normal(size=(5, 3))
    values = torch.from_numpy(points)
    for layer in stack[:-1]:
        values = (values @ layer.weight.T + layer.bias).relu()
    values = values @ stack[-1].weight.T + stack[-1].bias
    assert values.numpy() == pytest.approx(np.maximum(outputs(weights, points), 0))
    monkeypatch.setattr(inputs, "LARGEST", 10)
    assert inputs.layers(graph, torch.float64) is None


def test_of_more_than_two_maps_in_a_row_rounding_is_not_known_and_none_are_merged() -> None:
    weights = drawn([2, 3, 3, 3, 1], 2)
    for dense in (2, 3):
        operations: list[Operation] = [
            Dense(f"d{i}", "x" if not i else f"v{i - 1}", f"v{i}", (len(weights[i][1]),), *weights[i])
            for i in range(dense)
        ]
        graph = Graph(tuple(operations), "x", operations[-1].target, (2,), operations[-1].shape)
        stack = inputs.layers(graph, torch.float64)
        assert (stack is None) == (dense > inputs.MERGED)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e6])
def test_what_rounding_could_have_made_is_never_refuted(scale: float) -> None:
    """Points, whose outputs are known exactly: unsafe up to the float64 above the exact value, so nothing may be
    proven, however the sums were rounded. Biases cancel what the weights make, so that the roundings show.
    """
    for seed in range(40):
        draw = np.random.default_rng(seed)
        size = int(draw.integers(1, 5))
        point = draw.uniform(-1, 1, size) * 100
        first = draw.normal(size=(9, size)) * scale
        weights = [(first, -(first @ point) + draw.normal(size=9) * 1e-9 * scale)]
        second = draw.normal(size=(7, 9))
        hidden = np.maximum(first @ point + weights[0][1], 0)
        weights.append((second, -(second @ hidden) + draw.normal(size=7) * 1e-12))
        weights.append((draw.normal(size=(1, 7)), draw.normal(size=1)))
        values = [Fraction(float(x)) for x in point]
        for number, (weight, bias) in enumerate(weights):
            sums = [
                sum((Fraction(float(w)) * x for w, x in zip(row, values, strict=True)), Fraction(float(b)))
                for row, b in zip(weight, bias, strict=True)
            ]
            values = sums if number == 2 else [max(value, Fraction(0)) for value in sums]
        above = float(values[0])
        if Fraction(above) < values[0]:
            above = math.nextafter(above, math.inf)
        graph = network(weights)
        stack = inputs.layers(graph, torch.float64)
        assert stack is not None
        asked = query(point.tolist(), point.tolist(), [([1.0], above)])
        answer = inputs.search(graph, stack, asked, lambda *_: False, 5, 0)
        assert not float(answer.margins) > 0


def test_points_linear_networks_and_dead_ones_are_boxes_too() -> None:
    weights = drawn([2, 6, 2], 3)
    at = outputs(weights, np.array([[0.25, -0.5]]))[0]
    answer, _ = search(weights, query([0.25, -0.5], [0.25, -0.5], [([1.0, 0.0], float(at[0]) - 1e-9)]))
    assert float(answer.margins) == pytest.approx(1e-9, rel=1e-3)
    answer, _ = search(weights, query([0.25, -0.5], [0.25, -0.5], [([1.0, 0.0], float(at[0]))]))
    assert answer.found
    linear = [(np.array([[1.0, -2.0]]), np.array([0.5]))]
    answer, _ = search(linear, query([-1, -1], [1, 1], [([1.0], -2.5 - 1e-9)]))
    assert 0 < float(answer.margins) <= 1e-9
    assert answer.parts == 1, "linear bounds of a linear network are exact"
    dead = [(np.array([[1.0, 1.0]]), np.array([-5.0])), (np.array([[2.0]]), np.array([1.0]))]
    answer, _ = search(dead, query([-1, -1], [1, 1], [([1.0], 0.5)]))
    assert float(answer.margins) == pytest.approx(0.5)
    assert answer.parts == 1


def test_where_bounds_overflow_nothing_is_refuted() -> None:
    huge = [(np.full((2, 1), 1e300), np.zeros(2)), (np.full((1, 2), 1e300), np.ones(1))]
    answer, _ = search(huge, query([0], [1], [([1.0], -1.0)]), budget=50)
    assert answer.open == 1
    assert float(answer.margins) == -math.inf
    # Finite as boxes, infinite as coefficients: no point that is no number may be handed on.
    steep = [(np.array([[1e200, 0.0]]), np.zeros(1)), (np.array([[1e200]]), np.zeros(1))]
    answer, _ = search(steep, query([1e-120, -1], [2e-120, 1], [([1.0], 1e290)]), budget=50)
    assert not answer.found or float(answer.margins) <= 0
