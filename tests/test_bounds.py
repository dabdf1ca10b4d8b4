"""Bounds hold for every input of a region, are exact where theory says so, and match a peer's stored ones."""

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
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape, Scale  # noqa: E402
from netassay.numerics.bounds import backward, interval, linear, rounding  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402

REFERENCE = Path(__file__).parents[1] / "../shared/reference"
F64 = torch.float64
METHODS = {
    "interval": interval.bounds,
    "crown-ibp": lambda graph, region, **kw: backward.bounds(graph, region, intermediates="interval", **kw),
    "crown": backward.bounds,
}


def mlp(weights: list[np.ndarray], biases: list[np.ndarray]) -> Graph:
    operations: list[Operation] = []
    value = "x"
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        operations.append(Dense(f"dense{layer}", value, f"z{layer}", (len(bias),), weight, bias))
        value = f"z{layer}"
        if layer < len(weights) - 1:
            operations.append(Relu(f"relu{layer}", value, f"a{layer}", (len(bias),)))
            value = f"a{layer}"
    return Graph(tuple(operations), "x", value, (weights[0].shape[1],), operations[-1].shape)


def random_mlp(generator: np.random.Generator, widths: list[int]) -> Graph:
    def single(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32).astype(np.float64)

    return mlp(
        [single(out, n) / np.float64(np.float32(np.sqrt(n))) for n, out in itertools.pairwise(widths)],
        [single(out) * 0.25 for out in widths[1:]],
    )


