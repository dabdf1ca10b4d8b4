"""Tightness of interval bounds: closed forms, invariance, exact boxes, and what training does to it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

from netassay import networks  # noqa: E402
from netassay.job import Record  # noqa: E402
from netassay.method import InvalidInput, NotApplicable, NumericalError  # noqa: E402
from netassay.methods.lipschitz import ibp_tightness  # noqa: E402
from netassay.methods.verification import certify  # noqa: E402
from netassay.networks import evaluate, onnx_file, recipes  # noqa: E402
from netassay.networks.graph import Activation, Conv, Dense, Graph, Operation, Relu, Reshape, Scale  # noqa: E402
from netassay.numerics import linear_autoencoders as autoencoders  # noqa: E402
from netassay.numerics.bounds import backward, interval, milp, tightness  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402
from netassay.store import artifacts  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


def ask(**params: object) -> ibp_tightness.Result:
    return ibp_tightness.run(ibp_tightness.Params.model_validate(params))


def mlp(*weights: np.ndarray, biases: Sequence[np.ndarray] | None = None, relu: bool = True) -> Graph:
    """Dense layers with these weights, ReLUs between them."""
    operations: list[Operation] = []
    at = "x"
    for place, weight in enumerate(weights):
        if place and relu:
            operations.append(Relu(f"relu{place}", at, f"a{place}", (weight.shape[1],)))
            at = f"a{place}"
        bias = np.zeros(len(weight)) if biases is None else biases[place]
        operations.append(Dense(f"dense{place}", at, f"z{place}", (len(weight),), np.asarray(weight, float), bias))
        at = f"z{place}"
    return Graph(tuple(operations), "x", at, (weights[0].shape[1],), (len(weights[-1]),))


def drawn(widths: Sequence[int], seed: int, positive: bool = False) -> Graph:
    draw = np.random.default_rng(seed)
    shapes = list(itertools.pairwise(widths))
    weights = [draw.normal(size=(out, n)) for n, out in shapes]
    biases = [draw.normal(size=out) for _, out in shapes]
    return mlp(*(np.abs(weight) if positive else weight for weight in weights), biases=biases)


def kept(graph: Graph) -> str:
    return networks.keep(onnx_file.write(graph, "test"))


# --- closed forms at initialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width, expected", [(10, 0.3866), (50, 0.1764), (200, 0.0885)])
def test_two_gaussian_layers_have_the_ratio_of_the_gamma_formula(width: int, expected: float) -> None:
    result = ask(experiment="initialisation", activation="linear", depth=2, width=width, samples=300)
    formula = math.sqrt(math.pi) * math.gamma((width + 1) / 2) / (width * math.gamma(width / 2))
    assert formula == pytest.approx(expected, abs=6e-5)
    assert result.ratio_expected == pytest.approx(formula, rel=1e-12)
    assert result.ratio == pytest.approx(formula, rel=0.03)
    # The mean of ratios is not the ratio of means, but near it.
    assert result.tau == pytest.approx(formula, rel=0.03)


@pytest.mark.parametrize("depth, stated", [(3, 0.0313), (4, 0.0055)])
def test_deeper_gaussian_networks_have_the_power_of_it(depth: int, stated: float) -> None:
    result = ask(experiment="initialisation", activation="linear", depth=depth, width=50, samples=100)
    assert result.ratio_asymptotic == pytest.approx((math.pi / 100) ** ((depth - 1) / 2), rel=1e-12)
    assert result.ratio == pytest.approx(result.ratio_asymptotic, rel=0.05)
    assert result.ratio == pytest.approx(stated, rel=0.05)
    assert result.ratio == pytest.approx(result.ratio_expected, rel=0.03)


def test_the_logarithm_of_tightness_is_linear_in_depth() -> None:
    depths = np.arange(2, 9)
    results = [
        ask(experiment="initialisation", activation="linear", depth=int(depth), width=50, samples=60)
        for depth in depths
    ]
    logs = np.log([result.tau for result in results])
    slope, offset = np.polyfit(depths, logs, 1)
    assert slope == pytest.approx(math.log(tightness.gaussian_ratio([50])), rel=0.02)
    assert np.abs(logs - (slope * depths + offset)).max() < 0.05


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_with_relus_only_the_units_that_are_on_count(depth: int) -> None:
    result = ask(experiment="initialisation", depth=depth, width=40, samples=300)
    assert result.ratio == pytest.approx(result.ratio_expected, rel=0.05)
    assert result.ratio > 1.2 * tightness.gaussian_ratio([40] * (depth - 1))


def test_the_binomial_mean_of_one_and_two_units_by_hand() -> None:
    # E[chi_1] = sqrt(2 / pi), E[chi_2] = sqrt(pi / 2); of two units both are on in one of four cases, one in two.
    assert tightness.gaussian_ratio([1]) == pytest.approx(1)
    assert tightness.gaussian_ratio([2]) == pytest.approx(math.pi / 4)
    assert tightness.gaussian_ratio([1], relu=True) == pytest.approx(1)
    assert tightness.gaussian_ratio([2], relu=True) == pytest.approx(0.5 + math.pi / 8)
    assert tightness.gaussian_ratio([]) == 1


def test_one_layer_loses_nothing() -> None:
    result = ask(experiment="initialisation", depth=1, samples=5)
    assert (result.tau, result.ratio, result.ratio_expected) == (1, 1, 1)


# --- of a network -----------------------------------------------------------------------------------------------------


def test_a_case_countable_by_hand() -> None:
    # f(x) = relu(x1 + x2) - relu(x1 - x2). Both on at (2, 1): f = 2 x2, exact 2, boxes 4. One on at (1, 2): 2 of 2.
    graph = mlp(np.array([[1, 1], [1, -1]]), np.array([[1, -1]]))
    found = tightness.local(graph, torch.tensor([[2.0, 1.0], [1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64))
    assert found.tau.flatten().tolist() == [0.5, 1.0, 1.0]
    assert found.constant.flatten().tolist() == [False, False, True]
    assert found.layers == ("dense0", "dense1")
    assert found.onward.tolist() == [[0.5, 1.0], [1.0, 1.0], [1.0, 1.0]]
    (pair,) = tightness.pairs(graph)
    # Products to x1: +1, -1; to x2: +1, +1.
    assert pair == tightness.Pair("dense0", "dense1", signs=0.5, majority=0.75, tau=0.5)


@given(st.lists(st.integers(1, 8), min_size=2, max_size=6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_tightness_is_a_share_and_whole_for_positive_weights(widths: list[int], seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, widths[0])))
    found = tightness.local(drawn(widths, seed), x)
    assert bool(((found.tau >= 0) & (found.tau <= 1)).all())
    assert bool(((found.onward >= 0) & (found.onward <= 1)).all())
    positive = drawn(widths, seed, positive=True)
    assert bool((tightness.local(positive, x).tau == 1).all())
    pairs = tightness.pairs(positive)
    assert all((pair.signs, pair.majority) == (1, 1) for pair in pairs)
    assert [pair.tau for pair in pairs] == pytest.approx([1] * len(pairs), abs=1e-14)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_two_linear_layers_are_invariant_if_and_only_if_all_their_products_agree_in_sign(seed: int) -> None:
    draw = np.random.default_rng(seed)
    signs = [draw.choice([-1, 1], size=n) for n in (3, 4, 2)]
    w1, w2 = (np.abs(draw.normal(size=shape)) * (draw.random(shape) < 0.8) for shape in ((4, 3), (2, 4)))
    w1, w2 = w1 * signs[1][:, None] * signs[0], w2 * signs[2][:, None] * signs[1]
    x = torch.zeros(1, 3, dtype=torch.float64)
    (pair,) = tightness.pairs(mlp(w1, w2, relu=False))
    assert pair.signs == 1
    assert pair.tau == pytest.approx(1, abs=1e-14)
    assert tightness.local(mlp(w1, w2, relu=False), x).tau.tolist()[0] == pytest.approx([1, 1], abs=1e-14)
    # One sign turned where another product of the same (i, j) is not 0.
    busy = np.argwhere((w2[:, :, None] * w1[None]) != 0)
    for i, k, j in busy:
        if any(other != k and (i, other, j) in set(map(tuple, busy)) for other in range(4)):
            w2[i, k] *= -1
            (pair,) = tightness.pairs(mlp(w1, w2, relu=False))
            assert pair.signs < 1
            assert pair.tau < 1
            assert float(tightness.local(mlp(w1, w2, relu=False), x).tau.min()) < 1
            break


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_it_is_the_quotient_of_boxes_of_a_small_radius(seed: int, convolution: bool) -> None:
    """An independent path: interval propagation over a ball that turns no ReLU, and corners of the ball."""
    draw = np.random.default_rng(seed)
    if convolution:
        operations = (
            Scale("scale", "x", "s", (1, 3, 3), np.full((1, 1, 1), -2.0), np.ones((1, 1, 1))),
            Conv("conv", "s", "c", (2, 3, 3), draw.normal(size=(2, 1, 3, 3)), draw.normal(size=2),
                 (1, 1), (1, 1, 1, 1), (1, 1), 1),
            Relu("relu", "c", "a", (2, 3, 3)),
            Reshape("flat", "a", "f", (18,)),
            Dense("dense", "f", "y", (3,), draw.normal(size=(3, 18)), draw.normal(size=3)),
        )  # fmt: skip
        graph = Graph(operations, "x", "y", (1, 3, 3), (3,))
    else:
        graph = drawn([5, 7, 6, 3], seed)
    x = torch.from_numpy(draw.normal(size=(4, *graph.input_shape)))
    radius = 1e-7
    region = Ball("inf", x, torch.full((4,), radius, dtype=torch.float64))
    low, high = interval.bounds(graph, region)
    jacobians = [torch.autograd.functional.jacobian(lambda z: evaluate.forward(graph, z[None])[0], one) for one in x]
    exact = torch.stack([jacobian.flatten(1).abs().sum(1) for jacobian in jacobians])
    quotient = 2 * radius * exact / (high - low)
    found = tightness.local(graph, x)
    alive = ~found.constant
    assert torch.allclose(found.tau[alive], quotient[alive], rtol=1e-5)
    assert found.layers == (("conv", "dense") if convolution else ("dense0", "dense1", "dense2"))
    assert len(tightness.pairs(graph)) == len(found.layers) - 1


@pytest.mark.parametrize("seed", range(4))
def test_boxes_of_positive_weights_are_exact(seed: int) -> None:
    graph = drawn([4, 6, 6, 2], seed, positive=True)
    region = Ball("inf", torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    low, high = interval.bounds(graph, region)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    values = evaluate.forward(graph, corners)
    assert torch.allclose(values.amin(0), low[0], rtol=1e-12)
    assert torch.allclose(values.amax(0), high[0], rtol=1e-12)
    boxes, program = interval.propagate(graph, region), milp.Program(graph)
    for row, end in zip(np.concatenate([np.eye(2), -np.eye(2)]), torch.cat([low[0], -high[0]]).tolist(), strict=True):
        assert program.minimum(boxes, row, 1000).bound == pytest.approx(end, rel=1e-6)


# --- the exact minimum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_program_finds_the_minimum_that_a_fine_grid_finds(seed: int) -> None:
    graph = drawn([2, 6, 6, 3], seed)
    region = Ball("inf", torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    row = np.random.default_rng(seed + 100).normal(size=3)
    proved = backward.lower(graph, region, torch.from_numpy(row)[None])
    optimum = milp.Program(graph).minimum(proved.values, row, 10_000)
    axis = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    least = float((evaluate.forward(graph, grid) @ torch.from_numpy(row)).min())
    assert optimum.solved
    assert float(proved.lower) <= optimum.bound + 1e-6
    assert optimum.bound <= least + 1e-6
    met = float(evaluate.forward(graph, torch.from_numpy(optimum.point)[None])[0] @ torch.from_numpy(row))
    assert met == pytest.approx(optimum.bound, abs=1e-5)
    # A piecewise linear function cannot fall much between points of a grid.
    slope = np.prod([np.abs(op.weight).sum(1).max() for op in graph.operations if isinstance(op, Dense)])
    assert least - optimum.bound <= slope * np.abs(row).sum() / 200


def test_a_search_cut_short_still_bounds_from_below() -> None:
    graph = drawn([6, 14, 14, 2], 1)
    region = Ball("inf", torch.zeros(1, 6, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    row = np.array([1.0, -1.0])
    boxes, program = interval.propagate(graph, region), milp.Program(graph)
    cut, whole = program.minimum(boxes, row, 1), program.minimum(boxes, row, 100_000)
    assert whole.solved
    assert not cut.solved
    assert cut.bound <= whole.bound + 1e-6


# --- accuracies -------------------------------------------------------------------------------------------------------


@functools.cache
def robust() -> str:
    recipe = recipes.Recipe.parse(
        {
            "dataset": "digits",
            "architecture": {"kind": "mlp", "hidden": [12, 12]},
            "training": {"kind": "ibp"},
            "epochs": 25,
        }
    )
    return networks.resolve(recipes.reference(recipe))


def test_accuracies_are_those_of_the_verifier_and_in_order() -> None:
    network, examples, radius = robust(), 25, 0.08
    result = ask(network=network, examples=examples, radius=radius, exact=True)
    assert len(result.taus) == examples
    assert result.tau == pytest.approx(np.mean(result.taus))
    assert result.onward[0] == pytest.approx(result.tau)
    assert result.certified_ibp <= result.certified_crown <= result.exact_robust
    assert result.exact_robust <= result.exact_possible <= result.accuracy_pgd <= result.accuracy_clean
    # All were decided, and the solver proves what CROWN cannot, else the test says nothing.
    assert result.certified_crown < result.exact_robust == result.exact_possible
    verdicts = certify.run_many([certify.Params(network=network, index=i, radius=radius) for i in range(examples)])
    assert result.accuracy_clean == sum(verdict.correct for verdict in verdicts) / examples
    assert result.certified_ibp == sum(verdict.by == "ibp" for verdict in verdicts) / examples
    assert result.certified_crown == sum(verdict.verdict == "certified" for verdict in verdicts) / examples
    standing = sum(verdict.verdict != "falsified" for verdict in verdicts)
    assert result.exact_robust <= standing / examples


def test_at_radius_zero_all_accuracies_are_one() -> None:
    result = ask(network=robust(), examples=60, radius=0, exact=True)
    shares = (result.accuracy_pgd, result.certified_ibp, result.certified_crown, result.exact_robust)
    assert set(shares) == {result.accuracy_clean}


def test_drawn_inputs_have_a_tightness_and_no_accuracies() -> None:
    result = ask(network=robust(), dataset=None, examples=7)
    assert result.taus.shape == (7,)
    assert result.accuracy_clean is None


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValidationError, match="asks about a given network"):
        ibp_tightness.Params()
    with pytest.raises(ValidationError, match="no other experiment takes one"):
        ibp_tightness.Params(experiment="training", network="onnx:" + "0" * 64)
    with pytest.raises(ValidationError, match="needs a dataset"):
        ibp_tightness.Params(experiment="training", dataset=None)
    with pytest.raises(ValidationError, match="radius above 0"):
        ibp_tightness.Params(experiment="training", radius=0)
    with pytest.raises(InvalidInput, match="does not take iris"):
        ask(network=robust(), dataset="iris")
    few = kept(Graph((Reshape("r", "x", "f", (64,)), Dense("d", "f", "y", (2,), np.ones((2, 64)), np.zeros(2))),
                     "x", "y", (1, 8, 8), (2,)))  # fmt: skip
    with pytest.raises(InvalidInput, match="label 9, but the network has 2 outputs"):
        ask(network=few)
    steep = mlp(np.full((2, 2), 1e38), *[np.full((2, 2), 1e38)] * 8)
    with pytest.raises(NumericalError, match="not finite"):
        ask(network=kept(steep), dataset=None)


def test_what_is_no_chain_of_linear_layers_and_relus_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Dense("d", "x", "z", (2,), np.ones((2, 2)), np.zeros(2))
    curved = Graph((dense, Activation("t", "z", "y", (2,), "tanh")), "x", "y", (2,), (2,))
    monkeypatch.setattr(ibp_tightness.networks, "load", lambda reference: curved)
    with pytest.raises(NotApplicable, match=r"no chain of linear layers and ReLUs: t \(Activation\)"):
        ask(network="onnx:" + "0" * 64, dataset=None)


# --- training ---------------------------------------------------------------------------------------------------------

QUICK = {"experiment": "training", "examples": 200, "epochs": 40, "learning_rate": 5e-3, "steps": 5}


@functools.cache
def trained(training: str, width: int) -> ibp_tightness.Result:
    return ask(training=training, width=width, **QUICK)


def test_interval_training_is_tighter_certifies_more_and_is_less_accurate() -> None:
    standard, tight = trained("standard", 32), trained("ibp", 32)
    assert tight.tau >= 3 * standard.tau
    assert tight.certified_crown > standard.certified_crown
    assert tight.certified_ibp > standard.certified_ibp
    assert tight.accuracy_clean < standard.accuracy_clean
    assert tight.tau_initial == standard.tau_initial


def test_width_costs_tightness_at_initialisation_but_not_after_interval_training() -> None:
    narrow, wide = trained("ibp", 32), trained("ibp", 128)
    assert wide.tau_initial < narrow.tau_initial / 3
    assert wide.tau > 0.7 * narrow.tau


def test_the_trained_network_is_kept_and_measures_the_same() -> None:
    result = trained("ibp", 32)
    again = ask(network=result.network, examples=200, steps=5)
    assert again.tau == result.tau
    assert again.certified_crown == result.certified_crown
    params = ibp_tightness.Params(training="ibp", width=32, **QUICK)
    assert networks.load(networks.resolve(recipes.reference(ibp_tightness.recipe_of(params)))).output_shape == (10,)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_order_of_trainings_and_the_flatness_over_width_at_the_defaults() -> None:
    """Figures in the method's docstring."""
    kinds = ibp_tightness.TRAININGS
    found = {kind: ask(experiment="training", training=kind) for kind in kinds}
    wide = {kind: ask(experiment="training", training=kind, width=256) for kind in ("standard", "ibp")}
    assert found["ibp"].tau > found["sabr"].tau > 3 * found["standard"].tau
    assert found["ibp"].tau >= 5 * found["standard"].tau
    assert found["ibp"].certified_ibp > found["sabr"].certified_ibp > found["standard"].certified_ibp
    assert found["ibp"].accuracy_clean < found["sabr"].accuracy_clean < found["standard"].accuracy_clean
    assert wide["ibp"].tau_initial < found["ibp"].tau_initial / 3
    assert wide["ibp"].tau > 0.8 * found["ibp"].tau


