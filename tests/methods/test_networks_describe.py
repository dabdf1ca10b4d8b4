"""networks.describe on networks whose layers, parameters and FLOPs are counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netassay import networks
from netassay.job import Record
from netassay.method import InvalidInput, NumericalError
from netassay.methods.networks import describe
from netassay.networks import onnx_file, recipes
from netassay.networks.graph import Conv, Graph, Relu
from netassay.store import artifacts, storable


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[artifacts.Artifacts]:
    with artifacts.using(tmp_path / "artifacts") as kept:
        yield kept


def model(nodes: list[Any], shape: list[Any], constants: dict[str, Any], out: list[Any], opset: int = 13) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("made.up", 1)]
    data: bytes = helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString()
    return data


def node(kind: str, *inputs: str, to: str = "y", **of: Any) -> Any:
    return helper.make_node(kind, list(inputs), [to], name=to, **of)


def described(data: bytes, **params: Any) -> describe.Result:
    return describe.run(describe.Params(network=networks.keep(data), **params))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_dense_network_counted_by_hand() -> None:
    nodes = [
        node("Flatten", "x", to="f"),
        node("Gemm", "f", "w", "b", to="g", transB=1),
        node("Relu", "g", to="r"),
        node("MatMul", "r", "m", to="p"),
        node("Add", "p", "c"),
    ]
    constants = {"w": ones(5, 6), "b": ones(5), "m": ones(5, 2), "c": ones(2)}
    result = described(model(nodes, ["batch", 2, 3], constants, ["batch", 2]))
    rows = [(row.name, row.operator, row.shape, row.parameters, row.macs, row.flops) for row in result.layers]
    assert rows == [
        ("f", "Flatten", [1, 6], 0, 0, 0),
        ("g", "Gemm", [1, 5], 35, 30, 60),
        ("r", "Relu", [1, 5], 0, 0, 5),
        ("p", "MatMul", [1, 2], 10, 10, 20),
        ("y", "Add", [1, 2], 2, 0, 2),
    ]
    assert (result.parameters, result.macs, result.flops, result.unknown) == (47, 40, 87, 0)
    assert (result.operator_set, result.input_shape, result.output_shape) == (13, [None, 2, 3], [1, 2])


def test_a_convolutional_network_counted_by_hand() -> None:
    nodes = [
        node("Conv", "x", "k", "b", to="c", group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c", "s", "o", "m", "v", to="n"),
        node("MaxPool", "n", to="p", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", "p"),
    ]
    constants = {"k": ones(6, 2, 3, 3), "b": ones(6), "s": ones(6), "o": ones(6), "m": ones(6), "v": ones(6)}
    result = described(model(nodes, [1, 4, 8, 8], constants, [1, 6, 1, 1]))
    # 6 x 4 x 4 outputs, each a sum of 2 x 3 x 3 products.
    assert [(row.macs, row.flops) for row in result.layers] == [
        (96 * 18, 2 * 96 * 18), (0, 2 * 96), (0, 4 * 6 * 2 * 2), (0, 24),
    ]  # fmt: skip
    assert [row.parameters for row in result.layers] == [6 * 18 + 6, 12, 0, 0]
    assert (result.statistics, result.parameters) == (12, 6 * 18 + 6 + 12)


def test_an_operator_without_a_known_price_counts_as_unknown_and_not_as_nothing() -> None:
    nodes = [
        node("Relu", "x", to="r"),
        node("Softmax", "r", to="s"),
        helper.make_node("Odd", ["s"], ["y"], domain="made.up"),
    ]
    result = described(model(nodes, [1, 3], {}, [1, 3]))
    assert [(row.operator, row.flops) for row in result.layers] == [
        ("Relu", 3),
        ("Softmax", None),
        ("made.up.Odd", None),
    ]
    assert (result.flops, result.unknown) == (3, 2)


def test_a_layer_whose_shape_depends_on_data_is_unknown() -> None:
    nodes = [node("NonZero", "x", to="z"), helper.make_node("Cast", ["z"], ["c"], name="c", to=TensorProto.FLOAT)]
    nodes.append(node("Neg", "c"))
    result = described(model(nodes, [1, 3], {}, [2, None]))
    assert [row.flops for row in result.layers] == [None, 0, None]
    assert result.layers[-1].shape is None
    assert result.output_shape is None


def test_a_shared_weight_is_counted_once_and_integers_are_no_parameters() -> None:
    nodes = [
        node("MatMul", "x", "w", to="a"),
        node("MatMul", "a", "w", to="b"),
        node("Reshape", "b", "t"),
    ]
    result = described(model(nodes, [1, 3], {"w": ones(3, 3), "t": np.array([-1, 3, 1])}, [1, 3, 1]))
    assert result.parameters == 9
    assert result.output_shape == [1, 3, 1]
    assert len(result.spectra) == 2


def test_weights_in_constant_nodes_count_too() -> None:
    held = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(ones(3, 2)))
    result = described(model([held, node("MatMul", "x", "w")], [1, 3], {}, [1, 2]))
    assert [(row.operator, row.parameters, row.macs) for row in result.layers] == [("MatMul", 6, 6)]
    assert result.spectra[0].singular_values == pytest.approx([6**0.5, 0.0], abs=1e-12)


def test_numbers_in_attributes_of_constant_nodes_count_too() -> None:
    nodes = [
        helper.make_node("Constant", [], ["f"], value_floats=[1.0, 2.0, 3.0]),
        helper.make_node("Constant", [], ["h"], value_float=0.5),
        helper.make_node("Constant", [], ["t"], value_ints=[-1, 3]),
        node("Mul", "x", "f", to="a"),
        node("Add", "a", "h", to="b"),
        node("Reshape", "b", "t"),
    ]
    result = described(model(nodes, [1, 3], {}, [1, 3]))
    assert [row.parameters for row in result.layers] == [3, 1, 0]


@pytest.mark.parametrize("batch", [1, 4, "open"])
def test_costs_are_those_of_one_example_whatever_the_batch_of_the_file(batch: Any) -> None:
    nodes = [
        node("Gemm", "x", "w", "b", to="g"),
        node("Relu", "g", to="r"),
        node("Transpose", "r", to="t", perm=[1, 0]),
        node("Neg", "t", to="n"),
        node("Transpose", "n", perm=[1, 0]),
    ]
    result = described(model(nodes, [batch, 3], {"w": ones(3, 5), "b": ones(5)}, [batch, 5]))
    assert [(row.macs, row.flops) for row in result.layers] == [(15, 30), (0, 5), (0, 0), (0, 5), (0, 0)]
    assert [row.shape for row in result.layers[:2]] == [[1, 5], [1, 5]]
    assert (result.macs, result.flops, result.parameters, result.unknown) == (15, 40, 20, 0)
    assert result.output_shape == [1, 5]
    assert result.input_shape == [None if batch == "open" else batch, 3]


def test_what_does_not_work_on_each_example_of_a_fixed_batch_is_unknown() -> None:
    nodes = [node("Neg", "c", to="m"), node("Add", "x", "m")]
    result = described(model(nodes, [4, 3], {"c": ones(3)}, [4, 3]))
    assert [row.flops for row in result.layers] == [None, 3]
    assert result.unknown == 1


def test_a_sparse_tensor_is_refused_by_name() -> None:
    dense = onnx.load_model_from_string(model([node("MatMul", "x", "w")], [1, 2], {"w": ones(2, 2)}, [1, 2]))
    values, places = ones(1), np.array([1])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(values, "w"), numpy_helper.from_array(places, "w.places"), [2, 2]
    )
    del dense.graph.initializer[:]
    dense.graph.sparse_initializer.append(sparse)
    with pytest.raises(InvalidInput, match="'w' is stored sparse"):
        described(dense.SerializeToString())
    held = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    with pytest.raises(InvalidInput, match="'w' is stored sparse"):
        described(model([held, node("MatMul", "x", "w")], [1, 2], {}, [1, 2]))


def test_singular_values_are_those_the_weight_was_made_of() -> None:
    values = np.array([5.0, 2.0, 0.25])
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (4, 18))
    weight = ((left * values) @ right.T).astype(np.float32)
    data = model([node("Conv", "x", "k")], [1, 2, 5, 5], {"k": weight.reshape(4, 2, 3, 3)}, [1, 4, 3, 3])
    (spectrum,) = described(data).spectra
    assert spectrum.shape == (4, 18)
    np.testing.assert_allclose(spectrum.singular_values, [*values, 0.0], atol=1e-6)
    assert described(data, spectra=False).spectra == []


def test_a_weight_with_nan_has_no_spectrum() -> None:
    data = model([node("MatMul", "x", "w")], [1, 2], {"w": np.array([[1.0, np.nan]] * 2, np.float32)}, [1, 2])
    with pytest.raises(NumericalError, match="'w' holds NaN"):
        described(data)
    assert described(data, spectra=False).parameters == 4


def test_counts_agree_with_the_graph_of_the_same_file() -> None:
    rng = np.random.default_rng(1)
    conv = Conv(
        "c", "x", "c", (3, 4, 5), weight=rng.normal(size=(3, 2, 3, 3)), bias=np.zeros(3), stride=(2, 1),
        padding=(1, 1, 1, 1), dilation=(1, 1), groups=1,
    )  # fmt: skip
    graph = Graph((conv, Relu("r", "c", "r", (3, 4, 5))), "x", "r", (2, 8, 5), (3, 4, 5))
    result = described(onnx_file.write(graph, "n"))
    assert result.parameters == conv.weight.size + conv.bias.size
    assert result.macs == 3 * 4 * 5 * conv.weight[0].size
    assert result.layers[-1].shape == [1, 3, 4, 5]
    assert result.unknown == 0


def test_a_recipe_is_described_as_the_network_it_stands_for() -> None:
    mapping = {"dataset": "iris", "architecture": {"kind": "mlp", "hidden": [7]}, "epochs": 1}
    reference = recipes.reference(recipes.Recipe.parse(mapping))
    result = describe.run(describe.Params(network=reference))
    assert result.parameters == 4 * 7 + 7 + 7 * 3 + 3
    assert [tuple(s.shape) for s in result.spectra] == [(7, 4), (3, 7)]
    again = describe.run(describe.Params(network=networks.resolve(reference)))
    assert storable.dump(result.model_dump()) == storable.dump(again.model_dump())


def test_the_stored_result_draws_bars_of_parameters_and_lines_of_spectra() -> None:
    data = model([node("Relu", "x", to="r"), node("MatMul", "r", "w")], [1, 3], {"w": ones(3, 2)}, [1, 2])
    result = described(data)
    stored = storable.load(storable.dump(result.model_dump()))
    reference = networks.keep(data)
    record = Record(
        1, "k", "networks.describe", 1, {"network": reference}, "done", stored, names={reference: "small.onnx"}
    )
    parameters, spectra = describe.plot([record]).panels
    assert (parameters.marks[0].label, parameters.marks[0].x, parameters.marks[0].y) == (
        "small.onnx",
        ["1 MatMul"],
        [6],
    )
    assert spectra.marks[0].y == pytest.approx([6**0.5, 0.0], abs=1e-12)


def test_describing_does_not_change_the_model_it_reads() -> None:
    proto = onnx.load_model_from_string(model([node("Relu", "x")], ["n", 3], {}, ["n", 3]))
    before = proto.SerializeToString()
    describe._Facts(proto)
    assert proto.SerializeToString() == before