def random_cnn(generator: np.random.Generator) -> Graph:
    """Normalisation, a convolution with every option at random, ReLU, flatten, a dense layer."""
    groups = int(generator.choice([1, 2]))
    channels, out, height, width = 2 * groups, 2 * groups, int(generator.integers(5, 8)), int(generator.integers(5, 8))
    kernel = (int(generator.integers(1, 4)), int(generator.integers(1, 4)))
    stride, dilation = tuple(map(int, generator.integers(1, 4, 2))), tuple(map(int, generator.integers(1, 3, 2)))
    padding = tuple(map(int, generator.integers(0, 3, 4)))
    weight = generator.normal(size=(out, channels // groups, *kernel)) * 0.5
    empty = torch.zeros(1, channels, height, width, dtype=F64)
    shape_of = torch.nn.functional.conv2d(
        torch.nn.functional.pad(empty, (padding[1], padding[3], padding[0], padding[2])),
        torch.tensor(weight), None, stride, 0, dilation, groups,
    )  # fmt: skip
    shape = tuple(shape_of.shape[1:])
    size = int(np.prod(shape))
    x_shape = (channels, height, width)
    scale, shift = generator.normal(size=(channels, 1, 1)), generator.normal(size=(channels, 1, 1)) * 0.3
    operations = (
        Scale("scale", "x", "s", x_shape, scale, shift),
        Conv("conv", "s", "c", shape, weight, generator.normal(size=out) * 0.2, stride, padding, dilation, groups),
        Relu("relu0", "c", "a", shape),
        Reshape("flatten", "a", "f", (size,)),
        Dense("dense", "f", "z", (6,), generator.normal(size=(6, size)) / np.sqrt(size), generator.normal(size=6)),
        Relu("relu1", "z", "r", (6,)),
        Dense("last", "r", "y", (3,), generator.normal(size=(3, 6)), generator.normal(size=3)),
    )
    return Graph(operations, "x", "y", x_shape, (3,))


def with_constant_neurons(graph: Graph) -> Graph:
    """The first dense layer gets a neuron always off, one always on, one of weight zero, one constantly zero."""
    first = graph.operations[0]
    assert isinstance(first, Dense)
    weight, bias = first.weight.copy(), first.bias.copy()
    bias[0], bias[1] = -100.0, 100.0
    weight[2], bias[2] = 0.0, 0.5
    weight[3], bias[3] = 0.0, 0.0
    changed = Dense(first.name, first.source, first.target, first.shape, weight, bias)
    return Graph((changed, *graph.operations[1:]), graph.input, graph.output, graph.input_shape, graph.output_shape)


def balls(graph: Graph, generator: np.random.Generator, count: int, norm: str, clip: bool, radius: float) -> Ball:
    centre = torch.tensor(generator.uniform(size=(count, *graph.input_shape)))
    radii = torch.tensor(generator.uniform(0, 2 * radius, size=count))
    radii[0] = 0.0
    return Ball(norm, centre, radii, 0.0 if clip else -np.inf, 1.0 if clip else np.inf)  # type: ignore[arg-type]


def points_of(region: Ball, generator: np.random.Generator, count: int) -> torch.Tensor:
    """Random points and corners of each ball: (count, batch, *input)."""
    step = torch.tensor(generator.uniform(-1, 1, size=(count, *region.centre.shape)))
    step[::2] = step[::2].sign()
    if region.norm == "2":
        step = torch.tensor(generator.normal(size=(count, *region.centre.shape)))
        step = step / torch.linalg.vector_norm(step.flatten(2), dim=2).reshape(*step.shape[:2], *[1] * (step.dim() - 2))
        step = step * (1 - 1e-12)
    if region.norm == "1":
        length = step.abs().flatten(2).sum(2).reshape(*step.shape[:2], *[1] * (step.dim() - 2))
        step = step / length * (1 - 1e-12)
    return (region.centre + region.spread() * step).clamp(region.low, region.high)


def worst_points(graph: Graph, region: Ball, rows: torch.Tensor) -> torch.Tensor:
    """Where the linear bound of each row is smallest over the box around a ball: (rows, batch, *input)."""
    a = backward.lower(graph, region, rows).a
    lower, upper = region.box()
    return torch.where(a > 0, lower[:, None], upper[:, None]).transpose(0, 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["mlp", "constant neurons", "cnn"]),
    norm=st.sampled_from(["inf", "2", "1"]),
    clip=st.booleans(),
    radius=st.sampled_from([1e-4, 0.05, 0.5]),
)
def test_no_point_of_a_ball_leaves_its_bounds(seed: int, kind: str, norm: str, clip: bool, radius: float) -> None:
    generator = np.random.default_rng(seed)
    graph = random_cnn(generator) if kind == "cnn" else random_mlp(generator, [6, 8, 7, 4])
    if kind == "constant neurons":
        graph = with_constant_neurons(graph)
    region = balls(graph, generator, 5, norm, clip, radius)
    points = points_of(region, generator, 40)
    if norm == "inf":
        outputs = torch.eye(graph.output_shape[0], dtype=F64)
        points = torch.cat([points, worst_points(graph, region, torch.cat([outputs, -outputs]))])
    values = torch.stack([forward(graph, point) for point in points])
    exact_ends = {}
    for name, method in METHODS.items():
        lower, upper = method(graph, region)
        # The sampled values are rounded too; bounds for evaluations in float64 cover exactly that.
        low64, high64 = method(graph, region, evaluated=F64)
        assert (values >= low64).all(), name
        assert (values <= high64).all(), name
        assert (low64 <= lower + 1e-12).all()
        assert (upper <= high64 + 1e-12).all()
        exact_ends[name] = lower, upper
    loose, tight = exact_ends["interval"], exact_ends["crown"]
    assert (tight[0] >= loose[0] - 1e-9).all(), "CROWN is cut with the box, so never looser"
    assert (tight[1] <= loose[1] + 1e-9).all(), "CROWN is cut with the box, so never looser"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.sampled_from([0.0, 1e-6, 0.05]))
