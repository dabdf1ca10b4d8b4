"""What splitting activations decides, against exact minima (MILP), sampling and cases by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_input_splitting import drawn, minimum, network, query  # noqa: E402

from netassay.networks import evaluate  # noqa: E402
from netassay.networks.graph import Activation, Conv, Dense, Graph, Relu, Reshape, Sum  # noqa: E402
from netassay.numerics.bounds import backward  # noqa: E402
from netassay.numerics.bounds.regions import Box  # noqa: E402
from netassay.numerics.branch_and_bound import activations  # noqa: E402
from netassay.numerics.branch_and_bound.inputs import Answer, Query  # noqa: E402


def search(graph: Graph, asked: Query, budget: int = 2000) -> tuple[Answer, list[torch.Tensor]]:
    """What comes of it, and the points it found; a judge accepts what float64 says is unsafe."""
    found: list[torch.Tensor] = []

    def judge(point: torch.Tensor, conjunction: int) -> bool:
        point = torch.clamp(point, asked.lower, asked.upper)
        of = asked.owners == conjunction
        values = evaluate.forward(graph, point.reshape(1, *graph.input_shape)).flatten()
        unsafe = bool((asked.rows[of] @ values <= asked.bound[of]).all())
        if unsafe:
            found.append(point)
        return unsafe

    return activations.search(graph, asked, judge, budget), found


def residual(seed: int) -> Graph:
    """A convolution, a block of two that its input is added to, a tanh aside, a dense layer: (1, 4, 4) to 3."""
    draw = np.random.default_rng(seed)

    def conv(name: str, source: str, channels: int) -> Conv:
        weight, bias = draw.normal(size=(2, channels, 3, 3)) * 0.5, draw.normal(size=2) * 0.2
        return Conv(name, source, name, (2, 4, 4), weight, bias, (1, 1), (1, 1, 1, 1), (1, 1), 1)

    return Graph(
        (
            conv("a", "x", 1), Relu("b", "a", "b", (2, 4, 4)), conv("c", "b", 2), Relu("d", "c", "d", (2, 4, 4)),
            conv("e", "d", 2), Sum("f", "e", "f", (2, 4, 4), "b"), Relu("g", "f", "g", (2, 4, 4)),
            Activation("h", "f", "h", (2, 4, 4), "tanh"), Sum("i", "g", "i", (2, 4, 4), "h"),
            Reshape("j", "i", "j", (32,)),
            Dense("k", "j", "k", (3,), draw.normal(size=(3, 32)) * 0.3, draw.normal(size=3)),
        ),
        "x", "k", (1, 4, 4), (3,),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_below_the_exact_minimum_is_refuted_and_above_it_never(seed: int) -> None:
    weights = drawn([3, 6, 5, 2], seed)
    c = np.random.default_rng(100 + seed).normal(size=2)
    exact = minimum(weights, -np.ones(3), np.ones(3), c)
    refuted, none = search(network(weights), query([-1] * 3, [1] * 3, [(c.tolist(), exact - 0.3)]), 200)
    assert not none
    assert float(refuted.margins) > 0
    assert refuted.open == 0
    asked = query([-1] * 3, [1] * 3, [(c.tolist(), exact + 1e-6)])
    answer = activations.search(network(weights), asked, lambda *_: False, 30)
    assert not float(answer.margins) > 0
    assert answer.open > 0


def test_of_a_conjunction_one_row_refutes_a_part_and_of_a_disjunction_all_have_to() -> None:
    # f = (|x|, x) on [-1, 1]: |x| >= 0.9 and x <= 0.5 and x >= -0.5 meet nowhere, though each is met, and any two.
    weights = [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, 1.0], [1.0, -1.0]]), np.zeros(2))]
    far, low, high = ([-1.0, 0.0], -0.9), ([0.0, 1.0], 0.5), ([0.0, -1.0], 0.5)
    answer, points = search(network(weights), query([-1], [1], [far, low, high]))
    assert float(answer.margins) > 0
    assert not points
    answer, points = search(network(weights), query([-1], [1], [far, low, high], [far, low]))
    assert answer.found
    assert points[-1][0] <= -0.9
    answer, _ = search(network(weights), query([-1], [1], [far, low, high], [([-1.0, 0.0], -1.25)]))
    assert bool((answer.margins > 0).all())


def test_one_tree_tells_conjunctions_that_hold_from_those_that_do_not() -> None:
    weights = drawn([3, 6, 6, 3], 2)
    rows = np.eye(3)
    exact = [minimum(weights, -np.ones(3), np.ones(3), row) for row in rows]
    asked = query([-1] * 3, [1] * 3, *([(row.tolist(), least - 0.2)] for row, least in zip(rows, exact, strict=True)))
    answer, _ = search(network(weights), asked)
    assert bool((answer.margins > 0).all())
    asked.bound[1] += 0.3
    answer = activations.search(network(weights), asked, lambda *_: False, 60)
    assert (answer.margins > 0).tolist() == [True, False, True]
    assert answer.open > 0


@pytest.mark.parametrize("seed", range(3))
def test_sums_convolutions_and_other_functions_are_decided_as_sampling_has_it(seed: int) -> None:
    graph = residual(seed)
    draw = torch.Generator().manual_seed(seed)
    points = 0.3 * (2 * torch.rand(4000, 16, generator=draw, dtype=torch.float64) - 1)
    points[::2] = 0.3 * points[::2].sign()
    values = evaluate.forward(graph, points.reshape(-1, 1, 4, 4))[:, 0]
    lower, upper = [-0.3] * 16, [0.3] * 16
    met, found = search(graph, query(lower, upper, [([1.0, 0.0, 0.0], float(values.min()))]), 300)
    assert met.found
    assert found
    low, _ = backward.bounds(
        graph, Box(torch.full((1, 1, 4, 4), -0.3).double(), torch.full((1, 1, 4, 4), 0.3).double())
    )
    below = float(values.min() - 0.5 * (values.min() - low[0, 0]))
    answer, _ = search(graph, query(lower, upper, [([1.0, 0.0, 0.0], below)]), 300)
    assert not answer.found or float(values.min()) > below
    assert float(answer.margins) > 0 or answer.found or answer.open > 0


def test_the_bounds_of_hidden_values_hold_at_every_point_of_a_part() -> None:
    graph = residual(1)
    asked = query([-0.5] * 16, [0.5] * 16, [([1.0, -1.0, 0.5], -100.0)])
    points = torch.rand(3000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    values = evaluate.values(graph, points.reshape(-1, 1, 4, 4))
    asked.bound[:] = 1e3  # nothing is refuted
    with torch.no_grad():
        one = activations._Search(graph, asked, lambda *_: False, 40, None)
        problem = one.problem
        hidden = torch.cat([values[relu.source].flatten(1) for relu in problem.relus], 1)
        one._bounded([one.root], 3, 1e12)
        looked = 0
        for _ in range(5):
            halves: list[activations._Node] = []
            for parent in one._taken():
                neuron = activations._choice(problem, parent)
                assert neuron is not None
                halves += [parent.half(neuron, 1), parent.half(neuron, -1)]
            one._bounded(halves, 3, 1e12)
            for node in halves:
                within = (hidden * node.state >= 0).all(1)
                looked += int(within.sum())
                assert bool((hidden[within] >= node.low).all())
                assert bool((hidden[within] <= node.up).all())
        assert looked > 3000


def test_the_budget_ends_the_search_and_the_same_question_gets_the_same_answer() -> None:
    weights = drawn([6, 16, 16, 1], 7)
    exact = minimum(weights, -np.ones(6), np.ones(6), np.ones(1))
    asked = query([-1] * 6, [1] * 6, [([1.0], exact - 1e-3)])
    short, again = (search(network(weights), asked, 9)[0] for _ in range(2))
    assert short.parts >= 9
    assert short.open > 0
    assert float(short.margins) <= 0
    assert (short.parts, short.open, short.deepest, short.trace) == (
        again.parts,
        again.open,
        again.deepest,
        again.trace,
    )
    assert torch.equal(short.margins, again.margins)


def test_kept_slopes_and_bounds_of_layers_that_cost_too_much_are_left_out_and_decisions_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = drawn([3, 5, 4, 2], 4)
    c = [1.0, -0.5]
    exact = minimum(weights, -np.ones(3), np.ones(3), np.array(c))
    asked = query([-1] * 3, [1] * 3, [(c, exact - 0.3)])
    for name in ("PRODUCTS", "KEPT", "NUMBERS"):
        with monkeypatch.context() as patch:
            patch.setattr(activations, name, 100)
            answer, _ = search(network(weights), asked)
            assert float(answer.margins) > 0


def test_linear_networks_points_and_dead_ones_are_boxes_too() -> None:
    def margin(
        weights: Sequence[tuple[np.ndarray, np.ndarray]], lower: list[float], upper: list[float], b: float
    ) -> float:
        return float(search(network(weights), query(lower, upper, [([1.0], b)]))[0].margins)

    linear = [(np.array([[1.0, -2.0]]), np.array([0.5]))]
    assert 0 < margin(linear, [-1, -1], [1, 1], -2.5 - 1e-9) <= 1e-9
    dead = [(np.array([[1.0, 1.0]]), np.array([-5.0])), (np.array([[2.0]]), np.array([1.0]))]
    assert margin(dead, [-1, -1], [1, 1], 0.5) == pytest.approx(0.5)
    weights = drawn([2, 6, 1], 3)
    at = float(evaluate.forward(network(weights), torch.tensor([[[0.25, -0.5]]], dtype=torch.float64)))
    assert margin(weights, [0.25, -0.5], [0.25, -0.5], at - 1e-6) == pytest.approx(1e-6, rel=1e-2)
