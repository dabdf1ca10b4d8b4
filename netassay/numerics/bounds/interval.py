"""Interval bound propagation (IBP): a box around every value of a graph.

For y = W x + b and x in [c - r, c + r]:  y in [W c + b - |W| r, W c + b + |W| r];  ReLU maps ends to ends.

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
from netassay.networks.graph import Graph, Operation, Relu
from netassay.numerics.bounds import rounding
from netassay.numerics.bounds.linear import MAPS, Weights, chain, weights
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
        if region.norm == "2":
            spread = region.spread().expand_as(region.centre)
            ellipsoid = region.centre, spread, torch.zeros_like(spread)
        return cls(*region.box(), ellipsoid)

    def magnitude(self) -> Tensor:
        """The largest |value|."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def intersect(self, lower: Tensor, upper: Tensor) -> Interval:
        return Interval(torch.maximum(self.lower, lower), torch.minimum(self.upper, upper), self.ellipsoid)


def _linear(operation: Operation, x: Interval, w: Weights, evaluated: torch.dtype | None) -> Interval:
    apply = MAPS[type(operation)].apply
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


def _relu(operation: Operation, x: Interval, w: Weights, evaluated: torch.dtype | None) -> Interval:
    return Interval(x.lower.clamp(min=0), x.upper.clamp(min=0))


RULES: dict[type[Operation], Callable[[Operation, Interval, Weights, torch.dtype | None], Interval]] = {
    **dict.fromkeys(MAPS, _linear),
    Relu: _relu,
}


def step(operation: Operation, x: Interval, w: Weights, evaluated: torch.dtype | None = None) -> Interval:
    """Bounds of an operation's target from those of its source."""
    return RULES[type(operation)](operation, x, w, evaluated)


def propagate(graph: Graph, region: Region, evaluated: torch.dtype | None = None) -> dict[str, Interval]:
    """Boxes of all values the output depends on, the input included, in the dtype of the region.

    evaluated: the boxes also hold for every evaluation of the network in this dtype; None: for exact arithmetic only.
    """
    of_graph = weights(graph, region.centre.dtype)
    values = {graph.input: Interval.around(region)}
    with torch.no_grad():
        for operation in chain(graph):
            values[operation.target] = step(operation, values[operation.source], of_graph[operation.target], evaluated)
    return values


def bounds(graph: Graph, region: Region, evaluated: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """lower, upper: (batch, *output shape), of every output over each ball; see `propagate`."""
    output = propagate(graph, region, evaluated)[graph.output]
    return output.lower, output.upper
