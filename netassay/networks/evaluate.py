"""Evaluate a graph with PyTorch, in the precision of its input; differentiable in the input and in the constants."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.functions import FUNCTIONS
from netassay.networks.graph import (
    Activation,
    Conv,
    ConvTranspose,
    Dense,
    Graph,
    Operation,
    Pick,
    Product,
    Relu,
    Reshape,
    Scale,
    Sum,
)

if TYPE_CHECKING:
    from torch import Tensor

#: (weight, bias) or (scale, shift) of operations, in place of the constants of the graph itself.
Constants = Mapping[Operation, "tuple[Tensor, Tensor]"]

#: Constants as tensors, by (dtype, device); they live as long as their operation.
_tensors: weakref.WeakKeyDictionary[Operation, dict[tuple[object, object], tuple[Tensor, Tensor]]]
_tensors = weakref.WeakKeyDictionary()


def constants(
    operation: Dense | Conv | ConvTranspose | Scale, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
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
    return values(graph, x, replaced)[graph.output]


def values(graph: Graph, x: Tensor, replaced: Constants | None = None) -> dict[str, Tensor]:
    """All values of the network that its output depends on, by name, each (n, *shape); see `forward`."""
    if tuple(x.shape[1:]) != graph.input_shape:
        raise ValueError(f"the network reads (n, {_axes(graph.input_shape)}) but was given {tuple(x.shape)}")
    found = {graph.input: x}
    for operation in graph.needed:
        found[operation.target] = apply(operation, *(found[source] for source in operation.sources), replaced=replaced)
    return found


def apply(operation: Operation, *given: Tensor, replaced: Constants | None = None) -> Tensor:
    """One operation on a batch: the values of its sources, (n, *source shape) each -> (n, *operation.shape)."""
    x = given[0]
    match operation:
        case Relu():
            return torch.relu(x)
        case Reshape():
            return x.reshape(len(x), *operation.shape)
        case Pick():
            return pick(operation, x)
        case Activation():
            return FUNCTIONS[operation.function](x, *operation.parameters)
        case Sum():
            return operation.factors[0] * x + operation.factors[1] * given[1]
        case Product():
            return x * given[1]
        case Dense() | Conv() | ConvTranspose() | Scale():
            pair = replaced.get(operation) if replaced else None
            first, second = pair if pair is not None else constants(operation, x.dtype, x.device)
            return first * x + second if isinstance(operation, Scale) else linear(operation, x, first, second)
    raise TypeError(f"no rule evaluates {type(operation).__name__} ({operation.name})")


def pick(operation: Pick, x: Tensor) -> Tensor:
    """The numbers of x, (n, *source shape), that a Pick takes: (n, *operation.shape)."""
    indices = _indices(operation, x.device)
    found = x.flatten(1)[:, indices.clamp(min=0)]
    if bool((indices < 0).any()):
        found = torch.where(indices >= 0, found, 0.0)
    return found.reshape(len(x), *operation.shape)


def unpick(operation: Pick, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The adjoint of `pick`: what each number of the source collects of a, (n, *operation.shape): (n, *shape)."""
    indices = _indices(operation, a.device)
    a = a.flatten(1)
    if bool((indices < 0).any()):
        a = torch.where(indices >= 0, a, 0.0)
    found = a.new_zeros(len(a), math.prod(shape)).index_add_(1, indices.clamp(min=0), a)
    return found.reshape(len(a), *shape)


def _indices(operation: Pick, device: torch.device) -> Tensor:
    return torch.from_numpy(operation.indices).flatten().to(device)


def linear(operation: Dense | Conv | ConvTranspose, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear part of an operation with this weight, plus `bias` unless None."""
    if isinstance(operation, Dense):
        return torch.nn.functional.linear(x, weight, bias)
    top, left, bottom, right = operation.padding
    of = operation.groups, operation.dilation
    if isinstance(operation, ConvTranspose):
        whole = torch.nn.functional.conv_transpose2d(x, weight, None, operation.stride, 0, 0, *of)
        height, width = operation.shape[1:]
        # Beyond the last window (output padding) there is nothing but the bias.
        more = (0, max(0, left + width - whole.shape[3]), 0, max(0, top + height - whole.shape[2]))
        cut = torch.nn.functional.pad(whole, more)[:, :, top : top + height, left : left + width]
        return cut if bias is None else cut + bias[:, None, None]
    padding = (top, left)
    if (bottom, right) != padding:
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        padding = (0, 0)
    return torch.nn.functional.conv2d(x, weight, bias, operation.stride, padding, operation.dilation, operation.groups)


def _axes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
