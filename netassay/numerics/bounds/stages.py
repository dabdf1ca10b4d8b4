"""A feed-forward chain as linear stages with elementwise activations between them, bounded box by box.

    a_0 = x,   z_i = W_i a_(i-1) + b_i,   a_i = sigma_i(z_i)  (i = 1 .. m),   f(x) = W_(m+1) a_m + b_(m+1)

A stage is all that is linear between two activations. Where its operations are few and small enough they are one
matrix, and a backward pass over a box then uses only the rows and columns of neurons that are not off there: those
that are unstable first, those that are on behind them, each box its own (`Selection`). On an on neuron both lines of a
relaxation are the identity, so the matrices of the lower and of the upper bound are the same there and share a product.
`preactivations` is CROWN (see `backward`) on these; its bounds are the same up to rounding.

Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Activation, Graph, Operation, Relu
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, Weights, tensors
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

#: Elements of the matrices of all stages together: 256 MiB in float64.
LARGEST = 2**25
#: Operations with weights in one stage that are multiplied beforehand: their product is one more order of the same sums
#: (see `netassay.numerics.branch_and_bound.inputs.layers`).
MERGED = 2
#: How a bound computed twice may differ, in units of the a-priori bound on its rounding, which is far above what
#: happens (ACAS Xu 1_1, radius 0.02: differences of 2e-11 where the bound is 1e-7).
NOISE = 8.0


@dataclass(frozen=True, eq=False)
class Stage:
    """steps: (operation, its weights, shape of its source), first to last. terms: products summed into one number, over
    all steps, with their roundings. matrix: (outputs, inputs) or None; absolute: |W_k| ... |W_1| of the steps.
    bias: (outputs,).
    """

    steps: tuple[tuple[Operation, Weights, tuple[int, ...]], ...]
    inputs: int
    outputs: int
    shape: tuple[int, ...]
    terms: int
    matrix: Tensor | None
    absolute: Tensor | None
    bias: Tensor

    @cached_property
    def tall(self) -> Tensor:
        """The matrix with a row of zeros at the end."""
        assert self.matrix is not None
        return torch.nn.functional.pad(self.matrix, (0, 0, 0, 1))

    @cached_property
    def padded(self) -> Tensor:
        """The matrix with a row and a column of zeros at the end: what a selection takes where it has no neuron."""
        assert self.matrix is not None
        return torch.nn.functional.pad(self.matrix, (0, 1, 0, 1))

    def rows(self, v: Tensor, absolute: bool = False) -> Tensor:
        """v W^T, or v |W|^T: (k, inputs) -> (k, outputs)."""
        whole = self.absolute if absolute else self.matrix
        if whole is not None:
            return v @ whole.T
        for operation, w, shape in self.steps:
            v = MAPS[type(operation)].apply(
                operation, w.absolute if absolute else w.weight, None, v.reshape(-1, *shape)
            )
        return v.reshape(len(v), -1)

    def adjoint(self, a: Tensor, absolute: bool = False) -> Tensor:
        """a W, or a |W|: (k, outputs) -> (k, inputs)."""
        whole = self.absolute if absolute else self.matrix
        if whole is not None:
            return a @ whole
        at = self.shape
        for operation, w, shape in reversed(self.steps):
            a = a.reshape(-1, *at)
            a = MAPS[type(operation)].adjoint(operation, w.absolute if absolute else w.weight, a, shape)
            at = shape
        return a.reshape(len(a), -1)


@dataclass(frozen=True, eq=False)
class Stack:
    """stages: one more than activations. Each activation is an operation; its `source` names its pre-activation."""

    stages: tuple[Stage, ...]
    activations: tuple[Operation, ...]

    @property
    def dense(self) -> bool:
        """Whether every stage is one matrix."""
        return all(stage.matrix is not None for stage in self.stages)

    @property
    def block(self) -> int:
        """Boxes that share a pass: as many as have their own copies of the largest matrix in cache, 64 at most."""
        largest = max(stage.inputs * stage.outputs for stage in self.stages)
        return max(1, min(64, backward.COEFFICIENTS // largest)) if self.dense else backward.BLOCK

    @property
    def terms(self) -> int:
        return max(stage.terms for stage in self.stages)


_kept: weakref.WeakKeyDictionary[Graph, dict] = weakref.WeakKeyDictionary()


def of(graph: Graph, dtype: torch.dtype) -> Stack:
    """The stack of a graph, kept as long as the graph lives.

    Raises NotImplementedError naming an operation that is neither a linear map nor elementwise, or a value that is read
    twice.
    """
    kept = _kept.setdefault(graph, {})
    if dtype not in kept:
        kept[dtype] = _built(graph, dtype)
    return kept[dtype]


def _built(graph: Graph, dtype: torch.dtype) -> Stack:
    parts: list[list[tuple[Operation, Weights, tuple[int, ...]]]] = [[]]
    activations: list[Operation] = []
    at = graph.input
    for operation in graph.needed:
        if operation.sources != (at,):
            raise NotImplementedError(f"{operation.name} reads {', '.join(operation.sources)}: the network is no chain")
        if isinstance(operation, Relu | Activation):
            activations.append(operation)
            parts.append([])
        elif type(operation) in MAPS:
            parts[-1].append((operation, tensors(operation, dtype), graph.shape_of(operation.source)))
        else:
            raise NotImplementedError(f"no rule for {type(operation).__name__} ({operation.name})")
        at = operation.target
    ends = [graph.input, *(operation.target for operation in activations)]
    shapes = [graph.shape_of(value) for value in ends]
    sizes = [math.prod(shape) for shape in shapes]
    outputs = [*sizes[1:], math.prod(graph.output_shape)]
    small = sum(n * out for n, out in zip(sizes, outputs, strict=True)) <= LARGEST
    weighted = max(sum(w.weight is not None for _, w, _ in part) for part in parts)
    return Stack(
        tuple(
            _stage(part, shape, small and weighted <= MERGED, dtype) for part, shape in zip(parts, shapes, strict=True)
        ),
        tuple(activations),
    )


def _stage(part: list, shape: tuple[int, ...], merged: bool, dtype: torch.dtype) -> Stage:
    inputs = math.prod(shape)
    bias = torch.zeros(1, *shape, dtype=dtype)
    matrix = absolute = torch.eye(inputs, dtype=dtype) if merged else None
    for operation, w, source in part:
        apply = MAPS[type(operation)].apply
        bias = apply(operation, w.weight, w.bias, bias.reshape(1, *source))
        if matrix is not None and absolute is not None:
            matrix, absolute = (
                apply(operation, of, None, one.T.reshape(-1, *source)).flatten(1).T
                for of, one in ((w.weight, matrix), (w.absolute, absolute))
            )
        shape = operation.shape
    return Stage(
        tuple(part), inputs, math.prod(shape), shape, sum(w.terms + 4 for _, w, _ in part) + 1,
        None if matrix is None else matrix.contiguous(), None if absolute is None else absolute.contiguous(),
        bias.flatten(),
    )  # fmt: skip


# --- relaxations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sides:
    """Which line a coefficient takes, for the lower bound (index 0) and the upper one (1): (batch, neurons, 2) each.

    A coefficient c >= 0 goes on as c (negative + more), another one as c negative; the intercepts likewise.
    """

    negative: Tensor
    more: Tensor
    intercept: Tensor
    intercept_more: Tensor

    @classmethod
    def between(cls, below: tuple[Tensor, Tensor], above: tuple[Tensor, Tensor]) -> Sides:
        """Of the lines slope v + intercept below and above: each (batch, neurons)."""
        positive, negative = torch.stack([below[0], above[0]], 2), torch.stack([above[0], below[0]], 2)
        plus, minus = torch.stack([below[1], above[1]], 2), torch.stack([above[1], below[1]], 2)
        return cls(negative, positive - negative, minus, plus - minus)

    def through(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the values below, and what the intercepts add.

        m: (batch, neurons or more, 1 or 2, rows); 1: the two bounds still share them. Returns (batch, neurons, 2, rows)
        and (batch, 2, rows).
        """
        m = m[:, : self.negative.shape[1]]
        positive = m.clamp(min=0)
        a = torch.addcmul(m * self.negative[..., None], positive, self.more[..., None])
        return a, dot(self.intercept, m) + dot(self.intercept_more, positive)


