"""Backward linear bounds of a stack of dense layers with ReLUs between them, with as little arithmetic as they allow.

The same bounds as the general pass of `backward`, but for rounding; of every box only its own unstable neurons are
asked for. A neuron of layer k, z = w y + b, is bounded from below and from above at once. With the lines of the ReLU
before it, alpha z <= y <= s z + t, and p = (s + alpha) / 2, q = (s - alpha) / 2, |p| + |q| <= 1,

    w y  >=  (w p - |w| q) z + w t/2 - |w| t/2,      w y  <=  (w p + |w| q) z + w t/2 + |w| t/2,

so through that ReLU both sides come of two products, of w p over the neurons that are not off, and of |w| q over the
unstable ones alone. Every further ReLU takes a coefficient a to a p -+ |a| q, lower sides with the minus, upper ones
with the plus. Constant terms are sums over neurons, not over coefficients of the input: those of the first step are one
product for all boxes and neurons, and those of the last hold the image of the box's centre.

Boxes that need about as many rows share a pass, the shorter ones filled up; wide layers take box by box, without the
columns that are off in it.

Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Dense, Graph, Relu, Reshape, Scale
from netassay.numerics.bounds.linear import Weights, operations, weights
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

#: Operations with weights that one layer may be the product of: their roundings are within what `rounding` allows for.
MERGED = 2
#: Bytes of the coefficients of one side of a pass, boxes x rows x width: they should stay in a core's cache.
BYTES = 1 << 20
#: Boxes of a block, at least and at most.
FEWEST, MOST = 16, 256
#: Up to this width, the layers of a single box are scaled, and not the coefficients.
NARROW = 256
#: A pass of several boxes leaves out columns that are off in all of them where so large a share of them is.
SPARSE = 0.1


@dataclass(frozen=True, eq=False)
class Layer:
    """z = weight x + bias of flattened values: (outputs, inputs), (outputs,). across: |weight|.
    columns, sizes: the transposes of weight and |weight|.

    seen: the most terms of a sum, of the operation itself; 0 for the product of several.
    """

    weight: Tensor
    bias: Tensor
    across: Tensor
    columns: Tensor
    sizes: Tensor
    seen: int


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers of a network, first to last, a ReLU between each two. before: number of a layer by the value its ReLU
    reads, and the output; after: the ReLUs' targets.
    """

    layers: tuple[Layer, ...]
    before: dict[str, int]
    after: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether every layer is one operation."""
        return all(layer.seen for layer in self.layers)


def block(graph: Graph, rows: int) -> int:
    """How many boxes share what is not a pass over hidden neurons."""
    widest = max(math.prod(graph.input_shape), *(math.prod(operation.shape) for operation in operations(graph)))
    return max(FEWEST, min(MOST, BYTES // (4 * rows * widest)))


_kept: weakref.WeakKeyDictionary[Graph, dict] = weakref.WeakKeyDictionary()


def of(graph: Graph, dtype: torch.dtype) -> Stack | None:
    """The network as a stack, None where it is none. Kept as long as the graph lives."""
    of_graph = _kept.setdefault(graph, {})
    if dtype not in of_graph:
        of_graph[dtype] = _made(graph, dtype)
    return of_graph[dtype]


def _made(graph: Graph, dtype: torch.dtype) -> Stack | None:
    found: list[Layer] = []
    before: dict[str, int] = {}
    after: list[str] = []
    pending: list[Dense | Scale] = []
    of_graph, at = weights(graph, dtype), graph.input
    for operation in operations(graph):
        if operation.source != at or not isinstance(operation, Dense | Reshape | Scale | Relu):
            return None
        if isinstance(operation, Dense) and len(operation.shape) != 1:
            return None  # the same matrix on each row of a value: no layer
        if isinstance(operation, Relu):
            layer = _merged(pending, of_graph)
            if layer is None:
                return None
            before[at] = len(found)
            found.append(layer)
            after.append(operation.target)
            pending = []
        elif not isinstance(operation, Reshape):
            pending.append(operation)
        at = operation.target
    layer = _merged(pending, of_graph)
    if layer is None or not found:
        return None
    before[at] = len(found)
    return Stack((*found, layer), before, tuple(after))


def _merged(pending: Sequence[Dense | Scale], of_graph: Mapping[str, Weights]) -> Layer | None:
    """The operations between two ReLUs as one layer; None where none is dense, or the product is the larger one."""
    if not 0 < len(pending) <= MERGED or not any(isinstance(operation, Dense) for operation in pending):
        return None
    matrix: Tensor | None = None
    bias: Tensor | float = 0.0
    elements = 0
    for operation in pending:
        w = of_graph[operation.target]
        assert w.weight is not None
        assert w.constant is not None
        elements += w.weight.numel()
        if isinstance(operation, Scale):
            scale = w.weight.flatten()
            bias = bias * scale + w.constant.flatten()
            matrix = scale.diag() if matrix is None else matrix * scale[:, None]
        else:
            bias = w.constant if matrix is None else w.weight @ bias + w.constant
            matrix = w.weight if matrix is None else w.weight @ matrix
    assert matrix is not None
    assert not isinstance(bias, float)
    seen = of_graph[pending[0].target].terms if len(pending) == 1 else 0
    if matrix.numel() > elements:
        return None
    matrix, size = matrix.contiguous(), matrix.abs()
    return Layer(matrix, bias, size, matrix.T.contiguous(), size.T.contiguous(), seen)


@dataclass(frozen=True, eq=False)
class Sides:
    """The lines of a layer's ReLUs, (batch, neurons) each: p, q, and half = t/2, zero where the neuron is off."""

    p: Tensor
    q: Tensor
    half: Tensor

    def __getitem__(self, which: slice | Tensor) -> Sides:
        return Sides(self.p[which], self.q[which], self.half[which])


