"""Every operator the reader knows, held to onnxruntime on the same file: attributes, operator sets, batch axes.

The graph is evaluated in float64; onnxruntime computes in float32, so they agree to 1e-5 of the largest output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import draw, make_model, node

from netassay.networks import evaluate, onnx_file
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
    assert onnx_file.inner(tuple(found[0].shape)) == graph.output_shape or graph.output_shape == ()
    peer = np.stack(found).reshape(ours.shape)
    assert np.isfinite(peer).all()
    atol = tolerance * np.abs(peer).max()
    np.testing.assert_allclose(ours.numpy(), peer, rtol=0, atol=atol)
    one_by_one = torch.cat([evaluate.forward(graph, one[None]) for one in x])
    torch.testing.assert_close(ours, one_by_one, rtol=1e-12, atol=1e-12)
    again = evaluate.forward(onnx_file.read(onnx_file.write(graph, "written")), x)
    np.testing.assert_allclose(again.numpy(), ours.numpy(), rtol=0, atol=atol)
    return graph


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
