"""What robust training minimises: points of the box, and margins that no point of the box exceeds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from netassay import data  # noqa: E402
from netassay.networks import evaluate, recipes, training, worst_cases  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph  # noqa: E402
from netassay.numerics.bounds import backward  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402

ARCHITECTURES = ({"kind": "mlp", "hidden": [16, 12]}, {"kind": "cnn", "channels": [2, 3], "hidden": 8})


def drawn(architecture: dict, seed: int) -> tuple[Graph, dict, torch.Tensor, torch.Tensor]:
    recipe = recipes.Recipe.parse({"dataset": "digits", "architecture": architecture, "seed": seed, "epochs": 1})
    graph = training.initial(recipe, torch.Generator().manual_seed(seed))
    weights = {
        op: (torch.tensor(op.weight), torch.tensor(op.bias)) for op in graph.operations if isinstance(op, Dense | Conv)
    }
    examples = data.load("digits", "test")
    return graph, weights, torch.tensor(examples.x[:6].copy()), torch.tensor(examples.y[:6].copy())


@given(st.integers(0, 10**6), st.sampled_from(ARCHITECTURES), st.sampled_from([0.001, 0.05, 0.5]))
@settings(max_examples=20, deadline=None)
def test_no_point_of_the_box_exceeds_the_linear_margins(seed: int, architecture: dict, radius: float) -> None:
    graph, weights, x, y = drawn(architecture, seed)
    worst = worst_cases.linear_margins(graph, weights, x, y, radius)
    generator = torch.Generator().manual_seed(seed)
    attacked = worst_cases.attacked(graph, weights, x, y, radius, 5, generator)
    assert bool(((attacked - x).abs() <= radius * (1 + 1e-12)).all())
    corners = x + radius * torch.randn(x.shape, generator=generator, dtype=x.dtype).sign()
    for points in (x, attacked, corners):
        outputs = evaluate.forward(graph, points)
        margins = outputs - outputs.gather(1, y[:, None])
        assert bool((margins <= worst + 1e-9 * worst.abs().max()).all())
    assert bool((worst.gather(1, y[:, None]) == 0).all())


def test_linear_margins_are_those_of_the_verifier_up_to_its_rounding() -> None:
    graph, weights, x, y = drawn(ARCHITECTURES[0], 3)
    worst = worst_cases.linear_margins(graph, weights, x, y, 0.05)
    one = torch.eye(10, dtype=torch.float64)
    region = Ball("inf", x, torch.full((len(x),), 0.05, dtype=torch.float64))
    proved = backward.lower(graph, region, one[y][:, None] - one, intermediates="interval").lower
    assert torch.allclose(-worst, proved, atol=1e-9)


def test_an_attack_finds_the_worst_corner_of_a_linear_network() -> None:
    graph, weights, x, y = drawn({"kind": "mlp", "hidden": []}, 0)
    attacked = worst_cases.attacked(graph, weights, x, y, 0.1, 10, torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(evaluate.forward(graph, attacked), y, reduction="none")
    start = torch.nn.functional.cross_entropy(evaluate.forward(graph, x), y, reduction="none")
    assert bool((loss > start).all())
    # Nearly all coordinates end on the boundary, where a linear network has its extremes.
    assert float(((attacked - x).abs() >= 0.1 * (1 - 1e-12)).double().mean()) > 0.9


def losses(kind: dict, progress: float) -> torch.Tensor:
    recipe = recipes.Recipe.parse({"training": kind, "epochs": 1, "architecture": ARCHITECTURES[0]})
    graph, weights, x, y = drawn(ARCHITECTURES[0], 0)
    return training._loss(recipe, graph, weights, x, y, progress, torch.Generator().manual_seed(0))


def test_training_starts_from_cross_entropy_and_boxes_order_the_losses() -> None:
    standard = losses({"kind": "standard"}, 0.0)
    kinds = [{"kind": "pgd"}, {"kind": "sabr"}, {"kind": "crown_ibp"}, {"kind": "ibp", "warm_up": 0.0, "kappa": 0.0}]
    for kind in kinds:
        assert torch.equal(losses(kind, 0.0), standard)
    attacked, small, linear, box = (float(losses(kind, 1.0)) for kind in kinds)
    assert float(standard) < attacked < small < box
    assert attacked < linear
    # The mixture's ends: boxes alone, and linear bounds alone.
    assert linear == pytest.approx(box, rel=1e-12)
    assert attacked < float(losses({"kind": "crown_ibp", "beta": 1.0}, 1.0)) < box


def test_the_whole_box_as_the_small_one_is_interval_training() -> None:
    ibp = {"kind": "ibp", "warm_up": 0.0, "kappa": 0.0}
    for progress in (0.1, 0.3, 0.7):
        whole = losses({"kind": "sabr", "share": 1.0}, progress)
        assert float(whole) == pytest.approx(float(losses(ibp, progress)), rel=1e-12)


@pytest.mark.parametrize("kind", ["pgd", "sabr", "crown_ibp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["mlp", "cnn"])
def test_training_is_repeatable_and_learns(kind: str, architecture: dict) -> None:
    recipe = recipes.Recipe.parse(
        {
            "dataset": "digits",
            "architecture": architecture,
            "training": {"kind": kind, "radius": 0.02, "ramp": 0.0},
            "epochs": 2,
        }
    )
    first, second = training.train(recipe), training.train(recipe)
    assert first.curves == second.curves
    assert first.curves.loss[-1] < first.curves.loss[0]
