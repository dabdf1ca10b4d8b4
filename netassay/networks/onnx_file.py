"""ONNX files: read one as a `Graph`, check one before it is submitted, write one from a `Graph`.

The batch axis. A file's tensors carry a batch axis, a graph's values do not. The first axis of a tensor is taken for
the batch axis where it is symbolic, or where it is 1 and others follow; else the tensor has none. An axis of length one
does not change a single number, so both readings of a file with a fixed batch of 1 compute the same function. A file
whose batch is fixed at more than 1 is refused, since it says nothing about one example.

Rounding stays where the file has it. A bound on what float32 adds to a graph (`netassay.numerics.bounds.rounding`)
must hold for a runtime that computes the file's nodes, so nodes are not merged: `Add` of 64 and `Sub` of 64 are two
operations, each of which rounds at the size of 64, not none. Constants are kept in float64. Only these leave no
operation of their own:

* what is exact: `Identity`, `Dropout`, adding 0, multiplying or dividing by 1, axes of length one that come or go;
* the first constant added to a product without a bias (`MatMul` + `Add`, `Mul` + `Add`): the sum of n + 1 terms that
  one operation with a bias is anyway. A second constant is an operation again;
* the alpha and beta of a `Gemm`, which multiply its constants: one more rounding of each term, as if the constants had
  been rounded themselves, which the bound allows for.

`BatchNormalization` is its definition, (x - mean) / sqrt(variance + epsilon) * gain + offset, step by step: one
operation for the mean (or the bias of the product before), one for the root, one for gain and offset. The roundings of
these cover those of a runtime that multiplies by s = gain / sqrt(variance + epsilon) and adds offset - mean s, too.
Not proven: a runtime that multiplies s into the weights before it. Each weight is then rounded up to four times, where
the bound allows for once; this shows only where a sum of few terms nearly cancels.

No torch here: the submitting side uses this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netassay import files
from netassay.heavy import np, onnx
from netassay.method import InvalidInput
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape, Scale

if TYPE_CHECKING:
    import numpy
    from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto

#: The oldest operator set whose definitions the readers below follow (the ACAS Xu networks are of this one).
OLDEST_OPSET = 8
#: What `write` emits: the first set in which axes of Squeeze and Unsqueeze are inputs; read by all current runtimes.
WRITTEN_OPSET, WRITTEN_IR = 13, 8

#: Bytes of a file, unpacked: more than protobuf reads, so that a small archive cannot fill the memory.
LARGEST = 2**31

#: Elements of all constants that follow from others: a chain of Concat doubles at each node, a Gather repeats a row.
LARGEST_FOLDED = 2**24

#: Magic numbers of what torch.save writes: a zip archive (since PyTorch 1.6), or a bare pickle of protocol 2 to 5.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

#: Stands for a symbolic batch size in an integer constant computed from a shape. Only moves of elements (`_FOLDED`) are
#: ever computed with it, so it arrives unchanged at the Reshape that uses it.
_BATCH = -(2**63)


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


# A tensor's shape in the file: the batch axis None where it is symbolic.
FileShape = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    """A tensor of the file that depends on the input: `name` is the graph's value that holds its numbers."""

    name: str
    shape: FileShape


def supported() -> list[str]:
    """Names of the ONNX operators `read` knows, sorted."""
    return sorted({*_READERS, *_FOLDED, "Constant", "Shape"})


def from_file(path: Path) -> bytes:
    """The bytes of a file, unpacked from gzip, with tensors it keeps in neighbouring files folded in.

    A file without external tensors comes back byte for byte. Raises NetworkFileError as `check` does, OSError.
    """
    try:
        data = files.read(Path(path), LARGEST)
    except files.Unreadable as error:
        raise NetworkFileError("the network cannot be read", str(error)) from None
    model = _parse(data)
    if not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in _tensors(model)):
        return data
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(Path(path).parent))
        folded: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:  # ValidationError, OSError, or protobuf's own error above 2 GiB
        raise NetworkFileError(
            f"the external tensors of {path} cannot be folded into one file",
            str(error),
            "put the data files beside the model; one ONNX file holds at most 2 GiB",
        ) from error
    return folded


def check(data: bytes, analysable: bool) -> None:
    """Raise the NetworkFileError that reading these bytes would end in, if any.

    analysable: the network must load as a `Graph`; otherwise it only has to be a valid ONNX model.
    """
    if analysable:
        read(data)
    else:
        model(data)


def model(data: bytes) -> ModelProto:
    """The checked model of these bytes, with no external tensors. Raises NotOnnx, PickledModel, NetworkFileError."""
    proto = _parse(data)
    outside = [tensor.name for tensor in _tensors(proto) if onnx.external_data_helper.uses_external_data(tensor)]
    if outside:
        raise NetworkFileError(
            f"the file keeps {len(outside)} of its tensors in other files (the first is {outside[0]!r})",
            "a network has to be one file, since its digest stands for all of it",
            "give the path of the file, with its data files beside it, or save it with onnx.save(onnx.load(path), new)",
        )
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # ValidationError, or UnicodeDecodeError where a name is not text
        raise NotOnnx("the ONNX model is not valid", str(error).strip(), "export it again") from error
    return proto


