"""Constants of an ONNX file that follow from others: computed by ONNX's own reference evaluator, within limits.

What only moves numbers carries `nodes.BATCH`, the stand-in of a symbolic batch size, along with others. A constant
that is expanded along the batch (a class token, say) keeps length one there, which broadcasts as the batch would.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from netassay.heavy import np, onnx
from netassay.networks.nodes import BATCH, attributes, broadcast, counts_batch, unsupported

if TYPE_CHECKING:
    import numpy
    from onnx import NodeProto

#: Elements of all constants that follow from others: a chain of Concat doubles at each node, a Gather repeats a row.
LARGEST_FOLDED = 2**24

#: They only move, pick, choose or cast elements, so that they are exact and `BATCH` survives them.
MOVES = frozenset({"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split",
                   "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"})  # fmt: skip

#: Elementwise, in the file's own precision. Of Add, Div, Mul, Sub, Sqrt, IEEE 754 leaves a runtime no choice.
ELEMENTWISE = frozenset({"Abs", "Add", "And", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
                         "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not",
                         "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh",
                         "Xor"})  # fmt: skip

_MAKES = frozenset({"ConstantOfShape", "EyeLike", "MatMul", "Pad", "Range", "ReduceMax", "ReduceMean", "ReduceMin",
                    "ReduceProd", "ReduceSum", "Shape", "Size", "Trilu"})  # fmt: skip

FOLDED = MOVES | ELEMENTWISE | _MAKES


def constant(node: NodeProto) -> numpy.ndarray:
    """What a Constant node holds."""
    (name, value), *_ = attributes(node).items()
    if name == "value":
        return onnx.numpy_helper.to_array(value)
    if name in ("value_float", "value_floats"):
        return np.asarray(value, dtype=np.float32)
    if name in ("value_int", "value_ints"):
        return np.asarray(value, dtype=np.int64)
    raise unsupported(node, f"holds a {name.removeprefix('value_').replace('_', ' ')}, not a tensor of numbers")


class Folder:
    """Computes nodes whose inputs are all constants. given: elements of the file's own constants."""

    def __init__(self, opset: int, given: int) -> None:
        self.opset, self.limit, self.folded = opset, LARGEST_FOLDED + given, 0

    def fold(self, node: NodeProto, constants: dict[str, numpy.ndarray]) -> list[numpy.ndarray]:
        """The node's outputs. Raises UnsupportedOperator where they are too large or need the batch size."""
        from onnx.reference import ReferenceEvaluator  # not loaded with onnx itself; few files need it

        names = [name for name in node.input if name]
        arrays = [np.asarray(constants[name]) for name in names]
        arrays, carried = self._without_batch(node, arrays)
        size = self._size(node, arrays)
        self.folded += size
        if self.folded > self.limit:
            raise unsupported(node, f"makes a constant that is too large: {size:,} elements are computed with")
        if carried is not None:
            return [carried]
        inputs = dict(zip(names, arrays, strict=True))
        empty = onnx.helper.make_empty_tensor_value_info
        outputs = [name for name in node.output if name]
        graph = onnx.helper.make_graph([node], "constant", list(map(empty, inputs)), list(map(empty, outputs)))
        alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        with np.errstate(all="ignore"):  # infinity and NaN are refused where they are used
            found: Any = ReferenceEvaluator(alone).run(None, inputs)
        return [np.asarray(array) for array in found]

    def _without_batch(
        self, node: NodeProto, arrays: list[numpy.ndarray]
    ) -> tuple[list[numpy.ndarray], numpy.ndarray | None]:
        """The inputs as they may be computed with, and the result where `BATCH` itself decides it."""
        kind = node.op_type
        open_ = [array.dtype == np.int64 and bool((array == BATCH).any()) for array in arrays]
        if not any(open_):
            return arrays, None
        if kind == "ConstantOfShape" or (kind == "Expand" and not open_[0]):
            arrays[-1] = np.where(arrays[-1] == BATCH, 1, arrays[-1])
            return arrays, None
        if kind in ("Shape", "Size"):
            return arrays, None
        cast = kind == "Cast" and attributes(node)["to"] != onnx.TensorProto.INT64
        moved = range(len(arrays)) if kind in ("Concat", "Where") else range(1) if kind in MOVES else ()
        if not cast and not any(is_open and place not in moved for place, is_open in enumerate(open_)):
            return arrays, None
        if kind in ("Equal", "Mul", "Div") and len(arrays) == 2:
            left, right = np.broadcast_arrays(*arrays)
            at = (left == BATCH, right == BATCH)
            # No batch size is 0 or negative; times 1 or divided by 1 it stays what it is.
            if kind == "Equal" and not (at[0] & (right > 0) | at[1] & (left > 0) | at[0] & at[1]).any():
                return arrays, None
            neutral = at[0] & (right == 1) | (at[1] & (left == 1) if kind == "Mul" else False)
            if kind != "Equal" and bool((neutral | ~(at[0] | at[1])).all()):
                with np.errstate(all="ignore"):
                    rest = left * right if kind == "Mul" else left // np.where(right == 0, 1, right)
                return arrays, np.where(neutral, BATCH, rest)
        raise counts_batch(node)

    def _size(self, node: NodeProto, arrays: list[numpy.ndarray]) -> int:
        """Elements that the node reads and writes, without computing it."""
        size, of = sum(array.size for array in arrays), attributes(node)
        match node.op_type:
            case "Gather":
                axis = of.get("axis", 0)
                size += arrays[1].size * (arrays[0].size // max(1, arrays[0].shape[axis]))
            case "Expand":
                size += _elements(broadcast(arrays[0].shape, tuple(map(int, arrays[1]))) or ())
            case "Tile":
                size += arrays[0].size * _elements(arrays[1])
            case "ConstantOfShape":
                size += _elements(arrays[0])
            case "Range":
                start, limit, delta = (float(array) for array in arrays)
                size += max(0, math.ceil((limit - start) / delta)) if delta else 0
            case "Pad":
                pads = [int(p) for p in (arrays[1].ravel() if len(arrays) > 1 else of["pads"])]
                size += _elements(s + sum(map(abs, pads)) for s in arrays[0].shape)
            case "MatMul":
                columns = arrays[1].shape[-1] if arrays[1].ndim > 1 else 1
                batch = _elements(arrays[1].shape[:-2]) if arrays[0].ndim < 3 else 1
                size += arrays[0].size * columns * batch
            case kind if kind in ELEMENTWISE or kind == "Where":
                size += _elements(broadcast(*(array.shape for array in arrays)) or ())
        return size


def _elements(shape: Any) -> int:
    return math.prod(max(0, int(size)) for size in shape)
