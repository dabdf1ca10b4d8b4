"""Activation splitting against exact optima (MILP): what is attained is never refuted, and margins lie below optima."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from test_soundness import plant

torch = pytest.importorskip("torch")

from netassay.networks.evaluate import forward  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape, Sum  # noqa: E402
from netassay.numerics.bounds import backward  # noqa: E402
from netassay.numerics.bounds.linear import MAPS, tensors  # noqa: E402
from netassay.numerics.bounds.regions import Box  # noqa: E402
from netassay.numerics.branch_and_bound import activations  # noqa: E402
from netassay.numerics.branch_and_bound.inputs import Answer, Query  # noqa: E402

F64 = torch.float64


def drawn(seed: int) -> tuple[Graph, torch.Tensor, torch.Tensor]:
    """A ReLU network, a chain, a residual one or one with a convolution, and a box."""
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(2, 6)), int(rng.integers(3, 9))

    def dense(name: str, source: str, n: int, m: int) -> Dense:
        return Dense(name, source, name, (m,), rng.normal(size=(m, n)) / math.sqrt(n) * 1.5, rng.normal(size=m) * 0.4)

    steps: list[Operation]
    shape: tuple[int, ...] = (n,)
    if seed % 3 == 2:
        shape = (1, 3, 3)
        kernel = rng.normal(size=(2, 1, 2, 2))
        conv = Conv("c", "x", "c", (2, 2, 2), kernel, rng.normal(size=2) * 0.3, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        steps = [conv, Relu("r", "c", "r", (2, 2, 2)), Reshape("f", "r", "h", (8,))]
        width, n = 8, 9
    else:
        steps = [dense("d", "x", n, width), Relu("r", "d", "h", (width,))]
    steps += [dense("e", "h", width, width), Relu("s", "e", "g", (width,))]
    last = "g"
    if seed % 3 == 1:
        steps += [Sum("sum", "g", "t", (width,), "h", (1.0, -0.7)), Relu("u", "t", "w", (width,))]
        last = "w"
    steps.append(dense("y", last, width, 4))
    centre, radius = rng.uniform(-1, 1, n), 10 ** rng.uniform(-1, 0.2)
    lower, upper = (torch.tensor(centre + side * radius) for side in (-1, 1))
    return Graph(tuple(steps), "x", "y", shape, (4,)), lower, upper


def optimum(
    graph: Graph, lower: torch.Tensor, upper: torch.Tensor, c: np.ndarray, b: np.ndarray
) -> tuple[float, float]:
    """(proven, attained): a lower bound of min over the box of max_k c_k.f - b_k, up to what a solver allows itself,
    and what a point of the box has in float64.

    Each value is an affine expression of the inputs, of an output and a binary for each unstable ReLU, and of the
    maximum; its range is that of the expression over the ranges of these. Nothing is taken from the bounds under test.
    """
    relus = sum(math.prod(operation.shape) for operation in graph.needed if isinstance(operation, Relu))
    inputs = len(lower)
    total = inputs + 2 * relus + 1
    low, high, whole = np.zeros(total), np.zeros(total), np.zeros(total)
    low[:inputs], high[:inputs], (low[-1], high[-1]) = lower, upper, (-1e4, 1e4)
    place, rows, least, most = inputs, [], [], []
    expressions = {graph.input: np.eye(inputs, total + 1).reshape(*graph.input_shape, -1)}
    for operation in graph.needed:
        x = expressions[operation.source]
        if isinstance(operation, Sum):
            y = operation.factors[0] * x + operation.factors[1] * expressions[operation.other]
        elif isinstance(operation, Relu):
            y = np.zeros_like(x).reshape(-1, total + 1)
            for i, z in enumerate(x.reshape(-1, total + 1)):
                down, up = np.minimum(z[:-1] * low, z[:-1] * high).sum(), np.maximum(z[:-1] * low, z[:-1] * high).sum()
                down, up = down + z[-1] - 1e-9, up + z[-1] + 1e-9
                if down >= 0:
                    y[i] = z
                elif up > 0:
                    y[i, place], high[place] = 1, up
                    high[place + 1], whole[place + 1] = 1, 1
                    output, binary = np.eye(total)[[place, place + 1]]
                    rows += [output - z[:-1], output - z[:-1] - down * binary, output - up * binary]
                    least += [z[-1], -np.inf, -np.inf]
                    most += [np.inf, z[-1] - down, 0]
                    place += 2
            y = y.reshape(x.shape)
        else:
            w = tensors(operation, F64)
            columns = torch.tensor(np.moveaxis(x, -1, 0).copy())
            y = np.moveaxis(MAPS[type(operation)].apply(operation, w.weight, None, columns).numpy(), 0, -1).copy()
            if w.constant is not None:
                y[..., -1] += w.constant.numpy()
        expressions[operation.target] = y
    for row, bound in zip(c @ expressions[graph.output], b, strict=True):
        rows.append(np.eye(total)[-1] - row[:-1])
        least.append(row[-1] - bound)
        most.append(np.inf)
    solved = milp(
        np.eye(total)[-1], constraints=LinearConstraint(np.array(rows), np.array(least), np.array(most)),
        integrality=whole, bounds=Bounds(low, high), options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert solved.status == 0
    point = torch.minimum(torch.maximum(torch.tensor(solved.x[:inputs]), lower), upper)
    attained = forward(graph, point.reshape(1, *graph.input_shape)).flatten().numpy()
    proven = solved.fun if solved.mip_dual_bound is None else solved.mip_dual_bound  # None: there was no binary
    return float(proven), float((c @ attained - b).max())


def asked(lower: torch.Tensor, upper: torch.Tensor, conjunctions: Sequence[tuple[np.ndarray, np.ndarray]]) -> Query:
    rows = torch.tensor(np.concatenate([c for c, _ in conjunctions]))
    bound = torch.tensor(np.concatenate([b for _, b in conjunctions]))
    owners = torch.repeat_interleave(torch.tensor([len(b) for _, b in conjunctions]))
    return Query(lower, upper, rows, bound, owners)


def search(graph: Graph, query: Query, budget: int, accepting: bool = True) -> Answer:
    def judge(point: torch.Tensor, conjunction: int) -> bool:
        outputs = forward(graph, point.reshape(1, *graph.input_shape)).flatten()
        of = query.owners == conjunction
        assert bool(((point >= query.lower - 1e-6) & (point <= query.upper + 1e-6)).all())
        return accepting and bool((query.rows[of] @ outputs <= query.bound[of]).all())

    # Bounds of hidden values as CROWN has them: looser ones leave more to splits, and more to go wrong.
    shape = (1, *graph.input_shape)
    block = backward.relaxed(graph, Box(query.lower.reshape(shape), query.upper.reshape(shape)))
    return activations.search(graph, query, judge, budget, block)


def drawn_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows with largest entries in [1, 2), as a query wants them."""
    c = rng.normal(size=(count, 4))
    return c / np.abs(c).max(1, keepdims=True) * rng.uniform(1, 2, (count, 1))