def read(data: bytes) -> Graph:
    """The network of an ONNX file as a `Graph`.

    Nodes that the output does not depend on are ignored. Raises NetworkFileError: NotOnnx, PickledModel,
    UnsupportedOperator (naming node and operator), UnsupportedShape.
    """
    checked = model(data)
    try:
        return _Reader(checked).graph()
    except NetworkFileError:
        raise
    except Exception as error:  # the checker passes files whose attributes or tensors contradict each other
        raise NotOnnx(
            "the ONNX model contradicts itself", f"{type(error).__name__}: {error}", "export it again"
        ) from error


def _parse(data: bytes) -> ModelProto:
    if data.startswith(_PICKLES):
        raise PickledModel(
            "this is a zip or pickle file, as torch.save writes, not an ONNX file",
            "pickle can run code, so it is never opened here",
            'exporting where it was trained: torch.onnx.export(model.eval(), example, "network.onnx")',
        )
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError; its class differs between protobuf's implementations
        raise NotOnnx("this is not an ONNX file, or it is truncated", str(error), "export or copy it again") from error
    # Any bytes that happen to parse give a message; a model without nodes and without operator set is none.
    if not proto.opset_import or not proto.graph.output:
        raise NotOnnx("this is not an ONNX file, or it is empty", "it holds no graph", "export or copy it again")
    return proto


def _tensors(proto: ModelProto) -> list[Any]:
    """Every tensor of a model, also of its functions, of graphs within nodes, and of sparse ones."""
    return list(_within(proto))


def _within(message: Any) -> Iterator[Any]:
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for item in value if field.is_repeated else (value,):
            if item.DESCRIPTOR.name == "TensorProto":
                yield item
            else:
                yield from _within(item)


def inner(shape: FileShape) -> tuple[int, ...]:
    """A tensor's shape without its batch axis."""
    if shape and (shape[0] is None or (shape[0] == 1 and len(shape) > 1)):
        shape = shape[1:]
    return tuple(int(size) for size in shape if size is not None)


def file_shape(info: ValueInfoProto) -> FileShape:
    """The declared shape of a file's input, a symbolic batch axis as None. Raises UnsupportedShape."""
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise UnsupportedShape(
            f"input {info.name!r} declares no tensor shape",
            "sizes of layers follow from it",
            "export with an example input of fixed size",
        )
    # Exporters write an unknown size as a name, as nothing, as 0 or as -1.
    sizes = [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in tensor.shape.dim]
    unknown = [place for place, size in enumerate(sizes) if size is None and (place > 0 or len(sizes) == 1)]
    if unknown:
        raise UnsupportedShape(
            f"axis {unknown[0]} of input {info.name!r} has no fixed length",
            "only the first axis, the batch, may be open",
            "export with dynamic_axes (or dynamic_shapes) for axis 0 only",
        )
    return tuple(sizes)