# --- autoencoders -----------------------------------------------------------------------------------------------------


def test_a_free_autoencoder_loses_what_lies_beyond_its_directions() -> None:
    x = autoencoders.gaussian_data(12, 4, 50, seed=3)
    squares = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    for hidden in (1, 2, 3, 4, 12):
        found = autoencoders.free(x, hidden)
        lost = float((x - found.second @ found.first @ x).square().sum() / x.square().sum())
        assert found.error == pytest.approx(squares[hidden:].sum() / squares.sum(), abs=1e-12)
        assert lost == pytest.approx(found.error, abs=1e-12)


@pytest.mark.parametrize("rank, hidden", [(1, 1), (2, 2), (4, 3), (4, 5)])
def test_tightness_one_is_never_better_and_costs_nothing_up_to_rank_two(rank: int, hidden: int) -> None:
    x = autoencoders.gaussian_data(12, rank, 50, seed=rank)
    free, held = autoencoders.free(x, hidden), autoencoders.sign_structured(x, hidden, starts=3, seed=0)
    lost = float((x - held.second @ held.first @ x).square().sum() / x.square().sum())
    assert lost == pytest.approx(held.error, abs=1e-9)
    assert free.error <= held.error + 1e-12
    (pair,) = tightness.pairs(mlp(held.first.numpy(), held.second.numpy(), relu=False))
    assert pair.signs == 1
    assert pair.tau == pytest.approx(1, abs=1e-12)
    # Signs that make a vector of the plane positive leave a cone with two edges there: as many as units.
    if rank <= 2:
        assert held.error < 1e-4


