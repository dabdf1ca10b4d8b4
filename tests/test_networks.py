"""Networks: ONNX in and out, evaluation, recipes, references.

The peers are onnxruntime (float32) and ONNX's own reference evaluator, run on a copy of the model in float64, where
agreement has to be to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import RNG, assert_agrees, draw, exported, make_model, node

from netassay import networks
from netassay.method import InvalidInput
from netassay.networks import evaluate, onnx_file, recipes, training
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape, Scale
from netassay.store import artifacts

BENCHMARKS = Path(__file__).resolve().parents[1] / ".." / "shared" / "benchmarks"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[artifacts.Artifacts]:
    with artifacts.using(tmp_path / "artifacts") as kept:
        yield kept


# -- Making models -----------------------------------------------------------------------------------------------------


def gemm_net(opset: int, listed: bool = False) -> bytes:
    nodes = [
        node("Flatten", "x", to="f"),
        node("Gemm", "f", "w1", "b1", to="a", transB=1, alpha=0.5, beta=2.0),
        node("Relu", "a", to="r"),
        node("Gemm", "r", "w2", "b2", to="y"),
    ]
    constants = {"w1": draw(7, 12), "b1": draw(7), "w2": draw(7, 3), "b2": draw(1, 3)}
    return make_model(nodes, [1, 1, 3, 4], constants, opset, listed=listed)


def conv_net(opset: int, **of: Any) -> bytes:
    nodes = [node("Conv", "x", "k", "b", to="c", **of), node("Relu", "c", to="r"), node("Flatten", "r", to="y")]
    groups = of.get("group", 1)
    kernel = of.get("kernel_shape", [3, 3])
    return make_model(nodes, ["batch", 4, 9, 8], {"k": draw(6, 4 // groups, *kernel), "b": draw(6)}, opset)


def normalised_net(opset: int, after: str) -> bytes:
    before, size = ([node("Conv", "x", "k", to="c")], 5) if after == "Conv" else ([], 3)
    if after == "Relu":
        before = [node("Relu", "x", to="c")]
    nodes = [*before, node("BatchNormalization", "c", "s", "o", "m", "v", to="y", epsilon=1e-3)]
    constants = {"s": draw(size), "o": draw(size), "m": draw(size), "v": np.abs(draw(size)) + 0.1}
    if after == "Conv":
        constants["k"] = draw(5, 3, 2, 2)
    return make_model(nodes, ["n", 3, 5, 5], constants, opset)


def viewed_net(opset: int) -> bytes:
    """`x.view(x.size(0), -1)` as exporters write it: the batch size is taken from the shape."""
    unsqueeze = [node("Unsqueeze", "g", to="u", axes=[0])] if opset < 13 else [node("Unsqueeze", "g", "zeros", to="u")]
    nodes = [
        node("Shape", "x", to="s"),
        node("Gather", "s", "zero", to="g", axis=0),
        *unsqueeze,
        node("Concat", "u", "rest", to="t", axis=0),
        node("Reshape", "x", "t", to="v"),
        node("MatMul", "v", "w", to="y"),
    ]
    constants = {"zero": np.int64(0), "rest": np.array([-1]), "w": draw(12, 3)}
    if opset >= 13:
        constants["zeros"] = np.array([0])
    return make_model(nodes, ["n", 3, 2, 2], constants, opset)


def chain(*parts: tuple[str, Any, bool], shape: list[int | str | None]) -> bytes:
    """Elementwise operators in a row: (operator, constant, whether the constant is the first operand)."""
    nodes, constants, last = [], {}, "x"
    for place, (kind, constant, first) in enumerate(parts):
        name, target = f"c{place}", "y" if place == len(parts) - 1 else f"v{place}"
        constants[name] = constant
        nodes.append(node(kind, *((name, last) if first else (last, name)), to=target))
        last = target
    return make_model(nodes, shape, constants)


def squeezed_net(opset: int) -> bytes:
    old = opset < 13
    nodes = [
        node("Squeeze", "x", to="a", axes=[2]) if old else node("Squeeze", "x", "two", to="a"),
        node("Transpose", "a", to="t", perm=[0, 2, 1]),
        node("Unsqueeze", "t", to="u", axes=[1]) if old else node("Unsqueeze", "t", "one", to="u"),
        node("MatMul", "u", "w", to="y"),
    ]
    axes = {} if old else {"one": np.array([1]), "two": np.array([2])}
    return make_model(nodes, ["n", 1, 1, 6], {"w": draw(1, 4), **axes}, opset)


def constant_node_net() -> bytes:
    def held(name: str, array: Any) -> Any:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))

    nodes = [
        held("w", draw(6, 4)),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        held("shape", np.array([0, -1])),
        node("Reshape", "x", "shape", to="f"),
        node("Transpose", "w", to="wt", perm=[1, 0]),
        node("Gemm", "f", "wt", to="g", transB=1),
        node("Identity", "g", to="i"),
        node("Dropout", "i", "half", to="d"),
        node("Mul", "d", "half", to="y"),
    ]
    return make_model(nodes, [1, 6, 1], {})


def column_net() -> bytes:
    nodes = [node("MatMul", "w", "x", to="a"), node("Add", "a", "b", to="c"), node("Relu", "c", to="y")]
    return make_model(nodes, [5, 1], {"w": draw(3, 5), "b": draw(3, 1)})


def vector_net() -> bytes:
    """No batch axis at all, the weight on the left: as in the smallest networks of VNN-COMP."""
    nodes = [node("MatMul", "w", "x", to="a"), node("Add", "a", "b", to="y")]
    return make_model(nodes, [2], {"w": draw(3, 2), "b": draw(3)}, 14)


def transposed_input_net() -> bytes:
    nodes = [node("Gemm", "x", "w", "b", to="y", transA=1)]
    return make_model(nodes, [4, 1], {"w": draw(4, 3), "b": draw(3)})


HAND_MADE: dict[str, Callable[[], bytes]] = {
    **{f"gemm, set {opset}": lambda opset=opset: gemm_net(opset) for opset in (8, 9, 11, 13, 17, 21)},
    "gemm, constants listed as inputs": lambda: gemm_net(8, listed=True),
    **{f"conv, set {opset}": lambda opset=opset: conv_net(opset) for opset in (8, 11, 13, 20)},
    "conv, strides and unequal pads": lambda: conv_net(13, strides=[2, 3], pads=[1, 0, 2, 1]),
    "conv, dilated": lambda: conv_net(13, dilations=[2, 1], pads=[1, 1, 1, 1]),
    "conv, two groups": lambda: conv_net(13, group=2, strides=[1, 2]),
    "conv, one group a channel pair": lambda: conv_net(13, group=2, kernel_shape=[1, 1]),
    "conv, same upper": lambda: conv_net(13, auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[4, 3]),
    "conv, same lower": lambda: conv_net(13, auto_pad="SAME_LOWER", strides=[2, 3], kernel_shape=[4, 2]),
    "conv, valid": lambda: conv_net(13, auto_pad="VALID", strides=[3, 2]),
    **{
        f"normalised {after}, set {opset}": lambda after=after, opset=opset: normalised_net(opset, after)
        for after in ("Conv", "Relu")
        for opset in (8, 9, 15)
    },
    **{f"view, set {opset}": lambda opset=opset: viewed_net(opset) for opset in (9, 11, 13)},
    **{f"squeeze, set {opset}": lambda opset=opset: squeezed_net(opset) for opset in (9, 13)},
    "constant nodes": constant_node_net,
    "column input": column_net,
    "vector input": vector_net,
    "transposed input": transposed_input_net,
    "elementwise": lambda: chain(
        ("Sub", draw(1, 3, 1, 1), False),
        ("Mul", draw(5), False),
        ("Sub", draw(1), True),
        ("Div", draw(3, 2, 1), False),
        ("Add", draw(2, 5), False),
        shape=["n", 3, 2, 5],
    ),
    "scalar constants": lambda: chain(("Mul", np.float32(2), False), ("Add", np.float32(-1), True), shape=[1, 4]),
    "product with a vector": lambda: make_model([node("MatMul", "x", "w")], ["n", 3, 4], {"w": draw(4)}),
    "batch of one dropped": lambda: make_model(
        [node("Reshape", "x", "t", to="v"), node("MatMul", "v", "w", to="y")],
        [1, 2, 3],
        {"t": np.array([-1]), "w": draw(6, 2)},
    ),
    "flatten at axis 0": lambda: make_model(
        [node("Flatten", "x", to="f", axis=0), node("Gemm", "f", "w", to="y")], [1, 2, 3], {"w": draw(6, 2)}
    ),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_file_and_its_graph_compute_the_same(name: str) -> None:
    # ONNX's reference evaluator normalises by the statistics of the batch in operator sets before 14.
    assert_agrees(HAND_MADE[name](), exactly="normalised" not in name or "set 15" in name)


@for_all(st.data())
@settings(max_examples=25, deadline=None)
def test_random_networks_and_their_graphs_compute_the_same(choose: st.DataObject) -> None:
    """Convolutions with whatever strides, pads, dilations, groups; then dense layers; written by torch.onnx.export."""
    at = choose.draw
    channels, height, width = at(st.integers(1, 4)), at(st.integers(3, 9)), at(st.integers(3, 9))
    layers: list[torch.nn.Module] = []
    size, inputs = (height, width), channels
    torch_seed = at(st.integers(0, 2**31))
    for _ in range(at(st.integers(0, 2))):
        kernel = tuple(at(st.integers(1, min(3, s))) for s in size)
        groups = at(st.sampled_from([g for g in (1, 2, 3, 4) if inputs % g == 0]))
        conv = torch.nn.Conv2d(
            inputs, groups * at(st.integers(1, 2)), kernel, stride=(at(st.integers(1, 2)), at(st.integers(1, 2))),
            padding=(at(st.integers(0, 2)), at(st.integers(0, 2))), groups=groups, bias=at(st.booleans()),
        )  # fmt: skip
        layers.append(conv)
        if at(st.booleans()):
            norm = torch.nn.BatchNorm2d(conv.out_channels)
            norm.running_mean = torch.linspace(-1, 1, conv.out_channels)
            norm.running_var = torch.linspace(0.5, 2, conv.out_channels)
            layers.append(norm)
        layers.append(torch.nn.ReLU())
        out = torch.nn.Sequential(*layers).eval()(torch.zeros(1, channels, height, width))
        size, inputs = (out.shape[2], out.shape[3]), out.shape[1]
    layers.append(torch.nn.Flatten())
    features = inputs * size[0] * size[1]
    for _ in range(at(st.integers(0, 2))):
        layers += [torch.nn.Linear(features, 6, bias=at(st.booleans())), torch.nn.ReLU()]
        features = 6
    layers.append(torch.nn.Linear(features, 3))
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed)
        for layer in layers:
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.reset_parameters()
    network = torch.nn.Sequential(*layers).eval()
    dynamic = {"x": {0: "batch"}} if at(st.booleans()) else None
    graph = assert_agrees(
        exported(network, (1, channels, height, width), at(st.sampled_from([9, 11, 13, 17])), dynamic)
    )
    x = torch.linspace(-1, 1, 5 * channels * height * width, dtype=torch.float64).reshape(5, channels, height, width)
    with torch.no_grad():  # the exporter folds normalisation into convolutions in float32
        y = network.double()(x)
    torch.testing.assert_close(evaluate.forward(graph, x), y, rtol=0, atol=1e-5 * max(1.0, float(y.abs().max())))


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the benchmark networks beside the checkout")
def test_every_benchmark_network_agrees_with_onnxruntime() -> None:
    files = sorted(BENCHMARKS.glob("*/*.onnx"))
    assert len(files) == 45 + 3 + 5
    for file in files:
        graph = assert_agrees(file.read_bytes(), exactly="mnist" not in file.name)
        written = onnx_file.write(graph, "again")
        assert onnx_file.write(onnx_file.read(written), "again") == written
        if file.parent.name == "acasxu":
            # Sub of a zero mean vanishes, Flatten drops ones, MatMul + Add is one operation.
            assert [type(op) for op in graph.operations] == [Reshape, *(Dense, Relu) * 6, Dense]
            assert (graph.input_shape, graph.output_shape) == ((1, 1, 5), (5,))
            assert training.parameters(graph) == 5 * 50 + 50 + 5 * (50 * 50 + 50) + 50 * 5 + 5


# -- What the reader makes of a file -----------------------------------------------------------------------------------


def test_products_and_sums_become_one_dense() -> None:
    graph = onnx_file.read(gemm_net(13))
    assert [type(op) for op in graph.operations] == [Reshape, Dense, Relu, Dense]
    first = graph.operations[1]
    assert isinstance(first, Dense)
    assert first.weight.dtype == np.float64
    assert first.weight.shape == (7, 12)


def test_normalisation_is_its_definition_step_by_step() -> None:
    after_conv, after_relu = (onnx_file.read(normalised_net(15, after)) for after in ("Conv", "Relu"))
    # The mean is the bias of a convolution that has none; the root, then gain and offset, are operations of their own.
    assert [type(op) for op in after_conv.operations] == [Conv, Scale, Scale]
    assert [type(op) for op in after_relu.operations] == [Relu, Scale, Scale, Scale]
    model = onnx.load_model_from_string(normalised_net(15, "Relu"))
    gain, offset, mean, variance = (numpy_helper.to_array(t).astype(float) for t in model.graph.initializer)
    centred, divided, gained = onnx_file.read(model.SerializeToString()).operations[1:]
    assert isinstance(centred, Scale)
    assert isinstance(divided, Scale)
    assert isinstance(gained, Scale)
    assert (centred.shift.ravel() == -mean).all()
    np.testing.assert_allclose(divided.scale.ravel(), (variance + np.float32(1e-3)) ** -0.5, rtol=1e-15)
    assert (gained.scale.ravel() == gain).all()
    assert (gained.shift.ravel() == offset).all()


def test_scale_broadcasts_against_the_values_shape() -> None:
    graph = onnx_file.read(HAND_MADE["elementwise"]())
    for scale in graph.operations:
        assert isinstance(scale, Scale)
        assert (
            np.broadcast_shapes(scale.scale.shape, scale.shift.shape, graph.input_shape)
            == graph.input_shape
            == (3, 2, 5)
        )


@for_all(st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_of_shifts_and_scales_rounds_in_float32_as_a_runtime_does_bit_for_bit(choose: st.DataObject) -> None:
    """Constants of very different sizes, so that sums cancel: nothing may be merged in higher precision."""
    parts = choose.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["Add", "Sub", "Mul"]),
                st.sampled_from([-4096, -64.25, -1, -0.3, 0, 0.1, 1, 3, 64, 1000, 2.0**20]).map(np.float32),
                st.booleans(),
            ),
            min_size=1,
            max_size=6,
        )
    )
    data = chain(*parts, shape=["n", 64])
    x = np.linspace(-3, 3, 64, dtype=np.float32)[None]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    ours = evaluate.forward(onnx_file.read(data), torch.tensor(x)).numpy()
    np.testing.assert_array_equal(ours, session.run(None, {"x": x})[0])


def shifted_net(size: float, after: bool) -> bytes:
    """A shift and its inverse, before or after a Gemm with a bias."""
    first, last = ("p", "y") if after else ("x", "d")
    shifts = [node("Add", first, "c", to="s"), node("Sub", "s", "c", to=last)]
    gemm = [node("Gemm", "x" if after else "d", "w", "b", to="p" if after else "y")]
    constants = {"w": draw(4, 3), "b": draw(3), "c": np.float32(size)}
    return make_model(gemm + shifts if after else shifts + gemm, ["n", 4], constants)


def cancelling_normalised_net(conv: bool) -> bytes:
    """Means far above the values, and offsets that cancel them: with one scale, the shift would be near 0."""
    mean = np.array([50, -200, 1000], np.float32)
    variance, gain = np.array([0.1, 3, 40], np.float32), np.array([1, 2, -0.7], np.float32)
    nodes = [node("Conv", "x", "k", "b", to="c")] if conv else []
    nodes.append(node("BatchNormalization", "c" if conv else "x", "g", "o", "m", "v"))
    normalisation = {"g": gain, "o": gain * mean / np.sqrt(variance), "m": mean, "v": variance}
    kernel = {"k": draw(3, 3, 2, 2), "b": draw(3)} if conv else {}
    return make_model(nodes, ["n", 3, 4, 4], normalisation | kernel, 15)


ROUNDED: dict[str, Callable[[], bytes]] = {
    **{
        f"shifted by {size}, {where}": lambda size=size, after=where == "after": shifted_net(size, after)
        for size in (16, 64, 1000)
        for where in ("before", "after")
    },
    "normalised": lambda: cancelling_normalised_net(conv=False),
    "normalised after a convolution": lambda: cancelling_normalised_net(conv=True),
    "gemm, alpha and beta": lambda: make_model(
        [node("Gemm", "x", "w", "b", alpha=1 / 3, beta=0.7)], ["n", 9], {"w": draw(9, 4), "b": draw(4)}
    ),
    "divided": lambda: chain(("Div", draw(6), False), ("Add", draw(6), False), shape=["n", 6]),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("optimised", [True, False])
def test_a_runtime_errs_by_no_more_than_the_operations_of_the_graph_round(name: str, optimised: bool) -> None:
    """|float32 - exact| <= e with e(W x + b) = |W| e(x) + (n + 2) u (|W| |x| + |b|), u = 2^-24, n terms in a sum."""
    data = ROUNDED[name]()
    graph = onnx_file.read(data)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(3).uniform(-1, 1, size=(500, *graph.input_shape)).astype(np.float32)
    exact, error = torch.tensor(x).double(), torch.zeros(x.shape, dtype=torch.float64)
    for op in graph.operations:
        if isinstance(op, Dense | Conv | Scale):
            first, second = evaluate.constants(op, torch.float64, torch.device("cpu"))
            terms = 1 if isinstance(op, Scale) else math.prod(op.weight.shape[1:])
            bound = {op: (first.abs(), second.abs())}
            moved = evaluate.apply(op, error, replaced={op: (first.abs(), torch.zeros_like(second))})
            error = moved + (terms + 2) * 2.0**-24 * 1.001 * evaluate.apply(op, exact.abs() + error, replaced=bound)
        exact = evaluate.apply(op, exact)
    found = torch.tensor(session.run(None, {"x": x})[0]).double()
    assert ((found - exact).abs() <= error).all()


def test_a_shift_is_a_bias_once_and_an_operation_the_second_time() -> None:
    nodes = [node("MatMul", "x", "w", to="a"), node("Add", "a", "b", to="c"), node("Sub", "c", "b", to="y")]
    bias = draw(3)
    dense, shift = onnx_file.read(make_model(nodes, ["n", 4], {"w": draw(4, 3), "b": bias})).operations
    assert isinstance(dense, Dense)
    assert isinstance(shift, Scale)
    assert (dense.bias == bias).all()
    assert (shift.shift == -bias).all()


def test_a_scale_after_a_product_is_not_multiplied_into_its_weights() -> None:
    nodes = [node("MatMul", "x", "w", to="a"), node("Mul", "a", "f", to="y")]
    weight = draw(4, 3)
    dense, scale = onnx_file.read(make_model(nodes, ["n", 4], {"w": weight, "f": draw(3)})).operations
    assert isinstance(dense, Dense)
    assert isinstance(scale, Scale)
    assert (dense.weight == weight.T).all()


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic_on_two_constants_is_done_in_float32_as_a_runtime_does(kind: str) -> None:
    left, right = draw(5), draw(5)
    nodes = [node(kind, "l", "r", to="c"), node("Add", "x", "c", to="y")]
    data = make_model(nodes, ["n", 5], {"l": left, "r": right})
    (shift,) = onnx_file.read(data).operations
    assert isinstance(shift, Scale)
    expected = {"Add": left + right, "Sub": left - right, "Mul": left * right, "Div": left / right}[kind]
    assert expected.dtype == np.float32
    assert (shift.shift == expected).all()
    assert_agrees(data, exactly=False)


@pytest.mark.parametrize("shape", [["n", 2, 4], [1, 4], [1, 1, 4]])
def test_a_weight_with_leading_axes_of_length_one_is_a_matrix(shape: list[int | str | None]) -> None:
    graph = assert_agrees(make_model([node("MatMul", "x", "w")], shape, {"w": draw(1, 4, 3)}))
    assert [op.weight.shape for op in graph.operations if isinstance(op, Dense)] == [(3, 4)]


def test_neutral_shifts_and_scales_leave_no_operation() -> None:
    graph = onnx_file.read(chain(("Sub", np.zeros((1, 1, 5)), False), ("Mul", np.ones(5), False), shape=[1, 1, 5]))
    assert graph.operations == ()
    assert graph.output == graph.input


def test_nodes_the_output_does_not_need_are_ignored() -> None:
    nodes = [node("Sin", "x", to="unused"), node("Relu", "x", to="y")]
    assert len(onnx_file.read(make_model(nodes, [1, 3], {})).operations) == 1


def test_float64_files_keep_their_precision() -> None:
    weight = np.array([[1.0 + 2.0**-40]])
    graph = helper.make_graph(
        [node("MatMul", "x", "w")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1, 1])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (dense,) = onnx_file.read(model.SerializeToString()).operations
    assert isinstance(dense, Dense)
    assert dense.weight[0, 0] == weight[0, 0]


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        (["batch", 2, 3], (2, 3)),
        ([None, 6], (6,)),
        ([1, 1, 1, 5], (1, 1, 5)),
        ([1, 784, 1], (784, 1)),
        ([4], (4,)),
        ([1], (1,)),
    ],
)
def test_the_batch_axis_is_the_open_one_or_a_leading_one(
    declared: list[int | str | None], shape: tuple[int, ...]
) -> None:
    assert onnx_file.read(make_model([node("Relu", "x")], declared, {})).input_shape == shape


# -- What it refuses ---------------------------------------------------------------------------------------------------


def test_a_pickled_model_is_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.write_text, (tmp_path / "ran", "code")

    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    for data in ((tmp_path / "model.pt").read_bytes(), pickle.dumps(Trap())):
        with pytest.raises(onnx_file.PickledModel, match=r"pickle can run code.*torch\.onnx\.export"):
            onnx_file.check(data, analysable=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 64, b"{}", gemm_net(13)[:-7], gemm_net(13)[:100]])
def test_what_is_no_onnx_file_is_refused(data: bytes) -> None:
    for analysable in (False, True):
        with pytest.raises(onnx_file.NotOnnx, match=r"not an ONNX file|not valid"):
            onnx_file.check(data, analysable)


@for_all(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_read_or_refused_but_never_crashes(place: int, byte: int) -> None:
    data = bytearray(_SMALL)
    data[place % len(data)] = byte
    try:
        graph = onnx_file.read(bytes(data))
    except onnx_file.NetworkFileError:
        return
    assert all(isinstance(op.shape, tuple) for op in graph.operations)


_SMALL = gemm_net(13)


def normalised_with(**constants: np.ndarray) -> bytes:
    given = {"s": np.ones(3), "o": np.zeros(3), "m": np.zeros(3), "v": np.ones(3)} | constants
    return make_model([node("BatchNormalization", "x", "s", "o", "m", "v")], ["n", 3], given, 15)


def sparse_net() -> bytes:
    model = onnx.load_model_from_string(make_model([node("MatMul", "x", "w")], [1, 2], {"w": draw(2, 2)}))
    del model.graph.initializer[:]
    values = numpy_helper.from_array(np.array([2.0], np.float32), "w")
    places = numpy_helper.from_array(np.array([1]), "w.places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2, 2]))
    data: bytes = model.SerializeToString()
    return data


REFUSED: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "operator": (
        lambda: make_model([node("Hardmax", "x")], [1, 2], {}),
        onnx_file.UnsupportedOperator,
        r"node Hardmax to y is a Hardmax.*Gemm.*Identity.*MatMul",
    ),
    "open axis": (
        lambda: make_model([node("Relu", "x")], ["n", 3, "h", "w"], {}),
        onnx_file.UnsupportedShape,
        "axis 2 of input 'x' has no fixed length",
    ),
    "batch fixed above one": (
        lambda: make_model([node("Gemm", "x", "w")], [32, 4], {"w": draw(4, 2)}),
        onnx_file.UnsupportedShape,
        "batch of that fixed size",
    ),
    "convolution of a fixed batch": (
        lambda: make_model([node("Conv", "x", "k")], [2, 1, 4, 4], {"k": draw(1, 1, 2, 2)}),
        onnx_file.UnsupportedOperator,
        "neither a symbolic batch",
    ),
    "moved batch": (
        lambda: make_model([node("Transpose", "x", perm=[1, 0, 2])], ["n", 3, 4], {}),
        onnx_file.UnsupportedShape,
        r"output 'y' has its batch as axis 1.*export with a batch of 1",
    ),
    "mixing examples": (
        lambda: make_model([node("Flatten", "x", axis=0)], ["n", 3], {}),
        onnx_file.UnsupportedOperator,
        "mixes the batch",
    ),
    "broadcast along the batch": (
        lambda: make_model([node("Add", "x", "c")], ["n", 3, 1], {"c": draw(2, 3, 5)}),
        onnx_file.UnsupportedOperator,
        "mixes the batch",
    ),
    "not a number": (
        lambda: make_model([node("Add", "x", "c")], [1, 3], {"c": np.array([1, np.nan, 2], np.float32)}),
        onnx_file.NetworkFileError,
        "holds NaN",
    ),
    "division by zero": (
        lambda: make_model([node("Div", "x", "c")], [1, 3], {"c": np.array([1, 0, 2], np.float32)}),
        onnx_file.UnsupportedOperator,
        "by zero",
    ),
    "division by next to nothing": (
        lambda: make_model([node("Div", "x", "c")], [1, 3], {"c": np.array([1, 1e-42, 2], np.float32)}),
        onnx_file.NetworkFileError,
        "the scale of node Div to y is NaN or beyond float32",
    ),
    "negative variance": (
        lambda: normalised_with(v=np.array([1, -0.5, 1], np.float32)),
        onnx_file.NetworkFileError,
        "node BatchNormalization to y is NaN or beyond float32",
    ),
    "gain times root beyond float32": (
        lambda: normalised_with(v=np.zeros(3, np.float32), s=np.full(3, 3e38, np.float32)),
        onnx_file.NetworkFileError,
        "node BatchNormalization to y is NaN or beyond float32",
    ),
    "alpha times weight beyond float32": (
        lambda: make_model([node("Gemm", "x", "w", alpha=1e20)], [1, 2], {"w": np.full((2, 2), 1e20, np.float32)}),
        onnx_file.NetworkFileError,
        "the weight of node Gemm to y is NaN or beyond float32",
    ),
    "bias beyond float32": (
        lambda: make_model(
            [node("Gemm", "x", "w", "b", beta=1e20)], [1, 2], {"w": draw(2, 2), "b": np.full(2, 1e20, np.float32)}
        ),
        onnx_file.NetworkFileError,
        "the bias of node Gemm to y is NaN or beyond float32",
    ),
    "constants that divide to infinity": (
        lambda: make_model(
            [node("Div", "a", "b", to="c"), node("Add", "x", "c")], [1, 1], {"a": np.float32(1), "b": np.float32(0)}
        ),
        onnx_file.NetworkFileError,
        "'c' of node Add to y holds NaN or infinity",
    ),
    "sparse weight": (
        sparse_net,
        onnx_file.UnsupportedOperator,
        "tensor 'w' is stored sparse",
    ),
    "old operator set": (
        lambda: make_model([node("Relu", "x")], [1, 3], {}, opset=7),
        onnx_file.NetworkFileError,
        "operator set 7.*version_converter",
    ),
    "half precision": (
        lambda: make_model([node("Relu", "x")], [1, 3], {}, dtype=TensorProto.FLOAT16),
        onnx_file.NetworkFileError,
        "FLOAT16",
    ),
    "constant output": (
        lambda: make_model([node("Relu", "c")], [1, 3], {"c": draw(3)}),
        onnx_file.NetworkFileError,
        "does not depend on the input",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_graph_is_refused_with_the_reason(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        onnx_file.check(make(), analysable=True)
    assert isinstance(caught.value, InvalidInput)
    assert isinstance(caught.value, ValueError)


def test_an_operator_no_rule_knows_is_a_valid_file_all_the_same() -> None:
    onnx_file.check(make_model([node("Hardmax", "x")], [1, 2], {}), analysable=False)


def test_two_inputs_are_refused() -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("a", "b")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(onnx_file.UnsupportedShape, match="2 inputs and 1 outputs"):
        onnx_file.read(model.SerializeToString())


def test_external_tensors_are_refused_as_bytes_and_folded_from_a_path(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(gemm_net(13))
    onnx.save(model, tmp_path / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0)
    with pytest.raises(onnx_file.NetworkFileError, match="in other files"):
        onnx_file.check((tmp_path / "n.onnx").read_bytes(), analysable=False)
    assert len(assert_agrees(onnx_file.from_file(tmp_path / "n.onnx")).operations) == 4
    (tmp_path / "n.data").unlink()
    with pytest.raises(onnx_file.NetworkFileError, match="cannot be folded"):
        onnx_file.from_file(tmp_path / "n.onnx")
    (tmp_path / "whole.onnx").write_bytes(gemm_net(13))
    assert onnx_file.from_file(tmp_path / "whole.onnx") == (tmp_path / "whole.onnx").read_bytes()


# -- Writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_written_graph_reads_back_and_is_written_the_same(name: str) -> None:
    graph = onnx_file.read(HAND_MADE[name]())
    data = onnx_file.write(graph, "written")
    again = assert_agrees(data)
    assert onnx_file.write(again, "written") == data
    assert (again.input_shape, again.output_shape) == (graph.input_shape, graph.output_shape)
    x = torch.linspace(-1, 1, 2 * math.prod(graph.input_shape), dtype=torch.float64).reshape(2, *graph.input_shape)
    one, other = evaluate.forward(graph, x), evaluate.forward(again, x)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * (1 + float(one.abs().max())))  # float32 constants


def test_a_written_network_takes_any_batch() -> None:
    graph = onnx_file.read(conv_net(13))
    session = onnxruntime.InferenceSession(onnx_file.write(graph, "n"), providers=["CPUExecutionProvider"])
    x = torch.tensor(draw(3, *graph.input_shape))
    (y,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, evaluate.forward(graph, x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_constant_beyond_float32_is_named_rather_than_written_as_infinity() -> None:
    dense = Dense("big", "x", "y", (1,), weight=np.array([[1e300]]), bias=np.zeros(1))
    with pytest.raises(OverflowError, match="weight of big"):
        onnx_file.write(Graph((dense,), "x", "y", (1,), (1,)), "n")


# -- Evaluating --------------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_on_a_network_counted_by_hand() -> None:
    hidden = Dense("h", "x", "h", (2,), weight=np.array([[1.0, -1.0], [2.0, 0.0]]), bias=np.array([0.0, -1.0]))
    relu = Relu("r", "h", "r", (2,))
    last = Dense("o", "r", "o", (1,), weight=np.array([[3.0, 1.0]]), bias=np.array([0.5]))
    graph = Graph((hidden, relu, last), "x", "o", (2,), (1,))
    # relu(1 - 2) = 0 and relu(2 - 1) = 1; then 3 * 0 + 1 + 0.5.  relu(3) = 3, relu(-1) = 0; then 9.5.
    x = torch.tensor([[1.0, 2.0], [0.0, -3.0]], dtype=torch.float64)
    assert evaluate.forward(graph, x).tolist() == [[1.5], [9.5]]
    assert evaluate.forward(graph, x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"reads \(n, 2\) but was given \(2, 3\)"):
        evaluate.forward(graph, torch.zeros(2, 3))


def test_evaluation_is_differentiable_in_the_input_and_in_replaced_constants() -> None:
    graph = onnx_file.read(conv_net(13, pads=[0, 1, 2, 0]))
    conv = graph.operations[0]
    assert isinstance(conv, Conv)
    x = torch.tensor(RNG.uniform(size=(2, *graph.input_shape)), requires_grad=True)
    weight, bias = (torch.tensor(a, requires_grad=True) for a in (conv.weight, conv.bias))
    torch.testing.assert_close(evaluate.forward(graph, x, {conv: (weight, bias)}), evaluate.forward(graph, x))
    grads = torch.autograd.grad(evaluate.forward(graph, x, {conv: (weight, bias)}).sum(), [x, weight, bias])
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (evaluate.forward(graph, x, {conv: (weight + move, bias)}).sum() for move in (step, -step))
    assert float(grads[1].sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)
    assert all(float(grad.abs().sum()) > 0 for grad in grads)


# -- Recipes -----------------------------------------------------------------------------------------------------------


def test_a_default_written_out_and_left_out_are_the_same_recipe() -> None:
    short = recipes.Recipe.parse({"dataset": "digits"})
    assert recipes.Recipe.parse(json.loads(short.text())) == short
    assert recipes.reference(recipes.Recipe.parse({})) == recipes.reference(short)
    assert recipes.Recipe.parse({"seed": 1}).text() != short.text()


def test_a_recipes_reference_is_the_digest_of_its_canonical_json(store: artifacts.Artifacts) -> None:
    recipe = recipes.Recipe.parse({"dataset": "iris", "training": {"kind": "ibp", "radius": 0.1}})
    reference = recipes.reference(recipe)
    assert reference == f"recipe:{hashlib.sha256(recipe.text().encode()).hexdigest()}"
    assert store.read(reference).decode() == recipe.text()
    assert recipes.from_reference(reference) == recipe


def test_left_out_numbers_follow_the_kind_of_training() -> None:
    standard, ibp = recipes.Recipe.parse({}), recipes.Recipe.parse({"training": {"kind": "ibp"}})
    assert (standard.epochs, ibp.epochs) == (40, 120)
    iris = recipes.Recipe.parse({"dataset": "iris"})
    assert training.steps(iris) == training.steps(standard) == 760
    assert recipes.Recipe.parse({"training": {"kind": "ibp"}, "epochs": 3}).epochs == 3


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"dataset": "mnist"}, r"recipe\.dataset: there is no dataset 'mnist'; try one of breast_cancer, digits"),
        ({"seed": -1}, r"recipe\.seed"),
        ({"epochs": 0}, r"recipe\.epochs"),
        ({"learning_rate": float("nan")}, r"recipe\.learning_rate"),
        ({"depth": 3}, r"recipe\.depth: Extra"),
        ({"architecture": {"hidden": [4]}}, r"recipe\.architecture: say its kind"),
        ({"architecture": {"kind": "rnn"}}, r"recipe\.architecture"),
        ({"dataset": "iris", "architecture": {"kind": "cnn"}}, r"recipe: a cnn reads images.*try kind: mlp"),
        ({"training": {"kind": "ibp", "warm_up": 0.7, "ramp": 0.7}}, r"recipe\.training\.ibp: warm_up \+ ramp"),
    ],
)
def test_a_wrong_recipe_is_told_which_field_is_wrong(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.Recipe.parse(mapping)


def test_all_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"recipe\.seed.*; recipe\.batch"):
        recipes.Recipe.parse({"seed": -1, "batch": 0})


# -- References --------------------------------------------------------------------------------------------------------


def test_a_kept_network_loads_by_reference_and_only_once() -> None:
    reference = networks.keep(gemm_net(13))
    assert networks.resolve(reference) == reference
    assert networks.load(reference) is networks.load(reference)
    with pytest.raises(artifacts.MissingArtifact):
        networks.load(f"onnx:{'0' * 64}")
    with pytest.raises(ValueError, match="is not a network"):
        networks.load(f"array:{'0' * 64}")


def test_a_recipe_stands_for_the_network_given_for_it_and_only_within_the_block() -> None:
    recipe = recipes.reference(recipes.Recipe.parse({"dataset": "iris", "epochs": 1}))
    other = networks.keep(gemm_net(13))
    with networks.given({recipe: other}):
        assert networks.resolve(recipe) == other
        with networks.given({}):
            assert networks.load(recipe) is networks.load(other)
    assert networks.resolve(recipe) != other


def test_a_recipe_nobody_trained_is_trained_here_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.reference(recipes.Recipe.parse({"dataset": "iris", "epochs": 1, "seed": 5}))
    trained = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda recipe: trained.append(recipe) or real(recipe))
    graph = networks.load(recipe)
    assert networks.load(recipe) is graph
    assert len(trained) == 1
    assert (graph.input_shape, graph.output_shape) == ((4,), (3,))


def test_recipes_and_references_need_no_torch() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['sklearn'] = sys.modules['onnxruntime'] = None\n"
        "import tempfile, pathlib\n"
        "import netassay.methods.networks.train, netassay.methods.networks.describe\n"
        "from netassay import networks\n"
        "from netassay.networks import onnx_file, recipes\n"
        "from netassay.store import artifacts\n"
        "with artifacts.using(pathlib.Path(tempfile.mkdtemp())):\n"
        "    print(recipes.from_reference(recipes.reference(recipes.Recipe.parse({'dataset': 'digits'}))).epochs > 0)\n"
        "onnx_file.check(sys.stdin.buffer.read(), analysable=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=gemm_net(13), capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, b"True"), done.stderr.decode()