def test_bounds_for_float32_hold_for_float32_evaluations_in_any_order(seed: int, radius: float) -> None:
    generator = np.random.default_rng(seed)
    graph = random_mlp(generator, [50, 40, 30, 5])
    centre = torch.tensor(generator.uniform(size=(4, 50)), dtype=torch.float32).double()
    region = Ball("inf", centre, torch.full((4,), radius, dtype=F64))
    samples = points_of(region, generator, 20).float().double()
    samples = torch.minimum(torch.maximum(samples, centre - radius), centre + radius).float()
    inside = ((samples.double() - centre).abs() <= radius).all(-1)
    shuffled = [(generator.permutation(50), generator.permutation(40), generator.permutation(30)) for _ in range(3)]
    for name, method in METHODS.items():
        lower, upper = method(graph, region, evaluated=torch.float32)
        for orders in shuffled:
            x = samples
            for operation in graph.operations:
                if isinstance(operation, Dense):
                    order = orders[("z0", "z1", "z2").index(operation.target)]
                    # One product after the other, in a random order: the least accurate way to sum.
                    weight = torch.tensor(operation.weight).float()
                    y = torch.tensor(operation.bias).float().expand(*x.shape[:-1], -1)
                    for j in order:
                        y = y + x[..., j, None] * weight[:, j]
                    x = y
                else:
                    x = x.clamp(min=0)
            values = x.double()
            assert ((values >= lower) & (values <= upper))[inside].all(), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_one_linear_layer_is_exact_and_equals_the_dual_norm(name: str, norm: str) -> None:
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(5, 7)), generator.normal(size=5)
    graph, x, radius = mlp([weight], [bias]), generator.normal(size=(3, 7)), np.array([0.0, 0.1, 2.0])
    lower, upper = METHODS[name](graph, Ball(norm, torch.tensor(x), torch.tensor(radius)))  # type: ignore[arg-type]
    dual = {"inf": np.abs(weight).sum(1), "2": np.sqrt((weight**2).sum(1)), "1": np.abs(weight).max(1)}[norm]
    np.testing.assert_allclose(lower, x @ weight.T + bias - radius[:, None] * dual, rtol=0, atol=1e-12)
    np.testing.assert_allclose(upper, x @ weight.T + bias + radius[:, None] * dual, rtol=0, atol=1e-12)


