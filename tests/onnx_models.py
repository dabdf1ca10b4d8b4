"""Small ONNX files for tests, and the peers of their graphs: onnxruntime (float32), ONNX's reference evaluator."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from netassay.networks import evaluate, onnx_file
from netassay.networks.graph import Graph


def make_model(
    nodes: list[Any],
    input_shape: list[int | str | None],
    constants: dict[str, Any],
    opset: int = 13,
    output: str = "y",
    listed: bool = False,
    dtype: int = TensorProto.FLOAT,
) -> bytes:
    """An ONNX file; `listed`: initializers also stand among the inputs, as before IR 4."""
    initializers = [
        numpy_helper.from_array(
            np.asarray(a, np.asarray(a).dtype if np.asarray(a).dtype.kind == "i" else np.float32), n
        )
        for n, a in constants.items()
    ]
    inputs = [helper.make_tensor_value_info("x", dtype, input_shape)]
    if listed:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info(output, dtype, None)], initializers)
    ir = 3 if listed else 8
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    # A valid file declares the shape of its output; ONNX finds it.
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    model.graph.output[0].CopyFrom(inferred.graph.output[0])
    if not model.graph.output[0].type.tensor_type.HasField("shape"):
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, dtype, [None, None]))
    data: bytes = model.SerializeToString()
    return data


def node(kind: str, *inputs: str, to: str = "y", **of: Any) -> Any:
    return helper.make_node(kind, list(inputs), [to], name=f"{kind} to {to}", **of)


def in_float64(data: bytes) -> Any:
    """The same model with every float32 of it turned into float64."""
    model = onnx.load_model_from_string(data)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for each in graph.node:
        for attribute in each.attribute:
            if attribute.name == "value_float":
                value = numpy_helper.from_array(np.float64(attribute.f))
                attribute.CopyFrom(helper.make_attribute("value", value))
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float64)))
    for info in (*graph.input, *graph.output):
        info.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def assert_agrees(data: bytes, exactly: bool = True) -> Graph:
    """The graph read from a file computes what the peers compute from the file.

    onnxruntime rounds to float32 at every node, so it is held to 1e-5 of the largest output over some inputs;
    `exactly` also holds the float64 peer, to rounding.
    """
    graph = onnx_file.read(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    shape = [size if isinstance(size, int) and size > 0 else 1 for size in entry.shape]
    inputs = np.random.default_rng(0).uniform(-0.5, 0.5, size=(12, *shape)).astype(np.float32)
    ours = evaluate.forward(graph, torch.tensor(inputs).reshape(12, *graph.input_shape).double()).numpy()
    assert ours.shape == (12, *graph.output_shape)
    peer = np.stack([session.run(None, {entry.name: x})[0] for x in inputs]).reshape(ours.shape)
    np.testing.assert_allclose(ours, peer, rtol=0, atol=1e-5 * np.abs(peer).max())
    if exactly:
        evaluator = ReferenceEvaluator(in_float64(data))
        exact = np.stack([evaluator.run(None, {entry.name: x.astype(float)})[0] for x in inputs[:3]])
        np.testing.assert_allclose(
            ours[:3], exact.reshape(ours[:3].shape), rtol=1e-12, atol=1e-12 * np.abs(exact).max()
        )
    return graph


RNG = np.random.default_rng(7)


def draw(*shape: int) -> np.ndarray:
    """float32, so that a file holds exactly these numbers."""
    return RNG.normal(size=shape).astype(np.float32)


def exported(network: torch.nn.Module, shape: tuple[int, ...], opset: int, dynamic: Any = None) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package announces its retirement
        torch.onnx.export(
            network,
            (torch.zeros(shape),),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_axes=dynamic,
        )
    return file.getvalue()
