"""Branch and bound on neurons: the largest |J|_1 over a box, J the Jacobian of c f for one of several rows c of a ReLU
network, bounded ever tighter by splitting unstable neurons into D = 1 and D = 0.

A part of the box is a set of splits, z_k >= 0 or z_k <= 0. Its Jacobian is bounded as in `netassay.numerics.bounds
.jacobian`; its pre-activations by CROWN, in which split neurons are linear, over the points that the splits allow. For
where g x + h <= z_k <= G x + H over a part, its half with z_k >= 0 lies in G x + H >= 0 and the other half in
g x + h <= 0. These half-spaces (a) cut the box coordinate by coordinate, and (b) tighten every pre-activation of the
parts below: for multipliers b_k >= 0 of half-spaces g_k x + h_k >= 0,

    max over the part of a x + d  <=  max over the box of a x + d + sum_k b_k (g_k x + h_k),

with one multiplier after the other set to its best value, which is where the slope of a convex piecewise linear
function turns. So the phases of neurons are linked: once relu(x) is on, relu(-x) is off. A part whose bounds contradict
each other is empty.

A part in which no open derivative matters is a leaf, and its bound exact, if it holds any point. In small networks
(`EXACT` neurons) a linear program looks for an inner point of a leaf. Where there is none, a leaf is dropped only on
proof: multipliers with sum_k b_k (g_k x + h_k) <= 0 over the box, checked below 0 beyond all rounding, or, where they
come to 0, in rational numbers. Leaves without inner points need not count: the Lipschitz constant over the box is that
of the patterns that fill a part of it. (Where the box has an edge of length 0 nothing is inner, and only leaves without
any point are dropped.)

The bound is the largest over all parts, those with the largest bounds are split first, and the split neuron is the one
whose open derivative adds most (`jacobian.Bounds.scores`). Bounds of parts never exceed those of their parents.

Reference: Shi, Wang, Zhang, Kolter, Hsieh. Efficiently computing local Lipschitz constants of neural networks via bound
propagation. 2022. (Section 3.4.)
Reference: Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter. Beta-CROWN: efficient bound propagation with per-neuron split
constraints for neural network robustness verification. 2021. (The multipliers.)
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from netassay.heavy import LazyModule, np, torch
from netassay.networks.graph import Graph, Relu
from netassay.numerics.bounds import jacobian, rounding, stages
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Box, Region

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

optimize: Any = LazyModule("scipy.optimize")

#: Parts bounded at once.
BATCH = 32
#: Hidden neurons up to which a leaf is asked whether it holds an inner point, and inputs likewise.
EXACT = 64
#: Numbers that are sorted to set one multiplier: 8 MiB. Of more half-spaces than fit only the latest are used.
NUMBERS = 2**20
#: Half-spaces that are used to tighten pre-activations, the latest ones.
SPACES = 16


@dataclass(eq=False)
class Answer:
    """bound: at least |J|_1 over the box, of all rows. parts: how many were bounded; open: left when the budget ended.
    exact: every part was refuted, empty or a leaf, so that `bound` is met. point: an inner point of the leaf that meets
    it, (inputs,), where a linear program found one. trace: (parts, the bound then).
    """

    bound: float
    parts: int = 0
    open: int = 0
    exact: bool = False
    point: Tensor | None = None
    trace: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Part:
    """lower, upper: (inputs,). row: its place among the rows. ends: of each activation, bounds of what it reads,
    (width,) each. spaces: (number, inputs + 1), g and h of half-spaces g x + h >= 0. splits: (activation, neuron,
    whether it is on). bound: of its |J|_1.
    """

    lower: Tensor
    upper: Tensor
    row: int
    ends: tuple[tuple[Tensor, Tensor], ...]
    spaces: Tensor
    splits: tuple[tuple[int, int, bool], ...]
    bound: float

    def halves(self, layer: int, neuron: int, spaces: dict[bool, Tensor]) -> list[_Part]:
        """Where the neuron is on, and where it is off; spaces: what is known of each, (inputs + 1,)."""
        found = []
        for on, space in spaces.items():
            low, high = (end.clone() for end in self.ends[layer])
            (low if on else high)[neuron].clamp_(**{"min" if on else "max": 0})
            ends = (*self.ends[:layer], (low, high), *self.ends[layer + 1 :])
            more = torch.cat([self.spaces, space[None]])
            found.append(replace(self, ends=ends, spaces=more, splits=(*self.splits, (layer, neuron, on))))
        return found


def search(
    graph: Graph, region: Region, rows: Tensor, *, budget: int, least: float = 0.0, batch: int = BATCH
) -> Answer | None:
    """The largest |J|_1 over one box; None where the network is not of dense layers with ReLU (see `stages`).

    region: of one set, float64. rows: (rows, outputs). budget: parts to bound, but the box itself for each row always
    is. least: a value that is known to be reached; parts that cannot exceed it are left alone.
    The same arguments give the same answer, whatever else is computed.
    """
    chain = stages.of(graph, torch.float64)
    if not chain.dense or not all(isinstance(operation, Relu) for operation in chain.activations):
        return None
    with torch.no_grad():
        return _Search(chain, graph, region, rows, budget, least, batch).run()


class _Search:
    def __init__(
        self, chain: stages.Stack, graph: Graph, region: Region, rows: Tensor, budget: int, least: float, batch: int
    ) -> None:
        self.chain, self.rows, self.batch = chain, rows, batch
        self.budget = max(budget, len(rows))
        start = stages.boxes(graph, region)
        ends, self.pads = start.ends, start.pads
        lower, upper = (end.flatten() for end in region.box())
        self.lower, self.upper = lower, upper
        self.small = sum(low.shape[1] for low, _ in ends) <= EXACT and len(lower) <= EXACT
        self.answer = Answer(math.inf)
        self.closed = least if math.isfinite(least) else 0.0
        self.counter = itertools.count()
        self.open: list[tuple[float, int, list[_Part]]] = []
        none = lower.new_zeros(0, len(lower) + 1)
        first = tuple((low[0], high[0]) for low, high in ends)
        self.finite = bool(start.finite.all())
        self.waiting = [_Part(lower, upper, row, first, none, (), math.inf) for row in range(len(rows))]

    def run(self) -> Answer:
        answer = self.answer
        if not self.finite:  # nothing can be said, of no part
            answer.open = len(self.waiting)
            return answer
        while (self.waiting or self.open) and answer.parts < self.budget:
            if not self.waiting:
                taken = max(1, min(self.batch, self.budget - answer.parts) // 2)
                for _ in range(min(taken, len(self.open))):
                    self.waiting += heapq.heappop(self.open)[2]
            count = min(self.batch, self.budget - answer.parts)
            parts, self.waiting = self.waiting[:count], self.waiting[count:]
            answer.parts += len(parts)
            self._bound([part for part in parts if part.bound > self.closed])
            answer.trace.append((answer.parts, self._largest()))
        answer.bound = self._largest()
        answer.open = sum(bound > self.closed for bound in self._bounds())
        answer.exact = answer.open == 0
        if not answer.exact:
            answer.point = None
        return answer

    def _bounds(self) -> list[float]:
        """Of all parts that are neither closed nor split: two for each that waits to be."""
        return [part.bound for part in self.waiting] + [-bound for bound, _, halves in self.open for _ in halves]

    def _largest(self) -> float:
        return max([self.closed, *(part.bound for part in self.waiting), *(-one[0] for one in self.open[:1])])

    # --- bounding -----------------------------------------------------------------------------------------------------

    def _bound(self, parts: list[_Part]) -> None:
        """Bound the parts; those that matter are leaves, or are split."""
        if not parts:
            return
        spaces = _Spaces.of(parts)
        pads = [pad.expand(len(parts), -1) for pad in self.pads]
        ends = [
            (torch.stack([part.ends[layer][0] for part in parts]), torch.stack([part.ends[layer][1] for part in parts]))
            for layer in range(len(pads))
        ]
        extremes = spaces.extremes if spaces.g.shape[1] else stages.over_the_box
        forward = stages.Forward(self.chain, spaces.box, ends, pads, extremes)
        empty = spaces.empty
        for low, high in forward.found:
            empty = empty | (low > high).any(1)
        slopes = [
            jacobian.slopes(operation, Interval(low, high))
            for operation, (low, high) in zip(self.chain.activations, forward.found, strict=True)
        ]
        c = self.rows[[part.row for part in parts]]
        linear = jacobian.Backward(self.chain, c, slopes).bounds(len(parts))
        norms, scores = linear.norms[1], linear.scores
        split: dict[int, list[tuple[int, int]]] = {}
        bounded = []
        for place, part in enumerate(parts):
            norm = float(norms[place])
            found = tuple((low[place], high[place]) for low, high in forward.found)
            part = replace(
                part, lower=spaces.box.lower[place], upper=spaces.box.upper[place], ends=found,
                bound=part.bound if math.isnan(norm) else min(part.bound, norm),
            )  # fmt: skip
            bounded.append(part)
            if bool(empty[place]) or part.bound <= self.closed:
                continue
            best = [(float(score[place].amax()), layer) for layer, score in enumerate(scores)]
            most, layer = max(best, default=(0.0, 0))
            if most > 0:
                split.setdefault(layer, []).append((place, int(scores[layer][place].argmax())))
            else:
                self._leaf(part)
        for layer, chosen in split.items():
            self._split(bounded, forward, layer, chosen)

    def _split(self, parts: list[_Part], forward: stages.Forward, layer: int, chosen: list[tuple[int, int]]) -> None:
        """Put halves of the chosen (part, neuron of this layer) among the open ones."""
        rows = torch.zeros(len(parts), 1, dtype=torch.int64)
        for place, neuron in chosen:
            rows[place] = neuron
        d, m = forward.linear(layer, rows)
        m = m.expand(-1, -1, 2, -1)[..., 0]
        centre, radius = forward.centre, forward.radius
        g = torch.where(radius[..., None] > 0, m / radius[..., None], 0.0)
        h = d[..., 0] - (g * centre[..., None]).sum(1)
        # Far above the few roundings of these two lines.
        loose = 1e-12 * (d[..., 0].abs() + (g.abs() * (centre.abs() + radius)[..., None]).sum(1))
        for place, neuron in chosen:
            pad = self.pads[layer][0, neuron]
            spaces = {}
            for on in (True, False):
                # On: what lies above is at least 0. Off: what lies below is at most 0.
                side, sign = (1, 1.0) if on else (0, -1.0)
                constant = sign * h[place, side] + loose[place, side] + pad
                spaces[on] = torch.cat([sign * g[place, :, side], constant[None]])
            part = parts[place]
            heapq.heappush(self.open, (-part.bound, next(self.counter), part.halves(layer, neuron, spaces)))

    def _leaf(self, part: _Part) -> None:
        point = None
        if self.small and part.splits:
            system = _System(self.chain, part, self.lower, self.upper)
            if system.empty():
                return
            point = system.point
        self.closed, self.answer.point = part.bound, point


# --- half-spaces ------------------------------------------------------------------------------------------------------

#: What the computation of a cut, or of a half-space in other units, can lose, relative to the terms of its sums: far
#: above their roundings.
_OUTWARD = 1e-12


@dataclass(frozen=True, eq=False)
class _Spaces:
    """box: of the parts, cut by their half-spaces. g, h: the half-spaces in y = (x - centre) / radius of that box,
    (parts, number, inputs) and (parts, number), (0, 0) where a part has fewer. empty: (parts,), no point is left.
    """

    box: Box
    g: Tensor
    h: Tensor
    empty: Tensor

    @classmethod
    def of(cls, parts: list[_Part]) -> _Spaces:
        lower, upper = torch.stack([part.lower for part in parts]), torch.stack([part.upper for part in parts])
        latest = [part.spaces[-SPACES:] for part in parts]
        most = max(len(one) for one in latest)
        rows = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in latest])
        g, h = rows[..., :-1], rows[..., -1]
        far = torch.maximum(lower.abs(), upper.abs())
        terms = h.abs() + (g.abs() @ far[:, :, None])[..., 0]
        # The most that g x + h comes to over the box; and how far an input may then be from the end where it does.
        most_of = h + torch.maximum(g * lower[:, None], g * upper[:, None]).sum(2) + _OUTWARD * terms
        empty = (most_of < 0).any(1)
        reach = most_of[..., None] / g.abs() * (1 + _OUTWARD) + _OUTWARD * far[:, None]
        reach = torch.where((g != 0) & torch.isfinite(reach), reach, torch.inf).clamp(min=0)
        start = (len(parts), 1, lower.shape[1])
        lowers = torch.cat([lower.reshape(start), torch.where(g > 0, upper[:, None] - reach, -torch.inf)], 1)
        uppers = torch.cat([upper.reshape(start), torch.where(g < 0, lower[:, None] + reach, torch.inf)], 1)
        low, high = lowers.amax(1), uppers.amin(1)
        empty = empty | (low > high).any(1)
        low, high = (torch.where(empty[:, None], old, new) for old, new in ((lower, low), (upper, high)))
        # As `stages.Forward` has them.
        centre, radius = (low + high) / 2, (high - low) / 2
        within = h + (g @ centre[:, :, None])[..., 0] + _OUTWARD * terms
        found = cls(Box(low, high), g * radius[:, None], within, empty)
        if most:
            # Each half-space over what the others leave.
            _, above = found.extremes(within[:, None].expand(-1, 2, -1), found.g.transpose(1, 2)[:, :, None])
            found.empty.logical_or_((above < 0).any(1))
        return found

    def extremes(self, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of d + m y over the points of [-1, 1]^n in the half-spaces; see `stages.Extremes`."""
        below, above = stages.over_the_box(d, m.clone())
        m = m.expand(-1, -1, 2, -1)
        # Both as maxima: rows (parts, 2, rows, inputs).
        a = torch.stack([-m[:, :, 0], m[:, :, 1]], 1).transpose(2, 3)
        e = torch.stack([-d[:, 0], d[:, 1]], 1)
        terms = e.abs() + a.abs().sum(3)
        number = self.g.shape[1]
        for k in range(number - 1, max(-1, number - 1 - NUMBERS // max(1, a.numel())), -1):
            g, h = self.g[:, None, None, k], self.h[:, None, None, k]
            # The slope of the dual bound in the multiplier grows by 2 |g_j| where a_j + b g_j turns its sign.
            slope = h + torch.where(a == 0, g.abs(), g * a.sign()).sum(3)
            turn = torch.where((g != 0) & (a * g < 0), -a / g, torch.inf)
            at, order = turn.sort(dim=3)
            slopes = slope[..., None] + 2 * g.abs().expand_as(a).gather(3, order).cumsum(3)
            first = (slopes < 0).sum(3, keepdim=True).clamp(max=at.shape[3] - 1)
            best = at.gather(3, first)[..., 0]
            # No turn is left where the half-space misses the box: `of` sees that, and nothing need be gained here.
            best = torch.where((slope < 0) & torch.isfinite(best), best, 0.0)
            a = a + best[..., None] * g
            e = e + best * h
            terms = terms + best * (h.abs() + g.abs().sum(3))
        value = e + a.abs().sum(3) + _OUTWARD * terms
        return torch.maximum(below, -value[:, 0]), torch.minimum(above, value[:, 1])


# --- inner points of leaves -------------------------------------------------------------------------------------------

#: An inner point is believed in from this distance on, in units of the largest that a half-space can have.
_INNER = 1e-9


class _System:
    """What the splits of a leaf say of x: s_k (g_k x + h_k) > 0 over the box, in which all earlier neurons are linear.

    Splits behind a neuron whose phase is open are left out. point: an inner point, once `empty` has found one.
    """

    def __init__(self, chain: stages.Stack, part: _Part, lower: Tensor, upper: Tensor) -> None:
        self.part, self.lower, self.upper = part, lower.numpy(), upper.numpy()
        self.layers = [(_matrix(stage), stage.bias.numpy()) for stage in chain.stages[:-1]]
        self.point: Tensor | None = None
        terms = sum(stage.terms + stage.inputs for stage in chain.stages)
        self.unit = 4 * rounding.gamma(terms, torch.float64)
        # Matrices multiplied beforehand are rounded.
        self.exactly = all(sum(w.weight is not None for _, w, _ in stage.steps) < 2 for stage in chain.stages)

    def _forms(self, of: Any) -> tuple[Any, Any, Any]:
        """g (splits, inputs) and h (splits,), in numbers `of` (float or Fraction); and the size of the sums in them."""
        number = np.vectorize(of, otypes=[object if of is Fraction else float])
        n = len(self.lower)
        p, q = number(np.eye(n)), number(np.zeros(n))
        far = np.maximum(abs(self.lower), abs(self.upper))
        size = far.copy()
        g, h, sizes = [], [], []
        for layer, (weight, bias) in enumerate(self.layers):
            exact = number(weight)
            p, q = exact @ p, exact @ q + number(bias)
            size = abs(weight) @ size + abs(bias)
            for at, neuron, on in self.part.splits:
                if at == layer:
                    sign = of(1 if on else -1)
                    g.append(sign * p[neuron])
                    h.append(sign * q[neuron])
                    sizes.append(size[neuron])
            low, high = (end.numpy() for end in self.part.ends[layer])
            if ((low < 0) & (high > 0)).any():
                break
            on_ = low >= 0
            p, q, size = number(on_)[:, None] * p, number(on_) * q, on_ * size
        return np.array(g), np.array(h), np.array(sizes)

    def empty(self) -> bool:
        """Whether it is proved that no inner point exists (or, in a box with an edge of length 0, no point)."""
        g, h, sizes = self._forms(float)
        if not len(g):
            return False
        scale = abs(g) @ np.maximum(self.upper - self.lower, 0) + 1e-300
        inequalities = np.hstack([-g / scale[:, None], np.ones((len(g), 1))])
        ends = [*zip(self.lower, self.upper, strict=True), (None, 1.0)]
        cost = np.zeros(len(self.lower) + 1)
        cost[-1] = -1
        found = optimize.linprog(cost, inequalities, h / scale, bounds=ends, method="highs")
        if found.status != 0:
            return False
        if -found.fun > _INNER:
            self.point = torch.from_numpy(np.clip(found.x[:-1], self.lower, self.upper))
            return False
        multipliers = np.maximum(-found.ineqlin.marginals, 0) / scale
        if not multipliers.sum() > 0:
            return False
        a = multipliers @ g
        most = multipliers @ h + np.maximum(a * self.lower, a * self.upper).sum()
        if most + self.unit * (multipliers @ sizes) < 0:
            return True
        return bool((self.upper > self.lower).all()) and self.exactly and self._flat(multipliers)

    def _flat(self, multipliers: numpy.ndarray) -> bool:
        """Whether multipliers near these prove in rational numbers that the splits leave nothing inner."""
        g, h, _ = self._forms(Fraction)
        used = [k for k in np.flatnonzero(multipliers > 1e-9 * multipliers.max()) if any(g[k])]
        if not used:
            return False
        rough = np.array([[float(v) for v in g[k]] for k in used])
        b = multipliers[used]
        # Coordinates in which the sum is flat must come to exactly 0; the multipliers are fixed up to a factor.
        flat = np.flatnonzero(abs(b @ rough) <= 1e-7 * (b @ abs(rough)))
        equations = [[g[k][j] for k in used] + [Fraction(0)] for j in flat]
        equations.append([Fraction(1)] * len(used) + [Fraction(float(b.sum()))])
        exact = _solved(equations, [Fraction(float(v)) for v in b])
        if exact is None or any(v < 0 for v in exact) or not any(exact):
            return False
        low, high = ([Fraction(float(v)) for v in end] for end in (self.lower, self.upper))
        a = [sum((v * g[k][j] for v, k in zip(exact, used, strict=True)), Fraction(0)) for j in range(len(low))]
        most = sum((v * h[k] for v, k in zip(exact, used, strict=True)), Fraction(0))
        most += sum((max(c * x, c * y) for c, x, y in zip(a, low, high, strict=True)), Fraction(0))
        return most <= 0


def _matrix(stage: stages.Stage) -> numpy.ndarray:
    assert stage.matrix is not None
    return stage.matrix.numpy()


def _solved(equations: list[list[Fraction]], usual: list[Fraction]) -> list[Fraction] | None:
    """A solution of rows [coefficients, right side] by elimination, free unknowns at their usual values; None without
    one."""
    rows = [list(row) for row in equations]
    pivots: list[int] = []
    for column in range(len(usual)):
        found = next((k for k in range(len(pivots), len(rows)) if rows[k][column]), None)
        if found is None:
            continue
        here = len(pivots)
        rows[here], rows[found] = rows[found], rows[here]
        rows[here] = [v / rows[here][column] for v in rows[here]]
        for k, row in enumerate(rows):
            if k != here and row[column]:
                rows[k] = [v - row[column] * w for v, w in zip(row, rows[here], strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    solution = list(usual)
    for row, column in zip(rows, pivots, strict=False):
        rest = sum((row[k] * usual[k] for k in range(len(usual)) if k != column and k not in pivots), Fraction(0))
        solution[column] = row[-1] - rest
    return solution
