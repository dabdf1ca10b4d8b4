"""Activation splitting: cases of what single neurons do, until linear bounds refute each or one shows a way out.

    unsafe in B  <=  an x in B and a conjunction of B with  c_k.f(x) <= b_k  for all its constraints k

A part of the box is {x in B : z_j(x) >= 0 or <= 0 for the neurons j split so far}, z_j the input of a ReLU. On it the
split ReLUs are linear, and for any beta >= 0 and any weights w >= 0 of the constraints

    min over part of  sum_k w_k (c_k.f - b_k)   >=   min over B of  the same - sum_j beta_j s_j z_j,      s_j z_j >= 0,

which a backward pass (`netassay.numerics.bounds.backward`) bounds from below. The slopes alpha of the other ReLUs, beta
and w climb by a few steps of Adam; they start where the part's parent ended. A conjunction is refuted on a part where
the bound is above 0. Parts with the least bounds are taken first, a batch at a time, and split at the neuron that is
best among a few candidates, by the smaller bound of the two halves after one pass (filtered smart branching). A
candidate's score is what relaxing the neuron costs the bound at most: |A-| t for its upper line, and A+ times the
largest gap above its lower one.

Bounds of hidden values are those of the whole box with optimised slopes (`optimised`), and parts inherit them. Where
`AT_FIRST` parts do not decide, the open conjunctions become nodes, and of a node the hidden values are bounded anew:
with multipliers of the node's splits and of the conjunction itself in each of these bounds, so that what is split and
what is asked bear on every neuron. `INNER` parts below it are tried with that; then the node is halved, and both halves
are nodes that start from its slopes. On mnistfc's 256x4 with property 9 and 0.03, splits alone take seven levels to
lift a bound from -2.90 to -2.25; with new bounds of hidden values the same part is all but refuted (0.005).

The points where linear bounds are least are tried as counterexamples. Neurons that are off in the whole box are taken
out first (`pruning`).

Rounding: Adam works in float32. What it ends with is computed once more in float64, and `rounding` is taken off, that
of every z_j that beta multiplies included. A refuted part is refuted in real arithmetic.

Reference: Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter. Beta-CROWN: efficient bound propagation with per-neuron split
constraints for neural network robustness verification. 2021.
Reference: De Palma, Bunel, Desmaison, Dvijotham, Kohli, Torr, Kumar. Improved branch and bound for neural network
verification via Lagrangian decomposition. 2021. (Filtered smart branching.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Conv, Dense, Graph, Relu
from netassay.numerics.bounds import backward, optimised, pruning
from netassay.numerics.bounds.backward import Block, Lines, Relaxation
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import operations
from netassay.numerics.bounds.regions import Box
from netassay.numerics.branch_and_bound.inputs import Answer, Query

if TYPE_CHECKING:
    from torch import Tensor

#: Parts bounded at once, and the numbers that one tensor of a batch may hold (fewer parts of wide networks).
BATCH, NUMBERS = 256, 2**22
#: Adam: steps for a part, and for what a node begins with; rates of slopes and of multipliers.
STEPS, FIRST_STEPS, RATE, MULTIPLIERS = 10, 20, 0.1, 0.05
#: Of a node: steps for the bounds of its hidden values where its parent had none, and where they start from these.
REFRESHING, AGAIN = 20, 20
#: Products that the bounds of a node's hidden values may cost; where they cost more the parent's are kept.
PRODUCTS = 2e11
#: Parts that are bounded below a node before it is split.
INNER = 16
#: Parts that are bounded with the hidden values of the whole box, before any are bounded anew.
AT_FIRST = 1024
#: Slopes that the bounds of hidden values optimise at once: 32 MiB in float32.
SLOPES = 2**23
#: The margin of a node that nothing is left of: barely positive.
TOGETHER = 2.0**-1000
#: Neurons whose halves are bounded before one is chosen.
CANDIDATES = 3
#: Splits above a part: with so many it stays as it is.
DEEPEST = 200
#: What the score of a neuron makes of the gap above its lower line, against the one below its upper line.
GAP = 0.5
#: Points of a batch that are handed to the judge.
_JUDGED = 4


class _Pool:
    """Open parts, as rows of tensors that grow, by name.

    bound: lower bounds. conjunction. code, side, beta: (parts, splits), the neuron, +1 or -1 (0: no split), its
    multiplier. slopes: (parts, neurons). weights: of the constraints. candidates: neurons to split next, -1: none.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Tensor] = {}
        self.free: list[int] = []
        self.used = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return int(self.used.sum())

    def put(self, part: Mapping[str, Tensor]) -> None:
        count = len(part["bound"])
        if not count:
            return
        if len(self.free) < count:
            size, more = len(self.used), max(len(self.used), 2 * count, 1024)
            for name, value in part.items():
                rows = value.new_zeros(more, *value.shape[1:])
                self.fields[name] = torch.cat([self.fields[name], rows]) if size else rows
            self.used = torch.cat([self.used, torch.zeros(more, dtype=torch.bool)])
            self.free += range(size, size + more)
        places = torch.tensor([self.free.pop() for _ in range(count)])
        for name, value in part.items():
            self.fields[name][places] = value
        self.used[places] = True

    def take(self, count: int) -> dict[str, Tensor]:
        """The parts with the least bounds."""
        bound = torch.where(self.used, self.fields["bound"], torch.inf)
        places = bound.topk(min(count, len(self)), largest=False).indices
        self.used[places] = False
        self.free += places.tolist()
        return {name: value[places] for name, value in self.fields.items()}

    def least(self) -> float:
        return float(torch.where(self.used, self.fields["bound"], torch.inf).amin()) if len(self) else math.inf


