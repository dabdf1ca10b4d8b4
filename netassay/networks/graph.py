"""A network as a small graph of named operations: what every analysis walks.

Values have names (strings); an operation reads one value or two and writes one. Shapes are without the batch axis: a
value of shape (c, h, w) is a tensor (batch, c, h, w) whatever the batch axis of the file was. Constants of an operation
are numpy arrays in float64, copied from the file's float32 (exact), so that a bound may be computed in either precision
and a file can be checked where torch is not installed.

The kinds of operation are few, so that an interpreter (`netassay.networks.evaluate`, those of `netassay.numerics
.bounds`) is a page of rules. What a file says in other words is written in these by `netassay.networks.onnx_file`:

* all that moves numbers about (transposing, slicing, padding with zeros, nearest upsampling, broadcasting) is a `Pick`;
* average pooling is a `Conv` with one weight, a mean over axes a `Dense` of one row, a concatenation a `Sum` of picks;
* all that is piecewise linear is made of `Relu`: max(a, b) = b + relu(a - b), a x + (1 - a) relu(x) for a leaky one,
  so that whoever can split a ReLU can decide any of them;
* a product of two matrices of values is a `Sum` over a `Product` of picks; a softmax is 1 / sum_j exp(x_j - x_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Function = Literal[
    "cos",
    "elu",
    "erf",
    "exp",
    "gelu",
    "gelu_tanh",
    "hard_swish",
    "log",
    "mish",
    "power",
    "reciprocal",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "softplus",
    "sqrt",
    "tanh",
]


@dataclass(frozen=True, eq=False)
class Operation:
    """name: the node in the file; source, target: the values it reads and writes; shape: of its target."""

    name: str
    source: str
    target: str
    shape: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """All values it reads."""
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Dense(Operation):
    """y = W x + b on the last axis. weight: (outputs, inputs); bias: (outputs,)."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, eq=False)
class Conv(Operation):
    """2-d cross-correlation. weight: (out, in / groups, kh, kw); bias: (out,).

    padding: (top, left, bottom, right), zeros; stride, dilation: (vertical, horizontal).
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True, eq=False)
class ConvTranspose(Operation):
    """The adjoint of a 2-d cross-correlation, plus a bias. weight: (in, out / groups, kh, kw); bias: (out,).

    padding: (top, left, bottom, right), cut off the full result; what `shape` has beyond it (output padding) is added
    at the bottom and on the right. stride, dilation: (vertical, horizontal).
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True, eq=False)
class Relu(Operation):
    """y = max(x, 0)."""


@dataclass(frozen=True, eq=False)
class Reshape(Operation):
    """The same numbers in row-major order under another shape; flatten is the case of a shape with one axis."""


@dataclass(frozen=True, eq=False)
class Scale(Operation):
    """y = scale * x + shift, elementwise; both broadcast against the value's shape."""

    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, eq=False)
class Pick(Operation):
    """y_i = x_indices[i], of x in row-major order; 0 where the index is -1. indices: int64, of the target's shape."""

    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class Activation(Operation):
    """y = function(x), elementwise. parameters: of the function, see `netassay.networks.functions`."""

    function: Function
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class _OfTwo(Operation):
    """An operation on two values of one shape."""

    other: str

    @property
    def sources(self) -> tuple[str, ...]:
        return self.source, self.other


@dataclass(frozen=True, eq=False)
class Sum(_OfTwo):
    """y = factors[0] x + factors[1] other.

    larger: None, or names of two values of the same shape of which y is the larger one. No interpreter needs it; a box
    around y is tighter for it.
    """

    factors: tuple[float, float] = (1.0, 1.0)
    larger: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Product(_OfTwo):
    """y = x * other, elementwise."""


@dataclass(frozen=True, eq=False)
class Graph:
    """operations: in topological order. input, output: names of values. input_shape, output_shape: without batch."""

    operations: tuple[Operation, ...]
    input: str
    output: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.input: self.input_shape} | {operation.target: operation.shape for operation in self.operations}

    def shape_of(self, value: str) -> tuple[int, ...]:
        return self._shapes[value]

    @cached_property
    def needed(self) -> tuple[Operation, ...]:
        """The operations that the output depends on, first to last."""
        wanted, used = {self.output}, []
        for operation in reversed(self.operations):
            if operation.target in wanted:
                wanted.update(operation.sources)
                used.append(operation)
        return tuple(reversed(used))
