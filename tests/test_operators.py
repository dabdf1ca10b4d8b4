"""Every operator the reader knows, held to onnxruntime on the same file: attributes, operator sets, batch axes.

The graph is evaluated in float64; onnxruntime computes in float32, so they agree to 1e-5 of the largest output.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import draw, exported, make_model, node

from netassay.method import NotApplicable
from netassay.networks import agreement, evaluate, onnx_file
from netassay.networks.exported import to_onnx
from netassay.networks.graph import Activation, Dense, Graph, Pick, Product, Relu, Reshape, Scale, Sum

torch.set_num_threads(1)


def assert_agrees(data: bytes, low: float = -2.0, high: float = 2.0, tolerance: float = 1e-5) -> Graph:
    """The graph computes what onnxruntime does, several inputs at once as one by one; so does the graph written."""
    graph = onnx_file.read(data)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in entry.shape]
    inputs = np.random.default_rng(0).uniform(low, high, size=(5, *shape)).astype(np.float32)
    x = torch.tensor(inputs).reshape(5, *graph.input_shape).double()
    ours = evaluate.forward(graph, x)
    assert ours.shape == (5, *graph.output_shape)
    found = [session.run(None, {entry.name: one})[0] for one in inputs]
    assert (onnx_file.inner(tuple(found[0].shape)) or (1,)) == graph.output_shape
    peer = np.stack(found).reshape(ours.shape)
    assert np.isfinite(peer).all()
    atol = tolerance * np.abs(peer).max()
    np.testing.assert_allclose(ours.numpy(), peer, rtol=0, atol=atol)
    one_by_one = torch.cat([evaluate.forward(graph, one[None]) for one in x])
    torch.testing.assert_close(ours, one_by_one, rtol=1e-12, atol=1e-12)
    if not isinstance(entry.shape[0], int):
        of_one = onnx_file.read(with_a_batch_of_one(data))
        assert (of_one.input_shape, of_one.output_shape) == (graph.input_shape, graph.output_shape)
        torch.testing.assert_close(evaluate.forward(of_one, x), ours, rtol=1e-12, atol=1e-12)
    again = evaluate.forward(onnx_file.read(onnx_file.write(graph, "written")), x)
    np.testing.assert_allclose(again.numpy(), ours.numpy(), rtol=0, atol=atol)
    return graph


def with_a_batch_of_one(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return bytes(model.SerializeToString())


Case = Callable[[], bytes]
N = "n"


def one(kind: str, shape: list[Any], *constants: Any, opset: int = 21, **of: Any) -> Case:
    """A file of one node: x, then constants (None: left out)."""
    names = [f"c{place}" if array is not None else "" for place, array in enumerate(constants)]

    def make() -> bytes:
        given = {name: array for name, array in zip(names, constants, strict=True) if name}
        return make_model([node(kind, "x", *names, **of)], shape, given, opset)

    return make


def ints(*items: int) -> np.ndarray:
    return np.array(items, dtype=np.int64)


def scalar(number: float) -> np.ndarray:
    return np.array(number, dtype=np.float32)


ELEMENTWISE: dict[str, Case] = {
    **{kind: one(kind, [N, 3, 5]) for kind in (
        "Abs", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu",
        "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "Celu", "Identity")},
    "leaky, slope 0.2, set 8": one("LeakyRelu", [1, 6], opset=8, alpha=0.2),
    "leaky, slope above one": one("LeakyRelu", [N, 6], alpha=1.7),
    "leaky, slope below zero": one("LeakyRelu", [N, 6], alpha=-0.4),
    "prelu, one slope": one("PRelu", [N, 3, 4], draw(1)),
    "prelu, a slope a channel": one("PRelu", [N, 3, 4, 2], draw(3, 1, 1)),
    "prelu, a slope an element": one("PRelu", [1, 3, 4], draw(3, 4)),
    "elu, alpha": one("Elu", [N, 6], alpha=0.3),
    "celu, alpha": one("Celu", [N, 6], alpha=1.7),
    "selu, both": one("Selu", [N, 6], alpha=1.1, gamma=0.7),
    "gelu, tanh": one("Gelu", [N, 6], approximate="tanh", opset=20),
    "hard sigmoid, both": one("HardSigmoid", [N, 6], alpha=0.7, beta=0.1),
    "clip, attributes": one("Clip", [N, 6], opset=8, min=-0.5, max=1.0),
    "clip, attributes, low only": one("Clip", [N, 6], opset=8, min=0.5),
    "clip, inputs": one("Clip", [N, 6], scalar(-0.5), scalar(1.0)),
    "clip, no low": one("Clip", [N, 6], None, scalar(1.0)),
    "clip, no high": one("Clip", [N, 6], scalar(-0.3)),
    "clip, no end": one("Clip", [N, 6]),
    "clip, infinite low": one("Clip", [N, 6], scalar(-np.inf), scalar(1.0)),
    "relu six": one("Clip", [N, 6], scalar(0.0), scalar(6.0)),
    **{f"power {e}": one("Pow", [N, 6], scalar(e)) for e in (0, 1, 2, 3, -1)},
    "cast to itself": lambda: make_model([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], [N, 6], {}),
    "dropout": one("Dropout", [N, 6]),
}  # fmt: skip

POSITIVE: dict[str, Case] = {
    **{kind: one(kind, [N, 3, 5]) for kind in ("Log", "Sqrt", "Reciprocal")},
    **{f"power {e}": one("Pow", [N, 6], scalar(e)) for e in (0.5, -0.5, 1.5, -2)},
    "a constant to the power of x": lambda: make_model([node("Pow", "c", "x")], [N, 4], {"c": np.abs(draw(4)) + 0.2}),
    "a constant divided by x": lambda: make_model([node("Div", "c", "x")], [N, 4], {"c": draw(4)}),
    "log of a sum": one("ReduceLogSum", [N, 3, 4], ints(1)),
}


def two(kind: str, left: list[int], right: list[int], fixed: bool = False) -> Case:
    """Two slices of one input combined."""

    def make() -> bytes:
        a, b = math.prod(left), math.prod(right)
        nodes = [
            node("Slice", "x", "zero", "middle", "axis", to="fa"),
            node("Slice", "x", "middle", "end", "axis", to="fb"),
            node("Reshape", "fa", "sa", to="a"),
            node("Reshape", "fb", "sb", to="b"),
            node(kind, "a", "b", to="y"),
        ]
        constants = {
            "zero": ints(0), "middle": ints(a), "end": ints(a + b), "axis": ints(1),
            "sa": ints(*([] if fixed else [-1]), *left), "sb": ints(*([] if fixed else [-1]), *right),
        }  # fmt: skip
        return make_model(nodes, [1 if fixed else N, a + b], constants, 17)

    return make


ARITHMETIC: dict[str, Case] = {
    **{f"{kind} {left} and {right}": two(kind, left, right, fixed)
       for kind in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")
       for left, right, fixed in (([2, 3], [2, 3], False), ([3, 1, 4], [1, 2, 1], False), ([2, 3], [4, 1, 3], True))},
    "divided by a value": lambda: make_model(
        [node("Exp", "x", to="e"), node("Neg", "x", to="m"), node("Div", "m", "e")], [N, 3, 2], {}),
    "value and itself": lambda: make_model(
        [node("Add", "x", "x", to="a"), node("Mul", "x", "x", to="b"), node("Sub", "a", "b")], [N, 4], {}),
    "growing broadcast": one("Add", [N, 3, 1], draw(3, 5)),
    "growing product, no batch": one("Mul", [4], draw(3, 4)),
    "growing product, batch of one": one("Mul", [1, 4], draw(3, 4)),
    "sum of three": lambda: make_model([node("Sum", "x", "c", "x", "d")], [N, 4], {"c": draw(4), "d": draw(1, 4)}),
    "max of three": lambda: make_model([
        node("Neg", "x", to="r"), node("Max", "x", "c", "r", "d")], [N, 4], {"c": draw(4), "d": scalar(0.1)}),
    "min of three": lambda: make_model(
        [node("Sin", "x", to="r"), node("Min", "x", "c", "r")], [N, 4], {"c": draw(4)}),
    "where, both values": lambda: make_model(
        [node("Neg", "x", to="r"), node("Where", "c", "x", "r")], [N, 4], {"c": np.array([1, 0, 0, 1])}),
    "where, a constant": lambda: make_model([node("Where", "c", "x", "d")], [N, 2, 4], {
        "c": np.array([[1], [0]]), "d": draw(4)}),
}  # fmt: skip


def product_of_two(left: list[int], right: list[int], fixed: bool = False) -> Case:
    return two("MatMul", left, right, fixed)


MATRICES: dict[str, Case] = {
    "constant on the right, three axes": one("MatMul", [N, 3, 4], draw(4, 5)),
    "a matrix for each head": one("MatMul", [N, 2, 3, 4], draw(2, 4, 5)),
    "a matrix for each head, shared value": one("MatMul", [1, 3, 4], draw(2, 4, 5)),
    "constant on the left": lambda: make_model([node("MatMul", "w", "x")], [N, 4, 3], {"w": draw(5, 4)}),
    "constants on the left": lambda: make_model([node("MatMul", "w", "x")], [N, 2, 4, 3], {"w": draw(2, 5, 4)}),
    "vector on the left": lambda: make_model([node("MatMul", "w", "x")], [N, 4, 3], {"w": draw(4)}),
    "two values": product_of_two([3, 4], [4, 2]),
    "two values, heads": product_of_two([2, 3, 4], [2, 4, 5]),
    "two values, broadcast heads": product_of_two([2, 3, 4], [1, 4, 5]),
    "two vectors": product_of_two([4], [4], True),
    "gram matrix": lambda: make_model(
        [node("Transpose", "x", perm=[0, 2, 1], to="t"), node("MatMul", "x", "t")], [N, 3, 4], {}),
    "gemm of two values": lambda: make_model(
        [node("Squeeze", "x", "a", to="s"), node("Gemm", "s", "s", "s", transB=1, alpha=0.5, beta=2.0)],
        [1, 3, 3], {"a": ints(0)}),
    "gemm, constant first": lambda: make_model(
        [node("Squeeze", "x", "a", to="s"), node("Gemm", "w", "s", "c", transA=1)],
        [1, 3, 4], {"a": ints(0), "w": draw(3, 5), "c": draw(4)}),
}  # fmt: skip


def conv(kind: str, shape: list[Any], weight: tuple[int, ...], bias: bool = True, opset: int = 13, **of: Any) -> Case:
    outputs = weight[0] if kind == "Conv" else weight[1] * of.get("group", 1)
    return one(kind, shape, draw(*weight), *([draw(outputs)] if bias else []), opset=opset, **of)


CONVOLUTIONS: dict[str, Case] = {
    "1-d": conv("Conv", [N, 3, 9], (4, 3, 3), strides=[2], pads=[1, 2]),
    "1-d, dilated, groups": conv("Conv", [1, 4, 9], (6, 2, 2), bias=False, dilations=[3], group=2),
    "2-d": conv("Conv", [N, 3, 7, 6], (4, 3, 3, 2), strides=[2, 1], pads=[1, 0, 2, 1]),
    "transpose": conv("ConvTranspose", [N, 3, 4, 5], (3, 2, 3, 3)),
    "transpose, strides": conv("ConvTranspose", [N, 3, 4, 5], (3, 2, 3, 2), strides=[2, 3]),
    "transpose, pads, more": conv("ConvTranspose", [1, 3, 4, 5], (3, 2, 3, 3), strides=[2, 2], pads=[1, 0, 1, 1],
                                  output_padding=[1, 0]),
    "transpose, groups, dilated": conv("ConvTranspose", [N, 4, 3, 3], (4, 3, 2, 2), group=2, dilations=[2, 1]),
    "transpose, shape": conv("ConvTranspose", [N, 2, 4, 4], (2, 3, 3, 3), strides=[2, 2], output_shape=[8, 8]),
    "transpose, shape, upper": conv("ConvTranspose", [N, 2, 4, 4], (2, 3, 3, 3), strides=[2, 2], output_shape=[8, 8],
                                    auto_pad="SAME_UPPER"),
    "transpose, same upper": conv("ConvTranspose", [N, 2, 4, 3], (2, 3, 3, 4), strides=[2, 2], auto_pad="SAME_UPPER"),
    "transpose, same lower": conv("ConvTranspose", [N, 2, 4, 3], (2, 3, 3, 4), strides=[2, 2], auto_pad="SAME_LOWER"),
    "transpose, valid": conv("ConvTranspose", [N, 2, 4, 3], (2, 3, 3, 4), auto_pad="VALID", bias=False),
    "transpose, 1-d": conv("ConvTranspose", [N, 2, 5], (2, 3, 4), strides=[2], pads=[1, 1], output_padding=[1]),
    "transpose, biased after": lambda: make_model(
        [node("ConvTranspose", "x", "w", to="c"), node("Add", "c", "b")], [N, 2, 3, 3],
        {"w": draw(2, 3, 2, 2), "b": draw(3, 1, 1)}),
}  # fmt: skip

POOLS: dict[str, Case] = {
    **{f"{kind}, {name}": one(kind, [N, 2, 7, 8], kernel_shape=[3, 2], **of)
       for kind in ("MaxPool", "AveragePool")
       for name, of in {
           "plain": {}, "strides": {"strides": [2, 3]}, "pads": {"pads": [1, 1, 2, 0]},
           "pads, strides, ceil": {"pads": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": 1},
           "ceil": {"strides": [3, 3], "ceil_mode": 1}, "dilated": {"dilations": [2, 3]},
           "same upper": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
           "same lower": {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
           "valid": {"auto_pad": "VALID", "strides": [2, 2]},
       }.items()},
    **{f"average, pads count, {name}": one(
        "AveragePool", [N, 2, 7, 8], kernel_shape=[3, 2], pads=[1, 1, 2, 0], count_include_pad=1, **of)
       for name, of in {"plain": {}, "ceil": {"strides": [2, 2], "ceil_mode": 1}, "dilated": {"dilations": [2, 2]},
                        }.items()},
    **{f"{kind}, set {opset}": one(kind, [1, 2, 5, 5], opset=opset, kernel_shape=[2, 2], strides=[2, 2])
       for kind in ("MaxPool", "AveragePool") for opset in (8, 10, 12, 19, 22)},
    "max, 5 x 7 windows": one("MaxPool", [N, 1, 9, 9], kernel_shape=[5, 7], pads=[2, 3, 2, 3]),
    "max, steps above windows": one("MaxPool", [N, 1, 9, 9], kernel_shape=[2, 2], strides=[3, 4]),
    "max, 1-d": one("MaxPool", [N, 2, 9], kernel_shape=[3], strides=[2], pads=[1, 1]),
    "max, 3-d": one("MaxPool", [N, 2, 4, 5, 3], kernel_shape=[2, 2, 3]),
    "average, 1-d": one("AveragePool", [N, 2, 9], kernel_shape=[3], strides=[2], pads=[1, 1]),
    "global average": one("GlobalAveragePool", [N, 3, 4, 5]),
    "global max": one("GlobalMaxPool", [N, 3, 4, 5]),
    "global average, 1-d": one("GlobalAveragePool", [1, 3, 4]),
}  # fmt: skip


REDUCTIONS: dict[str, Case] = {
    **{f"{kind}, {name}": one(kind, [N, 3, 4, 2], *axes, opset=18, **of)
       for kind in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin")
       for name, axes, of in (("last", [ints(-1)], {}), ("middle", [ints(2)], {"keepdims": 0}),
                              ("two", [ints(1, 3)], {}), ("none", [], {"noop_with_empty_axes": 1}))},
    **{f"{kind}, set {opset}": one(kind, [N, 3, 4], opset=opset, axes=[1], keepdims=0)
       for kind in ("ReduceMean", "ReduceMax", "ReduceMin") for opset in (8, 11, 13)},
    "sum, set 11": one("ReduceSum", [N, 3, 4], opset=11, axes=[-2]),
    "all, of a batch of one": one("ReduceSum", [1, 3, 4], opset=18, keepdims=0),
    "to one number": one("ReduceMean", [N, 3, 4], ints(1, 2), opset=18, keepdims=0),
    "one number on": lambda: make_model(
        [node("ReduceSum", "x", "a", to="s", keepdims=0), node("Tanh", "s", to="t"),
         node("Unsqueeze", "t", "b", to="u"), node("Mul", "x", "u")], [N, 3], {"a": ints(1), "b": ints(1)}),
    **{kind: one(kind, [N, 3, 4], ints(2), opset=18)
       for kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")},
}  # fmt: skip

NORMALISATIONS: dict[str, Case] = {
    **{f"{kind}, {name}": one(kind, shape, opset=opset, **of)
       for kind in ("Softmax", "LogSoftmax")
       for name, shape, opset, of in (
           ("last", [N, 2, 5], 13, {}), ("middle", [N, 4, 3], 13, {"axis": 1}), ("of two", [N, 2], 13, {}),
           ("of one", [N, 3, 1], 13, {}), ("flattened", [N, 2, 3], 11, {}),
           ("flattened at 2", [N, 2, 3], 11, {"axis": 2}),
           ("fixed batch", [1, 6], 8, {"axis": 1}), ("long", [N, 1100], 13, {}))},
    "layer": one("LayerNormalization", [N, 3, 6], draw(6), draw(6), opset=17),
    "layer, two axes, no offset": one("LayerNormalization", [N, 2, 3, 4], draw(3, 4), opset=17, axis=-2, epsilon=1e-2),
    "instance": one("InstanceNormalization", [N, 3, 4, 5], draw(3), draw(3), opset=13),
    "instance, 1-d": one("InstanceNormalization", [1, 3, 6], draw(3), draw(3), opset=13, epsilon=1e-3),
    "group": one("GroupNormalization", [N, 4, 3, 2], draw(4), draw(4), opset=21, num_groups=2),
    "root mean square": one("RMSNormalization", [N, 3, 6], draw(6), opset=23),
    "batch": one("BatchNormalization", [N, 3, 4], draw(3), draw(3), draw(3), np.abs(draw(3)) + 0.1, opset=15),
}  # fmt: skip


def resized(opset: int, scales: list[float] | None, sizes: list[int] | None = None, **of: Any) -> Case:
    given = [None, np.array(scales, np.float32) if scales else None, *([ints(*sizes)] if sizes else [])]
    return one("Resize", [1 if sizes else N, 2, 4, 5], *given, opset=opset, **of)


MOVES: dict[str, Case] = {
    "channels last": one("Transpose", [N, 3, 4, 5], perm=[0, 2, 3, 1]),
    "all reversed": one("Transpose", [1, 2, 3, 4]),
    "concat with a constant": lambda: make_model(
        [node("Sin", "x", to="s"), node("Concat", "x", "c", "s", axis=1)], [1, 2, 3], {"c": draw(1, 4, 3)}),
    "concat of itself": lambda: make_model([node("Concat", "x", "x", axis=-1)], [N, 2, 3], {}),
    "split, even": lambda: make_model(
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1), node("Mul", "a", "b")], [N, 4, 2], {}),
    "split, sizes": lambda: make_model(
        [helper.make_node("Split", ["x", "s"], ["a", "b", "c"], axis=2), node("Concat", "c", "a", axis=2)],
        [N, 2, 6], {"s": ints(1, 2, 3)}),
    "split, attribute": lambda: make_model(
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1, split=[1, 3]), node("Concat", "b", "a", axis=1)],
        [N, 4], {}, 11),
    "split, uneven": lambda: make_model(
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Concat", "b", "a", axis=1)],
        [N, 5], {}, 18),
    "slice": one("Slice", [N, 5, 6], ints(1, -4), ints(9, -1), ints(1, 2), ints(2, 1)),
    "slice, backwards": one("Slice", [N, 5, 6], ints(-1, 4), ints(-99, 0), ints(1, 2), ints(-2, -1)),
    "slice, whole batch": one("Slice", [N, 5], ints(0, 1), ints(2**31 - 1, 3), ints(0, 1)),
    "slice, set 9": one("Slice", [N, 5, 6], opset=9, starts=[1, 0], ends=[4, 3], axes=[1, 2]),
    "gather": one("Gather", [N, 5, 3], ints(3, 0, -1), axis=1),
    "gather one": one("Gather", [N, 5, 3], np.int64(2), axis=2),
    "gather a matrix": one("Gather", [N, 5], np.array([[0, 1], [4, 4]]), axis=1),
    **{f"pad, {mode}": one("Pad", [N, 2, 4, 5], ints(0, 0, 1, 2, 0, 0, 3, 1), opset=13, mode=mode)
       for mode in ("constant", "reflect", "edge")},
    "pad, wrap": one("Pad", [N, 2, 4], ints(0, 0, 3, 0, 0, 2), opset=19, mode="wrap"),
    "pad with a number": one("Pad", [N, 2, 4], ints(0, 1, 1, 0, 0, 2), scalar(-1.5), opset=13),
    "pad, axes": one("Pad", [N, 2, 4], ints(1, 2), scalar(0.5), ints(-1), opset=18),
    "pad, attribute": one("Pad", [N, 2, 4], opset=8, pads=[0, 0, 1, 0, 0, 2], value=0.25),
    "crop": one("Pad", [N, 2, 6], ints(0, 0, -1, 0, 0, -2), opset=13),
    "expand": one("Expand", [N, 3, 1], ints(1, 3, 4)),
    "expand to more axes": one("Expand", [3, 1], ints(2, 3, 4)),
    "tile": one("Tile", [N, 2, 3], ints(1, 2, 2)),
    "depth to space": one("DepthToSpace", [N, 8, 2, 3], blocksize=2),
    "depth to space, crd": one("DepthToSpace", [N, 8, 2, 3], blocksize=2, mode="CRD"),
    "space to depth": one("SpaceToDepth", [N, 2, 4, 6], blocksize=2),
    "upsample, set 8": one("Upsample", [1, 2, 3, 3], opset=8, scales=[1.0, 1.0, 2.0, 3.0]),
    "upsample, set 9": one("Upsample", [1, 2, 3, 3], np.array([1, 1, 2, 2], np.float32), opset=9),
    "resize, set 10": one("Resize", [1, 2, 4, 4], np.array([1, 1, 1.5, 0.5], np.float32), opset=10),
    **{f"resize, {how}, {rounding}": resized(13, [1, 1, 2, 1.6], coordinate_transformation_mode=how,
                                             nearest_mode=rounding)
       for how in ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")
       for rounding in ("floor", "round_prefer_floor", "round_prefer_ceil", "ceil")},
    **{f"resize, linear, {how}": resized(13, [1, 1, 2, 0.6], mode="linear", coordinate_transformation_mode=how)
       for how in ("asymmetric", "half_pixel", "align_corners")},
    "resize to sizes": resized(13, None, [1, 2, 7, 3], mode="nearest", coordinate_transformation_mode="asymmetric",
                               nearest_mode="floor"),
    "resize to sizes, linear": resized(18, None, [1, 2, 7, 3], mode="linear"),
    "squeeze": one("Squeeze", [N, 1, 3, 1], ints(1, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*ELEMENTWISE])
def test_an_elementwise_operator_agrees(name: str) -> None:
    assert_agrees(ELEMENTWISE[name]())


@pytest.mark.parametrize("name", POSITIVE)
def test_a_function_of_positive_numbers_agrees(name: str) -> None:
    assert_agrees(POSITIVE[name](), low=0.2)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_agrees(name: str) -> None:
    data = ARITHMETIC[name]()
    if name.startswith("where"):
        model = onnx.load_model_from_string(data)
        (tensor,) = (t for t in model.graph.initializer if t.name == "c")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(bool), "c"))
        data = model.SerializeToString()
    assert_agrees(data)


@pytest.mark.parametrize("name", MATRICES)
def test_a_product_of_matrices_agrees(name: str) -> None:
    assert_agrees(MATRICES[name]())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_agrees(name: str) -> None:
    assert_agrees(CONVOLUTIONS[name]())


@pytest.mark.parametrize("name", POOLS)
def test_pooling_agrees(name: str) -> None:
    assert_agrees(POOLS[name]())


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_agrees(name: str) -> None:
    assert_agrees(REDUCTIONS[name]())


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_agrees(name: str) -> None:
    assert_agrees(NORMALISATIONS[name]())


@pytest.mark.parametrize("name", MOVES)
def test_moving_numbers_agrees(name: str) -> None:
    graph = assert_agrees(MOVES[name]())
    assert {type(op) for op in graph.operations} <= {Pick, Reshape, Sum, Scale, Dense, Product, Activation, Relu}


# -- Batch axes --------------------------------------------------------------------------------------------------------


def test_a_symbolic_batch_may_move_and_come_back() -> None:
    """As attention does: (batch, tokens, 3 x heads) to (3, batch, heads, tokens) and back."""
    nodes = [
        node("Reshape", "x", "split", to="s"),
        node("Transpose", "s", to="t", perm=[2, 0, 3, 1]),
        node("Gather", "t", "one", to="g", axis=0),
        node("Mul", "g", "c", to="m"),
        node("Transpose", "m", perm=[0, 2, 1]),
    ]
    assert_agrees(make_model(nodes, [N, 4, 6], {"split": ints(0, 4, 3, 2), "one": np.int64(1), "c": draw(2, 1)}))


def test_a_constant_expanded_along_the_batch_is_joined_to_every_example() -> None:
    """A class token, as exporters write `token.expand(x.shape[0], -1, -1)`."""
    nodes = [
        node("Shape", "x", to="s"),
        node("Gather", "s", "zero", to="n", axis=0),
        node("Concat", "n", "rest", to="t", axis=0),
        node("Equal", "t", "minus", to="same"),
        node("Where", "same", "ones", "t", to="target"),
        node("Expand", "token", "target", to="tokens"),
        node("Concat", "tokens", "x", axis=1),
    ]
    constants = {"zero": ints(0), "rest": ints(-1, 3), "minus": ints(-1), "ones": ints(1), "token": draw(1, 1, 3)}
    graph = assert_agrees(make_model(nodes, [N, 2, 3], constants))
    assert graph.output_shape == (3, 3)


def masked(kind: str, axis: int) -> bytes:
    """Attention to what came before: scores above the diagonal are minus infinity."""
    later = np.triu(np.ones((4, 4)), 1)
    if kind == "Add":
        nodes, constants = [node("Add", "x", "m", to="s")], {"m": np.where(later, -np.inf, draw(4, 4))}
    else:
        order = ("c", "i", "x") if kind == "Where" else ("c", "x", "i")
        nodes = [helper.make_node("Cast", ["b"], ["c"], to=TensorProto.BOOL), node("Where", *order, to="s")]
        constants = {"i": scalar(-np.inf), "b": (later if kind == "Where" else 1 - later).astype(np.int64)}
    return make_model([*nodes, node("Softmax", "s", axis=axis)], [N, 2, 4, 4], constants, 17)


@pytest.mark.parametrize("kind", ["Add", "Where", "Where not"])
@pytest.mark.parametrize("axis", [-1, 2])
def test_a_masked_softmax_leaves_out_what_is_minus_infinity(kind: str, axis: int) -> None:
    graph = assert_agrees(masked(kind, axis))
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(1, 2, 4, 4)
    y = evaluate.forward(graph, x)
    later = torch.ones(4, 4).triu(1).bool()
    assert (y[:, :, later] == 0).all()
    torch.testing.assert_close(y.sum(axis), torch.ones(1, 2, 4, dtype=torch.float64))


# -- Pieces of one function --------------------------------------------------------------------------------------------


def pieces(*nodes: Any, **constants: float) -> bytes:
    return make_model(list(nodes), [N, 7], {name: scalar(c) for name, c in constants.items()}, 17)


def gelu(before: bool, divides: bool, half: str, one_first: bool, root: float = math.sqrt(2)) -> bytes:
    """x * 0.5 * (1 + erf(x / sqrt 2)) in one of the orders that exporters write."""
    nodes = [
        node("Div", "x", "r", to="u") if divides else node("Mul", "r", "x", to="u"),
        node("Erf", "u", to="e"),
        node("Add", *(("one", "e") if one_first else ("e", "one")), to="a"),
    ]
    match half:
        case "first":
            nodes += [node("Mul", "x", "half", to="h"), node("Mul", *(("h", "a") if before else ("a", "h")))]
        case "last":
            nodes += [node("Mul", *(("x", "a") if before else ("a", "x")), to="h"), node("Mul", "h", "half")]
        case "inside":
            nodes += [node("Mul", "half", "a", to="h"), node("Mul", *(("x", "h") if before else ("h", "x")))]
        case "divided":
            nodes += [node("Mul", "a", "x", to="h"), node("Div", "h", "two")]
    return pieces(*nodes, r=root if divides else 1 / root, one=1.0, half=0.5, two=2.0)


@pytest.mark.parametrize("half", ["first", "last", "inside", "divided"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("divides", [True, False])
def test_gelu_in_any_order_is_one_operation(half: str, before: bool, divides: bool) -> None:
    graph = assert_agrees(gelu(before, divides, half, one_first=before))
    assert [op.function for op in graph.operations if isinstance(op, Activation)] == ["gelu"]
    assert len(graph.operations) == 1


def test_a_gelu_with_other_constants_keeps_them() -> None:
    graph = assert_agrees(gelu(True, True, "first", True, root=1.5))
    assert [type(op) for op in graph.operations] == [Scale, Activation, Scale]


def tanh_gelu(cube: bool) -> bytes:
    nodes = (
        [node("Pow", "x", "three", to="c")] if cube else [node("Mul", "x", "x", to="q"), node("Mul", "q", "x", to="c")]
    )
    nodes += [
        node("Mul", "b", "c", to="d"), node("Add", "x", "d", to="s"), node("Mul", "s", "a", to="u"),
        node("Tanh", "u", to="t"), node("Add", "t", "one", to="g"), node("Mul", "half", "x", to="h"),
        node("Mul", "h", "g"),
    ]  # fmt: skip
    return pieces(*nodes, three=3.0, b=0.044715, a=math.sqrt(2 / math.pi), one=1.0, half=0.5)


PIECES: dict[str, tuple[Callable[[], bytes], str]] = {
    "gelu, tanh, power": (lambda: tanh_gelu(True), "gelu_tanh"),
    "gelu, tanh, products": (lambda: tanh_gelu(False), "gelu_tanh"),
    "silu": (lambda: pieces(node("Sigmoid", "x", to="s"), node("Mul", "s", "x")), "silu"),
    "hard swish": (
        lambda: pieces(helper.make_node("HardSigmoid", ["x"], ["s"], alpha=1 / 6, beta=0.5), node("Mul", "x", "s")),
        "hard_swish",
    ),
    "hard swish by clip": (
        lambda: pieces(
            node("Add", "x", "three", to="a"), node("Clip", "a", "zero", "six", to="c"), node("Mul", "x", "c", to="m"),
            node("Div", "m", "six"), three=3.0, zero=0.0, six=6.0,
        ),
        "hard_swish",
    ),
    "mish": (
        lambda: pieces(node("Softplus", "x", to="p"), node("Tanh", "p", to="t"), node("Mul", "x", "t")),
        "mish",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_a_function_in_pieces_is_one_operation(name: str) -> None:
    make, function = PIECES[name]
    graph = assert_agrees(make())
    assert [op.function for op in graph.operations if isinstance(op, Activation)] == [function]
    assert len(graph.operations) == 1


def test_a_swish_of_a_multiple_is_a_scaled_silu() -> None:
    data = pieces(node("Mul", "x", "c", to="u"), node("Sigmoid", "u", to="s"), node("Mul", "x", "s"), c=1.702)
    assert [type(op) for op in assert_agrees(data).operations] == [Scale, Activation, Scale]


def test_pieces_that_others_read_are_left_alone() -> None:
    nodes = [node("Sigmoid", "x", to="s"), node("Mul", "s", "x", to="m"), node("Add", "m", "s")]
    graph = assert_agrees(pieces(*nodes))
    assert [op.function for op in graph.operations if isinstance(op, Activation)] == ["sigmoid"]


@pytest.mark.parametrize("peak", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
def test_a_softmax_in_pieces_is_one_of_differences(peak: bool, inverse: bool) -> None:
    nodes = [node("ReduceMax", "x", to="m", axes=[-1]), node("Sub", "x", "m", to="z")] if peak else []
    nodes += [node("Exp", "z" if peak else "x", to="e"), node("ReduceSum", "e", "last", to="t")]
    nodes += [node("Reciprocal", "t", to="r"), node("Mul", "e", "r")] if inverse else [node("Div", "e", "t")]
    graph = assert_agrees(make_model(nodes, [N, 2, 4], {"last": ints(-1)}, 17))
    whole = onnx_file.read(make_model([node("Softmax", "x", axis=-1)], [N, 2, 4], {}, 17))
    assert [type(op) for op in graph.operations] == [type(op) for op in whole.operations]
    assert not any(isinstance(op, Relu) for op in graph.operations)


def test_a_maximum_says_of_which_values_it_is_the_larger() -> None:
    data = make_model([node("Neg", "x", to="r"), node("Max", "x", "r")], [N, 3], {})
    (total,) = [op for op in onnx_file.read(data).operations if isinstance(op, Sum) and op.larger]
    assert total.larger == ("x", "r")


@pytest.mark.parametrize("kernel", [[1, 2], [3, 3], [5, 7]])
def test_a_maximum_of_n_numbers_takes_n_minus_one_rectifiers(kernel: list[int]) -> None:
    """With windows side by side, so that no two share a row."""
    data = one("MaxPool", [N, 2, 5 * kernel[0], 3 * kernel[1]], kernel_shape=kernel, strides=kernel)()
    relus = sum(math.prod(op.shape) for op in onnx_file.read(data).operations if isinstance(op, Relu))
    assert relus == 2 * 5 * 3 * (math.prod(kernel) - 1)


def test_moves_in_a_row_are_one_and_those_that_undo_each_other_none() -> None:
    turn = [node("Transpose", "x", perm=[0, 2, 1], to="a"), node("Transpose", "a", perm=[0, 2, 1], to="b")]
    assert len(onnx_file.read(make_model([*turn, node("Relu", "b")], [N, 3, 4], {})).operations) == 1
    cut = [node("Slice", "b", "s", "e", "ax", to="c"), node("Transpose", "c", perm=[0, 2, 1])]
    data = make_model([*turn, *cut], [N, 3, 4], {"s": ints(1), "e": ints(3), "ax": ints(2)})
    assert [type(op) for op in onnx_file.read(data).operations] == [Pick]


# -- Random networks ---------------------------------------------------------------------------------------------------


def random_network(seed: int) -> bytes:
    """Some fifteen nodes, each of what came before; all values are (batch, 2, 4, 4), so that any two combine."""
    random = np.random.default_rng(seed)
    constants: dict[str, Any] = {"ends": ints(1, 2), "order": ints(1, 0)}
    nodes, names = [], ["x"]

    def weight(*shape: int) -> str:
        name = f"w{len(constants)}"
        constants[name] = random.normal(size=shape).astype(np.float32)
        return name

    def pick() -> str:
        return str(names[random.integers(max(0, len(names) - 4), len(names))])

    for place in range(15):
        a, b, to = pick(), pick(), f"v{place}"
        middle = f"{to}.m"
        made: list[Any] = [
            [node(str(random.choice(["Add", "Sub", "Max", "Min"])), a, b, to=to)],
            [node("Tanh", a, to=middle), node("Mul", middle, b, to=to)],
            [node(str(random.choice(["Relu", "LeakyRelu", "Sigmoid", "Abs", "Elu", "Softplus", "Sin"])), a, to=to)],
            [node("Conv", a, weight(2, 2, 3, 3), weight(2), to=middle, pads=[1, 1, 1, 1]), node("Tanh", middle, to=to)],
            [node("MaxPool", a, to=to, kernel_shape=[3, 2], pads=[1, 0, 1, 1])],
            [node("AveragePool", a, to=to, kernel_shape=[2, 3], pads=[1, 1, 0, 1])],
            [node("Transpose", a, to=to, perm=[0, 1, 3, 2])],
            [node("Gather", a, "order", to=to, axis=1)],
            [node("Concat", a, b, to=middle, axis=1), node("Gather", middle, "ends", to=to, axis=1)],
            [node("Softmax", a, to=to, axis=int(random.integers(1, 4)))],
            [node("MatMul", a, b, to=middle), node("Tanh", middle, to=to)],
            [node("Mul", a, weight(2, 1, 4), to=middle), node("Add", middle, weight(4), to=to)],
            [node("ReduceMean", a, to=middle, axes=[2]), node("Add", middle, b, to=to)],
            [node("MatMul", a, weight(4, 4), to=to)],
        ][random.integers(14)]
        nodes += made
        names.append(to)
    nodes += [node("Add", names[-1], names[-2], to="s"), node("Flatten", "s", to="f"), node("Gemm", "f", weight(32, 3))]
    return make_model(nodes, ["n" if seed % 2 else 1, 2, 4, 4], constants, 17)


@pytest.mark.parametrize("seed", range(30))
def test_a_random_network_agrees(seed: int) -> None:
    assert_agrees(random_network(seed), tolerance=2e-5)


# -- Architectures as PyTorch exports them -----------------------------------------------------------------------------


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(6), torch.nn.BatchNorm2d(6)])
        self.second, self.short = torch.nn.Conv2d(6, 6, 3, 1, 1), torch.nn.Conv2d(3, 6, 1, 2)
        self.last = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        return self.last(torch.relu(y + self.short(x)).mean((2, 3)))


class Transformer(torch.nn.Module):
    """A class token, one block of two heads with GELU, then a layer normalisation."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.token = torch.nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 1, 8))
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(8) for _ in range(3)])
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(approximate), torch.nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        b, t, e = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, t, 3, 2, e // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attention = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(b, t, e))
        return self.norms[2](x + self.mlp(self.norms[1](x)))[:, 0]


