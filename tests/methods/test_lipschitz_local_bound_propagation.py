"""Local Lipschitz constants: bounds in their order, exact where the exact constant is known another way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")
optimize = pytest.importorskip("scipy.optimize")

from netassay import data, networks  # noqa: E402
from netassay.job import Record  # noqa: E402
from netassay.method import Failure, InvalidInput, NotApplicable, NumericalError  # noqa: E402
from netassay.methods.lipschitz import local_bound_propagation as local  # noqa: E402
from netassay.networks import onnx_file, recipes  # noqa: E402
from netassay.networks.evaluate import forward  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape, Sum  # noqa: E402
from netassay.numerics.bounds import jacobian, stages  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402
from netassay.numerics.branch_and_bound import jacobians  # noqa: E402
from netassay.store import artifacts  # noqa: E402

F64 = torch.float64


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


@pytest.fixture(scope="module")
def trained() -> str:
    recipe = recipes.Recipe.parse(
        {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [16, 16]}, "epochs": 6}
    )
    return networks.resolve(recipes.reference(recipe))


def kept(graph: Graph) -> str:
    return networks.keep(onnx_file.write(graph, "test"))


def chain(weights: list[np.ndarray], biases: list[np.ndarray], shape: tuple[int, ...] = ()) -> Graph:
    """Dense layers with ReLU between them; constants of float32."""
    operations: list[Operation] = []
    at = "x"
    if shape:
        operations.append(Reshape("flatten", "x", "f", (weights[0].shape[1],)))
        at = "f"
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        weight, bias = (np.asarray(array, np.float32).astype(np.float64) for array in (weight, bias))
        if place:
            operations.append(Relu(f"relu{place}", at, f"a{place}", operations[-1].shape))
            at = f"a{place}"
        operations.append(Dense(f"d{place}", at, f"z{place}", (len(bias),), weight, bias))
        at = f"z{place}"
    return Graph(tuple(operations), "x", at, shape or (weights[0].shape[1],), operations[-1].shape)


def random_chain(generator: np.random.Generator, widths: list[int], shape: tuple[int, ...] = ()) -> Graph:
    pairs = list(itertools.pairwise(widths))
    return chain(
        [generator.normal(size=(out, n)) * 1.5 / np.sqrt(n) for n, out in pairs],
        [generator.normal(size=out) * 0.25 for _, out in pairs],
        shape,
    )


def ball(centre: np.ndarray, radius: float) -> Ball:
    return Ball("inf", torch.tensor(centre, dtype=F64)[None], torch.tensor([radius], dtype=F64))


def enumerated(graph: Graph, centre: np.ndarray, radius: float, row: np.ndarray) -> float:
    """The largest |J|_1 over all activation patterns that have an inner point, found one neuron after the other by
    linear programs: max t with s_k (g_k x + h_k) >= t |g_k|_1 over the box."""
    layers = [(op.weight, op.bias) for op in graph.operations if isinstance(op, Dense)]
    ends = list(zip(centre - radius, centre + radius, strict=True))
    n = len(centre)

    def inner(halves: list[tuple[np.ndarray, float]]) -> bool:
        rows = np.array([[*-g, np.abs(g).sum() + 1e-12] for g, _ in halves])
        found = optimize.linprog(
            [*[0.0] * n, -1.0], rows, [h for _, h in halves], bounds=[*ends, (None, 1.0)], method="highs"
        )
        return found.status == 0 and -found.fun > 1e-9

    def largest(layer: int, a: np.ndarray, b: np.ndarray, slope: np.ndarray, halves: list) -> float:
        weight, bias = layers[layer]
        z, offset = weight @ a, weight @ b + bias
        if layer == len(layers) - 1:
            return float(np.abs(row @ weight @ slope).sum())
        patterns = [([], halves)]
        for k in range(len(bias)):
            patterns = [
                ([*pattern, on], more)
                for pattern, before in patterns
                for on in (1.0, 0.0)
                if inner(more := [*before, ((2 * on - 1) * z[k], (2 * on - 1) * offset[k])])
            ]
        return max(
            largest(layer + 1, np.array(d)[:, None] * z, d * offset, np.array(d)[:, None] * (weight @ slope), more)
            for d, more in patterns
        )

    return largest(0, np.eye(n), np.zeros(n), np.eye(n), [])


# --- the claims of the paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "random", "deep", "conv"])
def test_bounds_are_in_their_order_on_every_instance(trained: str, kind: str) -> None:
    generator = np.random.default_rng(0)
    network = {
        "trained": lambda: trained,
        "random": lambda: kept(random_chain(generator, [64, 12, 3], (1, 8, 8))),
        "deep": lambda: kept(random_chain(generator, [64, 8, 8, 8, 8, 3], (1, 8, 8))),
        "conv": lambda: kept(convolutional(generator)),
    }[kind]()
    more = {"budget": 24, "samples": 100, "moves": 10}
    asked = [
        local.Params(network=network, index=index, radius=radius, output=output, clip=index == 1, **more)
        for index, radius, output in itertools.product(range(2), (0.0, 0.01, 0.05, 0.3), (None, 0, 2))
    ]
    for result in local.run_many(asked):
        assert isinstance(result, local.Result)
        assert result.linear is not None
        assert result.bab is not None
        assert 0 < result.sampled <= result.bab <= result.linear <= result.interval <= result.product
        assert result.bound == result.bab
        assert result.trace_bounds == sorted(result.trace_bounds, reverse=True)
        assert result.trace_bounds[-1] == result.bab
        assert result.exact == (result.open == 0)


def convolutional(generator: np.random.Generator) -> Graph:
    def single(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32).astype(np.float64)

    operations = (
        Conv("conv", "x", "c", (2, 4, 4), single(2, 1, 3, 3), single(2), (2, 2), (1, 1, 1, 1), (1, 1), 1),
        Relu("relu", "c", "a", (2, 4, 4)),
        Reshape("flatten", "a", "f", (32,)),
        Dense("dense", "f", "y", (3,), single(3, 32), single(3)),
    )
    return Graph(operations, "x", "y", (1, 8, 8), (3,))


def test_the_bound_is_the_gradient_where_all_relus_are_stable(trained: str) -> None:
    graph, images = networks.load(trained), data.load("digits", "test")
    stable = 0
    for index in range(20):
        for radius in (1e-7, 1e-3):
            result = local.run(local.Params(network=trained, index=index, radius=radius, samples=10, moves=0))
            if result.unstable:
                continue
            stable += 1
            x = torch.tensor(np.array(images.x[index]))
            gradients = torch.autograd.functional.jacobian(lambda x: forward(graph, x[None])[0], x)
            norm = float(gradients.flatten(1).abs().sum(1).max())
            assert result.bound == pytest.approx(norm, rel=1e-5)
            assert result.sampled == pytest.approx(norm, rel=1e-5)
            assert result.interval == pytest.approx(norm, rel=1e-5)
            assert result.exact
    assert stable > 20


def test_the_identity_as_two_relus_has_constant_1_and_interval_bound_2() -> None:
    """f = relu(x) - relu(-x), of one pixel among 64; and in one dimension, where every part can be counted."""
    weight = np.zeros((2, 64))
    weight[:, 20] = [1, -1]
    network = kept(chain([weight, np.array([[1.0, -1.0]])], [np.array([-0.5, 0.5]), np.zeros(1)], (1, 8, 8)))
    result = local.run(local.Params(network=network, index=0, radius=1.0, samples=100))
    assert result.product == pytest.approx(2, abs=1e-9)
    assert result.interval == pytest.approx(2, abs=1e-9)
    assert result.linear == pytest.approx(2, abs=1e-9)
    assert result.bab == pytest.approx(1, abs=1e-9)
    assert result.sampled == pytest.approx(1, abs=1e-9)
    assert result.exact

    line = chain([np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])], [np.zeros(2), np.zeros(1)])
    answer = jacobians.search(line, ball(np.zeros(1), 1.0), torch.ones(1, 1, dtype=F64), budget=100)
    assert answer is not None
    # The whole; x >= 0 and x <= 0; and in both the other ReLU once more, for in floating point it is not yet stable.
    assert answer.exact
    assert answer.parts <= 7
    assert answer.bound == pytest.approx(1, abs=1e-12)


def tiny(seed: int) -> tuple[Graph, np.ndarray, np.ndarray, list[float]]:
    widths = [[2, 6, 1], [3, 8, 2], [2, 5, 5, 1], [3, 4, 4, 4, 2], [4, 5, 4, 1], [1, 12, 1], [5, 9, 1]][seed % 7]
    generator = np.random.default_rng(seed)
    graph = random_chain(generator, widths)
    return graph, generator.normal(size=widths[0]), generator.normal(size=widths[-1]), [0.1, 0.5, 2.0]


def branch_and_bound_ends_at_the_enumerated_constant(seed: int) -> None:
    graph, centre, row, radii = tiny(seed)
    rows = torch.tensor(row)[None]
    exact, bounds = [], []
    for radius in radii:
        answer = jacobians.search(graph, ball(centre, radius), rows, budget=100_000)
        assert answer is not None
        assert answer.exact
        exact.append(enumerated(graph, centre, radius, row))
        bounds.append(answer.bound)
    np.testing.assert_allclose(bounds, exact, rtol=1e-9, atol=1e-9)
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_with_full_budget_branch_and_bound_ends_at_the_enumerated_constant(seed: int) -> None:
    branch_and_bound_ends_at_the_enumerated_constant(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7, 42))
def test_with_full_budget_branch_and_bound_ends_at_the_enumerated_constant_of_many(seed: int) -> None:
    branch_and_bound_ends_at_the_enumerated_constant(seed)


@pytest.mark.parametrize("seed", range(4))
def test_parallel_neurons_share_their_phases(seed: int) -> None:
    """Neurons that are multiples of each other: patterns that only a hyperplane has must not count."""
    generator = np.random.default_rng(seed)
    first = generator.integers(-4, 5, size=(3, 3)) / 4.0
    bias = generator.integers(-2, 3, size=3) / 8.0
    weights = [np.vstack([first, -2 * first]), generator.integers(-4, 5, size=(1, 6)) / 2.0]
    graph = chain(weights, [np.concatenate([bias, -2 * bias]), np.zeros(1)])
    centre, row = np.zeros(3), np.ones(1)
    answer = jacobians.search(graph, ball(centre, 1.0), torch.ones(1, 1, dtype=F64), budget=10_000)
    assert answer is not None
    assert answer.exact
    assert answer.bound == pytest.approx(enumerated(graph, centre, 1.0, row), rel=1e-9)


def test_a_bound_with_a_budget_is_never_below_the_exact_constant() -> None:
    for seed in (1, 2, 3):
        graph, centre, row, _ = tiny(seed)
        rows = torch.tensor(row)[None]
        whole = jacobians.search(graph, ball(centre, 1.0), rows, budget=100_000)
        assert whole is not None
        before = np.inf
        for budget in (1, 2, 3, 8, 20, 50, whole.parts):
            answer = jacobians.search(graph, ball(centre, 1.0), rows, budget=budget)
            assert answer is not None
            assert answer.parts <= budget
            assert whole.bound - 1e-9 <= answer.bound <= before
            before = answer.bound


@pytest.mark.parametrize("seed", range(6))
def test_no_budget_brings_the_bound_of_several_rows_below_a_gradient(seed: int) -> None:
    """Every other network has weights that are multiples of 1/2: neurons that are 0 together, or all along."""
    generator = np.random.default_rng(seed)
    graph = random_chain(generator, [4, 9, 8, 7, 3])
    if seed % 2:
        for operation in graph.operations:
            if isinstance(operation, Dense):
                operation.weight[...], operation.bias[...] = (
                    np.round(2 * v) / 2 for v in (operation.weight, operation.bias)
                )
    region, rows = ball(np.round(generator.normal(size=4), 1), [0.1, 0.5, 2.0][seed // 2]), torch.eye(3, dtype=F64)
    found, pads = jacobian.bounds(graph, region, rows), stages.boxes(graph, region).pads
    by_name = {f"z{place}": pad[0] for place, pad in enumerate(pads)}
    floor = jacobian.steepest(graph, region, rows, by_name, found.rounding[0], samples=2000, moves=60, seed=0).norm
    before = float(found.norm.max()) + 1e-9
    for budget in (1, 20, 200):
        answer = jacobians.search(graph, region, rows, budget=budget)
        assert answer is not None
        assert floor <= answer.bound <= before
        before = answer.bound


def test_half_spaces_bound_no_less_than_their_points_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    n, rows = 5, 4
    lower, upper = -torch.rand(n, generator=generator, dtype=F64), torch.rand(n, generator=generator, dtype=F64)
    spaces = torch.randn(3, n + 1, generator=generator, dtype=F64)
    part = jacobians._Part(lower, upper, 0, (), spaces, (), np.inf)
    found = jacobians._Spaces.of([part])
    assert not found.empty.any()
    x = lower + torch.rand(200_000, n, generator=generator, dtype=F64) * (upper - lower)
    x = x[(x @ spaces[:, :-1].T + spaces[:, -1] >= 0).all(1)]
    assert len(x) > 100
    box = found.box
    assert ((x >= box.lower[0]) & (x <= box.upper[0])).all()
    assert (box.upper - box.lower < (upper - lower)[None] - 1e-3).any()
    d, m = (
        torch.randn(1, 2, rows, generator=generator, dtype=F64),
        torch.randn(1, n, 2, rows, generator=generator).double(),
    )
    y = (x - box.centre[0]) / box.spread()[0]
    below, above = found.extremes(d, m)
    assert (d[0, 0] + y @ m[0, :, 0] >= below[0]).all()
    assert (d[0, 1] + y @ m[0, :, 1] <= above[0]).all()
    plain = stages.over_the_box(d, m)
    assert (below >= plain[0]).all()
    assert (above <= plain[1]).all()
    assert (above < plain[1] - 1e-3).any()
    # Two that exclude each other.
    g = torch.tensor([[1.0, 0, 0, 0, 0, -0.01], [-1.0, 0, 0, 0, 0, -0.01]], dtype=F64)
    assert jacobians._Spaces.of([jacobians._Part(lower, upper, 0, (), g, (), np.inf)]).empty.all()


# --- the floor, the rows, the signs -----------------------------------------------------------------------------------


def test_gradients_at_points_are_those_of_autograd() -> None:
    generator = np.random.default_rng(1)
    for graph in (random_chain(generator, [64, 9, 8, 4], (1, 8, 8)), convolutional(generator)):
        x = torch.tensor(generator.uniform(size=(7, 1, 8, 8)), requires_grad=True)
        rows = torch.tensor(generator.normal(size=(2, graph.output_shape[0])))
        found, _ = jacobian.at(graph, x.detach(), rows)
        for place, row in enumerate(rows):
            (expected,) = torch.autograd.grad((forward(graph, x) @ row).sum(), x)
            torch.testing.assert_close(found[:, place], expected)


def test_a_point_on_a_kink_is_no_floor() -> None:
    """f = |x| at 0: autograd's gradient there is 0, of no piece, and the point must not count."""
    graph = chain([np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]])], [np.zeros(2), np.zeros(1)])
    region, rows = ball(np.zeros(1), 0.0), torch.ones(1, 1, dtype=F64)
    pads = {f"z{0}": torch.full((2,), 1e-15, dtype=F64)}
    found = jacobian.steepest(graph, region, rows, pads, torch.zeros(1, dtype=F64), samples=5, moves=2, seed=0)
    assert found.norm == 0


