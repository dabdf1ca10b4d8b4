"""Interval bound propagation (IBP): a box around every value of a graph.

For y = W x + b and x in [c - r, c + r]:  y in [W c + b - |W| r, W c + b + |W| r];  ReLU maps ends to ends, another
function is bounded by its `relaxations.image`, a product of two values by those of their ends.

Rounding is outward at no extra product: W c + b is computed with an error of at most g (|W| |c| + |b|), with
g = n u / (1 - n u) for n terms and unit roundoff u, so |W| is applied to r + g |c| in place of r. With the u of float32
the same line gives boxes that hold for every float32 evaluation of the network too (`evaluated`).

Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018. (Section 3, equation 6.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Activation, Graph, Operation, Product, Relu, Sum
from netassay.numerics.bounds import relaxations, rounding
from netassay.numerics.bounds.linear import MAPS, Weights, operations, weights
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Interval:
    """lower, upper: (batch, *shape). ellipsoid: None, or (centre, axes, error), each (batch, *shape), of
    {centre + axes z + e : ||z||_2 <= 1, |e| <= error}, which also holds the value; it lives until the first linear map
    that mixes coordinates, and makes that one exact for l2 balls.
    """

    lower: Tensor
    upper: Tensor
    ellipsoid: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def around(cls, region: Region) -> Interval:
        ellipsoid = None
        if region.norm in ("2", "1"):  # an l1 ball lies in the l2 ball of its radius
            spread = region.spread().expand_as(region.centre)
            ellipsoid = region.centre, spread, torch.zeros_like(spread)
        return cls(*region.box(), ellipsoid)

    def magnitude(self) -> Tensor:
        """The largest |value|."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def intersect(self, lower: Tensor, upper: Tensor) -> Interval:
        return Interval(torch.maximum(self.lower, lower), torch.minimum(self.upper, upper), self.ellipsoid)


def _linear(operation: Operation, values: Boxes, w: Weights, evaluated: torch.dtype | None) -> Interval:
    x, apply = values[operation.source], MAPS[type(operation)].apply
    if w.weight is None:
        # What only moves numbers rounds nothing. Of numbers that are there twice the set is no ellipsoid.
        kept = None
        if x.ellipsoid is not None and w.terms == 1:
            centre, axes, error = (apply(operation, None, None, of) for of in x.ellipsoid)
            kept = centre, axes, error
        return Interval(apply(operation, None, None, x.lower), apply(operation, None, None, x.upper), kept)
    # 8 roundings beyond the sum itself: halving, subtracting and adding the ends; 4 g covers the second-order terms.
    g = 4 * rounding.gamma(w.terms + 8, x.lower.dtype) + rounding.local_gamma(w, evaluated)
    underflow = 4 * w.terms * rounding.smallest(evaluated or x.lower.dtype)
    bias = None if w.bias is None else g * w.bias.abs() + underflow
    centre, radius = (x.lower + x.upper) / 2, (x.upper - x.lower) / 2
    middle = apply(operation, w.weight, w.bias, centre)
    half = apply(operation, w.absolute, bias, radius + g * (radius + centre.abs()))
    image = Interval(middle - half, middle + half)
    if x.ellipsoid is None:
        return image
    centre, axes, error = x.ellipsoid
    middle = apply(operation, w.weight, w.bias, centre)
    half = _reach(operation, w, axes) * (1 + g)
    # What rounding adds to the centre's image is no part of the axes; it stays with the set as long as the set lives.
    error = apply(operation, w.absolute, bias, error + g * (error + centre.abs()))
    # Scaling and reshaping keep the coordinates apart, so the set is still an ellipsoid with these axes.
    kept = (middle, half, error) if w.terms == 1 else None
    image = image.intersect(middle - half - error, middle + half + error)
    return Interval(image.lower, image.upper, kept)


def _reach(operation: Operation, w: Weights, axes: Tensor) -> Tensor:
    """max |W (axes z)| over ||z||_2 <= 1, the norm of each row of W diag(axes), not below it but for rounding."""
    apply = MAPS[type(operation)].apply
    if w.absolute is None or w.terms == 1:
        return apply(operation, w.absolute, None, axes)
    # In units of the largest factors no square overflows. Those that underflow lose at most 4 tiny in each term.
    tiny = rounding.smallest(axes.dtype)
    widest = axes.flatten(1).amax(1).clamp(min=tiny)
    unit, heaviest = widest.reshape(-1, *[1] * (axes.dim() - 1)), w.absolute.amax().clamp(min=tiny)
    squares = apply(operation, (w.absolute / heaviest).square(), None, (axes / unit).square())
    lost = math.sqrt(4 * w.terms * tiny)
    return (squares.sqrt() + lost) * heaviest * widest.reshape(-1, *[1] * (squares.dim() - 1))