class ChannelsLast(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4 * 30, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1))


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ConvTranspose2d(4, 4, 2, 2)
        self.last = torch.nn.Conv2d(7, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.max_pool2d(torch.nn.functional.silu(self.down(x)), 2)
        larger = torch.nn.functional.interpolate(y, scale_factor=2, mode="nearest")
        return self.last(torch.cat([x, self.up(y) + larger], 1))


def pooled() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Hardswish(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 5, 2, padding=1),
        torch.nn.ELU(), torch.nn.MaxPool2d(2, ceil_mode=True, padding=1), torch.nn.AvgPool2d(2, padding=1),
        torch.nn.Flatten(), torch.nn.Linear(45, 6), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(6, 3),
        torch.nn.LogSoftmax(-1),
    )  # fmt: skip


ARCHITECTURES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (1, 3, 8, 8)),
    "transformer": (lambda: Transformer("none"), (1, 4, 8)),
    "transformer, tanh": (lambda: Transformer("tanh"), (1, 4, 8)),
    "channels last": (ChannelsLast, (1, 5, 6, 3)),
    "decoder": (Decoder, (1, 3, 8, 8)),
    "pooled": (pooled, (1, 3, 12, 12)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("symbolic", [True, False])
def test_an_exported_architecture_agrees(name: str, opset: int, symbolic: bool) -> None:
    make, shape = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval()
    data = exported(network, shape, opset, {"x": {0: "batch"}} if symbolic else None)
    graph = assert_agrees(data)
    assert agreement.agrees(graph, data) < 1e-5
    functions = [op.function for op in graph.operations if isinstance(op, Activation)]
    assert not {"erf", "softplus"}.intersection(functions)  # they are within pieces that were recognised
    x = torch.linspace(-1, 1, 3 * math.prod(shape), dtype=torch.float64).reshape(3, *shape[1:])
    with torch.no_grad():  # the exporter folds normalisation into convolutions in float32
        torch.testing.assert_close(evaluate.forward(graph, x), network.double()(x), rtol=0, atol=1e-5)


# -- A check against the runtime ---------------------------------------------------------------------------------------


def test_a_graph_agrees_with_its_own_file_and_not_with_another() -> None:
    data, other = random_network(1), random_network(3)
    assert agreement.agrees(onnx_file.read(data), data) < 1e-5
    assert agreement.agrees(onnx_file.read(data), other) > agreement.LARGEST_DIFFERENCE
    larger = make_model([node("Concat", "x", "x", axis=1)], ["n", 2, 4, 4], {})
    assert agreement.agrees(onnx_file.read(data), larger) == math.inf


def test_what_is_nowhere_finite_says_nothing() -> None:
    data = make_model([node("Abs", "x", to="a"), node("Neg", "a", to="b"), node("Log", "b")], [N, 3], {})
    assert math.isnan(agreement.agrees(onnx_file.read(data), data))
    one_sided = make_model([node("Abs", "x", to="a"), node("Log", "a")], [N, 3], {})
    assert agreement.agrees(onnx_file.read(data), one_sided) == math.inf


def test_a_program_without_its_exporter_is_told_what_is_missing() -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    if importlib.util.find_spec("onnxscript") is None:
        with pytest.raises(NotApplicable, match="pip install onnxscript"):
            to_onnx(program)
    else:
        data = to_onnx(program)
        assert agreement.agrees(onnx_file.read(data), data) < 1e-5


# -- What it refuses, before any memory is asked for -------------------------------------------------------------------


HUGE = 10**12


def loop() -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 3])],
    )  # fmt: skip
    return make_model(
        [helper.make_node("Loop", ["m", "", "x"], ["y"], name="around", body=body)], [1, 3], {"m": ints(3)[0]}
    )


