"""Forward linear bounds: every value of a graph between two linear functions of the input.

    M(x) - D(x) - e  <=  v(x)  <=  M(x) + D(x) + e     for all x of the region,
    M(x) = A x + b,   D(x) = F x + h,   e >= 0 a constant for each number of v.

Carried from the input (A = 1, all else 0) to the output, an operation at a time:

    W v + c:               A <- W A,  b <- W b + c,  F <- |W| F,  h <- |W| h,  e <- |W| e + r;
    p v + q w:             likewise with p, |p| and q, |q|, for two values v and w;
    a v + s <= f(v) <= a' v + s':   the lower line on M - D or M + D, as a >= 0 or a < 0, the upper one likewise;
    v w:                   its planes (McCormick), term by term.

Lines and planes are those of a backward pass (`backward.relaxation`), over the box that the two functions span on the
region, cut with the box propagated from the boxes before. For each box a value of n numbers takes 2 d n coefficients, d
the size of the input: one pass of 2 d inputs through the network, whatever is asked of its outputs. A backward pass
costs as much as it has rows, so forward bounds pay where d is small; they are looser, since M and D are fixed
neuron by neuron before it is known with which sign a neuron counts.

Rounding is carried along in e. The stored A, b, F and h are what M and D mean: exact linear functions with these
coefficients. Where fl(W A) is stored in place of W A, each number of the value moves by at most r = g |W| S, with
S = |A| X + |b| + |F| X + |h|, X >= |x| over the region, g = k u / (1 - k u) for k roundings (the terms of the sum, and
a few for slopes, halving and adding); likewise r = g (|a| + |a'|) S + g H for lines and planes, H the size of what
comes out. That is one product more with |W| for each operation. Doubling g covers the rounding of S and e themselves.

Reference: Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin, Hsieh. Automatic perturbation analysis for scalable
certified robustness and beyond. 2020. (Section 3.1, "forward mode".)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Graph, Operation, Relu, Sum
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.backward import Linear, Lines, Lower, Planes
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, Weights, operations, weights
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

#: Coefficients of one value and function of a block of boxes: 64 MiB in float64.
COEFFICIENTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Between:
    """slope, spread: A and F, (batch, inputs, *shape): each input's share in each number. constant, width: b and h,
    (batch, *shape). error: e, (batch, *shape).
    """

    slope: Tensor
    constant: Tensor
    spread: Tensor
    width: Tensor
    error: Tensor

    def size(self, largest: Tensor) -> Tensor:
        """S, (batch, *shape), from X, (batch, inputs)."""
        share = torch.einsum("bi...,bi->b...", self.slope.abs() + self.spread.abs(), largest)
        return share + self.constant.abs() + self.width.abs()

    def side(self, sign: int) -> tuple[Tensor, Tensor]:
        """Coefficients and constant of M + sign D, up to one rounding."""
        return self.slope + sign * self.spread, self.constant + sign * self.width


@dataclass(frozen=True, eq=False)
class _Pass:
    """What an operation's rule needs of the region. largest: X, (batch, inputs). g: for k roundings beyond a sum's."""

    region: Region
    largest: Tensor
    shares: int

    def g(self, terms: int, dtype: torch.dtype) -> float:
        return 2 * rounding.gamma(terms + 16, dtype)

    def tiny(self, terms: int, like: Tensor) -> float:
        """More than what underflow changes in a number, through all the coefficients that it has."""
        largest = max(1.0, float(self.largest.sum(1).amax()))
        return 8 * (terms + self.shares) * rounding.smallest(like.dtype) * largest


def _start(region: Region) -> Between:
    lower = region.box()[0]
    batch, shape = len(lower), lower.shape[1:]
    one = torch.eye(shape.numel(), dtype=lower.dtype).reshape(1, shape.numel(), *shape).expand(batch, -1, *shape)
    none = torch.zeros_like(lower)
    return Between(one, none, torch.zeros_like(one), none, none)


def _through(operation: Operation, weight: Tensor | None, a: Tensor) -> Tensor:
    """W a for coefficients a, (batch, inputs, *shape)."""
    apply = MAPS[type(operation)].apply
    return apply(operation, weight, None, a.flatten(0, 1)).reshape(*a.shape[:2], *operation.shape)


def _linear(operation: Operation, v: Between, w: Weights, of: _Pass) -> Between:
    apply = MAPS[type(operation)].apply
    moved = v.size(of.largest) * of.g(w.terms, v.slope.dtype)
    bias = None if w.bias is None else w.bias.abs() * of.g(w.terms, v.slope.dtype)
    error = apply(operation, w.absolute, bias, v.error + moved) * (1 + of.g(w.terms, v.slope.dtype))
    return Between(
        _through(operation, w.weight, v.slope),
        apply(operation, w.weight, w.bias, v.constant),
        _through(operation, w.absolute, v.spread),
        apply(operation, w.absolute, None, v.width),
        error + (0.0 if w.weight is None and w.terms == 1 else of.tiny(w.terms, error)),
    )


def _sum(operation: Sum, v: Between, other: Between, of: _Pass) -> Between:
    p, q = operation.factors
    g = of.g(2, v.slope.dtype)
    size = abs(p) * v.size(of.largest) + abs(q) * other.size(of.largest)
    error = (abs(p) * v.error + abs(q) * other.error + g * size) * (1 + g) + of.tiny(2, size)
    return Between(
        p * v.slope + q * other.slope,
        p * v.constant + q * other.constant,
        abs(p) * v.spread + abs(q) * other.spread,
        abs(p) * v.width + abs(q) * other.width,
        error,
    )


def _relaxed(
    below: list[tuple[Tensor, Between]],
    above: list[tuple[Tensor, Between]],
    constants: tuple[Tensor, Tensor],
    size: Tensor,
    of: _Pass,
) -> Between:
    """Between  sum of factor v + constants[0]  and  sum of factor v + constants[1]. size: of numbers in lines."""
    ends, error = [], torch.zeros_like(size)
    g = of.g(4, size.dtype)
    for terms, constant, sign in ((below, constants[0], -1), (above, constants[1], 1)):
        slope, offset = torch.zeros_like(terms[0][1].slope), constant
        lost = g * (size + constant.abs())
        for factor, v in terms:
            # M + sign D for a positive factor, M - sign D for a negative one: sign |factor| D in both.
            slope = slope + factor[:, None] * v.slope + sign * factor.abs()[:, None] * v.spread
            offset = offset + factor * v.constant + sign * factor.abs() * v.width
            lost = lost + factor.abs() * (v.error + g * v.size(of.largest))
        ends.append((slope, offset))
        error = torch.maximum(error, lost)
    (low, start), (high, end) = ends
    error = error * (1 + g) + of.tiny(4, size)
    # Nothing but the order of the two ends is lost where they overflowed: the box decides then.
    return Between((low + high) / 2, (start + end) / 2, (high - low) / 2, (end - start) / 2, error)


def _lines(v: Between, lines: Lines, box: Interval, of: _Pass) -> Between:
    below = torch.zeros_like(lines.intercept) if lines.below is None else lines.below
    size = box.magnitude() * (1 + lines.slope.abs() + lines.alpha.abs())
    return _relaxed([(lines.alpha, v)], [(lines.slope, v)], (below, lines.intercept), size, of)


def _planes(v: Between, other: Between, planes: Planes, of: _Pass) -> Between:
    below, above = ([(side[0], v), (side[1], other)] for side in (planes.below, planes.above))
    constants = planes.below[2], planes.above[2]
    return _relaxed(below, above, constants, torch.maximum(constants[0].abs(), constants[1].abs()), of)


def _box(v: Between, of: _Pass) -> tuple[Tensor, Tensor]:
    """The smallest and the largest that the two functions get on the region, outward."""
    ends = []
    # The minimum over the region adds up as many numbers as there are inputs, half of them magnitudes of a box.
    g = 2 * of.g(of.shares, v.error.dtype)
    lost = v.error * (1 + g) + g * v.size(of.largest) + of.tiny(of.shares, v.error)
    for sign in (-1, 1):
        a, b = v.side(sign)
        a = -sign * a.flatten(2).transpose(1, 2)
        least = of.region.minimum(a).reshape(b.shape) - sign * b - lost
        ends.append(-sign * torch.where(torch.isfinite(least), least, -torch.inf))
    return ends[0], ends[1]


def propagate(graph: Graph, region: Region) -> tuple[dict[str, Interval], dict[str, Between]]:
    """Boxes and linear functions of all values, by name. Holds in real arithmetic."""
    return _propagated(graph, region, operations(graph), False)


def _propagated(
    graph: Graph, region: Region, steps: tuple[Operation, ...], flat: bool
) -> tuple[dict[str, Interval], dict[str, Between]]:
    """Through these operations, the first of the graph."""
    of_graph = weights(graph, region.centre.dtype)
    whole = interval.propagate(graph, region)
    values = {graph.input: whole[graph.input]}
    found = {graph.input: _start(region)}
    size = found[graph.input].slope.shape[1]
    of = _Pass(region, whole[graph.input].magnitude().flatten(1), size)
    for operation in steps:
        w = of_graph[operation.target]
        line = backward.relaxation(operation, values, whole, flat)
        given = [found[source] for source in operation.sources]
        box = values[operation.source]
        if isinstance(line, Lines):
            made = _lines(given[0], line, box, of)
        elif isinstance(line, Planes):
            made = _planes(given[0], given[1], line, of)
        elif isinstance(operation, Sum):
            made = _sum(operation, given[0], given[1], of)
        else:
            made = _linear(operation, given[0], w, of)
        found[operation.target] = made
        values[operation.target] = interval.step(operation, values, w).intersect(*_box(made, of))
    return values, found


def lower(graph: Graph, region: Region, rows: Tensor, *, flat: bool = False) -> Lower:
    """Lower bounds of C f(x), C the `rows`, as `backward.lower`: the rows are walked back through the linear operations
    at the end, to the last value that is not linear in others, and bounded with its linear functions.

    rows: (rows, outputs) or (batch, rows, outputs). flat: see `backward.Lines.of`.
    """
    widest = max((_numel(operation.shape) for operation in operations(graph)), default=1)
    size = max(1, COEFFICIENTS // (max(widest, _numel(graph.input_shape)) * _numel(graph.input_shape)))
    with torch.no_grad():
        parts = []
        for start in range(0, len(region), min(size, backward.BLOCK)):
            which = slice(start, start + min(size, backward.BLOCK))
            wanted = rows[None].expand(len(region[which]), -1, -1) if rows.dim() == 2 else rows[which]
            parts.append(_lower(graph, region[which], wanted, flat))
    return backward.joined(parts)


def _lower(graph: Graph, region: Region, rows: Tensor, flat: bool) -> Lower:
    """One block. rows: (batch, rows, outputs)."""
    steps, of_graph = list(operations(graph)), weights(graph, rows.dtype)
    row, at = Linear(rows.unflatten(2, graph.output_shape), rows.new_zeros(rows.shape[:2])), graph.output
    tail: list[Operation] = []
    while steps and steps[-1].target == at and type(steps[-1]) in MAPS:
        operation = steps.pop()
        tail.append(operation)
        at = operation.source
        rule = backward.RULES[type(operation)]
        (row,) = rule(operation, row, of_graph[operation.target], graph.shape_of(at), None)
    values, found = _propagated(graph, region, tuple(steps), flat)
    for operation in reversed(tail):
        values[operation.target] = interval.step(operation, values, of_graph[operation.target])
    v, inputs = found[at], found[at].slope.shape[1]
    of = _Pass(region, values[graph.input].magnitude().flatten(1), inputs)
    a, slope, spread = row.a.flatten(2), v.slope.flatten(2), v.spread.flatten(2)
    of_input = a @ slope.transpose(1, 2) - a.abs() @ spread.transpose(1, 2)
    centre, width, error = (part.flatten(1)[:, :, None] for part in (v.constant, v.width, v.error))
    constant = row.d + (a @ centre - a.abs() @ width)[:, :, 0]
    # What rounding in the row's walk adds, in these products, and in the minimum over the region.
    whole = interval.propagate(graph, region)
    pad = (rows.abs() @ rounding.backward(graph, whole)[graph.output].flatten(1)[:, :, None])[:, :, 0]
    g = 4 * of.g(a.shape[2] + inputs, a.dtype)
    size = v.size(of.largest).flatten(1)[:, :, None]
    lost = (a.abs() @ (error * (1 + g) + g * size))[:, :, 0] + g * row.d.abs() + of.tiny(a.shape[2], pad)
    least = constant + region.minimum(of_input) - lost - pad
    least = torch.where(torch.isfinite(least), least, -torch.inf)
    noise = backward.NOISE * len(graph.operations) * (pad + lost).amax(1)
    shaped = of_input.unflatten(2, graph.input_shape)
    return Lower(least, shaped, values, noise, _delicate(graph, values, noise))


def _delicate(graph: Graph, values: Mapping[str, Interval], noise: Tensor) -> Tensor:
    """Whether a ReLU's lower slope, which jumps where u = -l, is open to rounding: (batch,), bool."""
    near = torch.zeros(len(noise), dtype=torch.bool)
    for operation in operations(graph):
        if isinstance(operation, Relu):
            z = values[operation.source]
            unstable = (z.lower < 0) & (z.upper > 0)
            near |= (((z.lower + z.upper).flatten(1).abs() <= noise[:, None]) & unstable.flatten(1)).any(1)
    return near


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
