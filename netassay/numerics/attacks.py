"""Projected gradient descent in search of a counterexample, the same for an input whoever else is in the batch.

The attack minimises a margin over a ball or box by steps along the sign of its gradient (norm inf), the gradient itself
(norm 2) or the signs of its largest entries (norm 1), each followed by a projection: f_y - max_j!=y f_j of an image's
class y (`pgd`), or the violation max_k c_k.f - b_k of a conjunction of constraints c_k.f <= b_k (`meet`). A gradient
method is chaotic: one rounding turned the other way changes a sign, and so the path. Sums of a batched product are
rounded in an order that depends on the batch, so the search walks on a surrogate of the network whose sums are *exact*:
weights, and the values of each layer input by input, are rounded to `bits` binary digits below their largest, with

    2 bits + log2(terms of a sum) <= 53,

so that every product and partial sum is an integer multiple of one unit below 2^53 units, and float64 adds it without
error in any order. The path is then one and the same alone, in a batch, and with any number of threads. The surrogate
differs from the network by some 2^-bits relative (20 bits and more up to 4,096 terms, close to float32's 24); what it
finds is only a candidate, to be judged on the network itself.

Reference: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks. 2018.
Margin loss: Carlini, Wagner. Towards evaluating the robustness of neural networks. 2017. Projection on an l1 ball:
Duchi, Shalev-Shwartz, Singer, Chandra. Efficient projections onto the l1-ball for learning in high dimensions. 2008.
Sparse steps: Tramer, Boneh. Adversarial training and robustness for multiple perturbations. 2019. Splitting into exact
products: Ozaki, Ogita, Oishi, Rump. Error-free transformations of matrix multiplication. 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from netassay.heavy import torch
from netassay.networks.functions import FUNCTIONS
from netassay.networks.graph import Activation, Graph, Operation, Pick, Product, Relu, Sum
from netassay.numerics.bounds.linear import MAPS, operations, weights
from netassay.numerics.bounds.regions import Ball, Box, Region

if TYPE_CHECKING:
    from torch import Tensor

#: Bits of an integer that float64 holds exactly.
_EXACT = 53
#: A margin nearer to 0 than this, relative to the largest output, may have another sign on the network itself: above
#: the error of a surrogate of 20 bits through a few layers. A guess too low costs a candidate that is refused later.
_DOUBT = 2.0**-14
#: Rows (inputs x starts) evaluated together, so that a large group keeps its layers in cache.
_ROWS = 2048
#: Share of the coordinates that a step in an l1 ball moves.
_SPARSE = 0.05
#: Numbers in the samples of one box that are drawn at once: 32 MiB.
_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class Attack:
    """points: (batch, *input), float64 values that float32 holds exactly, each inside its ball as far as `inside` says.

    margins: (batch,), of the surrogate at the points: below 0 suggests a counterexample.
    inside: (batch,), bool; False where float32 has no point of the ball to offer near the one found.
    """

    points: Tensor
    margins: Tensor
    inside: Tensor


def pgd(
    graph: Graph,
    region: Region,
    labels: Tensor,
    *,
    steps: int,
    restarts: int,
    seeds: Sequence[int],
    starts: Tensor | None = None,
    stop: bool = True,
) -> Attack:
    """The point of smallest margin met on the way, per ball of the region (float64).

    labels: (batch,), int64. steps: gradient steps of each start, their length falling linearly from the radius to 0.
    restarts: the first starts at the centre, the others at random points of the ball drawn from the item's own seed.
    starts: (batch, more, *input), further points to start from, e.g. the worst corners of a linear bound; they are
    projected first. An item stops at its first start with a margin clearly below 0; where not `stop`, it takes all
    steps.
    """
    with torch.no_grad():
        surrogate = _Surrogate.of(graph)
        lower, upper = _representable(region)
        centre = torch.minimum(torch.maximum(region.centre, lower), upper)
        size = max(1, _ROWS // (restarts + (0 if starts is None else starts.shape[1])))
        parts = []
        for first in range(0, len(region), size):
            which = slice(first, first + size)
            # Drawn block by block: the starts of a large batch would take more memory than the network does.
            points = [centre[which][:, None]]
            if restarts > 1:
                drawn = [_random(region, first + item, restarts - 1, seed) for item, seed in enumerate(seeds[which])]
                points.append(torch.stack(drawn))
            if starts is not None:
                points.append(starts[which])
            box, x = (lower[which], upper[which]), torch.cat(points, dim=1)
            parts.append(_descend(surrogate, region[which], box, _ClassMargin(labels[which]), x, steps, stop))
        found, margins = (torch.cat(column) for column in zip(*parts, strict=True))
        rounded = torch.minimum(torch.maximum(found.float().double(), lower), upper)
        return Attack(rounded, margins, contains(region, rounded))


@dataclass(frozen=True, eq=False)
class Conjunctions:
    """For each item a conjunction of constraints  sum_t weight_t f[output_t] <= bound  on the flattened outputs f.

    output, weight: (batch, constraints, terms), int64 and float64; terms that are not needed have weight 0.
    bound: (batch, constraints); infinite: no constraint. The margin is the largest violation, at most 0 where all hold.
    """

    output: Tensor
    weight: Tensor
    bound: Tensor

    def __getitem__(self, which: slice | Tensor) -> Conjunctions:
        return Conjunctions(self.output[which], self.weight[which], self.bound[which])

    def margin(self, outputs: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        output, weight = self.output[items], self.weight[items]
        values = -self.bound[items]
        # Term by term, not as a product: in one order, whatever the batch.
        for term in range(output.shape[2]):
            values = values + weight[:, :, term] * outputs.gather(1, output[:, :, term])
        largest = values.amax(1)
        numbers = torch.arange(values.shape[1])
        # The first of equals, for the gradient must not depend on how a maximum is found.
        worst = torch.where(values == largest[:, None], numbers, len(numbers) - 1).amin(1)
        rows = torch.arange(len(outputs))
        gradient = torch.zeros_like(outputs).scatter_add_(1, output[rows, worst], weight[rows, worst])
        return largest, gradient


def meet(
    graph: Graph,
    region: Box,
    wanted: Conjunctions,
    *,
    samples: int,
    steps: int,
    restarts: int,
    seeds: Sequence[int],
    starts: Tensor | None = None,
) -> Attack:
    """The point of each box (float64) that comes nearest to meeting its conjunction, of those met on the way.

    samples: points drawn from the item's own seed, half of them within the box and half among its corners; with the
    middle of the box they are evaluated once, and the descent of `steps` steps begins at the best `restarts` of them
    and at `starts`, (batch, more, *input). An item stops at its first start with a margin clearly below 0.
    Ends of the boxes are rounded inward to float32. The result is the same whatever is asked together.
    """
    with torch.no_grad():
        surrogate = _Surrogate.of(graph)
        lower, upper = _representable(region)
        portion = max(1, min(samples, _ROWS, _NUMBERS // region.lower[0].numel()))
        rows = max(portion, restarts + (0 if starts is None else starts.shape[1]))
        size = max(1, min(_ROWS // rows, 8 * _NUMBERS // (rows * region.lower[0].numel())))
        parts = []
        for first in range(0, len(region), size):
            which = slice(first, first + size)
            box = lower[which], upper[which]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[which]]
            points = (box[0] / 2 + box[1] / 2)[:, None]
            for done in range(0, samples, portion):
                count = min(portion, samples - done)
                drawn = [_drawn(*one, count) for one in zip(*box, generators, strict=True)]
                points = _best(surrogate, wanted[which], torch.cat([points, torch.stack(drawn)], dim=1), restarts)
            if starts is not None:
                points = torch.cat([points, starts[which]], dim=1)
            parts.append(_descend(surrogate, region[which], box, wanted[which], points, steps))
        found, margins = (torch.cat(column) for column in zip(*parts, strict=True))
        rounded = torch.minimum(torch.maximum(found.float().double(), lower), upper)
        return Attack(rounded, margins, contains(region, rounded))


def _drawn(lower: Tensor, upper: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Points of one box: (count, *input), uniform within it and among its corners by turns."""
    share = torch.rand((count, *lower.shape), generator=generator, dtype=torch.float64)
    share[1::2] = share[1::2].round()
    return lower + share * (upper - lower)