def branch(constant: bool = False) -> bytes:
    def side(kind: str) -> Any:
        out = helper.make_tensor_value_info(kind, TensorProto.FLOAT, [1, 3])
        return helper.make_graph([helper.make_node(kind, ["x"], [kind])], kind, [], [out])

    nodes = [
        node("ReduceSum", "zero" if constant else "x", to="s", keepdims=0),
        node("Greater", "s", "zero", to="c"),
        helper.make_node("If", ["c"], ["y"], name="either", then_branch=side("Relu"), else_branch=side("Neg")),
    ]
    return make_model(nodes, [1, 3], {"zero": scalar(0)})


def cyclic() -> bytes:
    return make_model([node("Add", "x", "b", to="a"), node("Neg", "a", to="b"), node("Relu", "b")], [1, 3], {})


def foreign() -> bytes:
    model = onnx.load_model_from_string(make_model([node("Relu", "x")], [1, 3], {}))
    model.graph.node[0].op_type, model.graph.node[0].domain = "FusedGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return bytes(model.SerializeToString())


def doubled(times: int) -> bytes:
    names = ["x", *(f"v{place}" for place in range(times))]
    nodes = [node("Concat", name, name, to=to, axis=1) for name, to in itertools.pairwise(names)]
    return make_model([*nodes, node("Relu", names[-1])], [N, 4], {})


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "expand": (one("Expand", [N, 1], ints(1, HUGE)), "Expand to y .*at most"),
    "expand of a constant": (lambda: make_model(
        [node("Expand", "c", "s", to="e"), node("Add", "x", "e")], [N, 1],
        {"c": draw(1), "s": ints(HUGE)}), "too large"),
    "tile": (one("Tile", [N, 2], ints(1, HUGE)), "at most"),
    "constant of shape": (lambda: make_model(
        [node("ConstantOfShape", "s", to="e"), node("Add", "x", "e")], [N, 1], {"s": ints(10**6, 10**6)}), "too large"),
    "range": (lambda: make_model(
        [
            node("Range", "a", "b", "c", to="r"), node("Gather", "x", "r", axis=1)], [N, 4],
        {"a": ints(0)[0], "b": ints(HUGE)[0], "c": ints(1)[0]}), "too large"),
    "resize": (one("Resize", [1, 1, 2, 2], None, np.array([1, 1, 1e6, 1e6], np.float32), opset=13), "at most"),
    "upsample": (one("Upsample", [1, 1, 2, 2], np.array([1, 1, 1e30, 1], np.float32), opset=9), "resizes by"),
    "pad": (one("Pad", [N, 2], ints(0, HUGE, 0, HUGE)), "at most"),
    "max pool, large window": (one("MaxPool", [N, 1, 8, 8], kernel_shape=[10**9, 10**9], pads=[10**9] * 4), "at most"),
    "max pool, window above the input": (
        one("MaxPool", [N, 1, 8, 8], kernel_shape=[10**9, 1]), "larger than its input"),
    "average pool, large window": (
        one("AveragePool", [N, 1, 8, 8], kernel_shape=[10**9, 10**9], pads=[10**9] * 4), "at most"),
    "convolution, large pads": (one("Conv", [N, 1, 4, 4], draw(1, 1, 1, 1), pads=[10**9] * 4), "at most"),
    "transposed convolution, large steps": (
        one("ConvTranspose", [N, 1, 4, 4], draw(1, 1, 1, 1), strides=[10**8, 10**8]), "at most"),
    "doubling": (lambda: doubled(40), "Concat to v.*at most"),
    "squaring": (lambda: make_model(
        [node("Reshape", "x", "s", to="c"), node("MatMul", "c", "x")], [1, 10**4],
        {"s": ints(10**4, 1)}, 17), "at most"),
    "gather": (one("Gather", [N, 2**20], np.zeros((2**8), np.int64), axis=0), "along the batch"),
    "gather rows": (one("Gather", [1, 2**20], np.zeros((2**8), np.int64), axis=0), "at most"),
    "loop": (loop, "node around is a Loop"),
    "branch": (branch, "Greater to c .*known for constants only"),
    "cyclic": (cyclic, "not valid"),
    "foreign": (foreign, r"com\.microsoft\.FusedGelu"),
    "sorting": (lambda: make_model(
        [helper.make_node("TopK", ["x", "k"], ["y", "i"], name="best")], [N, 4], {"k": ints(2)}), "best is a TopK"),
    "places of maxima": (lambda: make_model(
        [helper.make_node("MaxPool", ["x"], ["m", "i"], kernel_shape=[2, 2]), helper.make_node(
            "Cast", ["i"], ["f"], to=1), node("Add", "m", "f")], [N, 1, 4, 4], {}), "second output"),
    "branch on a constant": (lambda: branch(constant=True), "node either is a If"),
    "computed condition": (lambda: make_model(
        [node("Greater", "x", "z", to="c"), node("Where", "c", "x", "z")], [N, 4],
        {"z": scalar(0)}), "known for constants only"),
    "rounding to integers": (lambda: make_model(
        [helper.make_node("Cast", ["x"], ["i"], to=7), helper.make_node("Cast", ["i"], ["y"], to=1)], [N, 4], {}),
        "casts to INT64"),
    "sum over the batch": (one("ReduceSum", [N, 3], ints(0)), "mixes the batch"),
    "softmax over the batch": (one("Softmax", [N, 3], axis=0), "mixes the batch"),
    "joined along the batch": (one("Concat", [N, 3], draw(1, 3), axis=0), "mixes the batch"),
    "batch and tokens joined": (one("Reshape", [N, 3, 4], ints(-1, 4)), "mixes the batch"),
    "product with the batch inside": (lambda: make_model(
        [node("Transpose", "x", perm=[1, 0], to="t"), node("MatMul", "t", "w")], [N, 3],
        {"w": draw(5, 2)}), "do not fit"),
    "padding only": (one("MaxPool", [N, 1, 2, 2], kernel_shape=[1, 1], pads=[1, 1, 1, 1]), "nothing but padding"),
    "minus infinity elsewhere": (lambda: make_model(
        [node("Add", "x", "c", to="m"), node("Relu", "m")], [N, 3],
        {"c": np.array([0, -np.inf, 1])}), "only a Softmax"),
    "minus infinity as output": (one("Add", [N, 3], np.array([0, -np.inf, 1])), "only a Softmax"),
    "not a number": (one("PRelu", [N, 3], np.array([1, np.nan, 0], np.float32)), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_at_once(name: str) -> None:
    make, message = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(onnx_file.NetworkFileError, match=message):
            onnx_file.read(make())
        assert tracemalloc.get_traced_memory()[1] < 2**31
    finally:
        tracemalloc.stop()
