"""Elementwise functions and products over intervals: images, slopes, linear relaxations, where to split.

    lower_slope z + lower_intercept  <=  f(z)  <=  upper_slope z + upper_intercept      for all z in [l, u]

The tightest line above f, by the area between the two, touches the concave envelope of f over [l, u] at the midpoint,
since the integral of a line is its width times its value there; the line below likewise, mirrored. So for a convex f
they are the secant and the tangent at the midpoint, for an S-shaped f often the tangent through an end, for ReLU the
usual triangle with the adaptive lower slope: one rule for every function. `tightness_loss` is the width times the gap
of the two lines at the midpoint.

Slopes are found by iteration and only approximately best; intercepts are then proved for the slopes as they are. With
h = f - a z, the maximum of h over a piece on which f is convex lies at an end, and over one on which f is concave

    h(z) <= h(t) + max(h'(t) (u - t), -h'(t) (t - l))       for any t,

exact where h'(t) = 0, so that nothing depends on how well the touching point t was found. Values and slopes come with
bounds on their errors (`netassay.numerics.bounds.curves`), and all rounding is outward: everything here but
`slopes_range`, `tightness_loss` and `branching_point` holds in real arithmetic.

All functions take tensors of any shape, float64 or float32, and work elementwise; the computation is in float64 and
rounded outward to float32. l > u is a ValueError. Where f is not defined on all of [l, u], or an end is NaN, there is
no bound: images and slopes are (-inf, inf), lines have slope 0 and intercepts -inf and inf. With an infinite end, lines
have slope 0 and the image as intercepts.

References: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018. Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh. Fast and complete: enabling complete neural network
verification with rapid and massively parallel incomplete verifiers. 2021 (optimised slopes). Shi, Jin, Kolter, Jana,
Hsieh, Zhang. Neural network verification with branch-and-bound for general nonlinearities. 2024 (branching points).
McCormick. Computability of global solutions to factorable nonconvex programs: part I. 1976.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.numerics.bounds.curves import RELATIVE, Curve, Name, Piece, curve

if TYPE_CHECKING:
    from torch import Tensor

#: An end this far out counts as infinite for lines, so that products of an end and a slope do not overflow.
FAR = 1e100
#: No more than the largest float that a value may have where its computation overflowed.
LARGEST = 1.7976931e308
#: Unit roundoff of float64.
UNIT = 2.0**-53
#: Steps of the search for the slope of an envelope; it converges like Newton's method.
STEPS = 16
#: Steps of the search for a touching point without a closed form, at most; every sixth one is a bisection.
TOUCHES = 24


@dataclass(frozen=True, eq=False)
class Lines:
    """Slopes and intercepts of a line below and a line above, each of the shape of the interval."""

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


def image(function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The range of f over [l, u]: exact but for a few 2^-48 of its ends, outward."""
    c = curve(function, tuple(parameters))
    low, high = _image(c, *_interval(lower, upper))
    return _narrowed(low, lower, -1), _narrowed(high, lower, 1)