def _best(surrogate: _Surrogate, wanted: Conjunctions, points: Tensor, count: int) -> Tensor:
    """The `count` points of least margin of each item. points: (batch, many, *input)."""
    batch, many = points.shape[:2]
    if many <= count:
        return points
    outputs = surrogate.values(points.flatten(0, 1))[surrogate.graph.output].flatten(1)
    margins, _ = wanted.margin(outputs, torch.arange(batch).repeat_interleave(many))
    order = margins.reshape(batch, many).argsort(dim=1, stable=True)[:, :count]
    return points[torch.arange(batch)[:, None], order]


def contains(region: Region, points: Tensor) -> Tensor:
    """Whether each point lies in its ball, in exact arithmetic; and is a float32: (batch,), bool.

    points: (batch, *input), float64. Where rounding leaves it open, the answer is no.
    """
    lower, upper = _representable(region)
    flat = (points >= lower) & (points <= upper) & (points == points.float().double())
    inside = flat.flatten(1).all(1)
    if isinstance(region, Ball) and region.norm != "inf":
        # A sum of n differences or squares of them errs by less than (n + 4) u relative, a root by half of that.
        length = torch.linalg.vector_norm((points - region.centre).flatten(1), ord=float(region.norm), dim=1)
        inside &= length * (1 + (points[0].numel() + 4) * 2.0**-52) <= region.radius
    return inside


