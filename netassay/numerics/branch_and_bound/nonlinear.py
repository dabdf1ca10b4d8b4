"""Splitting what any nonlinear operation reads, until linear bounds refute each part or one shows a way out.

    unsafe in B  <=  an x in B and a conjunction of B with  c_k.f(x) <= b_k  for all its constraints k

A neuron is a number z_j that a ReLU, an elementwise function or a product reads. A part of the box B is
{x in B : l_j <= z_j(x) <= u_j for all j}; it is split at a point p of one neuron's interval, z_j <= p and z_j >= p.
Over narrower intervals the lines and planes of `netassay.numerics.bounds.relaxations` lie nearer to the functions, and
for weights w >= 0 of the constraints and any beta, positive against an upper end and negative against a lower one,

    min over part of  sum_k w_k (c_k.f - b_k)   >=
    min over B of  the same + sum_j beta_j (z_j - e_j),      e_j = u_j where beta_j > 0, l_j where beta_j < 0,

since beta_j (z_j - e_j) <= 0 on the part; a backward pass bounds the right side from below. beta_j is 0 but for ends
that were split. Where the network's input itself is read, its interval narrows the box instead. A conjunction is
refuted on a part where its bound is above 0; a part's bound is the larger of its own and its parent's, so that the
least bound of all open parts never falls. Parts with the least bounds are taken first, a batch at a time.

What climbs, by a few steps of Adam: beta, w, and for each neuron where its lines lie among the useful ones. Of ReLU
that is the slope of the lower line; of a function, its lines are a mean of two of `FRACTIONS` proven ones, whose slopes
go from the least derivative over that of the smallest area to the largest derivative; of a product, the plane between
McCormick's two on either side. All of these are sound for every choice, so a search in them needs no proof.

Which neuron is split (`heuristic`):
* "bbps": by the bounds of both halves, as they would be with all other lines kept: the halves' new lines of the neuron
  change its coefficient by d, and d z_j is bounded over B by the linear bounds of z_j that the root had (the shortcut;
  Shi et al., section 3.2), with some multipliers of the split tried, or over the half of its interval, whichever is
  best;
* "babsr": |A| times the gap between the function and the line that A takes, at the point of the split;
* "width": the widest interval among the neurons whose lines are not exact.
And where (`points`): "optimised" from `relaxations.branching_point`, or "midpoint". ReLUs are always split at 0, and
the factors of a product at the middle.

Bounds of neurons begin as those of CROWN over the whole box. Those of a half are cut with the split, and what lies
behind the split neuron is bounded anew by intervals and by a backward pass with the half's lines.

The points where linear bounds are least are tried as counterexamples, after a few steps of descent from them.

Rounding: Adam works in float32. Every part's bound is then computed in float64, with lines of the same slopes, and
`rounding` is taken off, that of every z_j that beta multiplies included. All bounds hold in real arithmetic.

Reference: Shi, Jin, Kolter, Jana, Hsieh, Zhang. Neural network verification with branch-and-bound for general
nonlinearities. 2024.
Reference: Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter. Beta-CROWN: efficient bound propagation with per-neuron split
constraints for neural network robustness verification. 2021.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Activation, Graph, Operation, Product, Relu
from netassay.numerics.bounds import backward, interval, optimised, relaxations, rounding
from netassay.numerics.bounds.backward import Block, Lines, Planes, Relaxation
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import operations, weights
from netassay.numerics.bounds.regions import Box
from netassay.numerics.branch_and_bound.inputs import TOGETHER, Answer, Query
from netassay.numerics.branch_and_bound.pool import Pool

if TYPE_CHECKING:
    from torch import Tensor

#: Adam: rates of what chooses lines, of beta and of w, and by what they shrink a step.
RATE, MULTIPLIERS, SHRINK = 0.05, 0.1, 0.93
#: Of a function, slopes of the lines between which means are taken, from the best one (0) to the least (-1) and the
#: largest (1) derivative: as a share of the way.
FRACTIONS = (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)
#: Numbers in one tensor of a batch: wide networks have smaller ones.
NUMBERS = 2**22
#: Coefficients that a backward pass over hidden values of a batch may have; above it intervals alone must do.
REFRESHED = 2**24
#: Neurons whose halves are estimated.
CANDIDATES = 64
#: Narrower intervals are not split.
NARROWEST = 1e-9
#: Steps of descent from the points where bounds are least, and points of a batch that are handed to the judge.
DESCENT, JUDGED = 4, 4
#: Multipliers of a split that its estimate tries, as shares of the neuron's coefficient.
SHARES = (0.0, 0.3, 1.0)
#: What the better half's estimate adds to the worse one's.
SECOND = 0.5
#: What the gap of its lines adds to the estimates of a neuron: it decides where these see no difference.
GAPS = 0.1


@dataclass(frozen=True)
class Options:
    """steps: of Adam for a part; 0: the lines of the smallest area. batch: parts that are split at once."""

    heuristic: Literal["bbps", "babsr", "width"] = "bbps"
    points: Literal["optimised", "midpoint"] = "optimised"
    steps: int = 20
    batch: int = 32


def search(
    graph: Graph,
    query: Query,
    judge: Callable[[Tensor, int], bool],
    budget: int,
    block: Block | None = None,
    options: Options | None = None,
) -> Answer:
    """Split until all conjunctions are refuted, a point is accepted, or `budget` parts were bounded.

    judge(point, conjunction): whether a point of the box, (inputs,), float64, is unsafe; it is asked about points at
    which a float32 evaluation meets the conjunction, a few of each batch. block: what is known of the whole box, one
    box, float64; else its hidden values are bounded here. The same arguments give the same answer.

    margins of the answer: of each conjunction the least bound of its parts, in units of the query's rows; its trace:
    (parts, the least bound of the open parts, or where there are none, of all), never falling.
    """
    with torch.no_grad():
        return _Search(graph, query, judge, budget, block, options or Options()).run()


# --- what all parts share ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Site:
    """A value that nonlinear operations read. start, end: its neurons in the numbering of all. readers: numbers of the
    operations.
    """

    name: str
    start: int
    end: int
    readers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Table:
    """The lines between which a function's are chosen, (nodes, batch, *shape) each: slopes and intercepts below and
    above.
    """

    lower: tuple[Tensor, Tensor]
    upper: tuple[Tensor, Tensor]


class _Problem:
    """What all parts of a box share. Neurons are numbered through, and so are the numbers that nonlinear operations
    give: `steps` are these operations, `places` where the numbers of each begin and end.
    """

    def __init__(self, graph: Graph, query: Query, block: Block | None) -> None:
        self.graph, self.query = graph, query
        shape = (1, *graph.input_shape)
        self.box = Box(query.lower.reshape(shape), query.upper.reshape(shape))
        self.root = block or backward.relaxed(graph, self.box, refine=_refiner(graph, self.box))
        self.whole = interval.propagate(graph, self.box)
        self.weights = weights(graph, torch.float64)
        self.steps = [op for op in operations(graph) if isinstance(op, Relu | Activation | Product)]
        ends = torch.tensor([0, *(math.prod(op.shape) for op in self.steps)]).cumsum(0).tolist()
        self.places = list(itertools.pairwise(ends))
        self.numbers = ends[-1]
        self.sites: dict[str, _Site] = {}
        start = 0
        order = [graph.input, *(op.target for op in operations(graph))]
        for name in order:
            readers = tuple(k for k, op in enumerate(self.steps) if name in op.sources)
            if readers:
                size = math.prod(graph.shape_of(name))
                self.sites[name] = _Site(name, start, start + size, readers)
                start += size
        self.neurons = start
        self.lost = self.flat({name: self.root.rounding[name] for name in self.sites})[0]
        self.lost_output = self.root.rounding[graph.output].flatten()
        self.largest_output = self.root.values[graph.output].magnitude().flatten()
        #: Of each function, by how much a line may rise: `rounding` knows nothing of steeper ones.
        self.steepest = {
            op.target: rounding.steepness(op, self.whole[op.source]) for op in self.steps if isinstance(op, Activation)
        }
        count, most = int(query.owners.max()) + 1, int(torch.bincount(query.owners).max())
        # Rows of each conjunction, its first again where it has fewer: (conjunctions, rows).
        found = [(query.owners == number).nonzero()[:, 0] for number in range(count)]
        self.of = torch.stack([torch.cat([p, p[:1].expand(most - len(p))]) for p in found])

    # Numbers as tensors of a shape, and back.

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values by site as (parts, neurons)."""
        return torch.cat([values[name].flatten(1) for name in self.sites], 1)

    def shaped(self, flat: Tensor) -> dict[str, Tensor]:
        """(parts, neurons) as values by site."""
        return {
            name: flat[:, site.start : site.end].unflatten(1, self.graph.shape_of(name))
            for name, site in self.sites.items()
        }

    def chosen(self, flat: Tensor) -> dict[str, Tensor]:
        """(parts, numbers) by operation's target."""
        return {
            op.target: flat[:, start:end].unflatten(1, op.shape)
            for op, (start, end) in zip(self.steps, self.places, strict=True)
        }

    def rows(self, conjunction: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k w_k c_k, (parts, outputs), and sum_k w_k b_k, (parts,)."""
        of = self.of[conjunction]
        c, b = self.query.rows.to(w.dtype)[of], self.query.bound.to(w.dtype)[of]
        return (w[:, :, None] * c).sum(1), (w * b).sum(1)

    def rows_lost(self, conjunction: Tensor, w: Tensor) -> Tensor:
        """What rounding may add to a bound of these rows less their b: (parts,)."""
        of = self.of[conjunction]
        size = (w[:, :, None] * self.query.rows[of].abs()).sum(1)
        # The sums over k are rounded themselves, in proportion to what they add up.
        added = size @ self.largest_output + (w * self.query.bound[of].abs()).sum(1)
        return 2 * size @ self.lost_output + 4 * rounding.gamma(w.shape[1] + 8, torch.float64) * added

    def values(self, low: Tensor, up: Tensor) -> dict[str, Interval]:
        ends = zip(self.shaped(low).items(), self.shaped(up).values(), strict=True)
        return {name: Interval(lower, upper) for (name, lower), upper in ends}

    def region(self, low: Tensor, up: Tensor) -> Box:
        """The inputs of parts: those of the box, but where the input itself is split."""
        site = self.sites.get(self.graph.input)
        if site is None:
            return self.box
        shape = self.graph.input_shape
        return Box(*(end[:, site.start : site.end].unflatten(1, shape) for end in (low, up)))

    def table(self, op: Activation, x: Interval) -> _Table:
        """Lines of a function over x, between which its own are chosen: none steeper than `rounding` knows of."""
        steepest = self.steepest[op.target].expand(x.lower.shape)
        limit = torch.where(torch.isfinite(steepest), steepest, 0.0)
        # Most parts have most intervals in common.
        each, back = torch.unique(torch.stack([v.flatten() for v in (x.lower, x.upper, limit)], 1), dim=0,
                                  return_inverse=True)  # fmt: skip
        low, up, limit = each.unbind(1)
        best = relaxations.lines(op.function, op.parameters, low, up)
        ends = relaxations.derivative(op.function, op.parameters, low, up)
        slopes = [
            torch.maximum(
                torch.minimum(torch.stack([_moved(slope, *ends, share) for share in FRACTIONS]), limit), -limit
            )
            for slope in (best.lower_slope, best.upper_slope)
        ]
        found = relaxations.lines_with_slopes(op.function, op.parameters, low, up, *slopes)
        below, above = (
            (slope[:, back].unflatten(1, x.lower.shape), intercept[:, back].unflatten(1, x.lower.shape))
            for slope, intercept in zip(slopes, (found.lower_intercept, found.upper_intercept), strict=True)
        )
        return _Table(below, above)


def _moved(best: Tensor, least: Tensor, largest: Tensor, share: float) -> Tensor:
    """A slope on the way from the best to the least (share below 0) or the largest."""
    moved = best + abs(share) * ((least if share < 0 else largest) - best)
    return torch.where(torch.isfinite(moved), moved, best)


def _refiner(graph: Graph, box: Box) -> backward.Refine | None:
    return optimised.refiner(graph, box) if any(isinstance(op, Relu) for op in operations(graph)) else None


# --- bounds of parts --------------------------------------------------------------------------------------------------


class _Parts:
    """A batch of parts, with lines over their intervals.

    low, up: (parts, neurons), float64, low <= up. sides: int8, 1 where the lower end was split, 2 the upper, 3 both.
    """

    def __init__(self, problem: _Problem, conjunction: Tensor, low: Tensor, up: Tensor, sides: Tensor) -> None:
        self.problem, self.conjunction, self.low, self.up, self.sides = problem, conjunction, low, up, sides
        self.values = problem.values(low, up)
        self.box = problem.region(low, up)
        self.region = {dtype: optimised.region_in(self.box, dtype) for dtype in (torch.float32, torch.float64)}
        self.tables: dict[str, _Table] = {}
        self.relus: dict[str, Lines] = {}
        self.planes: dict[str, tuple[Planes, Planes]] = {}
        for op in problem.steps:
            x = self.values[op.source]
            match op:
                case Relu():
                    of = Lines.of(x)
                    self.relus[op.target] = Lines(
                        of.alpha.to(torch.float32), of.slope.to(torch.float32), of.intercept.to(torch.float32)
                    )
                case Activation():
                    table = problem.table(op, x)
                    (a, b), (c, d) = table.lower, table.upper
                    self.tables[op.target] = _Table(
                        (a.to(torch.float32), b.to(torch.float32)), (c.to(torch.float32), d.to(torch.float32))
                    )
                case Product():
                    self.planes[op.target] = self._plane(op, 0.0, torch.float32), self._plane(op, 1.0, torch.float32)

    def _plane(self, op: Product, t: Tensor | float, dtype: torch.dtype, s: Tensor | float | None = None) -> Planes:
        x, y = self.values[op.source], self.values[op.other]
        p = relaxations.mccormick(x.lower, x.upper, y.lower, y.upper, t, s)
        found = Planes((p.lower_x, p.lower_y, p.lower_constant), (p.upper_x, p.upper_y, p.upper_constant))
        return optimised.in_dtype({"": found}, dtype)[""]  # type: ignore[return-value]

    def usual(self) -> Tensor:
        """The choice of the lines of the smallest area, of adaptive slopes of ReLUs: (parts, 2, numbers)."""
        choice = torch.full((len(self.low), 2, self.problem.numbers), 0.5)
        for op, (start, end) in zip(self.problem.steps, self.problem.places, strict=True):
            if isinstance(op, Relu):
                choice[:, 0, start:end] = self.relus[op.target].alpha.flatten(1)
        return choice

    def lines(self, choice: Tensor) -> dict[str, Relaxation]:
        """The chosen lines, in float32: differentiable. choice: (parts, 2, numbers), in [0, 1]."""
        below, above = (self.problem.chosen(choice[:, side]) for side in (0, 1))
        found: dict[str, Relaxation] = {}
        for op in self.problem.steps:
            t, s = below[op.target], above[op.target]
            match op:
                case Relu():
                    of = self.relus[op.target]
                    alpha = torch.where(of.intercept > 0, t, of.alpha)
                    found[op.target] = Lines(alpha, of.slope, of.intercept)
                case Activation():
                    table = self.tables[op.target]
                    (a, b), (c, d) = _mean(table.lower, t), _mean(table.upper, s)
                    found[op.target] = Lines(a, c, d, b)
                case Product():
                    zero, one = self.planes[op.target]
                    found[op.target] = Planes(
                        tuple(t * q + (1 - t) * p for p, q in zip(zero.below, one.below, strict=True)),  # type: ignore[arg-type]
                        tuple(s * q + (1 - s) * p for p, q in zip(zero.above, one.above, strict=True)),  # type: ignore[arg-type]
                    )
        return found

    def proven_lines(self, choice: Tensor) -> dict[str, Relaxation]:
        """Lines of the same slopes in float64, with intercepts proven for them."""
        problem = self.problem
        below, above = (problem.chosen(choice[:, side].double()) for side in (0, 1))
        found: dict[str, Relaxation] = {}
        for op in problem.steps:
            x, t, s = self.values[op.source], below[op.target], above[op.target]
            match op:
                case Relu():
                    of = Lines.of(x)
                    found[op.target] = Lines(torch.where(of.intercept > 0, t, of.alpha), of.slope, of.intercept)
                case Activation():
                    steepest = problem.steepest[op.target]
                    limit = torch.where(torch.isfinite(steepest), steepest, 0.0)
                    table = self.tables[op.target]
                    slopes = [
                        torch.maximum(torch.minimum(_mean(of, share.to(torch.float32))[0].double(), limit), -limit)
                        for of, share in ((table.lower, t), (table.upper, s))
                    ]
                    proven = relaxations.lines_with_slopes(op.function, op.parameters, x.lower, x.upper, *slopes)
                    found[op.target] = Lines(
                        proven.lower_slope, proven.upper_slope, proven.upper_intercept, proven.lower_intercept
                    )
                case Product():
                    found[op.target] = self._plane(op, t, torch.float64, s)
        return found

    def ends(self, beta: Tensor) -> Tensor:
        """Of each multiplier the end that it is paid at; where it is 0, one whose side was split."""
        low, up = self.low.to(beta.dtype), self.up.to(beta.dtype)
        still = torch.where(self.sides == 1, low, torch.where(self.sides == 2, up, (low + up) / 2))
        return torch.where(beta > 0, up, torch.where(beta < 0, low, still))

    def bound(
        self, lines: Mapping[str, Relaxation], beta: Tensor, w: Tensor, caught: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(parts,) bounds and (parts, inputs) coefficients, in the dtype of beta, (parts, neurons)."""
        problem = self.problem
        rows, constant = problem.rows(self.conjunction, w)
        row = backward.walk(
            problem.graph, rows[:, None].unflatten(2, problem.graph.output_shape), problem.graph.output, lines,
            added=problem.shaped(beta), caught=caught,
        )  # fmt: skip
        a = row.a.flatten(2).expand(len(self.low), -1, -1)
        least = (row.d + self.region[beta.dtype].minimum(a))[:, 0]
        return least - constant - (beta * self.ends(beta)).sum(1), a[:, 0]

    def proved(self, choice: Tensor, beta: Tensor, w: Tensor) -> Tensor:
        """Bounds in real arithmetic: float64, rounding taken off. (parts,)."""
        beta, w = beta.double(), w.double()
        value, _ = self.bound(self.proven_lines(choice), beta, w)
        lost = self.problem.rows_lost(self.conjunction, w) + 2 * beta.abs() @ self.problem.lost
        lost += 2 * rounding.gamma(self.problem.neurons + 16, torch.float64) * (beta * self.ends(beta)).abs().sum(1)
        value = value - lost
        # sum_k w_k (c_k.f - b_k) is at most sum_k w_k times the largest of these, and the weights are rounded.
        slack = 2 * rounding.gamma(w.shape[1] + 4, torch.float64)
        value = torch.where(value < 0, value / w.sum(1).clamp(max=1) * (1 + slack), value * (1 - slack))
        return torch.where(torch.isfinite(value), value, -torch.inf)


def _mean(lines: tuple[Tensor, Tensor], share: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the two lines of a table, (nodes, batch, *shape), that lie about a share of the way from its first to
    its last: its slope and intercept.
    """
    nodes = len(lines[0])
    number = torch.arange(nodes, dtype=share.dtype).reshape(-1, *[1] * share.dim())
    parts = (1 - (share * (nodes - 1) - number).abs()).clamp(min=0)
    return (parts * lines[0]).sum(0), (parts * lines[1]).sum(0)


@dataclass(frozen=True, eq=False)
class _Climbed:
    """The best bounds of parts that Adam met, in float32, with what gives them. coefficients: (parts, numbers), of what
    nonlinear operations give; corner: (parts, inputs), of the inputs.
    """

    bound: Tensor
    choice: Tensor
    beta: Tensor
    weights: Tensor
    coefficients: Tensor
    corner: Tensor


def _climbed(parts: _Parts, choice: Tensor, beta: Tensor, w: Tensor, steps: int) -> _Climbed:
    start = {"choice": choice, "beta": beta, "weights": w}
    names = ["choice", "beta"] + ["weights"] * (w.shape[1] > 1)
    with torch.enable_grad():
        leaves = {name: start[name].clone().requires_grad_() for name in names}
        groups = [{"params": [leaf], "lr": RATE if name == "choice" else MULTIPLIERS} for name, leaf in leaves.items()]
        optimiser = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, SHRINK)
        best: dict[str, Tensor] = {}
        for step in range(steps + 1):
            caught: dict[str, Tensor] = {}
            now = {**start, **leaves}
            # Along the simplex: Adam knows signs only, and steps of one sign for all would leave no weight but 0.
            along = now["weights"] / now["weights"].sum(1, keepdim=True)
            value, a = parts.bound(parts.lines(now["choice"]), now["beta"], along, caught)
            with torch.no_grad():
                of = torch.cat([caught[op.target].expand(len(value), *caught[op.target].shape[1:]).flatten(1)
                                for op in parts.problem.steps], 1)  # fmt: skip
                met = {"bound": value, "coefficients": of, "corner": a, **now}
                better = value > best["bound"] if best else torch.ones_like(value, dtype=torch.bool)
                for name, found in met.items():
                    which = better.reshape(-1, *[1] * (found.dim() - 1))
                    best[name] = torch.where(which, found, best[name]) if name in best else found.detach().clone()
            if step == steps or not value.requires_grad:
                break
            optimiser.zero_grad()
            (-value.sum()).backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                leaves["choice"].clamp_(0, 1)
                _signed(leaves["beta"], parts.sides)
                if "weights" in leaves:
                    kept = leaves["weights"].clamp_(min=0)
                    total = kept.sum(1, keepdim=True)
                    kept.copy_(torch.where(total > 1e-6, kept / total, 1 / kept.shape[1]))
    return _Climbed(**best)


def _signed(beta: Tensor, sides: Tensor) -> None:
    """Multipliers of ends that were not split become 0."""
    beta.copy_(
        torch.where((sides & 2) > 0, beta.clamp(min=0), 0.0) + torch.where((sides & 1) > 0, beta.clamp(max=0), 0.0)
    )


def _refreshed(problem: _Problem, low: Tensor, up: Tensor, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals of neurons bounded anew behind neuron `after`, and of which parts nothing is left: low, up, empty."""
    values = {problem.graph.input: Interval(*problem.region(low, up).box())}
    known, lines = problem.values(low, up), {}
    empty = torch.zeros(len(low), dtype=torch.bool)
    widest = max(
        math.prod(shape) for shape in (problem.graph.input_shape, *(op.shape for op in operations(problem.graph)))
    )
    region = problem.region(low, up)
    last = max(site.start for site in problem.sites.values())
    if problem.graph.input in problem.sites:
        values[problem.graph.input] = known[problem.graph.input]
    for op in operations(problem.graph):
        target = op.target
        x = interval.step(op, values, problem.weights[target])
        if (line := backward.relaxation(op, values, problem.whole)) is not None:
            lines[target] = line
        if target in problem.sites:
            site = problem.sites[target]
            x = Interval(x.lower.expand_as(known[target].lower), x.upper.expand_as(known[target].upper))
            x = x.intersect(known[target].lower, known[target].upper)
            if site.start > after and lines and 2 * x.lower.numel() * widest <= REFRESHED:
                every = torch.ones_like(x.lower, dtype=torch.bool)
                slack = problem.root.rounding[target].expand_as(x.lower)
                for which, rows in backward.unit_rows(problem.graph, target, every, len(low), torch.float64):
                    row = backward.walk(problem.graph, rows, target, lines)
                    x = backward.cut(x, which, row.d + region.minimum(row.a.flatten(2)), slack, every)
            crossed = x.lower > x.upper
            empty |= crossed.flatten(1).any(1)
            middle = (x.lower + x.upper) / 2
            x = Interval(torch.where(crossed, middle, x.lower), torch.where(crossed, middle, x.upper))
            if site.start >= last:
                values[target] = x
                break
        values[target] = x
    flat = [problem.flat({name: getattr(values[name], end) for name in problem.sites}) for end in ("lower", "upper")]
    return flat[0], flat[1], empty


# --- where to split ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Shortcuts:
    """Linear bounds of neurons over the whole box: lower x + lower_constant <= z <= upper x + upper_constant, float32.

    lower, upper: (neurons, inputs).
    """

    lower: Tensor
    lower_constant: Tensor
    upper: Tensor
    upper_constant: Tensor

    @classmethod
    def of(cls, problem: _Problem) -> _Shortcuts:
        graph, parts = problem.graph, []
        lines = optimised.in_dtype(problem.root.lines, torch.float32)
        for name, site in problem.sites.items():
            if name == graph.input:
                one = torch.eye(site.end - site.start)
                parts.append((one, torch.zeros(len(one)), one, torch.zeros(len(one))))
                continue
            every = torch.ones(1, *graph.shape_of(name), dtype=torch.bool)
            for _, rows in backward.unit_rows(graph, name, every, 1, torch.float32):
                row = backward.walk(graph, rows, name, lines)
                (below, above), (d, e) = row.a[0].flatten(1).chunk(2), row.d[0].chunk(2)
                parts.append((below, d, -above, -e))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def least(self, neuron: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """A lower bound of a z as coefficients of the inputs, (..., inputs), and a constant. neuron, a: (...)."""
        positive, negative = a.clamp(min=0), a.clamp(max=0)
        linear = positive[..., None] * self.lower[neuron] + negative[..., None] * self.upper[neuron]
        return linear, positive * self.lower_constant[neuron] + negative * self.upper_constant[neuron]


@dataclass(frozen=True, eq=False)
class _Change:
    """What new lines of neurons change in linear bounds: the constant and the neuron's coefficient; size: how large the
    coefficient of the lines is then, (n, 2) each. other: None, or the numbers, (n,), of the factors of products that
    the planes multiply too, the changes of their coefficients and their intervals.
    """

    constant: Tensor
    change: Tensor
    size: Tensor
    other: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None


class _Splitter:
    """Chooses the neuron of each part that is split, and where."""

    def __init__(self, problem: _Problem, options: Options) -> None:
        self.problem, self.options = problem, options
        self.inputs = math.prod(problem.graph.input_shape)
        known = options.heuristic == "bbps" and problem.neurons * self.inputs <= 4 * NUMBERS
        #: Where there are too many of them for shortcuts, "bbps" is "babsr".
        self.shortcuts = _Shortcuts.of(problem) if known else None

    def __call__(self, parts: _Parts, best: _Climbed) -> tuple[Tensor, Tensor]:
        """neuron, -1 where there is none to split, and point: (parts,) each."""
        point, free = self._points(parts)
        lines = parts.lines(best.choice)
        if self.options.heuristic == "width":
            score = parts.up - parts.low
        else:
            score = self._gaps(parts, best, lines, point).double()
        score = torch.where(free, score, -torch.inf)
        neuron = score.argmax(1)
        if self.shortcuts is not None:
            few = max(1, min(CANDIDATES, score.shape[1], NUMBERS // (2 * self.inputs * len(score))))
            top = score.topk(few, dim=1)
            at = point.gather(1, top.indices)
            estimates = self._estimates(parts, best, lines, top.indices, at).clamp(max=0)
            low, high = estimates.amin(2), estimates.amax(2)
            merit = torch.where(
                top.values > -torch.inf, low + SECOND * high + GAPS * top.values.clamp(min=0), -torch.inf
            )
            neuron = top.indices.gather(1, merit.argmax(1, keepdim=True))[:, 0]
        none = ~free.any(1)
        return torch.where(none, -1, neuron), point.gather(1, neuron[:, None])[:, 0]

    def _points(self, parts: _Parts) -> tuple[Tensor, Tensor]:
        """Where each neuron would be split, and whether it may be: (parts, neurons)."""
        problem, points, frees = self.problem, {}, {}
        for name, site in problem.sites.items():
            x = parts.values[name]
            middle = x.lower / 2 + x.upper / 2
            wide = (x.upper - x.lower > NARROWEST * (1 + x.magnitude())) & (middle > x.lower) & (middle < x.upper)
            point, free = middle, torch.zeros_like(wide)
            readers = [problem.steps[number] for number in site.readers]
            for op in readers:
                if isinstance(op, Activation) and self.options.points == "optimised":
                    point = relaxations.branching_point(op.function, op.parameters, x.lower, x.upper)
                free |= wide & (not isinstance(op, Relu))
            if any(isinstance(op, Relu) for op in readers):
                kinked = (x.lower < 0) & (x.upper > 0)
                point, free = torch.where(kinked, 0.0, point), free | kinked
            points[name] = torch.where((point > x.lower) & (point < x.upper), point, middle)
            frees[name] = free
        return problem.flat(points), problem.flat(frees)

    def _gaps(self, parts: _Parts, best: _Climbed, lines: Mapping[str, Relaxation], point: Tensor) -> Tensor:
        """What the lines of a neuron's readers cost the bound at the point, at most: (parts, neurons)."""
        problem = self.problem
        at, coefficients = problem.shaped(point.to(torch.float32)), problem.chosen(best.coefficients)
        cost = {name: torch.zeros_like(value) for name, value in at.items()}
        for op in problem.steps:
            line, a, given = lines[op.target], coefficients[op.target], [at[name] for name in op.sources]
            value = evaluate.apply(op, *given)
            if isinstance(line, Lines):
                below = line.alpha * given[0] + (0.0 if line.below is None else line.below)
                above = line.slope * given[0] + line.intercept
            else:
                below, above = (p[0] * given[0] + p[1] * given[1] + p[2] for p in (line.below, line.above))
            of = a.clamp(min=0) * (value - below).clamp(min=0) - a.clamp(max=0) * (above - value).clamp(min=0)
            for name in set(op.sources):
                cost[name] = cost[name] + of.nan_to_num(nan=0.0, posinf=1e30)
        return problem.flat(cost)

    def _estimates(
        self, parts: _Parts, best: _Climbed, lines: Mapping[str, Relaxation], neuron: Tensor, point: Tensor
    ) -> Tensor:
        """Bounds of both halves, with new lines of the neuron alone: (parts, candidates, 2)."""
        problem, known = self.problem, self.shortcuts
        assert known is not None
        low, up = parts.low.gather(1, neuron), parts.up.gather(1, neuron)
        start, end = torch.stack([low, point], 2), torch.stack([point, up], 2)
        constant, inside = torch.zeros(start.shape), torch.zeros(start.shape)
        # Of the neuron itself: the change of its coefficient, and what this is then.
        own, size = torch.zeros(start.shape), torch.zeros(start.shape)
        linear = torch.zeros(*start.shape, self.inputs)
        for op, (first, _) in zip(problem.steps, problem.places, strict=True):
            for role, name in enumerate(dict.fromkeys(op.sources)):
                site = problem.sites[name]
                i, j = ((neuron >= site.start) & (neuron < site.end)).nonzero(as_tuple=True)
                if not len(i):
                    continue
                place = neuron[i, j] - site.start
                a = best.coefficients[i, first + place]
                new = self._changes(parts, op, role, lines[op.target], i, place, start[i, j], end[i, j], a)
                constant[i, j] += new.constant
                inside[i, j] += new.constant + torch.minimum(new.change * start[i, j], new.change * end[i, j]).to(
                    torch.float32
                )
                own[i, j] += new.change
                size[i, j] += new.size
                if new.other is not None:
                    which, change, ends = new.other
                    moved, fixed = known.least(which[:, None], change)
                    linear[i, j] += moved
                    constant[i, j] += fixed
                    inside[i, j] += torch.minimum(change * ends[0], change * ends[1])
        region, value = parts.region[torch.float32], best.bound[:, None, None]
        d = (best.bound - region.minimum(best.corner[:, None])[:, 0])[:, None, None]
        found = value + inside
        side, at = torch.tensor([1.0, -1.0]), point.to(torch.float32)[:, :, None]
        for share in SHARES:
            beta = share * size * side
            moved, fixed = known.least(neuron[:, :, None], own + beta)
            whole = (best.corner[:, None, None] + linear + moved).flatten(1, 2)
            found = torch.maximum(found, d + constant + fixed - beta * at + region.minimum(whole).reshape(start.shape))
        return torch.maximum(found.nan_to_num(nan=-math.inf), value)

    def _changes(
        self, parts: _Parts, op: Operation, role: int, line: Relaxation, i: Tensor, place: Tensor,
        start: Tensor, end: Tensor, a: Tensor,
    ) -> _Change:  # fmt: skip
        """What new lines over [start, end], (n, 2), change. place, a: (n,), of what op gives."""
        problem = self.problem
        positive, negative = a.clamp(min=0)[:, None], a.clamp(max=0)[:, None]

        def old(v: Tensor) -> Tensor:
            return v.flatten(1)[i.clamp(max=len(v) - 1), place][:, None]

        if isinstance(line, Lines):
            if isinstance(op, Relu):
                of = Lines.of(Interval(start, end))
                new: tuple[Tensor, ...] = (of.alpha, torch.zeros_like(of.alpha), of.slope, of.intercept)
            else:
                assert isinstance(op, Activation)
                new = _smallest(op, start, end)
            alpha, below, slope, intercept = (v.to(torch.float32) for v in new)
            before = torch.zeros(len(a), 1) if line.below is None else old(line.below)
            size = positive * alpha + negative * slope
            change = size - positive * old(line.alpha) - negative * old(line.slope)
            constant = positive * (below - before) + negative * (intercept - old(line.intercept))
            return _Change(constant, change, size.abs(), None)
        assert isinstance(op, Product)
        square = op.source == op.other
        other = problem.sites[op.other if role == 0 else op.source].start + place
        theirs = (start, end) if square else tuple(v[i, other][:, None].expand_as(start) for v in (parts.low, parts.up))
        p = relaxations.mccormick(start, end, *theirs)
        new_below, new_above = (
            [v.to(torch.float32) for v in side]
            for side in ((p.lower_x, p.lower_y, p.lower_constant), (p.upper_x, p.upper_y, p.upper_constant))
        )
        mine, yours = (role, 1 - role) if not square else (0, 1)
        sizes = [positive * new_below[k] + negative * new_above[k] for k in range(3)]
        changes = [
            sizes[new] - positive * old(line.below[was]) - negative * old(line.above[was])
            for new, was in ((0, mine), (1, yours), (2, 2))
        ]
        if square:
            return _Change(changes[2], changes[0] + changes[1], (sizes[0] + sizes[1]).abs(), None)
        ends = theirs[0].to(torch.float32), theirs[1].to(torch.float32)
        return _Change(changes[2], changes[0], sizes[0].abs(), (other, changes[1], ends))


def _smallest(op: Activation, low: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """alpha, below, slope and intercept of the lines of smallest area."""
    pairs, back = torch.unique(torch.stack([low.flatten(), up.flatten()], 1), dim=0, return_inverse=True)
    of = relaxations.lines(op.function, op.parameters, *pairs.unbind(1))
    four = of.lower_slope, of.lower_intercept, of.upper_slope, of.upper_intercept
    return tuple(v[back].reshape(low.shape) for v in four)


# --- search -----------------------------------------------------------------------------------------------------------


class _Search:
    def __init__(
        self, graph: Graph, query: Query, judge: Callable[[Tensor, int], bool], budget: int, block: Block | None,
        options: Options,
    ) -> None:  # fmt: skip
        self.problem = _Problem(graph, query, block)
        self.judge, self.budget, self.options = judge, budget, options
        self.answer = Answer(torch.full((len(self.problem.of),), torch.inf, dtype=torch.float64))
        self.pool, self.splitter = Pool(), _Splitter(self.problem, options)
        inputs = math.prod(graph.input_shape)
        wide = 2 * (len(FRACTIONS) * self.problem.numbers + inputs)
        self.batch = max(1, min(options.batch, NUMBERS // wide))
        #: Of the parts that cannot be split: how many, and their least bound.
        self.stuck, self.stuck_at = 0, math.inf

    def run(self) -> Answer:
        answer, problem = self.answer, self.problem
        low, up = (problem.flat({name: getattr(problem.root.values[name], end) for name in problem.sites})
                   for end in ("lower", "upper"))  # fmt: skip
        most = problem.of.shape[1]
        due = 0
        for conjunction in torch.arange(len(problem.of)).split(2 * self.batch):
            if answer.parts + len(conjunction) > self.budget:
                break
            count = len(conjunction)
            start = {
                "conjunction": conjunction,
                "low": low.expand(count, -1),
                "up": up.expand(count, -1),
                "sides": torch.zeros(count, problem.neurons, dtype=torch.int8),
                "beta": torch.zeros(count, problem.neurons),
                "weights": torch.full((count, most), 1 / most),
                "bound": torch.full((count,), -torch.inf, dtype=torch.float64),
                "depth": torch.zeros(count, dtype=torch.int64),
            }
            if self._bounded(start):
                answer.found = True
                break
        else:
            while True:
                if answer.parts >= due:
                    answer.trace.append((answer.parts, self._least()))
                    due = answer.parts + max(1, answer.parts // 16)
                count = min(self.batch, (self.budget - answer.parts) // 2)
                if not len(self.pool) or self.stuck or answer.found or count < 1:
                    break
                answer.found = self._bounded(self._halves(self.pool.take(count)))
        if answer.trace and answer.trace[-1][0] != answer.parts:
            answer.trace.append((answer.parts, self._least()))
        self._close()
        return answer

    def _least(self) -> float:
        least = min(self.pool.least(), self.stuck_at)
        return least if math.isfinite(least) or len(self.pool) else float(self.answer.margins.amin())

    def _close(self) -> None:
        """Margins of the conjunctions that are open."""
        answer = self.answer
        answer.open = len(self.pool) + self.stuck
        if len(self.pool):
            left = {name: value[self.pool.used] for name, value in self.pool.fields.items()}
            answer.margins.scatter_reduce_(0, left["conjunction"], left["bound"], "amin")
        # Of what was never bounded nothing is known.
        answer.margins[answer.margins == math.inf] = -math.inf

    def _bounded(self, part: dict[str, Tensor]) -> bool:
        """Bound parts and keep what is open; whether a point was accepted."""
        answer, problem = self.answer, self.problem
        if not len(part["bound"]):
            return False
        answer.parts += len(part["bound"])
        answer.deepest = max(answer.deepest, int(part["depth"].amax()))
        parts = _Parts(problem, part["conjunction"], part["low"], part["up"], part["sides"])
        choice = part.pop("choice", None)
        choice = parts.usual() if choice is None else choice
        best = _climbed(parts, choice, part["beta"], part["weights"], self.options.steps)
        proved = torch.maximum(parts.proved(best.choice, best.beta, best.weights), part["bound"])
        refuted = proved > 0
        answer.margins.scatter_reduce_(0, part["conjunction"][refuted], proved[refuted], "amin")
        if self._tried(parts, best, ~refuted):
            # What was not refuted is no nearer known: its bounds are margins still.
            answer.margins.scatter_reduce_(0, part["conjunction"][~refuted], proved[~refuted], "amin")
            return True
        neuron, point = self.splitter(parts, best)
        stuck = ~refuted & (neuron < 0)
        if bool(stuck.any()):
            self.stuck += int(stuck.sum())
            self.stuck_at = min(self.stuck_at, float(proved[stuck].amin()))
            answer.margins.scatter_reduce_(0, part["conjunction"][stuck], proved[stuck], "amin")
        kept = {**part, "bound": proved, "choice": best.choice, "beta": best.beta, "weights": best.weights,
                "neuron": neuron, "point": point}  # fmt: skip
        self.pool.put({name: value[~refuted & ~stuck] for name, value in kept.items()})
        return False

    def _halves(self, parents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both halves of each part, with intervals bounded anew; those of which nothing is left are not among them."""
        problem, count = self.problem, len(parents["bound"])
        neuron, point = parents.pop("neuron"), parents.pop("point")
        halves = {name: torch.cat([value, value]) for name, value in parents.items()}
        below, above = torch.arange(count), torch.arange(count, 2 * count)
        halves["up"][below, neuron], halves["low"][above, neuron] = point, point
        halves["sides"][below, neuron] |= 2
        halves["sides"][above, neuron] |= 1
        halves["depth"] += 1
        both = neuron.repeat(2)
        for op, (start, _) in zip(problem.steps, problem.places, strict=True):
            if isinstance(op, Activation):
                site = problem.sites[op.source]
                which = ((both >= site.start) & (both < site.end)).nonzero()[:, 0]
                halves["choice"][which, :, start + both[which] - site.start] = 0.5
        halves["low"], halves["up"], empty = _refreshed(problem, halves["low"], halves["up"], int(neuron.amin()))
        if bool(empty.any()):
            self.answer.parts += int(empty.sum())
            none = torch.full((int(empty.sum()),), TOGETHER, dtype=torch.float64)
            self.answer.margins.scatter_reduce_(0, halves["conjunction"][empty], none, "amin")
            halves = {name: value[~empty] for name, value in halves.items()}
        return halves

    def _tried(self, parts: _Parts, best: _Climbed, open_: Tensor) -> bool:
        """Whether a point near where the bound of an open part is least is accepted."""
        which, problem = open_.nonzero()[:, 0], self.problem
        if not len(which):
            return False
        lower, upper = (side.expand(len(open_), *side.shape[1:])[which] for side in parts.region[torch.float32].box())
        of = problem.of[parts.conjunction[which]]
        c, b = problem.query.rows.to(torch.float32)[of], problem.query.bound.to(torch.float32)[of]
        x = torch.where(best.corner[which].reshape(lower.shape) > 0, lower, upper)
        points, least = x, torch.full((len(which),), torch.inf)
        for step in range(DESCENT + 1):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                outputs = evaluate.forward(problem.graph, leaf).flatten(1)
                violation = ((c @ outputs[:, :, None])[:, :, 0] - b).amax(1)
                slope = torch.autograd.grad(violation.sum(), leaf)[0]
            better = violation < least
            least = torch.where(better, violation.detach(), least)
            points = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), x, points)
            x = torch.minimum(torch.maximum(x - slope.sign() * (upper - lower) / 2 ** (step + 2), lower), upper)
        for place in least.argsort()[:JUDGED].tolist():
            if not least[place] <= 0:
                return False
            if self.judge(points[place].flatten().double(), int(parts.conjunction[which[place]])):
                return True
        return False
