"""How much of a box is lost when it is propagated layer by layer: the local tightness of interval bounds.

At an input x the network is linear with Jacobian J = W_L D_(L-1) W_(L-1) ... D_1 W_1, D_l the ReLUs that are on at x.
Over a small box of radius r around x, output i has the half-width r |J| 1, and interval propagation finds r B 1:

    tau_i = (|J| 1)_i / (B 1)_i,      B = |W_L| D_(L-1) |W_(L-1)| ... D_1 |W_1|,      0 <= tau_i <= 1

since |J| <= B entry by entry. tau_i = 1 where no sum cancels, and where both half-widths are 0 (the output is constant
near x). tau does not depend on biases beyond D, nor on the scale of any layer.

Two linear layers have tau = 1 if and only if for every (i, j) all nonzero products W2_ik W1_kj have one sign.

Gaussian weights. Let W_1 .. W_L be independent with entries N(0, s_l^2), d_1 .. d_(L-1) the hidden widths, no ReLU. For
a fixed vector v, |W v| is s |v| times a chi variable of as many degrees of freedom as W has rows, so

    E |J_ij| / E B_ij = product over l < L of g(d_l),     g(d) = sqrt(pi / 2) E[chi_d] / d
                                                               = sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2)),

exactly, for any widths; g(d) -> sqrt(pi / (2 d)). With ReLUs, at an x drawn independently of the weights, each unit is
on with probability 1/2, and E[chi_d] / d becomes E[chi_n] / (d / 2) with n binomial. That D depends on the weights
through x is neglected: it moves the direction along x only, one of as many as there are inputs.

Reference: Mao, Mueller, Fischer, Vechev. Understanding certified training with interval bound propagation. 2024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.evaluate import values
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu
from netassay.numerics.bounds.linear import MAPS, Weights, chain, weights

if TYPE_CHECKING:
    from torch import Tensor

#: Numbers in one array of a block: 32 MiB in float64.
_NUMBERS = 1 << 22
#: A pair of layers is looked at as matrices up to this many numbers in one of them (128 MiB in float64) ...
_LARGEST = 1 << 24
#: ... and this many multiply-adds of their product: some seconds of one core.
_PRODUCTS = 1 << 34


# --- closed forms -----------------------------------------------------------------------------------------------------


def _chi(degrees: int) -> float:
    """E[chi_n], the mean length of n standard normals."""
    return 0.0 if degrees == 0 else math.sqrt(2) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))


def _neck(width: int, relu: bool) -> float:
    """g(d), or what it becomes where each of the d units is on with probability 1/2."""
    if not relu:
        return math.sqrt(math.pi / 2) * _chi(width) / width
    log_half, of_all = width * math.log(0.5), math.lgamma(width + 1)
    terms = (
        math.exp(of_all - math.lgamma(n + 1) - math.lgamma(width - n + 1) + log_half) * _chi(n)
        for n in range(width + 1)
    )
    return math.sqrt(math.pi / 2) * math.fsum(terms) / (width / 2)


def gaussian_ratio(hidden: Sequence[int], relu: bool = False) -> float:
    """E |J_ij| / E B_ij of Gaussian layers with these hidden widths; 1 for one layer."""
    return math.prod(_neck(width, relu) for width in hidden)


def asymptotic_ratio(width: int, depth: int, relu: bool = False) -> float:
    """(pi / (2 d))^((L - 1) / 2) for L layers of width d; with ReLUs, half of the units count."""
    return (math.pi / (2 * (width / 2 if relu else width))) ** ((depth - 1) / 2)


# --- draws ------------------------------------------------------------------------------------------------------------


def gaussian(widths: Sequence[int], samples: int, seed: int, relu: bool = False) -> tuple[Tensor, Tensor]:
    """Half-widths |J| 1 and B 1 of the outputs of networks with weights from N(0, 1): each (samples, outputs), float64.

    widths: inputs, hidden, outputs. relu: between the layers, at an input from N(0, 1) of each network's own. Networks
    are drawn one after the other, so fewer samples are the beginning of more.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = []
    for _ in range(samples):
        x = torch.randn(widths[0], generator=generator, dtype=torch.float64)
        layers = [
            torch.randn(out, n, generator=generator, dtype=torch.float64) for n, out in itertools.pairwise(widths)
        ]
        # Backward: few outputs make few rows.
        masks = [torch.ones(width, dtype=torch.float64) for width in widths[1:-1]]
        if relu:
            for place, layer in enumerate(layers[:-1]):
                x = torch.relu(layer @ x)
                masks[place] = (x > 0).double()
        exact, box = layers[-1], layers[-1].abs()
        for layer, mask in zip(reversed(layers[:-1]), reversed(masks), strict=True):
            exact, box = (exact * mask) @ layer, (box * mask) @ layer.abs()
        ends.append((exact.abs().sum(1), box.sum(1)))
    exact, box = (torch.stack(column) for column in zip(*ends, strict=True))
    return exact, box


def quotient(exact: Tensor, box: Tensor) -> Tensor:
    """tau = exact / box; 1 where both are 0. Cut at 1, which rounding may exceed."""
    return torch.where(box > 0, exact / torch.where(box > 0, box, 1.0), 1.0).clamp(max=1.0)


# --- of a network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Local:
    """tau: (n, outputs), of the whole network. constant: (n, outputs), bool, outputs that are constant near x.

    layers: names of the layers with weights, first to last. onward: (n, layers), tau of the part from that layer to the
    outputs, mean over outputs; the first is the whole network's, the last is 1.
    """

    tau: Tensor
    constant: Tensor
    layers: tuple[str, ...]
    onward: Tensor