class _Reader:
    """Walks the nodes of one model and collects operations. `values`: tensors by name; `constants`: arrays by name."""

    def __init__(self, proto: ModelProto) -> None:
        self.opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if self.opset < OLDEST_OPSET:
            raise NetworkFileError(
                f"the file is of operator set {self.opset}",
                f"sets before {OLDEST_OPSET} define operators differently",
                "onnx.version_converter.convert_version(model, 13)",
            )
        self.proto = proto.graph
        if self.proto.sparse_initializer:
            raise UnsupportedOperator(
                f"tensor {self.proto.sparse_initializer[0].values.name!r} is stored sparse",
                "only dense constants are read",
                "store it as an ordinary initializer",
            )
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.proto.initializer}
        self.given = 8 * sum(array.size for array in self.constants.values())
        self.values: dict[str, _Value] = {}
        self.folded = 0
        self.taken: set[str] = set()
        self.operations: list[Operation] = []
        self.names = {info.name for info in self.proto.input} | {o for node in self.proto.node for o in node.output}

    def graph(self) -> Graph:
        inputs = [info for info in self.proto.input if info.name not in self.constants]
        outputs = self.proto.output
        if len(inputs) != 1 or len(outputs) != 1:
            raise UnsupportedShape(
                f"the network has {len(inputs)} inputs and {len(outputs)} outputs",
                "a network here maps one tensor to one tensor",
                "export a model with one input and one output",
            )
        source, output = inputs[0], outputs[0].name
        if source.type.tensor_type.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            kind = onnx.TensorProto.DataType.Name(source.type.tensor_type.elem_type)
            raise NetworkFileError(f"input {source.name!r} holds {kind}", "only float32 and float64 are read")
        shape = file_shape(source)
        self.values[source.name] = _Value(source.name, shape)

        nodes = self._needed(output)
        self.uses = Counter(name for node in nodes for name in node.input)
        self.uses[output] += 1
        for node in nodes:
            self._node(node)
        if output not in self.values:
            raise UnsupportedShape(f"output {output!r} does not depend on the input {source.name!r}")

        last = self.values[output]
        batch = shape[0] if len(shape) > 1 else 1
        if batch not in (None, 1) and len(last.shape) > 1 and last.shape[0] == batch:
            raise UnsupportedShape(
                f"the first axis of input and output is {batch}: it looks like a batch of that fixed size",
                "an analysis asks about one example",
                "export with batch 1 or with a symbolic batch axis (dynamic_axes for axis 0)",
            )
        return Graph(tuple(self.operations), source.name, last.name, inner(shape), inner(last.shape))

    def _needed(self, output: str) -> list[NodeProto]:
        """The nodes `output` depends on, in the file's (topological) order."""
        needed, chosen = {output}, []
        for node in reversed(self.proto.node):
            if needed.intersection(node.output):
                chosen.append(node)
                needed.update(node.input)
        return chosen[::-1]

    def _node(self, node: NodeProto) -> None:
        known = node.domain in ("", "ai.onnx")
        if known and node.op_type == "Constant":
            self.constants[node.output[0]] = _constant(node)
        elif known and node.op_type == "Shape" and node.input[0] in self.values:
            self.constants[node.output[0]] = self._shape(node)
        elif (
            known
            and node.op_type in _FOLDED | _ARITHMETIC
            and all(name in self.constants for name in node.input if name)
        ):
            self.constants[node.output[0]] = self._fold(node)
        elif known and node.op_type in _READERS:
            self.values[node.output[0]] = _READERS[node.op_type](self, node)
        else:
            kind = node.op_type if known else f"{node.domain}.{node.op_type}"
            raise UnsupportedOperator(
                f"node {label(node)} is a {kind}, which no analysis here knows",
                f"a network is built of {', '.join(supported())}",
                "networks.describe, which reads any ONNX file, or a network without it",
            )

    def _shape(self, node: NodeProto) -> numpy.ndarray:
        sizes = [_BATCH if size is None else size for size in self.values[node.input[0]].shape]
        of = attributes(node)
        return np.array(sizes[of.get("start", 0) : of.get("end", len(sizes))], dtype=np.int64)

    def _fold(self, node: NodeProto) -> numpy.ndarray:
        from onnx.reference import ReferenceEvaluator  # not loaded with onnx itself; few files need it

        names = [name for name in node.input if name]
        inputs = {name: self.constants[name] for name in names}
        moved = names if node.op_type == "Concat" else [] if node.op_type in _ARITHMETIC else names[:1]
        cast = node.op_type == "Cast" and attributes(node)["to"] != onnx.TensorProto.INT64
        if any(np.any(inputs[name] == _BATCH) and (cast or name not in moved) for name in names):
            raise unsupported(node, "computes with the batch size; only copying it into a shape is known")
        # What is moved, picked or joined grows only by these; arithmetic broadcasts.
        arrays = [np.asarray(inputs[name]) for name in names]
        size = sum(array.size for array in arrays)
        if node.op_type == "Gather":
            axis = attributes(node).get("axis", 0)
            size += arrays[1].size * (arrays[0].size // max(1, arrays[0].shape[axis]))
        elif node.op_type in _ARITHMETIC:
            size += math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
        self.folded += size
        if self.folded > LARGEST_FOLDED + self.given:
            raise unsupported(node, f"makes a constant that is too large: {size:,} elements are computed with")
        empty = onnx.helper.make_empty_tensor_value_info
        graph = onnx.helper.make_graph([node], "constant", [empty(name) for name in inputs], [empty(node.output[0])])
        alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        with np.errstate(all="ignore"):  # infinity and NaN are refused where they are used
            outputs: Any = ReferenceEvaluator(alone).run(None, inputs)
        return np.asarray(outputs[0])

    # What the readers are built of.

    def value(self, node: NodeProto, place: int = 0) -> _Value:
        """The tensor a node reads; raises UnsupportedOperator where it is a constant."""
        name = node.input[place]
        if name not in self.values:
            raise unsupported(node, f"reads {name!r}, which is constant, where a value of the network is expected")
        return self.values[name]

    def constant(self, node: NodeProto, place: int) -> numpy.ndarray:
        """The floating constant a node reads, in float64."""
        name = node.input[place]
        if name not in self.constants:
            raise unsupported(
                node, f"needs a constant as input {place}, but {name!r} is computed from the network's input"
            )
        array = self.constants[name]
        if array.dtype not in (np.float32, np.float64):
            raise unsupported(node, f"reads constants of {array.dtype}; only float32 and float64 are read")
        if not np.isfinite(array).all():
            raise NetworkFileError(f"constant {name!r} of node {label(node)} holds NaN or infinity")
        return array.astype(np.float64)

    def integers(self, node: NodeProto, place: int, attribute: str) -> list[int] | None:
        """Integers that newer operator sets read from a constant input and older ones from an attribute."""
        if len(node.input) > place and node.input[place]:
            if node.input[place] not in self.constants:
                raise unsupported(node, f"needs a constant as input {place} ({attribute})")
            return [int(item) for item in np.atleast_1d(self.constants[node.input[place]])]
        found = attributes(node).get(attribute)
        return None if found is None else [int(item) for item in found]

    def reshaped(self, node: NodeProto, value: _Value, shape: FileShape) -> _Value:
        """The same numbers under another shape: no operation at all where only the batch axis came or went."""
        if inner(shape) == inner(value.shape):
            return _Value(value.name, shape)
        return self.emit(Reshape(label(node), value.name, self.target(node), inner(shape)), shape)

    def target(self, node: NodeProto) -> str:
        """A fresh name for a value: the node's output, or one derived from it where that is taken."""
        name, number = node.output[0], 1
        while name in self.taken or (number > 1 and name in self.names):
            number += 1
            name = f"{node.output[0]}.{number}"
        return name

    def emit(self, operation: Operation, shape: FileShape) -> _Value:
        _check_constants(operation)
        self.operations.append(operation)
        self.taken.add(operation.target)
        return _Value(operation.target, shape)

    def linear(self, node: NodeProto, value: _Value, weight: numpy.ndarray) -> _Value:
        """y = weight x on the last axis; weight: (outputs, inputs)."""
        shape = (*value.shape[:-1], len(weight))
        operation = Dense(
            label(node), value.name, self.target(node), inner(shape), weight=weight, bias=np.zeros(len(weight))
        )
        return self.emit(operation, shape)

    def multiplied(self, node: NodeProto, value: _Value, matrix: numpy.ndarray) -> _Value:
        """value @ matrix."""
        if (
            matrix.ndim > 2
            and set(matrix.shape[:-2]) == {1}
            and (value.shape[0] is not None or len(value.shape) >= matrix.ndim)
        ):
            # The axes of length one change nothing but the rank of the product.
            padded = (1,) * (matrix.ndim - len(value.shape)) + value.shape
            value, matrix = self.reshaped(node, value, padded), matrix.reshape(matrix.shape[-2:])
        if matrix.ndim not in (1, 2) or not inner(value.shape):
            raise unsupported(node, f"multiplies {_text(value.shape)} by a constant of shape {matrix.shape}")
        if value.shape[-1] != matrix.shape[0]:
            raise _mismatch(node, value.shape, matrix.shape)
        product = self.linear(node, value, matrix.T if matrix.ndim == 2 else matrix[None])
        return product if matrix.ndim == 2 else self.reshaped(node, product, product.shape[:-1])

    def left_multiplied(self, node: NodeProto, matrix: numpy.ndarray, value: _Value) -> _Value:
        """matrix @ value, for a value that is one column (or a vector)."""
        column = len(value.shape) == 1 and value.shape[0] is not None
        if not column and (len(value.shape) < 2 or value.shape[-1] != 1 or matrix.ndim != 2 or value.shape[-2] is None):
            raise unsupported(
                node, f"multiplies a constant of shape {matrix.shape} by {_text(value.shape)}, more than one column"
            )
        if column and matrix.ndim == 1:
            return self.multiplied(node, value, matrix)
        if matrix.ndim != 2:
            raise unsupported(node, f"multiplies a constant of shape {matrix.shape} by {_text(value.shape)}")
        flat = value if column else self.reshaped(node, value, value.shape[:-1])
        if flat.shape[-1] != matrix.shape[1]:
            raise _mismatch(node, matrix.shape, value.shape)
        product = self.linear(node, flat, matrix)
        return product if column else self.reshaped(node, product, (*product.shape, 1))

    def affine(self, node: NodeProto, value: _Value, scale: numpy.ndarray, shift: numpy.ndarray) -> _Value:
        """scale * value + shift; both broadcast against the tensor's shape in the file."""
        rank = max(len(value.shape), scale.ndim, shift.ndim)
        if rank > len(value.shape) and (value.shape[0] is None or not value.shape):
            raise unsupported(node, f"broadcasts {_text(value.shape)} with its batch axis to {rank} axes")
        shape: FileShape = (1,) * (rank - len(value.shape)) + value.shape
        scale, shift = (array.reshape((1,) * (rank - array.ndim) + array.shape) for array in (scale, shift))
        for array in (scale, shift):
            if any(mine not in (1, size) for mine, size in zip(array.shape, shape, strict=True)):
                raise unsupported(
                    node, f"broadcasts {_text(value.shape)} with a constant of shape {array.shape} to a larger tensor"
                )
        if len(inner(shape)) < rank:
            scale, shift = scale[0], shift[0]
        same = self.reshaped(node, value, shape)
        if (scale == 1).all() and (shift == 0).all():
            return same
        biased = self._biased(node, same, shift) if (scale == 1).all() else None
        return _Value(biased, shape) if biased else self.scaled(node, same, scale, shift)

    def scaled(self, node: NodeProto, value: _Value, scale: numpy.ndarray, shift: numpy.ndarray) -> _Value:
        """scale * value + shift as one operation; both broadcast against the value's shape in the graph."""
        operation = Scale(label(node), value.name, self.target(node), inner(value.shape), scale=scale, shift=shift)
        return self.emit(operation, value.shape)

    def _biased(self, node: NodeProto, value: _Value, shift: numpy.ndarray) -> str | None:
        """Make the shift the bias of the operation before, where it has none yet and nothing else reads its value.

        A second shift is not added to the first: the sum might cancel, and with it the rounding at the size of both.
        """
        before = self.operations[-1] if self.operations else None
        if before is None or before.target != value.name:
            return None
        # Several tensors may share one value (Identity, a dropped batch axis): each must lead to this node alone.
        if any(self.uses[name] > 1 for name, other in self.values.items() if other.name == value.name):
            return None
        merged: Scale | Dense | Conv
        if isinstance(before, Scale) and not before.shift.any():
            merged = dataclasses.replace(before, shift=shift)
        elif isinstance(before, Dense | Conv) and not before.bias.any():
            bias = _along(shift, len(before.shape), -1 if isinstance(before, Dense) else 0, len(before.bias))
            if bias is None:
                return None
            merged = dataclasses.replace(before, bias=bias)
        else:
            return None
        _check_constants(merged)
        del self.operations[-1]
        self.taken.discard(merged.target)  # its name is free again
        merged = dataclasses.replace(merged, target=self.target(node))
        self.operations.append(merged)
        self.taken.add(merged.target)
        return merged.target

    def transposed(self, node: NodeProto, value: _Value, order: Sequence[int]) -> _Value:
        """The axes of a value reordered, where only axes of length one move past others: a reshape."""
        shape = tuple(value.shape[axis] for axis in order)
        long = [axis for axis in order if value.shape[axis] != 1]
        if long != sorted(long) or None in shape[1:]:
            raise unsupported(
                node, f"transposes {_text(value.shape)} by {list(order)}, which is more than moving axes of length one"
            )
        return self.reshaped(node, value, shape)


def _along(array: numpy.ndarray, rank: int, axis: int, size: int) -> numpy.ndarray | None:
    """A broadcastable constant as a vector along one axis of a value; None where it varies along another."""
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    axis %= rank
    if any(length != 1 for place, length in enumerate(array.shape) if place != axis):
        return None
    return np.broadcast_to(array.reshape(-1), (size,))


def _check_constants(operation: Operation) -> None:
    """Raise NetworkFileError where a constant is no number of float32's range: what a runtime makes of it is inf."""
    for part in ("weight", "bias", "scale", "shift"):
        array = getattr(operation, part, None)
        if array is not None and not _in_range(array):
            raise _out_of_range(operation.name, f"the {part}")


def _in_range(array: numpy.ndarray) -> bool:
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())  # False for NaN


