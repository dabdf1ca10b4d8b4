"""Branch and bound over any nonlinear operation: closed forms, sampling, and what every search must hold to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from netassay.networks import evaluate  # noqa: E402
from netassay.networks.graph import Activation, Dense, Graph, Operation, Pick, Product, Relu, Sum  # noqa: E402
from netassay.numerics.bounds import relaxations  # noqa: E402
from netassay.numerics.branch_and_bound import nonlinear  # noqa: E402
from netassay.numerics.branch_and_bound.inputs import Answer, Query  # noqa: E402
from netassay.numerics.branch_and_bound.nonlinear import Options  # noqa: E402

HEURISTICS = ("bbps", "babsr", "width")
POINTS = ("optimised", "midpoint")


def query(lower: Sequence[float], upper: Sequence[float], rows: Sequence[Sequence[float]], bound: Sequence[float],
          owners: Sequence[int] | None = None) -> Query:  # fmt: skip
    """Without `owners` each row is a conjunction of its own."""
    rows_, ends = (
        torch.tensor(rows, dtype=torch.float64),
        [torch.tensor(e, dtype=torch.float64) for e in (lower, upper)],
    )
    unit = 2.0 ** -torch.floor(torch.log2(rows_.abs().amax(1)))
    b = torch.tensor(bound, dtype=torch.float64) * unit
    return Query(*ends, rows_ * unit[:, None], b, torch.tensor(owners or range(len(rows))))


def refuse(point: torch.Tensor, conjunction: int) -> bool:
    return False


def least(graph: Graph, wanted: Query, budget: int, **options: object) -> Answer:
    """The search when no point is ever accepted."""
    return nonlinear.search(graph, wanted, refuse, budget, options=Options(**options))  # type: ignore[arg-type]


def rising(answer: Answer) -> bool:
    bounds = [bound for _, bound in answer.trace]
    return all(after >= before for before, after in itertools.pairwise(bounds))


# --- one function, one product ----------------------------------------------------------------------------------------

SINE = Graph((Activation("sin", "x", "y", (1,), "sin"),), "x", "y", (1,), (1,))
#: The same behind a layer, so that a split is a multiplier and not a narrower box.
BEHIND = Graph(
    (Dense("d", "x", "z", (1,), np.eye(1), np.zeros(1)), Activation("sin", "z", "y", (1,), "sin")), "x", "y", (1,), (1,)
)
TIMES = Graph(
    (
        Pick("first", "x", "u", (1,), np.array([0])),
        Pick("second", "x", "v", (1,), np.array([1])),
        Product("times", "u", "y", (1,), "v"),
    ), "x", "y", (2,), (1,),
)  # fmt: skip
SQUARE = Graph((Product("square", "x", "y", (1,), "x"),), "x", "y", (1,), (1,))


@pytest.fixture(autouse=True)
def coarse_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Branching points from a smaller table, which is made in no time."""
    monkeypatch.setattr(relaxations, "GRID", 60)
    relaxations._branching_table.cache_clear()
    yield
    relaxations._branching_table.cache_clear()


@pytest.mark.parametrize("points", POINTS)
def test_the_least_sine_over_a_period_rises_to_minus_one_within_32_parts(points: str) -> None:
    """From -1.3649, which the line of the smallest area gives: slope 0 would be exact at once."""
    wanted = query([0.0], [2 * math.pi], [[1.0]], [0.0])
    answer = least(SINE, wanted, 32, steps=0, batch=1, points=points)
    assert answer.trace[0][0] == 1
    assert answer.trace[0][1] == pytest.approx(-1.3649, abs=1e-4)
    assert rising(answer)
    assert answer.parts <= 32
    assert -1.01 <= float(answer.margins[0]) <= -1.0


def test_off_centre_periods_take_more_parts_and_end_at_minus_one_too() -> None:
    for start in (0.3, 1.1, 2.0):
        wanted = query([start], [start + 2 * math.pi], [[1.0]], [0.0])
        answer = least(SINE, wanted, 32, steps=0, batch=1)
        assert rising(answer)
        assert answer.trace[0][1] < -1.1
        assert -1.01 <= float(answer.margins[0]) <= -1.0


def test_a_multiplier_does_what_a_narrower_box_does() -> None:
    """sin on [-1.7, 1.2]: both ends of its intervals matter, and beta has to find slopes that are not 0."""
    wanted = query([-1.7], [1.2], [[1.0]], [-2.0])
    narrowed, multiplied = (float(least(graph, wanted, 1).margins[0]) for graph in (SINE, BEHIND))
    assert narrowed == pytest.approx(multiplied, abs=1e-6)
    wanted = query([-1.7], [1.2], [[1.0]], [0.5])
    narrowed, multiplied = (float(least(graph, wanted, 41, batch=2).margins[0]) for graph in (SINE, BEHIND))
    assert narrowed == pytest.approx(-1.5, abs=1e-3)
    assert multiplied == pytest.approx(-1.5, abs=1e-2)
    assert max(narrowed, multiplied) <= -1.5


