"""ONNX files: read one as a `Graph`, check one before it is submitted, write one from a `Graph`.

`netassay.networks.operators` has a reader for each operator, `recognise` finds functions that exporters write in
pieces, `folding` computes what follows from constants alone, `builder` collects the operations.

The batch axis. A file's tensors carry a batch axis, a graph's values do not. The first axis of the input is taken for
the batch axis where it is symbolic, or where it is 1 and others follow; else the tensor has none. An axis of length one
does not change a single number, so both readings of a file with a fixed batch of 1 compute the same function. A file
whose batch is fixed at more than 1 is refused, since it says nothing about one example. A symbolic batch axis may move
past others and come back, as in attention; a node that joins it with another axis, or computes along it, is refused:
such a file can be exported with a batch of 1.

Rounding stays where the file has it. A bound on what float32 adds to a graph (`netassay.numerics.bounds.rounding`)
must hold for a runtime that computes the file's nodes, so nodes are not merged: `Add` of 64 and `Sub` of 64 are two
operations, each of which rounds at the size of 64, not none. Constants are kept in float64. Only these leave no
operation of their own:

* what is exact: `Identity`, `Dropout`, adding 0, multiplying or dividing by 1, axes of length one that come or go,
  numbers that move twice in a row;
* the first constant added to a product without a bias (`MatMul` + `Add`, `Mul` + `Add`): the sum of n + 1 terms that
  one operation with a bias is anyway. A second constant is an operation again;
* the alpha and beta of a `Gemm`, which multiply its constants: one more rounding of each term, as if the constants had
  been rounded themselves, which the bound allows for.

`BatchNormalization` is its definition, (x - mean) / sqrt(variance + epsilon) * gain + offset, step by step: one
operation for the mean (or the bias of the product before), one for the root, one for gain and offset. The roundings of
these cover those of a runtime that multiplies by s = gain / sqrt(variance + epsilon) and adds offset - mean s, too.
Not proven: a runtime that multiplies s into the weights before it. Each weight is then rounded up to four times, where
the bound allows for once; this shows only where a sum of few terms nearly cancels.

Where a graph rounds more often than a runtime, the bound covers the runtime: what is written with `Relu` (max, clip,
max pooling, leaky slopes) a runtime computes with at most one rounding, and an error of its operands passes through
both alike. A mean or an average pooling is a sum of n terms and one factor: n roundings, as the bound allows for n
products with constants that are rounded themselves. Not covered by any bound on rounding:

* smooth functions (`Activation`): a float32 runtime's own tanh or exp errs as its library does, by some units in the
  last place, which no standard limits; `x - max x` in a runtime's softmax is not in the graph at all;
* products of two values, division by a value and the normalisations made of them;
* recognised pieces, whose constants are taken for the exact ones where they differ by a rounding to float32;
* resizing by other than whole factors, whose weights a runtime rounds as it likes.

There, `netassay.networks.agreement` compares graph and runtime on samples.

No torch here: the submitting side uses this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netassay import files
from netassay.heavy import np, onnx
from netassay.networks.folding import FOLDED, Folder, constant
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
from netassay.networks.nodes import (
    BATCH,
    FileShape,
    NetworkFileError,
    NotOnnx,
    PickledModel,
    UnsupportedOperator,
    UnsupportedShape,
    Value,
    attributes,
    counts_batch,
    full,
    inner,
    known,
    label,
    unsupported,
)
from netassay.networks.operators import READERS, Reader, stretched
from netassay.networks.recognise import Piece, pieces

if TYPE_CHECKING:
    import numpy
    from onnx import ModelProto, NodeProto, ValueInfoProto

#: The oldest operator set whose definitions the readers below follow (the ACAS Xu networks are of this one).
OLDEST_OPSET = 8
#: What `write` emits: the first set in which axes of Squeeze and Unsqueeze are inputs; read by all current runtimes.
WRITTEN_OPSET, WRITTEN_IR = 13, 8

#: Bytes of a file, unpacked: more than protobuf reads, so that a small archive cannot fill the memory.
LARGEST = 2**31

#: Magic numbers of what torch.save writes: a zip archive (since PyTorch 1.6), or a bare pickle of protocol 2 to 5.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def supported() -> list[str]:
    """Names of the ONNX operators `read` knows, sorted."""
    return sorted({*READERS, *FOLDED, "Constant"})


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


class _Reader(Reader):
    """Walks the nodes of one model and collects operations. `values`: tensors by name; `constants`: arrays by name."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto.graph
        super().__init__(
            {info.name for info in self.proto.input} | {o for node in self.proto.node for o in node.output}
        )
        self.opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if self.opset < OLDEST_OPSET:
            raise NetworkFileError(
                f"the file is of operator set {self.opset}",
                f"sets before {OLDEST_OPSET} define operators differently",
                "onnx.version_converter.convert_version(model, 13)",
            )
        if self.proto.sparse_initializer:
            raise UnsupportedOperator(
                f"tensor {self.proto.sparse_initializer[0].values.name!r} is stored sparse",
                "only dense constants are read",
                "store it as an ordinary initializer",
            )
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.proto.initializer}
        self.folder = Folder(self.opset, 8 * sum(array.size for array in self.constants.values()))

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
        self.kind = source.type.tensor_type.elem_type
        if self.kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            kind = onnx.TensorProto.DataType.Name(self.kind)
            raise NetworkFileError(f"input {source.name!r} holds {kind}", "only float32 and float64 are read")
        shape = file_shape(source)
        self.values[source.name] = Value(source.name, shape)
        self.shapes[source.name] = inner(shape)
        self.taken.add(source.name)

        nodes = self._needed(output)
        self.uses = Counter(name for node in nodes for name in node.input)
        self.uses[output] += 1
        for node in nodes:
            if self._is_folded(node):
                self._fold(node)
        found, inside = pieces([node for node in nodes if not self._is_folded(node)], self.constants, self.uses)
        for node in nodes:
            if node.output[0] not in inside and not any(name in self.constants for name in node.output):
                self._node(node, found.get(node.output[0]))
        if output in self.masks:
            raise UnsupportedOperator(f"output {output!r} holds minus infinity; only a Softmax may read it")
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
        if None in last.shape[1:]:
            raise UnsupportedShape(
                f"output {output!r} has its batch as axis {last.shape.index(None)}",
                "the batch is the first axis of input and output",
                "export with a batch of 1 instead of a symbolic one",
            )
        if not inner(last.shape):  # one number an example: an axis for it, as with a batch of 1
            last = self.reshaped(last, (1,))
        whole = Graph(tuple(self.operations), source.name, last.name, inner(shape), inner(last.shape))
        return dataclasses.replace(whole, operations=whole.needed)

    def _needed(self, output: str) -> list[NodeProto]:
        """The nodes `output` depends on, in the file's (topological) order."""
        needed, chosen = {output}, []
        for node in reversed(self.proto.node):
            if needed.intersection(node.output):
                chosen.append(node)
                needed.update(node.input)
        return chosen[::-1]

    def _is_folded(self, node: NodeProto) -> bool:
        """It computes constants of constants."""
        if not known(node):
            return False
        if node.op_type == "Constant":
            return True
        return node.op_type in FOLDED and all(name in self.constants for name in node.input if name)

    def _fold(self, node: NodeProto) -> None:
        found = [constant(node)] if node.op_type == "Constant" else self.folder.fold(node, self.constants)
        self.constants.update(zip([name for name in node.output if name], found, strict=True))

    def _node(self, node: NodeProto, piece: Piece | None) -> None:
        self.node = node
        if piece is not None:
            if piece.source in self.masks:
                raise unsupported(node, f"reads {piece.source!r}, which holds minus infinity; only a Softmax may")
            value = self.values[piece.source]
            self.values[node.output[0]] = (
                self.softmax(value, self.axes(piece.axes, len(value.shape)))
                if piece.function is None
                else stretched(self, value, piece.function, piece.inside, piece.outside)
            )
        elif known(node) and node.op_type in ("Shape", "Size") and node.input[0] in self.values:
            self.constants[node.output[0]] = self._shape(node)
        elif self._is_folded(node):  # of a shape
            self._fold(node)
        elif known(node) and node.op_type in READERS:
            found = READERS[node.op_type](self)
            several = found if isinstance(found, list) else [found]
            self.values.update((name, value) for name, value in zip(node.output, several, strict=False) if name)
        elif known(node) and node.op_type in FOLDED:
            raise unsupported(node, "computes with the network's values; it is known for constants only")
        else:
            kind = node.op_type if known(node) else f"{node.domain}.{node.op_type}"
            raise UnsupportedOperator(
                f"node {label(node)} is a {kind}, which no analysis here knows",
                f"a network is built of {', '.join(supported())}",
                "networks.describe, which reads any ONNX file, or a network without it",
            )

    def _shape(self, node: NodeProto) -> numpy.ndarray:
        shape = self.values[node.input[0]].shape
        if node.op_type == "Size":
            if None in shape:
                raise counts_batch(node)
            return np.array(math.prod(full(shape)), dtype=np.int64)
        sizes = [BATCH if size is None else size for size in shape]
        of = attributes(node)
        return np.array(sizes[of.get("start", 0) : of.get("end", len(sizes))], dtype=np.int64)


