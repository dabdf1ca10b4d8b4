"""Jacobian bounds hold for every gradient of the region, are exact where theory says so, and match a peer's numbers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from netassay.networks.evaluate import forward  # noqa: E402
from netassay.networks.graph import Activation, Conv, Dense, Graph, Operation, Relu, Reshape, Scale  # noqa: E402
from netassay.numerics.bounds import backward, interval, jacobian, stages  # noqa: E402
from netassay.numerics.bounds.interval import Interval  # noqa: E402
from netassay.numerics.bounds.regions import Ball, Box  # noqa: E402

REFERENCE = Path(__file__).parents[1] / "../shared/reference"
F64 = torch.float64


def mlp(weights: list[np.ndarray], biases: list[np.ndarray], function: str = "relu") -> Graph:
    operations: list[Operation] = []
    value = "x"
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        operations.append(Dense(f"dense{layer}", value, f"z{layer}", (len(bias),), weight, bias))
        value = f"z{layer}"
        if layer < len(weights) - 1:
            kind = {"relu": Relu}.get(function, Activation)
            more = () if kind is Relu else (function,)
            operations.append(kind(f"act{layer}", value, f"a{layer}", (len(bias),), *more))
            value = f"a{layer}"
    return Graph(tuple(operations), "x", value, (weights[0].shape[1],), operations[-1].shape)


def random_mlp(generator: np.random.Generator, widths: list[int], function: str = "relu") -> Graph:
    def single(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32).astype(np.float64)

    return mlp(
        [single(out, n) * np.float64(np.float32(1.5 / np.sqrt(n))) for n, out in itertools.pairwise(widths)],
        [single(out) * 0.25 for out in widths[1:]],
        function,
    )


def random_cnn(generator: np.random.Generator) -> Graph:
    """Normalisation, two convolutions with strides, padding and groups, a dense layer."""
    normal = generator.normal
    operations = (
        Scale("scale", "x", "s", (2, 6, 5), normal(size=(2, 1, 1)), normal(size=(2, 1, 1)) * 0.3),
        Conv("c1", "s", "z1", (4, 6, 3), normal(size=(4, 1, 3, 3)) * 0.5, normal(size=4) * 0.2,
             (1, 2), (1, 1, 1, 1), (1, 1), 2),
        Relu("r1", "z1", "a1", (4, 6, 3)),
        Conv("c2", "a1", "z2", (3, 2, 2), normal(size=(3, 4, 2, 2)) * 0.4, normal(size=3) * 0.2,
             (2, 1), (0, 0, 0, 0), (2, 1), 1),
        Relu("r2", "z2", "a2", (3, 2, 2)),
        Reshape("flatten", "a2", "f", (12,)),
        Dense("d", "f", "z3", (6,), normal(size=(6, 12)) / 3, normal(size=6) * 0.2),
        Relu("r3", "z3", "a3", (6,)),
        Dense("last", "a3", "y", (3,), normal(size=(3, 6)), normal(size=3)),
    )  # fmt: skip
    return Graph(operations, "x", "y", (2, 6, 5), (3,))


def region_of(graph: Graph, generator: np.random.Generator, count: int, radius: float) -> Ball:
    centre = torch.tensor(generator.uniform(size=(count, *graph.input_shape)))
    radii = torch.tensor(generator.uniform(0, 2 * radius, size=count))
    radii[0] = 0.0
    return Ball("inf", centre, radii)


def gradients(graph: Graph, region: Ball | Box, rows: torch.Tensor, generator: np.random.Generator, count: int = 60):
    """Of random points and corners of each set: (count, batch, rows, *input)."""
    lower, upper = region.box()
    at = torch.tensor(generator.uniform(size=(count, *lower.shape)))
    at[::2] = at[::2].round()
    points = (lower + at * (upper - lower)).flatten(0, 1).requires_grad_()
    outputs = forward(graph, points).flatten(1)
    found = [torch.autograd.grad((outputs @ row).sum(), points, retain_graph=True)[0] for row in rows]
    return torch.stack(found, 1).detach().unflatten(0, (count, len(lower)))


def check(graph: Graph, region: Ball | Box, rows: torch.Tensor, found: jacobian.Bounds, generator) -> None:
    slack = 1e-9 * (1 + found.norm_interval.max())  # of the autograd samples, not of the bounds
    sampled = gradients(graph, region, rows, generator)
    for box in (found.interval, found.linear):
        assert (sampled >= box.lower - slack).all()
        assert (sampled <= box.upper + slack).all()
    norms = sampled.flatten(3).abs().sum(3).amax(0)
    assert (norms <= found.norm + slack).all()
    assert (found.linear.lower >= found.interval.lower).all()
    assert (found.linear.upper <= found.interval.upper).all()
    assert (found.norm <= found.norm_interval).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    widths=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    radius=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
)
def test_no_gradient_of_a_dense_network_leaves_its_bounds(seed: int, widths: list[int], radius: float) -> None:
    generator = np.random.default_rng(seed)
    graph = random_mlp(generator, widths)
    region = region_of(graph, generator, 5, radius)
    rows = torch.tensor(generator.normal(size=(2, widths[-1])))
    found = jacobian.bounds(graph, region, rows)
    check(graph, region, rows, found, generator)
    assert (found.norm_interval <= jacobian.product_of_norms(graph, rows) * (1 + 1e-12)).all()


@pytest.mark.parametrize("seed", range(6))
def test_no_gradient_of_a_convolutional_network_leaves_its_bounds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(seed)
    graph = random_cnn(generator)
    region = region_of(graph, generator, 5, [0.01, 0.1, 1.0][seed % 3])
    rows = torch.tensor(generator.normal(size=(2, 3)))
    dense = jacobian.bounds(graph, region, rows)
    check(graph, region, rows, dense, generator)
    assert stages.of(graph, F64).dense
    # As maps, never as matrices: what networks too large for matrices take.
    monkeypatch.setattr(stages, "LARGEST", 0)
    again = Graph(graph.operations, graph.input, graph.output, graph.input_shape, graph.output_shape)
    maps = jacobian.bounds(again, region, rows)
    assert not stages.of(again, F64).dense
    check(graph, region, rows, maps, generator)
    for one, other in ((dense.norm, maps.norm), (dense.norm_interval, maps.norm_interval),
                       (dense.linear.lower, maps.linear.lower), (dense.linear.upper, maps.linear.upper),
                       *zip(dense.scores, maps.scores, strict=True)):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    # Layer by layer they are multiplied as |W_k| ... |W_1|, which is no smaller.
    norms = jacobian.product_of_norms(graph, rows), jacobian.product_of_norms(again, rows)
    assert (norms[0] <= norms[1] * (1 + 1e-12)).all()
    assert (dense.norm_interval <= norms[0]).all()


def test_pre_activations_are_those_of_crown() -> None:
    generator = np.random.default_rng(0)
    graph = random_mlp(generator, [6, 20, 15, 18, 4])
    region = region_of(graph, generator, 70, 0.2)
    found, _ = stages.preactivations(graph, region)
    expected = backward.lower(graph, region, torch.eye(4, dtype=F64)).values
    for name, box in found.items():
        torch.testing.assert_close(box.lower, expected[name].lower, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(box.upper, expected[name].upper, rtol=1e-11, atol=1e-11)


def derivative_of_tanh(operation: Operation, z: Interval) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - tanh^2 falls with |z|; some roundings outward."""
    assert isinstance(operation, Activation)
    nearest = torch.where((z.lower <= 0) & (z.upper >= 0), 0.0, torch.minimum(z.lower.abs(), z.upper.abs()))
    farthest = torch.maximum(z.lower.abs(), z.upper.abs())
    return 1 - farthest.tanh() ** 2 - 1e-14, 1 - nearest.tanh() ** 2 + 1e-14