def test_the_mean_of_mccormicks_planes_is_exact_for_a_product_and_either_plane_is_not() -> None:
    one = torch.ones((), dtype=torch.float64)
    for t, expected in ((1.0, -3.0), (0.0, -3.0), (0.5, -1.0)):
        p = relaxations.mccormick(-one, one, -one, one, t)
        assert float(p.lower_constant - p.lower_x.abs() - p.lower_y.abs()) == expected
    wanted = query([-1.0, -1.0], [1.0, 1.0], [[1.0]], [0.0])
    answer = least(TIMES, wanted, 1, steps=0)
    assert answer.parts == 1
    assert float(answer.margins[0]) == pytest.approx(-1.0, abs=1e-12)
    assert float(answer.margins[0]) <= -1.0


def test_where_the_mean_of_the_planes_is_not_best_the_climb_finds_the_plane_that_is() -> None:
    # Where x y is least on [1, 2] x [1, 3], at (1, 1), one plane touches it; the mean, 2 x + 1.5 y - 3.5, is 0 there.
    wanted = query([1.0, 1.0], [2.0, 3.0], [[1.0]], [0.0])
    first, climbed = (float(least(TIMES, wanted, 1, steps=steps).margins[0]) for steps in (0, 20))
    assert first == pytest.approx(0.0, abs=1e-9)
    assert 0.99 <= climbed <= 1.0


def test_a_square_is_split_like_any_product() -> None:
    answer = least(SQUARE, query([-1.0], [1.5], [[1.0]], [-0.01]), 200)
    assert answer.open == 0
    assert float(answer.margins[0]) > 0
    assert rising(answer)


def test_relus_are_split_at_zero_and_the_absolute_value_takes_two_parts() -> None:
    layers: tuple[Operation, ...] = (
        Dense("d", "x", "z", (2,), np.array([[1.0], [-1.0]]), np.zeros(2)),
        Relu("r", "z", "a", (2,)),
        Dense("e", "a", "y", (1,), np.ones((1, 2)), np.zeros(1)),
    )
    graph = Graph(layers, "x", "y", (1,), (1,))
    for heuristic, points in itertools.product(HEURISTICS, POINTS):
        # -|x| >= -1: the upper lines meet at the ends, but inside they lie above by 1.
        answer = least(graph, query([-1.0], [1.0], [[-1.0]], [-1.25]), 7, heuristic=heuristic, points=points, batch=1)
        assert answer.open == 0
        assert float(answer.margins[0]) > 0
        assert answer.deepest <= 2


# --- any network ------------------------------------------------------------------------------------------------------


def network(functions: Sequence[str], seed: int, inputs: int = 2, width: int = 5) -> Graph:
    """Dense layers with these between them: names of functions, "relu", or "gate": half of the layer times the other
    half's sigmoid, plus the first half.
    """
    draw = np.random.default_rng(seed)
    steps: list[Operation] = []
    at, size = "x", inputs
    for number, function in enumerate(functions):
        wide = 2 * width if function == "gate" else width
        weight, bias = draw.normal(size=(wide, size)) * 1.5 / math.sqrt(size), draw.normal(size=wide) * 0.3
        steps.append(Dense(f"d{number}", at, f"z{number}", (wide,), weight, bias))
        at = f"a{number}"
        match function:
            case "relu":
                steps.append(Relu(at, f"z{number}", at, (width,)))
            case "gate":
                halves = np.arange(2 * width).reshape(2, width)
                steps += [Pick(f"{h}{number}", f"z{number}", f"{h}{number}", (width,), half)
                          for h, half in zip("hg", halves, strict=True)]  # fmt: skip
                steps.append(Activation(f"s{number}", f"g{number}", f"s{number}", (width,), "sigmoid"))
                steps.append(Product(f"p{number}", f"h{number}", f"p{number}", (width,), f"s{number}"))
                steps.append(Sum(at, f"p{number}", at, (width,), f"h{number}", (1.0, 0.5)))
            case _:
                steps.append(Activation(at, f"z{number}", at, (width,), function))  # type: ignore[arg-type]
        size = width
    steps.append(Dense("last", at, "y", (2,), draw.normal(size=(2, size)), draw.normal(size=2)))
    return Graph(tuple(steps), "x", "y", (inputs,), (2,))


KINDS = [("tanh", "tanh"), ("sin", "relu"), ("gelu", "sigmoid"), ("gate",), ("gate", "sin"), ("relu", "gate")]


