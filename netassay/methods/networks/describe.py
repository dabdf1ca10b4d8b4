"""Describe a network: its layers, parameters, multiply-adds and the spectra of its weights.

    FLOPs = 2 x MACs        singular values s_1 >= s_2 >= ... of each weight matrix W

A MAC is one multiplication with its addition; MACs and FLOPs are those of one example. An open batch axis counts as
1; a batch fixed at b > 1 (the first axis of input and output is b) is divided out, and shapes shown with 1 for b. An
operator whose cost is no multiple of b is unknown then: it does not work on examples. Conventions:

* Gemm, MatMul, Conv: MACs = outputs x terms in the sum of one output (padding counted as if it were data), FLOPs =
  2 MACs; a bias is where the sum starts and costs nothing.
* One FLOP an output: Abs, Add, Ceil, Clip, Div, Floor, LeakyRelu, Max, Min, Mul, Neg, Relu, Round, Sign, Sqrt, Sub
  (n - 1 for n operands); BatchNormalization two. MaxPool, AveragePool: the elements of a window an output;
  GlobalMaxPool, GlobalAveragePool: one an input.
* Moving data (Concat, Flatten, Gather, Identity, Pad, Reshape, Slice, Transpose, ...) and Dropout: 0.
* Anything else, and any layer whose shapes cannot be inferred: None, and counted in `unknown`, never 0. The totals are
  sums over the layers that are known. So an If or a Loop is unknown, and what is stored inside its bodies not counted.

A parameter is a stored floating-point number, counted where it is first read; means and variances of
BatchNormalization are `statistics` instead. Spectra: the stored weight of each Gemm, MatMul (by a matrix) and Conv; a
kernel as the matrix out x (in / groups x kh x kw), whose spectrum is not that of the convolution acting on images.

Reads any valid ONNX file without sparse tensors, also with operators that no bound rule here knows. Cost: one pass over
the file; each spectrum of an m x n matrix costs O(m n min(m, n)): `spectra: false` leaves them out. There is no
`run_many`: networks share nothing to vectorise over.

Reference: Bai, Lu, Zhang, et al. ONNX: Open Neural Network Exchange. 2019. Shapes are inferred by its own library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netassay import figure, networks
from netassay.fields import AnyNetworkRef, Array
from netassay.heavy import np, onnx
from netassay.job import Record
from netassay.method import Contract, InvalidInput, Needs, NumericalError
from netassay.networks import onnx_file
from netassay.store import storable

if TYPE_CHECKING:
    import numpy
    from onnx import ModelProto, NodeProto, ValueInfoProto

VERSION = 1
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05
NEEDS = Needs(seconds=0.2, libraries=("numpy", "onnx"))

#: Networks, and spectra, drawn in one plot; more cannot be told apart.
_DRAWN = 7


class Params(Contract):
    network: AnyNetworkRef
    spectra: bool = True


class Layer(Contract):
    """One node of the file. shape: of its first output, with a batch axis of 1 where the file has a batch axis."""

    name: str
    operator: str
    shape: list[int] | None
    parameters: int
    statistics: int
    macs: int | None
    flops: int | None


class Spectrum(Contract):
    """Singular values, falling, of the weight of a layer seen as a matrix of `shape` (rows, columns)."""

    layer: str
    shape: tuple[int, int]
    singular_values: Array


class Result(Contract):
    operator_set: int
    input_shape: list[int | None]
    """As the file declares it, an open axis as None; empty where the file has several inputs."""
    output_shape: list[int] | None
    """For one example; None where it cannot be inferred."""
    layers: list[Layer]
    parameters: int
    statistics: int
    macs: int
    """Sum over the layers where it is known."""
    flops: int
    """Sum over the layers where it is known."""
    unknown: int
    """Layers whose FLOPs are not known."""
    spectra: list[Spectrum]


EXAMPLE = {
    "jobs": [
        {
            "method": "networks.describe",
            "params": {
                "network": {"dataset": "iris", "architecture": {"kind": "mlp", "hidden": [16, 16]}, "epochs": 20}
            },
            "grid": {"spectra": [True, False]},
        }
    ]
}


def run(params: Params) -> Result:
    proto = onnx_file.model(networks.content(params.network))
    facts = _Facts(proto)
    layers = [facts.layer(node) for node in proto.graph.node if node.op_type != "Constant"]
    outputs = proto.graph.output
    return Result(
        operator_set=max((e.version for e in proto.opset_import if e.domain in ("", "ai.onnx")), default=0),
        input_shape=facts.declared,
        output_shape=facts.shape_of_one(outputs[0].name) if len(outputs) == 1 else None,
        layers=layers,
        parameters=sum(layer.parameters for layer in layers),
        statistics=sum(layer.statistics for layer in layers),
        macs=sum(layer.macs or 0 for layer in layers),
        flops=sum(layer.flops or 0 for layer in layers),
        unknown=sum(layer.flops is None for layer in layers),
        spectra=facts.spectra() if params.spectra else [],
    )


class _Facts:
    """What is known of the tensors of one file: `shapes` (as declared) and `constants` by name; `batch`, if fixed."""

    def __init__(self, proto: ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in proto.graph.initializer}
        for tensor in proto.graph.sparse_initializer:
            raise _sparse(tensor.values.name)
        for node in self.nodes:
            if node.op_type == "Constant":
                for kind, value in onnx_file.attributes(node).items():
                    if kind == "sparse_value":
                        raise _sparse(node.output[0])
                    if kind == "value":
                        self.constants[node.output[0]] = value
                    elif kind in ("value_float", "value_floats"):
                        self.constants[node.output[0]] = onnx.numpy_helper.from_array(np.array(value, dtype=np.float32))
        inputs = [info for info in proto.graph.input if info.name not in self.constants]
        self.declared: list[int | None] = (
            [axis.dim_value if axis.dim_value > 0 else None for axis in inputs[0].type.tensor_type.shape.dim]
            if len(inputs) == 1
            else []
        )
        self.shapes = _shapes(proto, {info.name for info in inputs})
        self.shapes.update({name: tuple(tensor.dims) for name, tensor in self.constants.items()})
        self.batch = self._fixed_batch(inputs, proto.graph.output)
        self.counted: set[str] = set()

    def _fixed_batch(self, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> int:
        """b > 1 where the one input and the one output both begin with an axis of b and have more; else 1."""
        if len(inputs) != 1 or len(outputs) != 1:
            return 1
        first, last = (self.shapes.get(info.name, ()) for info in (inputs[0], outputs[0]))
        return first[0] if len(first) > 1 and len(last) > 1 and first[0] == last[0] else 1

    def shape_of_one(self, name: str) -> list[int] | None:
        """A tensor's shape with the batch at 1; None where it is not known."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        batched = self.batch > 1 and shape[:1] == (self.batch,) and name not in self.constants
        return [1, *shape[1:]] if batched else list(shape)

    def layer(self, node: NodeProto) -> Layer:
        macs, flops = self._cost(node)
        numbers = [0, 0]
        for place, name in enumerate(node.input):
            if name in self.constants and name not in self.counted and self._is_floating(name):
                self.counted.add(name)
                statistic = node.op_type == "BatchNormalization" and place in (3, 4)
                numbers[statistic] += math.prod(self.constants[name].dims)
        return Layer(
            name=onnx_file.label(node),
            operator=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
            shape=self.shape_of_one(node.output[0]),
            parameters=numbers[0],
            statistics=numbers[1],
            macs=macs,
            flops=flops,
        )

    def _is_floating(self, name: str) -> bool:
        kind = onnx.TensorProto.DataType.Name(self.constants[name].data_type)
        return bool(kind.startswith(("FLOAT", "DOUBLE", "BFLOAT", "COMPLEX")))

    def _cost(self, node: NodeProto) -> tuple[int | None, int | None]:
        """(MACs, FLOPs) of a node; both None where its operator or a shape it needs is not known."""
        rule = _COSTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            return None, None
        try:
            macs, others = rule(self, node)
        except KeyError:  # a shape that could not be inferred
            return None, None
        if macs % self.batch or others % self.batch:
            return None, None
        return macs // self.batch, (2 * macs + others) // self.batch

    def elements(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def spectra(self) -> list[Spectrum]:
        found = []
        for node in self.nodes:
            for place in {"Gemm": (0, 1), "MatMul": (0, 1), "Conv": (1,)}.get(node.op_type, ()):
                tensor = self.constants.get(node.input[place])
                if tensor is None or len(tensor.dims) < 2 or (node.op_type != "Conv" and len(tensor.dims) != 2):
                    continue
                weight = np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float64)
                matrix = weight.reshape(len(weight), -1)
                values = _singular_values(matrix, node.input[place])
                found.append(
                    Spectrum(
                        layer=onnx_file.label(node), shape=(matrix.shape[0], matrix.shape[1]), singular_values=values
                    )
                )
        return found


