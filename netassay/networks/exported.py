"""A `torch.export` program as an ONNX file, which is what everything else here reads.

The program is converted where it was made. A saved one (`.pt2`) is a zip archive that may hold pickles, so no file of
that kind is ever opened here: load it where it is trusted, then convert it.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.method import InvalidInput, NotApplicable
from netassay.networks import onnx_file

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The oldest operator set that PyTorch's exporter writes by itself, so that nothing is converted afterwards.
OPSET = 18


def to_onnx(program: ExportedProgram) -> bytes:
    """The ONNX file of a program, checked to be a valid model; that it loads as a graph is for `onnx_file.check`.

    Raises NotApplicable where the package onnxscript, which PyTorch's exporter needs, is not installed, and
    InvalidInput where the exporter cannot express the program in ONNX.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise NotApplicable(
            "a torch.export program cannot be converted here",
            "PyTorch's exporter needs the package onnxscript, which is not installed; try: pip install onnxscript",
        )
    try:
        converted = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:  # torch.onnx.errors.OnnxExporterError, or whatever stopped it
        raise InvalidInput(
            "the program cannot be written as an ONNX file",
            str(error).strip().partition("\n")[0],
            "torch.onnx.export(..., report=True) where the program was made",
        ) from error
    assert converted is not None
    data: bytes = converted.model_proto.SerializeToString(deterministic=True)
    onnx_file.model(data)
    return data