def _representable(region: Region) -> tuple[Tensor, Tensor]:
    """The float32 numbers of the smallest box around each ball, rounded inward: lower, upper, float64.

    lower > upper where a coordinate's range holds no float32.
    """
    if isinstance(region, Box):
        return _inward(region.lower, 1), _inward(region.upper, -1)
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    spread = region.spread()
    low, high = region.centre - spread, region.centre + spread
    # The computed ends may lie half a unit outside; one unit inward is inside, except that radius 0 is exact.
    low = torch.where(spread > 0, torch.nextafter(low, infinity), low).clamp(min=region.low)
    high = torch.where(spread > 0, torch.nextafter(high, -infinity), high).clamp(max=region.high)
    return _inward(low, 1), _inward(high, -1)


def _inward(end: Tensor, direction: int) -> Tensor:
    """The nearest float32 on that side of each number, as float64."""
    near = end.float()
    beyond = torch.nextafter(near, torch.tensor(direction * torch.inf, dtype=torch.float32))
    missed = near.double() < end if direction > 0 else near.double() > end
    return torch.where(missed, beyond, near).double()


def _random(region: Region, item: int, count: int, seed: int) -> Tensor:
    """Points of one ball or box: (count, *input). Uniform for norm inf; for norm 2 of uniform direction and length; for
    norm 1 of exponential coordinates, signs at random and uniform length.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(region, Box):
        return _drawn(region.lower[item], region.upper[item], generator, count)
    shape = (count, *region.centre.shape[1:])
    if region.norm == "inf":
        step = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    elif region.norm == "1":
        step = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        step = step.sign() * -torch.log1p(-step.abs())
        length = torch.rand(count, generator=generator, dtype=torch.float64)
        step *= _column(length / _sum(step.abs()), step)
    else:
        step = torch.randn(shape, generator=generator, dtype=torch.float64)
        length = torch.rand(count, generator=generator, dtype=torch.float64)
        step *= _column(length / _norm(step), step)
    return region.centre[item] + region.radius[item] * step


class Objective(Protocol):
    """margin(outputs (rows, outputs), items (rows,)): the margin of each row's item, (rows,), and its gradient in the
    outputs, (rows, outputs).
    """

    def margin(self, outputs: Tensor, items: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class _ClassMargin:
    """f_y - max_j!=y f_j. labels: (batch,)."""

    labels: Tensor

    def margin(self, outputs: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[items]
        right = outputs.gather(1, labels[:, None])
        others = outputs.scatter(1, labels[:, None], -torch.inf)
        best, rival = others.max(1, keepdim=True)
        ones = torch.ones_like(right)
        gradient = torch.zeros_like(outputs).scatter_(1, labels[:, None], ones).scatter_(1, rival, -ones)
        return (right - best)[:, 0], gradient


def _descend(
    surrogate: _Surrogate,
    region: Region,
    box: tuple[Tensor, Tensor],
    objective: Objective,
    x: Tensor,
    steps: int,
    stop: bool = True,
) -> tuple[Tensor, Tensor]:
    """x: (batch, starts, *input). Returns the best points (batch, *input) and their margins (batch,)."""
    batch, starts = x.shape[:2]
    project = _projection(region, box)
    best, least = x[:, 0].clone(), torch.full((batch,), torch.inf, dtype=torch.float64)
    items = torch.arange(batch)
    x = project(x, items)
    for step in range(steps + 1):
        margin, size, gradient = surrogate.margin(x.flatten(0, 1), objective, items.repeat_interleave(starts))
        margin, size, gradient = margin.reshape(-1, starts), size.reshape(-1, starts), gradient.reshape(x.shape)
        lowest, which = margin.min(1)
        better = lowest < least[items]
        least[items[better]] = lowest[better]
        best[items[better]] = x[torch.arange(len(items)), which][better]
        # Within the surrogate's own error a margin proves nothing yet.
        running = (margin >= -_DOUBT * size).all(1) if stop else torch.ones(len(items), dtype=torch.bool)
        if step == steps or not bool(running.any()):
            break
        items, x, gradient = items[running], x[running], gradient[running]
        length = region.spread()[items][:, None] * (1 - step / steps)
        x = project(x - length * _direction(gradient, region.norm), items)
    return best, least


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """A direction of length one in the norm, for norms inf and 2 the steepest; gradient: (batch, starts, *input).

    For norm 1 the steepest moves one coordinate, which a domain soon stops: the largest `_SPARSE` move alike.
    """
    if norm == "inf":
        return gradient.sign()
    flat = gradient.flatten(0, 1)
    if norm == "1":
        size = flat.flatten(1).abs()
        least = size.topk(max(1, round(_SPARSE * size.shape[1])), dim=1).values[:, -1]
        flat = torch.where(flat.abs() >= _column(least, flat), flat.sign(), 0.0)
        return (flat / _column(_sum(flat.abs()), flat)).reshape(gradient.shape)
    return (flat * _column(1 / _norm(flat), flat)).reshape(gradient.shape)


def _projection(region: Region, box: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """x (batch, starts, *input) of these items, moved into their balls. Clamping to the box moves a point no further
    from a centre inside it, so one pass is enough for norms 2 and 1.
    """
    lower, upper = (side[:, None] for side in box)

    def project(x: Tensor, items: Tensor) -> Tensor:
        if isinstance(region, Ball) and region.norm == "2":
            centre = region.centre[items][:, None]
            away = (x - centre).flatten(0, 1)
            # Room for the last rounding to float32, of at most half a unit in the last place a coordinate (values of
            # order one), and for the norm itself, which is read from 2^-20 of the largest entry.
            room = region.radius * (1 - 2.0**-18) - 2.0**-24 * math.sqrt(away[0].numel())
            shrink = (room[items].clamp(min=0).repeat_interleave(x.shape[1]) / _norm(away)).clamp(max=1)
            x = centre + (away * _column(shrink, away)).reshape(x.shape)
        elif isinstance(region, Ball) and region.norm == "1":
            centre = region.centre[items][:, None]
            away = (x - centre).flatten(0, 1)
            room = region.radius * (1 - 2.0**-18) - 2.0**-24 * away[0].numel()
            x = centre + _shrunk(away, room[items].clamp(min=0).repeat_interleave(x.shape[1])).reshape(x.shape)
        return torch.minimum(torch.maximum(x, lower[items]), upper[items])

    return project


def _shrunk(away: Tensor, radius: Tensor) -> Tensor:
    """The nearest point to each row in the l1 ball of its radius around 0: |a| - theta where that is positive, theta
    the least number >= 0 with sum max(0, |a| - theta) <= radius, found among the sorted entries. away: (rows, *shape).
    """
    count = away[0].numel()
    size = _rounded(away, _EXACT - math.ceil(math.log2(max(2, count)))).flatten(1).abs()
    largest = size.sort(dim=1, descending=True).values
    places = torch.arange(1, count + 1, dtype=torch.float64)
    theta = (largest.cumsum(1) - radius[:, None]) / places
    kept = (largest > theta).sum(1).clamp(min=1)
    theta = theta.gather(1, kept[:, None] - 1).clamp(min=0)
    return (away.flatten(1).sign() * (size - theta).clamp(min=0)).reshape(away.shape)


def _sum(x: Tensor) -> Tensor:
    """The sum of each row's numbers, none negative, exact and so the same in any order; never 0. x: (rows, *shape)."""
    rounded = _rounded(x, _EXACT - math.ceil(math.log2(max(2, x[0].numel()))))
    return rounded.flatten(1).sum(1).clamp(min=torch.finfo(torch.float64).tiny ** 0.5)