def dot(v: Tensor, m: Tensor) -> Tensor:
    """Sums over neurons. v: (batch, n, 1 or 2), m: (batch, n, 1 or 2, rows). (batch, the larger of the two, rows)."""
    if m.shape[2] == 1 or v.shape[2] == 1:
        return (v.transpose(1, 2) @ m.flatten(2)).reshape(len(m), -1, m.shape[3])
    return torch.stack([(v[:, None, :, side] @ m[:, :, side])[:, 0] for side in (0, 1)], 1)


def advance(matrix: Tensor, a: Tensor, m: Tensor) -> Tensor:
    """Coefficients through a linear stage: those behind lines, and those of the on neurons, which m has last.

    matrix: (batch, n, neurons), a: (batch, unstable, 2, rows), m: (batch, neurons, 1 or 2, rows), of which the first
    `unstable` are not read. Returns (batch, n, 2, rows).
    """
    unstable = a.shape[1]
    out = torch.bmm(matrix[:, :, :unstable], a.flatten(2))
    if m.shape[2] == 2:
        out.baddbmm_(matrix[:, :, unstable:], m[:, unstable:].flatten(2))
        return out.unflatten(2, (2, -1))
    out = out.unflatten(2, (2, -1))
    if unstable < m.shape[1]:
        out += torch.bmm(matrix[:, :, unstable:], m[:, unstable:, 0])[:, :, None]
    return out


