"""The linear operations of a graph on one value, as maps on tensors: x -> W x + b, and a -> a W.

One entry of `MAPS` per linear operation. The weights are handed in, so the same maps serve W, |W| and W squared:
interval bounds, error bounds and row norms are the same lines of code with other weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import np, torch
from netassay.networks import evaluate
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


@dataclass(frozen=True, eq=False)
class Weights:
    """weight, bias: of one operation, in its own shapes (what only moves numbers has none); absolute: |weight|.

    constant: the bias as a value, (*shape of the target). terms: how many products are summed into one number, the
    larger of the two directions. A Sum has two, of its factors.
    """

    weight: Tensor | None
    bias: Tensor | None
    absolute: Tensor | None
    constant: Tensor | None
    terms: int


@dataclass(frozen=True)
class Map:
    """apply(operation, weight, bias or None, x): (batch, *source) -> (batch, *target).

    adjoint(operation, weight, a, shape of the source): (batch, *target) -> (batch, *source), a -> a W.
    """

    apply: Callable[..., Tensor]
    adjoint: Callable[..., Tensor]


def _sums(operation: Dense | Conv | ConvTranspose, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return evaluate.linear(operation, x, weight, bias)


def _dense_adjoint(operation: Dense, weight: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return a @ weight


def _conv_adjoint(operation: Conv, weight: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    top, left, bottom, right = operation.padding
    padded = (shape[1] + top + bottom, shape[2] + left + right)
    reach = [
        (a.shape[2 + axis] - 1) * operation.stride[axis] + operation.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        for axis in (0, 1)
    ]
    whole = torch.nn.functional.conv_transpose2d(
        a, weight, None, operation.stride, 0, 0, operation.groups, operation.dilation
    )
    # Rows and columns that no window reached (the stride left them over) have coefficient zero.
    whole = torch.nn.functional.pad(whole, (0, padded[1] - reach[1], 0, padded[0] - reach[0]))
    return whole[:, :, top : padded[0] - bottom, left : padded[1] - right]


def _transposed_adjoint(operation: ConvTranspose, weight: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    top, left, _, _ = operation.padding
    whole = [
        (shape[1 + axis] - 1) * operation.stride[axis] + operation.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        for axis in (0, 1)
    ]
    # The whole result that the padding was cut from; what output padding added beyond it saw no input.
    bottom, right = whole[0] - top - a.shape[2], whole[1] - left - a.shape[3]
    a = torch.nn.functional.pad(a, (left, right, top, bottom))
    return torch.nn.functional.conv2d(a, weight, None, operation.stride, 0, operation.dilation, operation.groups)


def _scale(operation: Scale, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return x * weight if bias is None else x * weight + bias


def _scale_adjoint(operation: Scale, weight: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return a * weight


def _reshape(operation: Reshape, weight: None, bias: None, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *operation.shape)


def _reshape_adjoint(operation: Reshape, weight: None, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return a.reshape(a.shape[0], *shape)


def _pick(operation: Pick, weight: None, bias: None, x: Tensor) -> Tensor:
    return evaluate.pick(operation, x)


def _pick_adjoint(operation: Pick, weight: None, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return evaluate.unpick(operation, a, shape)


MAPS: dict[type[Operation], Map] = {
    Dense: Map(_sums, _dense_adjoint),
    Conv: Map(_sums, _conv_adjoint),
    ConvTranspose: Map(_sums, _transposed_adjoint),
    Pick: Map(_pick, _pick_adjoint),
    Scale: Map(_scale, _scale_adjoint),
    Reshape: Map(_reshape, _reshape_adjoint),
}


def _arrays(operation: Operation) -> tuple[np.ndarray, np.ndarray, int] | None:
    """weight, bias and terms of an operation that has weights."""
    match operation:
        case Dense():
            return operation.weight, operation.bias, max(operation.weight.shape)
        case Conv():
            out, fan_in, *window = operation.weight.shape
            return operation.weight, operation.bias, math.prod(window) * max(fan_in, out // operation.groups)
        case ConvTranspose():
            fan_in, out, *window = operation.weight.shape
            return operation.weight, operation.bias, math.prod(window) * max(fan_in // operation.groups, out)
        case Scale():
            # Broadcast to the value's own shape: a bound may be asked where the batch axis has another length.
            scale, shift = (np.broadcast_to(array, operation.shape) for array in (operation.scale, operation.shift))
            return scale, shift, 1
    return None


def tensors(operation: Operation, dtype: torch.dtype) -> Weights:
    """The weights of one operation in `dtype`."""
    arrays = _arrays(operation)
    if arrays is None:
        return Weights(None, None, None, None, _terms(operation))
    weight, bias = (torch.from_numpy(np.array(array, dtype=np.float64)).to(dtype) for array in arrays[:2])
    constant = (bias[:, None, None] if isinstance(operation, Conv | ConvTranspose) else bias).expand(operation.shape)
    return Weights(weight, bias, weight.abs(), constant.contiguous(), arrays[2])


def _terms(operation: Operation) -> int:
    """How many numbers an operation without weights adds up, in either direction."""
    if isinstance(operation, Pick):
        taken = operation.indices[operation.indices >= 0]
        return int(np.bincount(taken.ravel()).max()) if taken.size else 1
    return 2 if isinstance(operation, Sum) else 1


_kept: weakref.WeakKeyDictionary[Graph, dict] = weakref.WeakKeyDictionary()


def weights(graph: Graph, dtype: torch.dtype) -> dict[str, Weights]:
    """The weights of all operations, by target. Kept as long as the graph lives: a group asks many times."""
    of_graph = _kept.setdefault(graph, {})
    if dtype not in of_graph:
        of_graph[dtype] = {operation.target: tensors(operation, dtype) for operation in operations(graph)}
    return of_graph[dtype]


def operations(graph: Graph) -> tuple[Operation, ...]:
    """The operations that the output depends on, first to last.

    Raises NotImplementedError naming an operation that no interpreter of the bounds has a rule for.
    """
    for operation in graph.needed:
        if type(operation) not in KINDS:
            raise NotImplementedError(
                f"no bound rule for {type(operation).__name__} ({operation.name}); rules exist for "
                f"{', '.join(sorted(kind.__name__ for kind in KINDS))}"
            )
    return graph.needed


#: What has a rule in each interpreter.
KINDS: tuple[type[Operation], ...] = (*MAPS, Sum, Relu, Activation, Product)


def chain(graph: Graph) -> tuple[Operation, ...]:
    """`operations`, where they are linear maps and ReLUs of which each reads what the one before it wrote.

    Raises NotImplementedError naming an operation for which that is not so.
    """
    at = graph.input
    for operation in operations(graph):
        if operation.sources != (at,) or not isinstance(operation, (Relu, *MAPS)):
            raise NotImplementedError(
                f"{operation.name} ({type(operation).__name__}) is no link of a chain of linear operations and ReLUs"
            )
        at = operation.target
    return graph.needed