def test_all_outputs_are_the_largest_of_each_and_a_difference_is_a_row(trained: str) -> None:
    ask = {"network": trained, "index": 3, "radius": 0.03, "until": "linear", "samples": 50, "moves": 5}
    every = local.run(local.Params(**ask))
    single = [local.run(local.Params(**ask, output=output)) for output in range(10)]
    assert every.bound == pytest.approx(max(result.bound for result in single), rel=1e-9)
    np.testing.assert_allclose(every.by_row, [result.bound for result in single], rtol=1e-9)
    difference = local.run(local.Params(**ask, output=2, minus=7))
    assert difference.bound <= single[2].bound + single[7].bound + 1e-9
    mirrored = local.run(local.Params(**ask, output=7, minus=2))
    assert mirrored.bound == pytest.approx(difference.bound, rel=1e-9)
    np.testing.assert_array_equal(mirrored.signs, -difference.signs)


def test_signs_are_proofs_of_monotonicity(trained: str) -> None:
    generator = np.random.default_rng(2)
    positive = chain([np.abs(generator.normal(size=(8, 64))), np.abs(generator.normal(size=(1, 8)))],
                     [np.full(8, 1.0), np.zeros(1)], (1, 8, 8))  # fmt: skip
    result = local.run(local.Params(network=kept(positive), index=0, radius=0.1, samples=10, moves=0))
    assert (result.increasing, result.decreasing) == (64, 0)
    graph, images = networks.load(trained), data.load("digits", "test")
    proved = 0
    for index in range(4):
        result = local.run(local.Params(network=trained, index=index, radius=0.02, until="linear", samples=10))
        x = torch.tensor(images.x[index]) + 0.02 * torch.tensor(generator.uniform(-1, 1, size=(200, 1, 8, 8)))
        gradients, _ = jacobian.at(graph, x, torch.eye(10, dtype=F64))
        signs = torch.tensor(result.signs)
        assert signs.shape == (10, 1, 8, 8)
        assert (gradients[:, signs == 1] >= 0).all()
        assert (gradients[:, signs == -1] <= 0).all()
        assert result.increasing == int((signs == 1).sum())
        proved += result.increasing + result.decreasing
    assert proved > 100