def test_as_many_hidden_units_as_inputs_copy_them() -> None:
    result = ask(experiment="reconstruction", inputs=8, rank=8, width=8)
    assert result.error_free < 1e-12
    assert result.error_invariant < 0.01
    assert result.tau_invariant == pytest.approx(1, abs=1e-12)


# --- the plot ---------------------------------------------------------------------------------------------------------


def record(number: int, result: dict | None, **params: object) -> Record:
    asked = ibp_tightness.Params.model_validate(params).model_dump(mode="json")
    return Record(
        id=number, key=f"{number:032x}", method="lipschitz.ibp_tightness", version=1, params=asked,
        state="done" if result else "failed", result=result, names={"onnx:" + "0" * 64: "mine.onnx"},
    )  # fmt: skip


def test_the_plot_shows_closed_forms_and_a_point_for_each_trained_network() -> None:
    start = [
        record(i, {"ratio": 1 / width, "ratio_expected": 2 / width}, experiment="initialisation", width=width, depth=2)
        for i, width in enumerate((10, 20))
    ]
    after = [
        record(9 + i, {"tau": tau, "tau_initial": 0.1, "certified_crown": 0.5}, experiment="training", width=10 + i)
        for i, tau in enumerate((0.4, 0.6))
    ]
    given = record(20, {"tau": 0.2, "certified_crown": 0.3}, network="onnx:" + "0" * 64)
    figure = ibp_tightness.plot([*start, *after, given, record(30, None, experiment="training")])
    panels = {panel.title: panel for panel in figure.panels}
    line, points = panels["at initialisation, against width"].marks
    assert (line.x, line.y, line.dashed, line.label) == ([10, 20], [0.2, 0.1], True, "depth 2")
    assert (points.x, points.y, points.label) == ([10, 20], [0.1, 0.05], "depth 2")
    assert [(mark.label, mark.y) for mark in panels["after training, depth 3, radius 0.1"].marks] == [
        ("ibp", [0.4, 0.6]),
        ("before", [0.1, 0.1]),
    ]
    scatter = {mark.label: (mark.x, mark.y) for mark in panels["certified accuracy against tightness"].marks}
    assert scatter == {"ibp": ([0.4, 0.6], [0.5, 0.5]), "mine.onnx": ([0.2], [0.3])}
    assert "6 jobs, 1 of them without a result" in figure.caption
    assert ibp_tightness.plot([]).panels[0].marks == []