#: Constraints of each conjunction.
KINDS = [(1,), (2,), (1, 1, 1), (3, 1), (25, 2)]


def errors(seed: int, budget: int = 150) -> tuple[list[str], int, int]:
    """What is wrong in one case; how many of its questions were decided; how many there were.

    The bounds are moved so that the optimum of each conjunction is a little above or below 0. What a point attains may
    not be refuted; where a margin is at most 0, it may not lie above what a point attains.
    """
    rng = np.random.default_rng(seed)
    graph, lower, upper = drawn(seed)
    wrong, decided = [], 0
    conjunctions, optima = [], []
    for count in KINDS[seed % len(KINDS)]:
        c, b = drawn_rows(rng, count), rng.normal(size=count) * 0.3
        proven, attained = optimum(graph, lower, upper, c, b)
        assert abs(proven - attained) < 1e-4 * (1 + abs(attained)), "the solver's point is not where it says"
        conjunctions.append((c, b))
        optima.append(attained)
    for shift in (1e-6, -1e-4, 0.3):
        moved = [
            (c, b + top + shift * (1 + abs(top))) for (c, b), top in zip(conjunctions, optima, strict=True)
        ]  # fmt: skip
        answer = search(graph, asked(lower, upper, moved), budget, accepting=shift < 0.3)
        if answer.found:
            decided += 1
            if shift < 0:
                wrong.append(f"seed {seed}: found what is not there")
            continue
        decided += bool((answer.margins > 0).all())
        for margin, top in zip(answer.margins.tolist(), optima, strict=True):
            least = -shift * (1 + abs(top))
            if margin > max(least, 0) if least <= 0 else False:
                wrong.append(f"seed {seed}: refuted what is attained, by {shift}")
            if margin <= 0 and margin > least + 1e-13 * (1 + abs(top)):
                wrong.append(f"seed {seed}: a margin of {margin} above {least}, which is attained")
    return wrong, decided, 3


