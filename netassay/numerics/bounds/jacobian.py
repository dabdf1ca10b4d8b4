"""Bounds on the Jacobian of a network over a region, and so on how far its outputs can move: local Lipschitz constants.

For a chain z_i = W_i a_(i-1) + b_i, a_i = sigma_i(z_i) (see `stages`) and a row c of outputs, the gradient is a network
of its own, run backward from a constant:

    A_m = c^T W_(m+1),   B_i = A_i * D_i,   A_(i-1) = B_i W_i,   J = A_0,   D_i = sigma_i'(z_i) in [D_i-, D_i+]

where D_i is bounded from the pre-activations: of ReLU it is 1 where z_i >= 0 over the region, 0 where z_i <= 0, and
[0, 1] else, which covers the Clarke Jacobian, as every bound here holds for convex combinations too. Two bounds:

1. interval: A_i and D_i are multiplied as intervals.
2. linear: with bounds [a, b] of A and D free in its interval, the product lies between two chords,

       L(A) <= A D <= U(A),   U through (a, max(a D-, a D+)) and (b, max(b D-, b D+)),   L likewise with min;

   for ReLU and a < 0 < b these are a (b - A) / (b - a) <= A D <= b (A - a) / (b - a). A linear function of A_i goes
   through them back to the box of B_m, for A_m is a constant, exactly as CROWN goes through activations. The bounds
   [a, b] of a neuron are from 1, tightened by 2 where the neuron is unstable and the sign of A open: lines depend on
   them nowhere else.

sup |J|_1, the l_inf local Lipschitz constant of c f, is at most sum_j max(|lower_j|, |upper_j|); and at most the linear
bound of sum_j (s_j J_j + t_j) with the chord of |.| over [lower_j, upper_j], all coordinates at once, which is usually
tighter. The smaller one counts.

Rounding. Step 1 is outward as `interval` is. A linear pass from v A_p errs by at most |v| e(A_p) with

    e(B_m) = d_m r(A_m) + g H(B_m),   e(B_i) = d_i (e(A_i) + g H(A_i)),   e(A_(i-1)) = |W_i|^T e(B_i),   then doubled

d_i >= |D_i|, H >= |value|, r(A_m) the radius of the constant as computed, g = k u / (1 - k u) with k above all
roundings that one number sees (the sums of a stage, slopes and intercepts, the sums of constants). For: coefficients M
of B_i are computed from those of A_(i-1) with an error of at most g |.| |W_i|^T, which changes the bound by that times
H(B_i); slopes lie in [D-, D+], so the coefficients of A_i are at most d_i |M|; an intercept is the larger of two ends,
each of which is computed to a few u d_i H(A_i). Doubling covers products of errors and rounding in e. A coefficient
that underflows changes the bound by tiny times what it meets, whatever comes after it; these are added up apart. In
float32 no rounding is taken off: such a bound is an estimate.

64 boxes at radius 0.02 and one output, on one thread of a shared machine, CROWN of the pre-activations included, beside
auto_LiRPA 0.7.1 box by box in float32 without optimised slopes (its bounds are the same to 3e-7, or larger): ACAS Xu
0.085 s, 30 times as fast; 64-128x4-10 0.11 s, 15 times; 784-256x2-10 0.7 s, 2.2 to 2.9 times, and in float32 0.40 s,
4.0 to 4.6 times. There the products themselves are 18 GFLOP, half of the time (a third in the small nets).

Reference: Shi, Wang, Zhang, Kolter, Hsieh. Efficiently computing local Lipschitz constants of neural networks via bound
propagation. 2022.
Reference: Zhang, Zhang, Hsieh. RecurJac: an efficient recursive algorithm for bounding Jacobian matrix of neural
networks and its applications. 2019. (The same graph, bounded layer by layer.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks import evaluate
from netassay.networks.graph import Graph, Operation, Relu
from netassay.numerics.bounds import rounding, stages
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Region
from netassay.numerics.bounds.stages import Selection, Sides, Stack, Stage, absolute_sum, advance, dot, gathered

if TYPE_CHECKING:
    from torch import Tensor

#: Coefficients of one pass, boxes x sides x rows x neurons: 2 MiB in float64, one core's cache. Half and twice as many
#: took up to a tenth longer on a 784-256-256-10 net.
PORTION = 1 << 18
#: Pairs of a box and a row whose whole layers are bounded by intervals at once.
_PAIRS = 256

#: (activation, box of what it reads) -> least and largest derivative there, each of the box's shape.
Derivative = Callable[[Operation, Interval], "tuple[Tensor, Tensor]"]


def slopes(operation: Operation, z: Interval) -> tuple[Tensor, Tensor]:
    """The range of ReLU's derivative. A neuron that is 0 throughout counts as on: both slopes are right there. Of
    bounds that overflowed nothing follows, whatever their sign."""
    if not isinstance(operation, Relu):
        raise NotImplementedError(f"no derivative is known for {type(operation).__name__} ({operation.name})")
    on = (z.lower >= 0) & (z.lower < torch.inf)
    off = (z.upper <= 0) & (z.upper > -torch.inf) & ~on
    return on.to(z.lower.dtype), (~off).to(z.lower.dtype)


@dataclass(frozen=True, eq=False)
class Bounds:
    """interval, linear: the Jacobian's entries, (batch, rows, *input); linear lies within interval.

    norm_interval, norm: (batch, rows), at least sup |J|_1, by interval and by linear bounds; norm <= norm_interval.
    rounding: (batch, rows), at least what rounding changes in |J|_1 as computed in this dtype at a point of the region.
    scores: of each activation (batch, rows, width): how much a neuron's open derivative adds to `norm`, about.
    values: the pre-activation boxes used. delicate: (batch,), bool; a neuron is so nearly stable that rounding may turn
    it when the same region is bounded in another block.
    """

    interval: Interval
    linear: Interval
    norm_interval: Tensor
    norm: Tensor
    rounding: Tensor
    scores: tuple[Tensor, ...]
    values: Mapping[str, Interval]
    delicate: Tensor


def bounds(
    graph: Graph,
    region: Region,
    rows: Tensor,
    *,
    values: Mapping[str, Interval] | None = None,
    derivative: Derivative = slopes,
    block: int | None = None,
) -> Bounds:
    """Bounds of the Jacobian of C f over each set of the region, C the `rows`, in the dtype of the region.

    rows: (rows, outputs) or (batch, rows, outputs), outputs flattened. values: boxes of what the activations read, by
    name; None: by CROWN, of ReLU networks. derivative: its range of each activation over such a box.
    Raises NotImplementedError where the graph is no chain of linear maps and activations.
    """
    dtype = region.centre.dtype
    chain = stages.of(graph, dtype)
    count = len(region)
    delicate = torch.zeros(count, dtype=torch.bool)
    with torch.no_grad():
        if values is None:
            values, delicate = stages.preactivations(graph, region)
        ranges = [derivative(operation, values[operation.source]) for operation in chain.activations]
        slope = [tuple(end.flatten(1).to(dtype) for end in one) for one in ranges]
        each = rows.shape[-2]
        c = rows.to(dtype).expand(count, each, rows.shape[-1]).flatten(0, 1)
        parts = []
        for start in range(0, len(c), _PAIRS):
            pairs = torch.arange(start, min(start + _PAIRS, len(c)))
            owner = pairs // each
            whole = Backward(chain, c[pairs], [(low[owner], high[owner]) for low, high in slope])
            parts.append(whole.bounds(block or chain.block))
        entries, norms = (
            [torch.cat(column).reshape(count, each, *shape) for column in zip(*chosen, strict=True)]
            for chosen, shape in (
                ([part.entries for part in parts], graph.input_shape), ([part.norms for part in parts], ()),
            )
        )  # fmt: skip
        scores = [torch.cat(layer).reshape(count, each, -1) for layer in zip(*(p.scores for p in parts), strict=True)]
    low, high, tighter_low, tighter_high = entries
    sums, norm, lost = norms
    return Bounds(
        Interval(low, high), Interval(tighter_low, tighter_high), sums, norm, lost, tuple(scores), values, delicate
    )


def product_of_norms(graph: Graph, rows: Tensor) -> Tensor:
    """|c W_(m+1)|_1 |W_m|_inf ... |W_1|_inf for each row c, times the largest |slope| of every activation: (rows,).

    A Lipschitz constant over all inputs, of ReLU networks, rounded upward. |W|_inf: the largest l1 norm of a row.
    """
    chain = stages.of(graph, rows.dtype)
    if not all(isinstance(operation, Relu) for operation in chain.activations):
        raise NotImplementedError("norms are multiplied for ReLU networks only")
    with torch.no_grad():
        links = chain.stages
        found = (links[-1].adjoint(rows).abs() + _error(links[-1]) * links[-1].adjoint(rows.abs(), True)).sum(1)
        for stage in links[:-1]:
            ones = torch.ones(1, stage.inputs, dtype=rows.dtype)
            sums = stage.rows(ones, absolute=True)[0]
            if stage.matrix is not None:
                sums = torch.minimum(sums, stage.matrix.abs().sum(1) + _error(stage) * sums)
            found = found * sums.amax()
        terms = sum(stage.terms + stage.inputs + 8 for stage in links)
        return found * (1 + 2 * rounding.gamma(terms, rows.dtype))


def _error(stage: Stage) -> float:
    """Relative to |W|: what rounding can change in a product with W."""
    return 2 * rounding.gamma(stage.terms + 8, stage.bias.dtype)


def at(graph: Graph, points: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The Jacobian of C f at points, (points, rows, *input), up to rounding, and what the activations read there.

    points: (points, *input); rows: (rows, outputs). At a kink of an activation it is what autograd says, which need not
    be in the Clarke Jacobian of the network: look at what the activations read.
    """
    chain = stages.of(graph, points.dtype)
    with torch.no_grad():
        read, derivatives, x = {}, [], points
        for stage, operation in zip(chain.stages, chain.activations, strict=False):
            z = (stage.rows(x.flatten(1)) + stage.bias).reshape(-1, *stage.shape)
            x, derivative = _sloped(operation, z)
            read[operation.source] = z
            derivatives.append(derivative.flatten(1))
        a = chain.stages[-1].adjoint(rows).expand(len(points), -1, -1)
        for stage, derivative in zip(reversed(chain.stages[:-1]), reversed(derivatives), strict=True):
            a = stage.adjoint((a * derivative[:, None]).flatten(0, 1)).unflatten(0, a.shape[:2])
        return a.reshape(len(points), len(rows), *graph.input_shape), read