@dataclass(frozen=True, eq=False)
class Step:
    """A layer and the ReLU behind it on one box, as a matrix: it takes (a, -+|a| of its unstable neurons, d) to (a, d)
    of the neurons before. alive: the neurons that are not off, the unstable ones first.

        (p W, p b + t/2)
        (q W, q b + t/2)
        (0, 1)
    """

    matrix: Tensor
    alive: Tensor
    unstable: int


class Pass:
    """Passes over a block of boxes. Layers' lines are told in their order (`told`), after their bounds are known."""

    def __init__(self, stack: Stack, region: Region, box: tuple[Tensor, Tensor] | None = None) -> None:
        self.stack, self.region = stack, region
        self.sides: list[Sides] = []
        self.room: Tensor | None = None
        lower, upper = (end.flatten(1) for end in box or region.box())
        self.radius = (upper - lower) / 2
        widest = max(max(layer.weight.shape) for layer in stack.layers)
        #: Of a single box in a narrow network, the matrices of the layers told.
        self.steps: list[Step] = []
        self.single = len(region) == 1 and region.norm == "inf" and widest <= NARROW
        first = stack.layers[0]
        #: The constant term before the first ReLU: with boxes it holds the image of the centre.
        self.boxed = region.norm == "inf"
        self.middle = (
            torch.addmm(first.bias, (lower + upper) / 2, first.weight.T)
            if self.boxed
            else first.bias.expand(len(region), -1)
        )

    def told(self, alpha: Tensor, slope: Tensor, intercept: Tensor) -> None:
        alpha, slope = alpha.flatten(1), slope.flatten(1)
        self.sides.append(Sides((slope + alpha) / 2, (slope - alpha) / 2, intercept.flatten(1) / 2))
        if self.single:
            self._step()

    def _step(self) -> None:
        """The last layer told, as one matrix: `Step`."""
        side, number = self.sides[-1], len(self.sides) - 1
        p, q, half = side.p[0], side.q[0], side.half[0]
        bent = (q != 0) | (half != 0)
        unstable, straight = bent.nonzero()[:, 0], ((p != 0) & ~bent).nonzero()[:, 0]
        alive = torch.cat([unstable, straight])
        both = torch.cat([alive, unstable])
        factors = torch.cat([p[alive], q[unstable]])
        weight = self.stack.layers[number].weight[both]
        if number:
            weight = weight[:, self.steps[-1].alive]
        columns = weight.shape[1]
        matrix = weight.new_zeros(len(both) + 1, columns + 1)
        torch.mul(weight, factors[:, None], out=matrix[:-1, :columns])
        torch.addcmul(half[both], factors, self._constants(number)[0][both], out=matrix[:-1, columns])
        matrix[-1, columns] = 1
        self.steps.append(Step(matrix, alive, len(unstable)))

    def _single(self, number: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` for one box."""
        layer, step = self.stack.layers[number], self.steps[number - 1]
        neurons = wanted.nonzero()[:, 0]
        count, size, bent = len(neurons), len(step.alive), step.unstable
        x = layer.weight.new_empty(2 * count, size + bent + 1)
        x[:count, :size] = x[count:, :size] = layer.weight[neurons][:, step.alive]
        x[:count, -1] = x[count:, -1] = layer.bias[neurons]
        for j in range(number - 1, -1, -1):
            torch.abs(x[:, :bent], out=x[:, size:-1])
            x[:count, size:-1].neg_()
            if j:
                step, a = self.steps[j - 1], x
                size, bent = len(step.alive), step.unstable
                x = a.new_empty(2 * count, size + bent + 1)
                y = a @ self.steps[j].matrix
                x[:, :size], x[:, -1] = y[:, :-1], y[:, -1]
            else:
                x = x @ self.steps[0].matrix
        reach = x[:, :-1].abs() @ self.radius[0]
        low, high = torch.full_like(layer.bias, -torch.inf), torch.full_like(layer.bias, torch.inf)
        low[neurons], high[neurons] = x[:count, -1] - reach[:count], x[count:, -1] + reach[count:]
        return low[None], high[None]

    def _constants(self, layer: int) -> Tensor:
        """What a layer's neurons read where its ReLU's lines start: the bias, or the image of the centre."""
        return self.middle if layer == 0 else self.stack.layers[layer].bias[None]

    def hidden(self, number: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of a layer's neurons where they are wanted, (batch, neurons); elsewhere without limit."""
        if self.single:
            return self._single(number, wanted[0])
        layer, last = self.stack.layers[number], self.sides[number - 1]
        constant = self._constants(number - 1)
        # The constant terms through the first ReLU, of all neurons: a product with as many rows as there are boxes.
        even = torch.addmm(layer.bias, torch.addcmul(last.half, last.p, constant), layer.weight.T)
        odd = torch.addcmul(last.half, last.q, constant) @ layer.across.T
        low, high = torch.full_like(even, -torch.inf), torch.full_like(even, torch.inf)
        widest = max(max(one.weight.shape) for one in self.stack.layers[:number])
        for boxes, neurons in _groups(wanted, max(1, BYTES // (2 * even.element_size() * widest))):
            below, above = self._pair(number, boxes, neurons, even, odd)
            if len(boxes) == 1:
                low[boxes[0], neurons[0]], high[boxes[0], neurons[0]] = below[0], above[0]
            else:
                low[boxes[:, None], neurons], high[boxes[:, None], neurons] = below, above
        return low, high

    def _pair(self, number: int, boxes: Tensor, neurons: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of neurons, (boxes, rows), of a layer."""
        every = len(even) == 1
        sides = self.sides[:number] if every else [side[boxes] for side in self.sides[:number]]
        last = sides[-1]
        even, odd = (even, odd) if every else (even[boxes], odd[boxes])
        even, odd = even.gather(1, neurons), odd.gather(1, neurons)
        both = self._sides_of(number, neurons, last)
        d = torch.stack([even - odd, even + odd], 1)
        a, d = self._down(number - 2, both, d, sides, boxes)
        if self.boxed:
            reach = _contract(a.abs_(), self.radius if every else self.radius[boxes])
            return d[:, 0] - reach[:, 0], d[:, 1] + reach[:, 1]
        region = self.region if every else self.region[boxes]
        return d[:, 0] + region.minimum(a[:, 0]), d[:, 1] - region.minimum(-a[:, 1])

    def _sides_of(self, number: int, neurons: Tensor, last: Sides) -> Tensor:
        """Coefficients of the value before the first ReLU, (boxes, 2, rows, its neurons), of lower and upper sides."""
        layer, before = self.stack.layers[number], self.stack.layers[number - 1].weight
        kept, few = _columns(last)
        p, q = last.p, last.q
        if len(neurons) == 1:
            # Neurons as columns: those that are kept then lie in one piece each.
            rows, size = layer.columns, layer.sizes
            if kept is not None:
                unstable = kept[:few]
                p, q, before = p[:, kept], q[:, unstable], before.index_select(0, kept)
                rows, size = rows.index_select(0, kept), size.index_select(0, unstable)
            if neurons.shape[1] < rows.shape[1]:
                rows, size = rows[:, neurons[0]], size[:, neurons[0]]
            room = self._space(3, neurons.shape[1], before.shape[1])
            straight, both = room[0], room[None, 1:]
            sides = both[0]
            torch.mm((rows * p[0, :, None]).T, before, out=straight)
            torch.mm((size * q[0, :, None]).T, before[: len(size)], out=sides[1])
            torch.sub(straight, sides[1], out=sides[0])
            sides[1].add_(straight)
            return both
        rows = layer.weight[neurons.flatten()]
        if kept is not None:
            rows, p, q, before = rows[:, kept], p[:, kept], q[:, kept[:few]], before[kept]
        rows = rows.reshape(len(neurons), -1, rows.shape[1])
        both = rows.new_empty(len(neurons), 2, rows.shape[1], before.shape[1])
        size = rows[:, :, : q.shape[1]].abs().mul_(q[:, None])
        straight = (rows.mul_(p[:, None]).flatten(0, 1) @ before).unflatten(0, rows.shape[:2])
        bent = (size.flatten(0, 1) @ before[: q.shape[1]]).unflatten(0, rows.shape[:2])
        torch.sub(straight, bent, out=both[:, 0])
        torch.add(straight, bent, out=both[:, 1])
        return both

    def _space(self, *shape: int) -> Tensor:
        """Room for coefficients, the same at every call: fresh memory for each box costs as much as a pass over it."""
        if self.room is None or self.room.numel() < math.prod(shape):
            self.room = self.radius.new_empty(math.prod(shape))
        return self.room[: math.prod(shape)].view(shape)

    def _down(self, number: int, a: Tensor, d: Tensor, sides: Sequence[Sides], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """From coefficients of what a layer's ReLUs give to those of the input: a (boxes, 2, rows, neurons), of lower
        and of upper sides, is overwritten; d: (boxes, 2, rows).
        """
        for j in range(number, -1, -1):
            side, layer = sides[j], self.stack.layers[j]
            constant = self._constants(j)
            if len(constant) > 1:
                constant = constant[boxes]
            size = a.abs()
            one, other = torch.addcmul(side.half, side.p, constant), torch.addcmul(side.half, side.q, constant)
            more = _contract(size, other)
            d = d + _contract(a, one)
            d[:, 0] -= more[:, 0]
            d[:, 1] += more[:, 1]
            a.mul_(side.p[:, None, None])
            a.addcmul_(size, torch.stack([-side.q, side.q], 1)[:, :, None])
            a = (a.flatten(0, 2) @ layer.weight).unflatten(0, a.shape[:3])
        return a, d


def _columns(side: Sides) -> tuple[Tensor | None, int]:
    """The neurons that are not off in all boxes, those first that are unstable in any, and how many these are; None and
    all, where several boxes share a pass and it is hardly worth it.
    """
    bent = ((side.q != 0) | (side.half != 0)).any(0)
    alive = bent | (side.p != 0).any(0)
    size, many = len(alive), int(alive.sum())
    if len(side.p) > 1 and many > (1 - SPARSE) * size:
        return None, size
    unstable = bent.nonzero()[:, 0]
    return torch.cat([unstable, (alive & ~bent).nonzero()[:, 0]]), len(unstable)


def _contract(a: Tensor, v: Tensor) -> Tensor:
    """Sum over the last axis of a v: (boxes, 2, rows, n), (boxes, n)."""
    if len(a) == 1:
        return a @ v[0]
    return torch.bmm(a.flatten(1, 2), v[:, :, None])[:, :, 0].unflatten(1, a.shape[1:3])


def _groups(wanted: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Boxes that want about as many neurons, (boxes,), and the neurons, (boxes, most), lists filled up with repeats;
    boxes x most is at most `rows`, but of one box all are taken.
    """
    if len(wanted) == 1:
        neurons = wanted[0].nonzero().T
        if neurons.shape[1]:
            yield torch.zeros(1, dtype=torch.int64), neurons
        return
    counts, order = wanted.sum(1).sort()
    # Wanted neurons first, in their order.
    listed = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    sizes, end = counts.tolist(), len(order)
    while end and (most := sizes[end - 1]):
        start = end - 1
        while start and (end - start + 1) * most <= rows and 2 * sizes[start - 1] > most:
            start -= 1
        boxes = order[start:end]
        neurons = listed[boxes, :most]
        # Repeats are of the first one.
        inside = torch.arange(most) < counts[start:end, None]
        yield boxes, torch.where(inside, neurons, neurons[:, :1])
        end = start