def _singular_values(matrix: numpy.ndarray, name: str) -> numpy.ndarray:
    if not np.isfinite(matrix).all():
        raise NumericalError(f"weight {name!r} holds NaN or infinity", "it has no spectrum", "spectra: false")
    try:
        return np.linalg.svd(matrix, compute_uv=False)
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f"the singular values of {name!r} did not converge", str(error), "spectra: false"
        ) from error


def _sparse(name: str) -> InvalidInput:
    return InvalidInput(
        f"tensor {name!r} is stored sparse",
        "only dense tensors are counted",
        "store it as an ordinary initializer, zeros included",
    )


def _shapes(proto: ModelProto, inputs: set[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, as far as ONNX infers them, an open batch as 1; the model itself is left as it is."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    for info in single.graph.input:
        axes = info.type.tensor_type.shape.dim
        if info.name in inputs and axes and axes[0].dim_value <= 0:
            axes[0].Clear()
            axes[0].dim_value = 1
    # What the file says of later tensors may still hold the symbol of the batch; it is inferred anew.
    del single.graph.value_info[:]
    for info in single.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(single, data_prop=True)
    except Exception:  # a custom operator or contradicting shapes: nothing is known, which the result says
        inferred = single
    graph = inferred.graph
    shapes = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.HasField("shape") and all(axis.dim_value > 0 for axis in tensor.shape.dim):
            shapes[info.name] = tuple(axis.dim_value for axis in tensor.shape.dim)
    return shapes


# Costs: (facts, node) -> (MACs, FLOPs besides). KeyError where a shape is not known.
_Cost = Callable[["_Facts", "NodeProto"], tuple[int, int]]


def _gemm(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    transposed = onnx_file.attributes(node).get("transA", 0)
    return facts.elements(node.output[0]) * facts.shapes[node.input[0]][0 if transposed else 1], 0


def _matmul(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    return facts.elements(node.output[0]) * facts.shapes[node.input[0]][-1], 0


def _conv(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    _, *terms = facts.shapes[node.input[1]]
    return facts.elements(node.output[0]) * math.prod(terms), 0


def _each(flops: int) -> _Cost:
    return lambda facts, node: (0, flops * facts.elements(node.output[0]))


def _operands(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    """Max and Min take any number of operands, Add and the like two."""
    return 0, (len(node.input) - 1) * facts.elements(node.output[0])


def _window(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    return 0, math.prod(onnx_file.attributes(node)["kernel_shape"]) * facts.elements(node.output[0])


def _inputs(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    return 0, facts.elements(node.input[0])


def _free(facts: _Facts, node: NodeProto) -> tuple[int, int]:
    return 0, 0


_MOVES = (
    "Cast Concat ConstantOfShape Dropout Expand Flatten Gather Identity Pad Reshape Shape Slice Split Squeeze Tile "
    "Transpose Unsqueeze"
)

_COSTS: dict[str, _Cost] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
    **dict.fromkeys(("Abs", "Ceil", "Clip", "Floor", "LeakyRelu", "Neg", "Relu", "Round", "Sign", "Sqrt"), _each(1)),
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Sub"), _operands),
    "BatchNormalization": _each(2),
    **dict.fromkeys(("AveragePool", "MaxPool"), _window),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _inputs),
    **dict.fromkeys(_MOVES.split(), _free),
}


def plot(records: list[Record]) -> figure.Figure:
    drawn = [(record.name("network"), record.result) for record in records if record.result is not None]
    shown = drawn[:_DRAWN]
    bars, lines = [], []
    for name, result in shown:
        layers = [layer for layer in result["layers"] if layer["parameters"]]
        bars.append(
            figure.Bars(
                x=[f"{place + 1} {layer['operator']}" for place, layer in enumerate(layers)],
                y=[layer["parameters"] for layer in layers],
                label=networks.short(name),
            )
        )
        for place, spectrum in enumerate(result["spectra"]):
            values = storable.load_array(spectrum["singular_values"])
            label = f"weight {place + 1}" if len(shown) == 1 else f"{networks.short(name)}, weight {place + 1}"
            lines.append(figure.Line(x=list(range(1, len(values) + 1)), y=[float(v) for v in values], label=label))
    panels = [
        figure.Panel(
            title="parameters by layer",
            x=figure.Axis(label="layer", scale="category"),
            y=figure.Axis(label="parameters"),
            marks=list(bars),
        )
    ]
    if lines:
        panels.append(
            figure.Panel(
                title="spectra of the weights",
                x=figure.Axis(label="place"),
                y=figure.Axis(label="singular value"),
                marks=list(lines[:_DRAWN]),
            )
        )
    left_out = f" The first {len(shown)} of {len(drawn)} networks are drawn." if len(shown) < len(drawn) else ""
    left_out += f" The first {_DRAWN} of {len(lines)} spectra are drawn." if len(lines) > _DRAWN else ""
    return figure.Figure(
        title="Networks described",
        caption=f"Layers without parameters are left out; kernels as matrices out x (in x kh x kw).{left_out}",
        panels=panels,
    )