def boxes_of_tanh(graph: Graph, region: Ball) -> dict[str, Interval]:
    """Interval bounds of the pre-activations, layer by layer; some roundings outward."""
    values, (low, high) = {}, region.box()
    for operation in graph.operations:
        if isinstance(operation, Activation):
            values[operation.source] = Interval(low, high)
            low, high = low.tanh(), high.tanh()
        else:
            assert isinstance(operation, Dense)
            weight = torch.tensor(operation.weight)
            middle = (low + high) / 2 @ weight.T + torch.tensor(operation.bias)
            half = (high - low) / 2 @ weight.abs().T + 1e-12
            low, high = middle - half, middle + half
    return values


@pytest.mark.parametrize("seed", range(8))
def test_a_smooth_activation_comes_in_by_the_range_of_its_derivative(seed: int) -> None:
    generator = np.random.default_rng(seed)
    graph = random_mlp(generator, [4, 9, 8, 7, 3], "tanh")
    region = region_of(graph, generator, 4, [0.02, 0.3][seed % 2])
    rows = torch.tensor(generator.normal(size=(2, 3)))
    found = jacobian.bounds(graph, region, rows, values=boxes_of_tanh(graph, region), derivative=derivative_of_tanh)
    check(graph, region, rows, found, generator)
    assert (found.norm[1:] < found.norm_interval[1:] * 0.999).all()
    # At a point both are the gradient itself.
    sampled = gradients(graph, region, rows, generator, 1)[0, 0].flatten(1).abs().sum(1)
    torch.testing.assert_close(found.norm[0], sampled, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.norm_interval[0], sampled, rtol=1e-8, atol=1e-10)