def test_the_l2_box_stays_exact_through_scaling_and_reshaping() -> None:
    generator = np.random.default_rng(1)
    scale, shift, weight = generator.normal(size=(2, 3)), generator.normal(size=(2, 3)), generator.normal(size=(4, 6))
    graph = Graph(
        (
            Scale("scale", "x", "s", (2, 3), scale, shift),
            Reshape("flatten", "s", "f", (6,)),
            Dense("dense", "f", "y", (4,), weight, np.zeros(4)),
        ),
        "x", "y", (2, 3), (4,),
    )  # fmt: skip
    x = generator.normal(size=(1, 2, 3))
    lower, upper = interval.bounds(graph, Ball("2", torch.tensor(x), torch.tensor([0.3], dtype=F64)))
    middle = (x * scale + shift).reshape(1, 6) @ weight.T
    reach = 0.3 * np.sqrt(((weight * scale.reshape(6)) ** 2).sum(1))
    np.testing.assert_allclose(lower, middle - reach, rtol=0, atol=1e-12)
    np.testing.assert_allclose(upper, middle + reach, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_ball_of_radius_zero_is_the_network_itself(name: str, kind: str) -> None:
    generator = np.random.default_rng(2)
    graph = random_cnn(generator) if kind == "cnn" else random_mlp(generator, [6, 9, 8, 3])
    x = torch.tensor(generator.uniform(size=(4, *graph.input_shape)))
    for norm in ("inf", "2"):
        lower, upper = METHODS[name](graph, Ball(norm, x, torch.zeros(4, dtype=F64), 0.0, 1.0))  # type: ignore[arg-type]
        torch.testing.assert_close(lower, forward(graph, x), rtol=0, atol=1e-11)
        torch.testing.assert_close(upper, forward(graph, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_a_larger_ball_has_wider_bounds(name: str) -> None:
    generator = np.random.default_rng(3)
    graph = random_mlp(generator, [6, 10, 10, 4])
    x = torch.tensor(generator.uniform(size=(6, 6)))
    sides = [METHODS[name](graph, Ball("inf", x, torch.full((6,), r, dtype=F64))) for r in (0.0, 0.01, 0.05, 0.2, 1.0)]
    for (low, high), (lower, higher) in itertools.pairwise(sides):
        # Adaptive slopes are chosen neuron by neuron, so CROWN alone need not be monotone; its widths are here.
        assert (lower <= low + 1e-9).all()
        assert (higher >= high - 1e-9).all()


def exact_ends(weights: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray, radius: float) -> tuple:
    """Exact range of a network of two inputs and one hidden layer: its extremes are at vertices of the arrangement of
    the lines where a neuron switches, cut with the box.
    """
    (w0, w1), (b0, b1) = weights, biases
    walls = [(row, bias) for row, bias in zip(w0, b0, strict=True)]
    for axis, side in itertools.product(range(2), (-radius, radius)):
        walls.append((np.eye(2)[axis], -(x[axis] + side)))
    candidates = []
    for (r, a), (s, b) in itertools.combinations(walls, 2):
        matrix = np.stack([r, s])
        if abs(np.linalg.det(matrix)) > 1e-12:
            point = np.linalg.solve(matrix, [-a, -b])
            if (np.abs(point - x) <= radius + 1e-12).all():
                candidates.append(point)
    values = np.maximum(np.array(candidates) @ w0.T + b0, 0) @ w1.T + b1
    return values.min(0), values.max(0)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_enclose_the_exact_range_of_a_small_network(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=(4, 2)), generator.normal(size=(3, 4))]
    biases = [generator.normal(size=4) * 0.3, np.zeros(3)]
    graph = mlp(weights, biases)
    x = generator.uniform(size=2)
    low, high = exact_ends(weights, biases, x, 0.4)
    widths = {}
    for name, method in METHODS.items():
        lower, upper = method(graph, Ball("inf", torch.tensor(x[None]), torch.tensor([0.4], dtype=F64)))
        assert (lower[0].numpy() <= low + 1e-12).all(), name
        assert (upper[0].numpy() >= high - 1e-12).all(), name
        widths[name] = float((upper - lower).sum())
    assert (high - low).sum() - 1e-9 <= widths["crown"] <= widths["interval"] + 1e-9


def test_one_relu_gives_the_lines_of_the_paper() -> None:
    # relu(x) - relu(-x) = x on [-1, 3]. Upper lines: 3/4 (x + 1), 1/4 (-x + 3); lower: x (as 3 > 1), 0 (as 1 < 3).
    graph = mlp([np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])], [np.zeros(2), np.zeros(1)])
    region = Ball("inf", torch.tensor([[1.0]], dtype=F64), torch.tensor([2.0], dtype=F64))
    found = backward.lower(graph, region, torch.tensor([[1.0], [-1.0]], dtype=F64))
    # f >= x - (3 - x) / 4, least at x = -1;  -f >= -3/4 (x + 1) + 0, least at x = 3.
    torch.testing.assert_close(found.a, torch.tensor([[[5 / 4], [-3 / 4]]], dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.lower, torch.tensor([[-2.0, -3.0]], dtype=F64), rtol=0, atol=1e-12)
    box = interval.bounds(graph, region)
    assert (float(box[0]), float(box[1])) == pytest.approx((-1, 3), abs=1e-12)


def test_folding_the_specification_into_the_last_layer_is_tighter_than_the_difference_of_boxes() -> None:
    generator = np.random.default_rng(4)
    graph = random_mlp(generator, [6, 10, 8, 4])
    region = balls(graph, generator, 6, "inf", True, 0.2)
    rows = torch.tensor([[1.0, -1, 0, 0], [1, 0, -1, 0], [1, 0, 0, -1]], dtype=F64).expand(6, 3, 4)
    boxes = interval.propagate(graph, region)
    folded = backward.box_margins(graph, boxes, rows)
    output = boxes[graph.output]
    apart = output.lower[:, :1] - output.upper[:, 1:]
    assert (folded >= apart - 1e-9).all()
    assert (folded > apart + 1e-3).any()
    samples = torch.stack([forward(graph, point) for point in points_of(region, generator, 50)])
    assert ((samples[..., :1] - samples[..., 1:]) >= folded - 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_adjoint_is_the_transpose_of_its_map(seed: int) -> None:
    generator = np.random.default_rng(seed)
    graph = random_cnn(generator)
    for operation in graph.operations:
        if type(operation) not in linear.MAPS:
            continue
        maps, w = linear.MAPS[type(operation)], linear.tensors(operation, F64)
        x = torch.tensor(generator.normal(size=(1, *graph.shape_of(operation.source))))
        a = torch.tensor(generator.normal(size=(1, *operation.shape)))
        forward_ = (maps.apply(operation, w.weight, None, x) * a).sum()
        back = (maps.adjoint(operation, w.weight, a, graph.shape_of(operation.source)) * x).sum()
        torch.testing.assert_close(forward_, back, rtol=1e-10, atol=1e-10)


def test_blocks_and_passes_do_not_change_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    graph = random_mlp(generator, [6, 12, 12, 4])
    region = balls(graph, generator, 9, "inf", False, 0.1)
    whole = backward.bounds(graph, region, block=9)
    monkeypatch.setattr(backward, "COEFFICIENTS", 40)
    for block in (1, 4):
        for side, other in zip(whole, backward.bounds(graph, region, block=block), strict=True):
            torch.testing.assert_close(side, other, rtol=0, atol=1e-11)


def test_an_operation_that_the_output_does_not_read_is_no_obstacle() -> None:
    dense = Dense("d", "x", "y", (1,), np.array([[2.0, 1.0]]), np.zeros(1))
    unused = Relu("unused", "x", "u", (2,))
    graph = Graph((unused, dense), "x", "y", (2,), (1,))
    lower, upper = backward.bounds(graph, Ball("inf", torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64)))
    assert (float(lower), float(upper)) == pytest.approx((-3, 3), abs=1e-12)


def test_rounding_bounds_cover_the_measured_error_of_float32() -> None:
    generator = np.random.default_rng(6)
    graph = random_mlp(generator, [200, 100, 100, 10])
    x = torch.tensor(generator.uniform(size=(20, 200))).float()
    region = Ball("inf", x.double(), torch.zeros(20, dtype=F64))
    values, errors = interval.propagate(graph, region, torch.float32), {graph.input: torch.zeros(20, 200, dtype=F64)}
    for operation in graph.operations:
        w = linear.weights(graph, F64)[operation.target]
        _, errors[operation.target] = rounding.evaluation(operation, w, values, errors, torch.float32)
    error = errors[graph.output]
    measured = (forward(graph, x).double() - forward(graph, x.double())).abs()
    assert (measured <= error).all()
    assert float(measured.max()) > 0


def exactly(graph: Graph, x: np.ndarray) -> list[Fraction]:
    """The output of a graph of dense layers, scalings, reshapes and ReLUs in exact arithmetic."""
    rational = np.vectorize(lambda number: Fraction(float(number)), otypes=[object])
    values = {graph.input: rational(x)}
    for operation in graph.operations:
        source = values[operation.source]
        match operation:
            case Dense():
                value = source.dot(rational(operation.weight).T) + rational(operation.bias)
            case Scale():
                value = source * rational(operation.scale) + rational(operation.shift)
            case Reshape():
                value = source.reshape(operation.shape)
            case _:
                value = np.vectorize(lambda number: max(number, Fraction(0)), otypes=[object])(source)
        values[operation.target] = value
    return list(values[graph.output].ravel())


def of_many_scales(generator: np.random.Generator) -> Graph:
    """Scalings, reshapes, dense layers and ReLUs with constants between 1e-12 and 1e12 that nearly cancel."""

    def array(*shape: int) -> np.ndarray:
        spread = generator.choice([0.0, 4.0, 12.0])
        return generator.normal(size=shape) * 10.0 ** generator.uniform(-spread, spread, size=shape)

    shift = array(4)
    operations: list[Operation] = [
        Scale("up", "x", "u", (4,), np.ones(4), shift),
        Reshape("fold", "u", "v", (2, 2)),
        Scale("down", "v", "w", (2, 2), np.ones((2, 2)), -shift.reshape(2, 2)),
        Reshape("flatten", "w", "f", (4,)),
        Dense("d0", "f", "z0", (5,), array(5, 4), array(5)),
        Relu("r0", "z0", "a0", (5,)),
        Dense("d1", "a0", "z1", (4,), array(4, 5), array(4)),
        Relu("r1", "z1", "a1", (4,)),
        Dense("d2", "a1", "y", (2,), array(2, 4), array(2)),
    ]
    return Graph(tuple(operations), "x", "y", (4,), (2,))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_bounds_hold_in_exact_arithmetic_at_every_scale(norm: str) -> None:
    checked = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        graph = of_many_scales(generator)
        radius = float(generator.choice([0.0, 1e-300, 1e-14, 1e-7, 1e-3, 1.0, 1e6]))
        centre = generator.uniform(size=4)
        region = Ball(norm, torch.tensor(centre[None]), torch.tensor([radius], dtype=F64))  # type: ignore[arg-type]
        corners = [centre + radius * step for step in generator.choice([-1.0, 1.0], size=(4, 4))]
        if norm == "2":
            corners = [centre + (corner - centre) / 2 for corner in corners]
        rows = torch.cat([torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)])
        for row in backward.lower(graph, region, rows).a[0].numpy():
            length = 1.0 if norm == "inf" else np.linalg.norm(row / (np.abs(row).max() or 1.0)) or 1.0
            step = np.sign(row) if norm == "inf" else row / (np.abs(row).max() or 1.0) / length
            corners.append(centre - radius * step)
        for corner in corners:
            away = [Fraction(float(p)) - Fraction(float(c)) for p, c in zip(corner, centre, strict=True)]
            size = max(map(abs, away)) ** 2 if norm == "inf" else sum(part**2 for part in away)
            if size > Fraction(radius) ** 2:
                continue
            checked += 1
            outputs = exactly(graph, corner)
            for name, method in METHODS.items():
                lower, upper = (side[0].tolist() for side in method(graph, region))
                for low, output, high in zip(lower, outputs, upper, strict=True):
                    assert Fraction(low) <= output <= Fraction(high), (name, seed)
    assert checked > 150