def write(graph: Graph, name: str) -> bytes:
    """An ONNX file of a graph: float32, a symbolic batch axis, the same bytes for the same graph and name.

    `read` gives back the graph up to rounding to float32 (exactly, where the graph came from float32); operations that
    do nothing are gone then, and a shift after a product without a bias is its bias. Raises OverflowError naming the
    operation whose constant is beyond float32.
    """
    writer = _Writer(graph)
    for operation in _written(graph):
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


def _written(graph: Graph) -> list[Operation]:
    """The operations that a file needs: what only prepares the larger one of two values is part of `Max`."""
    wanted, used = {graph.output}, []
    for operation in reversed(graph.operations):
        if operation.target in wanted:
            larger = operation.larger if isinstance(operation, Sum) else None
            wanted.update(larger or operation.sources)
            used.append(operation)
    return used[::-1]


#: Functions that are one operator in the set `write` emits.
_FUNCTIONS = {
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "reciprocal": "Reciprocal",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "softplus": "Softplus",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}


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
        match op:
            case Dense():
                self.dense(op)
            case Conv() | ConvTranspose():
                self.conv(op)
            case Relu():
                self.node("Relu", [op.source], op.target, op.name)
            case Reshape():
                self.reshape(op, op.source, op.shape, op.target)
            case Scale():
                self.scale(op)
            case Pick():
                self.pick(op)
            case Sum():
                self.sum(op)
            case Product():
                self.node("Mul", [op.source, op.other], op.target, op.name)
            case Activation():
                self.activation(op)
            case _:
                raise TypeError(f"{type(op).__name__} ({op.name}) has no ONNX form here")

    def reshape(self, op: Operation, source: str, shape: tuple[int, ...], target: str) -> str:
        self.node(
            "Reshape", [source, self.constant(op, "shape", np.array([-1, *shape], dtype=np.int64))], target, op.name
        )
        return target

    def dense(self, op: Dense) -> None:
        weight, bias = np.asarray(op.weight), np.asarray(op.bias)
        if len(op.shape) == 1:
            inputs = [op.source, self.constant(op, "weight", weight), self.constant(op, "bias", bias)]
            self.node("Gemm", inputs, op.target, op.name, transB=1)
        else:
            product = self.fresh(f"{op.target}.product") if bias.any() else op.target
            name = self.node("MatMul", [op.source, self.constant(op, "weight", weight.T)], product, op.name)
            if bias.any():
                self.node("Add", [product, self.constant(op, "bias", bias)], op.target, f"{name}.bias")

    def conv(self, op: Conv | ConvTranspose) -> None:
        inputs = [
            op.source,
            self.constant(op, "weight", np.asarray(op.weight)),
            self.constant(op, "bias", np.asarray(op.bias)),
        ]
        of: dict[str, Any] = {}
        pads = list(op.padding)
        if isinstance(op, ConvTranspose):
            # Rows beyond what the padding leaves: less is cut off at the end, more is added where that is not enough.
            sizes = self.graph.shape_of(op.source)[1:]
            whole = [(sizes[a] - 1) * op.stride[a] + (op.weight.shape[2 + a] - 1) * op.dilation[a] + 1 for a in (0, 1)]
            over = [op.shape[1 + a] - (whole[a] - pads[a]) for a in (0, 1)]
            pads[2:] = [max(0, -more) for more in over]
            of = {"output_padding": [max(0, more) for more in over]}
        self.node(
            "Conv" if isinstance(op, Conv) else "ConvTranspose",
            inputs,
            op.target,
            op.name,
            strides=list(op.stride),
            pads=pads,
            dilations=list(op.dilation),
            group=op.groups,
            kernel_shape=list(op.weight.shape[2:]),
            **of,
        )

    def pick(self, op: Pick) -> None:
        """Gather from the numbers in a row, with a 0 behind them where one is asked for."""
        source, shape = op.source, self.graph.shape_of(op.source)
        size = math.prod(shape)
        if len(shape) != 1:
            source = self.reshape(op, source, (size,), self.fresh(f"{op.target}.row"))
        indices = np.asarray(op.indices)
        if (indices < 0).any():
            pads = self.constant(op, "pads", np.array([0, 0, 0, 1], dtype=np.int64))
            padded = self.fresh(f"{op.target}.padded")
            self.node("Pad", [source, pads], padded, op.name)
            source, indices = padded, np.where(indices < 0, size, indices)
        self.node("Gather", [source, self.constant(op, "indices", indices)], op.target, op.name, axis=1)

    def sum(self, op: Sum) -> None:
        if op.larger is not None:
            self.node("Max", list(op.larger), op.target, op.name)
            return
        kind, terms = "Add", []
        for part, source, factor in zip(("first", "second"), op.sources, op.factors, strict=True):
            if part == "second" and factor == -1:
                kind, factor = "Sub", 1.0
            if factor != 1:
                scaled = self.fresh(f"{op.target}.{part}")
                self.node("Mul", [source, self.constant(op, part, np.asarray(factor, float))], scaled, op.name)
                source = scaled
            terms.append(source)
        self.node(kind, terms, op.target, op.name)

    def activation(self, op: Activation) -> None:
        if op.function in _FUNCTIONS:
            self.node(_FUNCTIONS[op.function], [op.source], op.target, op.name)
        elif op.function == "elu":
            self.node("Elu", [op.source], op.target, op.name, alpha=op.parameters[0])
        elif op.function == "power":
            exponent = self.constant(op, "exponent", np.asarray(op.parameters[0], float))
            self.node("Pow", [op.source, exponent], op.target, op.name)
        else:  # in the pieces that `recognise` knows, which run where the operator is too new
            x = op.source
            match op.function:
                case "silu":
                    gate, factor = self.piece(op, "Sigmoid", x), 1.0
                case "hard_swish":
                    gate, factor = self.piece(op, "HardSigmoid", x, alpha=1 / 6, beta=0.5), 1.0
                case "mish":
                    gate, factor = self.piece(op, "Tanh", self.piece(op, "Softplus", x)), 1.0
                case "gelu":
                    gate, factor = self.piece(op, "Erf", self.piece(op, "Mul", x, math.sqrt(0.5))), 0.5
                case "gelu_tanh":
                    cubic = self.piece(op, "Mul", self.piece(op, "Pow", x, 3.0), 0.044715)
                    angle = self.piece(op, "Mul", self.piece(op, "Add", x, cubic), math.sqrt(2 / math.pi))
                    gate, factor = self.piece(op, "Tanh", angle), 0.5
                case _:
                    raise TypeError(f"{op.function} ({op.name}) has no ONNX form here")
            if factor != 1:
                x, gate = self.piece(op, "Mul", x, factor), self.piece(op, "Add", gate, 1.0)
            self.node("Mul", [x, gate], op.target, op.name)

    def piece(self, op: Operation, kind: str, *inputs: str | float, **of: Any) -> str:
        """A node of one operation written as several; its output."""
        given = [x if isinstance(x, str) else self.constant(op, "number", np.asarray(x, float)) for x in inputs]
        target = self.fresh(f"{op.target}.piece")
        self.node(kind, given, target, op.name, **of)
        return target

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