def test_bounds_are_the_gradient_where_all_neurons_are_stable() -> None:
    generator = np.random.default_rng(1)
    graph = random_mlp(generator, [5, 16, 16, 16, 3])
    rows = torch.eye(3, dtype=F64)
    seen = 0
    for radius in (1e-9, 1e-3):
        region = Ball("inf", torch.tensor(generator.uniform(size=(40, 5))), torch.full((40,), radius, dtype=F64))
        found = jacobian.bounds(graph, region, rows)
        stable = torch.stack([((z.lower > 0) | (z.upper < 0)).all(1) for z in found.values.values()]).all(0)
        seen += int(stable.sum())
        exact = gradients(graph, Box(region.centre, region.centre), rows, generator, 1)[0]
        for value in (found.norm, found.norm_interval):
            torch.testing.assert_close(value[stable], exact.abs().sum(2)[stable], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.linear.lower[stable], exact[stable], rtol=1e-9, atol=1e-9)
    assert seen > 40


def test_the_exact_gradient_lies_within_bounds_that_only_rounding_widens() -> None:
    """Weights whose products cancel to one part in 1e12: any rounding not taken off would show."""
    generator = np.random.default_rng(2)
    for _ in range(20):
        widths = [4, 6, 5, 2]
        weights = [generator.normal(size=(out, n)) for n, out in itertools.pairwise(widths)]
        weights[1][:, 3:] = -weights[1][:, :3] * (1 + 1e-12 * generator.normal(size=(5, 3)))
        weights[0][3:] = weights[0][:3]
        graph = mlp(weights, [np.full(6, 1e3), np.full(5, 1e6), np.zeros(2)])
        exact = np.array([[Fraction(v) for v in row] for row in weights[2].tolist()])
        for weight in (weights[1], weights[0]):
            exact = exact @ np.array([[Fraction(v) for v in row] for row in weight.tolist()])
        region = Ball("inf", torch.zeros(1, 4, dtype=F64), torch.ones(1, dtype=F64))
        found = jacobian.bounds(graph, region, torch.eye(2, dtype=F64))
        for place in itertools.product(range(2), range(4)):
            for box in (found.interval, found.linear):
                low, high = (Fraction(float(end[0][place])) for end in (box.lower, box.upper))
                assert low <= exact[place] <= high
        for row in range(2):
            assert sum(map(abs, exact[row])) <= Fraction(float(found.norm[0, row]))