def _column(value: Tensor, like: Tensor) -> Tensor:
    """One number a row, shaped to multiply `like`."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row, summed exactly and so in any order; never 0. x: (rows, *shape)."""
    rounded = _rounded(x, (_EXACT - math.ceil(math.log2(max(2, x[0].numel())))) // 2)
    return rounded.square().flatten(1).sum(1).sqrt().clamp(min=torch.finfo(torch.float64).tiny ** 0.5)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Each row of x rounded to `bits` binary digits below its largest entry. x: (rows, *shape)."""
    _, exponent = torch.frexp(x.flatten(1).abs().amax(1))
    # Clamped so that a row of (nearly) zeros stays one, far from overflow. Written as bits, since a power computed by
    # a library need not be exact: multiplying and dividing by it then is.
    power = (bits - exponent.long()).clamp(-900, 900)
    unit = _column(((power + 1023) << 52).view(torch.float64), x)
    return (x * unit).round() / unit


@dataclass(frozen=True, eq=False)
class _Surrogate:
    """The network with sums that float64 computes exactly."""

    graph: Graph
    weights: dict[str, Tensor | None]
    biases: dict[str, Tensor | None]
    bits: dict[str, int]

    @classmethod
    def of(cls, graph: Graph) -> _Surrogate:
        exact, biases, bits = {}, {}, {}
        for target, w in weights(graph, torch.float64).items():
            bits[target] = (_EXACT - math.ceil(math.log2(max(2, w.terms)))) // 2
            exact[target] = None if w.weight is None else w.weight
            if w.weight is not None and w.terms > 1:
                exact[target] = _rounded(w.weight[None], bits[target])[0]
            biases[target] = w.constant
        return cls(graph, exact, biases, bits)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """All values at x: (rows, *input)."""
        values = {self.graph.input: x}
        for operation in operations(self.graph):
            given = (values[source] for source in operation.sources)
            values[operation.target] = FORWARD[type(operation)](self, operation, *given)
        return values

    def margin(self, x: Tensor, objective: Objective, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Margin (rows,), largest |output| (rows,) and gradient of the margin (rows, *input), at x: (rows, *input)."""
        values = self.values(x)
        outputs = values[self.graph.output].flatten(1)
        margin, gradient = objective.margin(outputs, items)
        reached = {self.graph.output: gradient.reshape(values[self.graph.output].shape)}
        for operation in reversed(operations(self.graph)):
            above = reached.pop(operation.target, None)
            if above is None:
                continue
            given = [values[source] for source in operation.sources]
            found = BACKWARD[type(operation)](self, operation, above, *given)
            for source, below in zip(operation.sources, found, strict=True):
                known = reached.get(source)
                reached[source] = below if known is None else known + below
        return margin, outputs.abs().amax(1), reached[self.graph.input]


def _forward_linear(surrogate: _Surrogate, operation: Operation, x: Tensor) -> Tensor:
    weight, bias = surrogate.weights[operation.target], surrogate.biases[operation.target]
    if weight is None:
        return MAPS[type(operation)].apply(operation, None, None, x)
    y = MAPS[type(operation)].apply(operation, weight, None, _rounded(x, surrogate.bits[operation.target]))
    return y if bias is None else y + bias


def _backward_linear(surrogate: _Surrogate, operation: Operation, a: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    weight = surrogate.weights[operation.target]
    if weight is not None or isinstance(operation, Pick):  # what moves numbers one by one adds nothing up
        a = _rounded(a, surrogate.bits[operation.target])
    return (MAPS[type(operation)].adjoint(operation, weight, a, tuple(x.shape[1:])),)


def _function(surrogate: _Surrogate, operation: Activation, x: Tensor) -> Tensor:
    # A library may compute the last bit of a function by another path in another place of a tensor: it is cut off.
    return _cut(FUNCTIONS[operation.function](x, *operation.parameters))


def _backward_function(surrogate: _Surrogate, operation: Activation, a: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(FUNCTIONS[operation.function](x, *operation.parameters).sum(), x)
    return (a * _cut(slope),)


def _cut(x: Tensor) -> Tensor:
    return x.float().to(x.dtype)


FORWARD: dict[type[Operation], Callable[..., Tensor]] = {
    **dict.fromkeys(MAPS, _forward_linear),
    Relu: lambda surrogate, operation, x: x.clamp(min=0),
    Activation: _function,
    Sum: lambda surrogate, operation, x, y: operation.factors[0] * x + operation.factors[1] * y,
    Product: lambda surrogate, operation, x, y: x * y,
}

BACKWARD: dict[type[Operation], Callable[..., tuple[Tensor, ...]]] = {
    **dict.fromkeys(MAPS, _backward_linear),
    Relu: lambda surrogate, operation, a, x: (a * (x > 0),),
    Activation: _backward_function,
    Sum: lambda surrogate, operation, a, x, y: (a * operation.factors[0], a * operation.factors[1]),
    Product: lambda surrogate, operation, a, x, y: (a * y, a * x),
}
