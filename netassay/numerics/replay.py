"""A network's own file, run by onnxruntime: the judge that shares no line with the bounds and the attacks.

One session a file and process, of one thread; inputs go through it one by one, so that an answer cannot depend on the
others asked together (some 35 microseconds a run of a small network).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from netassay import networks
from netassay.heavy import np, onnxruntime
from netassay.method import InvalidInput

if TYPE_CHECKING:
    import numpy

#: Sessions kept in memory, as many as `networks` keeps graphs.
_KEPT = 32


def outputs(reference: str, x: numpy.ndarray) -> numpy.ndarray:
    """The outputs, flattened, float32 or float64 as in the file, for one input x of any shape of the right size.

    Raises InvalidInput where onnxruntime cannot load or run the file.
    """
    session = load(reference)
    given = session.get_inputs()[0]
    # Axes without a fixed length are the batch (`onnx_file` refuses others): one example.
    shape = [axis if isinstance(axis, int) else 1 for axis in given.shape]
    kind = np.float64 if given.type == "tensor(double)" else np.float32
    try:
        return session.run(None, {given.name: np.asarray(x, kind).reshape(shape)})[0].ravel()
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise _unusable(error) from error


def load(reference: str) -> Any:
    """The session of a network. Raises InvalidInput where onnxruntime cannot load the file, MissingArtifact."""
    return _load(networks.resolve(reference))


@functools.lru_cache(maxsize=_KEPT)
def _load(reference: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(networks.content(reference), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> InvalidInput:
    return InvalidInput(
        "onnxruntime cannot run the network's file",
        str(error).partition("\n")[0],
        "onnx.checker.check_model on the file, or a newer onnxruntime",
    )