def test_an_l2_ball_through_shifts_that_cancel_keeps_their_rounding() -> None:
    one = np.ones((1, 1))
    operations = (
        Scale("up", "x", "p", (1,), np.ones(1), np.array([1e17])),
        Reshape("fold", "p", "q", (1, 1)),
        Scale("down", "q", "s", (1, 1), one, np.array([[-1e17]])),
        Reshape("flatten", "s", "t", (1,)),
        Dense("d", "t", "y", (1,), one, np.zeros(1)),
    )
    graph = Graph(operations, "x", "y", (1,), (1,))
    region = Ball("2", torch.tensor([[9.0]], dtype=F64), torch.ones(1, dtype=F64))
    for name, method in METHODS.items():
        lower, upper = method(graph, region)
        # In exact arithmetic the network is the identity, and the ball [8, 10].
        assert float(lower) <= 8, name
        assert float(upper) >= 10, name


def test_the_l2_bound_of_a_network_with_tiny_slope_counts_every_slope() -> None:
    # y = 1e-170 (x0 + x1): its slopes have squares below the smallest number of float64.
    layers = [np.full((1, 2), 1e-34), *[np.array([[1e-34]])] * 4]
    graph = mlp([np.full((1, 2), 1e-170)], [np.zeros(1)])
    deep = Graph(
        tuple(
            Dense(f"d{i}", f"v{i}", f"v{i + 1}", (1,), weight, np.zeros(1)) for i, weight in enumerate(layers)
        ),
        "v0", "v5", (2,), (1,),
    )  # fmt: skip
    region = Ball("2", torch.zeros(1, 2, dtype=F64), torch.tensor([1e150], dtype=F64))
    for net in (graph, deep):
        for name, method in METHODS.items():
            lower, upper = method(net, region)
            assert float(lower) <= -np.sqrt(2) * 1e-20 * (1 - 1e-12), name
            assert float(upper) >= np.sqrt(2) * 1e-20 * (1 - 1e-12), name
            assert float(upper) <= 2.1e-20, name


