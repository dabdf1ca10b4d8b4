"""Input splitting: boxes of few inputs are halved until linear bounds refute each part, or a part shows a way out.

    unsafe in B  <=  an x in B and a conjunction of B with  c_k.f(x) <= b_k  for all its constraints k
    refuted on a part D of B  <=  for every conjunction there is a k with  min over x in D of c_k.f(x)  >  b_k

A part is bounded by backward linear bounds (CROWN, as `netassay.numerics.bounds.backward` has them), hundreds of parts
at a time. Of a chain of dense layers and ReLUs (`Bounder`) only those neurons of a layer are bounded that were unstable
in the part's parent: a neuron that is stable on a box is so on every part of it. Any other graph is bounded as a whole
(`GraphBounder`). What is not refuted is

1. tried: its centre, and the corner where the hardest of its rows is least, are evaluated, and handed to the caller
   where the float64 network is unsafe there;
2. clipped: an unsafe x has A_k x + d_k <= c_k.f(x) <= b_k for every k of its conjunction; the smallest box around
   these half-spaces, and around the union over the conjunctions that are open, replaces the part. One half-space cuts
   one coordinate at a time, the others at the end that is best for it;
3. split along the input with the largest score

       sum over open rows of (|A at the first hidden layer| |W_1| + |A at the input|)_j (upper - lower)_j,

   which does not vanish where coefficients of the input cancel, as |A at the input| alone does. While there are few
   parts, two or three inputs are split at once.

Parts are taken last in, first out, so that the open ones stay few. A search that goes on after `CLIMB_AFTER` parts
draws points of the box and lets each wander by shrinking random steps that it takes where they bring it nearer to being
unsafe (`climb`): on nearly constant outputs, where gradients vanish or mislead, that finds points which neither descent
nor the parts' corners meet. Of ACAS Xu's 1_9 with property 7, more than 100,000 starts of sign-gradient descent come no
nearer than 4.8e-4, most of them to a plateau at 5.9e-4; the search alone had met no unsafe point when it was stopped
after minutes; and the climb is there in some hundred steps.

On ACAS Xu (network 4_2 with property 2) there are three times as many parts without clipping and twice as many with the
parallel lines of Fast-Lin; bounds inherited from the parent change nothing.

Rounding: all bounds are float64 and lose `rounding.backward` of the whole box, which bounds what any order of these
sums can add on any part of it; clipped ends are moved outward by what their own computation can lose. A refuted box is
refuted in real arithmetic.

Reference: Wang, Pei, Whitehouse, Yang, Jana. Formal security analysis of neural networks using symbolic intervals.
2018. (Bisection of inputs by smear.)
Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
Reference: Zhou, Chavez, Chen, Hanasusanto, Zhang. Clip-and-Verify: linear constraint-driven domain clipping for
accelerating neural network verification. 2025. (Relaxed clipping.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Graph, Relu
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.backward import Lines
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, chain, operations, weights
from netassay.numerics.bounds.regions import Box

if TYPE_CHECKING:
    from torch import Tensor

#: Parts bounded at once. Fewer find a way out sooner (the last ones are taken first), more use the processor better.
BATCH = 512
#: With fewer open parts than this, a part is split along several inputs at once.
FEW = 64
#: Elements of the matrices of all layers together: 256 MiB in float64.
LARGEST = 2**25
#: Operations with weights between two ReLUs.
MERGED = 2
#: Numbers in one tensor of a batch: 64 MiB. Wide networks and many constraints make batches smaller.
NUMBERS = 2**23
#: Parts after which points start to wander: most searches are over by then, and a climb takes as long as some 5,000.
CLIMB_AFTER = 2048
#: Of so many points of the box, as many as wander; their steps; the standard deviation of the first steps, in widths of
#: the box, and by what it shrinks a step. Chosen on ACAS Xu's 1_9 with property 7: four seeds of four end there within
#: 130 steps; half as many points with first steps half as large miss it now and then.
DRAWN, WANDERING, STEPS, FIRST_STEP, SHRINK = 5_000, 1_024, 300, 0.2, 0.99


@dataclass(frozen=True, eq=False)
class Layer:
    """y = weight x + bias: (outputs, inputs), (outputs,); all linear operations between two ReLUs in one."""

    weight: Tensor
    bias: Tensor


def layers(graph: Graph, dtype: torch.dtype) -> list[Layer] | None:
    """The network as dense layers with a ReLU between each two; None where they cannot be had.

    To multiply the matrices of two operations beforehand is one more order of evaluating the same products. What that
    can lose is within what `rounding.backward` allows for, as their input's share (2 g H, doubled) goes through both;
    of more than two it might not be, and there is no answer either.
    """
    found, of_graph = [], weights(graph, dtype)
    size = math.prod(graph.input_shape)
    matrix, bias = torch.eye(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    elements, merged, shape = 0, 0, graph.input_shape
    try:
        links = chain(graph)
    except NotImplementedError:
        return None
    for operation in links:
        size = math.prod(operation.shape)
        if isinstance(operation, Relu):
            found.append(Layer(matrix, bias))
            if size * size > LARGEST:
                return None
            matrix, bias, merged = torch.eye(size, dtype=dtype), torch.zeros(size, dtype=dtype), 0
        else:
            apply, w = MAPS[type(operation)].apply, of_graph[operation.target]
            merged += w.weight is not None
            if (elements := elements + size * matrix.shape[1]) > LARGEST or merged > MERGED:
                return None
            columns = apply(operation, w.weight, None, matrix.T.reshape(-1, *shape))
            matrix = columns.flatten(1).T.contiguous()
            bias = apply(operation, w.weight, w.bias, bias.reshape(1, *shape)).flatten()
        shape = operation.shape
    return [*found, Layer(matrix, bias)]


@dataclass(frozen=True, eq=False)
class Query:
    """A box and the conjunctions that are asked about it.

    lower, upper: (inputs,), float64. rows: (rows, outputs), c of each constraint, times a power of two that brings the
    largest entry into [1, 2), as the error bounds of `rounding` ask for: of smaller ones the pad might underflow.
    bound: (rows,), b likewise. owners: (rows,), int64, the conjunction of each, counted from 0.
    """

    lower: Tensor
    upper: Tensor
    rows: Tensor
    bound: Tensor
    owners: Tensor


@dataclass(eq=False)
class Answer:
    """What the search came to.

    margins: (conjunctions,), the least over all parts of max over k of (lower bound of c_k.f) - b_k, as the query has
    these; above 0 where it is refuted in every part. Up to 0 that is a bound for the whole box; above 0 it is none, for
    of what clipping cut off no more is known than that it is above 0. parts: how many were bounded. open: how many were
    left when the budget ended. deepest: the largest number of splits above a part. found: whether `judge` accepted a
    point. products: that bounds of hidden values took, where they are counted (`activations`). trace: (parts, the least
    margin then), at doubling numbers of parts.
    """

    margins: Tensor
    parts: int = 0
    open: int = 0
    deepest: int = 0
    found: bool = False
    products: float = 0.0
    trace: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Parts of a box. lower, upper: (parts, inputs). states: of each hidden layer (parts, neurons), int8: -1 off, 1 on,
    0 unknown, as far as their parents told. margins: (parts, conjunctions), as their parents had them; above 0 where
    refuted. depth: (parts,), splits above.
    """

    lower: Tensor
    upper: Tensor
    states: tuple[Tensor, ...]
    margins: Tensor
    depth: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, which: slice | Tensor) -> _Parts:
        return _Parts(
            self.lower[which], self.upper[which], tuple(s[which] for s in self.states), self.margins[which],
            self.depth[which],
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[_Parts]) -> _Parts:
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts]),
            tuple(torch.cat(states) for states in zip(*(p.states for p in parts), strict=True)),
            torch.cat([p.margins for p in parts]), torch.cat([p.depth for p in parts]),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Linear:
    """Lower bounds a x + d of the rows c.f - b over parts, rounding taken off. a: (parts, rows, inputs). least: (parts,
    rows), their minimum over the part. weight: (parts, rows, inputs), |a| and, where there is a hidden layer, |a there|
    |W_1|: what the score of a split is made of.
    """

    a: Tensor
    least: Tensor
    weight: Tensor

    def __getitem__(self, which: Tensor) -> _Linear:
        return _Linear(self.a[which], self.least[which], self.weight[which])


