"""Collects the operations of a graph, node by node of a file: what the readers of operators are built of.

Values are told apart by the names of the graph. All that moves numbers is an array of places, the row-major numbers of
a value as `numpy` would move them, so that two moves in a row are one `Pick` and moves that undo each other are none.

Every size is known before an array of it is made; `room` refuses a node that asks for more than the limits here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from netassay.heavy import np
from netassay.networks.graph import (
    Activation,
    Conv,
    ConvTranspose,
    Dense,
    Function,
    Operation,
    Pick,
    Product,
    Relu,
    Reshape,
    Scale,
    Sum,
)
from netassay.networks.nodes import (
    FileShape,
    NetworkFileError,
    Value,
    batch_axis,
    broadcast,
    full,
    inner,
    label,
    mixes,
    text,
    unsupported,
)

if TYPE_CHECKING:
    import numpy
    from onnx import NodeProto

#: Numbers of one value, and of all values and constants that the reader makes (those of the file come on top).
LARGEST_VALUE, LARGEST_GRAPH = 2**24, 2**28

#: Numbers of the differences x_j - x_i of one softmax; above, it is exp(x_i) / sum_j exp(x_j), whose bounds are looser.
LARGEST_SOFTMAX = 2**20


class Builder:
    """operations: so far. node: the one being read. uses: how often each tensor of the file is read.

    masks: of tensors that hold minus infinity (as masked attention does), where they do; their values hold 0 there.
    """

    node: NodeProto

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.taken: set[str] = set()
        self.operations: list[Operation] = []
        self.makers: dict[str, Operation] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Value] = {}
        self.constants: dict[str, numpy.ndarray] = {}
        self.masks: dict[str, numpy.ndarray] = {}
        self.uses: Counter[str] = Counter()
        self.made = 0

    def refuse(self, why: str) -> NetworkFileError:
        return unsupported(self.node, why)

    # What a node reads.

    def value(self, place: int = 0) -> Value:
        """The tensor a node reads; raises UnsupportedOperator where it is a constant."""
        name = self.node.input[place]
        if name not in self.values:
            raise self.refuse(f"reads {name!r}, which is constant, where a value of the network is expected")
        if name in self.masks and self.node.op_type != "Softmax":
            raise self.refuse(f"reads {name!r}, which holds minus infinity; only a Softmax may")
        return self.values[name]

    def has(self, place: int) -> bool:
        """The node has this input."""
        return len(self.node.input) > place and bool(self.node.input[place])

    def is_constant(self, place: int) -> bool:
        return self.node.input[place] in self.constants

    def constant(self, place: int, infinite: bool = False) -> numpy.ndarray:
        """The floating constant a node reads, in float64; `infinite` allows infinity."""
        name = self.node.input[place]
        if name not in self.constants:
            raise self.refuse(f"needs a constant as input {place}, but {name!r} is computed from the network's input")
        array = self.constants[name]
        if array.dtype not in (np.float32, np.float64):
            raise self.refuse(f"reads constants of {array.dtype}; only float32 and float64 are read")
        if np.isnan(array).any() or not (infinite or np.isfinite(array).all()):
            raise NetworkFileError(f"constant {name!r} of node {label(self.node)} holds NaN or infinity")
        return array.astype(np.float64)

    def operand(self, place: int) -> Value | numpy.ndarray:
        """What a node reads: a value of the network or a constant."""
        return self.constant(place) if self.is_constant(place) else self.value(place)

    # Operations.

    def target(self) -> str:
        """A fresh name for a value: the node's output, or one derived from it where that is taken."""
        name, number = self.node.output[0], 1
        while name in self.taken or (number > 1 and name in self.names):
            number += 1
            name = f"{self.node.output[0]}.{number}"
        return name

    def room(self, *sizes: int) -> None:
        """Raise UnsupportedOperator where a value or an array of so many numbers is too large, or is empty."""
        size = math.prod(sizes)
        if size > LARGEST_VALUE:
            raise self.refuse(f"makes {size:,} numbers of one example; at most {LARGEST_VALUE:,} are allowed")
        if size < 1:
            raise self.refuse("makes an empty tensor")
        self.made += size
        if self.made > LARGEST_GRAPH:
            raise self.refuse(f"brings the numbers of all values to more than {LARGEST_GRAPH:,}")

    def make(self, kind: type[Operation], source: Value, shape: FileShape, **fields: Any) -> Value:
        """A new operation of this node."""
        self.room(*full(shape))
        return self.emit(kind(label(self.node), source.name, self.target(), inner(shape), **fields), shape)

    def emit(self, operation: Operation, shape: FileShape) -> Value:
        check_constants(operation)
        self.operations.append(operation)
        self.taken.add(operation.target)
        self.makers[operation.target] = operation
        self.shapes[operation.target] = operation.shape
        return Value(operation.target, shape)

    def relu(self, value: Value) -> Value:
        return self.make(Relu, value, value.shape)

    def activated(self, value: Value, function: Function, *parameters: float) -> Value:
        return self.make(Activation, value, value.shape, function=function, parameters=parameters)

    def dense(self, value: Value, weight: numpy.ndarray, bias: numpy.ndarray | None = None) -> Value:
        """y = weight x + bias on the last axis; weight: (outputs, inputs)."""
        if not inner(value.shape) or value.shape[-1] is None:
            raise mixes(self.node, f"multiplies {text(value.shape)}")
        bias = np.zeros(len(weight)) if bias is None else bias
        return self.make(Dense, value, (*value.shape[:-1], len(weight)), weight=weight, bias=bias)

    def scaled(self, value: Value, scale: Any, shift: Any = 0.0) -> Value:
        """scale * value + shift as one operation; both broadcast against the value's shape in the graph."""
        return self.make(Scale, value, value.shape, scale=np.asarray(scale, float), shift=np.asarray(shift, float))

    def summed(self, a: Value, b: Value, factors: tuple[float, float] = (1.0, 1.0), of: Any = None) -> Value:
        """factors[0] a + factors[1] b, broadcast. of: the two values of which it is the larger one."""
        a, b = self.matched(a, b)
        if a.name == b.name:
            return self.scaled(a, sum(factors))
        larger = None if of is None else tuple(value.name for value in of)
        return self.make(Sum, a, a.shape, other=b.name, factors=factors, larger=larger)

    def product(self, a: Value, b: Value) -> Value:
        """a * b, broadcast."""
        a, b = self.matched(a, b)
        if a.name == b.name:
            return self.activated(a, "power", 2.0)
        return self.make(Product, a, a.shape, other=b.name)

    def inverse(self, value: Value) -> Value:
        """1 / value; of a square root it is one operation."""
        maker = self.makers.get(value.name)
        if isinstance(maker, Activation) and maker.function == "sqrt":
            return self.activated(Value(maker.source, value.shape), "power", -0.5)
        return self.activated(value, "reciprocal")

    def plus(self, value: Value, shift: Any) -> Value:
        """Shift what the same node just computed: nothing else reads it, whatever reads the node's output."""
        hidden, self.uses = self.uses, Counter()
        try:
            return self.affine(value, np.ones(()), np.asarray(shift, float))
        finally:
            self.uses = hidden

    def affine(self, value: Value, scale: numpy.ndarray, shift: numpy.ndarray) -> Value:
        """scale * value + shift; both broadcast against the tensor's shape in the file."""
        shape = self.common(value.shape, scale.shape, shift.shape)
        rank = len(shape)
        scale, shift = (array.reshape((1,) * (rank - array.ndim) + array.shape) for array in (scale, shift))
        batch = batch_axis(shape)
        if batch is not None:
            scale, shift = scale.squeeze(batch), shift.squeeze(batch)
        same = self.expanded(value, shape)
        if (scale == 1).all() and (shift == 0).all():
            return same
        biased = self._biased(same, shift) if (scale == 1).all() else None
        return Value(biased, shape) if biased else self.scaled(same, scale, shift)

    def _biased(self, value: Value, shift: numpy.ndarray) -> str | None:
        """Make the shift the bias of the operation before, where it has none yet and nothing else reads its value.

        A second shift is not added to the first: the sum might cancel, and with it the rounding at the size of both.
        """
        before = self.operations[-1] if self.operations else None
        if before is None or before.target != value.name:
            return None
        # Several tensors may share one value (Identity, a dropped batch axis): each must lead to this node alone.
        if any(self.uses[name] > 1 for name, other in self.values.items() if other.name == value.name):
            return None
        merged: Scale | Dense | Conv | ConvTranspose
        if isinstance(before, Scale) and not before.shift.any():
            merged = dataclasses.replace(before, shift=shift)
        elif isinstance(before, Dense | Conv | ConvTranspose) and not before.bias.any():
            bias = _along(shift, len(before.shape), -1 if isinstance(before, Dense) else 0, len(before.bias))
            if bias is None:
                return None
            merged = dataclasses.replace(before, bias=bias)
        else:
            return None
        check_constants(merged)
        del self.operations[-1]
        self.taken.discard(merged.target)  # its name is free again
        merged = dataclasses.replace(merged, target=self.target())
        self.emit(merged, merged.shape)
        return merged.target

    # Numbers moved about.

    def places(self, value: Value) -> numpy.ndarray:
        """The row-major places of a value's numbers, in its shape for one example."""
        shape = full(value.shape)
        self.room(*shape)
        return np.arange(math.prod(shape)).reshape(shape)

    def reshaped(self, value: Value, shape: FileShape) -> Value:
        """The same numbers under another shape: no operation at all where only the batch axis came or went."""
        name, wanted = value.name, inner(shape)
        while self.shapes[name] != wanted and isinstance(self.makers.get(name), Reshape):
            name = self.makers[name].source
        if self.shapes[name] == wanted:
            return Value(name, shape)
        return self.make(Reshape, value, shape)

    def picked(self, value: Value, places: numpy.ndarray, shape: FileShape) -> Value:
        """The numbers at these places of a value (0 for -1), as a tensor of this shape."""
        self.room(places.size)
        name, places = self.origin(value, places.reshape(-1))
        size = math.prod(self.shapes[name])
        source = Value(name, self.shapes[name])
        if places.size == size and (places == np.arange(size)).all():
            return self.reshaped(source, shape)
        if not self.shapes[name]:
            source = self.reshaped(source, (1,))
        return self.make(Pick, source, shape, indices=places.reshape(inner(shape)))

    def origin(self, value: Value, places: numpy.ndarray) -> tuple[str, numpy.ndarray]:
        """The value that these numbers were moved from, and their places in it."""
        name = value.name
        while isinstance(maker := self.makers.get(name), Pick | Reshape):
            name = maker.source
            if isinstance(maker, Pick):
                places = np.where(places < 0, -1, maker.indices.reshape(-1)[places])
        return name, places

    def transposed(self, value: Value, order: Sequence[int]) -> Value:
        """The axes of a value reordered."""
        shape = tuple(value.shape[axis] for axis in order)
        long = [axis for axis in order if value.shape[axis] not in (None, 1)]
        if long == sorted(long):
            return self.reshaped(value, shape)
        return self.picked(value, self.places(value).transpose(order), shape)

    def common(self, *shapes: FileShape) -> FileShape:
        """The shape that tensors of the file broadcast to; a symbolic batch meets no other axis."""
        found = broadcast(*map(full, shapes))
        if found is None:
            raise self.refuse(f"broadcasts shapes that do not fit: {' and '.join(map(text, shapes))}")
        behind = {shape.index(None) - len(shape) for shape in shapes if None in shape}
        if not behind:
            return found
        at = behind.pop()
        if behind or found[at] != 1:
            raise mixes(self.node, f"broadcasts {' and '.join(map(text, shapes))}")
        return tuple(None if place == at % len(found) else size for place, size in enumerate(found))

    def expanded(self, value: Value, shape: FileShape) -> Value:
        """The value broadcast to a shape of `common`."""
        sizes = full(shape)
        if math.prod(sizes) == math.prod(full(value.shape)):
            return self.reshaped(value, shape)
        self.room(*sizes)
        return self.picked(value, np.broadcast_to(self.places(value), sizes), shape)

    def matched(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Both broadcast to one shape."""
        shape = self.common(a.shape, b.shape)
        return self.expanded(a, shape), self.expanded(b, shape)

    def filled(self, value: Value, places: numpy.ndarray, shape: FileShape, fill: numpy.ndarray) -> Value:
        """`picked`, with the numbers of `fill` (0 elsewhere) where the place is -1. fill: of the full shape."""
        found = self.picked(value, places, shape)
        return self.scaled(found, np.ones(()), fill.reshape(inner(shape))) if fill.any() else found

    def joined(self, parts: Sequence[Value | numpy.ndarray], axis: int) -> Value:
        """Concatenation. Parts that were moved from one value are one `Pick` of it; others are padded and added."""
        values = [part for part in parts if isinstance(part, Value)]
        rank = len(values[0].shape)
        axis = axis % rank
        batch = values[0].shape.index(None) if values[0].batched else None
        sizes = [full(part.shape) for part in parts]
        across = list(broadcast(*((*size[:axis], 1, *size[axis + 1 :]) for size in sizes)) or ())
        batches = {value.shape.index(None) if value.batched else None for value in values}
        if any(len(size) != rank for size in sizes) or len(across) != rank or batches != {batch}:
            raise self.refuse(f"joins {', '.join(text(part.shape) for part in parts)}")
        if axis == batch:
            raise mixes(self.node, "joins along the batch axis")
        whole = (*across[:axis], sum(size[axis] for size in sizes), *across[axis + 1 :])
        self.room(*whole)
        shape: FileShape = tuple(None if place == batch else size for place, size in enumerate(whole))
        found: dict[str, numpy.ndarray] = {}
        fill = np.zeros(whole)
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            at = (slice(None),) * axis + (slice(start, start + size[axis]),)
            start += size[axis]
            if isinstance(part, Value):
                name, places = self.origin(part, self.places(part).reshape(-1))
                if name not in found:
                    self.room(*whole)
                    found[name] = np.full(whole, -1)
                found[name][at] = places.reshape(size)
            else:
                fill[at] = part
        picks = [self.picked(Value(name, self.shapes[name]), places, shape) for name, places in found.items()]
        total = picks[0]
        for pick in picks[1:]:
            total = self.summed(total, pick)
        return self.scaled(total, np.ones(()), fill.reshape(inner(shape))) if fill.any() else total

    # Pieces of operators.

    def total(self, value: Value, axes: Sequence[int], factor: float, keepdims: bool = True) -> Value:
        """factor times the sum over axes: a `Dense` of one row."""
        rows, shape = self._rows(value, axes, keepdims)
        moved = self.picked(value, rows, (*self._kept(value, axes), rows.shape[-1]))
        return self.reshaped(self.dense(moved, np.full((1, rows.shape[-1]), factor)), shape)

    def extreme(self, value: Value, axes: Sequence[int], keepdims: bool = True) -> Value:
        """The largest number over axes."""
        rows, shape = self._rows(value, axes, keepdims)
        return self.largest(value, np.moveaxis(rows, -1, 0), shape)

    def _kept(self, value: Value, axes: Sequence[int]) -> FileShape:
        return tuple(size for axis, size in enumerate(value.shape) if axis not in axes)

    def _rows(self, value: Value, axes: Sequence[int], keepdims: bool) -> tuple[numpy.ndarray, FileShape]:
        """The places of a value as (*kept axes, all of the others), and its shape when those are gone."""
        kept = [axis for axis in range(len(value.shape)) if axis not in axes]
        if any(value.shape[axis] is None for axis in axes):
            raise mixes(self.node, "goes over the batch axis")
        rows = self.places(value).transpose([*kept, *axes])
        rows = rows.reshape(*rows.shape[: len(kept)], -1)
        ones = (1 if axis in axes else size for axis, size in enumerate(value.shape))
        return rows, tuple(ones) if keepdims else self._kept(value, axes)

    def larger(self, a: Value, b: Value) -> Value:
        """max(a, b) = b + relu(a - b), broadcast."""
        a, b = self.matched(a, b)
        if a.name == b.name:
            return a
        return self.summed(b, self.relu(self.summed(a, b, (1.0, -1.0))), of=(a, b))

    def smaller(self, a: Value, b: Value) -> Value:
        """min(a, b) = -max(-a, -b)."""
        return self.scaled(self.larger(self.scaled(a, -1.0), self.scaled(b, -1.0)), -1.0)

    def at_least(self, value: Value, low: numpy.ndarray) -> Value:
        """max(value, low) = low + relu(value - low); low broadcasts in the file's shape."""
        return self.plus(self.relu(self.affine(value, np.ones(()), -low)), low)

    def at_most(self, value: Value, high: numpy.ndarray) -> Value:
        """min(value, high) = high - relu(high - value)."""
        off = self.relu(self.affine(value, -np.ones(()), high))
        return self.affine(off, -np.ones(()), high)

    def largest(self, value: Value, rows: numpy.ndarray, shape: FileShape) -> Value:
        """The largest of the k numbers of a value that rows[:, i] names, for each i. rows: (k, *full shape).

        A tournament: blocks of 2, 4, 8, ... rows, each halved until one is left; k - 1 maxima altogether.
        """
        best, start = None, 0
        for bit in reversed(range(len(rows).bit_length())):
            if not len(rows) >> bit & 1:
                continue
            winner, block = value, rows[start : start + 2**bit]
            start += 2**bit
            if len(block) == 1:
                winner = self.picked(value, block[0], shape)
            while len(block) > 1:
                half = len(block) // 2
                several = shape if half == 1 else (half, *shape)
                winner = self.larger(*(self.picked(winner, part, several) for part in (block[:half], block[half:])))
                block = np.arange(half * math.prod(full(shape))).reshape(half, *full(shape))
            best = winner if best is None else self.larger(best, winner)
        assert best is not None
        return best

    def softmax(self, value: Value, axes: Sequence[int], log: bool = False, mask: numpy.ndarray | None = None) -> Value:
        """1 / sum_j exp(x_j - x_i), j over axes; its logarithm. Of two numbers it is sigmoid(x_i - x_j).

        Where the mask is set, x is minus infinity: no term of any sum, and the result is 0.
        """
        if mask is not None:
            return self._masked_softmax(value, axes, mask)
        rows, _ = self._rows(value, axes, True)
        n = rows.shape[-1]
        lead = self._kept(value, axes)
        if n == 1:
            return self.scaled(value, 0.0, 0.0 if log else 1.0)
        if rows.size * (n - 1) > LARGEST_SOFTMAX:
            exp = self.activated(value, "exp")
            total = self.total(exp, axes, 1.0)
            if log:
                return self.summed(value, self.activated(total, "log"), (1.0, -1.0))
            return self.product(exp, self.inverse(total))
        # The term of j = i is 1, exactly, so it is a bias.
        others = np.array([[j for j in range(n) if j != i] for i in range(n)])
        self.room(rows.size, n - 1)
        theirs = self.picked(value, rows[..., others], (*lead, n, n - 1))
        own = self.picked(value, np.broadcast_to(rows[..., None], (*rows.shape, n - 1)), (*lead, n, n - 1))
        if n == 2 and not log:
            shares = self.activated(self.summed(own, theirs, (1.0, -1.0)), "sigmoid")
        else:
            differences = self.summed(theirs, own, (1.0, -1.0))
            if n == 2:
                shares = self.scaled(self.activated(differences, "softplus"), -1.0)
            else:
                total = self.dense(self.activated(differences, "exp"), np.ones((1, n - 1)), np.ones(1))
                shares = self.scaled(self.activated(total, "log"), -1.0) if log else self.inverse(total)
        back = np.empty(rows.size, dtype=np.int64)
        back[rows.reshape(-1)] = np.arange(rows.size)
        return self.picked(shares, back, value.shape)

    def _masked_softmax(self, value: Value, axes: Sequence[int], mask: numpy.ndarray) -> Value:
        rows, _ = self._rows(value, axes, True)
        n = rows.shape[-1]
        lead = self._kept(value, axes)
        there = ~np.broadcast_to(mask, full(value.shape)).reshape(-1)[rows]
        if not there.any(axis=-1).all():
            raise self.refuse("reads minus infinity alone")
        self.room(rows.size, n)
        pairs = there[..., None, :] & there[..., :, None] & ~np.eye(n, dtype=bool)
        theirs = self.picked(value, np.where(pairs, rows[..., None, :], -1), (*lead, n, n))
        own = self.picked(value, np.where(pairs, rows[..., :, None], -1), (*lead, n, n))
        differences = self.summed(theirs, own, (1.0, -1.0))
        terms = self.scaled(self.activated(differences, "exp"), pairs.reshape(inner(differences.shape)))
        shares = self.inverse(self.dense(terms, np.ones((1, n)), np.ones(1)))
        back = np.empty(rows.size, dtype=np.int64)
        back[rows.reshape(-1)] = np.where(there.reshape(-1), np.arange(rows.size), -1)
        return self.picked(shares, back, value.shape)

    def normalised(self, value: Value, axes: Sequence[int], epsilon: float, centred: bool = True) -> Value:
        """(x - mean) / sqrt(variance + epsilon) over axes; not `centred`: x / sqrt(mean of squares + epsilon)."""
        n = math.prod(size for axis in axes if (size := value.shape[axis]) is not None)
        rest = self.summed(value, self.total(value, axes, 1 / n), (1.0, -1.0)) if centred else value
        variance = self.total(self.activated(rest, "power", 2.0), axes, 1 / n)
        root = self.activated(self.plus(variance, epsilon), "power", -0.5)
        return self.product(rest, root)

    def axes(self, wanted: Iterable[int], rank: int) -> list[int]:
        """Axes counted from the front, sorted. Raises UnsupportedOperator for those beyond the rank."""
        wanted = list(wanted)
        if any(not -rank <= axis < rank for axis in wanted) or len({axis % rank for axis in wanted}) < len(wanted):
            raise self.refuse(f"names axes {wanted} of {rank}")
        return sorted(axis % rank for axis in wanted)


def _along(array: numpy.ndarray, rank: int, axis: int, size: int) -> numpy.ndarray | None:
    """A broadcastable constant as a vector along one axis of a value; None where it varies along another."""
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    axis %= rank
    if any(length != 1 for place, length in enumerate(array.shape) if place != axis):
        return None
    return np.broadcast_to(array.reshape(-1), (size,))


def check_constants(operation: Operation) -> None:
    """Raise NetworkFileError where a constant is no number of float32's range: what a runtime makes of it is inf."""
    for part in ("weight", "bias", "scale", "shift"):
        array = getattr(operation, part, None)
        if array is not None and not in_range(array):
            raise out_of_range(operation.name, f"the {part}")


def in_range(array: numpy.ndarray) -> bool:
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())  # False for NaN


def out_of_range(name: str, what: str) -> NetworkFileError:
    return NetworkFileError(
        f"{what} of node {name} is NaN or beyond float32",
        "it follows from the constants of the node, and a runtime that computes in float32 makes NaN or infinity of it",
        "look at that node's divisor, variance or factors, and export again",
    )