class _Problem:
    """What all parts of a box share. Neurons are those that ReLUs read, numbered through."""

    def __init__(self, graph: Graph, query: Query, block: Block) -> None:
        self.graph, self.query, self.block = graph, query, block
        self.relus = [operation for operation in operations(graph) if isinstance(operation, Relu)]
        self.sizes = [math.prod(operation.shape) for operation in self.relus]
        self.neurons = sum(self.sizes)
        shape = (1, *graph.input_shape)
        box = Box(query.lower.reshape(shape), query.upper.reshape(shape))
        self.region = {dtype: optimised.region_in(box, dtype) for dtype in (FAST, EXACT)}
        count, most = int(query.owners.max()) + 1, int(torch.bincount(query.owners).max())
        # Rows of each conjunction, its first again where it has fewer: (conjunctions, rows).
        places = [(query.owners == number).nonzero()[:, 0] for number in range(count)]
        self.places = torch.stack([torch.cat([p, p[:1].expand(most - len(p))]) for p in places])
        self.batch = max(2, min(BATCH, NUMBERS // max(self.neurons, len(query.lower))))
        #: Products of one row's pass.
        self.products = sum(
            math.prod(operation.weight.shape)
            * math.prod(operation.shape[1:] if isinstance(operation, Conv) else operation.shape[:-1])
            for operation in operations(graph)
            if isinstance(operation, Dense | Conv)
        )
        self.lost = self.flat([block.rounding[relu.source] for relu in self.relus])
        self.lost_output = block.rounding[graph.output].flatten()

    @staticmethod
    def flat(parts: Sequence[Tensor]) -> Tensor:
        """Tensors of one box, one a ReLU, as one: (neurons,)."""
        return torch.cat([part[0].flatten() for part in parts])

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """(..., neurons) as one tensor a ReLU, of its shape."""
        parts = flat.split(self.sizes, -1)
        return [part.unflatten(-1, relu.shape) for part, relu in zip(parts, self.relus, strict=True)]

    def added(self, flat: Tensor) -> dict[str, Tensor]:
        """Coefficients of neurons, (..., neurons), by the values that they belong to."""
        found: dict[str, Tensor] = {}
        for relu, part in zip(self.relus, self.shaped(flat), strict=True):
            found[relu.source] = found[relu.source] + part if relu.source in found else part
        return found

    def rows(self, conjunction: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k w_k c_k, (parts, outputs), and sum_k w_k b_k, (parts,)."""
        of = self.places[conjunction]
        c, b = self.query.rows.to(weights.dtype)[of], self.query.bound.to(weights.dtype)[of]
        return (weights[:, :, None] * c).sum(1), (weights * b).sum(1)

    def rows_lost(self, conjunction: Tensor, weights: Tensor) -> Tensor:
        """What rounding may add to a bound of these rows less their b: (parts,)."""
        of = self.places[conjunction]
        size = (weights[:, :, None] * self.query.rows[of].abs()).sum(1)
        return 2 * size @ self.lost_output + 1e-14 * (weights * self.query.bound[of].abs()).sum(1)


#: Adam's precision, and that of what is claimed.
FAST, EXACT = torch.float32, torch.float64


class _Node:
    """A part of the box whose hidden values have bounds of their own; parts below it are bounded with its lines.

    code, side: (splits,). values: boxes of what ReLUs read. warm: slopes that its hidden values were bounded with, by
    place of the ReLU: (neurons, their numbers in the layer) and (2, neurons, all neurons), half precision.
    """

    def __init__(
        self, problem: _Problem, block: Block, code: Tensor, side: Tensor, conjunction: int, bound: float,
        warm: dict[int, tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        self.problem, self.block, self.code, self.side = problem, block, code, side
        self.conjunction, self.bound, self.warm = conjunction, bound, warm
        self.lines = {dtype: optimised.in_dtype(block.lines, dtype) for dtype in (FAST, EXACT)}
        relus = problem.relus
        flat = {name: problem.flat([getattr(block.lines[r.target], name) for r in relus]) for name in _LINE}
        self.flat = {dtype: {name: value.to(dtype) for name, value in flat.items()} for dtype in (FAST, EXACT)}
        self.unstable = flat["intercept"] > 0
        self.low = problem.flat([block.values[relu.source].lower for relu in relus])
        self.up = problem.flat([block.values[relu.source].upper for relu in relus])

    def bound_of(
        self, conjunction: Tensor, code: Tensor, side: Tensor, beta: Tensor, slopes: Tensor, weights: Tensor,
        caught: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(parts,) bounds and (parts, inputs) coefficients, in the dtype of `beta`. side: of that dtype too."""
        problem, dtype = self.problem, beta.dtype
        multipliers = torch.zeros(len(code), problem.neurons, dtype=dtype).scatter_add(1, code, -beta * side)
        rows, constant = problem.rows(conjunction, weights)
        shaped = rows[:, None].unflatten(2, problem.graph.output_shape)
        row = backward.walk(
            problem.graph, shaped, problem.graph.output, self.parts_lines(code, side, slopes),
            added=problem.added(multipliers), caught=caught,
        )  # fmt: skip
        a = row.a.flatten(2)
        return (row.d + problem.region[dtype].minimum(a))[:, 0] - constant, a[:, 0]

    def parts_lines(self, code: Tensor, side: Tensor, slopes: Tensor) -> dict[str, Relaxation]:
        """Lines of parts: a split neuron is on or off, one that is stable on the node has exact lines there."""
        dtype = slopes.dtype
        flat = self.flat[dtype]
        state = self.state(code, side)
        on, free = (state > 0).to(dtype), state == 0
        alpha = torch.where(free, torch.where(self.unstable, slopes, flat["alpha"]), on)
        slope = torch.where(free, flat["slope"], on)
        intercept = torch.where(free, flat["intercept"], torch.zeros((), dtype=dtype))
        lines = dict(self.lines[dtype])
        three = (self.problem.shaped(value) for value in (alpha, slope, intercept))
        for relu, *of_relu in zip(self.problem.relus, *three, strict=True):
            lines[relu.target] = Lines(*of_relu)
        return lines

    def state(self, code: Tensor, side: Tensor) -> Tensor:
        """(parts, neurons), int8: +1 and -1 where split, else 0."""
        zero = torch.zeros(len(code), self.problem.neurons, dtype=torch.int8)
        return zero.scatter_add(1, code, side.to(torch.int8)).sign()

    def proved(
        self, conjunction: Tensor, code: Tensor, side: Tensor, beta: Tensor, slopes: Tensor, weights: Tensor
    ) -> Tensor:
        """Bounds in real arithmetic: float64, rounding taken off. (parts,)."""
        side, beta, slopes, weights = (x.double() for x in (side, beta, slopes, weights))
        value, _ = self.bound_of(conjunction, code, side, beta, slopes, weights)
        lost = self.problem.rows_lost(conjunction, weights) + 2 * (beta * self.problem.lost[code]).sum(1)
        return torch.where(torch.isfinite(value - lost), value - lost, -torch.inf)


_LINE = ("alpha", "slope", "intercept")


@dataclass(frozen=True, eq=False)
class _Climbed:
    """The best bounds of parts that Adam met, with what gives them; coefficients: (parts, neurons), of what ReLUs give;
    corner: (parts, inputs), coefficients of the inputs.
    """

    bound: Tensor
    slopes: Tensor
    beta: Tensor
    weights: Tensor
    coefficients: Tensor
    corner: Tensor


def _climbed(
    node: _Node, conjunction: Tensor, code: Tensor, side: Tensor, start: Mapping[str, Tensor], steps: int
) -> _Climbed:
    """start: slopes, beta and weights, in float32."""
    names = ["slopes", "beta"] + ["weights"] * (start["weights"].shape[1] > 1)
    relus = node.problem.relus
    with torch.enable_grad():
        leaves = {name: start[name].clone().requires_grad_() for name in names}
        rates = {"slopes": RATE}
        groups = [{"params": [leaf], "lr": rates.get(name, MULTIPLIERS)} for name, leaf in leaves.items()]
        optimiser = torch.optim.Adam(groups)
        best: dict[str, Tensor] = {}
        for step in range(steps + 1):
            caught: dict[str, Tensor] = {}
            now = {**start, **leaves}
            value, a = node.bound_of(
                conjunction, code, side, now["beta"], now["slopes"], now["weights"], caught
            )  # fmt: skip
            with torch.no_grad():
                of_relus = torch.cat([caught[relu.target][:, 0].flatten(1) for relu in relus], 1)
                met = {"bound": value, "coefficients": of_relus, "corner": a, **now}
                better = value > best["bound"] if best else torch.ones_like(value, dtype=torch.bool)
                for name, found in met.items():
                    which = better.reshape(-1, *[1] * (found.dim() - 1))
                    best[name] = torch.where(which, found, best[name]) if name in best else found.detach().clone()
            if step == steps:
                break
            optimiser.zero_grad()
            (-value.sum()).backward()
            if "weights" in leaves and (grad := leaves["weights"].grad) is not None:
                # Along the simplex: Adam knows signs only, and steps of one sign for all leave no weight but 0.
                grad -= grad.mean(1, keepdim=True)
            optimiser.step()
            with torch.no_grad():
                leaves["slopes"].clamp_(0, 1)
                leaves["beta"].clamp_(min=0).mul_(side != 0)
                if "weights" in leaves:
                    weights = leaves["weights"].clamp_(min=0)
                    total = weights.sum(1, keepdim=True)
                    weights.copy_(torch.where(total > 1e-6, weights / total, 1 / weights.shape[1]))
    return _Climbed(**best)


class _Below:
    """The search among the parts below one node."""

    def __init__(self, node: _Node, judge: Callable[[Tensor, int], bool], answer: Answer) -> None:
        self.node, self.problem, self.judge, self.answer = node, node.problem, judge, answer
        self.pool, self.stuck = _Pool(), 0
        #: Where the node itself was split, if it was; and whether a point was accepted.
        self.split: int | None = None
        self.found = False
        #: The bound of the node itself, in real arithmetic.
        self.first = -math.inf

    def run(self, conjunctions: Sequence[int], parts: int) -> bool:
        """Whether all is refuted after so many parts; `found`, where a point was accepted instead."""
        node, count = self.node, len(conjunctions)
        code, side = torch.zeros(2, count, DEEPEST)
        splits = len(node.code)
        code[:, :splits], side[:, :splits] = node.code, node.side
        most = self.problem.places.shape[1]
        start = {
            "conjunction": torch.tensor(list(conjunctions)),
            "code": code.long(),
            "side": side,
            "beta": torch.zeros(count, DEEPEST),
            "slopes": node.flat[FAST]["alpha"].expand(count, -1).half(),
            "weights": torch.full((count, most), 1 / most),
            "bound": torch.full((count,), node.bound),
        }
        end = self.answer.parts + parts
        self._bounded(start, FIRST_STEPS)
        if len(self.pool):
            self.first = float(self.open()["bound"].amin())
        while len(self.pool) and not self.found and not self.stuck and self.answer.parts < end:
            self._bounded(self._halves(self.pool.take(max(1, self.problem.batch // 2))), STEPS)
        return not self.found and not self.stuck and not len(self.pool)

    def open(self) -> dict[str, Tensor]:
        """The open parts, with bounds that hold in real arithmetic: those of the search are float32."""
        found = {name: value[self.pool.used] for name, value in self.pool.fields.items()}
        names = ("conjunction", "code", "side", "beta", "slopes", "weights")
        bounds = [
            self.node.proved(*(found[name][which] for name in names))
            for which in torch.arange(len(found["bound"])).split(self.problem.batch)
        ]
        # sum_k w_k (c_k.f - b_k) is at most sum_k w_k times the largest of these, and the weights are rounded.
        bound = torch.cat(bounds) / found["weights"].double().sum(1).clamp(max=1)
        found["bound"] = (bound - 1e-12 * bound.abs()).clamp(max=0)
        return found

    def _bounded(self, part: dict[str, Tensor], steps: int) -> None:
        """Bound parts and keep what is open."""
        answer, node = self.answer, self.node
        answer.parts += len(part["bound"])
        depth = int((part["side"] != 0).sum(1).amax())
        answer.deepest = max(answer.deepest, depth)
        width = max(1, depth)
        conjunction, code, side = part["conjunction"], part["code"][:, :width], part["side"][:, :width]
        start = {"slopes": part["slopes"].to(FAST), "beta": part["beta"][:, :width], "weights": part["weights"]}
        best = _climbed(node, conjunction, code, side, start, steps)
        refuted = torch.zeros(len(best.bound), dtype=torch.bool)
        near = (best.bound > 0).nonzero()[:, 0]
        if len(near):
            given = (best.beta[near], best.slopes[near], best.weights[near])
            proved = node.proved(conjunction[near], code[near], side[near], *given)
            refuted[near] = proved > 0
            answer.margins.scatter_reduce_(0, conjunction[refuted], proved[proved > 0], "amin")
        if self._tried(conjunction, best.corner, ~refuted):
            self.found = True
            return
        part["beta"] = torch.nn.functional.pad(best.beta, (0, DEEPEST - width))
        part["bound"] = torch.maximum(best.bound, part["bound"]).clamp(max=0)
        part["slopes"], part["weights"] = best.slopes.half(), best.weights
        part["candidates"] = self._candidates(best, (node.state(code, side) == 0) & node.unstable)
        # With every neuron split, or too many: nothing more is to be had here. It stays open all the same.
        stuck = ~refuted & ((part["candidates"][:, 0] < 0) | ((side != 0).sum(1) >= DEEPEST))
        self.stuck += int(stuck.sum())
        self.pool.put({name: value[~refuted] for name, value in part.items()})

    def _candidates(self, best: _Climbed, free: Tensor) -> Tensor:
        """Neurons whose relaxation costs a bound most: (parts, CANDIDATES), -1 where there are no more."""
        node, a = self.node, best.coefficients
        gap = torch.maximum((1 - best.slopes) * node.up.to(FAST), -best.slopes * node.low.to(FAST))
        cost = -a.clamp(max=0) * node.flat[FAST]["intercept"] + GAP * a.clamp(min=0) * gap
        top = torch.where(free, cost, -1.0).topk(min(CANDIDATES, cost.shape[1]), dim=1)
        return torch.where(top.values >= 0, top.indices, -1)

    def _halves(self, parents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both halves of each part, split at the best of its candidates."""
        candidates, place = parents["candidates"], (parents["side"] != 0).sum(1)
        count, tried = candidates.shape
        each = {name: value.repeat_interleave(tried, 0) for name, value in parents.items()}
        at = torch.arange(count * tried), place.repeat_interleave(tried)
        width = int(place.amax()) + 1
        bounds = []
        for sign in (1.0, -1.0):
            code, side = each["code"][:, :width].clone(), each["side"][:, :width].clone()
            code[at], side[at] = candidates.clamp(min=0).flatten(), sign
            values = [
                self.node.bound_of(
                    each["conjunction"][which], code[which], side[which], each["beta"][which, :width],
                    each["slopes"][which].to(FAST), each["weights"][which],
                )[0]
                for which in torch.arange(count * tried).split(2 * self.problem.batch)
            ]  # fmt: skip
            bounds.append(torch.cat(values).reshape(count, tried))
        # What is above 0 is refuted: how far above makes no difference.
        low, high = torch.minimum(*bounds).clamp(max=0), torch.maximum(*bounds).clamp(max=0)
        score = torch.where(candidates >= 0, low + 1e-3 * high, -torch.inf)
        split = candidates.gather(1, score.argmax(1, keepdim=True))[:, 0]
        if self.split is None:
            self.split = int(split[0])
        halves = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in parents.items()}
        del halves["candidates"]
        at = torch.arange(2 * count), place.repeat(2)
        halves["code"][at] = split.repeat(2)
        halves["side"][at] = torch.cat([torch.ones(count), -torch.ones(count)])
        return halves

    def _tried(self, conjunction: Tensor, corner: Tensor, open_: Tensor) -> bool:
        """Whether a point where the bound of an open part is least is accepted."""
        which, problem = open_.nonzero()[:, 0], self.problem
        if not len(which):
            return False
        lower, upper = (side.flatten() for side in problem.region[FAST].box())
        points = torch.where(corner[which] > 0, lower, upper)
        outputs = evaluate.forward(problem.graph, points.reshape(-1, *problem.graph.input_shape)).flatten(1)
        of = problem.places[conjunction[which]]
        c, b = problem.query.rows.to(FAST)[of], problem.query.bound.to(FAST)[of]
        violation = ((c @ outputs[:, :, None])[:, :, 0] - b).amax(1)
        for place in violation.argsort()[:_JUDGED].tolist():
            if not violation[place] <= 0:
                return False
            if self.judge(points[place].double(), int(conjunction[which[place]])):
                return True
        return False


# --- bounds of hidden values on a part --------------------------------------------------------------------------------


def _refreshed(node: _Node) -> _Node | None:
    """The node with its hidden values bounded anew; None where nothing is left of it.

    z_j of a point of the part at which the conjunction is met is at least
    min over the box of  z_j + gamma (sum_k w_k (c_k.f - b_k)) - sum over splits of beta s z,  gamma and beta >= 0,
    since both terms that are added are at most 0 there: what is split and what is asked bear on every neuron.
    """
    problem, values = node.problem, dict(node.block.values)
    lines, warm = dict(node.block.lines), {}
    for place, relu in enumerate(problem.relus):
        x = values[relu.source]
        low, up = x.lower[0].flatten(), x.upper[0].flatten()
        neurons = ((low < 0) & (up > 0)).nonzero()[:, 0]
        if not len(neurons):
            continue
        steps = AGAIN if place in node.warm else REFRESHING
        if 6 * len(neurons) * problem.products * steps > PRODUCTS:
            continue
        slopes = _warm(node, place, neurons)
        least, slopes = _hidden(node, lines, place, neurons, slopes, steps)
        warm[place] = neurons, slopes.half()
        below, above = least.chunk(2)
        low, up = low.clone(), up.clone()
        low[neurons] = torch.maximum(low[neurons], below)
        up[neurons] = torch.minimum(up[neurons], -above)
        if bool((low > up).any()):
            return None
        x = values[relu.source] = Interval(low.reshape(x.lower.shape), up.reshape(x.upper.shape))
        lines.update({r.target: Lines.of(x) for r in problem.relus if r.source == relu.source})
    block = replace(node.block, values=values, lines=lines)
    return _Node(problem, block, node.code, node.side, node.conjunction, node.bound, warm)


def _warm(node: _Node, place: int, neurons: Tensor) -> Tensor:
    """Slopes to start from, for the lower bounds of neurons and then of their negatives: (2 neurons, all neurons)."""
    if place not in node.warm:
        return node.flat[FAST]["alpha"].expand(2 * len(neurons), -1).clone()
    known, slopes = node.warm[place]
    return slopes[:, torch.isin(known, neurons)].to(FAST).flatten(0, 1)


def _hidden(
    node: _Node, lines: Mapping[str, Relaxation], place: int, neurons: Tensor, slopes: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Lower bounds of some neurons of a layer and of their negatives, (2 neurons,), rounding taken off, and the slopes
    that give them, (2, neurons, all neurons).
    """
    problem = node.problem
    start, count = sum(problem.sizes[:place]), len(neurons)
    of_lines = {dtype: optimised.in_dtype(lines, dtype) for dtype in (FAST, EXACT)}
    conjunction = torch.tensor([node.conjunction])
    weights = torch.full((1, problem.places.shape[1]), 1 / problem.places.shape[1], dtype=EXACT)
    row, constant = problem.rows(conjunction, weights)
    found, best = [], []
    for which in torch.arange(2 * count).split(max(1, SLOPES // problem.neurons)):
        unit = torch.zeros(1, len(which), problem.neurons)
        unit[0, torch.arange(len(which)), start + neurons[which % count]] = torch.where(which < count, 1.0, -1.0)

        def bound(alpha: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype, unit: Tensor = unit) -> Tensor:
            multipliers = unit.to(dtype).index_add(2, node.code, -beta * node.side.to(dtype))
            rows = (gamma[:, :, None] * row.to(dtype)).unflatten(2, problem.graph.output_shape)
            sloped = dict(zip([relu.target for relu in problem.relus], problem.shaped(alpha), strict=True))
            found = backward.walk(
                problem.graph, rows, problem.graph.output, optimised.with_slopes(of_lines[dtype], sloped),
                added=problem.added(multipliers),
            )  # fmt: skip
            return found.d + problem.region[dtype].minimum(found.a.flatten(2)) - gamma * constant.to(dtype)

        leaves = [slopes[None, which].clone(), torch.zeros(1, len(which)), torch.zeros(1, len(which), len(node.code))]
        kept = _ascended(bound, leaves, steps)
        alpha, gamma, beta = (leaf.to(EXACT) for leaf in kept)
        least = bound(alpha, gamma, beta, EXACT)[0]
        lost = 2 * problem.lost[start + neurons[which % count]] + gamma[0] * problem.rows_lost(conjunction, weights)
        lost += 2 * beta[0] @ problem.lost[node.code]
        found.append(torch.where(torch.isfinite(least - lost), least - lost, -torch.inf))
        best.append(kept[0][0])
    return torch.cat(found), torch.cat(best).unflatten(0, (2, count))


def _ascended(bound: Callable[..., Tensor], start: list[Tensor], steps: int) -> list[Tensor]:
    """Slopes, gamma and beta of the best bound met for each row: (1, rows, ...) each."""
    with torch.enable_grad():
        leaves = [leaf.requires_grad_() for leaf in start]
        rates = (RATE, MULTIPLIERS, MULTIPLIERS)
        optimiser = torch.optim.Adam([{"params": [leaf], "lr": r} for leaf, r in zip(leaves, rates, strict=True)])
        best, kept = None, [leaf.detach().clone() for leaf in leaves]
        for step in range(steps + 1):
            value = bound(*leaves, FAST)
            with torch.no_grad():
                better = torch.ones_like(value, dtype=torch.bool) if best is None else value > best
                best = value.detach() if best is None else torch.where(better, value, best)
                for old, leaf in zip(kept, leaves, strict=True):
                    old.copy_(torch.where(better.reshape(*better.shape, *[1] * (leaf.dim() - 2)), leaf, old))
            if step == steps:
                return kept
            optimiser.zero_grad()
            (-value.sum()).backward()
            optimiser.step()
            with torch.no_grad():
                leaves[0].clamp_(0, 1)
                leaves[1].clamp_(min=0)
                leaves[2].clamp_(min=0)
    return kept


# --- search -----------------------------------------------------------------------------------------------------------


def search(
    graph: Graph, query: Query, judge: Callable[[Tensor, int], bool], budget: int, block: Block | None = None
) -> Answer:
    """Split until all conjunctions are refuted, a point is accepted, or `budget` parts were bounded.

    judge(point, conjunction): whether a point of the box, (inputs,), float64, is unsafe; it is asked about points at
    which a float32 evaluation meets the conjunction, a few of each batch. block: what is known of the whole box, one
    box, float64; else its hidden values are bounded here. The same arguments give the same answer.
    """
    with torch.no_grad():
        return _Search(graph, query, judge, budget, block).run()


class _Search:
    def __init__(
        self, graph: Graph, query: Query, judge: Callable[[Tensor, int], bool], budget: int, block: Block | None
    ) -> None:
        shape = (1, *graph.input_shape)
        box = Box(query.lower.reshape(shape), query.upper.reshape(shape))
        if block is None:
            block = backward.relaxed(graph, box, refine=optimised.refiner(graph, box))
        graph, block = pruning.smaller(graph, box, block)
        self.problem = _Problem(graph, query, block)
        self.judge, self.budget = judge, budget
        self.answer = Answer(torch.full((int(query.owners.max()) + 1,), torch.inf, dtype=torch.float64))
        self.root = _Node(self.problem, block, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0, -math.inf, {})

    def run(self) -> Answer:
        answer = self.answer
        below = _Below(self.root, self.judge, answer)
        if below.run(range(len(answer.margins)), min(self.budget, AT_FIRST)) or below.found:
            answer.found = below.found
            return answer
        nodes: list[tuple[float, int, _Node]] = []
        number, due = 0, 0
        left = below.open()
        for conjunction in left["conjunction"].unique().tolist():
            least = float(left["bound"][left["conjunction"] == conjunction].amin())
            node = _Node(self.problem, self.root.block, self.root.code, self.root.side, conjunction, least, {})
            nodes.append((least, number := number + 1, node))
        heapq.heapify(nodes)
        while nodes and answer.parts < self.budget:
            if answer.parts >= due:
                answer.trace.append((answer.parts, min(float(answer.margins.amin()), nodes[0][0])))
                due = 2 * answer.parts
            _, _, node = heapq.heappop(nodes)
            fresh = _refreshed(node)
            if fresh is None:
                self._close(node.conjunction, TOGETHER)
                continue
            below = _Below(fresh, self.judge, answer)
            if below.run([node.conjunction], INNER):
                continue
            if below.found:
                answer.found = True
                break
            if below.split is None or len(node.code) >= DEEPEST - 1:
                answer.open += 1
                self._close(node.conjunction, max(fresh.bound, below.first))
                continue
            fresh.bound = max(fresh.bound, below.first)
            for side in (1.0, -1.0):
                half = _half(fresh, below.split, side)
                heapq.heappush(nodes, (half.bound, number := number + 1, half))
        answer.open += len(nodes)
        for bound, _, node in nodes:
            self._close(node.conjunction, min(bound, 0.0))
        return answer

    def _close(self, conjunction: int, bound: float) -> None:
        self.answer.margins[conjunction] = min(float(self.answer.margins[conjunction]), bound)


def _half(node: _Node, code: int, side: float) -> _Node:
    """The part of a node on one side of a neuron."""
    problem = node.problem
    place = next(k for k in range(len(problem.sizes)) if code < sum(problem.sizes[: k + 1]))
    relu, neuron = problem.relus[place], code - sum(problem.sizes[:place])
    x = node.block.values[relu.source]
    low, up = x.lower.clone(), x.upper.clone()
    (low if side > 0 else up).view(-1)[neuron] = 0.0
    x = Interval(low, up)
    values = {**node.block.values, relu.source: x}
    lines = {**node.block.lines, **{r.target: Lines.of(x) for r in problem.relus if r.source == relu.source}}
    return _Node(
        problem, replace(node.block, values=values, lines=lines), torch.cat([node.code, torch.tensor([code])]),
        torch.cat([node.side, torch.tensor([side])]), node.conjunction, node.bound, node.warm,
    )  # fmt: skip
