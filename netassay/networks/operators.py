"""The operators of ONNX in the few kinds of a graph: one reader each, (reader, node) -> the tensors it computes.

What a definition leaves to the runtime (which places are padding, where a window ends) follows onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netassay.heavy import np, onnx
from netassay.networks.builder import Builder, in_range, out_of_range
from netassay.networks.graph import Conv, ConvTranspose, Function
from netassay.networks.nodes import (
    BATCH,
    FileShape,
    NetworkFileError,
    Value,
    attributes,
    counts_batch,
    full,
    inner,
    label,
    mismatch,
    mixes,
    text,
)

if TYPE_CHECKING:
    import numpy


class Reader(Builder):
    """What the readers of operators see of the file. opset: its operator set. kind: its input's type, as a number."""

    opset: int
    kind: int

    def attributes(self) -> dict[str, Any]:
        return attributes(self.node)

    def integers(self, place: int, attribute: str) -> list[int] | None:
        """Integers that newer operator sets read from a constant input and older ones from an attribute."""
        if self.has(place):
            if not self.is_constant(place):
                raise self.refuse(f"needs a constant as input {place} ({attribute})")
            return [int(item) for item in np.atleast_1d(self.constants[self.node.input[place]])]
        found = self.attributes().get(attribute)
        return None if found is None else [int(item) for item in found]

    def number(self, place: int, attribute: str, default: float | None) -> float | None:
        """A number that newer operator sets read from a constant input; infinity is allowed."""
        if self.has(place):
            array = self.constant(place, infinite=True)
            if array.size != 1:
                raise self.refuse(f"takes one number as input {place}, not {array.size}")
            return float(array.reshape(()))
        found = self.attributes().get(attribute, default)
        return None if found is None else float(found)

    def alone(self) -> None:
        """Raise UnsupportedOperator where the network uses a second output of the node."""
        if any(name and self.uses[name] for name in self.node.output[1:]):
            raise self.refuse("has a second output that the network uses")

    def axis(self, default: int, rank: int) -> int:
        return self.axes([self.attributes().get("axis", default)], rank)[0]


Read = Callable[[Reader], "Value | list[Value]"]


# Elementwise.


def _activation(function: Function) -> Read:
    return lambda reader: reader.activated(reader.value(), function)


def _relu(reader: Reader) -> Value:
    return reader.relu(reader.value())


def _leaky(reader: Reader) -> Value:
    value, slope = reader.value(), reader.attributes().get("alpha", float(np.float32(0.01)))
    return reader.summed(value, reader.relu(value), (slope, 1.0 - slope))


def _prelu(reader: Reader) -> Value:
    value, slope = reader.value(), reader.constant(1)
    if len(slope.shape) > len(value.shape) or reader.common(value.shape, slope.shape) != value.shape:
        raise reader.refuse(f"has slopes of shape {slope.shape} for {text(value.shape)}")
    off = reader.affine(value, slope, np.zeros(()))
    on = reader.affine(reader.relu(value), 1.0 - slope, np.zeros(()))
    return reader.summed(off, on)


def _elu(reader: Reader) -> Value:
    return _of_alpha(reader, reader.attributes().get("alpha", 1.0))


def _of_alpha(reader: Reader, alpha: float) -> Value:
    if not alpha > 0:
        raise reader.refuse(f"has alpha = {alpha}; only positive ones are known")
    return reader.activated(reader.value(), "elu", float(alpha))


def _selu(reader: Reader) -> Value:
    of = reader.attributes()
    gamma = of.get("gamma", float(np.float32(1.05070102214813232421875)))
    return reader.scaled(_of_alpha(reader, of.get("alpha", float(np.float32(1.67326319217681884765625)))), gamma)


def _celu(reader: Reader) -> Value:
    alpha = reader.attributes().get("alpha", 1.0)
    if not alpha > 0:
        raise reader.refuse(f"has alpha = {alpha}; only positive ones are known")
    value = reader.value()
    if alpha != 1:
        value = reader.scaled(value, 1 / alpha)
    found = reader.activated(value, "elu", 1.0)
    return found if alpha == 1 else reader.scaled(found, alpha)


def _gelu(reader: Reader) -> Value:
    of = reader.attributes().get("approximate", "none")
    if of not in ("none", "tanh"):
        raise reader.refuse(f"approximates by {of}")
    return reader.activated(reader.value(), "gelu" if of == "none" else "gelu_tanh")


def _swish(reader: Reader) -> Value:
    alpha = reader.attributes().get("alpha", 1.0)
    if alpha == 0:
        return reader.scaled(reader.value(), 0.5)
    return stretched(reader, reader.value(), "silu", alpha, 1 / alpha)


def stretched(reader: Reader, value: Value, function: Function, inside: float, outside: float) -> Value:
    """outside * function(inside * value)."""
    value = value if inside == 1 else reader.scaled(value, inside)
    found = reader.activated(value, function)
    return found if outside == 1 else reader.scaled(found, outside)


def _hard_sigmoid(reader: Reader) -> Value:
    of = reader.attributes()
    line = reader.scaled(reader.value(), of.get("alpha", float(np.float32(0.2))), of.get("beta", 0.5))
    return _clipped(reader, line, 0.0, 1.0)


def _softsign(reader: Reader) -> Value:
    value = reader.value()
    size = reader.larger(value, reader.scaled(value, -1.0))
    return reader.product(value, reader.inverse(reader.scaled(size, 1.0, 1.0)))


def _abs(reader: Reader) -> Value:
    value = reader.value()
    return reader.larger(value, reader.scaled(value, -1.0))


def _neg(reader: Reader) -> Value:
    return reader.scaled(reader.value(), -1.0)


def _clip(reader: Reader) -> Value:
    largest = float(np.finfo(np.float32).max)
    low, high = reader.number(1, "min", -largest), reader.number(2, "max", largest)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return _clipped(reader, reader.value(), low, high)


def _clipped(reader: Reader, value: Value, low: float, high: float) -> Value:
    """hi - relu(hi - lo - relu(x - lo)); an end beyond float32 is none."""
    largest = float(np.finfo(np.float32).max)
    if low >= largest or high <= -largest:
        raise reader.refuse(f"clips to {low} ... {high}")
    if low <= -largest:
        return value if high >= largest else reader.at_most(value, np.asarray(high))
    if high >= largest:
        return reader.at_least(value, np.asarray(low))
    above = reader.relu(reader.affine(value, np.ones(()), np.asarray(-low)))
    below = reader.relu(reader.scaled(above, -1.0, high - low))
    return reader.scaled(below, -1.0, high)


