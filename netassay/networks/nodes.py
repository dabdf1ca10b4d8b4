"""Nodes of an ONNX file: names, attributes, shapes, and the errors that name them. Shared by the reader's parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from netassay.heavy import onnx
from netassay.method import InvalidInput

if TYPE_CHECKING:
    from onnx import AttributeProto, NodeProto

# A tensor's shape in the file: the batch axis None where it is symbolic, wherever it stands.
FileShape = tuple[int | None, ...]

#: Stands for a symbolic batch size in an integer constant computed from a shape. It is only ever moved, compared with
#: numbers no batch size can be, or multiplied by 1, so it arrives unchanged at the Reshape or Expand that uses it.
BATCH = -(2**63)


class NetworkFileError(InvalidInput, ValueError):
    """A file that cannot be used as a network: what, why, what to try. A ValueError too, for validators."""


class NotOnnx(NetworkFileError):
    """Truncated, corrupt, or no ONNX model at all."""


class PickledModel(NetworkFileError):
    """A file written by `torch.save` or `pickle`: reading it could run code, so it is refused unread."""


class UnsupportedOperator(NetworkFileError):
    """A node outside the operators, or outside the cases of one, that a `Graph` can express."""


class UnsupportedShape(NetworkFileError):
    """More than one input or output, or axes without a fixed length other than the batch axis."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the file that depends on the input: `name` is the graph's value that holds its numbers.

    Moving a symbolic batch axis past others changes the shape alone: the numbers of one example stay in their order.
    """

    name: str
    shape: FileShape

    @property
    def batched(self) -> bool:
        """It has a symbolic batch."""
        return None in self.shape


def batch_axis(shape: FileShape) -> int | None:
    """The axis of a tensor that its value in the graph lacks: the symbolic batch, or a leading axis of length one."""
    if None in shape:
        return shape.index(None)
    return 0 if len(shape) > 1 and shape[0] == 1 else None


def inner(shape: FileShape) -> tuple[int, ...]:
    """A tensor's shape without its batch axis."""
    batch = batch_axis(shape)
    return tuple(int(size or 0) for axis, size in enumerate(shape) if axis != batch)


def full(shape: FileShape) -> tuple[int, ...]:
    """A tensor's shape for one example: a symbolic batch has length one."""
    return tuple(1 if size is None else size for size in shape)


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that tensors of these shapes broadcast to, however large; None where they do not."""
    rank = max(map(len, shapes))
    found = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        longest = {size for size in sizes if size != 1}
        if len(longest) > 1:
            return None
        found.append(longest.pop() if longest else 1)
    return tuple(found)


def text(shape: FileShape) -> str:
    return f"({', '.join('batch' if size is None else str(size) for size in shape)})"


def label(node: NodeProto) -> str:
    """The node's name, or that of its first output where it has none."""
    return node.name or node.output[0]


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""

    def plain(attribute: AttributeProto) -> Any:
        value = onnx.helper.get_attribute_value(attribute)
        return value.decode() if isinstance(value, bytes) else value

    return {attribute.name: plain(attribute) for attribute in node.attribute}


def known(node: NodeProto) -> bool:
    """It is of ONNX's own operators, not of another domain."""
    return node.domain in ("", "ai.onnx")


def unsupported(node: NodeProto, why: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"node {label(node)} ({node.op_type}) {why}", what_to_try="export the network without it"
    )


def mixes(node: NodeProto, does: str) -> UnsupportedOperator:
    """The refusal of a node that moves or joins a symbolic batch axis."""
    return UnsupportedOperator(
        f"node {label(node)} ({node.op_type}) {does}, which mixes the batch with the values",
        "an analysis asks about one example",
        "export with a batch of 1 instead of a symbolic one",
    )


def counts_batch(node: NodeProto) -> UnsupportedOperator:
    """The refusal of a node that computes with the size of a symbolic batch."""
    return UnsupportedOperator(
        f"node {label(node)} ({node.op_type}) computes with the batch size",
        "only copying it into a shape is known",
        "export with a batch of 1 instead of a symbolic one",
    )


def mismatch(node: NodeProto, left: FileShape, right: FileShape) -> NetworkFileError:
    return NetworkFileError(f"node {label(node)} multiplies shapes that do not fit: {text(left)} and {text(right)}")