def test_the_box_of_a_ball_holds_the_ball_in_exact_arithmetic() -> None:
    generator = np.random.default_rng(7)
    centre, radius = generator.uniform(size=(50, 3)), generator.uniform(0, 0.3, size=50)
    lower, upper = (side.numpy() for side in Ball("inf", torch.tensor(centre), torch.tensor(radius)).box())
    for item, (c, r) in enumerate(zip(centre, radius, strict=True)):
        for axis in range(3):
            assert Fraction(lower[item, axis]) <= Fraction(c[axis]) - Fraction(r)
            assert Fraction(upper[item, axis]) >= Fraction(c[axis]) + Fraction(r)


def test_the_upper_line_of_a_relu_lies_above_both_of_its_corners() -> None:
    generator = np.random.default_rng(8)
    low = -(10.0 ** generator.uniform(-12, 3, size=2000))
    high = 10.0 ** generator.uniform(-12, 3, size=2000)
    lines = backward.Lines.of(interval.Interval(torch.tensor(low)[None], torch.tensor(high)[None]))
    slope, intercept = lines.slope[0].numpy(), lines.intercept[0].numpy()
    for s, t, l, u in zip(slope, intercept, low, high, strict=True):  # noqa: E741
        # Rounded to nearest, half a unit in the last place of the larger term may be missing: `rounding` pays for it.
        room = Fraction(max(u, s * -l)) * Fraction(2) ** -52
        assert Fraction(s) * Fraction(l) + Fraction(t) >= -room
        assert Fraction(s) * Fraction(u) + Fraction(t) >= Fraction(u) - room


