"""Activation splitting: cases of what single neurons do, until linear bounds refute each or one shows a way out.

    unsafe in B  <=  an x in B and a conjunction of B with  c_k.f(x) <= b_k  for all its constraints k

A part of the box is {x in B : z_j(x) >= 0 or <= 0 for the neurons j split so far}, z_j the input of a ReLU. On it the
split ReLUs are linear, and for any value v of the network and any beta >= 0

    min over part of  v   >=   min over B of  v - sum_j beta_j s_j z_j,      s_j = +1 or -1,  s_j z_j >= 0 on the part,

which a backward pass (`netassay.numerics.bounds.backward`) bounds from below. v is, of each part,

1. every neuron that is unstable there, and its negative, layer by layer, so that what is split bears on the relaxation
   of all that follows;
2. sum_k w_k (c_k.f - b_k), w >= 0, of every conjunction that is open there: it is refuted where this bound is above 0.

In both, the slopes alpha of the other ReLUs, of each row its own, beta and w climb by a few steps of Adam; they start
where those of the part's parent ended. All conjunctions share one tree: the bounds of hidden values, which are nearly
all of the work, hold for each. On mnistfc's 256x4 with property 0 and 0.03 nine parts settle all nine conjunctions;
with the hidden bounds of the whole box 14,000 parts bring the worst of them from -0.78 to -0.40.

Parts with the least bounds are taken first. The neuron to split is the best of `CANDIDATES`: half of them are those
whose relaxation costs the bound of a conjunction most (|A-| t for its upper line, A+ times the largest gap above its
lower one), half those at whose upper lines the bound falls fastest when what it costs in the hidden bounds is counted
too: the derivative of one pass through all layers. Of each candidate both halves are bounded by one such pass, without
optimisation, and the smaller bound decides (filtered smart branching, through the hidden values).

The points where linear bounds are least, and a few steps of sign-gradient descent from them, are tried as
counterexamples. Neurons that are off in the whole box are taken out first (`pruning`).

A part in which every neuron is split is left open where `LAST_STEPS` of Adam do not refute it: its bound is the value
of a linear program, which Adam only comes near.

Cost: 2 rows of each unstable neuron go through `STEPS` backward passes and their gradients a part. Where that is more
than `PRODUCTS`, the layers that do not fit keep the bounds of the part's parent. Measured on one core: a part of
mnistfc's 256x4 takes 0.02 to 0.08 s, of 256x6 0.1 to 0.5 s; of a residual network of four convolutions on 3x32x32
(5,183 ReLUs, 472 of them unstable) 3.4 s, in a process of 0.8 GiB.

Rounding: Adam works in float32. What it ends with is computed once more in float64, and `rounding` is taken off, that
of every z_j that beta multiplies included. A refuted part is refuted in real arithmetic.

Reference: Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter. Beta-CROWN: efficient bound propagation with per-neuron split
constraints for neural network robustness verification. 2021.
Reference: De Palma, Bunel, Desmaison, Dvijotham, Kohli, Torr, Kumar. Improved branch and bound for neural network
verification via Lagrangian decomposition. 2021. (Filtered smart branching.)
Reference: Henriksen, Lomuscio. DEEPSPLIT: an efficient splitting method for neural network verification via indirect
effect analysis. 2021. (Choosing neurons by what they do to the bounds of those after them.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Conv, ConvTranspose, Dense, Graph, Relu
from netassay.numerics.bounds import backward, optimised, pruning, rounding
from netassay.numerics.bounds.backward import Block, Lines, Relaxation
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, operations
from netassay.numerics.bounds.regions import Box
from netassay.numerics.branch_and_bound.inputs import TOGETHER, Answer, Query

if TYPE_CHECKING:
    from torch import Tensor

#: Adam: steps for the whole box, for a part, and for one in which nothing is left to split; rates of slopes and of
#: multipliers.
FIRST_STEPS, STEPS, LAST_STEPS, RATE, MULTIPLIERS = 20, 10, 100, 0.1, 0.05
#: Rates in a part where nothing is left to split are so much larger at first, and smaller in the end.
BOLDNESS = 20.0
#: Products that the bounds of a part's hidden values may cost, and those of the whole box; about 20 ns each thousand.
PRODUCTS, FIRST_PRODUCTS = 1e11, 1e12
#: Rows of hidden values that are bounded together, of as many parts as they come from, and the most parts.
ROWS, BATCH = 2048, 256
#: Numbers that one tensor of a batch may hold: 16 MiB in float32.
NUMBERS = 2**22
#: Slopes that open parts may keep for the hidden values of their halves, one byte each; parts beyond start afresh.
KEPT = 2**29
#: Neurons whose halves are bounded before one is chosen.
CANDIDATES = 6
#: What the score of a neuron makes of the gap above its lower line, against the one below its upper line; and what the
#: choice makes of the larger bound of two halves, against the smaller.
GAP, LARGER = 0.5, 0.3
#: Points of a batch that are handed to the judge; those that a descent starts at, and its steps.
_JUDGED, _DESCENTS, _DESCENT = 4, 16, 20
#: Slopes are kept in bytes.
_BYTE = 255


class _Problem:
    """What all parts of a box share. Neurons are those that ReLUs read, numbered through; a place is a ReLU's number.

    ends: of each place, where its neurons end. reach: products of one row's pass from there to the input.
    """

    def __init__(self, graph: Graph, query: Query, block: Block) -> None:
        self.graph, self.query = graph, query
        self.relus = [operation for operation in operations(graph) if isinstance(operation, Relu)]
        self.sizes = [math.prod(operation.shape) for operation in self.relus]
        self.ends = [sum(self.sizes[: place + 1]) for place in range(len(self.sizes))]
        self.neurons = sum(self.sizes)
        self.widest = max(
            math.prod(graph.input_shape), *(math.prod(operation.shape) for operation in operations(graph))
        )
        # What stands for other operations holds on the whole box.
        relus = {relu.target for relu in self.relus}
        others = {target: line for target, line in block.lines.items() if target not in relus}
        self.others = {dtype: optimised.in_dtype(others, dtype) for dtype in (torch.float32, torch.float64)}
        shape = (1, *graph.input_shape)
        box = Box(query.lower.reshape(shape), query.upper.reshape(shape))
        self.box = box
        short = _image(graph, box)
        #: What is walked in each precision, and the region that it ends at.
        self.graphs = {torch.float32: graph if short is None else short[0], torch.float64: graph}
        self.region = {
            torch.float32: optimised.region_in(box, torch.float32) if short is None else short[1],
            torch.float64: box,
        }
        count, most = int(query.owners.max()) + 1, int(torch.bincount(query.owners).max())
        # Rows of each conjunction, its first again where it has fewer: (conjunctions, rows).
        places = [(query.owners == number).nonzero()[:, 0] for number in range(count)]
        self.places = torch.stack([torch.cat([p, p[:1].expand(most - len(p))]) for p in places])
        self.reach = reach(graph)
        self.lost = self.flat([block.rounding[relu.source] for relu in self.relus])
        self.lost_output = block.rounding[graph.output].flatten()
        self.largest_output = block.values[graph.output].magnitude().flatten()

    def start(self, place: int) -> int:
        return self.ends[place] - self.sizes[place]

    @staticmethod
    def flat(parts: Sequence[Tensor]) -> Tensor:
        """Tensors of one box, one a ReLU, as one: (neurons,)."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(part[0].flatten() for part in parts)])

    def shaped(self, flat: Tensor) -> dict[str, Tensor]:
        """(..., neurons of the first places) as one tensor a ReLU, of its shape, by target."""
        count = next(k for k in range(len(self.sizes) + 1) if ([0, *self.ends])[k] == flat.shape[-1])
        parts = flat.split(self.sizes[:count], -1) if count else ()
        return {relu.target: part.unflatten(-1, relu.shape) for part, relu in zip(parts, self.relus, strict=False)}

    def added(self, split: Tensor, coefficients: Tensor, count: int) -> dict[str, Tensor]:
        """Coefficients of some of the first `count` neurons, (parts, rows, these), by the values they belong to."""
        flat = coefficients.new_zeros(*coefficients.shape[:2], count).index_add(2, split, coefficients)
        found: dict[str, Tensor] = {}
        shaped = self.shaped(flat)
        for relu in self.relus:
            if (part := shaped.get(relu.target)) is not None:
                found[relu.source] = found[relu.source] + part if relu.source in found else part
        return found

    def lines(self, low: Tensor, up: Tensor) -> dict[str, Relaxation]:
        """Lines of parts by the bounds of their neurons, (parts, neurons) each; exact where these are stable."""
        lower, upper = self.shaped(low), self.shaped(up)
        return {**self.others[low.dtype], **{name: Lines.of(Interval(lower[name], upper[name])) for name in lower}}

    def rows(self, conjunction: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k w_k c_k, (parts, conjunctions, outputs), and sum_k w_k b_k, (parts, conjunctions).

        weights: (parts, conjunctions, constraints).
        """
        of = self.places[conjunction]
        c, b = self.query.rows.to(weights.dtype)[of], self.query.bound.to(weights.dtype)[of]
        return (weights[..., None] * c).sum(2), (weights * b).sum(2)

    def rows_lost(self, conjunction: Tensor, weights: Tensor) -> Tensor:
        """What rounding may add to a bound of these rows less their b: (parts, conjunctions)."""
        of = self.places[conjunction]
        size = (weights[..., None] * self.query.rows[of].abs()).sum(2)
        # The sums over k are rounded themselves, in proportion to what they add up.
        added = size @ self.largest_output + (weights * self.query.bound[of].abs()).sum(2)
        return 2 * size @ self.lost_output + 4 * rounding.gamma(weights.shape[2] + 8, torch.float64) * added


@dataclass(frozen=True, eq=False)
class _Image:
    """A linear image centre + half z, |z| <= 1, of a box, in float32. centre: (values,); half: (values, inputs)."""

    centre: Tensor
    half: Tensor

    def minimum(self, a: Tensor) -> Tensor:
        """Of a.v over the image. The vertex is taken as given: nothing as wide as the input is differentiated."""
        with torch.no_grad():
            vertex = self.centre - (a @ self.half).sign_() @ self.half.T
        return (a * vertex).sum(-1)


#: Numbers of a linear image: 32 MiB.
IMAGE = 2**23


def _image(graph: Graph, box: Box) -> tuple[Graph, _Image] | None:
    """The network behind the linear maps that it begins with, and what these make of the box; None where they are too
    large, or none.
    """
    steps = operations(graph)
    count = 0
    while (
        count < len(steps)
        and type(steps[count]) in MAPS
        and (steps[count].source == (steps[count - 1].target if count else graph.input))
    ):
        count += 1
    if not count or count == len(steps):
        return None
    at, shape = steps[count - 1].target, steps[count - 1].shape
    behind = {source for operation in steps[count:] for source in operation.sources}
    size = math.prod(shape)
    if behind & {graph.input, *(operation.target for operation in steps[: count - 1])}:
        return None
    if size * box.centre.numel() > IMAGE:
        return None
    eye = torch.eye(size, dtype=torch.float64)[None].unflatten(2, shape)
    row = backward.walk(graph, eye, at, {})
    lower, upper = (side.flatten() for side in box.box())
    centre, radius = lower / 2 + upper / 2, upper / 2 - lower / 2
    a, free = row.a[0].flatten(1), radius > 0
    image = _Image((a @ centre + row.d[0]).to(torch.float32), (a * radius)[:, free].to(torch.float32))
    return Graph(steps[count:], at, graph.output, shape, graph.output_shape), image


def reach(graph: Graph) -> list[int]:
    """Of each ReLU, the products of one row's backward pass from what it reads to the input, parallel branches all."""
    found, products = [], 0
    for operation in operations(graph):
        match operation:
            case Relu():
                found.append(products)
            case Dense():
                products += operation.weight.size * math.prod(operation.shape[:-1])
            case Conv():
                products += operation.weight.size * math.prod(operation.shape[1:])
            case ConvTranspose():
                products += operation.weight.size * math.prod(graph.shape_of(operation.source)[1:])
    return found


@dataclass(eq=False)
class _Node:
    """A part of the box.

    low, up: (neurons,), float64, bounds on the part. state: (neurons,), int8: +1 and -1 where split, else 0.
    open: (conjunctions,), those that are open, by number. bound: theirs, float64. slopes: (conjunctions, neurons), in
    bytes, beta: (conjunctions, split neurons), weights: (conjunctions, constraints): what gave these bounds. warm: what
    the bounds of hidden values were computed with, by place: their neurons' numbers in the layer, and slopes in bytes,
    (2, these neurons, neurons of the places before). empty: nothing is left of the part.
    """

    low: Tensor
    up: Tensor
    state: Tensor
    open: Tensor
    bound: Tensor
    slopes: Tensor
    beta: Tensor
    weights: Tensor
    warm: dict[int, tuple[Tensor, Tensor]]
    depth: int = 0
    empty: bool = False

    @property
    def least(self) -> float:
        return float(self.bound.amin())

    @property
    def rows(self) -> int:
        """How many rows the bounds of its hidden values took."""
        return sum(2 * len(neurons) for neurons, _ in self.warm.values())

    @property
    def kept(self) -> int:
        return sum(slopes.numel() for _, slopes in self.warm.values())

    def half(self, neuron: int, side: int) -> _Node:
        low, up, state = self.low.clone(), self.up.clone(), self.state.clone()
        (low if side > 0 else up)[neuron] = 0.0
        state[neuron] = side
        before, after = self.beta.tensor_split([int((self.state[:neuron] != 0).sum())], dim=1)
        beta = torch.cat([before, torch.zeros(len(self.open), 1), after], 1)
        return replace(self, low=low, up=up, state=state, beta=beta, warm=dict(self.warm), depth=self.depth + 1)


def _stacked(nodes: Sequence[_Node]) -> tuple[Tensor, Tensor, Tensor]:
    """low, up, state: (nodes, neurons)."""
    low, up, state = (torch.stack([getattr(node, name) for node in nodes]) for name in ("low", "up", "state"))
    return low, up, state


def _bytes(slopes: Tensor) -> Tensor:
    return (slopes * _BYTE).round().to(torch.uint8)


def _floats(slopes: Tensor) -> Tensor:
    return slopes.to(torch.float32) / _BYTE


def _ascended(
    bound: Callable[..., Tensor], start: Sequence[Tensor], project: Callable[..., None], steps: int,
    boldness: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Slopes and multipliers of the best bound that Adam met for each row: (parts, rows, ...) each.

    bound: of these, (parts, rows). project: puts them back, in place, where they may be.
    boldness: by what the rates are larger at first; they then fall to one part in as much.
    """
    with torch.enable_grad():
        leaves = [leaf.clone().requires_grad_() for leaf in start]
        rates = [boldness * rate for rate in (RATE, *[MULTIPLIERS] * (len(leaves) - 1))]
        optimiser = torch.optim.Adam([{"params": [leaf], "lr": r} for leaf, r in zip(leaves, rates, strict=True)])
        best, kept = None, [leaf.detach().clone() for leaf in leaves]
        for step in range(steps + 1):
            value = bound(*leaves)
            with torch.no_grad():
                if best is None:
                    best = value.detach().clone()
                else:
                    better = value > best
                    best = torch.where(better, value, best)
                    kept = [torch.where(better[:, :, None], leaf, old) for leaf, old in zip(leaves, kept, strict=True)]
            if step == steps or not value.requires_grad:
                break
            optimiser.zero_grad()
            (-value.sum()).backward()
            optimiser.step()
            for group in optimiser.param_groups:
                group["lr"] *= boldness ** (-2 / steps)
            with torch.no_grad():
                project(*leaves)
    return kept


# --- bounds of hidden values ------------------------------------------------------------------------------------------


def _unstable(low: Tensor, up: Tensor, state: Tensor) -> Tensor:
    return (low < 0) & (up > 0) & (state == 0)


def _refresh(problem: _Problem, nodes: Sequence[_Node], steps: int, products: float) -> float:
    """Bound the hidden values of parts anew, layer by layer, in place. Returns the products that it took."""
    low, up, state = _stacked(nodes)
    left = products
    for place in range(len(problem.relus)):
        layer = slice(problem.start(place), problem.ends[place])
        own = _unstable(low[:, layer], up[:, layer], state[:, layer])
        neurons = own.any(0).nonzero()[:, 0]
        cost = 6.0 * len(neurons) * problem.reach[place] * (steps + 1)
        if not len(neurons) or cost > left:
            for node in nodes:
                node.warm.pop(place, None)
            continue
        left -= cost
        lines = {
            dtype: problem.lines(*(x[:, : layer.start].to(dtype) for x in (low, up)))
            for dtype in (torch.float32, torch.float64)
        }
        slopes = _warm(problem, nodes, place, neurons, lines[torch.float32])
        least, slopes = _hidden(problem, place, neurons, state, lines, slopes, steps)
        below, above = least.unflatten(1, (2, -1)).unbind(1)
        at = layer.start + neurons
        # A neuron that one part shares with the others of the batch keeps its bounds where it is stable there.
        down = torch.where(own[:, neurons], torch.maximum(low[:, at], below), low[:, at])
        high = torch.where(own[:, neurons], torch.minimum(up[:, at], -above), up[:, at])
        empty = (down > high).any(1).tolist()
        low[:, at], up[:, at] = torch.minimum(down, high), torch.maximum(down, high)
        for number, node in enumerate(nodes):
            node.empty |= empty[number]
            mine = own[number, neurons]
            node.warm[place] = neurons[mine], _bytes(slopes[number][:, mine])
    for number, node in enumerate(nodes):
        node.low, node.up = low[number], up[number]
    return products - left


def _warm(
    problem: _Problem, nodes: Sequence[_Node], place: int, neurons: Tensor, lines: Mapping[str, Relaxation]
) -> Tensor:
    """Slopes to start from: (nodes, 2, neurons, neurons of the places before). lines: of all nodes."""
    count = len(nodes)
    adaptive = [lines[relu.target].alpha.flatten(1) for relu in problem.relus[:place]]  # type: ignore[union-attr]
    start = torch.cat([torch.zeros(count, 0), *adaptive], 1)[:, None, None].repeat(1, 2, len(neurons), 1)
    for number, node in enumerate(nodes):
        if place in node.warm:
            known, slopes = node.warm[place]
            at = torch.full((problem.sizes[place],), -1)
            at[known] = torch.arange(len(known))
            at = at[neurons]
            start[number][:, at >= 0] = _floats(slopes[:, at[at >= 0]])
    return start


def _hidden(
    problem: _Problem, place: int, neurons: Tensor, state: Tensor,
    lines: Mapping[torch.dtype, Mapping[str, Relaxation]], slopes: Tensor, steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lower bounds of some neurons of a layer and of their negatives, (parts, 2 neurons), rounding taken off, and the
    slopes that give them. lines: of the places before. slopes: (parts, 2, neurons, neurons of the places before).
    """
    ends, count = problem.ends[place], len(slopes)
    # Splits of this layer and of those before it.
    split = (state[:, :ends] != 0).any(0).nonzero()[:, 0]
    side = state[:, None, split]
    least, best = [], []
    for some in torch.arange(len(neurons)).split(max(1, NUMBERS // (2 * count * problem.widest))):
        wanted, start = neurons[some], slopes[:, :, some].flatten(1, 2)

        def bound(alpha: Tensor, beta: Tensor, wanted: Tensor = wanted) -> Tensor:
            return _row_bounds(problem, place, wanted, lines[alpha.dtype], alpha, (split, -beta * side))

        def project(alpha: Tensor, beta: Tensor) -> None:
            alpha.clamp_(0, 1)
            beta.clamp_(min=0).mul_(side != 0)

        beta = torch.zeros(count, 2 * len(some), len(split))
        alpha, beta = (leaf.to(torch.float64) for leaf in _ascended(bound, [start, beta], project, steps))
        lost = 2 * problem.lost[problem.start(place) + wanted].repeat(2) + 2 * beta @ problem.lost[split]
        value = bound(alpha, beta) - lost
        least.append(torch.where(torch.isfinite(value), value, -torch.inf).unflatten(1, (2, -1)))
        best.append(alpha.to(torch.float32).unflatten(1, (2, -1)))
    return torch.cat(least, 2).flatten(1), torch.cat(best, 2)


def _row_bounds(
    problem: _Problem, place: int, neurons: Tensor, lines: Mapping[str, Relaxation], alpha: Tensor,
    multipliers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Lower bounds of some neurons of a layer and then of their negatives: (parts, 2 neurons).

    alpha: (parts or 1, 2 neurons, neurons of the places before). multipliers: neurons and their coefficients, (parts,
    2 neurons, these).
    """
    relu, dtype, count = problem.relus[place], alpha.dtype, len(neurons)
    unit = torch.zeros(1, 2 * count, problem.sizes[place], dtype=dtype)
    unit[0, torch.arange(count), neurons] = 1
    unit[0, torch.arange(count, 2 * count), neurons] = -1
    added = None
    if multipliers is not None and len(multipliers[0]):
        added = problem.added(*multipliers, problem.ends[place])
    row = backward.walk(
        problem.graphs[dtype], unit.unflatten(2, relu.shape), relu.source,
        optimised.with_slopes(lines, problem.shaped(alpha)), added=added,
    )  # fmt: skip
    return row.d + problem.region[dtype].minimum(row.a.flatten(2))


# --- bounds of conjunctions -------------------------------------------------------------------------------------------


def _bounds(
    problem: _Problem, lines: Mapping[str, Relaxation], conjunction: Tensor, alpha: Tensor,
    multipliers: tuple[Tensor, Tensor], weights: Tensor, caught: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lower bounds of sum_k w_k (c_k.f - b_k), (parts, conjunctions), and the coefficients of the inputs.

    conjunction: (conjunctions,). alpha: (parts, conjunctions, neurons). multipliers: neurons and their coefficients,
    (parts, conjunctions, these). weights: (parts, conjunctions, constraints).
    """
    rows, constant = problem.rows(conjunction, weights)
    row = backward.walk(
        problem.graphs[alpha.dtype], rows.unflatten(2, problem.graph.output_shape), problem.graph.output,
        optimised.with_slopes(lines, problem.shaped(alpha)),
        added=problem.added(*multipliers, problem.neurons), caught=caught,
    )  # fmt: skip
    a = row.a.flatten(2)
    return row.d + problem.region[alpha.dtype].minimum(a) - constant, a


def _settle(problem: _Problem, nodes: Sequence[_Node], steps: int, answer: Answer, boldness: float = 1.0) -> Tensor:
    """Bound the open conjunctions of parts, and close those that are refuted, in place.

    Returns (points, inputs): where the bounds of those left are least, and of which conjunction, as a last column.
    """
    low, up, state = _stacked(nodes)
    conjunction = torch.cat([node.open for node in nodes]).unique()
    lines = {dtype: problem.lines(low.to(dtype), up.to(dtype)) for dtype in (torch.float32, torch.float64)}
    # A conjunction that is closed in one part and open in another starts there as that part's first.
    found = [torch.searchsorted(node.open, conjunction).clamp(max=len(node.open) - 1) for node in nodes]
    alpha = torch.stack([_floats(node.slopes[at]) for node, at in zip(nodes, found, strict=True)])
    split = (state != 0).any(0).nonzero()[:, 0]
    side = state[:, None, split]
    beta = torch.zeros(len(nodes), len(conjunction), len(split))
    for number, (node, at) in enumerate(zip(nodes, found, strict=True)):
        beta[number][:, side[number, 0] != 0] = node.beta[at]
    weights = torch.stack([node.weights[at] for node, at in zip(nodes, found, strict=True)])

    def bound(alpha: Tensor, beta: Tensor, weights: Tensor = weights) -> Tensor:
        # Along the simplex: Adam knows signs only, and steps of one sign for all would leave no weight but 0.
        weights = weights / weights.sum(2, keepdim=True)
        return _bounds(problem, lines[alpha.dtype], conjunction, alpha, (split, -beta * side), weights)[0]

    def project(alpha: Tensor, beta: Tensor, weights: Tensor | None = None) -> None:
        alpha.clamp_(0, 1)
        beta.clamp_(min=0).mul_(side != 0)
        if weights is not None:
            weights.clamp_(min=0)
            total = weights.sum(2, keepdim=True)
            weights.copy_(torch.where(total > 1e-6, weights / total, 1 / weights.shape[2]))

    several = problem.places.shape[1] > 1
    best = _ascended(bound, [alpha, beta, weights] if several else [alpha, beta], project, steps, boldness)
    alpha, beta, weights = (leaf.to(torch.float64) for leaf in (best if several else [*best, weights]))
    value, a = _bounds(problem, lines[torch.float64], conjunction, alpha, (split, -beta * side), weights)
    value -= problem.rows_lost(conjunction, weights) + 2 * beta @ problem.lost[split]
    # sum_k w_k (c_k.f - b_k) is at most sum_k w_k times the largest of these, and the weights are rounded.
    slack = 2 * rounding.gamma(weights.shape[2] + 4, torch.float64)
    value = torch.where(value < 0, value / weights.sum(2).clamp(max=1) * (1 + slack), value * (1 - slack))
    value = torch.where(torch.isfinite(value), value, -torch.inf)
    lower, upper = (side.flatten() for side in problem.box.box())
    points = []
    for number, (node, at) in enumerate(zip(nodes, found, strict=True)):
        mine = node.open[at] == conjunction
        now = torch.maximum(value[number][mine], node.bound)
        refuted = now > 0
        answer.margins.scatter_reduce_(0, node.open[refuted], now[refuted], "amin")
        left = mine.nonzero()[:, 0][~refuted]
        node.open, node.bound = node.open[~refuted], now[~refuted]
        node.slopes, node.beta = (
            _bytes(alpha[number, left]),
            beta[number, left][:, side[number, 0] != 0].to(torch.float32),
        )
        node.weights = weights[number, left].to(torch.float32)
        corner = torch.where(a[number, left] > 0, lower, upper)
        points.append(torch.cat([corner, node.open[:, None].to(torch.float64)], 1))
    return torch.cat(points)


# --- the neuron to split ----------------------------------------------------------------------------------------------


def _costs(problem: _Problem, node: _Node) -> tuple[Tensor, Tensor]:
    """What relaxing each neuron costs the bounds of the open conjunctions, and how fast they fall at its upper line
    with what it does to the bounds of hidden values: (neurons,) each, summed over the conjunctions.
    """
    low, up = (end.to(torch.float32)[None] for end in (node.low, node.up))
    alpha = _floats(node.slopes)
    split = node.state.nonzero()[:, 0]
    multipliers = split, (-node.beta * node.state[split])[None]
    # What all these rows keep for their derivatives has to fit.
    through = node.rows * problem.widest <= 8 * NUMBERS
    with torch.enable_grad():
        # Of each neuron's upper line, the share of its height that is taken away.
        share = torch.zeros(problem.neurons, requires_grad=True)
        lines = dict(problem.others[torch.float32])
        for place, relu in enumerate(problem.relus):
            layer = slice(problem.start(place), problem.ends[place])
            below, above = low[:, layer], up[:, layer]
            if through and place in node.warm and len(node.warm[place][0]):
                neurons, slopes = node.warm[place]
                value = _row_bounds(problem, place, neurons, lines, _floats(slopes.flatten(0, 1))[None])
                # The bounds are those that are known, their derivatives those of the pass.
                change = (value - value.detach()).unflatten(1, (2, -1))
                below = below.index_add(1, neurons, change[:, 0])
                above = above.index_add(1, neurons, -change[:, 1])
            own = Lines.of(Interval(below.unflatten(1, relu.shape), above.unflatten(1, relu.shape)))
            left = (1 - share[layer]).reshape(1, *relu.shape)
            lines[relu.target] = replace(own, intercept=own.intercept * left)
        caught: dict[str, Tensor] = {}
        value, _ = _bounds(problem, lines, node.open, alpha[None], multipliers, node.weights[None], caught)
        (falls,) = torch.autograd.grad(value.sum(), share)
    a = torch.cat([caught[relu.target][0].detach().flatten(1) for relu in problem.relus], 1)
    height = torch.cat([lines[relu.target].intercept.detach().flatten() for relu in problem.relus])  # type: ignore[union-attr]
    gap = torch.maximum((1 - alpha) * up, -alpha * low)
    cost = (-a.clamp(max=0) * height + GAP * a.clamp(min=0) * gap).sum(0)
    free = _unstable(node.low, node.up, node.state)
    return torch.where(free, cost, -1.0), torch.where(free, falls, -1.0)


def _choice(problem: _Problem, node: _Node) -> int | None:
    """The neuron at which a part is to be split; None where none is left."""
    free = int(_unstable(node.low, node.up, node.state).sum())
    if not free:
        return None
    cost, falls = _costs(problem, node)
    count = min(CANDIDATES, free)
    first = cost.topk((count + 1) // 2).indices
    falls[first] = -1.0
    candidates = torch.cat([first, falls.topk(count // 2).indices])
    if count == 1:
        return int(candidates[0])
    bounds = torch.cat([_tentative(problem, node, some) for some in candidates.split(_together(node, problem))])
    low, high = bounds.clamp(max=0).mean(2).sort(1).values.unbind(1)
    return int(candidates[(low + LARGER * high).argmax()])


def _together(node: _Node, problem: _Problem) -> int:
    """How many candidates are bounded at once."""
    most = max([len(node.open), *(2 * len(neurons) for neurons, _ in node.warm.values())])
    return max(1, NUMBERS // (2 * most * problem.widest))


def _tentative(problem: _Problem, node: _Node, neurons: Tensor) -> Tensor:
    """Bounds of the open conjunctions on both halves at each of some neurons, by one pass through all layers:
    (neurons, 2, conjunctions).
    """
    count = len(neurons)
    low, up = (end.to(torch.float32).repeat(2 * count, 1) for end in (node.low, node.up))
    on, off = torch.arange(count), torch.arange(count, 2 * count)
    low[on, neurons], up[off, neurons] = 0.0, 0.0
    earliest = int(neurons.amin())
    for place, (rows, slopes) in node.warm.items():
        start = problem.start(place)
        if not len(rows) or start <= earliest:
            continue
        lines = problem.lines(low[:, :start], up[:, :start])
        value = _row_bounds(problem, place, rows, lines, _floats(slopes.flatten(0, 1))[None])
        below, above = value.unflatten(1, (2, -1)).unbind(1)
        at = start + rows
        low[:, at], up[:, at] = torch.maximum(low[:, at], below), torch.minimum(up[:, at], -above)
    split = node.state.nonzero()[:, 0]
    alpha, beta, weights = (
        value.expand(2 * count, *value.shape)
        for value in (_floats(node.slopes), -node.beta * node.state[split], node.weights)
    )
    value, _ = _bounds(problem, problem.lines(low, up), node.open, alpha, (split, beta), weights)
    return torch.stack([value[:count], value[count:]], 1)


# --- search -----------------------------------------------------------------------------------------------------------


def search(
    graph: Graph,
    query: Query,
    judge: Callable[[Tensor, int], bool],
    budget: int,
    block: Block | None = None,
    products: float = math.inf,
) -> Answer:
    """Split until all conjunctions are refuted, a point is accepted, or `budget` parts were bounded, or the bounds of
    hidden values took that many `products`.

    judge(point, conjunction): whether a point of the box, (inputs,), float64, is unsafe; it is asked about points at
    which a float32 evaluation meets the conjunction, a few of each batch. block: what is known of the whole box, one
    box, float64; else its hidden values are bounded here. The same arguments give the same answer.
    """
    with torch.no_grad():
        return _Search(graph, query, judge, budget, block, products).run()


class _Search:
    def __init__(
        self, graph: Graph, query: Query, judge: Callable[[Tensor, int], bool], budget: int, block: Block | None,
        products: float = math.inf,
    ) -> None:  # fmt: skip
        self.products = products
        shape = (1, *graph.input_shape)
        box = Box(query.lower.reshape(shape), query.upper.reshape(shape))
        if block is None:
            neurons = [math.prod(operation.shape) for operation in operations(graph) if isinstance(operation, Relu)]
            cost = sum(6.0 * n * far * optimised.STEPS for n, far in zip(neurons, reach(graph), strict=True))
            refine = optimised.refiner(graph, box) if cost < FIRST_PRODUCTS else None
            block = backward.relaxed(graph, box, refine=refine)
        graph, block = pruning.smaller(graph, box, block)
        self.problem, self.judge, self.budget = _Problem(graph, query, block), judge, budget
        count = int(query.owners.max()) + 1
        self.answer = Answer(torch.full((count,), torch.inf, dtype=torch.float64))
        problem, most = self.problem, self.problem.places.shape[1]
        low, up = (
            problem.flat([getattr(block.values[relu.source], end) for relu in problem.relus])
            for end in ("lower", "upper")
        )
        adaptive = (up > -low).to(torch.float32).expand(count, -1)
        self.root = _Node(
            low, up, torch.zeros(problem.neurons, dtype=torch.int8), torch.arange(count),
            torch.full((count,), -torch.inf, dtype=torch.float64), _bytes(adaptive), torch.zeros(count, 0),
            torch.full((count, most), 1 / most), {},
        )  # fmt: skip
        self.heap: list[tuple[float, int, _Node]] = []
        #: Nodes so far, stuck ones, and slopes that those of the heap keep.
        self.number, self.stuck, self.kept = 0, list[_Node](), 0

    def run(self) -> Answer:
        answer, due = self.answer, 1
        self._bounded([self.root], FIRST_STEPS, FIRST_PRODUCTS)
        floor = torch.full_like(answer.margins, torch.inf)
        floor[self.root.open] = self.root.bound.clamp(max=0)
        while self.heap and answer.parts < self.budget and answer.products < self.products and not answer.found:
            if answer.parts >= due:
                answer.trace.append(
                    (answer.parts, min([float(answer.margins.amin()), self.heap[0][0], *(n.least for n in self.stuck)]))
                )
                due = 2 * answer.parts
            halves = []
            for parent in self._taken():
                neuron = _choice(self.problem, parent)
                if neuron is None:
                    self._exhausted(parent)
                else:
                    halves += [parent.half(neuron, 1), parent.half(neuron, -1)]
            if halves and not answer.found:
                self._bounded(halves, STEPS, PRODUCTS)
        if answer.found:
            # Parts that were under way are counted no more; what was known of the whole box stands.
            answer.margins = torch.minimum(answer.margins, floor)
        left = [node for *_, node in self.heap] + self.stuck
        answer.open = len(left)
        for node in left:
            answer.margins.scatter_reduce_(0, node.open, node.bound.clamp(max=0), "amin")
        return answer

    def _taken(self) -> list[_Node]:
        """Open parts of the least bounds, as many as are bounded together well."""
        size = max(self.problem.neurons, len(self.problem.query.lower)) * len(self.heap[0][2].open)
        most = max(1, min(BATCH // 2, NUMBERS // (2 * size), ROWS // (2 * self.heap[0][2].rows + 1)))
        taken = [heapq.heappop(self.heap)[2] for _ in range(min(most, len(self.heap)))]
        self.kept -= sum(node.kept for node in taken)
        return taken

    def _bounded(self, nodes: Sequence[_Node], steps: int, products: float) -> None:
        """Bound parts and keep what is open."""
        problem, answer = self.problem, self.answer
        answer.parts += len(nodes)
        answer.deepest = max(answer.deepest, *(node.depth for node in nodes), 0)
        answer.products += _refresh(problem, nodes, steps, len(nodes) * products)
        for node in nodes:
            if node.empty:
                together = torch.full((len(node.open),), TOGETHER, dtype=torch.float64)
                answer.margins.scatter_reduce_(0, node.open, together, "amin")
        nodes = [node for node in nodes if not node.empty]
        if not nodes:
            return
        points = _settle(problem, nodes, steps, answer)
        if self._tried(points[:, :-1], points[:, -1].long()):
            answer.found = True
        for node in nodes:
            if len(node.open):
                if self.kept + node.kept > KEPT:
                    node.warm = {}
                self.kept += node.kept
                self.number += 1
                heapq.heappush(self.heap, (node.least, self.number, node))

    def _exhausted(self, node: _Node) -> None:
        """A last try at a part on which the network is linear."""
        points = _settle(self.problem, [node], LAST_STEPS, self.answer, BOLDNESS)
        if self._tried(points[:, :-1], points[:, -1].long()):
            self.answer.found = True
        if len(node.open):
            self.stuck.append(node)

    def _tried(self, corners: Tensor, conjunction: Tensor) -> bool:
        """Whether one of some points, (points, inputs), or one that a descent meets, is accepted. conjunction: of each
        point, the one that it is to meet.
        """
        problem = self.problem
        lower, upper = (side.flatten().to(torch.float32) for side in problem.box.box())
        of = problem.places[conjunction]
        c, b = problem.query.rows.to(torch.float32)[of], problem.query.bound.to(torch.float32)[of]

        def violation(points: Tensor) -> Tensor:
            shaped = points.reshape(-1, *problem.graph.input_shape)
            outputs = evaluate.forward(problem.graph, shaped).flatten(1)
            return ((c @ outputs[:, :, None])[:, :, 0] - b).amax(1)

        points = corners.to(torch.float32)
        if not len(points):
            return False
        found = violation(points)
        nearest = found.argsort()[:_DESCENTS]
        points, conjunction, c, b = points[nearest], conjunction[nearest], c[nearest], b[nearest]
        best, found = points, found[nearest]
        for step in range(_DESCENT):
            with torch.enable_grad():
                points.requires_grad_()
                (gradient,) = torch.autograd.grad(violation(points).sum(), points)
            length = (upper - lower) * 0.25 * 0.8**step
            points = torch.clamp(points.detach() - length * gradient.sign(), lower, upper)
            now = violation(points)
            best, found = torch.where((now < found)[:, None], points, best), torch.minimum(now, found)
        for place in found.argsort()[:_JUDGED].tolist():
            if not found[place] <= 0:
                return False
            if self.judge(best[place].double(), int(conjunction[place])):
                return True
        return False
