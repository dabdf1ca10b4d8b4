"""Backward linear bounds (CROWN): f(x) >= A x + d over a region, by walking the graph from its output to its input.

With pre-activation bounds l < 0 < u of a neuron z, ReLU lies between two lines,

    alpha z  <=  relu(z)  <=  s z + t,      s = u / (u - l),   t = -s l,   alpha = 1 where u > -l, else 0 (adaptive);

a coefficient A >= 0 takes the lower line, A < 0 the upper one. At the input A x + d is minimised over the region. The
pre-activation bounds come from the same pass (`intermediates="backward"`, CROWN) or from boxes (`"interval"`,
CROWN-IBP); either way they are cut with the box propagated from the bounds before, and only neurons that the box leaves
unstable get a backward pass: the lines of a stable neuron do not depend on its bounds.

All bounds include the rounding of the pass itself (`rounding`): they hold in real arithmetic. With `evaluated` they
also hold for every evaluation of the network in that dtype: such a network has each value moved by a small local error,
an input like any other, which costs |A| times that error at each operation.

Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018. (Theorem 3.2, table 2, section 3.3.) CROWN-IBP: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh.
Towards stable and efficient training of verifiably robust neural networks. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netassay.heavy import torch
from netassay.networks.graph import Graph, Operation, Relu
from netassay.numerics.bounds import interval, rounding
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, Weights, chain, weights
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

Intermediates = Literal["backward", "interval"]

#: Boxes that share a backward pass. Few: each carries its own coefficient matrices, which should stay in cache.
BLOCK = 16
#: Coefficients of one pass, boxes x rows x width; more rows than fit are taken in several passes. 4 MiB in float64: of
#: the order of a cache, and measured no slower than 1 or 16 MiB.
COEFFICIENTS = 1 << 19
#: How a bound computed twice may differ, in units of its rounding times the number of operations: the first-order
#: estimate is a few (each layer adds what the slopes before it changed), the rest is for what was not thought of.
NOISE = 1000.0


@dataclass(frozen=True, eq=False)
class Linear:
    """rows of A v + d, v a value of the graph. a: (batch or 1, rows, *shape of v); d: (batch or 1, rows).

    A leading 1 means that the boxes of a block still share the coefficients: no box-dependent operation was met.
    """

    a: Tensor
    d: Tensor


@dataclass(frozen=True, eq=False)
class Lines:
    """Slopes and intercept of the two lines of a ReLU: each (batch, *shape)."""

    alpha: Tensor
    slope: Tensor
    intercept: Tensor

    @classmethod
    def of(cls, z: Interval) -> Lines:
        """Adaptive lines over z; exact (0 or the identity) where z is stable."""
        low, up = z.lower.clamp(max=0), z.upper.clamp(min=0)
        # 0/0 at a neuron that is constantly zero: any line does, and 0 is exact.
        slope = torch.where(z.upper > 0, up / (up - low).clamp(min=rounding.smallest(up.dtype)), 0.0).clamp(max=1)
        # The line must pass above both corners (l, 0) and (u, u), whatever the rounding of the slope.
        intercept = torch.maximum(-slope * low, up - slope * up)
        return cls((up > -low).to(up.dtype), slope, intercept)


def _linear(operation: Operation, row: Linear, w: Weights, shape: tuple[int, ...], lines: None) -> Linear:
    a = MAPS[type(operation)].adjoint(operation, w.weight, row.a.flatten(0, 1), shape)
    d = row.d if w.constant is None else row.d + row.a.flatten(2) @ w.constant.flatten()
    return Linear(a.reshape(*row.a.shape[:2], *shape), d)


def _relu(operation: Operation, row: Linear, w: Weights, shape: tuple[int, ...], lines: Lines) -> Linear:
    positive = row.a.clamp(min=0)
    slope, lower = lines.slope[:, None], (lines.alpha - lines.slope)[:, None]
    # A s + A+ (alpha - s) is A+ alpha + A- s. Sign-correct in floating point too: one of the two terms decides.
    a = torch.addcmul(row.a * slope, positive, lower)
    # sum of A- t over the neurons.
    d = row.d + _contract(row.a, lines.intercept) - _contract(positive, lines.intercept)
    return Linear(a, d)


def _contract(a: Tensor, v: Tensor) -> Tensor:
    """sum a v over all axes but the first two. a: (batch or 1, rows, *shape), v: (batch, *shape). (batch, rows)."""
    a, v = a.flatten(2), v.flatten(1)
    return v @ a[0].T if len(a) == 1 else torch.bmm(a, v[:, :, None])[:, :, 0]


RULES: dict[type[Operation], Callable[..., Linear]] = {
    **dict.fromkeys(MAPS, _linear),
    Relu: _relu,
}


@dataclass(frozen=True, eq=False)
class Lower:
    """lower: (batch, rows), f's rows are nowhere below it. a: (batch, rows, *input), the linear bound's coefficients.

    values: boxes of all values, by name, after tightening; those of ReLU inputs are the pre-activation bounds.
    noise: (batch,), how far `lower` may differ when the same ball is bounded in another block.
    delicate: (batch,), bool; a choice (a neuron's slope, or whether to bound it backward) was so near that rounding may
    turn it in another block, and `lower` then differs by more than `noise`.
    """

    lower: Tensor
    a: Tensor
    values: dict[str, Interval]
    noise: Tensor
    delicate: Tensor


def lower(
    graph: Graph,
    region: Region,
    rows: Tensor,
    *,
    intermediates: Intermediates = "backward",
    evaluated: torch.dtype | None = None,
    block: int = BLOCK,
) -> Lower:
    """Lower bounds of C f(x), C the `rows`, over each ball of the region.

    rows: (rows, outputs) or (batch, rows, outputs), outputs flattened. Computed in the dtype of the region.
    evaluated: the bounds also hold for every evaluation of the network in this dtype (C f is taken exactly).
    Raises NotImplementedError where the graph has an operation without a rule.
    """
    with torch.no_grad():
        parts = [
            _lower(graph, region[which], rows[None] if rows.dim() == 2 else rows[which], intermediates, evaluated)
            for which in _blocks(len(region), block)
        ]
    return Lower(
        torch.cat([part.lower for part in parts]),
        torch.cat([part.a for part in parts]),
        {name: _joined([part.values[name] for part in parts]) for name in parts[0].values},
        torch.cat([part.noise for part in parts]),
        torch.cat([part.delicate for part in parts]),
    )


def bounds(
    graph: Graph,
    region: Region,
    *,
    intermediates: Intermediates = "backward",
    evaluated: torch.dtype | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """lower, upper: (batch, *output shape), of every output over each ball; never looser than the box."""
    outputs = torch.eye(_size(graph.output_shape), dtype=region.centre.dtype)
    rows = torch.cat([outputs, -outputs])
    found = lower(graph, region, rows, intermediates=intermediates, evaluated=evaluated, block=block)
    low, high = (side.reshape(-1, *graph.output_shape) for side in found.lower.chunk(2, dim=1))
    box = found.values[graph.output].intersect(low, -high)
    return box.lower, box.upper


def box_margins(
    graph: Graph, values: dict[str, Interval], rows: Tensor, evaluated: torch.dtype | None = None
) -> Tensor:
    """Lower bounds of C f(x) by boxes alone: C is folded into the linear maps after the last ReLU (Gowal et al. 2018,
    section 3, "elision of the last layer"), then minimised over the box before them.

    values: of `interval.propagate`, for the same `evaluated`. rows: (batch, rows, outputs). Returns (batch, rows).
    """
    with torch.no_grad():
        row, at = Linear(rows.unflatten(2, graph.output_shape), rows.new_zeros(rows.shape[:2])), graph.output
        of_graph = weights(graph, rows.dtype)
        for operation in reversed(chain(graph)):
            if isinstance(operation, Relu):
                break
            at, w = operation.source, of_graph[operation.target]
            if evaluated is not None:
                none = torch.zeros_like(values[at].lower)
                row = _shifted(row, rounding.evaluation(operation, w, values[at], none, evaluated)[0])
            row = _linear(operation, row, w, graph.shape_of(at), None)
        box = values[at]
        middle, half = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        least = row.d + _contract(row.a, middle) - _contract(row.a.abs(), half)
        return _proved(least - _contract(rows.abs(), rounding.backward(graph, values)[graph.output]))


def _blocks(total: int, block: int) -> Iterator[slice]:
    for start in range(0, total, block):
        yield slice(start, start + block)


def _joined(parts: list[Interval]) -> Interval:
    return Interval(torch.cat([part.lower for part in parts]), torch.cat([part.upper for part in parts]))


def _proved(lower: Tensor) -> Tensor:
    """Lower bounds of which those that overflowed, in whatever direction, say nothing."""
    return torch.where(torch.isfinite(lower), lower, -torch.inf)


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _shifted(row: Linear, local: Tensor | None) -> Linear:
    """The row where its value may have moved by `local`."""
    return row if local is None else Linear(row.a, row.d - _contract(row.a.abs(), local))


def _lower(
    graph: Graph, region: Region, rows: Tensor, intermediates: Intermediates, evaluated: torch.dtype | None
) -> Lower:
    """One block. rows: (batch or 1, rows, outputs)."""
    block = _relaxed(graph, region, intermediates, evaluated)
    row = _walk(graph, rows.unflatten(2, graph.output_shape), graph.output, block)
    pad = _contract(rows.abs(), block.rounding[graph.output])
    least = _proved(row.d + region.minimum(row.a.flatten(2)) - pad)
    noise = NOISE * len(graph.operations) * pad.amax(1)
    return Lower(least, row.a.expand(len(region), *row.a.shape[1:]), block.values, noise, block.delicate)


@dataclass(frozen=True, eq=False)
class _Block:
    """What a walk needs to know of a block of boxes, by name of the value.

    values: boxes. lines: of each ReLU, by source. local: errors of evaluation. rounding: of the pass itself.
    delicate: (batch,), bool, see `Lower`.
    """

    values: dict[str, Interval]
    lines: dict[str, Lines]
    local: dict[str, Tensor | None]
    rounding: dict[str, Tensor]
    delicate: Tensor


def _relaxed(graph: Graph, region: Region, intermediates: Intermediates, evaluated: torch.dtype | None) -> _Block:
    """Boxes and lines of a block, layer by layer: each layer is bounded with the lines of those before it."""
    of_graph = weights(graph, region.centre.dtype)
    operations = chain(graph)
    before_relu = {operation.source for operation in operations if isinstance(operation, Relu)}
    boxes = interval.propagate(graph, region, evaluated)
    none = torch.zeros(len(region), dtype=torch.bool)
    block = _Block({graph.input: boxes[graph.input]}, {}, {}, rounding.backward(graph, boxes), none)
    values = block.values
    # The input's own rounding to the evaluated dtype is part of the question only where the caller's points are.
    error = {graph.input: torch.zeros_like(boxes[graph.input].lower)}
    mixed = 0  # linear maps so far that mix coordinates: a box through the first one is exact
    for operation in operations:
        source, target, w = operation.source, operation.target, of_graph[operation.target]
        x = interval.step(operation, values[source], w, evaluated)
        if evaluated is not None:
            block.local[target], error[target] = rounding.evaluation(
                operation, w, values[source], error[source], evaluated
            )
        mixed += w.terms > 1
        if target in before_relu:
            noise = NOISE * len(operations) * block.rounding[target]
            if intermediates == "backward" and mixed > 1:
                block.delicate.logical_or_(_near(x, noise, x.lower, x.upper))
                slack = block.rounding[target] + (error[target] if evaluated is not None else 0)
                x = _tightened(graph, region, target, x, block, slack)
            block.delicate.logical_or_(_near(x, noise, x.lower + x.upper))
            block.lines[target] = Lines.of(x)
        values[target] = x
    return block


def _near(x: Interval, noise: Tensor, *choices: Tensor) -> Tensor:
    """Whether the sign of a choice is open to rounding in some neuron of a box, and matters: (batch,), bool."""
    matters = (x.upper > -noise) & (x.lower < noise) & (x.upper - x.lower > 4 * noise)
    near = torch.zeros_like(matters)
    for choice in choices:
        near |= choice.abs() <= noise
    return (near & matters).flatten(1).any(1)


def _tightened(graph: Graph, region: Region, at: str, x: Interval, block: _Block, slack: Tensor) -> Interval:
    """x cut by backward bounds of those of its neurons that are unstable, in each box its own.

    A row is computed for the whole block where one box needs it, but a box in which it is stable makes no use of it:
    what is known of a box must not depend on its neighbours.
    """
    low, high, slack = x.lower.flatten(1).clone(), x.upper.flatten(1).clone(), slack.flatten(1)
    own = (low < 0) & (high > 0)
    unstable = own.any(0).nonzero()[:, 0]
    widest = max(_size(graph.input_shape), *(_size(operation.shape) for operation in chain(graph)))
    # Errors of evaluation are in the slack here, as e: cheaper than |A| local for so many rows.
    exact = _Block(block.values, block.lines, {}, block.rounding, block.delicate)
    for which in unstable.split(max(1, COEFFICIENTS // (2 * widest * len(region)))):
        one = torch.zeros(len(which), low.shape[1], dtype=low.dtype)
        one[torch.arange(len(which)), which] = 1
        start = torch.cat([one, -one])[None].unflatten(2, graph.shape_of(at))
        row = _walk(graph, start, at, exact)
        below, above = _proved(row.d + region.minimum(row.a.flatten(2))).chunk(2, dim=1)
        # `below` bounds z from below, `above` bounds -z from below.
        below = torch.maximum(low[:, which], below - slack[:, which])
        above = torch.minimum(high[:, which], slack[:, which] - above)
        low[:, which] = torch.where(own[:, which], below, low[:, which])
        high[:, which] = torch.where(own[:, which], above, high[:, which])
    return Interval(low.reshape(x.lower.shape), high.reshape(x.upper.shape))


def _walk(graph: Graph, rows: Tensor, at: str, block: _Block) -> Linear:
    """The linear bound of `rows` of the value `at`, in terms of the input. rows: (batch or 1, rows, *shape of at)."""
    of_graph = weights(graph, rows.dtype)
    reached = {at: Linear(rows, rows.new_zeros(rows.shape[:2]))}
    for operation in reversed(chain(graph)):
        row = reached.pop(operation.target, None)
        if row is None:
            continue
        source, w = operation.source, of_graph[operation.target]
        row = _shifted(row, block.local.get(operation.target))
        row = RULES[type(operation)](operation, row, w, graph.shape_of(source), block.lines.get(source))
        # A value that several operations read collects the coefficients of each.
        known = reached.get(source)
        reached[source] = row if known is None else Linear(known.a + row.a, known.d + row.d)
    return reached[graph.input]