def test_the_error_of_evaluation_widens_pre_activations_below_and_above() -> None:
    # Both ends that a backward pass tightened move out by all of the value's worst evaluation error.
    generator = np.random.default_rng(9)
    graph = random_mlp(generator, [6, 8, 8, 3])
    region = balls(graph, generator, 4, "inf", False, 0.3)
    rows = torch.eye(3, dtype=F64)
    plain = backward.lower(graph, region, rows).values["z1"]
    evaluated = backward.lower(graph, region, rows, evaluated=torch.float32).values["z1"]
    boxes, errors = interval.propagate(graph, region, torch.float32), {graph.input: torch.zeros(4, 6, dtype=F64)}
    for operation in graph.operations[:3]:
        w = linear.weights(graph, F64)[operation.target]
        _, errors[operation.target] = rounding.evaluation(operation, w, boxes, errors, torch.float32)
    error = errors["z1"]
    for moved, tightened in (
        (plain.lower - evaluated.lower, evaluated.lower > boxes["z1"].lower + 1e-3),
        (evaluated.upper - plain.upper, evaluated.upper < boxes["z1"].upper - 1e-3),
    ):
        assert tightened.sum() >= 5
        assert (moved >= 0.9 * error)[tightened].all()


def test_a_product_that_underflows_in_float32_is_within_its_bounds() -> None:
    graph = mlp([np.array([[1e-30]])], [np.zeros(1)])
    x = torch.tensor([[1e-30]], dtype=torch.float32)
    assert float(forward(graph, x)) == 0
    for name, method in METHODS.items():
        lower, upper = method(graph, Ball("inf", x.double(), torch.zeros(1, dtype=F64)), evaluated=torch.float32)
        assert float(lower) <= 0 <= float(upper), name


