"""Does a graph compute what a runtime makes of the same file? A check of the reader by onnxruntime, on random inputs.

    max over samples of  max_i |f_i(x) - r_i(x)| / max(max_i |r_i(x)|, h(x) / 100)

f is the graph evaluated in float64, r onnxruntime on the file, for one example at a time, and h the largest value on
the way, at whose size float32 rounds: outputs in which large values cancel may rightly differ by some 1e-7 of it. Half
of the samples are uniform in [0, 1], half standard normal. A right graph leaves what float32 rounds, some 1e-6; a wrong
one far more. It is evidence, not a bound: `netassay.numerics.bounds.rounding` says what rounding can change at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from netassay.heavy import np, onnxruntime, torch
from netassay.method import InvalidInput
from netassay.networks import evaluate

if TYPE_CHECKING:
    from netassay.networks.graph import Graph

#: Above this difference a graph is not the network of its file: a hundred times what float32 rounds in deep networks.
LARGEST_DIFFERENCE = 1e-4


def agrees(graph: Graph, data: bytes, samples: int = 4) -> float:
    """The largest difference between a graph and onnxruntime on its file, relative to the largest output.

    A sample for which neither is finite (the logarithm of a negative number) says nothing; NaN where all are such, and
    infinity where only one of the two is finite. Compare with `not agrees(...) <= LARGEST_DIFFERENCE`. Raises
    InvalidInput where onnxruntime cannot load or run the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    pairs: list[tuple[Any, Any]] = []
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        shape = [axis if isinstance(axis, int) and axis > 0 else 1 for axis in given.shape]
        kind = np.float64 if given.type == "tensor(double)" else np.float32
        random = np.random.default_rng(0)
        for sample in range(samples):
            x = (random.random(shape) if sample % 2 else random.standard_normal(shape)).astype(kind)
            pairs.append((x, session.run(None, {given.name: x})[0]))
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise InvalidInput(
            "onnxruntime cannot run the network's file",
            str(error).partition("\n")[0],
            "onnx.checker.check_model on the file, or a newer onnxruntime",
        ) from error
    found = [_difference(graph, x, peer) for x, peer in pairs]
    known = [difference for difference in found if not math.isnan(difference)]
    return max(known) if known else math.nan


def _difference(graph: Graph, x: Any, peer: Any) -> float:
    """Of one example; NaN where neither is finite."""
    with torch.no_grad():
        values = evaluate.values(graph, torch.from_numpy(x).double().reshape(1, *graph.input_shape))
    ours = values[graph.output].numpy().ravel()
    on_the_way = max(float(value.abs().amax()) for value in values.values())
    peer = peer.astype(float).ravel()
    if ours.shape != peer.shape:
        return math.inf
    finite = np.isfinite(ours), np.isfinite(peer)
    if not finite[0].all() and not finite[1].all():
        return math.nan
    if not finite[0].all() or not finite[1].all():
        return math.inf
    largest = max(float(np.abs(peer).max()), on_the_way / 100 if math.isfinite(on_the_way) else 0.0)
    difference = float(np.abs(ours - peer).max())
    return difference / largest if largest else (math.inf if difference else 0.0)
