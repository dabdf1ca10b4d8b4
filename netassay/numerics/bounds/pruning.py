"""A smaller network that computes the same over a box: without neurons that are off everywhere in it.

Where u <= 0 bounds a ReLU's input from above over a box, its output is 0 there and so is all that it adds to what
follows. A dense layer before the ReLU loses that row, and the dense layers after it that column. Over the box both
networks are one function, exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from netassay.heavy import np
from netassay.networks.graph import Dense, Graph, Operation, Relu
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.backward import Block
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Region

if TYPE_CHECKING:
    from torch import Tensor


def pruned(graph: Graph, values: Mapping[str, Interval]) -> tuple[Graph, dict[str, Tensor]]:
    """The network without the neurons that are off over the one box of `values`, and which are kept: (neurons,), bool,
    by the names of the values that lost some. Only ReLUs between dense layers, on values of one axis, are looked at.
    """
    readers: defaultdict[str, list[Operation]] = defaultdict(list)
    writers = {operation.target: operation for operation in graph.needed}
    for operation in graph.needed:
        for source in operation.sources:
            readers[source].append(operation)
    kept: dict[str, Tensor] = {}
    for relu in graph.needed:
        if not isinstance(relu, Relu) or len(relu.shape) != 1 or graph.output in (relu.source, relu.target):
            continue
        before, after = writers.get(relu.source), readers[relu.target]
        alone = len(readers[relu.source]) == 1 and isinstance(before, Dense)
        alive = values[relu.source].upper[0] > 0
        if alone and all(isinstance(operation, Dense) for operation in after) and bool(alive.any()):
            kept[relu.source] = kept[relu.target] = alive
    smaller = []
    for operation in graph.needed:
        rows = kept[operation.target].numpy() if operation.target in kept else None
        columns = kept[operation.source].numpy() if operation.source in kept else None
        if isinstance(operation, Dense):
            weight, bias = np.asarray(operation.weight), np.asarray(operation.bias)
            if columns is not None:
                weight = weight[:, columns]
            if rows is not None:
                weight, bias = weight[rows], bias[rows]
            operation = replace(operation, weight=weight, bias=bias, shape=(*operation.shape[:-1], len(bias)))
        elif rows is not None:
            operation = replace(operation, shape=(int(rows.sum()),))
        smaller.append(operation)
    return Graph(tuple(smaller), graph.input, graph.output, graph.input_shape, graph.output_shape), kept


def smaller(graph: Graph, region: Region, block: Block) -> tuple[Graph, Block]:
    """The pruned network, and what is known of one box as known of the network that is left."""
    less, kept = pruned(graph, block.values)
    values = {
        name: Interval(box.lower[:, kept[name]], box.upper[:, kept[name]]) if name in kept else box
        for name, box in block.values.items()
    }
    whole = interval.propagate(less, region)
    lines = {op.target: line for op in less.needed if (line := backward.relaxation(op, values, whole)) is not None}
    lost = rounding.backward(less, whole)
    return less, Block(values, lines, {}, lost, block.delicate)