def test_load_is_the_largest_partial_sum_in_units_of_the_largest_number() -> None:
    graph = mlp([np.array([[3e38, 3e38, -3e38]]), np.array([[1e-38]])], [np.zeros(1), np.zeros(1)])
    region = Ball("inf", torch.ones(2, 3, dtype=F64) * torch.tensor([[1.0], [1e-3]]), torch.zeros(2, dtype=F64))
    boxes = interval.propagate(graph, region, torch.float32)
    largest = float(np.finfo(np.float32).max)
    assert rounding.load(graph, boxes, torch.float32)[0] == pytest.approx(9e38 / largest, rel=0.03)
    assert rounding.load(graph, boxes, torch.float32)[1] < 1


def test_bounds_that_overflow_prove_nothing() -> None:
    graph = mlp([np.array([[1e200]]), np.array([[1e200], [-1e200]])], [np.zeros(1), np.array([0.0, 1.0])])
    region = Ball("inf", torch.ones(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    found = backward.lower(graph, region, torch.eye(2, dtype=F64))
    assert not (found.lower > 0).any()
    rows = torch.eye(2, dtype=F64)[None]
    assert not (backward.box_margins(graph, interval.propagate(graph, region), rows) > 0).any()


def test_float32_sums_too_long_to_bound_are_refused() -> None:
    with pytest.raises(rounding.TooManyTerms, match="use float64"):
        rounding.gamma(1_000_000, torch.float32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("3", [[0.5]], [0.1]), "norm '3'"),
        (("inf", [[0.5]], [-0.1]), "negative"),
        (("inf", [[0.5]], [float("inf")]), "not finite"),
        (("inf", [[1.5]], [0.1], 0.0, 1.0), "not in the domain"),
        (("inf", [[0.5], [0.5]], [0.1]), "as many radii"),
    ],
)
def test_a_ball_that_makes_no_sense_is_refused(arguments: tuple, message: str) -> None:
    norm, centre, radius, *domain = arguments
    with pytest.raises(ValueError, match=message):
        Ball(norm, torch.tensor(centre, dtype=F64), torch.tensor(radius, dtype=F64), *domain)


def test_an_operation_without_a_rule_is_named() -> None:
    class Sine(Operation):
        pass

    graph = Graph((Sine("s1", "x", "y", (2,)),), "x", "y", (2,), (2,))
    with pytest.raises(NotImplementedError, match=r"Sine \(s1\)"):
        interval.bounds(graph, Ball("inf", torch.zeros(1, 2, dtype=F64), torch.zeros(1, dtype=F64)))


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no stored bounds beside the checkout")
@pytest.mark.parametrize("net", ["mlp784-256x2-10", "mlp64-128x4-10", "acasxu1_1"])
def test_bounds_agree_with_the_stored_bounds_of_a_peer(net: str) -> None:
    """auto_LiRPA 0.7.1 in float32, l_inf radius 0.02."""
    with np.load(REFERENCE / f"bounds_{net}.npz") as stored:
        peer = dict(stored)
    layers = sum(name.startswith("W") for name in peer)
    graph = mlp(*([peer[f"{kind}{i}"].astype(np.float64) for i in range(layers)] for kind in "Wb"))
    region = Ball("inf", torch.tensor(peer["x"]).double(), torch.full((len(peer["x"]),), 0.02, dtype=F64))
    for ours, theirs in (("interval", "IBP"), ("crown-ibp", "CROWN-IBP"), ("crown", "CROWN")):
        lower, upper = (side.numpy() for side in METHODS[ours](graph, region))
        width = peer[f"{theirs}_ub"] - peer[f"{theirs}_lb"]
        # Their float32 rounding is the difference that is left; cut with the box, ours may be tighter.
        slack = 1e-4 * np.maximum(1, width)
        assert (lower >= peer[f"{theirs}_lb"] - slack).all(), theirs
        assert (upper <= peer[f"{theirs}_ub"] + slack).all(), theirs
        if ours == "interval":
            np.testing.assert_allclose(lower, peer["IBP_lb"], rtol=1e-4)
            np.testing.assert_allclose(upper, peer["IBP_ub"], rtol=1e-4)