def _out_of_range(name: str, what: str) -> NetworkFileError:
    return NetworkFileError(
        f"{what} of node {name} is NaN or beyond float32",
        "it follows from the constants of the node, and a runtime that computes in float32 makes NaN or infinity of it",
        "look at that node's divisor, variance or factors, and export again",
    )


def label(node: NodeProto) -> str:
    """The node's name, or that of its first output where it has none."""
    return node.name or node.output[0]


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""

    def plain(attribute: AttributeProto) -> Any:
        value = onnx.helper.get_attribute_value(attribute)
        return value.decode() if isinstance(value, bytes) else value

    return {attribute.name: plain(attribute) for attribute in node.attribute}


def unsupported(node: NodeProto, why: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"node {label(node)} ({node.op_type}) {why}", what_to_try="export the network without it"
    )


def _mismatch(node: NodeProto, left: FileShape, right: FileShape) -> NetworkFileError:
    return NetworkFileError(f"node {label(node)} multiplies shapes that do not fit: {_text(left)} and {_text(right)}")


def _text(shape: FileShape) -> str:
    return f"({', '.join('batch' if size is None else str(size) for size in shape)})"


def _constant(node: NodeProto) -> numpy.ndarray:
    (name, value), *_ = attributes(node).items()
    if name == "value":
        return onnx.numpy_helper.to_array(value)
    if name in ("value_float", "value_floats"):
        return np.asarray(value, dtype=np.float32)
    if name in ("value_int", "value_ints"):
        return np.asarray(value, dtype=np.int64)
    raise unsupported(node, f"holds a {name.removeprefix('value_').replace('_', ' ')}, not a tensor of numbers")