def absolute_sum(m: Tensor) -> Tensor:
    """Sums of |m| over neurons: (batch, n, sides, rows) -> (batch, sides, rows). m holds |m| afterwards."""
    # In place, for its memory is in cache; a vector norm along this axis takes four times as long.
    return m.abs_().sum(1)


@dataclass(frozen=True, eq=False)
class Selection:
    """The neurons of a layer that take part, box by box: (batch, unstable + on) indices; the layer's width stands for
    none. The first `unstable` of them need lines, on the others the activation is the identity.
    """

    index: Tensor
    unstable: int

    @classmethod
    def of(cls, unstable: Tensor, on: Tensor) -> Selection:
        """unstable, on: (batch, width), bool."""
        first = _chosen(unstable)
        return cls(torch.cat([first, _chosen(on)], 1), first.shape[1])

    def take(self, v: Tensor) -> Tensor:
        """v, (batch, width), at the unstable neurons: (batch, unstable), 0 where there is none."""
        return torch.nn.functional.pad(v, (0, 1)).gather(1, self.index[:, : self.unstable])


def gathered(stage: Stage, rows: Tensor, columns: Tensor | None) -> Tensor:
    """Entries of a stage's matrix, zero where an index is its number of rows or columns.

    rows: (batch, r), columns: (batch, c) or None for all. Returns (batch, r, c).
    """
    # By whole rows first: to pick single entries takes five times as long.
    if columns is None:
        return stage.tall.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    whole = stage.padded.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return whole.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))


