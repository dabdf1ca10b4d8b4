"""Worst cases of a batch that training minimises: points an attack finds, margins that linear bounds allow.

Differentiable in the weights, in float32, and without any account of rounding: what is trained with them is certified
afterwards by `netassay.numerics.bounds`. Interval bounds for training are in `netassay.networks.training`.

References:
Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks. 2018.
Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh. Towards stable and efficient training of verifiably robust
neural networks. 2020 (CROWN-IBP, section 3).
Mueller, Eckert, Fischer, Vechev. Certified training: small boxes are all you need. 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[Operation, tuple[Tensor, Tensor]]

#: Length of a step in units of radius / steps, so that the attack can cross the box from any start (Madry et al.).
_STRIDE = 2.5


def attacked(
    graph: Graph, weights: Weights, x: Tensor, y: Tensor, radius: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Points of the boxes of large cross-entropy: sign steps from a uniform start, one a box. Same shape as x."""
    fixed: Weights = {op: (weight.detach(), bias.detach()) for op, (weight, bias) in weights.items()}
    start = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    points = x + radius * (2 * start - 1)
    for _ in range(steps):
        points.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(evaluate.forward(graph, points, fixed), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        moved = points.detach() + _STRIDE * radius / steps * gradient.sign()
        points = torch.minimum(torch.maximum(moved, x - radius), x + radius)
    return points.detach()


def linear_margins(graph: Graph, weights: Weights, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Upper bounds of z_j - z_y over the boxes, by CROWN-IBP: (n, classes), zero at j = y.

    Where l < 0 < u a ReLU lies below the line through (l, 0) and (u, u), and above alpha z with alpha = 1 where u > -l,
    else 0 (Zhang et al. 2018, the adaptive choice); l and u come from interval bounds.
    """
    centre, spread, boxes = x, torch.full_like(x, radius), {}
    for op in graph.operations:
        if isinstance(op, Dense | Conv):
            weight, bias = weights[op]
            centre = evaluate.linear(op, centre, weight, bias)
            spread = evaluate.linear(op, spread, weight.abs(), None)
        elif isinstance(op, Relu):
            low, up = centre - spread, centre + spread
            boxes[op] = low, up
            centre, spread = (up.relu() + low.relu()) / 2, (up.relu() - low.relu()) / 2
        else:
            centre, spread = (evaluate.apply(op, part) for part in (centre, spread))
    one = torch.eye(centre.shape[1], dtype=x.dtype)
    a, d = one - one[y][:, None, :], x.new_zeros(len(x), centre.shape[1])
    for op in reversed(graph.operations):
        if isinstance(op, Dense | Conv):
            weight, bias = weights[op]
            d = d + _summed(a, bias if isinstance(op, Dense) else bias[:, None, None])
            a = _back(op, weight, a, graph.shape_of(op.source))
        elif isinstance(op, Relu):
            low, up = (end[:, None] for end in boxes[op])
            below, above = low.clamp(max=0), up.clamp(min=0)
            slope = above / (above - below).clamp(min=torch.finfo(x.dtype).tiny)
            positive = a.clamp(min=0)
            d = d - _summed(positive, slope * below)
            a = positive * slope + (a - positive) * (up > -low)
        else:
            a = a.reshape(*a.shape[:2], *graph.shape_of(op.source))
    return d + _summed(a, x[:, None]) + radius * a.abs().flatten(2).sum(2)


def _summed(a: Tensor, v: Tensor) -> Tensor:
    """sum a v over all axes but the first two."""
    return (a * v).flatten(2).sum(2)


def _back(op: Dense | Conv, weight: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    from netassay.numerics.bounds.linear import MAPS  # numerics stands above networks everywhere else

    found = MAPS[type(op)].adjoint(op, weight, a.flatten(0, 1), shape)
    return found.reshape(*a.shape[:2], *shape)