#: Operators computed here and now where all their inputs are constant. They only move, pick or cast elements, so that
#: they are exact and `_BATCH` survives them.
_FOLDED = frozenset({"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

#: Computed here too where both operands are constant, in the file's own precision: IEEE 754 leaves a runtime no choice.
_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})


# One reader an operator: (reader, node) -> the tensor it computes.


def _relu(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    return reader.emit(Relu(label(node), value.name, reader.target(node), inner(value.shape)), value.shape)


def _identity(reader: _Reader, node: NodeProto) -> _Value:
    return reader.value(node)


def _dropout(reader: _Reader, node: NodeProto) -> _Value:
    training = reader.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else False
    if training is None or np.any(training):
        raise unsupported(node, "is in training mode, hence random")
    _one_output(node, reader)
    return reader.value(node)


def _one_output(node: NodeProto, reader: _Reader) -> None:
    if any(name and reader.uses[name] for name in node.output[1:]):
        raise unsupported(node, "has a second output that the network uses")


def _matmul(reader: _Reader, node: NodeProto) -> _Value:
    if node.input[0] in reader.constants:
        return reader.left_multiplied(node, reader.constant(node, 0), reader.value(node, 1))
    return reader.multiplied(node, reader.value(node), reader.constant(node, 1))


def _gemm(reader: _Reader, node: NodeProto) -> _Value:
    of = attributes(node)
    alpha, beta = of.get("alpha", 1.0), of.get("beta", 1.0)
    flipped = [bool(of.get("transA", 0)), bool(of.get("transB", 0))]
    first_is_constant = node.input[0] in reader.constants
    place = 1 if first_is_constant else 0
    value, matrix = reader.value(node, place), alpha * reader.constant(node, 1 - place)
    if len(value.shape) != 2 or matrix.ndim != 2:
        raise unsupported(node, f"multiplies {_text(value.shape)} and {matrix.shape}; Gemm takes two matrices")
    if flipped[place]:
        value = reader.transposed(node, value, (1, 0))
    if flipped[1 - place]:
        matrix = matrix.T
    product = (
        reader.left_multiplied(node, matrix, value) if first_is_constant else reader.multiplied(node, value, matrix)
    )
    if len(node.input) < 3 or not node.input[2]:
        return product
    return _plus(reader, node, product, beta * reader.constant(node, 2))


def _plus(reader: _Reader, node: NodeProto, product: _Value, shift: numpy.ndarray) -> _Value:
    """Shift what the same node just computed: nothing else reads it, whatever reads the node's output."""
    hidden, reader.uses = reader.uses, Counter()
    try:
        return reader.affine(node, product, np.ones(()), shift)
    finally:
        reader.uses = hidden


def _elementwise(scale_shift: Callable[[Any, bool], tuple[Any, Any]]) -> Callable[[_Reader, NodeProto], _Value]:
    """A reader from c -> (scale, shift), given the constant and whether it is the first operand."""

    def reader_of(reader: _Reader, node: NodeProto) -> _Value:
        constant_first = node.input[0] in reader.constants
        place = 1 if constant_first else 0
        if node.input[1 - place] in reader.values:
            raise unsupported(node, "combines two values of the network; one operand has to be constant")
        constant = reader.constant(node, 1 - place)
        if node.op_type == "Div" and (constant_first or (constant == 0).any()):
            raise unsupported(node, "divides by the network's values, or by zero")
        with np.errstate(over="ignore"):  # 1 / c; refused with the node's name
            scale, shift = scale_shift(constant, constant_first)
        return reader.affine(node, reader.value(node, place), np.asarray(scale, float), np.asarray(shift, float))

    return reader_of


def _conv(reader: _Reader, node: NodeProto) -> _Value:
    value, weight, of = reader.value(node), reader.constant(node, 1), attributes(node)
    if weight.ndim != 4 or len(value.shape) != 4:
        raise unsupported(
            node, f"convolves {_text(value.shape)} with a kernel of shape {weight.shape}; only 2-d convolution is known"
        )
    if value.shape[0] not in (None, 1):
        raise unsupported(
            node, f"reads {_text(value.shape)}, whose first axis is neither a symbolic batch nor a batch of 1"
        )
    groups = of.get("group", 1)
    channels, *size = inner(value.shape)
    outputs, per_group, *kernel = weight.shape
    if channels != per_group * groups or outputs % groups or len(size) != 2:
        raise _mismatch(node, value.shape, weight.shape)
    stride, dilation = of.get("strides", [1, 1]), of.get("dilations", [1, 1])
    reach = [(kernel[axis] - 1) * dilation[axis] + 1 for axis in (0, 1)]
    padding = _padding(node, of, size, stride, reach)
    out = [(size[axis] + padding[axis] + padding[axis + 2] - reach[axis]) // stride[axis] + 1 for axis in (0, 1)]
    if min(*padding, 0) < 0 or min(out) < 1:
        raise unsupported(node, f"has pads {list(padding)} that leave {out[0]} x {out[1]} outputs")
    shape: FileShape = (value.shape[0], outputs, *out)
    bias = reader.constant(node, 2) if len(node.input) > 2 and node.input[2] else np.zeros(outputs)
    operation = Conv(
        label(node),
        value.name,
        reader.target(node),
        inner(shape),
        weight=weight,
        bias=bias,
        stride=(stride[0], stride[1]),
        padding=padding,
        dilation=(dilation[0], dilation[1]),
        groups=groups,
    )
    return reader.emit(operation, shape)


def _padding(
    node: NodeProto, of: dict[str, Any], size: list[int], stride: list[int], reach: list[int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a Conv; see `auto_pad` in its specification."""
    auto = of.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return 0, 0, 0, 0
    if auto == "NOTSET":
        top, left, bottom, right = of.get("pads", [0, 0, 0, 0])
        return top, left, bottom, right
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise unsupported(node, f"has auto_pad={auto}")
    total = [max((math.ceil(size[a] / stride[a]) - 1) * stride[a] + reach[a] - size[a], 0) for a in (0, 1)]
    less = [amount // 2 for amount in total]
    more = [amount - half for amount, half in zip(total, less, strict=True)]
    begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
    return begin[0], begin[1], end[0], end[1]


def _batch_normalization(reader: _Reader, node: NodeProto) -> _Value:
    of, value = attributes(node), reader.value(node)
    if of.get("training_mode", 0) or not of.get("spatial", 1):
        raise unsupported(node, "is in training mode or normalises every element on its own")
    _one_output(node, reader)
    gain, offset, mean, variance = (reader.constant(node, place) for place in (1, 2, 3, 4))
    if len(value.shape) < 2 or any(array.shape != (value.shape[1],) for array in (gain, offset, mean, variance)):
        raise _mismatch(node, value.shape, gain.shape)
    with np.errstate(all="ignore"):  # refused below
        # 1e-5: the default of the operator's specification; a runtime holds it in float32.
        factor = 1 / np.sqrt(variance + of.get("epsilon", float(np.float32(1e-5))))
        scale = gain * factor
        # Also what a runtime computes first that multiplies by `scale` and adds one constant.
        if not all(_in_range(array) for array in (factor, scale, mean * scale, offset - mean * scale)):
            raise _out_of_range(label(node), "the scale or shift")
    along_channels = (-1, *(1,) * (len(value.shape) - 2))
    factor, gain, offset, mean = (array.reshape(along_channels) for array in (factor, gain, offset, mean))
    centred = reader.affine(node, value, np.ones(()), -mean)
    # Both always, also where they multiply by 1: two operations stand for the up to five roundings of a factor.
    return reader.scaled(node, reader.scaled(node, centred, factor, np.zeros(())), gain, offset)


def _flatten(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    axis = attributes(node).get("axis", 1)
    axis += len(value.shape) if axis < 0 else 0
    head, tail = value.shape[:axis], value.shape[axis:]
    if (value.shape[:1] == (None,)) and axis != 1:
        raise unsupported(node, f"flattens {_text(value.shape)} at axis {axis}, which mixes the batch with the values")
    first = head[0] if head == (None,) else math.prod(size for size in head if size is not None)
    return reader.reshaped(node, value, (first, math.prod(size for size in tail if size is not None)))


def _reshape(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    target = reader.integers(node, 1, "shape")
    if target is None:
        raise unsupported(node, "has no target shape")
    keeps_zero = bool(attributes(node).get("allowzero", 0))
    sizes: list[int | None] = []
    for place, size in enumerate(target):
        if size == 0 and not keeps_zero:
            if place >= len(value.shape):
                raise unsupported(node, f"copies axis {place} of {_text(value.shape)}")
            sizes.append(value.shape[place])
        else:
            sizes.append(None if size == _BATCH else size)
    total = math.prod(inner(value.shape))
    if value.shape[:1] == (None,):
        # -1 or 1 in the first place stands for the batch where the other axes hold all numbers of one example.
        rest = _inferred(sizes[1:], total)
        if not sizes or sizes[0] not in (None, -1, 1) or rest is None:
            raise unsupported(node, f"reshapes {_text(value.shape)} to {target}, which mixes the batch with the values")
        return reader.reshaped(node, value, (None, *rest))
    full = _inferred(sizes, total)
    if full is None:
        raise NetworkFileError(f"node {label(node)} reshapes {_text(value.shape)} to {target}, which does not fit")
    return reader.reshaped(node, value, full)


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


def _transpose(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    return reader.transposed(node, value, attributes(node).get("perm", range(len(value.shape))[::-1]))


def _squeeze(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    rank = len(value.shape)
    axes = reader.integers(node, 1, "axes")
    dropped = [a % rank for a in axes] if axes is not None else [a for a in range(rank) if value.shape[a] == 1]
    if any(value.shape[axis] != 1 for axis in dropped):
        raise unsupported(node, f"squeezes axes {dropped} of {_text(value.shape)}, which are not of length one")
    return reader.reshaped(node, value, tuple(size for axis, size in enumerate(value.shape) if axis not in dropped))


def _unsqueeze(reader: _Reader, node: NodeProto) -> _Value:
    value = reader.value(node)
    axes = reader.integers(node, 1, "axes") or []
    rank = len(value.shape) + len(axes)
    added = {axis % rank for axis in axes}
    old = iter(value.shape)
    shape = tuple(1 if axis in added else next(old) for axis in range(rank))
    if None in shape[1:]:
        raise unsupported(node, "puts an axis before the batch axis")
    return reader.reshaped(node, value, shape)


_READERS: dict[str, Callable[[_Reader, NodeProto], _Value]] = {
    "Add": _elementwise(lambda c, first: (1.0, c)),
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "Div": _elementwise(lambda c, first: (1.0 / c, 0.0)),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "Identity": _identity,
    "MatMul": _matmul,
    "Mul": _elementwise(lambda c, first: (c, 0.0)),
    "Relu": _relu,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Sub": _elementwise(lambda c, first: (-1.0, c) if first else (1.0, -c)),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def write(graph: Graph, name: str) -> bytes:
    """An ONNX file of a graph: float32, a symbolic batch axis, the same bytes for the same graph and name.

    `read` gives back the graph up to rounding to float32 (exactly, where the graph came from float32); operations that
    do nothing are gone then, and a shift after a product without a bias is its bias. Raises OverflowError naming the
    operation whose constant is beyond float32.
    """
    writer = _Writer(graph)
    for operation in graph.operations:
        writer.operation(operation)
    info = onnx.helper.make_tensor_value_info
    output = graph.output
    if output == graph.input:  # ONNX wants an output that a node computes
        writer.node("Identity", [graph.input], output := f"{graph.input}.output")
    proto = onnx.helper.make_graph(
        writer.nodes,
        name,
        [info(graph.input, onnx.TensorProto.FLOAT, ["batch", *graph.input_shape])],
        [info(output, onnx.TensorProto.FLOAT, ["batch", *graph.output_shape])],
        writer.initializers,
    )
    opset = onnx.helper.make_opsetid("", WRITTEN_OPSET)
    written = onnx.helper.make_model(proto, opset_imports=[opset], ir_version=WRITTEN_IR, producer_name="netassay")
    onnx.checker.check_model(written)
    data: bytes = written.SerializeToString(deterministic=True)
    return data


def _unused(name: str, taken: set[str]) -> str:
    """The name, numbered where it is taken; takes it."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    taken.add(candidate)
    return candidate


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self.initializers: list[Any] = []
        self.labels: set[str] = set()
        self.names = {graph.input, *(operation.target for operation in graph.operations)}

    def node(self, kind: str, inputs: list[str], target: str, name: str = "", **of: Any) -> str:
        """Adds a node; its name, numbered where another node has it."""
        name = _unused(name, self.labels)
        self.nodes.append(onnx.helper.make_node(kind, inputs, [target], name=name, **of))
        return name

    def fresh(self, name: str) -> str:
        return _unused(name, self.names)

    def constant(self, operation: Operation, part: str, array: numpy.ndarray) -> str:
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise OverflowError(f"the {part} of {operation.name} is beyond float32")
        name = self.fresh(f"{operation.target}.{part}")
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def operation(self, op: Operation) -> None:
        if isinstance(op, Dense):
            weight, bias = np.asarray(op.weight), np.asarray(op.bias)
            if len(op.shape) == 1:
                inputs = [op.source, self.constant(op, "weight", weight), self.constant(op, "bias", bias)]
                self.node("Gemm", inputs, op.target, op.name, transB=1)
            else:
                product = self.fresh(f"{op.target}.product") if bias.any() else op.target
                name = self.node("MatMul", [op.source, self.constant(op, "weight", weight.T)], product, op.name)
                if bias.any():
                    self.node("Add", [product, self.constant(op, "bias", bias)], op.target, f"{name}.bias")
        elif isinstance(op, Conv):
            inputs = [
                op.source,
                self.constant(op, "weight", np.asarray(op.weight)),
                self.constant(op, "bias", np.asarray(op.bias)),
            ]
            self.node(
                "Conv",
                inputs,
                op.target,
                op.name,
                strides=list(op.stride),
                pads=list(op.padding),
                dilations=list(op.dilation),
                group=op.groups,
                kernel_shape=list(op.weight.shape[2:]),
            )
        elif isinstance(op, Relu):
            self.node("Relu", [op.source], op.target, op.name)
        elif isinstance(op, Reshape):
            target = np.array([-1, *op.shape], dtype=np.int64)
            self.node("Reshape", [op.source, self.constant(op, "shape", target)], op.target, op.name)
        elif isinstance(op, Scale):
            self.scale(op)
        else:
            raise TypeError(f"{type(op).__name__} ({op.name}) has no ONNX form here")

    def scale(self, op: Scale) -> None:
        scaled, moved, name = op.source, bool(np.any(op.shift)), op.name
        scales = not moved or bool(np.any(np.asarray(op.scale) != 1))
        if scales:
            scaled = self.fresh(f"{op.target}.scaled") if moved else op.target
            factor = self.constant(op, "scale", np.asarray(op.scale, float))
            name = self.node("Mul", [op.source, factor], scaled, op.name)
        if moved:
            shift = self.constant(op, "shift", np.asarray(op.shift, float))
            self.node("Add", [scaled, shift], op.target, f"{name}.shift" if scales else name)