def _pow(reader: Reader) -> Value:
    if reader.is_constant(0):
        base = reader.constant(0)
        if not (base > 0).all():
            raise reader.refuse("raises a constant that is not positive to the network's values")
        return reader.activated(reader.affine(reader.value(1), np.log(base), np.zeros(())), "exp")
    value = reader.value()
    exponents = reader.constants.get(reader.node.input[1])
    if exponents is None or exponents.dtype.kind not in "if" or np.unique(exponents).size != 1:
        raise reader.refuse("has an exponent that is not one constant number")
    exponent = float(np.unique(exponents)[0])
    value = reader.expanded(value, reader.common(value.shape, exponents.shape))
    match exponent:
        case 0.0:
            return reader.scaled(value, 0.0, 1.0)
        case 1.0:
            return value
        case 0.5:
            return reader.activated(value, "sqrt")
        case -1.0:
            return reader.inverse(value)
    if not math.isfinite(exponent):
        raise reader.refuse(f"has the exponent {exponent}")
    return reader.activated(value, "power", exponent)


def _cast(reader: Reader) -> Value:
    to = reader.attributes()["to"]
    if to != reader.kind:
        raise reader.refuse(f"casts to {onnx.TensorProto.DataType.Name(to)}, which rounds or changes the precision")
    return reader.value()


def _identity(reader: Reader) -> Value:
    return reader.value()


def _dropout(reader: Reader) -> Value:
    training = reader.constants.get(reader.node.input[2]) if reader.has(2) else False
    if training is None or np.any(training):
        raise reader.refuse("is in training mode, hence random")
    reader.alone()
    return reader.value()


# Arithmetic.


def _add(reader: Reader) -> Value:
    for place in (0, 1):
        if reader.is_constant(place):
            constant = reader.constant(place, infinite=True)
            value, mask = reader.value(1 - place), constant == -np.inf
            if not mask.any():
                constant = reader.constant(place)
            else:
                shape = reader.common(value.shape, constant.shape)
                reader.masks[reader.node.output[0]] = np.broadcast_to(mask, full(shape))
                # Where x is masked, nothing reads what its value holds.
                constant = np.where(mask, 0.0, constant)
            return reader.affine(value, np.ones(()), constant)
    return reader.summed(reader.value(0), reader.value(1))


def _sub(reader: Reader) -> Value:
    a, b = reader.operand(0), reader.operand(1)
    if isinstance(a, Value):
        return reader.summed(a, b, (1.0, -1.0)) if isinstance(b, Value) else reader.affine(a, np.ones(()), -b)
    assert isinstance(b, Value)
    return reader.affine(b, -np.ones(()), a)


def _mul(reader: Reader) -> Value:
    a, b = reader.operand(0), reader.operand(1)
    if isinstance(a, Value) and isinstance(b, Value):
        return reader.product(a, b)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return reader.affine(value, constant, np.zeros(()))  # type: ignore[arg-type]


def _div(reader: Reader) -> Value:
    a, b = reader.operand(0), reader.operand(1)
    if not isinstance(b, Value):
        assert isinstance(a, Value)
        if (b == 0).any():
            raise reader.refuse("divides by zero")
        with np.errstate(over="ignore"):  # refused with the node's name
            return reader.affine(a, 1.0 / b, np.zeros(()))
    if isinstance(a, Value):
        return reader.product(a, reader.inverse(b))
    return reader.affine(reader.inverse(b), a, np.zeros(()))


def _sum(reader: Reader) -> Value:
    values, constants = _parts(reader)
    total = values[0]
    for value in values[1:]:
        total = reader.summed(total, value)
    for constant in constants:
        total = reader.plus(total, constant) if total is not values[0] else reader.affine(total, np.ones(()), constant)
    return total


def _mean(reader: Reader) -> Value:
    return reader.scaled(_sum(reader), 1 / len(reader.node.input))


def _max(reader: Reader) -> Value:
    values, constants = _parts(reader)
    best = values[0]
    for value in values[1:]:
        best = reader.larger(best, value)
    for constant in constants:
        best = reader.at_least(best, constant)
    return best


def _min(reader: Reader) -> Value:
    values, constants = _parts(reader)
    best = values[0]
    for value in values[1:]:
        best = reader.smaller(best, value)
    for constant in constants:
        best = reader.at_most(best, constant)
    return best


def _parts(reader: Reader) -> tuple[list[Value], list[numpy.ndarray]]:
    parts = [reader.operand(place) for place in range(len(reader.node.input))]
    return [p for p in parts if isinstance(p, Value)], [p for p in parts if not isinstance(p, Value)]


def _where(reader: Reader) -> Value:
    condition = reader.constants.get(reader.node.input[0])
    if condition is None:
        raise reader.refuse("chooses by a condition computed from the network's input; it has to be constant")
    parts = [
        reader.constant(place, infinite=True) if reader.is_constant(place) else reader.value(place) for place in (1, 2)
    ]
    shape = reader.common(condition.shape, *(part.shape for part in parts))
    sizes = full(shape)
    reader.room(*sizes)
    chosen = np.broadcast_to(condition, sizes)
    total, fill = None, np.zeros(sizes)
    for part, mask in zip(parts, (chosen, ~chosen), strict=True):
        if isinstance(part, Value):
            places = np.where(mask, np.broadcast_to(reader.places(part), sizes), -1)
            pick = reader.picked(part, places, shape)
            total = pick if total is None else reader.summed(total, pick)
        else:
            fill = np.where(mask, np.broadcast_to(part, sizes), fill)
    assert total is not None
    if (fill == -np.inf).any():
        reader.masks[reader.node.output[0]] = fill == -np.inf
        fill = np.where(fill == -np.inf, 0.0, fill)
    return reader.scaled(total, np.ones(()), fill.reshape(inner(shape))) if fill.any() else total


# Products of matrices.


def _matmul(reader: Reader) -> Value:
    if reader.is_constant(0):
        return _constant_times(reader, reader.constant(0), reader.value(1))
    if reader.is_constant(1):
        return _times_constant(reader, reader.value(), reader.constant(1))
    return _times(reader, reader.value(0), reader.value(1))


