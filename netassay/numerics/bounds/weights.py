"""Networks whose weights are perturbed: the same graph with the weights of dense layers among its inputs.

    y = W x + b,   |W_ij - W0_ij| <= r      becomes      y_i = sum_j W_ij x_j + b_i,

a product of two values of the graph, W a part of the input and x whatever the layer reads, and a sum of its terms. All
interpreters of graphs then bound, attack and evaluate it as they do any other: boxes multiply ends, linear bounds put
McCormick's planes in the place of each product, which are exact where x is known, i.e. for a first layer at a fixed
input: its output is affine in W. Later layers are bilinear.

Cost: a layer of n x m weights makes values of n m numbers in each pass.

Reference: Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin, Hsieh. Automatic perturbation analysis for scalable
certified robustness and beyond. 2020. (Section 3.2, perturbed weights.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netassay.heavy import np, torch
from netassay.networks.graph import Dense, Graph, Operation, Pick, Product, Reshape, Scale
from netassay.numerics.bounds.regions import Box

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Perturbed:
    """graph: of one flat input, first the network's own input, then the weights of `layers`, each in row-major order.
    All values of the network keep their names.
    """

    graph: Graph
    layers: tuple[Dense, ...]

    def region(self, x: Tensor, radius: Tensor) -> Box:
        """The inputs x, (batch, *input), with weights as far as `radius`, (batch,), from their own: (batch, inputs)."""
        flat = [torch.from_numpy(np.array(layer.weight, dtype=np.float64)).flatten() for layer in self.layers]
        weights = torch.cat(flat).to(x.dtype).expand(len(x), -1)
        infinity = torch.tensor(torch.inf, dtype=x.dtype)
        spread = radius[:, None]
        # At radius zero the difference is exact, and the box is the point.
        low = torch.where(spread > 0, torch.nextafter(weights - spread, -infinity), weights)
        high = torch.where(spread > 0, torch.nextafter(weights + spread, infinity), weights)
        return Box(torch.cat([x.flatten(1), low], dim=1), torch.cat([x.flatten(1), high], dim=1))


def dense_layers(graph: Graph) -> tuple[Dense, ...]:
    """The dense layers that the output depends on, in their order."""
    return tuple(operation for operation in graph.needed if isinstance(operation, Dense))


def perturbed(graph: Graph, layers: Sequence[Dense]) -> Perturbed:
    """The graph with the weights of these layers among its inputs. Biases stay constants."""
    whole = _free("input and weights", graph)
    size = math.prod(graph.input_shape)
    operations: list[Operation] = [
        Pick("input", whole, graph.input, graph.input_shape, np.arange(size).reshape(graph.input_shape))
    ]
    used: list[Dense] = []
    for operation in graph.operations:
        if isinstance(operation, Dense) and operation in layers:
            operations += _as_products(operation, whole, size, graph)
            used.append(operation)
            size += operation.weight.size
        else:
            operations.append(operation)
    made = replace(graph, operations=tuple(operations), input=whole, input_shape=(size,))
    return Perturbed(made, tuple(used))


def _as_products(layer: Dense, whole: str, start: int, graph: Graph) -> list[Operation]:
    """One layer, its weights from place `start` of the input on."""
    ahead, (out, fan_in) = layer.shape[:-1], layer.weight.shape
    shape = (*ahead, out, fan_in)
    taken = np.arange(start, start + layer.weight.size).reshape(out, fan_in)
    read = np.arange(math.prod(ahead) * fan_in).reshape(*ahead, 1, fan_in)
    weight, value, product, total, flat = (
        _free(f"{part} of {layer.target}", graph) for part in ("weights", "inputs", "products", "sums", "flat sums")
    )
    return [
        Pick(weight, whole, weight, shape, np.array(np.broadcast_to(taken, shape))),
        Pick(value, layer.source, value, shape, np.array(np.broadcast_to(read, shape))),
        Product(product, weight, product, shape, value),
        Dense(total, product, total, (*ahead, out, 1), np.ones((1, fan_in)), np.zeros(1)),
        Reshape(flat, total, flat, layer.shape),
        Scale(layer.name, flat, layer.target, layer.shape, np.ones(out), layer.bias),
    ]


def _free(name: str, graph: Graph) -> str:
    """A name that no value of the graph has."""
    names = {graph.input} | {operation.target for operation in graph.operations}
    while name in names:
        name += "'"
    return name
