"""Bounds hold on random graphs of all operations: at samples and corners, for every value, box, line and method.

Checks are functions that count violations, so that the same ones are held against planted bugs: a check that notices
none of them would show nothing.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from netassay.networks import evaluate  # noqa: E402
from netassay.networks.graph import (  # noqa: E402
    Activation,
    Conv,
    ConvTranspose,
    Dense,
    Graph,
    Operation,
    Pick,
    Product,
    Relu,
    Reshape,
    Scale,
    Sum,
)
from netassay.numerics.bounds import backward, interval, linear, optimised, rounding  # noqa: E402
from netassay.numerics.bounds.regions import Ball, Box, Region  # noqa: E402

F64 = torch.float64
#: Functions of any number, and those that want positive ones.
ANYWHERE = ("cos", "elu", "erf", "exp", "gelu", "gelu_tanh", "hard_swish", "mish", "power")
ANYWHERE += ("sigmoid", "sign", "silu", "sin", "softplus", "tanh")
POSITIVE = ["log", "reciprocal", "sqrt", "power"]


class Drawing:
    """A random graph in the making: operations on values that later ones may read again."""

    def __init__(self, seed: int, shape: tuple[int, ...] | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.input_shape = shape or [(4,), (2, 4, 3), (3, 2)][self.rng.integers(3)]
        self.shapes: dict[str, tuple[int, ...]] = {"x": self.input_shape}
        self.operations: list[Operation] = []

    def add(self, kind: Callable[..., Operation], source: str, shape: tuple[int, ...], *more: Any, **named: Any) -> str:
        name = f"v{len(self.operations)}"
        self.operations.append(kind(name, source, name, tuple(map(int, shape)), *more, **named))
        self.shapes[name] = tuple(map(int, shape))
        return name

    def any(self) -> str:
        """The last value more often than others."""
        names = list(self.shapes)
        return names[-1] if self.rng.random() < 0.5 else names[self.rng.integers(len(names))]

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape)

    def dense(self, x: str) -> str:
        n, out = self.shapes[x][-1], int(self.rng.integers(1, 5))
        weight = self.normal(out, n) / math.sqrt(n)
        return self.add(Dense, x, (*self.shapes[x][:-1], out), weight, self.normal(out) * 0.3)

    def image(self, x: str) -> str:
        size = math.prod(self.shapes[x])
        return x if len(self.shapes[x]) == 3 else self.pick(x, (2, 3, 2) if size < 20 else (2, 4, 3))

    def conv(self, x: str) -> str:
        x = self.image(x)
        c, groups = self.shapes[x][0], int(self.rng.choice([1, 2]))
        groups = groups if c % groups == 0 else 1
        out, kernel = groups * int(self.rng.integers(1, 3)), self.rng.integers(1, 3, 2)
        stride, dilation = (tuple(map(int, self.rng.integers(1, 3, 2))) for _ in range(2))
        padding = tuple(map(int, self.rng.integers(1, 3, 4)))
        weight = self.normal(out, c // groups, *kernel) * 0.6
        sizes = [
            (self.shapes[x][1 + i] + padding[i] + padding[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        ]
        return self.add(Conv, x, (out, *sizes), weight, self.normal(out) * 0.3, stride, padding, dilation, groups)

    def transposed(self, x: str) -> str:
        x = self.image(x)
        c, groups = self.shapes[x][0], int(self.rng.choice([1, 2]))
        groups = groups if c % groups == 0 else 1
        out, kernel = int(self.rng.integers(1, 3)), self.rng.integers(1, 4, 2)
        stride, dilation = (tuple(map(int, self.rng.integers(1, 3, 2))) for _ in range(2))
        sizes, padding = [], []
        for i in (0, 1):
            whole = (self.shapes[x][1 + i] - 1) * stride[i] + dilation[i] * (int(kernel[i]) - 1) + 1
            before, after = (int(self.rng.integers(0, 2)) if whole > 2 else 0 for _ in range(2))
            padding.append((before, after))
            sizes.append(whole - before - after + int(self.rng.integers(0, stride[i] + 1)))
        four = (padding[0][0], padding[1][0], padding[0][1], padding[1][1])
        weight = self.normal(c, out, *kernel) * 0.6
        bias = self.normal(out * groups) * 0.3
        return self.add(ConvTranspose, x, (out * groups, *sizes), weight, bias, stride, four, dilation, groups)

    def relu(self, x: str) -> str:
        return self.add(Relu, x, self.shapes[x])

    def reshape(self, x: str) -> str:
        size = math.prod(self.shapes[x])
        return self.add(Reshape, x, (2, size // 2) if size % 2 == 0 and self.rng.random() < 0.5 else (size,))

    def scale(self, x: str) -> str:
        return self.add(Scale, x, self.shapes[x], self.normal(*self.shapes[x]), self.normal(1) * 0.3)

    def pick(self, x: str, shape: tuple[int, ...] | None = None) -> str:
        shape = shape or [(3,), (2, 3), (2, 3, 2)][self.rng.integers(3)]
        return self.add(Pick, x, shape, self.rng.integers(-1, math.prod(self.shapes[x]), shape))

    def like(self, x: str) -> str:
        """A value of the shape of x: one there is, x itself, or one made of another's numbers."""
        same = [name for name, shape in self.shapes.items() if shape == self.shapes[x]]
        return same[self.rng.integers(len(same))] if self.rng.random() < 0.7 else self.pick(self.any(), self.shapes[x])

    def sum(self, x: str) -> str:
        return self.add(Sum, x, self.shapes[x], self.like(x), factors=tuple(map(float, self.normal(2))))

    def larger(self, a: str) -> str:
        b, shape = self.like(a), self.shapes[a]
        over = self.relu(self.add(Sum, a, shape, b, factors=(1.0, -1.0)))
        return self.add(Sum, b, shape, over, larger=(a, b))

    def product(self, x: str) -> str:
        return self.add(Product, x, self.shapes[x], x if self.rng.random() < 0.3 else self.like(x))

    def activation(self, x: str) -> str:
        shape, positive = self.shapes[x], self.rng.random() < 0.25
        name = str(self.rng.choice(POSITIVE if positive else ANYWHERE))
        if positive:
            x = self.add(Scale, self.add(Product, x, shape, x), shape, np.full(1, 0.5), np.full(1, 0.3))
        elif name == "exp":
            x = self.add(Activation, x, shape, "tanh")
        powers = (-1.0, -2.0, 0.5, 1.5) if positive else (2.0, 3.0, 4.0)
        parameters = {"elu": (0.5, 1.0, 2.0), "power": powers}.get(name)
        return self.add(Activation, x, shape, name, (float(self.rng.choice(parameters)),) if parameters else ())

    LINEAR = ("dense", "conv", "transposed", "reshape", "scale", "pick")
    PIECEWISE = (*LINEAR, "relu", "relu", "relu", "sum", "larger")
    ALL = (*PIECEWISE, "product", "activation", "activation")

    def graph(self, steps: int, kinds: tuple[str, ...] = ALL) -> Graph:
        for _ in range(steps):
            source = self.any()
            if math.prod(self.shapes[source]) <= 60:
                getattr(self, str(self.rng.choice(kinds)))(source)
        last = self.add(Reshape, list(self.shapes)[-1], (math.prod(self.shapes[list(self.shapes)[-1]]),))
        # One value of the middle again, so that a long way round stays open.
        again = self.pick(self.any(), self.shapes[last])
        n = self.shapes[last][0]
        out = self.add(Dense, self.add(Sum, last, (n,), again), (3,), self.normal(3, n) / math.sqrt(n), self.normal(3))
        return Graph(tuple(self.operations), "x", out, self.input_shape, (3,))


