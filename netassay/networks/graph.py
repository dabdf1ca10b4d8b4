"""A network as a small graph of named operations: what every analysis walks.

Values have names (strings); an operation reads values and writes one. Shapes are without the batch axis: a value of
shape (c, h, w) is a tensor (batch, c, h, w) whatever the batch axis of the file was. Constants of an operation are
numpy arrays in float64, copied from the file's float32 (exact), so that a bound may be computed in either precision
and a file can be checked where torch is not installed.

Kinds of operation now: dense, conv, relu, flatten, reshape and shift-and-scale. A new kind is a new dataclass here, a
case in `netassay.networks.onnx_file`, a rule in each interpreter of `netassay.numerics.bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Operation:
    """name: the node in the file; source, target: the values it reads and writes; shape: of its target."""

    name: str
    source: str
    target: str
    shape: tuple[int, ...]


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
class Graph:
    """operations: in topological order. input, output: names of values. input_shape, output_shape: without batch."""

    operations: tuple[Operation, ...]
    input: str
    output: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def shape_of(self, value: str) -> tuple[int, ...]:
        if value == self.input:
            return self.input_shape
        return next(operation.shape for operation in self.operations if operation.target == value)