@dataclass(frozen=True, eq=False)
class _Sides:
    """The lines of a layer's ReLUs, of the neurons that are not off in all parts: (parts, kept) each. A coefficient a
    goes on as a alpha + min(a, 0) more, and adds min(a, 0) intercept.
    """

    alpha: Tensor
    more: Tensor
    intercept: Tensor


class GraphBounder:
    """Bounds over parts of one box, for its rows, of any graph: slower, and nothing is inherited."""

    def __init__(self, graph: Graph, query: Query) -> None:
        self.graph, self.query = graph, query
        self.scale = torch.maximum(query.lower.abs(), query.upper.abs())
        #: What rounding may add is taken off in each bound.
        self.pad = torch.zeros(len(query.rows), dtype=torch.float64)
        self.widths: list[int] = []
        self.widest = max(math.prod(operation.shape) for operation in (*operations(graph),))

    def __call__(self, parts: _Parts) -> tuple[_Linear, tuple[Tensor, ...]]:
        """Bounds of the rows, and no states."""
        region = Box(*(side.reshape(-1, *self.graph.input_shape) for side in (parts.lower, parts.upper)))
        found = backward.lower(self.graph, region, self.query.rows)
        a = found.a.flatten(2)
        # One rounding of a difference does not change its sign.
        return _Linear(a, found.lower - self.query.bound, a.abs()), ()

    def rows(self, points: Tensor) -> Tensor:
        """(points, rows): c.f - b at points, (points, inputs), up to rounding."""
        outputs = evaluate.forward(self.graph, points.reshape(-1, *self.graph.input_shape)).flatten(1)
        return torch.addmm(-self.query.bound, outputs, self.query.rows.T)