def derivative(function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The range of f' over [l, u], likewise; at a kink all slopes between those of its two sides (Clarke).

    f' is monotone between inflection points, so this is exact for every function, but for a few 2^-48 of the terms of
    f'. For sign it is (-inf, inf) where 0 is in [l, u], else (0, 0).
    """
    c = curve(function, tuple(parameters))
    low, high = _derivative(c, *_interval(lower, upper))
    return _narrowed(low, lower, -1), _narrowed(high, lower, 1)


def lines(function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor) -> Lines:
    """The line below and the line above of the smallest area."""
    c = curve(function, tuple(parameters))
    low, high = _interval(lower, upper)
    slopes = [_to(_best(c, low, high, side), lower) for side in (-1, 1)]
    return _lines(c, low, high, *slopes)


def lines_with_slopes(
    function: Name,
    parameters: tuple[float, ...],
    lower: Tensor,
    upper: Tensor,
    lower_slope: Tensor,
    upper_slope: Tensor,
) -> Lines:
    """The lines of the given slopes that touch f, for slopes that are being optimised.

    An intercept is f(t) - a t at the touching point t, so its gradient by the slope a is -t (the envelope theorem); l
    and u have no gradient. Slopes may have axes of their own before those of the interval. Slopes that are not finite
    have no bound.
    """
    c = curve(function, tuple(parameters))
    low, high = _interval(*torch.broadcast_tensors(lower, upper, lower_slope, upper_slope)[:2])
    lower_slope, upper_slope = lower_slope.expand(low.shape), upper_slope.expand(low.shape)
    return _lines(c, low, high, lower_slope, upper_slope)


def slopes_range(
    function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least and largest useful slope of the line below, then of the line above.

    They are the slopes of the envelope at both ends of [l, u]: steeper ones are nowhere better. For tanh over l < 0 < u
    with a far l the line above goes from the tangent through (l, f(l)) to the one at u. Where f' is infinite at an end
    (sqrt at 0), the envelope's slope is taken a little inside.
    """
    c = curve(function, tuple(parameters))
    low, high = _interval(lower, upper)
    # The slope at the middle too: one at an end may have overflowed.
    convex, concave = (
        torch.stack([_to(_best(c, low, high, side, where), lower) for where in (0.0, 0.5, 1.0)]) for side in (-1, 1)
    )
    return convex.amin(0), convex.amax(0), concave.amin(0), concave.amax(0)


def tightness_loss(function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor) -> Tensor:
    """The area between the line above and the line below over [l, u]; inf where there is no bound. Not rounded."""
    found = lines(function, parameters, lower, upper)
    middle = lower / 2 + upper / 2
    gap = (found.upper_slope - found.lower_slope) * middle + (found.upper_intercept - found.lower_intercept)
    loss = gap.clamp(min=0) * (upper - lower)
    return torch.where(torch.isnan(loss), torch.inf, loss)


@dataclass(frozen=True, eq=False)
class Planes:
    """lower_x x + lower_y y + lower_constant  <=  x y  <=  upper_x x + upper_y y + upper_constant."""

    lower_x: Tensor
    lower_y: Tensor
    lower_constant: Tensor
    upper_x: Tensor
    upper_y: Tensor
    upper_constant: Tensor


def mccormick(
    lx: Tensor, ux: Tensor, ly: Tensor, uy: Tensor, t: Tensor | float = 0.5, t_upper: Tensor | float | None = None
) -> Planes:
    """Planes below and above x y over [lx, ux] x [ly, uy], between McCormick's two on either side:

        x y >= t (ly x + lx y - lx ly) + (1 - t) (uy x + ux y - ux uy),
        x y <= s (uy x + lx y - lx uy) + (1 - s) (ly x + ux y - ux ly),     t, s in [0, 1], s is `t_upper` or else t.

    A bilinear function has its extremes over a box at the corners, so the constants are taken from there, outward, for
    the coefficients as rounded. They are differentiable by t and s, in the sense of `lines_with_slopes`. With t = 1/2
    the planes meet x y at two opposite corners. An infinite or NaN bound gives coefficients 0 and infinite constants.
    """
    s = t if t_upper is None else t_upper
    lx, ux, ly, uy = torch.broadcast_tensors(lx, ux, ly, uy)
    dtype = torch.promote_types(torch.promote_types(lx.dtype, ux.dtype), torch.promote_types(ly.dtype, uy.dtype))
    (x0, x1), (y0, y1) = _interval(lx, ux), _interval(ly, uy)
    known = (x0.abs() < FAR) & (x1.abs() < FAR) & (y0.abs() < FAR) & (y1.abs() < FAR)
    box = [torch.where(known, end, 0.0) for end in (x0, x1, y0, y1)]
    fx, tx, fy, ty = (end.to(dtype) for end in box)
    below = _plane(t * fy + (1 - t) * ty, t * fx + (1 - t) * tx, box, known, -1)
    above = _plane(s * ty + (1 - s) * fy, s * fx + (1 - s) * tx, box, known, 1)
    return Planes(*below, *above)


def _plane(a: Tensor, b: Tensor, box: list[Tensor], known: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and the constant that keeps a x + b y + constant on its side of x y over the box."""
    slope_x, slope_y = a.detach().double(), b.detach().double()
    x0, x1, y0, y1 = box
    top = torch.full_like(slope_x, -math.inf)
    at_x, at_y = torch.zeros_like(top), torch.zeros_like(top)
    for x, y in ((x0, y0), (x0, y1), (x1, y0), (x1, y1)):
        height = side * (x * y - slope_x * x - slope_y * y)
        error = 4 * UNIT * ((x * y).abs() + (slope_x * x).abs() + (slope_y * y).abs()) + 1e-300
        # Of numbers with at most 24 digits that are multiples of the same power of 2, all of this is exact.
        error = torch.where(_coarse(x) & _coarse(y) & _coarse(slope_x) & _coarse(slope_y), 0.0, error)
        bound = _above(height, error)
        better = bound > top
        top = torch.where(better, bound, top)
        at_x, at_y = torch.where(better, x, at_x), torch.where(better, y, at_y)
    constant = _narrowed(side * torch.where(known, top, math.inf), a, side)
    moved = (a - a.detach()) * at_x.to(a.dtype) + (b - b.detach()) * at_y.to(a.dtype)
    return a, b, constant - moved if moved.requires_grad else constant


def _coarse(x: Tensor) -> Tensor:
    """Whether x is a multiple of 2^-20 below 2^4."""
    return (x.abs() < 16) & (x * 2.0**20 == torch.round(x * 2.0**20))


# --- where to split --------------------------------------------------------------------------------------------------

#: The table of branching points covers intervals in [-RANGE, RANGE], from GRID + 1 points.
RANGE, GRID = 5.0, 500


def branching_point(function: Name, parameters: tuple[float, ...], lower: Tensor, upper: Tensor) -> Tensor:
    """p in [l, u] where `tightness_loss` over [l, p] plus that over [p, u] is least (Shi et al. 2024, section 3.3).

    From a table of all intervals with ends on a grid of step 0.02 in [-5, 5], made when a function is first asked for
    (Shi et al.: 0.01); the nearest entry counts. Intervals that leave the table or are shorter than four steps are
    split at a kink of f inside, else at their middle, as are those where f has no bound. Intervals of sin and cos that
    leave it are shifted by whole periods first. For ReLU over l < 0 < u it is 0.
    """
    c = curve(function, tuple(parameters))
    low, high = _interval(lower, upper)
    finite = torch.isfinite(low) & torch.isfinite(high)
    low, high = torch.where(finite, low, 0.0), torch.where(finite, high, 0.0)
    middle = low / 2 + high / 2
    shift = torch.zeros_like(low)
    if c.longest < math.inf:
        outside = (low < -RANGE) | (high > RANGE)
        shift = torch.where(outside, 2 * math.pi * torch.round(middle / (2 * math.pi)), shift)
    p = middle
    for kink in c.kinks:
        p = torch.where((low < kink) & (high > kink), kink, p)
    straight = all(piece.bend == 0 for piece in c.pieces(low)) and not c.constant
    if not straight:
        table, step = _branching_table(function, tuple(parameters)), 2 * RANGE / GRID
        start, end = low - shift, high - shift
        tabled = (start.abs() <= RANGE) & (end.abs() <= RANGE) & (high - low >= 4 * step)
        row, column = ((torch.round((z.clamp(-RANGE, RANGE) + RANGE) / step)).long() for z in (start, end))
        entry = table[row, column] + shift
        p = torch.where(tabled & (entry > low) & (entry < high), entry, p)
    return torch.where(finite, p, lower.detach() / 2 + upper.detach() / 2).to(lower.dtype)


@lru_cache(maxsize=64)
def _branching_table(function: Name, parameters: tuple[float, ...]) -> Tensor:
    """(GRID + 1, GRID + 1): the best p for an interval from grid point i to j; NaN where none has a finite loss."""
    grid = (torch.arange(GRID + 1, dtype=torch.float64) - GRID / 2) * (2 * RANGE / GRID)
    i, j = torch.triu_indices(GRID + 1, GRID + 1, offset=1)
    loss = torch.full((GRID + 1, GRID + 1), torch.inf, dtype=torch.float64)
    loss[i, j] = tightness_loss(function, parameters, grid[i], grid[j])
    # The middle is on the grid for every other interval only; for the rest it is tried too.
    middle = (grid[i] + grid[j]) / 2
    halves = tightness_loss(function, parameters, grid[i], middle) + tightness_loss(
        function, parameters, middle, grid[j]
    )
    least, best = torch.full_like(loss, torch.inf), torch.full_like(loss, torch.nan)
    least[i, j], best[i, j] = halves, torch.where(torch.isfinite(halves), middle, torch.nan)
    for k in range(1, GRID):
        both = loss[:k, k, None] + loss[k, None, k + 1 :]
        better = both < least[:k, k + 1 :]
        least[:k, k + 1 :] = torch.where(better, both, least[:k, k + 1 :])
        best[:k, k + 1 :] = torch.where(better, grid[k], best[:k, k + 1 :])
    return best


# --- intervals -------------------------------------------------------------------------------------------------------


def _interval(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The interval in float64, without gradients. Raises ValueError where l > u."""
    if lower.shape != upper.shape:
        lower, upper = torch.broadcast_tensors(lower, upper)
    if bool((lower > upper).any()):
        raise ValueError("an interval ends before it begins: l > u; check which bound is which")
    return lower.detach().double(), upper.detach().double()


def _to(x: Tensor, like: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x.to(like.dtype)), x.to(like.dtype), 0.0)


def _narrowed(x: Tensor, like: Tensor, side: int) -> Tensor:
    """x in the dtype of `like`, rounded up (side 1) or down (-1)."""
    y = x.to(like.dtype)
    if like.dtype == torch.float64:
        return y
    beyond = torch.nextafter(y, torch.full_like(y, side * math.inf))
    return torch.where(side * y.double() < side * x, beyond, y)


def _above(x: Tensor, error: Tensor) -> Tensor:
    """No less than x + error; x itself where error is 0."""
    y = torch.nextafter(x + error * (1 + 2.0**-40), torch.full_like(x, math.inf))
    return torch.where(error == 0, x, y).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _values(c: Curve, z: Tensor, side: int) -> Tensor:
    """No less than f(z) for side 1, no more than f(z) for side -1."""
    value, error = c.value(z.clamp(-1e300, 1e300))
    bound = side * _above(side * value, torch.where(torch.isfinite(error), error, 1.0))
    bound = torch.where(z == math.inf, c.limits[1], torch.where(z == -math.inf, c.limits[0], bound))
    # A value that overflowed is not infinite.
    bound = bound.clamp(max=LARGEST) if side < 0 else bound.clamp(min=-LARGEST)
    return bound.clamp(*c.extent)


def _outside(c: Curve, lower: Tensor, upper: Tensor) -> Tensor:
    """Where no more is known than the extent of f."""
    far = torch.maximum(lower.abs(), upper.abs()) > c.farthest
    return far if c.longest == math.inf else far | (upper - lower >= c.longest)


def _without(mask: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The interval, harmless where its result will not be used."""
    return torch.where(mask, 1.0, lower), torch.where(mask, 1.0, upper)


def _image(c: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    undefined, outside = ~c.defined(lower, upper), _outside(c, lower, upper)
    low, high = _without(undefined | outside, lower, upper)
    points = [low, high, *(torch.clamp(torch.as_tensor(t, dtype=lower.dtype), low, high) for t in c.turns(low))]
    ends = []
    for side, extreme in ((-1, torch.minimum), (1, torch.maximum)):
        found = _values(c, points[0], side)
        for point in points[1:]:
            found = extreme(found, _values(c, point, side))
        found = torch.where(outside, c.extent[side > 0], found)
        ends.append(torch.where(undefined, side * math.inf, found))
    return ends[0], ends[1]


def _derivative(c: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    undefined, outside = ~c.defined(lower, upper), _outside(c, lower, upper)
    low, high = _without(undefined | outside, lower, upper)
    ends = []
    for side in (-1, 1):
        found = torch.full_like(low, -math.inf)
        for piece in c.pieces(low):
            inside = (low <= piece.end) & (high >= piece.start)
            for z in (low, high):
                slope, error = piece.slope(_within(piece, z).clamp(-1e300, 1e300))
                bound = _above(side * slope, torch.where(torch.isfinite(error), error, 1.0))
                bound = torch.where(slope == side * math.inf, math.inf, bound.clamp(min=-LARGEST))
                found = torch.where(inside, torch.maximum(found, bound), found)
        found = torch.where(low == -math.inf, found.clamp(min=side * c.slope_limits[0]), found)
        found = torch.where(high == math.inf, found.clamp(min=side * c.slope_limits[1]), found)
        found = (side * found).clamp(*c.slope_extent)
        found = torch.where(outside, c.slope_extent[side > 0], found)
        ends.append(torch.where(undefined, side * math.inf, found))
    return ends[0], ends[1]


def _within(piece: Piece, z: Tensor) -> Tensor:
    start = torch.as_tensor(piece.start, dtype=z.dtype, device=z.device)
    end = torch.as_tensor(piece.end, dtype=z.dtype, device=z.device)
    return torch.clamp(z, start, end)


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(c: Curve, lower: Tensor, upper: Tensor, lower_slope: Tensor, upper_slope: Tensor) -> Lines:
    return Lines(
        lower_slope,
        _intercept(c, lower, upper, lower_slope, -1),
        upper_slope,
        _intercept(c, lower, upper, upper_slope, 1),
    )


def _unbent(c: Curve, lower: Tensor, upper: Tensor) -> Tensor:
    """Where lines are made from the image alone."""
    far = (lower.abs() > FAR) | (upper.abs() > FAR) | ~c.defined(lower, upper) | _outside(c, lower, upper)
    return torch.ones_like(far) if c.constant else far


def _intercept(c: Curve, lower: Tensor, upper: Tensor, slope: Tensor, side: int) -> Tensor:
    """The least intercept that keeps the line on its side of f, in the dtype of the slope, with its gradient."""
    a = slope.detach().double()
    lower, upper, a = lower.expand(a.shape), upper.expand(a.shape), a.expand(lower.shape)
    shape = a.shape
    lower, upper, a = lower.reshape(-1), upper.reshape(-1), a.reshape(-1)
    unbent = _unbent(c, lower, upper)
    low, high = _without(unbent, lower, upper)
    top, touching = _support(c, low, high, torch.where(torch.isfinite(a), a, 0.0), side)
    if bool(unbent.any()):
        # side (f - a z) <= max side f + max -side a z.
        extreme = side * _image(c, lower, upper)[side > 0]
        end = torch.where(side * a > 0, lower, upper)
        product = torch.where(a == 0, 0.0, -side * a * end)
        error = torch.where((a == 0) | (extreme.abs() == math.inf), 0.0, 4 * UNIT * (extreme.abs() + product.abs()))
        constant = torch.where(extreme == math.inf, extreme, _above(extreme + product, error))
        top, touching = torch.where(unbent, constant, top), torch.where(unbent, end, touching)
    top = torch.where(torch.isfinite(a), top, math.inf)
    intercept = _narrowed((side * top).reshape(shape), slope, side)
    if not slope.requires_grad:
        return intercept
    touching = touching.nan_to_num(nan=0.0).clamp(-FAR, FAR).reshape(shape).to(slope.dtype)
    return intercept - (slope - slope.detach()) * touching


def _height(c: Curve, z: Tensor, a: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """side (f(z) - a z) and a bound on its error, 0 where nothing was rounded."""
    value, error = c.value(z)
    # A value that overflowed is infinite only on the side where that is safe.
    value = value.clamp(max=LARGEST) if side < 0 else value.clamp(min=-LARGEST)
    error = torch.where(torch.isfinite(error), error, RELATIVE * LARGEST)
    product = a * z
    # Exact where a is 0, 1 or -1, or the product has at most 48 digits.
    short = (a == 0) | (a.abs() == 1) | ((a == a.float()) & (z == z.float()))
    error = error + torch.where(short, 0.0, UNIT * product.abs() + 1e-300)
    height = value - product
    # What this subtraction loses, exactly (Knuth, The art of computer programming, volume 2, 4.2.2, theorem B).
    moved = height - value
    error = error + ((value - (height - moved)) - (product + moved)).abs()
    return side * height, error


def _support(c: Curve, lower: Tensor, upper: Tensor, a: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """No less than the maximum of side (f(z) - a z) over [l, u], and a z at which it nearly is. All (n,)."""
    top, at = torch.full_like(lower, -math.inf), lower.clone()
    for number, piece in enumerate(c.pieces(lower)):
        inside = (lower <= piece.end) & (upper >= piece.start)
        index = inside.nonzero()[:, 0]
        if len(index) == 0:
            continue
        if len(index) == len(lower):
            some = (lower, upper, a)
        else:
            some = (lower[index], upper[index], a[index])
            piece = c.pieces(some[0])[number]
        low, high = _within(piece, some[0]), _within(piece, some[1])
        if side * piece.bend < 0:
            candidates = [_touch(piece, low, high, some[2], side)]
        else:
            candidates = [(low, torch.zeros_like(low)), (high, torch.zeros_like(high))]
        best, where = top[index], at[index]
        for z, slack in candidates:
            height, error = _height(c, z, some[2], side)
            bound = _above(height, error + slack)
            better = bound > best
            best, where = torch.where(better, bound, best), torch.where(better, z, where)
        top[index], at[index] = best, where
    return top, at


def _touch(piece: Piece, low: Tensor, high: Tensor, a: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where side (f - a z), concave on the piece, is largest, and how much higher it can be than there."""
    falling = side * (piece.slope(low)[0] - a) <= 0
    rising = side * (piece.slope(high)[0] - a) >= 0
    if piece.touching is not None:
        z = piece.touching(a)
        z = torch.where(torch.isnan(z), low / 2 + high / 2, torch.clamp(z, low, high))
    else:
        z = _search(piece, low, high, a, ~(falling | rising))
    z = torch.where(falling, low, torch.where(rising, high, z))
    slope, error = piece.slope(z)
    steep = side * (slope - a)
    right, left = high - z, z - low
    up = torch.where(right == 0, 0.0, (steep + error) * right)
    down = torch.where(left == 0, 0.0, (error - steep) * left)
    slack = torch.maximum(up, down).clamp(min=0) * (1 + 2.0**-40)
    return z, torch.where(torch.isnan(slack), math.inf, slack)


def _search(piece: Piece, low: Tensor, high: Tensor, a: Tensor, wanted: Tensor) -> Tensor:
    """z with f'(z) = a, from a table of f' and then by false position (Anderson, Björck 1973) and bisection."""
    found = low / 2 + high / 2
    index = wanted.nonzero()[:, 0]
    nodes, slopes = _table(piece)
    a = a[index]
    after = torch.searchsorted(slopes, a).clamp(1, len(slopes) - 1)
    p, q, at_p, at_q = nodes[after - 1], nodes[after], slopes[after - 1] - a, slopes[after] - a
    for step in range(TOUCHES):
        if len(index) == 0:
            break
        middle = p / 2 + q / 2
        z = middle if step % 6 == 5 else (p * at_q - q * at_p) / (at_q - at_p)
        z = torch.where(torch.isfinite(z), torch.clamp(z, torch.minimum(p, q), torch.maximum(p, q)), middle)
        found[index] = z
        at_z = piece.slope(z)[0] - a
        below = at_z < 0
        # The end that stays is given less weight, lest it stay for ever.
        weight = 1 - at_z / torch.where(below, at_p, at_q)
        weight = torch.where(weight > 0, weight, 0.5)
        at_p, at_q = torch.where(below, at_z, at_p * weight), torch.where(below, at_q * weight, at_z)
        p, q = torch.where(below, z, p), torch.where(below, q, z)
        going = (at_z.abs() > 16 * UNIT * (1 + a.abs())) & ((q - p).abs() > 4 * UNIT * (p.abs() + q.abs()))
        if not bool(going.all()):
            index, a, p, q, at_p, at_q = (x[going] for x in (index, a, p, q, at_p, at_q))
    return torch.clamp(found, low, high)


@lru_cache(maxsize=256)
def _table(piece: Piece) -> tuple[Tensor, Tensor]:
    """z and f'(z) at many points of a piece of which f' has no closed inverse, by rising f'.

    Beyond 40 the slopes of such functions are constant for all that float64 can tell.
    """
    start, end = max(-40.0, float(piece.start)), min(40.0, float(piece.end))
    nodes = torch.linspace(start, end, 8193, dtype=torch.float64)
    slopes = piece.slope(nodes)[0]
    return (nodes, slopes) if piece.bend > 0 else (nodes.flip(0), slopes.flip(0))


def _best(c: Curve, lower: Tensor, upper: Tensor, side: int, where: float = 0.5) -> Tensor:
    """The slope of the concave (side 1) or convex (-1) envelope of f over [l, u] at l + where (u - l)."""
    if c.constant:
        return torch.zeros_like(lower)
    shape = lower.shape
    lower, upper = lower.reshape(-1), upper.reshape(-1)
    unbent = _unbent(c, lower, upper)
    low, high = _without(unbent, lower, upper)
    slope = torch.where(unbent, 0.0, _envelope(c, low, high, side, where))
    return torch.where(torch.isfinite(slope), slope, 0.0).reshape(shape)


def _slope(c: Curve, m: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """f'(m) and the bend of f there, by the first piece that holds m; lower: where the interval starts."""
    slope, bend = torch.full_like(m, math.nan), torch.zeros_like(m)
    for piece in reversed(c.pieces(lower)):
        here = (m >= piece.start) & (m <= piece.end)
        slope = torch.where(here, piece.slope(_within(piece, m))[0], slope)
        bend = torch.where(here, piece.bend, bend)
    return slope, bend


def _envelope(c: Curve, lower: Tensor, upper: Tensor, side: int, where: float) -> Tensor:
    """The tangent at m where it keeps to one side of f, else the bridge over m between two points of the envelope.

    Newton's method on the dual: a line through a point on each side of m is raised in parallel until it touches f, and
    the touching point replaces the one on its side.
    """
    m = {0.0: lower, 0.5: lower / 2 + upper / 2, 1.0: upper}[where]
    slope, bend = _slope(c, m, lower)
    infinite = ~torch.isfinite(slope)
    if where != 0.5 and bool(infinite.any()):
        m = torch.where(infinite, m + (0.5 - where) * (upper - lower) / 512, m)
        slope, bend = _slope(c, m, lower)
    a = torch.where(torch.isfinite(slope), slope, 0.0)
    # Where f bends to the wrong side at m, its tangent there can only be right for an interval of one point.
    bridged = (side * bend > 0) if where == 0.5 else torch.zeros_like(m, dtype=torch.bool)
    index = (~bridged).nonzero()[:, 0]
    if len(index):
        of = (lower[index], upper[index])
        gap, noise = _gap(c, *of, a[index], m[index], side)[:2]
        bridged[index] = gap > noise
    index = (bridged & (upper > lower)).nonzero()[:, 0]
    lower, upper, m = lower[index], upper[index], m[index]
    p, q = lower, upper
    for _ in range(STEPS):
        if len(index) == 0:
            break
        secant = _secant(c, p, q)
        a[index] = secant
        gap, noise, z = _gap(c, lower, upper, secant, p, side)
        left = z <= m
        going = (gap > noise) & (z > p) & (z < q)
        p, q = torch.where(left, z, p), torch.where(left, q, z)
        if not bool(going.all()):
            index, lower, upper, m, p, q = (x[going] for x in (index, lower, upper, m, p, q))
    return a


def _secant(c: Curve, p: Tensor, q: Tensor) -> Tensor:
    """The slope from (p, f(p)) to (q, f(q)), one that f' has between them where p and q are too near to tell."""
    (start, before), (end, after) = c.value(p), c.value(q)
    secant = (end - start) / (q - p)
    index = (~(before + after < 2.0**-10 * (end - start).abs())).nonzero()[:, 0]
    if len(index):
        least, largest = _derivative(c, p[index], q[index])
        secant[index] = torch.clamp(secant[index], least, largest)
    return secant


def _gap(c: Curve, lower: Tensor, upper: Tensor, a: Tensor, z: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far f rises over the line of slope a through (z, f(z)), what of that may be noise, and where it does."""
    at = _support(c, lower, upper, torch.where(torch.isfinite(a), a, 0.0), side)[1]
    here, there = c.value(z)[0], c.value(at)[0]
    gap = side * ((there - here) - a * (at - z))
    return gap, 2.0**-46 * (here.abs() + there.abs() + (a * (at - z)).abs()) + 1e-300, at