def sampled(graph: Graph, wanted: Query, count: int = 40_000) -> torch.Tensor:
    """The least of each row less its bound among points of a grid: (rows,)."""
    inputs = len(wanted.lower)
    side = round(count ** (1 / inputs))
    axes = [torch.linspace(float(low), float(up), side, dtype=torch.float64)
            for low, up in zip(wanted.lower, wanted.upper, strict=True)]  # fmt: skip
    points = torch.cartesian_prod(*axes).reshape(-1, *graph.input_shape)
    outputs = evaluate.forward(graph, points).flatten(1)
    return (outputs @ wanted.rows.T - wanted.bound).amin(0)


@pytest.mark.parametrize("functions", KINDS)
def test_no_bound_lies_above_a_sampled_value_and_splitting_comes_near_it(functions: Sequence[str]) -> None:
    graph = network(functions, 0)
    wanted = query([-0.6, -0.6], [0.6, 0.6], [[1.0, -1.0]], [100.0])
    floor = sampled(graph, wanted)
    root, split = (float(least(graph, wanted, budget, batch=64).margins[0]) for budget in (1, 300))
    assert root <= split <= float(floor[0])
    # What splitting leaves of the gap of the root; of a gap below 0.004 it may leave all (one of these).
    assert float(floor[0]) - split <= 0.5 * (float(floor[0]) - root) + 0.004


@pytest.mark.parametrize(
    "functions, heuristic, points",
    [
        (("tanh", "tanh"), "bbps", "optimised"),
        (("sin", "relu"), "babsr", "optimised"),
        (("gelu", "sigmoid"), "bbps", "midpoint"),
        (("gate",), "width", "midpoint"),
        (("gate", "sin"), "bbps", "optimised"),
        (("relu", "gate"), "babsr", "midpoint"),
    ],
)
def test_what_is_refuted_has_no_counterexample_and_what_has_one_is_found(
    functions: Sequence[str], heuristic: str, points: str
) -> None:
    """Thresholds a little below and above the sampled minimum."""
    graph = network(functions, 7)
    floor = float(sampled(graph, query([-0.5, -0.5], [0.5, 0.5], [[1.0, -1.0]], [0.0]))[0])
    for above in (True, False):
        b = floor + (0.02 if above else -0.1)
        wanted = query([-0.5, -0.5], [0.5, 0.5], [[1.0, -1.0]], [b])
        met: list[float] = []

        def judge(point: torch.Tensor, conjunction: int, b: float = b, met: list[float] = met) -> bool:
            assert bool((point.abs() <= 0.5).all())
            y = evaluate.forward(graph, point[None])[0]
            met.append(float(y[0] - y[1]) - b)
            return met[-1] <= 0

        options = Options(heuristic=heuristic, points=points, batch=64)  # type: ignore[arg-type]
        answer = nonlinear.search(graph, wanted, judge, 600, options=options)
        assert rising(answer)
        assert answer.found == bool(met and met[-1] <= 0) == above
        if not above:
            assert answer.open == 0
            assert float(answer.margins[0]) > 0


def test_a_conjunction_is_refuted_by_a_mean_of_its_constraints() -> None:
    """y_0 <= -0.2 and y_0 >= 0.2 (as -y_0 <= -0.2): each can be met, both at once nowhere."""
    graph = network(("tanh",), 3)
    wanted = query([-0.5, -0.5], [0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], [-0.2, -0.2], [0, 0])
    floor = sampled(graph, wanted)
    assert bool((floor < 0).all()), "each constraint can be met"
    answer = least(graph, wanted, 200)
    assert answer.open == 0
    assert float(answer.margins[0]) > 0


def test_the_same_question_has_the_same_answer_and_a_larger_budget_no_lower_bound() -> None:
    graph, wanted = network(("gelu", "sin"), 1), query([-0.6, -0.6], [0.6, 0.6], [[1.0, -1.0], [-1.0, 0.5]], [9.0, 9.0])
    answers = [least(graph, wanted, budget, batch=8) for budget in (40, 40, 160)]
    assert torch.equal(answers[0].margins, answers[1].margins)
    assert answers[0].trace == answers[1].trace
    assert answers[0].parts <= 40
    assert answers[2].parts <= 160
    assert float(answers[2].margins.amin()) >= float(answers[0].margins.amin())
    assert answers[2].trace[: len(answers[0].trace) - 1] == answers[0].trace[:-1]


def test_without_a_budget_nothing_is_claimed() -> None:
    answer = least(SINE, query([0.0], [1.0], [[1.0]], [-5.0]), 0)
    assert answer.parts == 0
    assert float(answer.margins[0]) == -math.inf