def _relu(operation: Operation, values: Boxes, w: Weights, evaluated: torch.dtype | None) -> Interval:
    x = values[operation.source]
    return Interval(x.lower.clamp(min=0), x.upper.clamp(min=0))


def _activation(operation: Activation, values: Boxes, w: Weights, evaluated: torch.dtype | None) -> Interval:
    rounding.covered(operation, evaluated)
    x = values[operation.source]
    return Interval(*relaxations.image(operation.function, operation.parameters, x.lower, x.upper))


def _sum(operation: Sum, values: Boxes, w: Weights, evaluated: torch.dtype | None) -> Interval:
    first, second = (
        _times(factor, values[of]) for factor, of in zip(operation.factors, operation.sources, strict=True)
    )
    lower, upper = first[0] + second[0], first[1] + second[1]
    # Two products and a sum, each of which rounds, in this arithmetic and in the evaluated one.
    g = 4 * rounding.gamma(w.terms + 8, lower.dtype) + rounding.sum_gamma(evaluated)
    size = sum(
        abs(factor) * values[of].magnitude() for factor, of in zip(operation.factors, operation.sources, strict=True)
    )
    slack = g * size + 4 * w.terms * rounding.smallest(evaluated or lower.dtype)
    image = Interval(lower - slack, upper + slack)
    if operation.larger is None:
        return image
    a, b = (values[of] for of in operation.larger)
    # The box of the larger value is that of no rounded sum; an evaluation may still add what it rounds.
    extra = 0.0 if evaluated is None else slack
    return image.intersect(torch.maximum(a.lower, b.lower) - extra, torch.maximum(a.upper, b.upper) + extra)


def _times(factor: float, x: Interval) -> tuple[Tensor, Tensor]:
    ends = factor * x.lower, factor * x.upper
    return ends if factor >= 0 else ends[::-1]


def _product(operation: Product, values: Boxes, w: Weights, evaluated: torch.dtype | None) -> Interval:
    x, y = values[operation.source], values[operation.other]
    ends = torch.stack([x.lower * y.lower, x.lower * y.upper, x.upper * y.lower, x.upper * y.upper])
    lower, upper = ends.amin(0), ends.amax(0)
    if operation.source == operation.other:
        lower = torch.where((x.lower < 0) & (x.upper > 0), 0.0, torch.minimum(ends[0], ends[3]))
    g = 4 * rounding.gamma(8, lower.dtype) + rounding.sum_gamma(evaluated)
    slack = g * x.magnitude() * y.magnitude() + 4 * rounding.smallest(evaluated or lower.dtype)
    return Interval(lower - slack, upper + slack)


Boxes = dict[str, Interval]

RULES: dict[type[Operation], Callable[..., Interval]] = {
    **dict.fromkeys(MAPS, _linear),
    Relu: _relu,
    Activation: _activation,
    Sum: _sum,
    Product: _product,
}


def step(operation: Operation, values: Boxes, w: Weights, evaluated: torch.dtype | None = None) -> Interval:
    """Bounds of an operation's target from those of the values before it."""
    return RULES[type(operation)](operation, values, w, evaluated)


def propagate(graph: Graph, region: Region, evaluated: torch.dtype | None = None) -> dict[str, Interval]:
    """Boxes of all values the output depends on, the input included, in the dtype of the region.

    evaluated: the boxes also hold for every evaluation of the network in this dtype; None: for exact arithmetic only.
    Raises `rounding.NotCovered` where nothing is known of such evaluations.
    """
    of_graph = weights(graph, region.centre.dtype)
    values = {graph.input: Interval.around(region)}
    with torch.no_grad():
        for operation in operations(graph):
            values[operation.target] = step(operation, values, of_graph[operation.target], evaluated)
    return values


def bounds(graph: Graph, region: Region, evaluated: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """lower, upper: (batch, *output shape), of every output over each ball; see `propagate`."""
    output = propagate(graph, region, evaluated)[graph.output]
    return output.lower, output.upper