def test_what_is_attained_is_never_refuted_and_margins_are_bounds() -> None:
    found = [errors(seed, 30) for seed in range(5)]
    assert [what for wrong, *_ in found for what in wrong] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_many_networks_nothing_attained_is_refuted() -> None:
    found = [errors(seed, 200) for seed in range(100, 160)]
    assert [what for wrong, *_ in found for what in wrong] == []
    of_two = [decided for _, decided, _ in found]
    print(f"{len(found)} networks, {3 * len(found)} searches, {sum(of_two)} decided of {2 * len(found)} that can be")


def linear_network() -> tuple[Graph, torch.Tensor, torch.Tensor]:
    """f = (x, relu(x + 0.3) - 2 relu(x - 0.2)) on [-1, 1]; the first through a neuron that is always on."""
    first = Dense("d", "x", "z", (3,), np.ones((3, 1)), np.array([5.0, 0.3, -0.2]))
    last = Dense("e", "a", "y", (2,), np.array([[1.0, 0, 0], [0, 1, -2]]), np.array([-5.0, 0]))
    one = torch.ones(1, dtype=F64)
    return Graph((first, Relu("r", "z", "a", (3,)), last), "x", "y", (1,), (2,)), -one, one


def test_a_part_without_a_neuron_to_split_is_not_lost() -> None:
    # |x| <= 0.1 is met at 0 but at no corner, and no neuron bears on it; the other conjunction is refuted by splits.
    graph, lower, upper = linear_network()
    met = (np.array([[1.0, 0], [-1, 0]]), np.array([0.1, 0.1]))
    other = (np.array([[0.0, 1]]), np.array([-0.31]))
    for conjunctions in ([met], [met, other], [other, met]):
        answer = search(graph, asked(lower, upper, conjunctions), 10_000, accepting=False)
        place = [which is met for which in conjunctions].index(True)
        assert -0.2 < float(answer.margins[place]) <= -0.1, "max(x, -x) - 0.1 is -0.1 at 0"
        assert answer.open > 0


def test_constraints_that_are_all_met_keep_their_weights() -> None:
    graph, lower, upper = linear_network()
    rows = np.random.default_rng(0).uniform(1, 2, (25, 2)) * [1, 0.1]
    answer = search(graph, asked(lower, upper, [(rows, np.full(25, 50.0))]), 4, accepting=False)
    assert float(answer.margins) < -48, "no output is above 2"


BUGS = {
    "multipliers of the wrong sign": (activations, "_settle", "-beta * side", "beta * side"),
    "multipliers of hidden values of the wrong sign": (activations, "_hidden", "-beta * side", "beta * side"),
    "the other half of a part": (activations._Node, "half", "(low if side > 0 else up)", "(up if side > 0 else low)"),
    "parts that are lost": (activations._Search, "_exhausted", "self.stuck.append(node)", "pass"),
    "margins of weights that vanish": (
        activations._Search, "run", "node.bound.clamp(max=0)", "node.bound.clamp(max=0) * 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *BUGS[bug])
    assert any(_fails(seed) for seed in range(5)), "no check failed that passes without the bug"


def _fails(seed: int) -> bool:
    try:
        test_a_part_without_a_neuron_to_split_is_not_lost()
        return bool(errors(seed, 30)[0])
    except (AssertionError, KeyError):
        return True