def local(graph: Graph, x: Tensor) -> Local:
    """Local tightness at each of the inputs: x of shape (n, *input), float64.

    Cost: two backward passes of all outputs an input. Raises NotImplementedError naming an operation that is neither
    linear nor a ReLU.
    """
    with torch.no_grad():
        widest = max(math.prod(graph.shape_of(op.target)) for op in chain(graph))
        rows = math.prod(graph.output_shape) * max(widest, math.prod(graph.input_shape))
        size = max(1, _NUMBERS // rows)
        parts = [_local(graph, x[first : first + size]) for first in range(0, len(x), size)]
    return Local(
        torch.cat([part.tau for part in parts]),
        torch.cat([part.constant for part in parts]),
        parts[0].layers,
        torch.cat([part.onward for part in parts]),
    )


def _local(graph: Graph, x: Tensor) -> Local:
    at, of_graph = values(graph, x), weights(graph, x.dtype)
    outputs = math.prod(graph.output_shape)
    exact = torch.eye(outputs, dtype=x.dtype).reshape(1, outputs, *graph.output_shape)
    exact = exact.expand(len(x), *exact.shape[1:])
    box, layers, onward = exact, [], []
    for operation in reversed(chain(graph)):
        if isinstance(operation, Relu):
            on = (at[operation.source] > 0)[:, None]
            exact, box = exact * on, box * on
            continue
        w, shape = of_graph[operation.target], graph.shape_of(operation.source)
        exact = _back(operation, w.weight, exact, shape)
        box = _back(operation, w.absolute, box, shape)
        if isinstance(operation, Dense | Conv):
            layers.append(operation.name)
            onward.append(quotient(*_half_widths(exact, box)).mean(1))
    exact, box = _half_widths(exact, box)
    tightness = torch.stack(onward[::-1], 1) if onward else x.new_ones(len(x), 0)
    return Local(quotient(exact, box), box == 0, tuple(reversed(layers)), tightness)


def _half_widths(exact: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    return exact.abs().flatten(2).sum(2), box.flatten(2).sum(2)


def _back(operation: Operation, weight: Tensor | None, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = MAPS[type(operation)].adjoint(operation, weight, a.flatten(0, 1), shape)
    return found.reshape(*a.shape[:2], *shape)


# --- of its weights alone ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two consecutive layers as matrices W2 and W1, ReLUs between them taken for the identity.

    signs: share of (i, j) for which all nonzero W2_ik W1_kj have one sign (or there are none): 1 is tau = 1.
    majority: share of all nonzero products that have the commoner sign of their (i, j); 1/2 is the least.
    tau: mean over i of (|W2 W1| 1)_i / (|W2| |W1| 1)_i.
    """

    first: str
    second: str
    signs: float
    majority: float
    tau: float


def pairs(graph: Graph) -> list[Pair | None]:
    """Each two consecutive layers with weights; None where they are too large to be looked at as matrices.

    A reshape or an elementwise scale belongs to the layer before it (before the first layer, to that one).
    """
    layers = list(_layers(graph))
    of_graph = weights(graph, torch.float64)
    found: list[Pair | None] = []
    with torch.no_grad():
        for first, second in itertools.pairwise(layers):
            ends = first[0].source, second[0].source, second[-1].target
            sizes = [math.prod(graph.shape_of(value)) for value in ends]
            if max(sizes[0] * sizes[1], sizes[1] * sizes[2]) > _LARGEST or math.prod(sizes) > _PRODUCTS:
                found.append(None)
                continue
            w1, w2 = (_matrix(graph, layer, of_graph) for layer in (first, second))
            found.append(_pair(_name(first), _name(second), w1, w2))
    return found


def _layers(graph: Graph) -> Iterator[list[Operation]]:
    """The linear operations that make up each layer."""
    layer: list[Operation] = []
    for operation in chain(graph):
        if isinstance(operation, Relu):
            continue
        if isinstance(operation, Dense | Conv) and any(isinstance(one, Dense | Conv) for one in layer):
            yield layer
            layer = []
        layer.append(operation)
    if layer:
        yield layer


def _name(layer: Sequence[Operation]) -> str:
    return next((one.name for one in layer if isinstance(one, Dense | Conv)), layer[0].name)


def _matrix(graph: Graph, layer: Sequence[Operation], of_graph: dict[str, Weights]) -> Tensor:
    """(outputs, inputs) of the layer, without its bias."""
    shape = graph.shape_of(layer[0].source)
    x = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    for operation in layer:
        x = MAPS[type(operation)].apply(operation, of_graph[operation.target].weight, None, x)
    return x.flatten(1).T


def _pair(first: str, second: str, w1: Tensor, w2: Tensor) -> Pair:
    # Counts of products of either sign: whole numbers, exact in float32 up to 2^24 products.
    positive: Callable[[Tensor], Tensor] = lambda w: (w > 0).float()  # noqa: E731
    plus = positive(w2) @ positive(w1) + positive(-w2) @ positive(-w1)
    minus = positive(w2) @ positive(-w1) + positive(-w2) @ positive(w1)
    signs = (torch.minimum(plus, minus) == 0).double().mean()
    products = float((plus + minus).double().sum())
    majority = float(torch.maximum(plus, minus).double().sum()) / products if products else 1.0
    tau = quotient((w2 @ w1).abs().sum(1), (w2.abs() @ w1.abs()).sum(1)).mean()
    return Pair(first, second, float(signs), majority, float(tau))