def test_interval_bounds_of_the_relu_identity_count_both_halves() -> None:
    graph = mlp([np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])], [np.zeros(2), np.zeros(1)])
    region = Ball("inf", torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    found = jacobian.bounds(graph, region, torch.ones(1, 1, dtype=F64))
    assert found.norm_interval.item() == pytest.approx(2, abs=1e-12)
    assert found.interval.lower.item() == pytest.approx(0, abs=1e-12)
    assert jacobian.product_of_norms(graph, torch.ones(1, 1, dtype=F64)).item() == pytest.approx(2, abs=1e-12)


def test_chords_are_the_lines_of_the_paper() -> None:
    a, b = torch.tensor([[-1.0, 1.0, -3.0, -1.0]], dtype=F64), torch.tensor([[3.0, 2.0, -1.0, 3.0]], dtype=F64)
    low, high = torch.zeros(1, 4, dtype=F64), torch.ones(1, 4, dtype=F64)
    low[0, 3], high[0, 3] = -0.5, 2.0
    sides = jacobian.chords(a, b, low, high)
    above, below = sides.negative[..., 0], sides.negative[..., 1]  # a negative coefficient of a lower bound: above
    # b (A - a) / (b - a) and a (b - A) / (b - a); then A D of one sign; then D in [-1/2, 2], by hand.
    np.testing.assert_allclose(above[0], [3 / 4, 1, 0, (6 - 0.5) / 4])
    np.testing.assert_allclose(below[0], [1 / 4, 0, 1, (-1.5 + 2) / 4])
    np.testing.assert_allclose(sides.intercept[0, :, 0], [3 / 4, 0, 0, 0.5 + 5.5 / 4], atol=1e-15)
    np.testing.assert_allclose(sides.intercept[0, :, 1], [-3 / 4, 0, 0, -2 + 0.5 / 4], atol=1e-15)


def test_batching_changes_nothing_but_rounding() -> None:
    generator = np.random.default_rng(3)
    graph = random_mlp(generator, [8, 30, 30, 30, 4])
    region = region_of(graph, generator, 33, 0.1)
    rows = torch.tensor(generator.normal(size=(3, 4)))
    together = jacobian.bounds(graph, region, rows)
    assert not together.delicate.any()
    assert (together.norm < 0.9 * together.norm_interval).any()
    for place in range(0, 33, 4):
        alone = jacobian.bounds(graph, region[place : place + 1], rows)
        torch.testing.assert_close(alone.norm[0], together.norm[place], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone.linear.lower[0], together.linear.lower[place], rtol=1e-9, atol=1e-11)
        one = jacobian.bounds(graph, region[place : place + 1], rows[1:2])
        torch.testing.assert_close(one.norm[0, 0], together.norm[place, 1], rtol=1e-10, atol=1e-12)


def test_a_nearly_stable_neuron_is_called_delicate() -> None:
    graph = mlp([np.array([[1.0]]), np.array([[1.0]])], [np.array([0.25]), np.zeros(1)])
    centres = torch.tensor([[0.0], [0.1], [-0.5]], dtype=F64)
    region = Ball("inf", centres, torch.full((3,), 0.25, dtype=F64))
    # z = x + 1/4 over [-1/4, 1/4], [-0.15, 0.35], [-3/4, -1/4]
    assert jacobian.bounds(graph, region, torch.ones(1, 1, dtype=F64)).delicate.tolist() == [True, False, True]


def test_a_linear_network_has_its_weights_as_jacobian() -> None:
    weight = np.random.default_rng(4).normal(size=(3, 5))
    graph = mlp([weight], [np.zeros(3)])
    region = Ball("inf", torch.zeros(2, 5, dtype=F64), torch.ones(2, dtype=F64))
    found = jacobian.bounds(graph, region, torch.eye(3, dtype=F64))
    np.testing.assert_allclose(found.norm[1], np.abs(weight).sum(1), rtol=1e-12)
    np.testing.assert_allclose(jacobian.product_of_norms(graph, torch.eye(3, dtype=F64)), np.abs(weight).sum(1))
    assert (found.linear.lower[0] <= torch.tensor(weight)).all()


def test_a_network_that_is_no_chain_is_refused_by_name() -> None:
    generator = np.random.default_rng(5)
    graph = random_mlp(generator, [3, 4, 2], "tanh")
    region = region_of(graph, generator, 2, 0.1)
    with pytest.raises(NotImplementedError, match="act0"):
        jacobian.bounds(graph, region, torch.eye(2, dtype=F64), values=boxes_of_tanh(graph, region))


def test_float32_agrees_to_its_precision() -> None:
    generator = np.random.default_rng(6)
    graph = random_mlp(generator, [8, 20, 20, 4])
    region = region_of(graph, generator, 9, 0.1)
    rows = torch.eye(4, dtype=F64)
    exact = jacobian.bounds(graph, region, rows)
    single = Ball("inf", region.centre.float(), region.radius.float())
    rough = jacobian.bounds(graph, single, rows.float())
    assert rough.norm.dtype == torch.float32
    torch.testing.assert_close(rough.norm.double(), exact.norm, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the peer's weights are not here")
@pytest.mark.parametrize("name, bound", [("mlp64-128x4-10", 0.682), ("mlp784-256x2-10", 140.72)])
def test_bounds_match_a_peer(name: str, bound: float) -> None:
    """auto_LiRPA 0.7.1, one box at a time, output 0, radius 0.02, no optimised slopes."""
    stored = np.load(REFERENCE / f"bounds_{name}.npz")
    layers = range(sum(key.startswith("W") for key in stored.files))
    graph = mlp(*([stored[f"{kind}{layer}"].astype(np.float64) for layer in layers] for kind in "Wb"))
    x = torch.tensor(stored["x"][:3].astype(np.float64)).flatten(1)
    found = jacobian.bounds(graph, Ball("inf", x, torch.full((3,), 0.02, dtype=F64)), torch.eye(10, dtype=F64)[:1])
    assert found.norm[0, 0].item() == pytest.approx(bound, rel=1e-4)


def test_what_overflows_says_nothing_rather_than_something_false() -> None:
    big = np.full((3, 3), 1e200)
    for weights in (
        [big, big, big],
        [big, -big, big / 1e200, big],
        [big, big, -big, big, big],
        [big / 1e200, big, big],
    ):
        graph = mlp(weights, [np.zeros(3)] * len(weights))
        region = Ball("inf", torch.ones(2, 3, dtype=F64), torch.tensor([1e-3, 2.0], dtype=F64))
        for values in (None, interval.propagate(graph, region)):
            found = jacobian.bounds(graph, region, torch.eye(3, dtype=F64), values=values)
            assert (found.norm == torch.inf).all()
            assert (found.norm_interval == torch.inf).all()
            assert (found.linear.upper == torch.inf).all()
            assert (found.interval.lower == -torch.inf).all()