def _gemm(reader: Reader) -> Value:
    of = reader.attributes()
    alpha, beta = of.get("alpha", 1.0), of.get("beta", 1.0)
    factors: list[Any] = [reader.operand(0), reader.operand(1)]
    if any(len(factor.shape) != 2 for factor in factors):
        raise reader.refuse(
            f"multiplies {text(factors[0].shape)} and {text(factors[1].shape)}; Gemm takes two matrices"
        )
    for place, flag in enumerate(("transA", "transB")):
        if of.get(flag, 0):
            factor = factors[place]
            factors[place] = reader.transposed(factor, (1, 0)) if isinstance(factor, Value) else factor.T
    left, right = factors
    if not isinstance(left, Value):
        product = _constant_times(reader, alpha * left, right)
    elif not isinstance(right, Value):
        product = _times_constant(reader, left, alpha * right)
    else:
        product = _times(reader, left, right)
        product = product if alpha == 1 else reader.scaled(product, alpha)
    if not reader.has(2):
        return product
    bias = reader.operand(2)
    return reader.summed(product, bias, (1.0, beta)) if isinstance(bias, Value) else reader.plus(product, beta * bias)


def _times_constant(reader: Reader, value: Value, matrix: numpy.ndarray) -> Value:
    """value @ matrix."""
    if matrix.ndim > 2 and set(matrix.shape[:-2]) == {1} and (not value.batched or len(value.shape) >= matrix.ndim):
        # The axes of length one change nothing but the rank of the product.
        padded = (1,) * (matrix.ndim - len(value.shape)) + value.shape
        value, matrix = reader.reshaped(value, padded), matrix.reshape(matrix.shape[-2:])
    if matrix.ndim < 1 or not inner(value.shape):
        raise reader.refuse(f"multiplies {text(value.shape)} by a constant of shape {matrix.shape}")
    if value.shape[-1] != matrix.shape[max(-2, -matrix.ndim)]:
        raise mismatch(reader.node, value.shape, matrix.shape)
    if matrix.ndim > 2:
        return _times_matrices(reader, value, matrix)
    product = reader.dense(value, matrix.T if matrix.ndim == 2 else matrix[None])
    return product if matrix.ndim == 2 else reader.reshaped(product, product.shape[:-1])


def _times_matrices(reader: Reader, value: Value, matrices: numpy.ndarray) -> Value:
    """value @ matrices, one for each index of leading axes: a 1 x 1 convolution in groups."""
    if len(value.shape) < 2 or None in value.shape[-2:]:
        raise reader.refuse(f"multiplies {text(value.shape)} by a constant of shape {matrices.shape}")
    lead = reader.common(value.shape[:-2], matrices.shape[:-2])
    (m, k), n, count = full(value.shape)[-2:], matrices.shape[-1], math.prod(full(lead))
    reader.room(count, m, k)
    reader.room(count, n, k)
    places = np.broadcast_to(reader.places(value), (*full(lead), m, k)).reshape(count, m, k).transpose(0, 2, 1)
    first: tuple[int | None, ...] = (None,) if value.batched else ()
    # A leading one would be taken for the batch.
    first = first or (1,)
    columns = reader.picked(value, places, (*first, count * k, m, 1))
    weight = np.broadcast_to(matrices, (*full(lead), k, n)).reshape(count, k, n).transpose(0, 2, 1)
    product = reader.make(
        Conv, columns, (*first, count * n, m, 1), weight=weight.reshape(count * n, k, 1, 1), bias=np.zeros(count * n),
        stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=count,
    )  # fmt: skip
    rows = np.arange(count * n * m).reshape(count, n, m).transpose(0, 2, 1)
    return reader.picked(product, rows, (*lead, m, n))


def _constant_times(reader: Reader, matrix: numpy.ndarray, value: Value) -> Value:
    """matrix @ value: the transpose of value^T @ matrix^T."""
    if len(value.shape) == 1 and not value.batched:
        if matrix.shape[-1:] != value.shape:
            raise mismatch(reader.node, matrix.shape, value.shape)
        if matrix.ndim <= 2:
            return _times_constant(reader, value, matrix.T)
    if len(value.shape) < 2 or matrix.ndim < 1 or value.shape[-2] != matrix.shape[-1]:
        raise mismatch(reader.node, matrix.shape, value.shape)
    rank = len(value.shape)
    flipped = reader.transposed(value, (*range(rank - 2), rank - 1, rank - 2))
    if matrix.ndim == 1:
        return _times_constant(reader, flipped, matrix)
    product = _times_constant(reader, flipped, np.swapaxes(matrix, -1, -2))
    rank = len(product.shape)
    return reader.transposed(product, (*range(rank - 2), rank - 1, rank - 2))


def _times(reader: Reader, left: Value, right: Value) -> Value:
    """left @ right, both of the network: all their products of two, added up by a row of ones."""
    row, column = (len(value.shape) == 1 and not value.batched for value in (left, right))
    if row or column:
        product = _times(
            reader,
            reader.reshaped(left, (1, *left.shape)) if row else left,
            reader.reshaped(right, (*right.shape, 1)) if column else right,
        )
        shape = product.shape
        return reader.reshaped(product, (*shape[:-2], *shape[-2:-1] * (not row), *shape[-1:] * (not column)))
    if None in (*left.shape[-2:], *right.shape[-2:]):
        raise mixes(reader.node, f"multiplies {text(left.shape)} and {text(right.shape)}")
    if min(len(left.shape), len(right.shape)) < 2 or left.shape[-1] != right.shape[-2]:
        raise mismatch(reader.node, left.shape, right.shape)
    lead = reader.common(left.shape[:-2], right.shape[:-2])
    (m, k), n = full(left.shape)[-2:], full(right.shape)[-1]
    sizes = (*full(lead), m, n, k)
    reader.room(*sizes)
    rows = np.broadcast_to(reader.places(left)[..., :, None, :], sizes)
    columns = np.broadcast_to(np.swapaxes(reader.places(right), -1, -2)[..., None, :, :], sizes)
    shape = (*lead, m, n, k)
    products = reader.product(reader.picked(left, rows, shape), reader.picked(right, columns, shape))
    return reader.reshaped(reader.dense(products, np.ones((1, k))), (*lead, m, n))


# Convolution and pooling.


def _image(reader: Reader, value: Value, what: str) -> tuple[int, list[int]]:
    """Channels and sizes of a value of shape (batch, channels, *sizes)."""
    if len(value.shape) < 3:
        raise reader.refuse(f"{what} {text(value.shape)}, which is no signal of channels")
    if value.shape[0] not in (None, 1) or None in value.shape[1:]:
        raise reader.refuse(f"reads {text(value.shape)}, whose first axis is neither a symbolic batch nor a batch of 1")
    channels, *sizes = full(value.shape)[1:]
    return channels, sizes


