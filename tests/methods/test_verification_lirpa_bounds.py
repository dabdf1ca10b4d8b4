"""Linear bounds hold at every point met, keep the order the theory gives them, and are exact where it says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from netassay import data, job, networks  # noqa: E402
from netassay.figure import Line  # noqa: E402
from netassay.job import Record  # noqa: E402
from netassay.method import Failure, InvalidInput, NotApplicable  # noqa: E402
from netassay.methods.verification import lirpa_bounds  # noqa: E402
from netassay.networks import onnx_file, recipes  # noqa: E402
from netassay.networks.evaluate import forward  # noqa: E402
from netassay.networks.graph import Activation, Dense, Graph, Product, Relu, Reshape, Sum  # noqa: E402
from netassay.numerics import attacks  # noqa: E402
from netassay.numerics.bounds import optimised  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402
from netassay.store import artifacts  # noqa: E402

REFERENCE = Path(__file__).parents[2] / "../shared/reference"
F64 = torch.float64
WAYS = ("ibp", "forward", "crown_ibp", "crown", "alpha_crown")


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


@pytest.fixture(scope="module")
def trained() -> str:
    """A small network trained for a few epochs on digits."""
    recipe = recipes.Recipe.parse(
        {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [24, 24]}, "epochs": 6}
    )
    return networks.resolve(recipes.reference(recipe))


def kept(graph: Graph) -> str:
    return networks.keep(onnx_file.write(graph, "test"))


def singles(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.normal(size=shape).astype(np.float32).astype(np.float64)


def linear(weights: list[np.ndarray]) -> str:
    """A network on digits that is a chain of dense layers without anything between them."""
    operations: list = [Reshape("flatten", "x", "v0", (64,))]
    for place, weight in enumerate(weights):
        out = len(weight)
        operations.append(Dense(f"dense{place}", f"v{place}", f"v{place + 1}", (out,), weight, np.zeros(out)))
    return kept(Graph(tuple(operations), "x", f"v{len(weights)}", (1, 8, 8), operations[-1].shape))


def bounds(network: str, count: int = 8, radius: float = 0.02, **fixed: object) -> list[lirpa_bounds.Result]:
    params = [
        lirpa_bounds.Params(network=network, index=index, radius=radius, **fixed)  # type: ignore[arg-type]
        for index in range(count)
    ]
    found = lirpa_bounds.run_many(params)
    assert not any(isinstance(end, Failure) for end in found), found
    return found  # type: ignore[return-value]


def column(results: list[lirpa_bounds.Result], name: str) -> np.ndarray:
    return np.array([getattr(result, name) for result in results])


def images(count: int) -> torch.Tensor:
    return torch.tensor(np.array(data.load("digits", "test").x[:count]))


def drawn(region: Ball, count: int) -> torch.Tensor:
    """Points of each ball: (batch, count, *input), half of them as far out as they go."""
    return torch.stack([attacks._random(region, item, count, item) for item in range(len(region))]).clamp(
        region.low, region.high
    )


@pytest.mark.parametrize(("norm", "radius"), [("inf", 0.03), ("2", 0.2), ("1", 0.6)])
def test_no_point_met_in_a_ball_leaves_its_bounds(trained: str, norm: str, radius: float) -> None:
    count, graph = 4, networks.load(trained)
    region = Ball(norm, images(count), torch.full((count,), radius, dtype=F64), 0.0, 1.0)  # type: ignore[arg-type]
    labels = torch.tensor(data.load("digits", "test").y[:count].astype(np.int64))
    attack = attacks.pgd(graph, region, labels, steps=20, restarts=50, seeds=range(count))
    assert attack.inside.all()
    points = torch.cat([drawn(region, 10_000), attack.points[:, None]], dim=1)
    values = forward(graph, points.flatten(0, 1)).unflatten(0, points.shape[:2]).numpy()
    margins = np.take_along_axis(values, labels.numpy()[:, None, None], 2) - values
    losses = torch.nn.functional.cross_entropy(
        torch.tensor(values).flatten(0, 1), labels.repeat_interleave(points.shape[1]), reduction="none"
    ).reshape(points.shape[:2])
    for way in WAYS:
        results = bounds(trained, count, radius, norm=norm, method=way, coefficients=True, attack_steps=5)
        # The sampled values are rounded in float64 themselves.
        assert (values >= column(results, "lower")[:, None] - 1e-12).all(), way
        assert (values <= column(results, "upper")[:, None] + 1e-12).all(), way
        assert (margins >= column(results, "margins")[:, None] - 1e-12).all(), way
        a, b = column(results, "a"), column(results, "b")
        lines = np.einsum("bjchw,bnchw->bnj", a, points.numpy()) + b[:, None]
        assert (margins >= lines - 1e-12).all(), way
        assert (lines.min(1) >= column(results, "margins") - 1e-9).all(), way
        for name in ("loss_fused", "loss_unfused"):
            assert (column(results, name) >= losses.amax(1).numpy() - 1e-12).all(), (way, name)


@pytest.mark.parametrize(("norm", "radius"), [("inf", 0.01), ("inf", 0.05), ("2", 0.3), ("1", 0.8)])
@pytest.mark.parametrize("refined", [False, True])
def test_optimised_slopes_are_never_looser_than_crown(trained: str, norm: str, radius: float, refined: bool) -> None:
    for slopes in ("adaptive", "zero"):
        crown, alpha = (
            bounds(trained, 6, radius, norm=norm, slopes=slopes, attack_steps=0, method=way, refined=refined)
            for way in ("crown", "alpha_crown")
        )
        assert (column(alpha, "margins") >= column(crown, "margins")).all()
        assert (column(alpha, "margin") > column(crown, "margin")).any()
        assert (column(alpha, "lower") >= column(crown, "lower")).all()
        assert (column(alpha, "loss_unfused") <= column(crown, "loss_unfused")).all()


@pytest.mark.parametrize(("norm", "radius"), [("inf", 0.01), ("inf", 0.05), ("2", 0.2), ("1", 0.5)])
def test_with_lower_slopes_of_zero_crown_is_tighter_than_crown_ibp_and_that_than_ibp(
    trained: str, norm: str, radius: float
) -> None:
    ibp, hybrid, crown = (
        column(bounds(trained, 20, radius, norm=norm, slopes="zero", attack_steps=0, method=way), "margins")
        for way in ("ibp", "crown_ibp", "crown")
    )
    assert (crown >= hybrid - 1e-9).all()
    assert (hybrid >= ibp - 1e-9).all()
    assert crown.sum() > hybrid.sum() > ibp.sum()


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_a_linear_network_is_bounded_exactly(norm: str) -> None:
    generator = np.random.default_rng(0)
    chain = [singles(generator, 20, 64) / 8, singles(generator, 10, 20) / 4]
    x, whole, radius = images(5).flatten(1).numpy(), chain[1] @ chain[0], 0.25
    for way in ("forward", "crown_ibp", "crown", "alpha_crown"):
        for result, point in zip(bounds(linear(chain), 5, radius, norm=norm, clip=False, method=way), x, strict=True):
            rows = whole[result.label] - whole
            dual = {"inf": np.abs(rows).sum(1), "2": np.sqrt((rows**2).sum(1)), "1": np.abs(rows).max(1)}[norm]
            np.testing.assert_allclose(result.margins, rows @ point - radius * dual, rtol=0, atol=1e-10)


def difference_of_equals() -> Graph:
    """relu(x) - relu(x), in two branches."""
    one = np.ones((1, 1))
    return Graph(
        (
            Dense("first", "x", "p", (1,), one, np.zeros(1)),
            Dense("second", "x", "q", (1,), one, np.zeros(1)),
            Relu("r1", "p", "a", (1,)),
            Relu("r2", "q", "b", (1,)),
            Sum("minus", "a", "y", (1,), "b", (1.0, -1.0)),
        ),
        "x", "y", (1,), (1,),
    )  # fmt: skip


def test_slopes_of_one_half_halve_the_bounds_of_a_difference_of_equals() -> None:
    """The optimum is [-1/2, 1/2]. Measured: 20 steps of rate 0.1 reach [-0.5103, 0.5103]."""
    graph, region = difference_of_equals(), Ball("inf", torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=F64)
    fixed = {"network": "onnx:" + 64 * "0", "index": 0, "radius": 1.0}
    for way in ("ibp", "crown_ibp", "crown"):
        for slopes in ("zero", "adaptive"):
            params = lirpa_bounds.Params(method=way, slopes=slopes, **fixed)  # type: ignore[arg-type]
            found = lirpa_bounds._lower(graph, region, rows, params)
            np.testing.assert_allclose(found.lower, [[-1.0, -1.0]], rtol=0, atol=1e-12)
    for steps, error in ((20, 2e-2), (200, 1e-3)):
        found = optimised.lower(graph, region, rows, steps=steps, search=F64)
        assert (found.lower <= -0.5).all()
        np.testing.assert_allclose(found.lower, [[-0.5, -0.5]], rtol=0, atol=error)


@pytest.mark.parametrize("way", WAYS)
def test_for_two_classes_and_a_linear_network_fused_and_unfused_loss_are_the_true_one(way: str) -> None:
    generator = np.random.default_rng(1)
    chain = [singles(generator, 6, 64) / 8, singles(generator, 2, 6) / 4]
    params = [
        lirpa_bounds.Params(network=linear(chain), index=index, radius=0.2, clip=False, method=way)  # type: ignore[arg-type]
        for index, label in enumerate(data.load("digits", "test").y[:40])
        if label < 2
    ]
    assert params
    whole = chain[1] @ chain[0]
    for result, wanted in zip(lirpa_bounds.run_many(params), params, strict=True):
        assert isinstance(result, lirpa_bounds.Result)
        row = whole[result.label] - whole[1 - result.label]
        point = data.load("digits", "test").x[wanted.index].ravel()
        worst = np.log1p(np.exp(-(row @ point - 0.2 * np.abs(row).sum())))
        assert result.loss_fused == pytest.approx(worst, abs=1e-9)
        assert result.loss_unfused == pytest.approx(worst, abs=1e-9)
        assert min(result.loss_fused, result.loss_unfused) >= worst - 1e-12


def test_verdicts_do_not_depend_on_the_grouping(trained: str) -> None:
    params = [
        lirpa_bounds.Params(
            network=trained, index=index, radius=(0.0, 0.01, 0.03)[index % 3], norm=norm, method=way,  # type: ignore[arg-type]
            attack_steps=5,
        )
        for index, (way, norm) in enumerate((way, norm) for way in WAYS for norm in ("inf", "2", "1", "inf", "1"))
    ]  # fmt: skip
    together = lirpa_bounds.run_many(params)
    alone = [lirpa_bounds.run(p) for p in params]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, lirpa_bounds.Result)
        assert (one.verified, one.prediction, one.margin_attack) == (
            other.verified, other.prediction, other.margin_attack,
        )  # fmt: skip
        np.testing.assert_allclose(one.margins, other.margins, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_ball_of_radius_zero_is_the_network_itself(trained: str, way: str) -> None:
    for norm in ("inf", "2", "1"):
        for result in bounds(trained, 3, 0.0, norm=norm, method=way):
            assert result.margin == pytest.approx(result.margin_clean, abs=1e-9)
            assert result.margin == pytest.approx(result.margin_attack, abs=1e-9)
            assert result.loss_unfused >= result.loss_attack
            assert result.verified == result.correct


def test_bounds_in_float32_are_near_and_never_certified(trained: str) -> None:
    for way in WAYS:
        double, single = (bounds(trained, 4, 0.003, method=way, arithmetic=a) for a in ("float64", "float32"))
        assert not column(single, "certified").any()
        assert column(single, "verified").any()
        assert (column(double, "certified") == column(double, "verified")).all()
        # What the rounding of float32 may add is taken off too: some 0.02 here.
        assert (column(single, "margins") <= column(double, "margins") + 1e-6).all()
        np.testing.assert_allclose(column(single, "margins"), column(double, "margins"), rtol=0, atol=0.1)


def test_functions_and_products_are_bounded_too() -> None:
    generator = np.random.default_rng(2)
    graph = Graph(
        (
            Reshape("flatten", "x", "f", (64,)),
            Dense("one", "f", "p", (12,), singles(generator, 12, 64) / 8, np.zeros(12)),
            Activation("tanh", "p", "t", (12,), "tanh"),
            Activation("sigmoid", "p", "s", (12,), "sigmoid"),
            Product("gate", "t", "g", (12,), "s"),
            Dense("two", "g", "y", (10,), singles(generator, 10, 12), np.zeros(10)),
        ),
        "x", "y", (1, 8, 8), (10,),
    )  # fmt: skip
    network, count, radius = kept(graph), 4, 0.05
    region = Ball("inf", images(count), torch.full((count,), radius, dtype=F64), 0.0, 1.0)
    points = drawn(region, 2000)
    values = forward(graph, points.flatten(0, 1)).unflatten(0, points.shape[:2]).numpy()
    widths = {}
    for way in WAYS:
        results = bounds(network, count, radius, method=way)
        assert (values >= column(results, "lower")[:, None] - 1e-12).all(), way
        assert (values <= column(results, "upper")[:, None] + 1e-12).all(), way
        widths[way] = (column(results, "upper") - column(results, "lower")).mean()
        assert results[0].layers == ["p", "t", "s", "y"]
    assert widths["crown"] <= widths["crown_ibp"] < widths["ibp"]
    assert widths["forward"] < widths["ibp"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"perturbation": "weights", "norm": "2"}, "of norm inf"),
        ({"layers": [0]}, "perturbation: weights"),
        ({"index": 10_000}, "599"),
        ({"norm": "3"}, "norm"),
    ],
)
def test_params_that_make_no_sense_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        lirpa_bounds.Params.model_validate({"network": "onnx:" + 64 * "0", "index": 0, "radius": 0.1} | wrong)


def test_a_network_for_other_data_is_refused_and_one_output_is_no_question(trained: str) -> None:
    with pytest.raises(InvalidInput, match="does not take iris"):
        lirpa_bounds.run(lirpa_bounds.Params(network=trained, dataset="iris", index=0, radius=0.1))
    with pytest.raises(NotApplicable, match="one output"):
        lirpa_bounds.run(lirpa_bounds.Params(network=linear([np.ones((1, 64))]), index=0, radius=0.1))


def replaced(network: Graph, generator: np.random.Generator, radius: float, count: int) -> list[dict]:
    """Weights of all dense layers drawn within `radius`, half of them at its ends."""
    drawn = []
    for place in range(count):
        one = {}
        for layer in network.operations:
            if isinstance(layer, Dense):
                step = generator.uniform(-1, 1, layer.weight.shape)
                step = np.sign(step) if place % 2 else step
                one[layer] = (torch.tensor(layer.weight + radius * step), torch.tensor(layer.bias))
        drawn.append(one)
    return drawn


def small(seed: int) -> Graph:
    generator = np.random.default_rng(seed)
    return Graph(
        (
            Reshape("flatten", "x", "f", (64,)),
            Dense("one", "f", "p", (7,), singles(generator, 7, 64) / 8, singles(generator, 7) / 4),
            Relu("relu", "p", "a", (7,)),
            Dense("two", "a", "q", (6,), singles(generator, 6, 7) / 2, singles(generator, 6) / 4),
            Relu("relu2", "q", "b", (6,)),
            Dense("three", "b", "y", (10,), singles(generator, 10, 6), singles(generator, 10) / 4),
        ),
        "x", "y", (1, 8, 8), (10,),
    )  # fmt: skip


@pytest.mark.parametrize("radius", [0.002, 0.05])
def test_no_weights_drawn_leave_the_bounds_of_perturbed_weights(radius: float) -> None:
    graph, count = small(0), 3
    network, x = kept(graph), images(count)
    values = torch.stack([forward(graph, x, one) for one in replaced(graph, np.random.default_rng(1), radius, 500)])
    margins = {}
    for way in WAYS:
        results = bounds(network, count, radius, perturbation="weights", method=way, refined=False, attack_steps=10)
        assert (values.numpy() >= column(results, "lower") - 1e-12).all(), way
        assert (values.numpy() <= column(results, "upper") + 1e-12).all(), way
        assert (column(results, "gap") >= 0).all()
        assert (column(results, "margin_attack") < column(results, "margin_clean")).all()
        assert results[0].layers == ["p", "q", "y"]
        margins[way] = column(results, "margin")
    assert (margins["alpha_crown"] >= margins["crown"]).all()
    # Between McCormick's planes no order is proved: at radius 0.05 boxes win on one of the three.
    assert margins["crown"].sum() > margins["ibp"].sum()


def test_the_first_layer_at_a_fixed_input_is_affine_in_its_weights_and_exact() -> None:
    """W x over |W - W0| <= r: every margin falls by r times twice the sum of |x|, once for each of the two rows."""
    generator = np.random.default_rng(3)
    weight, radius = singles(generator, 10, 64) / 8, 0.01
    for way in WAYS:
        for result, x in zip(
            bounds(linear([weight]), 3, radius, perturbation="weights", method=way, attack_steps=3), images(3).numpy(),
            strict=True,
        ):  # fmt: skip
            outputs = weight @ x.ravel()
            expected = outputs[result.label] - outputs - 2 * radius * np.abs(x).sum()
            expected[result.label] = 0
            np.testing.assert_allclose(result.margins, expected, rtol=0, atol=1e-10)
            assert result.gap == pytest.approx(0, abs=1e-5)  # the attack's weights are float32 numbers


def test_weights_of_the_last_layer_alone_move_margins_by_the_size_of_what_they_meet() -> None:
    graph = small(4)
    (result,) = bounds(kept(graph), 1, 0.01, perturbation="weights", layers=(2,))
    last = graph.operations[-1]
    assert isinstance(last, Dense)
    hidden = forward(Graph(graph.operations[:-1], "x", "b", (1, 8, 8), (6,)), images(1))[0].numpy()
    outputs = last.weight @ hidden + last.bias
    expected = outputs[result.label] - outputs - 2 * 0.01 * hidden.sum()
    expected[result.label] = 0
    np.testing.assert_allclose(result.margins, expected, rtol=0, atol=1e-10)


def test_layers_that_do_not_exist_are_refused(trained: str) -> None:
    params = lirpa_bounds.Params(network=trained, index=0, radius=0.1, perturbation="weights", layers=(3,))
    with pytest.raises(InvalidInput, match="3 dense layers"):
        lirpa_bounds.run(params)


def test_a_plot_shows_each_method_under_the_attack(trained: str) -> None:
    made = []
    for way in WAYS:
        for radius in (0.0, 0.02, 0.08):
            for index, result in enumerate(bounds(trained, 5, radius, method=way, refined=False)):
                params = lirpa_bounds.Params(network=trained, index=index, radius=radius, method=way, refined=False)  # type: ignore[arg-type]
                made.append(
                    Record(
                        id=len(made), key=str(len(made)), method="verification.lirpa_bounds", version=1,
                        params=json.loads(job.canonical(params)), state="done", result=result.model_dump(),
                    )
                )  # fmt: skip
    accuracy, widths = lirpa_bounds.plot(made).panels
    attack, *lines = [mark for mark in accuracy.marks if isinstance(mark, Line)]
    assert [line.label for line in lines] == list(WAYS)
    for line in lines:
        assert line.x == attack.x == [0.0, 0.02, 0.08]
        assert all(y <= top for y, top in zip(line.y, attack.y, strict=True))  # type: ignore[operator]
    assert [mark.x for mark in widths.marks if isinstance(mark, Line)] == [["dense1", "dense2", "dense3"]] * 5


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no stored bounds beside the checkout")
@pytest.mark.parametrize(("net", "count"), [("mlp784-256x2-10", 16), ("mlp64-128x4-10", 64), ("acasxu1_1", 64)])
def test_optimised_bounds_are_on_average_no_looser_than_those_of_a_peer(net: str, count: int) -> None:
    """auto_LiRPA 0.7.1, CROWN-Optimized, 20 iterations of rate 0.1, float32, l_inf radius 0.02. Measured mean widths,
    ours and theirs: 0.84592 and 0.84598 (24 boxes), 0.0089634 and 0.0089654, 0.672 and 0.737; of a single box ours may
    be wider, by 12 % in the last net.
    """
    with np.load(REFERENCE / f"bounds_{net}.npz") as stored:
        peer = dict(stored)
    layers = sum(name.startswith("W") for name in peer)
    operations: list = []
    value = "x"
    for layer in range(layers):
        weight, bias = (peer[f"{kind}{layer}"].astype(np.float64) for kind in "Wb")
        operations.append(Dense(f"dense{layer}", value, f"z{layer}", bias.shape, weight, bias))
        value = f"z{layer}"
        if layer < layers - 1:
            operations.append(Relu(f"relu{layer}", value, f"a{layer}", bias.shape))
            value = f"a{layer}"
    graph = Graph(tuple(operations), "x", value, (peer["W0"].shape[1],), operations[-1].shape)
    region = Ball("inf", torch.tensor(peer["x"][:count]).double(), torch.full((count,), 0.02, dtype=F64))
    rows = torch.eye(graph.output_shape[0], dtype=F64)
    found = optimised.lower(graph, region, torch.cat([rows, -rows]), refined=True, search=F64)
    low, high = found.lower.chunk(2, dim=1)
    theirs = (peer["CROWN-Optimized_ub"] - peer["CROWN-Optimized_lb"])[:count]
    assert float((-high - low).mean()) <= theirs.mean() * (1 + 1e-4)