def _chosen(mask: Tensor) -> Tensor:
    """Where a mask is true, in order: (batch, the most of them in a box), the width where there are fewer."""
    most = int(mask.sum(1).max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(mask.gather(1, order), order, mask.shape[1])


# --- pre-activations --------------------------------------------------------------------------------------------------


def preactivations(graph: Graph, region: Region) -> tuple[dict[str, Interval], Tensor]:
    """Boxes of the values that activations read, by CROWN, and which of them are delicate: (batch,), see `backward`.

    Of a chain of linear maps and ReLU, in the dtype of the region. All are infinite in a box where a bound overflows.
    """
    stack = of(graph, region.centre.dtype)
    with torch.no_grad():
        start = boxes(graph, region)
        if stack.dense:
            parts = []
            for first in range(0, len(region), stack.block):
                which = slice(first, first + stack.block)
                ends = [(low[which], high[which]) for low, high in start.ends]
                parts.append(Forward(stack, region[which], ends, [pad[which] for pad in start.pads]))
            delicate = torch.cat([part.delicate for part in parts])
            places = range(len(stack.activations))
            found = [tuple(torch.cat([part.found[i][end] for part in parts]) for end in (0, 1)) for i in places]
        else:
            none = torch.zeros(1, math.prod(graph.output_shape), dtype=region.centre.dtype)
            whole = backward.lower(graph, region, none)
            delicate, of_all = whole.delicate, [whole.values[operation.source] for operation in stack.activations]
            found = [(box.lower.flatten(1), box.upper.flatten(1)) for box in of_all]
        known = start.finite.clone()
        for ends_ in found:
            known &= torch.isfinite(torch.stack(ends_)).flatten(2).all(2).all(0)
        values = {}
        for operation, (low, high) in zip(stack.activations, found, strict=True):
            low, high = torch.where(known[:, None], low, -torch.inf), torch.where(known[:, None], high, torch.inf)
            shape = (-1, *graph.shape_of(operation.source))
            values[operation.source] = Interval(low.reshape(shape), high.reshape(shape))
        return values, delicate


@dataclass(frozen=True, eq=False)
class Boxes:
    """ends: of each activation the interval bounds of what it reads, (batch, width) each. pads: what rounding may add
    to a backward bound of it, for the region and every part of it, (batch, width). finite: (batch,), whether no bound
    of any value overflowed; elsewhere the ends mean nothing, for a ReLU takes an end of -infinity to 0.
    """

    ends: list[tuple[Tensor, Tensor]]
    pads: list[Tensor]
    finite: Tensor


def boxes(graph: Graph, region: Region) -> Boxes:
    stack = of(graph, region.centre.dtype)
    found = interval.propagate(graph, region)
    lost = rounding.backward(graph, found)
    sources = [operation.source for operation in stack.activations]
    ends = [(found[source].lower.flatten(1), found[source].upper.flatten(1)) for source in sources]
    pads = [lost[source].flatten(1) for source in sources]
    finite = torch.ones(len(region), dtype=torch.bool)
    for end in itertools.chain(*((box.lower, box.upper) for box in found.values()), pads):
        finite &= torch.isfinite(end).flatten(1).all(1)
    return Boxes(ends, pads, finite)


#: (d, m) -> bounds below and above of rows d + m y over the points y of [-1, 1]^n that count; see `Forward.linear`.
Extremes = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


def over_the_box(d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """All points of [-1, 1]^n count. m holds |m| afterwards."""
    half = absolute_sum(m)
    return d[:, 0] - half[:, 0], d[:, 1] + half[:, -1]


class Forward:
    """CROWN of all pre-activations of a ReLU stack over a block of boxes.

    boxes: of each activation, (batch, width) ends that are known beforehand; a neuron of which one sign is known is
    taken to be linear. pads: what rounding may add. found: the bounds, as `boxes`. delicate: (batch,), see `backward`.
    """

    def __init__(
        self, stack: Stack, region: Region, boxes: list[tuple[Tensor, Tensor]], pads: list[Tensor],
        extremes: Extremes = over_the_box,
    ) -> None:  # fmt: skip
        self.stack = stack
        lower, upper = (end.flatten(1) for end in region.box())
        self.centre, self.radius = (lower + upper) / 2, (upper - lower) / 2
        self.delicate = torch.zeros(len(lower), dtype=torch.bool)
        self.found: list[tuple[Tensor, Tensor]] = []
        self.selections: list[Selection] = []
        # Transposed: from the coefficients of these neurons to those before. Constants: biases, and the centre's share.
        self.matrices: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.lines: list[Sides] = []
        for place, stage in enumerate(stack.stages[:-1]):
            low, high = boxes[place]
            noise = NOISE * pads[place]
            if place:
                low, high = _step(stage, *self.found[-1], low, high)
                self.delicate |= _near(low, high, noise, low, high)
            if place or extremes is not over_the_box:
                low, high = self._tightened(place, low, high, pads[place], extremes)
            self.delicate |= _near(low, high, noise, low + high, low, high)
            self.found.append((low, high))
            if place + 1 < len(stack.stages) - 1:
                self._select(place)

    def _select(self, place: int) -> None:
        stage, (low, high) = self.stack.stages[place], self.found[place]
        chosen = Selection.of((low < 0) & (high > 0), low >= 0)
        line = backward.Lines.of(Interval(chosen.take(low), chosen.take(high)))
        matrix = gathered(stage, chosen.index, self.selections[-1].index if self.selections else None)
        constant = torch.nn.functional.pad(stage.bias, (0, 1))[chosen.index]
        if not place:
            constant = constant + (matrix @ self.centre[:, :, None])[:, :, 0]
            matrix *= self.radius[:, None]
        self.matrices.append(matrix.transpose(1, 2))
        self.constants.append(constant[:, :, None])
        self.selections.append(chosen)
        self.lines.append(Sides.between((line.alpha, torch.zeros_like(line.alpha)), (line.slope, line.intercept)))

    def _tightened(
        self, place: int, low: Tensor, high: Tensor, pad: Tensor, extremes: Extremes
    ) -> tuple[Tensor, Tensor]:
        low, high = low.clone(), high.clone()
        for rows, own in _rows(low, high, self.stack.stages[place], self.centre.shape[1]):
            below, above = extremes(*self.linear(place, rows))
            slack = pad.gather(1, rows)
            for end, value, better in ((low, below - slack, torch.maximum), (high, above + slack, torch.minimum)):
                known = end.gather(1, rows)
                end.scatter_(1, rows, torch.where(own & ~torch.isnan(value), better(known, value), known))
        return low, high

    def linear(self, place: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Linear bounds of pre-activations in y = (x - centre) / radius, without what rounding adds.

        rows: (batch, rows), neurons of activation `place`. Returns d, (batch, 2, rows), and m, (batch, inputs, 2, rows)
        or with 1 for 2 where both bounds are the same: d + m y is below at side 0, above at side 1.
        """
        stage = self.stack.stages[place]
        d = stage.bias[rows][:, None]
        if not place:
            m = stage.tall[rows].transpose(1, 2)[:, :, None]
            return (d + dot(self.centre[:, :, None], m)).expand(-1, 2, -1), m * self.radius[:, :, None, None]
        m = gathered(stage, rows, self.selections[place - 1].index).transpose(1, 2).contiguous()[:, :, None]
        for j in range(place - 1, -1, -1):
            unstable, constant = self.selections[j].unstable, self.constants[j]
            a, added = self.lines[j].through(m)
            d = d + added + dot(constant[:, :unstable], a) + dot(constant[:, unstable:], m[:, unstable:])
            m = advance(self.matrices[j], a, m)
        return d, m


def _near(low: Tensor, high: Tensor, noise: Tensor, *choices: Tensor) -> Tensor:
    """Whether the sign of a choice is open to rounding in some neuron of a box, and matters: (batch,), bool."""
    matters = (high > -noise) & (low < noise) & (high - low > 4 * noise)
    near = torch.zeros_like(matters)
    for choice in choices:
        near |= choice.abs() <= noise
    return (near & matters).any(1)


def _step(stage: Stage, low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The box [lower, upper] of a stage's outputs, cut with what the bounds of the pre-activations before it give."""
    assert stage.matrix is not None
    assert stage.absolute is not None
    low, high = low.clamp(min=0), high.clamp(min=0)
    centre, radius = (low + high) / 2, (high - low) / 2
    g = 4 * rounding.gamma(stage.terms + 8, low.dtype)
    middle = torch.addmm(stage.bias, centre, stage.matrix.T)
    half = (radius + g * (radius + centre.abs())) @ stage.absolute.T
    half += g * stage.bias.abs() + 4 * stage.terms * rounding.smallest(low.dtype)
    return torch.maximum(lower, middle - half), torch.minimum(upper, middle + half)


def _rows(low: Tensor, high: Tensor, stage: Stage, widest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The unstable neurons of each box, (batch, rows), in portions whose coefficients stay in cache; and which of them
    are there for a neighbour only."""
    own = (low < 0) & (high > 0)
    most = int(own.sum(1).max())
    if not most:
        return
    order = own.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    widest = max(widest, stage.inputs)
    for rows in order.split(max(1, backward.COEFFICIENTS // (2 * widest * len(low))), dim=1):
        yield rows, own.gather(1, rows)