def _per_axis(reader: Reader, name: str, default: list[int], axes: int, least: int = 1) -> list[int]:
    found = [int(item) for item in reader.attributes().get(name, default)]
    if len(found) != len(default) or any(item < least for item in found):
        raise reader.refuse(f"has {name} = {found} for {axes} axes")
    return found


def _padding(
    reader: Reader, sizes: list[int], strides: list[int], reach: list[int], same: bool = True
) -> tuple[list[int], list[int]]:
    """Begin and end of each axis; see `auto_pad` in the specification of Conv."""
    auto, n = reader.attributes().get("auto_pad", "NOTSET"), len(sizes)
    if auto == "VALID":
        return [0] * n, [0] * n
    if auto == "NOTSET":
        pads = _per_axis(reader, "pads", [0] * 2 * n, n, least=0)
        return pads[:n], pads[n:]
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise reader.refuse(f"has auto_pad={auto}")
    total = [max((-(-sizes[a] // strides[a]) - 1) * strides[a] + reach[a] - sizes[a], 0) for a in range(n)]
    less = [amount // 2 for amount in total]
    more = [amount - half for amount, half in zip(total, less, strict=True)]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _conv(reader: Reader) -> Value:
    value, weight, of = reader.value(), reader.constant(1), reader.attributes()
    if weight.ndim not in (3, 4) or len(value.shape) != weight.ndim:
        raise reader.refuse(
            f"convolves {text(value.shape)} with a kernel of shape {weight.shape}; only 1-d and 2-d are known"
        )
    groups = of.get("group", 1)
    channels, sizes = _image(reader, value, "convolves")
    outputs, per_group, *kernel = weight.shape
    if groups < 1 or channels != per_group * groups or outputs % groups:
        raise mismatch(reader.node, value.shape, weight.shape)
    n = len(sizes)
    strides, dilations = _per_axis(reader, "strides", [1] * n, n), _per_axis(reader, "dilations", [1] * n, n)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    begin, end = _padding(reader, sizes, strides, reach)
    out = [(sizes[a] + begin[a] + end[a] - reach[a]) // strides[a] + 1 for a in range(n)]
    if min(out) < 1:
        raise reader.refuse(f"has pads {begin + end} that leave {' x '.join(map(str, out))} outputs")
    bias = reader.constant(2) if reader.has(2) else np.zeros(outputs)
    return _convolved(reader, Conv, value, out, weight, bias, strides, begin, end, dilations, groups)


def _convolved(
    reader: Reader, kind: type[Conv] | type[ConvTranspose], value: Value, out: list[int], weight: numpy.ndarray,
    bias: numpy.ndarray, strides: list[int], begin: list[int], end: list[int], dilations: list[int], groups: int,
) -> Value:  # fmt: skip
    """The operation, with an axis of length one more where it is 1-d."""
    flat, outputs = len(out) == 1, len(bias)
    if flat:
        value = reader.reshaped(value, (*value.shape[:2], 1, value.shape[2]))
        weight = weight[:, :, None]
        out, strides, dilations, begin, end = ([1, *out], [1, *strides], [1, *dilations], [0, *begin], [0, *end])
    found = reader.make(
        kind, value, (value.shape[0], outputs, *out), weight=weight, bias=bias, stride=tuple(strides),
        padding=(*begin, *end), dilation=tuple(dilations), groups=groups,
    )  # fmt: skip
    return reader.reshaped(found, (*found.shape[:2], found.shape[3])) if flat else found


def _conv_transpose(reader: Reader) -> Value:
    value, weight, of = reader.value(), reader.constant(1), reader.attributes()
    if weight.ndim not in (3, 4) or len(value.shape) != weight.ndim:
        raise reader.refuse(
            f"convolves {text(value.shape)} with a kernel of shape {weight.shape}; only 1-d and 2-d are known"
        )
    groups = of.get("group", 1)
    channels, sizes = _image(reader, value, "convolves")
    inputs, per_group, *kernel = weight.shape
    if groups < 1 or channels != inputs or channels % groups:
        raise mismatch(reader.node, value.shape, weight.shape)
    n = len(sizes)
    strides, dilations = _per_axis(reader, "strides", [1] * n, n), _per_axis(reader, "dilations", [1] * n, n)
    more = _per_axis(reader, "output_padding", [0] * n, n, least=0)
    whole = [(sizes[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 for a in range(n)]
    auto = of.get("auto_pad", "NOTSET")
    wanted = of.get("output_shape")
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        out = [int(s) for s in wanted[-n:]] if wanted else [sizes[a] * strides[a] for a in range(n)]
        total = [max(0, whole[a] + more[a] - out[a]) for a in range(n)]
        less = [amount // 2 for amount in total]
        rest = [amount - half for amount, half in zip(total, less, strict=True)]
        begin, end = (less, rest) if auto == "SAME_UPPER" else (rest, less)
        if any(whole[a] + more[a] - begin[a] - end[a] != out[a] for a in range(n)):
            raise reader.refuse(f"wants {out} numbers of {whole}")
    else:
        begin, end = _padding(reader, sizes, strides, [1] * n)
        out = [whole[a] + more[a] - begin[a] - end[a] for a in range(n)]
    if min(out) < 1 or any(begin[a] >= whole[a] for a in range(n)):
        raise reader.refuse(f"has pads {begin + end} that leave {' x '.join(map(str, out))} outputs")
    bias = reader.constant(2) if reader.has(2) else np.zeros(per_group * groups)
    return _convolved(reader, ConvTranspose, value, out, weight, bias, strides, begin, end, dilations, groups)


def _windows(reader: Reader, sizes: list[int]) -> list[tuple[numpy.ndarray, int, int]]:
    """Of each axis the places (outputs, kernel) of the windows of a pooling, and its padding at begin and end.

    Places below 0 and from the size on are padding.
    """
    n, of = len(sizes), reader.attributes()
    kernel = _per_axis(reader, "kernel_shape", [0] * n, n)
    strides, dilations = _per_axis(reader, "strides", [1] * n, n), _per_axis(reader, "dilations", [1] * n, n)
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(n)]
    if of.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") and max(dilations) > 1:
        raise reader.refuse("has auto_pad and dilations, which runtimes do not agree on")
    begin, end = _padding(reader, sizes, strides, reach)
    found = []
    for axis, size in enumerate(sizes):
        steps = size + begin[axis] + end[axis] - reach[axis]
        out = (-(-steps // strides[axis]) if of.get("ceil_mode", 0) else steps // strides[axis]) + 1
        if of.get("ceil_mode", 0) and (out - 1) * strides[axis] >= size + begin[axis]:
            out -= 1  # a last window that would start behind the input
        if out < 1:
            raise reader.refuse(f"has windows larger than its input of {size}")
        reader.room(out, kernel[axis])
        starts = np.arange(out)[:, None] * strides[axis] - begin[axis]
        found.append((starts + np.arange(kernel[axis]) * dilations[axis], begin[axis], end[axis]))
    return found


def _max_pool(reader: Reader) -> Value:
    """One axis after the other: the largest of a window is that of the largest of its rows."""
    value = reader.value()
    reader.alone()
    _, sizes = _image(reader, value, "pools")
    windows = []
    for (places, _, _), size in zip(_windows(reader, sizes), sizes, strict=True):
        inside = (places >= 0) & (places < size)
        if not inside.any(axis=1).all():
            raise reader.refuse("has windows of nothing but padding")
        # Padding is below every number: another place of the same window, twice, changes nothing.
        first = np.take_along_axis(places, inside.argmax(axis=1)[:, None], axis=1)
        windows.append(np.where(inside, places, first))
    places = reader.places(value)
    for axis, window in enumerate(windows, start=2):  # only what windows read
        used = np.unique(window)
        places, windows[axis - 2] = np.take(places, used, axis=axis), np.searchsorted(used, window)
    for axis in reversed(range(2, len(value.shape))):
        window = windows[axis - 2]
        shape = list(places.shape)
        shape[axis] = len(window)
        reader.room(*shape, window.shape[1])
        rows = np.moveaxis(np.take(places, window.T, axis=axis), axis, 0)
        value = reader.largest(value, rows, (value.shape[0], *shape[1:]))
        places = np.arange(math.prod(shape)).reshape(shape)
    return value


def _average_pool(reader: Reader) -> Value:
    """A convolution of each channel with one weight; where windows reach into padding that does not count, a scale."""
    value, of = reader.value(), reader.attributes()
    channels, sizes = _image(reader, value, "pools")
    if len(sizes) > 2:
        raise reader.refuse(f"pools {text(value.shape)}; only 1-d and 2-d are known")
    counts, begins, ends, kernel = np.ones(()), [], [], []
    strides, dilations = (_per_axis(reader, name, [1] * len(sizes), len(sizes)) for name in ("strides", "dilations"))
    for (places, begin, end), size in zip(_windows(reader, sizes), sizes, strict=True):
        low, high = (-begin, size + end) if of.get("count_include_pad", 0) else (0, size)
        counts = counts[..., None] * ((places >= low) & (places < high)).sum(axis=1)
        reach = int(places[-1, -1]) + 1 - size
        kernel.append(places.shape[1])
        begins.append(begin)
        ends.append(max(0, reach))
    if (counts == 0).any():
        raise reader.refuse("has windows of nothing but padding")
    out: list[int] = list(counts.shape)
    reader.room(channels, *kernel)
    same = np.unique(counts).size == 1
    weight = np.full((channels, 1, *kernel), 1 / counts.flat[0] if same else 1.0)
    found = _convolved(reader, Conv, value, out, weight, np.zeros(channels), strides, begins, ends, dilations, channels)
    return found if same else reader.scaled(found, 1 / counts)


def _global(reduce: Callable[[Reader, Value, list[int]], Value]) -> Read:
    def read(reader: Reader) -> Value:
        value = reader.value()
        _image(reader, value, "pools")
        return reduce(reader, value, list(range(2, len(value.shape))))

    return read


# Normalisation.


def _batch_normalization(reader: Reader) -> Value:
    of, value = reader.attributes(), reader.value()
    if of.get("training_mode", 0) or not of.get("spatial", 1):
        raise reader.refuse("is in training mode or normalises every element on its own")
    reader.alone()
    gain, offset, mean, variance = (reader.constant(place) for place in (1, 2, 3, 4))
    if (
        len(value.shape) < 2
        or None in value.shape[1:]
        or any(array.shape != (value.shape[1],) for array in (gain, offset, mean, variance))
    ):
        raise mismatch(reader.node, value.shape, gain.shape)
    with np.errstate(all="ignore"):  # refused below
        factor = 1 / np.sqrt(variance + _epsilon(reader))
        scale = gain * factor
        # Also what a runtime computes first that multiplies by `scale` and adds one constant.
        if not all(in_range(array) for array in (factor, scale, mean * scale, offset - mean * scale)):
            raise out_of_range(label(reader.node), "the scale or shift")
    along_channels = (-1, *(1,) * (len(value.shape) - 2))
    factor, gain, offset, mean = (array.reshape(along_channels) for array in (factor, gain, offset, mean))
    centred = reader.affine(value, np.ones(()), -mean)
    # Both always, also where they multiply by 1: two operations stand for the up to five roundings of a factor.
    if len(inner(centred.shape)) == len(value.shape):  # a fixed batch above 1: the graph has its axis
        factor, gain, offset = factor[None], gain[None], offset[None]
    return reader.scaled(reader.scaled(centred, factor), gain, offset)


def _epsilon(reader: Reader) -> float:
    # 1e-5: the default of the specifications; a runtime holds it in float32.
    return float(reader.attributes().get("epsilon", float(np.float32(1e-5))))


def _instance_normalization(reader: Reader) -> Value:
    value = reader.value()
    _image(reader, value, "normalises")
    axes = list(range(2, len(value.shape)))
    found = reader.normalised(value, axes, _epsilon(reader))
    along = (-1, *(1,) * len(axes))
    return reader.affine(found, reader.constant(1).reshape(along), reader.constant(2).reshape(along))


def _layer_normalization(reader: Reader) -> Value:
    reader.alone()
    value, rank = reader.value(), len(reader.value().shape)
    axes = list(range(reader.axis(-1, rank), rank))
    found = reader.normalised(value, axes, _epsilon(reader))
    return reader.affine(found, reader.constant(1), reader.constant(2) if reader.has(2) else np.zeros(()))


def _rms_normalization(reader: Reader) -> Value:
    value, rank = reader.value(), len(reader.value().shape)
    axes = list(range(reader.axis(-1, rank), rank))
    found = reader.normalised(value, axes, _epsilon(reader), centred=False)
    return reader.affine(found, reader.constant(1), np.zeros(()))


def _group_normalization(reader: Reader) -> Value:
    value, of = reader.value(), reader.attributes()
    channels, sizes = _image(reader, value, "normalises")
    groups = of["num_groups"]
    if groups < 1 or channels % groups:
        raise reader.refuse(f"divides {channels} channels into {groups} groups")
    grouped = reader.reshaped(value, (value.shape[0], groups, channels // groups * math.prod(sizes)))
    found = reader.reshaped(reader.normalised(grouped, [2], _epsilon(reader)), value.shape)
    along = (-1, *(1,) * len(sizes))
    return reader.affine(found, reader.constant(1).reshape(along), reader.constant(2).reshape(along))


def _softmax(log: bool) -> Read:
    def read(reader: Reader) -> Value:
        value = reader.value()
        rank = len(value.shape)
        # Before set 13, all axes from this one on are one.
        axes = list(range(reader.axis(1, rank), rank)) if reader.opset < 13 else [reader.axis(-1, rank)]
        return reader.softmax(value, axes, log, reader.masks.get(reader.node.input[0]))

    return read


# Reductions.


def _reduced(reduce: Callable[[Reader, Value, list[int], bool], Value]) -> Read:
    def read(reader: Reader) -> Value:
        value, of = reader.value(), reader.attributes()
        rank = len(value.shape)
        wanted = reader.integers(1, "axes")
        if not wanted and of.get("noop_with_empty_axes", 0):
            if reader.node.op_type in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"):
                raise reader.refuse("goes over no axes")
            return value
        axes = reader.axes(wanted, rank) if wanted else list(range(rank))
        return reduce(reader, value, axes, bool(of.get("keepdims", 1)))

    return read


def _count(value: Value, axes: Sequence[int]) -> int:
    return math.prod(full(value.shape)[axis] for axis in axes)


def _total(reader: Reader, value: Value, axes: list[int], keepdims: bool = True) -> Value:
    return reader.total(value, axes, 1.0, keepdims)


def _average(reader: Reader, value: Value, axes: list[int], keepdims: bool = True) -> Value:
    return reader.total(value, axes, 1 / _count(value, axes), keepdims)


def _largest(reader: Reader, value: Value, axes: list[int], keepdims: bool = True) -> Value:
    return reader.extreme(value, axes, keepdims)


def _smallest(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return reader.scaled(reader.extreme(reader.scaled(value, -1.0), axes, keepdims), -1.0)


def _squares(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return reader.total(reader.activated(value, "power", 2.0), axes, 1.0, keepdims)


def _length(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return reader.activated(_squares(reader, value, axes, keepdims), "sqrt")


def _sizes_added(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return reader.total(reader.larger(value, reader.scaled(value, -1.0)), axes, 1.0, keepdims)


def _log_sum(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return reader.activated(reader.total(value, axes, 1.0, keepdims), "log")


def _log_sum_exp(reader: Reader, value: Value, axes: list[int], keepdims: bool) -> Value:
    return _log_sum(reader, reader.activated(value, "exp"), axes, keepdims)


# Moving numbers.


def _flatten(reader: Reader) -> Value:
    value = reader.value()
    axis = reader.attributes().get("axis", 1)
    axis += len(value.shape) if axis < 0 else 0
    head, tail = value.shape[:axis], value.shape[axis:]
    first, second = (None if None in part else math.prod(full(part)) for part in (head, tail))
    if (None in head and math.prod(full(head)) > 1) or None in tail:
        raise mixes(reader.node, f"flattens {text(value.shape)} at axis {axis}")
    return reader.reshaped(value, (first, second))


def _reshape(reader: Reader) -> Value:
    value = reader.value()
    target = reader.integers(1, "shape")
    if target is None:
        raise reader.refuse("has no target shape")
    keeps_zero = bool(reader.attributes().get("allowzero", 0))
    sizes: list[int | None] = []
    for place, size in enumerate(target):
        if size == 0 and not keeps_zero:
            if place >= len(value.shape):
                raise reader.refuse(f"copies axis {place} of {text(value.shape)}")
            sizes.append(value.shape[place])
        else:
            sizes.append(None if size == BATCH else size)
    total = math.prod(inner(value.shape))
    if value.batched:
        before, after = (math.prod(full(part)) for part in _around(value.shape))
        # -1, or 1 in the first place, stands for the batch where the other axes hold all numbers of one example.
        known = [None] if None in sizes else [-1, *([1] if sizes[:1] == [1] else [])]
        for place in [sizes.index(size) for size in known if size in sizes]:
            head, tail = _inferred(sizes[:place], before), _inferred(sizes[place + 1 :], after)
            if head is not None and tail is not None:
                return reader.reshaped(value, (*head, None, *tail))
        shown = ["batch" if size == BATCH else size for size in target]
        raise mixes(reader.node, f"reshapes {text(value.shape)} to {shown}")
    found = _inferred(sizes, total)
    if found is None:
        raise NetworkFileError(f"node {label(reader.node)} reshapes {text(value.shape)} to {target}: it does not fit")
    return reader.reshaped(value, found)


def _around(shape: FileShape) -> tuple[FileShape, FileShape]:
    """The axes before and behind the symbolic batch."""
    place = shape.index(None)
    return shape[:place], shape[place + 1 :]


def _inferred(sizes: Sequence[int | None], total: int) -> tuple[int, ...] | None:
    """Sizes with a single -1 filled in, so that they hold `total` numbers; None where that is impossible."""
    known = [size for size in sizes if size != -1]
    if len(known) < len(sizes) - 1 or any(size is None or size < 0 for size in known):
        return None
    product = math.prod(size for size in known if size is not None)
    if len(known) == len(sizes):
        missing = 1 if product == total else -1
    else:
        missing = total // product if product and total % product == 0 else -1
    if missing < 0:
        return None
    return tuple(missing if size == -1 or size is None else size for size in sizes)


def _transpose(reader: Reader) -> Value:
    value = reader.value()
    order = [int(axis) for axis in reader.attributes().get("perm", range(len(value.shape))[::-1])]
    if reader.axes(order, len(value.shape)) != list(range(len(value.shape))):
        raise reader.refuse(f"transposes {text(value.shape)} by {order}")
    return reader.transposed(value, [axis % len(value.shape) for axis in order])


def _squeeze(reader: Reader) -> Value:
    value = reader.value()
    rank = len(value.shape)
    axes = reader.integers(1, "axes")
    dropped = reader.axes(axes, rank) if axes is not None else [a for a in range(rank) if value.shape[a] == 1]
    if any(value.shape[axis] != 1 for axis in dropped):
        raise reader.refuse(f"squeezes axes {dropped} of {text(value.shape)}, which are not of length one")
    return reader.reshaped(value, tuple(size for axis, size in enumerate(value.shape) if axis not in dropped))


def _unsqueeze(reader: Reader) -> Value:
    value = reader.value()
    axes = reader.integers(1, "axes") or []
    rank = len(value.shape) + len(axes)
    added = set(reader.axes(axes, rank))
    old = iter(value.shape)
    return reader.reshaped(value, tuple(1 if axis in added else next(old) for axis in range(rank)))


def _concat(reader: Reader) -> Value:
    parts = [reader.operand(place) for place in range(len(reader.node.input))]
    return reader.joined(parts, reader.attributes()["axis"])


def _split(reader: Reader) -> list[Value]:
    value, count = reader.value(), len(reader.node.output)
    axis = reader.axis(0, len(value.shape))
    size = value.shape[axis]
    if size is None:
        raise mixes(reader.node, "splits the batch axis")
    sizes = reader.integers(1, "split")
    if sizes is None:
        chunk = -(-size // count)
        sizes = [min(chunk, size - place * chunk) for place in range(count)]
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 1:
        raise reader.refuse(f"splits {size} into {sizes}")
    places, start, found = reader.places(value), 0, []
    for name, length in zip(reader.node.output, sizes, strict=True):
        part = np.take(places, np.arange(start, start + length), axis=axis)
        start += length
        if name and reader.uses[name]:
            found.append(reader.picked(value, part, (*value.shape[:axis], length, *value.shape[axis + 1 :])))
        else:
            found.append(value)  # nothing reads it
    return found


def _slice(reader: Reader) -> Value:
    value, rank = reader.value(), len(reader.value().shape)
    starts, ends = reader.integers(1, "starts"), reader.integers(2, "ends")
    if starts is None or ends is None:
        raise reader.refuse("has no starts or no ends")
    named = reader.integers(3, "axes")
    steps = reader.integers(4, "steps") or [1] * len(starts)
    axes = list(range(len(starts))) if named is None else [axis % rank for axis in named]
    if len({len(starts), len(ends), len(steps), len(axes)}) > 1 or 0 in steps or max(axes, default=0) >= rank:
        raise reader.refuse(f"has starts {starts}, ends {ends}, axes {axes}, steps {steps}")
    cut, shape = [slice(None)] * rank, list(value.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if value.shape[axis] is None:
            if start != 0 or step != 1 or (end != BATCH and end < 2**31 - 1):
                raise mixes(reader.node, "cuts the batch axis")
            continue
        if BATCH in (start, end) and (end != BATCH or step > 0):
            raise counts_batch(reader.node)
        size = int(value.shape[axis] or 0)
        # numpy counts a negative end from the back, also -1 - size; that is "from before the first" here.
        stop = None if step < 0 and end < -size else end
        cut[axis] = slice(max(start, -size) if start < 0 else start, stop, step)
        shape[axis] = len(range(size)[cut[axis]])
    return reader.picked(value, reader.places(value)[tuple(cut)], tuple(shape))


def _gather(reader: Reader) -> Value:
    value = reader.value()
    axis = reader.axis(0, len(value.shape))
    if not reader.is_constant(1) or reader.constants[reader.node.input[1]].dtype.kind != "i":
        raise reader.refuse("picks by indices that are not constant")
    indices = reader.constants[reader.node.input[1]]
    size = value.shape[axis]
    if size is None:
        raise mixes(reader.node, "picks along the batch axis")
    if ((indices < -size) | (indices >= size)).any():
        raise reader.refuse(f"picks beyond the {size} elements of axis {axis}")
    shape = (*value.shape[:axis], *indices.shape, *value.shape[axis + 1 :])
    reader.room(*full(shape))
    return reader.picked(value, np.take(reader.places(value), indices, axis=axis), shape)


def _pad(reader: Reader) -> Value:
    value, rank, mode = reader.value(), len(reader.value().shape), reader.attributes().get("mode", "constant")
    pads = reader.integers(1, "pads")
    fill = reader.number(2, "value", 0.0) or 0.0
    axes = [axis % rank for axis in reader.integers(3, "axes") or range(rank)] if reader.has(3) else list(range(rank))
    if pads is None or len(pads) != 2 * len(axes) or mode not in ("constant", "reflect", "edge", "wrap"):
        raise reader.refuse(f"has pads {pads} for {rank} axes in mode {mode}")
    if not math.isfinite(fill) and any(amount > 0 for amount in pads):
        raise reader.refuse(f"pads with {fill}")
    places, shape = reader.places(value), list(value.shape)
    for number, axis in enumerate(axes):
        before, after = pads[number], pads[number + len(axes)]
        if before == after == 0:
            continue
        size = shape[axis]
        if size is None:
            raise mixes(reader.node, "pads the batch axis")
        shape[axis] = size + before + after
        if size + before + after < 1 or (mode == "reflect" and max(before, after) >= size):
            raise reader.refuse(f"pads {size} elements by {before} and {after} in mode {mode}")
        reader.room(*full(tuple(shape)))
        at = np.arange(-before, size + after)
        inside = (at >= 0) & (at < size)
        if mode == "reflect":
            at = np.where(at < 0, -at, np.where(at >= size, 2 * (size - 1) - at, at))
        at = at % size if mode == "wrap" else at.clip(0, size - 1)
        places = np.take(places, at, axis=axis)
        if mode == "constant":
            places = np.where(inside.reshape(-1, *(1,) * (rank - axis - 1)), places, -1)
    return reader.filled(value, places, tuple(shape), np.where(places < 0, fill, 0.0))


def _expand(reader: Reader) -> Value:
    value, target = reader.value(), reader.integers(1, "shape")
    if target is None or any(size < 1 and size != BATCH for size in target):
        raise reader.refuse(f"expands to {target}")
    wanted = tuple(None if size == BATCH else size for size in target)
    return reader.expanded(value, reader.common(value.shape, wanted))


def _tile(reader: Reader) -> Value:
    value, repeats = reader.value(), reader.integers(1, "repeats")
    if repeats is None or len(repeats) != len(value.shape) or min(repeats, default=1) < 1:
        raise reader.refuse(f"repeats {text(value.shape)} {repeats} times")
    if any(size is None and count != 1 for size, count in zip(value.shape, repeats, strict=True)):
        raise mixes(reader.node, "repeats the batch axis")
    shape = tuple(None if s is None else s * r for s, r in zip(value.shape, repeats, strict=True))
    reader.room(*full(shape))
    return reader.picked(value, np.tile(reader.places(value), repeats), shape)


def _depth_to_space(reader: Reader) -> Value:
    value, of = reader.value(), reader.attributes()
    channels, sizes = _image(reader, value, "moves")
    block = of["blocksize"]
    if block < 1 or len(sizes) != 2 or channels % block**2:
        raise reader.refuse(f"moves channels of {text(value.shape)} to blocks of {block}")
    (height, width), c = sizes, channels // block**2
    places = reader.places(value)
    if of.get("mode", "DCR") == "DCR":
        places = places.reshape(block, block, c, height, width).transpose(2, 3, 0, 4, 1)
    else:
        places = places.reshape(c, block, block, height, width).transpose(0, 3, 1, 4, 2)
    return reader.picked(value, places, (value.shape[0], c, height * block, width * block))


def _space_to_depth(reader: Reader) -> Value:
    value, block = reader.value(), reader.attributes()["blocksize"]
    channels, sizes = _image(reader, value, "moves")
    if block < 1 or len(sizes) != 2 or sizes[0] % block or sizes[1] % block:
        raise reader.refuse(f"moves blocks of {block} of {text(value.shape)} to channels")
    height, width = sizes[0] // block, sizes[1] // block
    places = reader.places(value).reshape(channels, height, block, width, block).transpose(2, 4, 0, 1, 3)
    return reader.picked(value, places, (value.shape[0], channels * block**2, height, width))


def _resize(reader: Reader) -> Value:
    """Nearest: a `Pick`; linear: a `Dense` an axis."""
    value, of, kind = reader.value(), reader.attributes(), reader.node.op_type
    rank, mode = len(value.shape), of.get("mode", "nearest")
    old = kind == "Upsample" or reader.opset < 11
    if mode not in ("nearest", "linear") or of.get("antialias", 0) or of.get("exclude_outside", 0):
        raise reader.refuse(f"resizes by {mode}, with antialias or excluding what is outside; not known here")
    place = 1 if old else 2
    scales = [float(s) for s in reader.constant(place).ravel()] if reader.has(place) else of.get("scales")
    wanted = reader.integers(3, "sizes") if not old and reader.has(3) else None
    axes = [axis % rank for axis in of.get("axes", range(rank))]
    if wanted is not None and of.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise reader.refuse("keeps the aspect ratio")
    if (wanted is None and not scales) or len(wanted or scales or ()) != len(axes):
        raise reader.refuse("has no sizes and no scales for its axes")
    # Before set 11, places are counted from the left edge and rounded down; linear ones in the same way.
    how = "asymmetric" if old else of.get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else of.get("nearest_mode", "round_prefer_floor")
    for number, axis in enumerate(axes):
        size = value.shape[axis]
        if size is None:
            if (wanted[number] not in (1, BATCH)) if wanted else (scales[number] != 1):  # type: ignore[index]
                raise mixes(reader.node, "resizes the batch axis")
            continue
        out = wanted[number] if wanted else _floor(reader, size, scales[number])  # type: ignore[index]
        if out < 1:
            raise reader.refuse(f"resizes an axis to {out}")
        shape = (*value.shape[:axis], out, *value.shape[axis + 1 :])
        reader.room(*full(shape))
        scale = np.float32(out / size if wanted else scales[number])  # type: ignore[index]
        if out == size and scale == 1:
            continue
        at = _coordinates(reader, how, size, out, scale)
        if mode == "nearest":
            # Before set 11 onnxruntime rounds up where an axis becomes smaller.
            near = _NEAREST["ceil" if old and scale < 1 else rounding](at).astype(np.int64).clip(0, size - 1)
            value = reader.picked(value, np.take(reader.places(value), near, axis=axis), shape)
        else:
            reader.room(out, size)
            at = at.astype(float).clip(0, size - 1)
            weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
            last = [*(a for a in range(rank) if a != axis), axis]
            found = reader.dense(reader.transposed(value, last), weight)
            value = reader.transposed(found, [last.index(a) for a in range(rank)])
    return value


def _floor(reader: Reader, size: int, scale: float) -> int:
    if not 0 < scale < 2**31:
        raise reader.refuse(f"resizes by {scale}")
    return math.floor(size * scale)


_NEAREST: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda at: np.ceil(at - np.float32(0.5)),
    "round_prefer_ceil": lambda at: np.floor(at + np.float32(0.5)),
    "floor": lambda at: np.floor(at),
    "ceil": lambda at: np.ceil(at),
}


def _coordinates(reader: Reader, how: str, size: int, out: int, scale: Any) -> numpy.ndarray:
    """Where each output lies among the inputs, in float32, as runtimes compute it."""
    x, half = np.arange(out, dtype=np.float32), np.float32(0.5)
    match how:
        case "asymmetric":
            return x / scale
        case "half_pixel":
            return (x + half) / scale - half
        case "pytorch_half_pixel":
            return (x + half) / scale - half if out > 1 else np.zeros(1, np.float32)
        case "align_corners":
            return x * np.float32(size - 1) / np.float32(out - 1) if out > 1 else np.zeros(1, np.float32)
        case "half_pixel_symmetric":
            centre = np.float32(size / 2) * (1 - np.float32(out) / (scale * np.float32(size)))
            return centre + (x + half) / scale - half
    raise reader.refuse(f"transforms coordinates by {how}")


READERS: dict[str, Read] = {
    "Abs": _abs,
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Celu": _celu,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _activation("cos"),
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _elu,
    "Erf": _activation("erf"),
    "Exp": _activation("exp"),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(_average),
    "GlobalMaxPool": _global(_largest),
    "GroupNormalization": _group_normalization,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _activation("hard_swish"),
    "Identity": _identity,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky,
    "Log": _activation("log"),
    "LogSoftmax": _softmax(log=True),
    "MatMul": _matmul,
    "Max": _max,
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Min": _min,
    "Mish": _activation("mish"),
    "Mul": _mul,
    "Neg": _neg,
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _pow,
    "RMSNormalization": _rms_normalization,
    "Reciprocal": lambda reader: reader.inverse(reader.value()),
    "ReduceL1": _reduced(_sizes_added),
    "ReduceL2": _reduced(_length),
    "ReduceLogSum": _reduced(_log_sum),
    "ReduceLogSumExp": _reduced(_log_sum_exp),
    "ReduceMax": _reduced(_largest),
    "ReduceMean": _reduced(_average),
    "ReduceMin": _reduced(_smallest),
    "ReduceSum": _reduced(_total),
    "ReduceSumSquare": _reduced(_squares),
    "Relu": _relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _selu,
    "Sigmoid": _activation("sigmoid"),
    "Sign": _activation("sign"),
    "Sin": _activation("sin"),
    "Slice": _slice,
    "Softmax": _softmax(log=False),
    "Softplus": _activation("softplus"),
    "Softsign": _softsign,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _activation("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Swish": _swish,
    "Tanh": _activation("tanh"),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
    "Where": _where,
}