def drawn_region(graph: Graph, seed: int) -> Region:
    rng = np.random.default_rng(seed)
    centre = torch.tensor(rng.uniform(-1, 1, (2, *graph.input_shape)))
    radius = torch.tensor(10 ** rng.uniform(-3, 0, 2))
    kind = rng.integers(4)
    if kind == 0:
        width = torch.tensor(rng.uniform(0, 1, centre.shape)) * radius.reshape(2, *[1] * (centre.dim() - 1))
        return Box(centre - width, centre + width)
    return Ball("2" if kind == 1 else "inf", centre, radius, *((-1.0, 1.0) if kind == 3 else ()))


def points_of(region: Region, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Random points, half of them corners (of a ball of norm 2: on its sphere): (count, batch, *input)."""
    step = torch.tensor(rng.uniform(-1, 1, (count, *region.centre.shape)))
    step[::2] = step[::2].sign()
    if region.norm == "2":
        step = torch.tensor(rng.normal(size=step.shape))
        length = torch.linalg.vector_norm(step.flatten(2), dim=2)
        step = step / length.reshape(*length.shape, *[1] * (step.dim() - 2)) * (1 - 1e-12)
    lower, upper = region.box()
    return torch.minimum(torch.maximum(region.centre + region.spread() * step, lower), upper)


#: What gives boxes of values and linear bounds of rows: graph, region, rows -> Lower, or boxes alone.
METHODS: dict[str, Callable[..., Any]] = {
    "ibp": lambda graph, region, rows: interval.propagate(graph, region),
    "crown-ibp": lambda graph, region, rows: backward.lower(graph, region, rows, intermediates="interval"),
    "crown": lambda graph, region, rows: backward.lower(graph, region, rows),
    "alpha": lambda graph, region, rows: optimised.lower(graph, region, rows, steps=4, rate=0.3),
    "alpha, refined": lambda graph, region, rows: optimised.lower(
        graph, region, rows, steps=3, rate=0.3, refined=True
    ),
}  # fmt: skip


def violations(seed: int, steps: int = 7, samples: int = 60, methods: tuple[str, ...] = tuple(METHODS)) -> np.ndarray:
    """(checks, violations) of one random graph and region: boxes of all values, and rows of the output with their
    planes, at random points, corners, and where linear bounds are least.

    A sample is computed in float64; its own error is allowed for, by as much as rounding may add to a bound (`rounding
    .backward`), some 1e-13 of the values on the way.
    """
    graph = Drawing(seed).graph(steps)
    region = drawn_region(graph, seed + 1)
    rng = np.random.default_rng(seed + 2)
    rows = torch.tensor(rng.normal(size=(3, 3)))
    rows = torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64), rows / rows.abs().amax(1, keepdim=True)])
    points = points_of(region, rng, samples)
    found = {name: METHODS[name](graph, region, rows) for name in methods}
    if region.norm == "inf":
        lower, upper = (end[:, None] for end in region.box())
        for one in found.values():
            if isinstance(one, backward.Lower):
                a = one.a.reshape(*one.a.shape[:2], *graph.input_shape)
                points = torch.cat([points, torch.where(a > 0, lower, upper).transpose(0, 1)])
    with torch.no_grad():
        sampled = [evaluate.values(graph, of.double()) for of in points.unbind(1)]
    allowed = _allowed(graph, region)
    total, bad = 0, 0
    for one in found.values():
        boxes = one.values if isinstance(one, backward.Lower) else one
        for name, box in boxes.items():
            for item, values in enumerate(sampled):
                value, error = values[name], allowed[name][item]
                inside = (value >= box.lower[item] - error) & (value <= box.upper[item] + error)
                known = torch.isfinite(value) & torch.isfinite(error)
                total, bad = total + int(known.sum()), bad + int((known & ~inside).sum())
        if isinstance(one, backward.Lower):
            error = (allowed[graph.output] @ rows.abs().T)[:, None]
            values = torch.stack([of[graph.output] for of in sampled]) @ rows.T
            a = one.a.flatten(2)
            planes = points.transpose(0, 1).flatten(2) @ a.transpose(1, 2) - region.minimum(a)[:, None]
            planes = one.lower[:, None] + planes.clamp(min=0)
            known = torch.isfinite(values) & torch.isfinite(error) & torch.isfinite(one.lower)[:, None]
            total, bad = total + int(known.sum()), bad + int((known & ~(values >= planes - error)).sum())
    return np.array([total, bad])


def _allowed(graph: Graph, region: Region) -> dict[str, torch.Tensor]:
    """How far a float64 evaluation may be off, as `rounding`'s E has it."""
    return rounding.backward(graph, interval.propagate(graph, region))


def test_no_value_of_a_random_graph_leaves_its_boxes_and_planes() -> None:
    total = sum(violations(seed) for seed in range(60))
    assert total[1] == 0
    assert total[0] > 100_000
    graphs = [Drawing(seed).graph(7) for seed in range(60)]
    met = {type(operation) for graph in graphs for operation in graph.needed}
    assert met == set(linear.KINDS), "a kind of operation was never drawn"
    functions = {o.function for graph in graphs for o in graph.needed if isinstance(o, Activation)}
    assert len(functions) > 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_very_many_random_graphs_no_value_leaves_its_boxes_and_planes() -> None:
    total = np.zeros(2, dtype=np.int64)
    for seed in range(1_000, 1_800):
        found = violations(seed, 3 + seed % 9, samples=40)
        assert found[1] == 0, f"seed {seed}"
        total += found
    print(f"{total[0]:,} checks, {total[1]} violations")
    assert total[0] > 100_000


# --- adjoints ---------------------------------------------------------------------------------------------------------


def mismatches(seed: int) -> int:
    """How many linear operations of a random graph have <W x, a> other than <x, W^T a>."""
    rng, bad = np.random.default_rng(seed), 0
    for operation in Drawing(seed).graph(10, Drawing.LINEAR).needed:
        if type(operation) not in linear.MAPS:
            continue
        maps, w = linear.MAPS[type(operation)], linear.tensors(operation, F64)
        graph_shape = _shapes(seed)[operation.source]
        x = torch.tensor(rng.normal(size=(2, *graph_shape)))
        a = torch.tensor(rng.normal(size=(2, *operation.shape)))
        there = (maps.apply(operation, w.weight, None, x) * a).flatten(1).sum(1)
        back = (maps.adjoint(operation, w.weight, a, graph_shape) * x).flatten(1).sum(1)
        bad += not torch.allclose(there, back, rtol=1e-10, atol=1e-10)
        # The map is that of the network: apart from its bias it does what an evaluation does.
        bias = 0 if w.constant is None else w.constant
        bad += not torch.allclose(maps.apply(operation, w.weight, None, x) + bias, evaluate.apply(operation, x))
    return bad


def _shapes(seed: int) -> dict[str, tuple[int, ...]]:
    drawing = Drawing(seed)
    drawing.graph(10, Drawing.LINEAR)
    return drawing.shapes


def test_every_linear_operation_has_its_adjoint() -> None:
    assert sum(mismatches(seed) for seed in range(60)) == 0


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_sums_over_a_whole_image_are_counted_as_long_as_they_are() -> None:
    # One convolution of one weight in front of n numbers, then a ReLU: the pass sums n intercepts, of which a window
    # of one number knows nothing. In float32 one after the other they may lose n u; E must allow for that.
    n = 4096
    size = (1, 64, 64)
    conv = Conv("c", "x", "z", size, np.ones((1, 1, 1, 1)), np.ones(1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    graph = Graph((conv, Relu("r", "z", "y", size)), "x", "y", size, size)
    region = Ball("inf", torch.zeros(1, *size, dtype=F64), torch.ones(1, dtype=F64))
    found = rounding.backward(graph, interval.propagate(graph, region))
    unit = 2.0**-53
    assert float(found["y"].sum()) >= n * unit * n, "n numbers of size 1, each with n roundings in the constant"


def test_what_only_moves_numbers_keeps_them_to_the_last_bit() -> None:
    tiny = 5e-324
    for operation in (Pick("p", "x", "y", (2,), np.array([1, 0])), Reshape("r", "x", "y", (2,))):
        graph = Graph((operation,), "x", "y", (2,), (2,))
        ends = torch.tensor([[0.0, -tiny]], dtype=F64), torch.tensor([[tiny, 0.1]], dtype=F64)
        lower, upper = interval.bounds(graph, Box(*ends))
        order = [1, 0] if isinstance(operation, Pick) else [0, 1]
        assert torch.equal(lower, ends[0][:, order])
        assert torch.equal(upper, ends[1][:, order])


# --- planted bugs -----------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, old: str, new: str) -> None:
    """A function, or a method of a class, with `old` in its source replaced; in tables of rules too."""
    function = getattr(holder, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, "what the bug is planted in has changed; plant it anew"
    module = inspect.getmodule(function)
    scope: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), module.__dict__ | {}, scope)
    changed = scope[name]
    inner = changed.__func__ if isinstance(changed, staticmethod | classmethod) else changed
    # Its globals are the module's own, so that other planted functions are seen.
    patched = type(inner)(inner.__code__, module.__dict__, name, inner.__defaults__)
    patched.__kwdefaults__ = inner.__kwdefaults__
    monkeypatch.setattr(holder, name, patched)
    for table in (backward.RULES, interval.RULES):
        for kind, rule in table.items():
            if rule is function:
                monkeypatch.setitem(table, kind, patched)


BUGS: dict[str, tuple[ModuleType, str, str, str]] = {
    "the upper intercept with the wrong sign": (
        backward, "_between", "d = row.d + _contract(row.a, lines.intercept) - _contract(positive, lines.intercept)",
        "d = row.d - _contract(row.a, lines.intercept) + _contract(positive, lines.intercept)",
    ),
    "lower and upper slopes exchanged": (
        backward, "_between", "torch.addcmul(row.a * slope, positive, alpha - slope)",
        "torch.addcmul(row.a * alpha, positive, slope - alpha)",
    ),
    "the lower line's intercept left out": (
        backward, "_between", "d if lines.below is None else d + _contract(positive, lines.below)", "d",
    ),
    "boxes of another region": (
        backward, "relaxed", "interval.propagate(graph, region, evaluated)",
        "interval.propagate(graph, region[[0] * len(region)], evaluated)",
    ),
    "a second consumer's coefficients take the place of the first's": (
        backward, "walk", "part if known is None else Linear(known.a + part.a, known.d + part.d)", "part",
    ),
    "a bias left out": (backward, "_linear", "row.d if w.constant is None else", "row.d if True else"),
    "planes of a product exchanged": (
        backward, "_product", "_contract(positive, planes.below[2]) + _contract(negative, planes.above[2])",
        "_contract(positive, planes.above[2]) + _contract(negative, planes.below[2])",
    ),
    "the second factor of a sum forgotten": (backward, "_sum", "row.a * second", "row.a * 1.0"),
    "cuts of z and of -z exchanged": (
        backward, "cut", "below, above = _proved(least).chunk(2, dim=1)",
        "above, below = _proved(least).chunk(2, dim=1)",
    ),
    "ends not exchanged by a negative factor": (interval, "_times", "ends if factor >= 0 else ends[::-1]", "ends"),
    "the smaller in place of the larger": (
        interval, "_sum", "torch.maximum(a.upper, b.upper)", "torch.minimum(a.upper, b.upper)",
    ),
    "two of four corners of a product": (
        interval, "_product", "lower, upper = ends.amin(0), ends.amax(0)",
        "lower, upper = ends[[0, 3]].amin(0), ends[[0, 3]].amax(0)",
    ),
    "slopes of lower lines that leave [0, 1]": (optimised, "climb", "leaf.clamp_(0, 1)", "leaf.clamp_(-1, 2)"),
    "numbers picked twice collect once": (evaluate, "unpick", ".index_add_(", ".index_copy_("),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *BUGS[bug])
    assert any(_fails(seed) for seed in range(100)), "no check of a hundred graphs failed"


def _fails(seed: int) -> bool:
    try:
        return bool(violations(seed)[1])
    except ValueError:
        return True  # bounds that cross are refused by what reads them


def test_a_planted_bug_of_an_adjoint_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *BUGS["numbers picked twice collect once"])
    assert any(mismatches(seed) for seed in range(20))
