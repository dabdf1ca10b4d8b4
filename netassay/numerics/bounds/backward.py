"""Backward linear bounds (CROWN): f(x) >= A x + d over a region, by walking the graph from its output to its input.

With pre-activation bounds l < 0 < u of a neuron z, ReLU lies between two lines,

    alpha z  <=  relu(z)  <=  s z + t,      s = u / (u - l),   t = -s l,   alpha = 1 where u > -l, else 0 (adaptive);

a coefficient A >= 0 takes the lower line, A < 0 the upper one. Other functions lie between two lines too, a product of
two values between planes (`relaxations`), and a value that several operations read collects the coefficients of each.
At the input A x + d is minimised over the region. The pre-activation bounds come from the same pass
(`intermediates="backward"`, CROWN) or from boxes (`"interval"`, CROWN-IBP); either way they are cut with the box
propagated from the bounds before, and of a ReLU's input only neurons that the box leaves unstable get a backward pass:
the lines of a stable neuron do not depend on its bounds. (Those of other functions, and planes, do.)

All bounds include the rounding of the pass itself (`rounding`): they hold in real arithmetic. With `evaluated` they
also hold for every evaluation of the network in that dtype: such a network has each value moved by a small local error,
an input like any other, which costs |A| times that error at each operation.

Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018. (Theorem 3.2, table 2, section 3.3.) CROWN-IBP: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh.
Towards stable and efficient training of verifiably robust neural networks. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netassay.heavy import torch
from netassay.networks.graph import Activation, Dense, Graph, Operation, Pick, Product, Relu, Sum
from netassay.numerics.bounds import interval, relaxations, rounding, stack
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, Weights, operations, weights
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
    """Two lines, alpha z + below <= f(z) <= slope z + intercept: each (batch, *shape); below None: 0.

    alpha may be (batch, rows, *shape) too: a slope of its own for each row.
    """

    alpha: Tensor
    slope: Tensor
    intercept: Tensor
    below: Tensor | None = None

    @classmethod
    def of(cls, z: Interval, flat: bool = False) -> Lines:
        """Adaptive lines of a ReLU over z, or where `flat` with lower slope 0; exact (0 or the identity) where z is
        stable.
        """
        low, up = z.lower.clamp(max=0), z.upper.clamp(min=0)
        # 0/0 at a neuron that is constantly zero: any line does, and 0 is exact.
        slope = torch.where(z.upper > 0, up / (up - low).clamp(min=rounding.smallest(up.dtype)), 0.0).clamp(max=1)
        # The line must pass above both corners (l, 0) and (u, u), whatever the rounding of the slope.
        intercept = torch.maximum(-slope * low, up - slope * up)
        alpha = (up > 0) & (low >= 0) if flat else up > -low
        return cls(alpha.to(up.dtype), slope, intercept)


@dataclass(frozen=True, eq=False)
class Planes:
    """below[0] x + below[1] y + below[2]  <=  x y  <=  above[0] x + above[1] y + above[2]; each (batch, *shape)."""

    below: tuple[Tensor, Tensor, Tensor]
    above: tuple[Tensor, Tensor, Tensor]


Relaxation = Lines | Planes


def relaxation(
    operation: Operation, values: Mapping[str, Interval], whole: Mapping[str, Interval], flat: bool = False
) -> Relaxation | None:
    """What a pass puts in the place of an operation over these boxes; None for a linear one.

    whole: the boxes that its rounding was told of (`rounding.backward`), no smaller. flat: see `Lines.of`.
    """
    x = values[operation.source]
    match operation:
        case Relu():
            return Lines.of(x, flat)
        case Activation():
            found = relaxations.lines(operation.function, operation.parameters, x.lower, x.upper)
            lines = Lines(found.lower_slope, found.upper_slope, found.upper_intercept, found.lower_intercept)
            return _flattened(
                operation, lines, x, ~torch.isfinite(rounding.steepness(operation, whole[operation.source]))
            )
        case Product():
            y = values[operation.other]
            p = relaxations.mccormick(x.lower, x.upper, y.lower, y.upper)
            return Planes((p.lower_x, p.lower_y, p.lower_constant), (p.upper_x, p.upper_y, p.upper_constant))
    return None


def _flattened(operation: Activation, lines: Lines, x: Interval, where: Tensor) -> Lines:
    """Constant lines in some places: of a steeper one than `rounding` knows nothing could be said."""
    if not bool(where.any()):
        return lines
    low, high = relaxations.image(operation.function, operation.parameters, x.lower, x.upper)
    assert lines.below is not None
    return Lines(
        torch.where(where, 0.0, lines.alpha),
        torch.where(where, 0.0, lines.slope),
        torch.where(where, high, lines.intercept),
        torch.where(where, low, lines.below),
    )


#: Coefficients of an operation's target turned into those of its sources: one a source, in their order.
Sources = tuple[Linear, ...]


def _linear(operation: Operation, row: Linear, w: Weights, shape: tuple[int, ...], lines: None) -> Sources:
    a = MAPS[type(operation)].adjoint(operation, w.weight, row.a.flatten(0, 1), shape)
    d = row.d if w.constant is None else row.d + row.a.flatten(2) @ w.constant.flatten()
    return (Linear(a.reshape(*row.a.shape[:2], *shape), d),)


def _between(operation: Operation, row: Linear, w: Weights, shape: tuple[int, ...], lines: Lines) -> Sources:
    positive = row.a.clamp(min=0)
    alpha, slope = by_row(lines.alpha, row.a), lines.slope[:, None]
    # A s + A+ (alpha - s) is A+ alpha + A- s. Sign-correct in floating point too: one of the two terms decides.
    a = torch.addcmul(row.a * slope, positive, alpha - slope)
    # sum of A- t over the neurons, and of A+ times the lower line's.
    d = row.d + _contract(row.a, lines.intercept) - _contract(positive, lines.intercept)
    return (Linear(a, d if lines.below is None else d + _contract(positive, lines.below)),)


def _sum(operation: Sum, row: Linear, w: Weights, shape: tuple[int, ...], lines: None) -> Sources:
    first, second = operation.factors
    return Linear(row.a * first, row.d), Linear(row.a * second, torch.zeros_like(row.d))


def _product(operation: Product, row: Linear, w: Weights, shape: tuple[int, ...], planes: Planes) -> Sources:
    positive = row.a.clamp(min=0)
    negative = row.a - positive
    one, two = (
        positive * low[:, None] + negative * up[:, None]
        for low, up in zip(planes.below[:2], planes.above[:2], strict=True)
    )
    d = row.d + _contract(positive, planes.below[2]) + _contract(negative, planes.above[2])
    return Linear(one, d), Linear(two, torch.zeros_like(d))


def by_row(v: Tensor, a: Tensor) -> Tensor:
    """v, (batch, *shape) or (batch, rows, *shape), against coefficients a, (batch, rows, *shape)."""
    return v if v.dim() == a.dim() else v[:, None]


def _contract(a: Tensor, v: Tensor) -> Tensor:
    """sum a v over all axes but two: (batch, rows). a: (batch or 1, rows, *shape), v: (batch or 1, *shape)."""
    a, v = a.flatten(2), v.flatten(1)
    if len(a) == 1:
        return v @ a[0].T
    return a @ v[0] if len(v) == 1 else torch.bmm(a, v[:, :, None])[:, :, 0]


RULES: dict[type[Operation], Callable[..., Sources]] = {
    **dict.fromkeys(MAPS, _linear),
    Relu: _between,
    Activation: _between,
    Sum: _sum,
    Product: _product,
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
    block: int | None = None,
    flat: bool = False,
) -> Lower:
    """Lower bounds of C f(x), C the `rows`, over each ball of the region.

    rows: (rows, outputs) or (batch, rows, outputs), outputs flattened. Computed in the dtype of the region.
    evaluated: the bounds also hold for every evaluation of the network in this dtype (C f is taken exactly).
    flat: the lower lines of unstable ReLUs have slope 0, with which no bound is looser than the box's.
    Raises NotImplementedError where the graph has an operation without a rule.
    """
    if block is None:
        dense = intermediates == "backward" and stack.of(graph, region.centre.dtype) is not None
        block = stack.block(graph, rows.shape[-2]) if dense else BLOCK
    with torch.no_grad():
        parts = [
            _lower(
                graph,
                region[which] if len(region) > block else region,
                rows[None] if rows.dim() == 2 else rows[which],
                intermediates,
                evaluated,
                flat,
            )
            for which in _blocks(len(region), block)
        ]
    return joined(parts) if len(parts) > 1 else parts[0]


def bounds(
    graph: Graph,
    region: Region,
    *,
    intermediates: Intermediates = "backward",
    evaluated: torch.dtype | None = None,
    block: int | None = None,
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
    """Lower bounds of C f(x) by boxes alone: C is folded into the linear maps at the end (Gowal et al. 2018, section 3,
    "elision of the last layer"), up to an operation on two values, then minimised over the box before them.

    values: of `interval.propagate`, for the same `evaluated`. rows: (batch, rows, outputs). Returns (batch, rows).
    """
    with torch.no_grad():
        row, at = Linear(rows.unflatten(2, graph.output_shape), rows.new_zeros(rows.shape[:2])), graph.output
        of_graph = weights(graph, rows.dtype)
        for operation in reversed(operations(graph)):
            if type(operation) not in MAPS:
                break
            at, w = operation.source, of_graph[operation.target]
            if evaluated is not None:
                none = {at: torch.zeros_like(values[at].lower)}
                row = _shifted(row, rounding.evaluation(operation, w, values, none, evaluated)[0])
            (row,) = _linear(operation, row, w, graph.shape_of(at), None)
        box = values[at]
        middle, half = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        least = row.d + _contract(row.a, middle) - _contract(row.a.abs(), half)
        return _proved(least - _contract(rows.abs(), rounding.backward(graph, values)[graph.output]))


def _blocks(total: int, block: int) -> Iterator[slice]:
    for start in range(0, total, block):
        yield slice(start, start + block)


def joined(parts: Sequence[Lower]) -> Lower:
    """Bounds of blocks as one."""
    values = {
        name: Interval(
            torch.cat([p.values[name].lower for p in parts]), torch.cat([p.values[name].upper for p in parts])
        )
        for name in parts[0].values
    }
    together = (torch.cat([getattr(part, name) for part in parts]) for name in ("lower", "a", "noise", "delicate"))
    least, a, noise, delicate = together
    return Lower(least, a, values, noise, delicate)


def _proved(lower: Tensor) -> Tensor:
    """Lower bounds of which those that overflowed, in whatever direction, say nothing."""
    return torch.where(torch.isfinite(lower), lower, -torch.inf)


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _shifted(row: Linear, local: Tensor | None) -> Linear:
    """The row where its value may have moved by `local`."""
    return row if local is None else Linear(row.a, row.d - _contract(row.a.abs(), local))


def _lower(
    graph: Graph,
    region: Region,
    rows: Tensor,
    intermediates: Intermediates,
    evaluated: torch.dtype | None,
    flat: bool,
) -> Lower:
    """One block. rows: (batch or 1, rows, outputs)."""
    block = relaxed(graph, region, intermediates, evaluated, flat=flat)
    row = walk(graph, rows.unflatten(2, graph.output_shape), graph.output, block.lines, local=block.local)
    return concretised(graph, region, rows, row, block)


def concretised(graph: Graph, region: Region, rows: Tensor, row: Linear, block: Block) -> Lower:
    """What the linear bound `row` of `rows`, (batch or 1, rows, outputs), comes to over the region."""
    pad = _contract(rows.abs(), block.rounding[graph.output])
    least = _proved(row.d + region.minimum(row.a.flatten(2)) - pad)
    noise = NOISE * len(graph.operations) * pad.amax(1)
    return Lower(least, row.a.expand(len(region), *row.a.shape[1:]), block.values, noise, block.delicate)


@dataclass(frozen=True, eq=False)
class Block:
    """What a walk needs to know of a block of boxes, by name of the value.

    values: boxes. lines: what stands for operations that are not linear, by their target. local: errors of evaluation.
    rounding: of the pass itself.
    delicate: (batch,), bool, see `Lower`.
    """

    values: dict[str, Interval]
    lines: dict[str, Relaxation]
    local: dict[str, Tensor | None]
    rounding: dict[str, Tensor]
    delicate: Tensor


#: (value, its box, what is known before it, what rounding may add to a bound of it) -> a smaller box.
Refine = Callable[[str, Interval, "Block", "Tensor"], Interval]


def relaxed(
    graph: Graph,
    region: Region,
    intermediates: Intermediates = "backward",
    evaluated: torch.dtype | None = None,
    refine: Refine | None = None,
    flat: bool = False,
) -> Block:
    """Boxes and lines of a block, layer by layer: each layer is bounded with the lines of those before it.

    refine: tightens further what a ReLU, function or product reads, before it is relaxed. flat: see `Lines.of`.
    """
    dense = stack.of(graph, region.centre.dtype) if intermediates == "backward" else None
    if dense is not None and dense.plain and region.norm == "inf" and evaluated is None and not flat:
        return _of_stack(graph, region, dense, refine)
    of_graph = weights(graph, region.centre.dtype)
    steps = operations(graph)
    before_relu = {operation.source for operation in steps if isinstance(operation, Relu)}
    before_others = {
        _without_copies(graph, of)
        for operation in steps
        if isinstance(operation, Activation | Product)
        for of in operation.sources
    }
    boxes = interval.propagate(graph, region, evaluated)
    none = torch.zeros(len(region), dtype=torch.bool)
    block = Block({graph.input: boxes[graph.input]}, {}, {}, rounding.backward(graph, boxes), none)
    values = block.values
    # The input's own rounding to the evaluated dtype is part of the question only where the caller's points are.
    error = {graph.input: torch.zeros_like(boxes[graph.input].lower)}
    # How often coordinates were mixed: through the first linear map that does, a box is exact.
    mixed = {graph.input: 0}
    passes = None if dense is None else stack.Pass(dense, region)
    for operation in steps:
        target, w = operation.target, of_graph[operation.target]
        if (lines := relaxation(operation, values, boxes, flat)) is not None:
            block.lines[target] = lines
            if passes is not None:
                assert isinstance(lines, Lines)
                passes.told(lines.alpha, lines.slope, lines.intercept)
        x = interval.step(operation, values, w, evaluated)
        if evaluated is not None:
            block.local[target], error[target] = rounding.evaluation(operation, w, values, error, evaluated)
        mixed[target] = mixed[operation.source] + (w.terms > 1)
        if len(operation.sources) > 1 or (isinstance(operation, Pick) and w.terms > 1):
            mixed[target] = 2  # one coordinate may be there twice
        if target in before_relu or target in before_others:
            noise = NOISE * len(steps) * block.rounding[target]
            if intermediates == "backward" and mixed[target] > 1:
                block.delicate.logical_or_(_near(x, noise, x.lower, x.upper))
                slack = block.rounding[target] + (error[target] if evaluated is not None else 0)
                if passes is not None and passes.sides:
                    x = _stacked(passes, passes.stack.before[target], x, slack)
                else:
                    x = _tightened(graph, region, target, x, block, slack, target in before_others)
                if refine is not None:
                    x = refine(target, x, block, slack)
            block.delicate.logical_or_(_near(x, noise, x.lower + x.upper))
        values[target] = x
    return block


def _without_copies(graph: Graph, value: str) -> str:
    """The value that this one repeats numbers of, if it does: a bound of each number is enough."""
    of = next((operation for operation in operations(graph) if operation.target == value), None)
    if isinstance(of, Pick) and of.indices.size > _size(graph.shape_of(of.source)):
        return of.source
    return value


def _of_stack(graph: Graph, region: Region, dense: stack.Stack, refine: Refine | None) -> Block:
    """`relaxed` for dense layers with ReLUs between them, in exact arithmetic, over boxes; in fewer steps.

    The error bounds of `rounding` and `interval` are one product with |W|, and see the tightened boxes of the values
    before them: every coefficient and intercept they are about is of lines over these.
    """
    steps, box = operations(graph), region.box()
    passes, low, high = stack.Pass(dense, region, box), box[0].flatten(1), box[1].flatten(1)
    dtype, boxes, tiny = low.dtype, len(low), rounding.smallest(low.dtype)
    terms = max(w.terms for w in weights(graph, dtype).values())
    g, underflow = rounding.gamma(terms + 8 * len(steps) + 16, dtype), 4 * terms * tiny
    size = torch.maximum(-low, high)
    error, lost = 2 * g * size, underflow * size.sum(1, keepdim=True)
    whole = 2 * (error + lost)
    block = Block({graph.input: Interval(*box)}, {}, {}, {graph.input: whole.reshape(box[0].shape)}, lost[:, 0] < 0)
    number, near = -1, []
    for operation in steps:
        at, shape = operation.target, (boxes, *operation.shape)
        if isinstance(operation, Relu):
            lines = Lines.of(Interval(low, high))
            passes.told(lines.alpha, lines.slope, lines.intercept)
            block.lines[at] = Lines(*(side.reshape(shape) for side in (lines.alpha, lines.slope, lines.intercept)))
            size = torch.maximum(-low, high)
            # What underflows here, and in the map after it, whose values are no larger.
            lost = torch.add(lost, size.sum(1, keepdim=True), alpha=2 * underflow)
            error = torch.add(error, size, alpha=2 * g) + underflow
            low, high = low.clamp(min=0), high.clamp(min=0)
            size, whole = high, 2 * (error + lost)
        elif isinstance(operation, Dense):
            number += 1
            layer = dense.layers[number]
            own = 4 * rounding.gamma(layer.seen + 8, dtype)
            radius = (high - low) / 2
            middle = passes.middle if number == 0 else torch.addmm(layer.bias, low + radius, layer.weight.T)
            # |W| meets the radii, with what rounding makes of them, and the errors so far.
            both = torch.cat([torch.add(radius, size, alpha=own), torch.add(error, size, alpha=g)])
            bias = layer.bias.abs()
            half, error = (both @ layer.across.T).chunk(2)
            half, error = half.add(bias, alpha=own).add_(underflow), error.add(bias, alpha=g).add_(underflow)
            low, high = middle - half, middle + half
            whole = 2 * (error + lost)
            if number < len(dense.layers) - 1:
                noise = NOISE * len(steps) * whole
                wide = 4 * noise
                if number:
                    near.append((torch.minimum(low.abs(), high.abs()) <= noise) & (high - low > wide))
                    x = _stacked(passes, number, Interval(low, high), whole)
                    if refine is not None:
                        x = Interval(x.lower.reshape(shape), x.upper.reshape(shape))
                        x = refine(at, x, block, whole.reshape(shape))
                    low, high = x.lower.flatten(1), x.upper.flatten(1)
                near.append(((low + high).abs() <= noise) & (high - low > wide))
        block.values[at] = Interval(low.reshape(shape), high.reshape(shape))
        block.rounding[at] = whole.reshape(shape)
    # As `_near` has it: an end so near to 0, or ends so near to opposite, matter where the box is wide.
    block.delicate.logical_or_(torch.cat(near, 1).any(1))
    return block


def _near(x: Interval, noise: Tensor, *choices: Tensor) -> Tensor:
    """Whether the sign of a choice is open to rounding in some neuron of a box, and matters: (batch,), bool."""
    matters = (x.upper > -noise) & (x.lower < noise) & (x.upper - x.lower > 4 * noise)
    near = torch.zeros_like(matters)
    for choice in choices:
        near |= choice.abs() <= noise
    return (near & matters).flatten(1).any(1)


def _tightened(
    graph: Graph, region: Region, at: str, x: Interval, block: Block, slack: Tensor, every: bool
) -> Interval:
    """x cut by backward bounds of those of its neurons that are unstable, in each box its own; every: of all of them.

    A row is computed for the whole block where one box needs it, but a box in which it is stable makes no use of it:
    what is known of a box must not depend on its neighbours.
    """
    own = torch.ones_like(x.lower, dtype=torch.bool) if every else (x.lower < 0) & (x.upper > 0)
    for which, start in unit_rows(graph, at, own, len(region), x.lower.dtype):
        # Errors of evaluation are in the slack here, as e: cheaper than |A| local for so many rows.
        row = walk(graph, start, at, block.lines)
        x = cut(x, which, row.d + region.minimum(row.a.flatten(2)), slack, own)
    return x


def _stacked(passes: stack.Pass, number: int, x: Interval, slack: Tensor) -> Interval:
    """`_tightened` for a stack of dense layers."""
    low, high = passes.hidden(number, ((x.lower < 0) & (x.upper > 0)).flatten(1))
    low, high = _proved(low.reshape(x.lower.shape)), -_proved(-high.reshape(x.lower.shape))
    return Interval(torch.maximum(x.lower, low - slack), torch.minimum(x.upper, high + slack))


def unit_rows(graph: Graph, at: str, wanted: Tensor, boxes: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of neurons of a value, wanted in any box, (neurons,), and the rows that ask for z and for -z of each,
    (1, 2 neurons, *shape of at); as many at once as `COEFFICIENTS` allow. wanted: (batch, *shape of at), bool.
    """
    size = wanted[0].numel()
    widest = max(_size(graph.input_shape), *(_size(operation.shape) for operation in operations(graph)))
    neurons = wanted.flatten(1).any(0).nonzero()[:, 0]
    if not len(neurons):
        return  # split would give one empty run
    for which in neurons.split(max(1, COEFFICIENTS // (2 * widest * boxes))):
        one = torch.zeros(len(which), size, dtype=dtype)
        one[torch.arange(len(which)), which] = 1
        yield which, torch.cat([one, -one])[None].unflatten(2, graph.shape_of(at))


def cut(x: Interval, which: Tensor, least: Tensor, slack: Tensor, own: Tensor) -> Interval:
    """x cut, where `own` says, by lower bounds of the rows of `unit_rows`, (batch, 2 neurons), less `slack`."""
    below, above = _proved(least).chunk(2, dim=1)
    low, high = x.lower.flatten(1).clone(), x.upper.flatten(1).clone()
    slack, own = slack.flatten(1)[:, which], own.flatten(1)[:, which]
    # `below` bounds z from below, `above` bounds -z from below.
    low[:, which] = torch.where(own, torch.maximum(low[:, which], below - slack), low[:, which])
    high[:, which] = torch.where(own, torch.minimum(high[:, which], slack - above), high[:, which])
    return Interval(low.reshape(x.lower.shape), high.reshape(x.upper.shape))


def walk(
    graph: Graph,
    rows: Tensor,
    at: str,
    lines: Mapping[str, Relaxation],
    *,
    local: Mapping[str, Tensor | None] | None = None,
    added: Mapping[str, Tensor] | None = None,
    caught: dict[str, Tensor] | None = None,
) -> Linear:
    """The linear bound of `rows` of the value `at`, in terms of the input. Differentiable in lines and `added`.

    rows: (batch or 1, rows, *shape of at). lines: what stands for operations that are not linear, by their target.
    local: errors of evaluation, by value. added: coefficients that join those of a value, by name: (batch, *shape), or
    (batch, rows, *shape). caught: filled with the coefficients that such operations' targets had, by name.
    """
    of_graph, added = weights(graph, rows.dtype), added or {}
    reached = {at: Linear(rows, rows.new_zeros(rows.shape[:2]))}
    for operation in reversed(operations(graph)):
        row = reached.pop(operation.target, None)
        if row is None:
            continue
        w, shape, line = of_graph[operation.target], graph.shape_of(operation.source), lines.get(operation.target)
        if (more := added.get(operation.target)) is not None:
            row = Linear(row.a + by_row(more, row.a), row.d)
        if caught is not None and line is not None:
            caught[operation.target] = row.a
        row = _shifted(row, local.get(operation.target) if local else None)
        for source, part in zip(operation.sources, RULES[type(operation)](operation, row, w, shape, line), strict=True):
            known = reached.get(source)
            reached[source] = part if known is None else Linear(known.a + part.a, known.d + part.d)
    row = reached[graph.input]
    if (more := added.get(graph.input)) is not None:
        row = Linear(row.a + by_row(more, row.a), row.d)
    return row