def test_outputs_move_no_more_than_the_bound_allows(trained: str) -> None:
    graph, images = networks.load(trained), data.load("digits", "test")
    generator = np.random.default_rng(3)
    for index in range(5):
        result = local.run(local.Params(network=trained, index=index, radius=0.05, samples=50, moves=5))
        x = torch.tensor(images.x[index]) + 0.05 * torch.tensor(generator.uniform(-1, 1, size=(400, 1, 8, 8))).round()
        y = forward(graph, x)
        moved = (y[::2] - y[1::2]).abs().amax(1) / (x[::2] - x[1::2]).flatten(1).abs().amax(1).clamp(min=1e-9)
        assert float(moved.max()) <= result.bound


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_group_gives_what_each_job_gives_alone(trained: str) -> None:
    asked = [
        local.Params(
            network=trained, index=index, radius=[0.0, 0.01, 0.05][index % 3], clip=index % 2 == 0, budget=8,
            output=[None, 1][index % 2], samples=40, moves=4, until="bab" if index < 6 else "linear",
        )
        for index in range(12)
    ]  # fmt: skip
    outside = asked[0].model_copy(update={"index": 10_000})
    together = local.run_many([*asked, outside])
    assert isinstance(together[-1], Failure)
    assert together[-1].cause == "invalid_input"
    for params, result in zip(asked, together, strict=False):
        alone = local.run(params)
        assert isinstance(result, local.Result)
        for name in ("product", "interval", "linear", "sampled", "bound"):
            assert getattr(result, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
        assert result.bab == (None if alone.bab is None else pytest.approx(alone.bab, rel=1e-9))
        np.testing.assert_array_equal(result.signs, alone.signs)
        assert (result.parts, result.open, result.exact) == (alone.parts, alone.open, alone.exact)


def test_delicate_jobs_are_computed_alone(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [local.Params(network=trained, index=i, radius=0.02, until="linear", samples=5, moves=0) for i in range(6)]
    before = local.run_many(asked)
    sizes: list[int] = []
    bounds = jacobian.bounds

    def counted(graph: Graph, region: Ball, rows: torch.Tensor) -> jacobian.Bounds:
        sizes.append(len(region))
        return bounds(graph, region, rows)

    monkeypatch.setattr(local.jacobian, "bounds", counted)
    monkeypatch.setattr(stages, "_near", lambda low, *_: torch.ones(len(low), dtype=torch.bool))
    after = local.run_many(asked)
    assert sizes == [6, *[1] * 6]
    for one, other in zip(before, after, strict=True):
        assert isinstance(one, local.Result)
        assert isinstance(other, local.Result)
        assert one.bound == pytest.approx(other.bound, rel=1e-12)


def test_what_does_not_fit_says_why(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {"network": trained, "index": 0, "radius": 0.1}
    with pytest.raises(InvalidInput, match=r"output 10 does not exist.*0\.\.9"):
        local.run(local.Params(**ask, output=10))
    with pytest.raises(InvalidInput, match="does not take iris"):
        local.run(local.Params(network=trained, dataset="iris", index=0, radius=0.1))
    with pytest.raises(ValidationError, match="minus subtracts"):
        local.Params(**ask, minus=1)
    with pytest.raises(ValidationError, match="difference is 0"):
        local.Params(**ask, output=1, minus=1)
    with pytest.raises(ValidationError, match=r"0\.\.598"):
        local.Params(**ask | {"index": 599})
    skip = Graph(
        (Reshape("flatten", "x", "f", (64,)), Relu("relu", "f", "a", (64,)),
         Sum("sum", "a", "s", (64,), "f"), Dense("d", "s", "y", (2,), np.ones((2, 64)), np.zeros(2))),
        "x", "y", (1, 8, 8), (2,),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(local.networks, "load", lambda _: skip)
        with pytest.raises(NotApplicable, match="not a chain"):
            local.run(local.Params(**ask))
    big = chain([np.full((3, 64), 1e38)] + [np.full((3, 3), 1e38)] * 9, [np.zeros(3)] * 10, (1, 8, 8))
    with pytest.raises(NumericalError, match="not finite"):
        local.run(local.Params(**ask | {"network": kept(big)}))


def test_what_a_job_needs_grows_with_its_budget_and_its_points(trained: str) -> None:
    ask = {"network": trained, "index": 0, "radius": 0.1}
    small = local.needs(local.Params(**ask, until="linear", samples=1, moves=0))
    assert local.needs(local.Params(**ask, budget=10_000)).seconds > 100 * small.seconds
    assert local.needs(local.Params(**ask, samples=1_000_000)).seconds > 100 * small.seconds
    for more in ({"budget": 100_001}, {"samples": 1_000_001}, {"moves": 100_001}):
        with pytest.raises(ValidationError):
            local.Params(**ask, **more)


def record(ordinal: int, radius: float, state: str, **result: object) -> Record:
    reference = "onnx:" + "0" * 64
    return Record(
        id=ordinal, key=f"{ordinal:032x}", method="lipschitz.local_bound_propagation", version=1, state=state,
        params={"network": reference, "radius": radius, "index": ordinal},
        result={"trace_parts": [], "trace_bounds": [], "features": 10, "increasing": 0, "decreasing": 0} | result
        if result else None,
        names={reference: "f.onnx"},
    )  # fmt: skip


def test_the_plot_shades_the_gap_between_the_best_bound_and_the_floor() -> None:
    records = [
        record(0, 0.1, "done", interval=8.0, linear=6.0, bab=4.0, bound=4.0, sampled=3.0, trace_parts=[1, 3],
               trace_bounds=[6.0, 4.0], increasing=2, decreasing=3),
        record(1, 0.1, "done", interval=6.0, linear=4.0, bab=4.0, bound=4.0, sampled=1.0),
        record(2, 0.2, "done", interval=9.0, linear=9.0, bab=None, bound=9.0, sampled=1.0),
        record(3, 0.2, "failed"),
    ]  # fmt: skip
    figure = local.plot(records)
    radius, parts, monotone = figure.panels
    lines = {line.label: (line.x, line.y) for line in radius.marks}
    assert lines["interval"] == ([0.1, 0.2], [7.0, 9.0])
    assert lines["branch and bound"] == ([0.1, 0.2], [4.0, None])
    floor = radius.marks[-1]
    assert (floor.y, floor.low, floor.high) == ([2.0, 1.0], [2.0, 1.0], [4.0, 9.0])
    assert [(line.x, line.y) for line in parts.marks] == [([1, 3], [6.0, 4.0])]
    assert [bars.y for bars in monotone.marks] == [[0.1, 0.0], [0.15, 0.0]]
    assert "1 of them without a result" in figure.caption
    assert local.plot([]).panels[0].marks == []