def _sloped(operation: Operation, z: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its derivative."""
    if isinstance(operation, Relu):
        return z.clamp(min=0), (z > 0).to(z.dtype)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = evaluate.apply(operation, z)
        (derivative,) = torch.autograd.grad(y.sum(), z)
    return y.detach(), derivative


@dataclass(frozen=True, eq=False)
class Steepest:
    """norm: at most sup |J|_1 over the region, of all rows; met at `point`, (*input), by the row `row`."""

    norm: float
    point: Tensor
    row: int


#: Points evaluated at once; points that move; the share of coordinates that a move draws anew, at first and at last.
_POINTS, _MOVING, _FIRST_SHARE, _LAST_SHARE = 1024, 16, 0.5, 0.02


def steepest(
    graph: Graph, region: Region, rows: Tensor, pads: Mapping[str, Tensor], slack: Tensor,
    *, samples: int, moves: int, seed: int, points: Tensor | None = None,
) -> Steepest:  # fmt: skip
    """The largest |J|_1 met at points of one set: drawn, half of them its corners, the other half inside; then the best
    ones move, some coordinates drawn anew at a time, where that makes it larger. (|J|_1 of a ReLU network is constant
    on each piece: there is no gradient to follow.)

    A point counts where each ReLU reads more than `pads`, (*shape), in absolute value: more than rounding, so that its
    gradient is one of the network. slack: (rows,), what rounding may have added to a norm, is taken off. points:
    (number, *input), to try besides. The norm is 0 where no point counts.
    """
    lower, upper = (end[0] for end in region.box())
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(lower.shape)

    def norms(x: Tensor) -> Tensor:
        gradient, read = at(graph, x, rows)
        norm = gradient.flatten(2).abs().sum(2) - slack
        for name, z in read.items():
            norm = torch.where((z.abs() > pads[name]).flatten(1).all(1)[:, None], norm, 0.0)
        return norm.amax(1).clamp(min=0)

    found, value = [region.centre[:1]], [norms(region.centre[:1])]
    if points is not None:
        found.append(points)
        value.append(norms(points))
    for start in range(0, samples, _POINTS):
        count = min(_POINTS, samples - start)
        x = torch.rand(count, *inputs, generator=generator, dtype=lower.dtype)
        x[: count // 2] = x[: count // 2].round()
        found.append(lower + x * (upper - lower))
        value.append(norms(found[-1]))
    x, v = torch.cat(found), torch.cat(value)
    best = v.argsort(descending=True, stable=True)[:_MOVING]
    x, v = x[best], v[best]
    for move in range(moves):
        share = _FIRST_SHARE * (_LAST_SHARE / _FIRST_SHARE) ** (move / max(1, moves - 1))
        drawn = torch.rand(len(x), *inputs, generator=generator, dtype=lower.dtype)
        mask = torch.rand(len(x), *inputs, generator=generator, dtype=lower.dtype) < share
        drawn = torch.where(torch.rand(len(x), *[1] * len(inputs), generator=generator) < 0.5, drawn, drawn.round())
        candidate = torch.where(mask, lower + drawn * (upper - lower), x)
        w = norms(candidate)
        x = torch.where((w > v).reshape(-1, *[1] * len(inputs)), candidate, x)
        v = torch.maximum(v, w)
    place = int(v.argmax())
    gradient, _ = at(graph, x[place : place + 1], rows)
    row = int((gradient[0].flatten(1).abs().sum(1) - slack).argmax())
    return Steepest(float(v[place]), x[place], row)


@dataclass(frozen=True, eq=False)
class Found:
    """Of pairs of a box and a row: entries, the lower and upper ends by intervals, then those by linear bounds, (pairs,
    inputs); norms, by intervals, by linear bounds, and what rounding adds, (pairs,). scores: see `Bounds`.
    """

    entries: tuple[Tensor, Tensor, Tensor, Tensor]
    norms: tuple[Tensor, Tensor, Tensor]
    scores: list[Tensor]


class Backward:
    """The backward graph over pairs of a box and a row. c: (pairs, outputs). slopes: of each activation, the least and
    the largest derivative, (pairs, width) each.

    Intervals are over whole layers, for all pairs at once; linear bounds over the neurons that take part, for a part of
    the pairs at a time: `self[which]`.
    """

    def __init__(self, chain: Stack, c: Tensor, slopes: list[tuple[Tensor, Tensor]]) -> None:
        self.chain, self.slopes, self.dtype = chain, slopes, c.dtype
        self.certified = c.dtype == torch.float64
        #: Largest |derivative|.
        self.steepest = [torch.maximum(low.abs(), high.abs()) for low, high in slopes]
        #: Boxes of A_0 .. A_m and, behind a first one that is not used, of B_1 .. B_m; e of each A.
        self.a: list[Interval] = [None] * (len(slopes) + 1)  # type: ignore[list-item]
        self.b: list[Interval] = [None] * (len(slopes) + 1)  # type: ignore[list-item]
        self.errors: list[Tensor] = []
        self._intervals(c)
        if slopes:
            b, open_ = self.b[-1], slopes[-1][0] < slopes[-1][1]
            #: The middle of B_m as seen from the layer before, and its radius where D_m is open; the radius elsewhere
            #: is rounding, and in e(B_m).
            self.middle = chain.stages[len(slopes) - 1].adjoint((b.lower + b.upper) / 2)
            self.radius = torch.where(open_, (b.upper - b.lower) / 2, 0.0)

    def __getitem__(self, which: slice) -> Backward:
        """Some of the pairs."""
        part = copy.copy(self)
        part.slopes = [(low[which], high[which]) for low, high in self.slopes]
        part.a = [Interval(box.lower[which], box.upper[which]) for box in self.a]
        part.errors = [error[which] for error in self.errors]
        part.middle, part.radius = self.middle[which], self.radius[which]
        return part

    # --- intervals ----------------------------------------------------------------------------------------------------

    def _gamma(self, terms: int) -> float:
        return rounding.gamma(terms, self.dtype) if self.certified else 0.0

    def _back(self, stage: Stage, b: Interval) -> Interval:
        """The box of b W, rounded outward."""
        centre, radius = (b.lower + b.upper) / 2, (b.upper - b.lower) / 2
        # 8 roundings beyond the sums: halving, subtracting, adding ends, the product with a derivative before.
        g = 4 * self._gamma(stage.terms + 8)
        middle = stage.adjoint(centre)
        half = stage.adjoint(radius + g * (radius + centre.abs()), absolute=True) + self._tiny(stage.terms)
        return Interval(middle - half, middle + half)

    def _tiny(self, terms: int) -> float:
        return 4 * terms * rounding.smallest(self.dtype)

    def _intervals(self, c: Tensor) -> None:
        """Boxes of all A_i and B_i, and e(A_i), all over whole layers."""
        chain, last = self.chain, len(self.slopes)
        self.a[last] = self._back(chain.stages[last], Interval(c, c))
        self.errors = [torch.zeros_like(self.a[last].lower)] * (last + 1)
        lost = torch.zeros(len(c), 1, dtype=self.dtype)
        # Roundings beyond the sums of a stage: slopes, intercepts, and the constants of all layers.
        widest = max((low.shape[1] for low, _ in self.slopes), default=1)
        g = self._gamma(chain.terms + widest + 16 * (last + 2))
        for i in range(last, 0, -1):
            low, high = self.slopes[i - 1]
            self.b[i] = _times(self.a[i], low, high)
            met = self.a[i].magnitude() * self.steepest[i - 1]
            if i == last:
                radius = (self.a[i].upper - self.a[i].lower) / 2
                error = self.steepest[i - 1] * radius + 8 * g * met
            else:
                error = self.steepest[i - 1] * self.errors[i] + 8 * g * met
            lost = lost + self._tiny(chain.terms) * (met + self.a[i].magnitude()).sum(1, keepdim=True)
            stage = chain.stages[i - 1]
            self.a[i - 1] = self._back(stage, self.b[i])
            self.errors[i - 1] = (stage.adjoint(error, absolute=True) + lost) if self.certified else lost * 0
        self.errors = [2 * error for error in self.errors]

    # --- linear bounds ------------------------------------------------------------------------------------------------

    def bounds(self, block: int) -> Found:
        """Of all pairs; `block` of them share a linear pass."""
        box, errors = self.a[0], self.errors[0]
        sums = self._sum(torch.maximum(box.lower.abs(), box.upper.abs()))
        low, high, norm = box.lower, box.upper, sums
        scores: list[Tensor] = []
        if self.slopes:
            parts = [self[start : start + block]._linear() for start in range(0, len(low), block)]
            low, high, together = (torch.cat([part[place] for part in parts]) for place in range(3))  # type: ignore[misc]
            scores = [torch.cat(layer) for layer in zip(*(part[3] for part in parts), strict=True)]
            norm = torch.minimum(sums, self._sum(torch.maximum(low.abs(), high.abs())))
            norm = torch.fmin(norm, together)
        # What overflowed somewhere says nothing anywhere.
        known = torch.isfinite(errors).all(1)
        for found in (*self.a, *self.b[1:]):
            known &= (torch.isfinite(found.lower) & torch.isfinite(found.upper)).all(1)
        every = known[:, None]
        lowers = (torch.where(every, end, -torch.inf) for end in (box.lower, low))
        uppers = (torch.where(every, end, torch.inf) for end in (box.upper, high))
        (box_low, low), (box_high, high) = lowers, uppers
        sums, norm, lost = (torch.where(known, v, torch.inf) for v in (sums, norm, self._sum(errors)))
        scores = [torch.where(every, score, 0.0) for score in scores]
        return Found((box_low, box_high, low, high), (sums, norm, lost), scores)

    def _linear(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Entries, a bound of the norm, scores."""
        last = len(self.slopes)
        low, high = self.a[0].lower, self.a[0].upper
        self._select()
        for p in range(last - 2, 0, -1):
            self._tighten(p)
        self._draw_lines(1)
        if last > 1:
            low, high = self._entries()
        return low, high, *self._together(low, high)

    def _sum(self, v: Tensor) -> Tensor:
        """Sums of positive numbers, rounded upward."""
        return v.sum(1) * (1 + 2 * self._gamma(v.shape[1] + 4))

    def _select(self) -> None:
        """Which neurons of each layer take part, and the matrices between them."""
        self.selections: list[Selection] = []
        self.matrices: list[Tensor | None] = []
        dense = self.chain.dense
        for place, (low, high) in enumerate(self.slopes):
            identity = (low == 1) & (high == 1)
            off = (low == 0) & (high == 0)
            if dense:
                chosen = Selection.of(~identity & ~off, identity)
                before = self.selections[-1].index if self.selections else None
                # Into the last layer: the box of B is a point at all that are stable, and needs no columns of its own.
                index = chosen.index if place < len(self.slopes) - 1 else chosen.index[:, : chosen.unstable]
                self.matrices.append(gathered(self.chain.stages[place], index, before))
            else:
                every = torch.arange(low.shape[1]).expand(len(low), -1)
                chosen = Selection(every, low.shape[1])
                self.matrices.append(None)
            self.selections.append(chosen)
        self.radius = self.selections[-1].take(self.radius)
        last = len(self.slopes)
        self.middle = self.middle if last == 1 else self._seen(last - 1, self.middle)
        matrix = self.matrices[-1]
        if matrix is not None:
            # In units of the radius, and the middle as a row more, for products cost less than passes over memory.
            self.matrices[-1] = torch.cat([matrix * self.radius[:, :, None], self.middle[:, None]], 1)
        self.lines: list[Sides | None] = [None] * (last + 1)

    def _draw_lines(self, first: int) -> None:
        """Lines of the layers from `first` on that have none yet."""
        for i in range(first, len(self.slopes)):
            if self.lines[i] is None:
                take = self.selections[i - 1].take
                low, high = self.slopes[i - 1]
                self.lines[i] = chords(take(self.a[i].lower), take(self.a[i].upper), take(low), take(high))

    def _walk(self, p: int, m: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Lower and upper bounds, (pairs, rows), of functions of A_p, without e; the coefficients of B on the way.

        m: their coefficients of the selected B_(p+1), (pairs, selected, 1, rows). Where that is B_m, and not of a
        dense stack, the bounds are of the difference from its middle.
        """
        last, seen = len(self.slopes), [m]
        d: Tensor | float = 0.0
        for i in range(p + 1, last):
            line = self.lines[i]
            assert line is not None
            a, added = line.through(m)
            d = d + added
            if i == last - 1 and self.matrices[-1] is None:
                d = d + dot(self.middle[:, :, None], a)
            m = self._through(i, a, m)
            seen.append(m)
        if self.matrices[-1] is None:
            m = m * self.radius[:, :, None, None]
            seen[-1] = m
        else:
            m, d = m[:, :-1], d + m[:, -1]
        half = absolute_sum(m)
        return (d - half)[:, 0], (d + half)[:, -1], seen

    def _through(self, i: int, a: Tensor, m: Tensor) -> Tensor:
        """Coefficients of the selected B_(i+1) from those of A_i, behind lines, and of B_i, on."""
        matrix = self.matrices[i]
        if matrix is not None:
            return advance(matrix, a, m)
        rows = a.permute(0, 2, 3, 1)
        return self.chain.stages[i].rows(rows.flatten(0, 2)).unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)

    def _seen(self, i: int, v: Tensor) -> Tensor:
        """v, (pairs, width of layer i), at the selected neurons of that layer."""
        return torch.nn.functional.pad(v, (0, 1)).gather(1, self.selections[i - 1].index)

    def _start(self, p: int, columns: Tensor) -> Tensor:
        """Coefficients of B_(p+1) of some A_p: (pairs, selected, 1, rows). columns: of each pair the neurons of layer
        p, (pairs, rows).
        """
        stage = self.chain.stages[p]
        if self.matrices[p] is not None:
            return gathered(stage, self.selections[p].index, columns)[:, :, None]
        one = torch.nn.functional.one_hot(columns, stage.inputs).to(self.dtype).flatten(0, 1)
        return stage.rows(one).unflatten(0, columns.shape).transpose(1, 2)[:, :, None]

    def _tighten(self, p: int) -> None:
        """Cut the box of A_p where the lines of its neuron depend on it, by linear bounds."""
        self._draw_lines(p + 1)
        low, high = self.a[p].lower.clone(), self.a[p].upper.clone()
        own = (low < 0) & (high > 0) & (self.slopes[p - 1][0] < self.slopes[p - 1][1])
        most = int(own.sum(1).max())
        if not most:
            return
        order = own.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        for columns in order.split(self._portion(), dim=1):
            below, above, _ = self._walk(p, self._start(p, columns))
            slack, mine = self.errors[p].gather(1, columns), own.gather(1, columns)
            for end, value, better in ((low, below - slack, torch.maximum), (high, above + slack, torch.minimum)):
                known = end.gather(1, columns)
                end.scatter_(1, columns, torch.where(mine & torch.isfinite(value), better(known, value), known))
        self.a[p] = Interval(low, high)

    def _portion(self) -> int:
        """Rows of one pass, so that their coefficients stay in cache."""
        widest = max(chosen.index.shape[1] for chosen in self.selections)
        return max(1, PORTION // (2 * max(1, widest) * len(self.middle)))

    def _entries(self) -> tuple[Tensor, Tensor]:
        """The Jacobian's entries."""
        inputs = self.chain.stages[0].inputs
        lows, highs, size = [], [], self._portion()
        for start in range(0, inputs, size):
            columns = torch.arange(start, min(start + size, inputs))
            matrix = self.matrices[0]
            if matrix is None:
                m = self._start(0, columns.expand(len(self.middle), -1))
            else:
                m = matrix[:, :, None, start : start + size]
            below, above, _ = self._walk(0, m)
            lows.append(below)
            highs.append(above)
        low, high = torch.cat(lows, 1) - self.errors[0], torch.cat(highs, 1) + self.errors[0]
        # What overflowed says nothing.
        low = torch.fmax(self.a[0].lower, torch.where(torch.isfinite(low), low, -torch.inf))
        high = torch.fmin(self.a[0].upper, torch.where(torch.isfinite(high), high, torch.inf))
        return low, high

    def _together(self, low: Tensor, high: Tensor) -> tuple[Tensor, list[Tensor]]:
        """An upper bound of sum_j |J_j| by its chords, and what each neuron's open derivative adds to it, about."""
        reach = (high - low).clamp(min=rounding.smallest(self.dtype))
        slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, -1.0, (high + low) / reach)).clamp(-1, 1)
        # Above both ends of |.|, whatever the rounding of the slope.
        intercept = torch.maximum(low.abs() - slope * low, high.abs() - slope * high)
        matrix = self.matrices[0]
        start = self.chain.stages[0].rows(slope)[:, :, None] if matrix is None else matrix @ slope[:, :, None]
        _, above, seen = self._walk(0, start[:, :, None])
        if len(self.slopes) == 1 and matrix is None:
            above = above + (slope * self.middle).sum(1, keepdim=True)
        magnitude = torch.maximum(low.abs(), high.abs())
        pad = self.errors[0].sum(1) + 8 * self._gamma(low.shape[1] + 8) * magnitude.sum(1)
        scores = []
        for i, m in enumerate(seen, 1):
            chosen, a = self.selections[i - 1], self.a[i]
            width = self.slopes[i - 1][1] - self.slopes[i - 1][0]
            # Coefficients of the last layer have half the width of B in them.
            wide = chosen.take(torch.maximum(a.lower.abs(), a.upper.abs()) * width if i < len(seen) else 2 + 0 * width)
            score = torch.zeros(len(low), a.lower.shape[1] + 1, dtype=self.dtype)
            score.scatter_(1, chosen.index[:, : chosen.unstable], m[:, : chosen.unstable, -1, 0].abs() * wide)
            scores.append(score[:, :-1])
        return above[:, 0] + intercept.sum(1) + pad * 1.01, scores


def _times(a: Interval, low: Tensor, high: Tensor) -> Interval:
    """The box of a D, D in [low, high], to one rounding."""
    ends = torch.stack([a.lower * low, a.lower * high, a.upper * low, a.upper * high])
    return Interval(ends.amin(0), ends.amax(0))


def chords(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Sides:
    """The lines around A D for A in [a, b] and D in [low, high], all of one shape (batch, neurons)."""
    reach = b - a
    flat = reach <= 0
    reach = torch.where(flat, 1.0, reach)

    def line(at_a: Tensor, at_b: Tensor, side: int) -> tuple[Tensor, Tensor]:
        slope = torch.where(flat, high, (at_b - at_a) / reach)
        slope = torch.minimum(torch.maximum(slope, low), high)
        first, second = at_a - slope * a, at_b - slope * b
        return slope, torch.maximum(first, second) if side > 0 else torch.minimum(first, second)

    below = line(torch.minimum(a * low, a * high), torch.minimum(b * low, b * high), -1)
    above = line(torch.maximum(a * low, a * high), torch.maximum(b * low, b * high), 1)
    return Sides.between(below, above)
