"""Evaluate a graph with PyTorch, in the precision of its input; differentiable in the input and in the constants."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape, Scale

if TYPE_CHECKING:
    from torch import Tensor

#: (weight, bias) or (scale, shift) of operations, in place of the constants of the graph itself.
Constants = Mapping[Operation, "tuple[Tensor, Tensor]"]

#: Constants as tensors, by (dtype, device); they live as long as their operation.
_tensors: weakref.WeakKeyDictionary[Operation, dict[tuple[object, object], tuple[Tensor, Tensor]]]
_tensors = weakref.WeakKeyDictionary()


def constants(operation: Dense | Conv | Scale, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight, bias) or (scale, shift) of an operation as tensors, converted once. Do not write to them."""
    kept = _tensors.setdefault(operation, {})
    if (dtype, device) not in kept:
        pair = (
            (operation.scale, operation.shift) if isinstance(operation, Scale) else (operation.weight, operation.bias)
        )
        first, second = (torch.tensor(array, dtype=dtype, device=device) for array in pair)
        kept[dtype, device] = first, second
    return kept[dtype, device]


def forward(graph: Graph, x: Tensor, replaced: Constants | None = None) -> Tensor:
    """The network's output: (n, *output_shape) for x of shape (n, *input_shape), in x's dtype and on its device.

    `replaced` gives other constants to some operations, e.g. those under training. Raises ValueError where x has
    another shape.
    """
    if tuple(x.shape[1:]) != graph.input_shape:
        raise ValueError(f"the network reads (n, {_axes(graph.input_shape)}) but was given {tuple(x.shape)}")
    values = {graph.input: x}
    for operation in graph.operations:
        values[operation.target] = apply(operation, values[operation.source], replaced)
    return values[graph.output]


def apply(operation: Operation, x: Tensor, replaced: Constants | None = None) -> Tensor:
    """One operation on a batch: (n, *source shape) -> (n, *operation.shape)."""
    if isinstance(operation, Relu):
        return torch.relu(x)
    if isinstance(operation, Reshape):
        return x.reshape(len(x), *operation.shape)
    if not isinstance(operation, Dense | Conv | Scale):
        raise TypeError(f"no rule evaluates {type(operation).__name__} ({operation.name})")
    pair = replaced.get(operation) if replaced else None
    first, second = pair if pair is not None else constants(operation, x.dtype, x.device)
    if isinstance(operation, Scale):
        return first * x + second
    return linear(operation, x, first, second)


def linear(operation: Dense | Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear part of a Dense or Conv with this weight, plus `bias` unless None."""
    if isinstance(operation, Dense):
        return torch.nn.functional.linear(x, weight, bias)
    top, left, bottom, right = operation.padding
    padding = (top, left)
    if (bottom, right) != padding:
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        padding = (0, 0)
    return torch.nn.functional.conv2d(x, weight, bias, operation.stride, padding, operation.dilation, operation.groups)


def _axes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
