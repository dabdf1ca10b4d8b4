"""The attack stays in the ball, finds what there is to find, and walks the same path whoever else is in the batch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from netassay.networks.evaluate import forward  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape  # noqa: E402
from netassay.numerics import attacks  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402

F64 = torch.float64


def network(generator: np.random.Generator, shape: tuple[int, ...] = (12,), classes: int = 4) -> Graph:
    n = int(np.prod(shape))
    operations = [
        Reshape("flatten", "x", "f", (n,)),
        Dense("first", "f", "z", (16,), generator.normal(size=(16, n)), generator.normal(size=16)),
        Relu("relu", "z", "a", (16,)),
        Dense("last", "a", "y", (classes,), generator.normal(size=(classes, 16)), generator.normal(size=classes)),
    ]
    return Graph(tuple(operations), "x", "y", shape, (classes,))


def convolution(generator: np.random.Generator) -> Graph:
    operations = (
        Conv("conv", "x", "c", (4, 3, 3), generator.normal(size=(4, 1, 3, 3)), generator.normal(size=4),
             (2, 2), (1, 1, 0, 0), (1, 1), 2),
        Relu("relu", "c", "a", (4, 3, 3)),
        Reshape("flatten", "a", "f", (36,)),
        Dense("last", "f", "y", (3,), generator.normal(size=(3, 36)), generator.normal(size=3)),
    )  # fmt: skip
    return Graph(operations, "x", "y", (2, 6, 6), (3,))


def images(
    graph: Graph, generator: np.random.Generator, count: int, norm: str, radius: float, clip: bool = True
) -> Ball:
    centre = torch.tensor(generator.uniform(size=(count, *graph.input_shape)))
    radii = torch.tensor(generator.uniform(0.5, 1.5, size=count) * radius)
    return Ball(norm, centre, radii, *((0.0, 1.0) if clip else (-np.inf, np.inf)))  # type: ignore[arg-type]


def labels_of(graph: Graph, region: Ball) -> torch.Tensor:
    return forward(graph, region.centre).argmax(1)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["inf", "2", "1"]),
    clip=st.booleans(),
    radius=st.sampled_from([1e-3, 0.1, 3.0]),
)
def test_every_point_is_a_float32_inside_its_ball(seed: int, norm: str, clip: bool, radius: float) -> None:
    generator = np.random.default_rng(seed)
    graph = network(generator)
    region = images(graph, generator, 6, norm, radius, clip)
    attack = attacks.pgd(graph, region, labels_of(graph, region), steps=4, restarts=3, seeds=range(6))
    assert attack.inside.all()
    assert (attack.points == attack.points.float().double()).all()
    away = (attack.points - region.centre).numpy().astype(np.longdouble)
    length = {"inf": np.abs(away).max(1), "2": np.sqrt((away**2).sum(1)), "1": np.abs(away).sum(1)}[norm]
    assert (length <= region.radius.numpy()).all()
    if clip:
        assert ((attack.points >= 0) & (attack.points <= 1)).all()


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_an_item_is_attacked_alike_alone_and_in_any_batch(kind: str, norm: str) -> None:
    generator = np.random.default_rng(0)
    graph = convolution(generator) if kind == "conv" else network(generator, (37,))
    region = images(graph, generator, 23, norm, 0.05)
    labels, seeds = labels_of(graph, region), list(range(100, 123))

    def points(which: list[int]) -> torch.Tensor:
        attack = attacks.pgd(
            graph, region[which], labels[which], steps=12, restarts=3, seeds=[seeds[place] for place in which]
        )
        return attack.points

    together = points(list(range(23)))
    order = generator.permutation(23).tolist()
    assert torch.equal(together[order], points(order))
    for size in (1, 5):
        for start in range(0, 23, size):
            which = list(range(23))[start : start + size]
            assert torch.equal(together[which], points(which))


@pytest.mark.parametrize("terms", [3, 64, 784])
def test_sums_of_the_surrogate_do_not_depend_on_their_order(terms: int) -> None:
    generator = np.random.default_rng(terms)
    dense = Dense("d", "x", "y", (5,), generator.normal(size=(5, terms)), np.zeros(5))
    surrogate = attacks._Surrogate.of(Graph((dense,), "x", "y", (terms,), (5,)))
    weight, bits = surrogate.weights["y"], surrogate.bits["y"]
    x = attacks._rounded(torch.tensor(generator.normal(size=(4, terms))), bits)
    order = generator.permutation(terms)
    assert torch.equal(x @ weight.T, x[:, order] @ weight[:, order].T)
    one_by_one = sum(x[:, j, None] * weight[:, j] for j in order)
    assert torch.equal(x @ weight.T, one_by_one)
    unrounded = torch.tensor(dense.weight)
    assert float((weight - unrounded).abs().max()) <= 2.0**-bits * float(unrounded.abs().max()) * 2


def test_a_linear_margin_is_attacked_to_its_exact_minimum() -> None:
    generator = np.random.default_rng(1)
    weight = generator.normal(size=(2, 9))
    graph = Graph((Dense("d", "x", "y", (2,), weight, np.array([50.0, 0.0])),), "x", "y", (9,), (2,))
    x = torch.tensor(generator.normal(size=(1, 9)))
    row = weight[0] - weight[1]
    margin = float(x[0].numpy() @ row) + 50
    for norm, reach in (("inf", np.abs(row).sum()), ("2", np.sqrt((row**2).sum())), ("1", np.abs(row).max())):
        region = Ball(norm, x, torch.tensor([0.5], dtype=F64))  # type: ignore[arg-type]
        attack = attacks.pgd(graph, region, torch.tensor([0]), steps=20, restarts=1, seeds=[0])
        assert float(attack.margins) == pytest.approx(margin - 0.5 * reach, rel=1e-4)
        assert float(attack.margins) >= margin - 0.5 * reach - 1e-4


def test_more_radius_never_hides_the_counterexamples_of_less_from_a_given_start() -> None:
    generator = np.random.default_rng(2)
    graph = network(generator)
    region = images(graph, generator, 30, "inf", 0.1)
    labels = labels_of(graph, region)
    small = attacks.pgd(graph, region, labels, steps=10, restarts=4, seeds=range(30))
    found = small.margins < -0.01
    assert found.any()
    assert not found.all()
    wide = Ball("inf", region.centre, region.radius * 2, 0.0, 1.0)
    wider = attacks.pgd(graph, wide, labels, steps=10, restarts=1, seeds=range(30), starts=small.points[:, None])
    assert (wider.margins[found] < 0).all()
    assert (wider.margins <= small.margins + 1e-3)[~found].all()


def test_restarts_draw_from_the_seed_of_the_item() -> None:
    generator = np.random.default_rng(3)
    region = images(network(generator), generator, 2, "2", 0.1, clip=False)
    same, other = attacks._random(region, 0, 4, seed=7), attacks._random(region, 0, 4, seed=8)
    assert torch.equal(same, attacks._random(region, 0, 4, seed=7))
    assert not torch.equal(same, other)
    assert (torch.linalg.vector_norm(same - region.centre[0], dim=1) <= region.radius[0] * (1 + 1e-5)).all()


def test_a_ball_that_holds_no_float32_offers_no_counterexample() -> None:
    graph = Graph((Dense("d", "x", "y", (2,), np.array([[1.0], [-1.0]]), np.zeros(2)),), "x", "y", (1,), (2,))
    third = torch.tensor([[1 / 3]], dtype=F64)
    region = Ball("inf", third, torch.tensor([1e-12], dtype=F64))
    attack = attacks.pgd(graph, region, torch.tensor([1]), steps=2, restarts=2, seeds=[0])
    assert not attack.inside.any()


def test_a_point_on_the_sphere_is_inside_only_as_far_as_rounding_can_tell() -> None:
    region = Ball("2", torch.zeros(3, 2, dtype=F64), torch.full((3,), 5.0, dtype=F64))
    points = torch.tensor([[3.0, 3.99], [3.0, 4.01], [0.0, 1 / 3]], dtype=F64).float().double()
    points[2, 1] = 1 / 3  # not a float32
    assert attacks.contains(region, points).tolist() == [True, False, False]


def test_a_point_is_inside_an_l2_ball_only_where_exact_arithmetic_says_so() -> None:
    generator = np.random.default_rng(4)
    outside = 0
    for _ in range(300):
        centre, point = (generator.uniform(size=3).astype(np.float32).astype(float) for _ in range(2))
        exact = sum((Fraction(p) - Fraction(c)) ** 2 for p, c in zip(point, centre, strict=True))
        # Radii about the exact distance: on one side of it or on the other.
        for radius in (near := float(exact) ** 0.5, np.nextafter(near, 0), np.nextafter(near, 9), near * (1 + 1e-12)):
            region = Ball("2", torch.tensor(centre[None]), torch.tensor([radius], dtype=F64))
            inside = bool(attacks.contains(region, torch.tensor(point[None])))
            assert not inside or exact <= Fraction(float(radius)) ** 2
            outside += not inside
        assert inside, "room enough for rounding"
    assert outside > 300


def test_many_starts_of_a_large_batch_are_drawn_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    graph = network(generator)
    region = images(graph, generator, 9, "inf", 0.1)
    labels = labels_of(graph, region)
    whole = attacks.pgd(graph, region, labels, steps=3, restarts=50, seeds=range(9))
    sizes: list[int] = []
    descend = attacks._descend

    def counting(surrogate: object, part: Ball, box: object, wanted: object, x: torch.Tensor, *more: int) -> object:
        sizes.append(x.shape[0] * x.shape[1])
        return descend(surrogate, part, box, wanted, x, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(attacks, "_descend", counting)
    monkeypatch.setattr(attacks, "_ROWS", 100)
    parts = attacks.pgd(graph, region, labels, steps=3, restarts=50, seeds=range(9))
    assert torch.equal(parts.points, whole.points)
    assert max(sizes) <= 100


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), inputs=st.integers(1, 40), radius=st.floats(0, 3))
def test_shrinking_finds_the_nearest_point_of_an_l1_ball(seed: int, inputs: int, radius: float) -> None:
    """Nearest: it lies in the ball, and no point of the ball lies further on the way from it to the point outside."""
    away = torch.tensor(np.random.default_rng(seed).normal(size=(5, inputs)))
    found = attacks._shrunk(away, torch.full((5,), radius, dtype=F64))
    assert (found.abs().sum(1) <= radius + 1e-9).all()
    inside = away.abs().sum(1) <= radius
    np.testing.assert_allclose(found[inside], away[inside], atol=1e-9)
    # max over the ball of (away - found).p is radius times the largest |entry|; at the nearest point it is reached.
    left = away - found
    np.testing.assert_allclose((left * found).sum(1)[~inside], radius * left.abs().amax(1)[~inside], atol=1e-8)