class Bounder:
    """Bounds over parts of one box, for its rows, of dense layers with ReLUs between them."""

    def __init__(self, graph: Graph, stack: Sequence[Layer], query: Query) -> None:
        self.stack, self.query = stack, query
        self.widths = [len(layer.bias) for layer in stack[:-1]]
        self.widest = max(len(query.lower), *(len(layer.bias) for layer in stack))
        shape = (1, *graph.input_shape)
        boxes = interval.propagate(graph, Box(query.lower.reshape(shape), query.upper.reshape(shape)))
        lost = rounding.backward(graph, boxes)
        before = [operation.source for operation in operations(graph) if isinstance(operation, Relu)]
        self.lost = [lost[value].flatten() for value in before]
        # Of the whole box, so of every part: no bound may lie beyond, for `rounding` takes intercepts to be within.
        self.whole = [(boxes[value].lower.flatten(), boxes[value].upper.flatten()) for value in before]
        #: Of each row: what it makes of the last hidden layer, and what rounding may add.
        self.last = query.rows @ stack[-1].weight
        self.constant = query.rows @ stack[-1].bias - query.bound
        self.pad = query.rows.abs() @ lost[graph.output].flatten()
        self.scale = boxes[graph.input].magnitude().flatten()

    def __call__(self, parts: _Parts) -> tuple[_Linear, tuple[Tensor, ...]]:
        """Bounds of the rows, and the states of the neurons."""
        centre, radius = parts.lower / 2 + parts.upper / 2, parts.upper / 2 - parts.lower / 2
        states: list[Tensor] = []
        lines: list[_Sides] = []
        kept: list[Tensor] = []
        for layer in range(len(self.stack) - 1):
            state = parts.states[layer]
            if layer == 0:
                weight, bias = self.stack[0].weight, self.stack[0].bias
                middle, half = torch.addmm(bias, centre, weight.T), radius @ weight.abs().T + self.lost[0]
                low, high = middle - half, middle + half
            else:
                low, high = self._hidden(layer, state, lines, kept, centre, radius)
            state = torch.where(state != 0, state, (low >= 0).to(torch.int8) - (high <= 0).to(torch.int8))
            states.append(state)
            # Neurons that are off in all parts take no part in any sum that follows.
            alive = (state >= 0).any(0).nonzero()[:, 0]
            line = Lines.of(Interval(low[:, alive], high[:, alive]))
            on, unknown = state[:, alive] > 0, state[:, alive] == 0
            alpha = torch.where(unknown, line.alpha, on.to(line.alpha.dtype))
            zero = torch.zeros_like(alpha)
            more, intercept = (torch.where(unknown, value, zero) for value in (line.slope - alpha, line.intercept))
            lines.append(_Sides(alpha, more, intercept))
            kept.append(alive)
        return self._rows(parts, lines, kept, centre, radius), tuple(states)

    def rows(self, points: Tensor) -> Tensor:
        """(points, rows): c.f - b at points, (points, inputs), up to rounding."""
        values = points
        for layer in self.stack[:-1]:
            values = torch.addmm(layer.bias, values, layer.weight.T).relu_()
        return torch.addmm(self.constant, values, self.last.T)

    def _hidden(
        self, layer: int, state: Tensor, lines: list[_Sides], kept: list[Tensor], centre: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bounds of one hidden layer where its neurons' states are unknown; elsewhere 0.

        A row for each such neuron and part, its lower bound and that of its negative side by side.
        """
        which, neuron = (state == 0).nonzero(as_tuple=True)
        weight, bias = self.stack[layer].weight[:, kept[-1]][neuron], self.stack[layer].bias[neuron]
        a, d = torch.stack([weight, -weight]), torch.stack([bias, -bias])
        for j in range(layer - 1, -1, -1):
            line = lines[j]
            negative = a.clamp(max=0)
            d = d + (negative * line.intercept[which]).sum(2)
            a = torch.addcmul(a * line.alpha[which], negative, line.more[which])
            a, d = self._through(j, a, d, kept)
        below, above = d + (a * centre[which]).sum(2) - (a.abs() * radius[which]).sum(2)
        low, high = (torch.zeros(state.shape, dtype=centre.dtype) for _ in range(2))
        lost = self.lost[layer][neuron]
        ends = self.whole[layer]
        low[which, neuron] = torch.maximum(below - lost, ends[0][neuron])
        high[which, neuron] = torch.minimum(lost - above, ends[1][neuron])
        return low, high

    def _through(self, j: int, a: Tensor, d: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """From coefficients of the inputs of hidden layer j's ReLU to those of what the layer reads."""
        columns = self.stack[j].weight[kept[j]]
        return a @ (columns[:, kept[j - 1]] if j else columns), d + a @ self.stack[j].bias[kept[j]]

    def _rows(self, parts: _Parts, lines: list[_Sides], kept: list[Tensor], centre: Tensor, radius: Tensor) -> _Linear:
        a, d, first = self.last[None], (self.constant - self.pad)[None], None
        if lines:
            a = a[:, :, kept[-1]]
        for j in range(len(lines) - 1, -1, -1):
            line = lines[j]
            negative = a.clamp(max=0)
            d = d + (negative @ line.intercept[:, :, None])[:, :, 0]
            a = torch.addcmul(a * line.alpha[:, None], negative, line.more[:, None])
            first = a
            a, d = self._through(j, a, d, kept)
        a, d = a.expand(len(parts), *a.shape[1:]), d.expand(len(parts), *d.shape[1:])
        least = d + (a @ centre[:, :, None])[:, :, 0] - (a.abs() @ radius[:, :, None])[:, :, 0]
        weight = a.abs() if first is None else a.abs() + first.abs() @ self.stack[0].weight[kept[0]].abs()
        return _Linear(a, torch.where(torch.isfinite(least), least, -torch.inf), weight)


def search(
    graph: Graph,
    stack: Sequence[Layer] | None,
    query: Query,
    judge: Callable[[Tensor, int], bool],
    budget: int,
    seed: int,
    batch: int = BATCH,
) -> Answer:
    """Bound parts of the box until all conjunctions are refuted, a point is accepted, or `budget` parts were bounded.

    stack: of `layers`, in float64, or None. judge(point, conjunction): whether a point of the box, (inputs,), float64,
    is unsafe; it is asked about points at which the float64 network meets the conjunction, a few of each batch. seed:
    of the climb.
    The same arguments give the same answer, whatever else is computed.
    """
    with torch.no_grad():
        return _Search(graph, stack, query, judge, budget, seed, batch).run()


#: The margin of a part in which each row of a conjunction may be met, but not all of them together: barely positive.
TOGETHER = 2.0**-1000
#: Points of a batch that are handed to the judge.
_CANDIDATES = 4
#: What the computation of a clipped end can lose, relative to the distance it moved and to the size of the input: far
#: above the few roundings it consists of.
_OUTWARD = 1e-9, 1e-13


class _Search:
    def __init__(
        self, graph: Graph, stack: Sequence[Layer] | None, query: Query, judge: Callable[[Tensor, int], bool],
        budget: int, seed: int, batch: int,
    ) -> None:  # fmt: skip
        self.query, self.judge, self.budget, self.seed = query, judge, budget, seed
        self.bounder = GraphBounder(graph, query) if stack is None else Bounder(graph, stack, query)
        self.count = count = int(query.owners.max()) + 1
        widest = self.bounder.widest
        self.batch = max(1, min(batch, NUMBERS // (widest * (2 * widest + len(query.owners)))))
        self.answer = Answer(torch.full((count,), torch.inf, dtype=torch.float64))
        whole = _Parts(
            query.lower[None], query.upper[None],
            tuple(torch.zeros(1, width, dtype=torch.int8) for width in self.bounder.widths),
            torch.full((1, count), -torch.inf, dtype=torch.float64), torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        self.open = [whole]

    def run(self) -> Answer:
        answer, climbed, due = self.answer, False, 0
        if not bool(torch.isfinite(self.bounder.pad).all()):  # bounds overflow: nothing can be refuted
            answer.open, answer.margins = 1, torch.full_like(answer.margins, -torch.inf)
            return answer
        while self.open and answer.parts < self.budget:
            if answer.parts >= CLIMB_AFTER and not climbed:
                climbed = True
                if self._climbed():
                    answer.found = True
                    break
            parts = self._taken()
            answer.parts += len(parts)
            linear, states = self.bounder(parts)
            margins = torch.maximum(parts.margins, self._of_conjunctions(linear.least))
            parts = _Parts(parts.lower, parts.upper, states, margins, parts.depth)
            if self._tried(parts, linear):
                answer.found = True
                self._close(parts.margins)
                break
            parts, linear = self._clipped(parts, linear)
            if len(parts):
                self._split(parts, linear)
            if answer.parts >= due or not self.open:
                answer.trace.append((answer.parts, self._bound()))
                due = 2 * answer.parts
        answer.open += sum(map(len, self.open))
        for parts in self.open:
            self._close(parts.margins)
        return answer

    def _bound(self) -> float:
        """The least margin over all parts, open and closed."""
        worst = [parts.margins.amin() for parts in self.open]
        return float(torch.stack([self.answer.margins.amin(), *worst]).amin())

    def _taken(self) -> _Parts:
        """Parts from the end of the stack, no more than a batch and than the budget allows."""
        wanted, found, count = min(self.batch, self.budget - self.answer.parts), [], 0
        while self.open and count < wanted:
            parts = self.open.pop()
            if count + len(parts) > wanted:
                left = len(parts) - (wanted - count)
                self.open.append(parts[:left])
                parts = parts[left:]
            found.append(parts)
            count += len(parts)
        return _Parts.joined(found)

    def _of_conjunctions(self, rows: Tensor) -> Tensor:
        """The largest over the rows of each conjunction: (parts, conjunctions)."""
        found = torch.full((len(rows), self.count), -torch.inf, dtype=rows.dtype)
        return found.scatter_reduce_(1, self.query.owners.expand_as(rows), rows, "amax")

    def _rows_of(self, conjunctions: Tensor) -> Tensor:
        """Of each row what holds of its conjunction. (parts, conjunctions) -> (parts, rows)."""
        return conjunctions[:, self.query.owners]

    def _close(self, margins: Tensor) -> None:
        """Note the margins of parts that are looked at no more; infinite: nothing is asked there."""
        if len(margins):
            self.answer.margins = torch.minimum(self.answer.margins, margins.amin(0))

    def _violations(self, points: Tensor) -> Tensor:
        """(points, conjunctions): the largest c_k.f - b_k of each conjunction, up to rounding; unsafe where <= 0."""
        return self._of_conjunctions(self.bounder.rows(points))

    def _judged(self, points: Tensor, violations: Tensor) -> bool:
        """Whether one of the most promising points is accepted. violations: (points, conjunctions)."""
        for place in violations.flatten().argsort()[:_CANDIDATES].tolist():
            point, conjunction = divmod(place, violations.shape[1])
            if not violations[point, conjunction] <= 0:
                return False
            if self.judge(points[point], conjunction):
                return True
        return False

    def _tried(self, parts: _Parts, linear: _Linear) -> bool:
        """Whether a point of the open parts is accepted: their centres, and the corners where a row is least."""
        open_ = parts.margins <= 0
        rows = self._rows_of(open_)
        # One corner a part: that of the open row with the largest lower bound, the hardest one to meet.
        hardest = torch.where(rows, linear.least, -torch.inf).argmax(1)
        a = linear.a[torch.arange(len(parts)), hardest]
        corner = torch.where(a > 0, parts.lower, parts.upper)
        points = torch.cat([parts.lower / 2 + parts.upper / 2, corner])
        return self._judged(points, torch.where(open_.repeat(2, 1), self._violations(points), torch.inf))

    def _climbed(self) -> bool:
        """Whether a wandering point is accepted; see above."""
        lower, width = self.query.lower, self.query.upper - self.query.lower
        generator = torch.Generator().manual_seed(self.seed)
        x = lower + torch.rand(DRAWN, len(lower), generator=generator, dtype=lower.dtype) * width
        violations = self._violations(x)
        # Each conjunction has points of its own, or the easiest one would get them all.
        of = max(1, WANDERING // violations.shape[1])
        nearest = violations.argsort(dim=0)[:of].T.flatten()
        conjunction = torch.arange(violations.shape[1]).repeat_interleave(of)[:, None]
        x, v = x[nearest], violations[nearest].gather(1, conjunction)
        for step in range(STEPS):
            moved = torch.randn(x.shape, generator=generator, dtype=x.dtype) * (FIRST_STEP * SHRINK**step) * width
            candidate = torch.minimum(torch.maximum(x + moved, lower), self.query.upper)
            w = self._violations(candidate).gather(1, conjunction)
            x, v = torch.where(w < v, candidate, x), torch.minimum(v, w)
            for place in (v[:, 0] <= 0).nonzero()[:_CANDIDATES, 0].tolist():
                if self.judge(x[place], int(conjunction[place])):
                    return True
                v[place] = torch.inf  # met in float64 alone: from there it would not move again
        return False

    def _clipped(self, parts: _Parts, linear: _Linear) -> tuple[_Parts, _Linear]:
        """The open parts, cut to what their linear bounds leave of them.

        On {x in part: a x + d <= 0} an input is within -least / |a_j| of the end at which a x is least.
        """
        reach = -linear.least[:, :, None] / linear.a.abs() * (1 + _OUTWARD[0])
        # Where a or the minimum says nothing (0, infinite), nothing is cut.
        reach = (
            torch.where(torch.isfinite(reach) & (linear.a != 0), reach, torch.inf) + _OUTWARD[1] * self.bounder.scale
        )
        low, high = parts.lower[:, None], parts.upper[:, None]
        upper = torch.where(linear.a > 0, torch.minimum(low + reach, high), high)
        lower = torch.where(linear.a < 0, torch.maximum(high - reach, low), low)
        # All rows of a conjunction at once; then the box around what its open conjunctions leave.
        owners = self.query.owners[None, :, None].expand_as(lower)
        lowers = low.expand(-1, self.count, -1).scatter_reduce(1, owners, lower, "amax")
        uppers = high.expand(-1, self.count, -1).scatter_reduce(1, owners, upper, "amin")
        empty = (lowers > uppers).any(2)
        open_ = (parts.margins <= 0) & ~empty
        # What is refuted here is not asked again in the parts of this part; where rows leave nothing together, no bound
        # of a single row says so.
        self._close(torch.where(open_, torch.inf, torch.where(empty, parts.margins.clamp(min=TOGETHER), parts.margins)))
        lower = torch.where(open_[:, :, None], lowers, torch.inf).amin(1)
        upper = torch.where(open_[:, :, None], uppers, -torch.inf).amax(1)
        still = open_.any(1)
        margins = torch.where(open_, parts.margins, torch.inf)
        return _Parts(lower, upper, parts.states, margins, parts.depth)[still], linear[still]

    def _split(self, parts: _Parts, linear: _Linear) -> None:
        """Halves of the parts, those with the least margins on top of the stack."""
        rows = self._rows_of(parts.margins <= 0)
        score = (linear.weight * rows[:, :, None]).sum(1) * (parts.upper - parts.lower)
        middle = parts.lower / 2 + parts.upper / 2
        divisible = (parts.lower < middle) & (middle < parts.upper)
        score = torch.where(divisible, score, -1.0)
        whole = ~divisible.any(1)
        if bool(whole.any()):  # a point, as far as float64 can tell: it stays open
            self._close(parts.margins[whole])
            self.answer.open += int(whole.sum())
        order = parts.margins.amin(1).argsort(descending=True)
        order = order[~whole[order]]
        if not len(order):
            return
        parts, score = parts[order], score[order]
        inputs = 3 if len(parts) * 8 <= FEW else 2 if len(parts) * 4 <= FEW else 1
        along = score.topk(min(inputs, score.shape[1]), dim=1)
        for place in range(along.values.shape[1]):
            if place and not bool((along.values[:, place] > 0).all()):
                break  # of some part no other input can be halved, or matters
            times = 2**place
            parts = _halved(parts, along.indices[:, place].repeat(times))
        self.answer.deepest = max(self.answer.deepest, int(parts.depth.max()))
        self.open.append(parts)


def _halved(parts: _Parts, along: Tensor) -> _Parts:
    """Two halves of each part, all lower ones first. along: (parts,), the input that is halved."""
    each = torch.arange(len(parts))
    middle = parts.lower[each, along] / 2 + parts.upper[each, along] / 2
    upper, lower = parts.upper.clone(), parts.lower.clone()
    upper[each, along], lower[each, along] = middle, middle
    one = _Parts(parts.lower, upper, parts.states, parts.margins, parts.depth + 1)
    two = _Parts(lower, parts.upper, parts.states, parts.margins, parts.depth + 1)
    return _Parts.joined([one, two])
