"""The elementwise functions as curves: values, slopes, and the pieces on which a slope is monotone.

A `Curve` is all that `netassay.numerics.bounds.relaxations` needs to know of a function f. Between two neighbouring
inflection points or kinks f is convex, concave or affine, so f' is monotone there and every extreme of f, of f' or of
f(z) - a z over an interval lies at a few known points.

Errors. Each value comes with a bound on its distance from the exact one. PyTorch's float64 functions (SLEEF, MKL, the C
library) err by a few units in the last place; 2^-48 of the value, 16 units, is allowed for each term of a formula, more
where a formula makes an argument's own rounding matter (exp(-z^2 / 2) at z = -30), and 1e-300 for underflow. Values
that need no rounding (relu, and elu and hard_swish where they are the identity) have the bound 0.

Inflection points that are no floats are rounded, by e at most, so f' is not monotone on the last e of a piece; a line
meant to touch there is off by at most |f'''| e^3 / 2, which is in the bounds on errors too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from netassay.heavy import torch
from netassay.networks.graph import Function

if TYPE_CHECKING:
    from torch import Tensor

Name = Function | Literal["relu"]
#: z -> what is computed, and a bound on its distance from the exact value.
Evaluation = Callable[["Tensor"], tuple["Tensor", "Tensor"]]

#: Error allowed for one term of a formula, relative to it.
RELATIVE = 2.0**-48
#: Error allowed where a term underflows.
UNDERFLOW = 1e-300
#: Sines of larger arguments are only known to lie in [-1, 1]: multiples of pi are rounded too coarsely there.
FARTHEST = 2.0**20


@dataclass(frozen=True, eq=False)
class Piece:
    """start <= z <= end, where f is convex (bend 1), concave (-1) or affine (0).

    slope: f' there, one-sided at both ends. touching: slope -> the z where f' has it, as near as it is computed; NaN or
    anything else for a slope that f' does not have. None: no closed form.
    """

    start: float | Tensor
    end: float | Tensor
    bend: int
    slope: Evaluation
    touching: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """value: of finite z in the domain. pieces: those that an interval starting at z may meet, in order; they cover the
    domain. turns: points where f may change from rising to falling or back, likewise, of an interval starting at z.

    limits, slope_limits: of f and f' at -inf and inf. extent, slope_extent: all values of f and f' lie in there.
    domain: what f is defined on. kinks: where f' jumps. longest: intervals as long or longer meet the whole extent on
    both sides of their midpoint, so constant lines are best. farthest: of an interval with an end beyond, only the
    extent is known. constant: always constant lines.
    """

    value: Evaluation
    pieces: Callable[[Tensor], Sequence[Piece]]
    turns: Callable[[Tensor], Sequence[float | Tensor]]
    limits: tuple[float, float]
    slope_limits: tuple[float, float]
    extent: tuple[float, float] = (-math.inf, math.inf)
    slope_extent: tuple[float, float] = (-math.inf, math.inf)
    domain: Literal["all", "nonnegative", "positive", "nonzero"] = "all"
    kinks: tuple[float, ...] = ()
    longest: float = math.inf
    farthest: float = math.inf
    constant: bool = False

    def defined(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Whether f is defined on all of [l, u]: bool."""
        known = lower <= upper  # not so where either is NaN
        if self.domain == "nonnegative":
            return known & (lower >= 0)
        if self.domain == "positive":
            return known & (lower > 0)
        if self.domain == "nonzero":
            return known & ((lower > 0) | (upper < 0))
        return known


def _fixed(*pieces: Piece) -> Callable[[Tensor], Sequence[Piece]]:
    return lambda start: pieces


def _points(*points: float) -> Callable[[Tensor], Sequence[float | Tensor]]:
    return lambda start: points


def _erring(value: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The value with its error, 2^-48 of `size`: the sum of the sizes of its terms, each times its conditioning."""
    return value, RELATIVE * (value if size is None else size).abs() + UNDERFLOW


def _exact(value: Tensor) -> tuple[Tensor, Tensor]:
    return value, torch.zeros_like(value)


def _flat(slope: float) -> Evaluation:
    return lambda z: _exact(torch.full_like(z, slope))


def _conditioning(z: Tensor, reach: float) -> Tensor:
    """1 + z^2 where a Gaussian tail is still above underflow: how the rounding of z^2 grows in exp(-z^2)."""
    return 1 + z.clamp(-reach, reach).square()


def _relu() -> Curve:
    return Curve(
        value=lambda z: _exact(z.clamp(min=0)),
        pieces=_fixed(Piece(-math.inf, 0.0, 0, _flat(0.0)), Piece(0.0, math.inf, 0, _flat(1.0))),
        turns=_points(),
        limits=(0.0, math.inf),
        slope_limits=(0.0, 1.0),
        extent=(0.0, math.inf),
        slope_extent=(0.0, 1.0),
        kinks=(0.0,),
    )


def _sign() -> Curve:
    # f' has no bound where f jumps: both infinities at the point 0.
    at_zero = [Piece(0.0, 0.0, 0, _flat(slope)) for slope in (-math.inf, math.inf)]
    return Curve(
        value=lambda z: _exact(z.sign()),
        pieces=_fixed(Piece(-math.inf, 0.0, 0, _flat(0.0)), *at_zero, Piece(0.0, math.inf, 0, _flat(0.0))),
        turns=_points(),
        limits=(-1.0, 1.0),
        slope_limits=(0.0, 0.0),
        extent=(-1.0, 1.0),
        kinks=(0.0,),
        constant=True,
    )


def _elu(alpha: float) -> Curve:
    if not alpha > 0:
        raise ValueError(f"alpha of elu is {alpha}; it must be above 0")

    def value(z: Tensor) -> tuple[Tensor, Tensor]:
        below, error = _erring(alpha * torch.expm1(z.clamp(max=0)))
        return torch.where(z > 0, z, below), error * (z <= 0)

    return Curve(
        value=value,
        pieces=_fixed(
            Piece(-math.inf, 0.0, 1, lambda z: _erring(alpha * torch.exp(z)), lambda a: torch.log(a / alpha)),
            Piece(0.0, math.inf, 0, _flat(1.0)),
        ),
        turns=_points(),
        limits=(-alpha, math.inf),
        slope_limits=(0.0, 1.0),
        extent=(-alpha, math.inf),
        slope_extent=(0.0, max(1.0, alpha)),
        kinks=() if alpha == 1 else (0.0,),
    )


def _hard_swish() -> Curve:
    def value(z: Tensor) -> tuple[Tensor, Tensor]:
        # z (z + 3) / 6 keeps its digits near -3.
        middle, error = _erring(z.clamp(-3, 3) * (z.clamp(-3, 3) + 3) / 6)
        return torch.where(z.abs() < 3, middle, z.clamp(min=0)), error * (z.abs() < 3)

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        return _erring(z / 3 + 0.5, z.abs() / 3 + 0.5)

    return Curve(
        value=value,
        pieces=_fixed(
            Piece(-math.inf, -3.0, 0, _flat(0.0)),
            Piece(-3.0, 3.0, 1, slope, lambda a: 3 * (a - 0.5)),
            Piece(3.0, math.inf, 0, _flat(1.0)),
        ),
        turns=_points(-1.5),
        limits=(0.0, math.inf),
        slope_limits=(0.0, 1.0),
        slope_extent=(-0.5, 1.5),
        kinks=(-3.0, 3.0),
    )


def _s_shaped(
    value: Evaluation, slope: Evaluation, distance: Callable[[Tensor], Tensor], low: float, steepest: float
) -> Curve:
    """Rising from `low` to 1, convex up to 0 and concave from there. distance: slope -> the |z| that has it."""
    return Curve(
        value=value,
        pieces=_fixed(
            Piece(-math.inf, 0.0, 1, slope, lambda a: -distance(a)), Piece(0.0, math.inf, -1, slope, distance)
        ),
        turns=_points(),
        limits=(low, 1.0),
        slope_limits=(0.0, 0.0),
        extent=(low, 1.0),
        slope_extent=(0.0, steepest),
    )


def _sech_squared(z: Tensor) -> Tensor:
    return torch.cosh(z.clamp(-400, 400)).square().reciprocal()


def _inverse_sech_squared(a: Tensor) -> Tensor:
    """z >= 0 of sech^2 z = a: tanh z = t = sqrt(1 - a) and z = log(1 + t) - log(a) / 2."""
    return torch.log1p(torch.sqrt(1 - a)) - torch.log(a) / 2


def _tanh() -> Curve:
    return _s_shaped(
        lambda z: _erring(torch.tanh(z)), lambda z: _erring(_sech_squared(z)), _inverse_sech_squared, -1.0, 1.0
    )


def _sigmoid() -> Curve:
    return _s_shaped(
        lambda z: _erring(torch.sigmoid(z)),
        lambda z: _erring(torch.sigmoid(z) * torch.sigmoid(-z)),
        lambda a: 2 * _inverse_sech_squared(4 * a),
        0.0,
        0.25,
    )


#: 2 / sqrt(pi), the slope of erf at 0, and a float above it.
_ERF_SLOPE = 2 / math.sqrt(math.pi)
_ERF_STEEPEST = 1.1283791670955128


def _erf() -> Curve:
    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        computed = _ERF_SLOPE * torch.exp(-z.square())
        return _erring(computed, computed * _conditioning(z, 30))

    return _s_shaped(
        lambda z: _erring(torch.erf(z)),
        slope,
        lambda a: torch.sqrt(-torch.log(a / _ERF_SLOPE).clamp(max=0)),
        -1.0,
        _ERF_STEEPEST,
    )


def _exp() -> Curve:
    def value(z: Tensor) -> tuple[Tensor, Tensor]:
        return _erring(torch.exp(z))

    return Curve(
        value=value,
        pieces=_fixed(Piece(-math.inf, math.inf, 1, value, torch.log)),
        turns=_points(),
        limits=(0.0, math.inf),
        slope_limits=(0.0, math.inf),
        extent=(0.0, math.inf),
        slope_extent=(0.0, math.inf),
    )


def _softplus() -> Curve:
    return Curve(
        value=lambda z: _erring(z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))),
        pieces=_fixed(Piece(-math.inf, math.inf, 1, lambda z: _erring(torch.sigmoid(z)), torch.logit)),
        turns=_points(),
        limits=(0.0, math.inf),
        slope_limits=(0.0, 1.0),
        extent=(0.0, math.inf),
        slope_extent=(0.0, 1.0),
    )


def _log() -> Curve:
    return Curve(
        value=lambda z: _erring(torch.log(z)),
        pieces=_fixed(Piece(0.0, math.inf, -1, lambda z: _erring(1 / z), torch.reciprocal)),
        turns=_points(),
        limits=(-math.inf, math.inf),
        slope_limits=(math.inf, 0.0),
        slope_extent=(0.0, math.inf),
        domain="positive",
    )


def _sqrt() -> Curve:
    return _power(0.5)


def _reciprocal() -> Curve:
    return _power(-1.0)


def _power(exponent: float) -> Curve:
    """z^e; its pieces end at 0, where f'' changes sign, is 0, or f ends."""
    e = float(exponent)
    if not math.isfinite(e):
        raise ValueError(f"the exponent of power is {exponent}; it must be finite")
    whole, even = e.is_integer(), e % 2 == 0
    if e == 0:
        return _affine(lambda z: _exact(torch.ones_like(z)), 0.0, (1.0, 1.0))
    if e == 1:
        return _affine(_exact, 1.0, (-math.inf, math.inf))

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        return _erring(e * z ** (e - 1))

    def distance(a: Tensor) -> Tensor:
        return (a / e).abs() ** (1 / (e - 1))

    # Right of 0 the sign of f'' is that of e (e - 1); left of it, f(-z) = f(z) or -f(z).
    right = 1 if e * (e - 1) > 0 else -1
    left = right if even else -right
    pieces = [Piece(0.0, math.inf, right, slope, distance)]
    if whole:
        pieces = [Piece(-math.inf, 0.0, left, slope, lambda a: -distance(a)), *pieces]
    far = math.inf if e > 0 else 0.0
    steep = math.copysign(math.inf if e > 1 else 0.0, e)
    return Curve(
        value=lambda z: _erring(z**e),
        pieces=_fixed(*pieces),
        turns=_points(0.0) if whole and even and e > 0 else _points(),
        limits=(far if even or not whole else -far, far),
        slope_limits=(-steep if even else steep, steep),
        extent=(0.0 if even or not whole else -math.inf, math.inf),
        slope_extent=(-math.inf, math.inf) if even else ((0.0, math.inf) if e > 0 else (-math.inf, 0.0)),
        domain=("all" if e > 0 else "nonzero") if whole else ("nonnegative" if e > 0 else "positive"),
    )


def _affine(value: Evaluation, slope: float, limits: tuple[float, float]) -> Curve:
    return Curve(
        value=value,
        pieces=_fixed(Piece(-math.inf, math.inf, 0, _flat(slope))),
        turns=_points(),
        limits=limits,
        slope_limits=(slope, slope),
        extent=limits,
        slope_extent=(slope, slope),
    )


def _dipping(value: Evaluation, slope: Evaluation, turn: float, inflections: tuple[float, float]) -> Curve:
    """From 0 at -inf down to one minimum at `turn` and up towards z: concave, convex between the two inflection points,
    concave.
    """

    def touched(z: Tensor) -> tuple[Tensor, Tensor]:
        # f''' is below 1 and the inflection points are within 4e-16: e^3 / 2 < 1e-46.
        computed, error = value(z)
        return computed, error + 1e-45

    first, last = inflections
    return Curve(
        value=touched,
        pieces=_fixed(
            Piece(-math.inf, first, -1, slope), Piece(first, last, 1, slope), Piece(last, math.inf, -1, slope)
        ),
        turns=_points(turn),
        limits=(0.0, math.inf),
        slope_limits=(0.0, 1.0),
    )


# The minima and inflection points below are roots of f' and f'' found with 40 digits (mpmath) and rounded to float64.


def _gelu() -> Curve:
    def value(z: Tensor) -> tuple[Tensor, Tensor]:
        computed = 0.5 * z * torch.erfc(-z / math.sqrt(2))
        return _erring(computed, computed * _conditioning(z.clamp(max=0), 40))

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        below = 0.5 * torch.erfc(-z / math.sqrt(2))
        moved = z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        size = below * _conditioning(z.clamp(max=0), 40) + moved.abs() * _conditioning(z, 40)
        return _erring(below + moved, size)

    return _dipping(value, slope, -0.7517915246935645, (-math.sqrt(2), math.sqrt(2)))


def _gelu_tanh() -> Curve:
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715

    def inner(z: Tensor) -> Tensor:
        return scale * (z + cubic * z**3)

    def value(z: Tensor) -> tuple[Tensor, Tensor]:
        v = inner(z)
        computed = z * torch.sigmoid(v)
        return _erring(computed, computed * (1 - v.clamp(-800, 0)))

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        near = z.clamp(-50, 50)  # beyond, the second term underflows
        v = inner(near)
        moved = near * torch.sigmoid(v) * torch.sigmoid(-v) * scale * (1 + 3 * cubic * near**2)
        size = torch.sigmoid(v) * (1 - v.clamp(-800, 0)) + moved.abs() * (1 + v.abs().clamp(max=800))
        return _erring(torch.sigmoid(v) + moved, size)

    return _dipping(value, slope, -0.7524614220710163, (-1.4185040087908283, 1.4185040087908283))


def _silu() -> Curve:
    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        below = torch.sigmoid(z)
        moved = z * below * torch.sigmoid(-z)
        return _erring(below + moved, below + moved.abs())

    return _dipping(
        lambda z: _erring(z * torch.sigmoid(z)), slope, -1.2784645427610737, (-2.3993572805154675, 2.3993572805154675)
    )


def _mish() -> Curve:
    def softplus(z: Tensor) -> Tensor:
        return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        v = softplus(z)
        moved = z * _sech_squared(v) * torch.sigmoid(z)
        # sech^2 v multiplies the relative error of v by 2 v.
        return _erring(torch.tanh(v) + moved, torch.tanh(v) + moved.abs() * (1 + v.clamp(max=400)))

    return _dipping(
        lambda z: _erring(z * torch.tanh(softplus(z))),
        slope,
        -1.1924312145154952,
        (-2.256376396360793, 1.4905711794854284),
    )


def _wave(value: Evaluation, slope: Evaluation, phase: float) -> Curve:
    """sin(z + phase pi / 2) for a whole `phase`: concave from phase -phase pi / 2 on for half a period, then convex."""

    def touched(z: Tensor) -> tuple[Tensor, Tensor]:
        computed, error = value(z)
        # Pieces meet at rounded multiples of pi / 2.
        return computed, error + (2.0**-50 * z.abs() + 2.0**-50) ** 3

    def before(start: Tensor, point: float) -> Tensor:
        """The last `point` pi / 2 + 2 k pi not after `start`, but for rounding, in units of pi / 2."""
        return 4 * torch.floor((start / (math.pi / 2) - point) / 4) + point

    def pieces(start: Tensor) -> Sequence[Piece]:
        origin = before(start, -phase)
        found = []
        # Two periods and the part of a period before the start.
        for half in range(6):
            low, high = origin + 2 * half, origin + 2 * half + 2
            bend = -1 if half % 2 == 0 else 1

            def touching(a: Tensor, low: Tensor = low, bend: int = bend) -> Tensor:
                return low * (math.pi / 2) + torch.acos(-bend * a)

            # A start just below a rounded multiple of pi / 2 still belongs to the first piece.
            begin = torch.minimum(low * (math.pi / 2), start) if half == 0 else low * (math.pi / 2)
            found.append(Piece(begin, high * (math.pi / 2), bend, slope, touching))
        return found

    def turns(start: Tensor) -> Sequence[float | Tensor]:
        # One of each before the start is clamped to it; the next ones are the first inside.
        return [(before(start, point - phase) + after) * (math.pi / 2) for point in (1, 3) for after in (0, 4)]

    return Curve(
        value=touched,
        pieces=pieces,
        turns=turns,
        limits=(math.nan, math.nan),
        slope_limits=(math.nan, math.nan),
        extent=(-1.0, 1.0),
        slope_extent=(-1.0, 1.0),
        longest=12.56,  # two periods
        farthest=FARTHEST,
    )


def _sin() -> Curve:
    return _wave(lambda z: _erring(torch.sin(z)), lambda z: _erring(torch.cos(z)), 0)


def _cos() -> Curve:
    return _wave(lambda z: _erring(torch.cos(z)), lambda z: _erring(-torch.sin(z)), 1)


CURVES: dict[Name, Callable[..., Curve]] = {
    "cos": _cos,
    "elu": _elu,
    "erf": _erf,
    "exp": _exp,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hard_swish": _hard_swish,
    "log": _log,
    "mish": _mish,
    "power": _power,
    "reciprocal": _reciprocal,
    "relu": _relu,
    "sigmoid": _sigmoid,
    "sign": _sign,
    "silu": _silu,
    "sin": _sin,
    "softplus": _softplus,
    "sqrt": _sqrt,
    "tanh": _tanh,
}


@lru_cache(maxsize=256)
def curve(function: Name, parameters: tuple[float, ...] = ()) -> Curve:
    """The curve of a function with these parameters.

    Raises ValueError for a function that has none, or parameters that it is not defined for.
    """
    if function not in CURVES:
        raise ValueError(f"no curve is known for {function!r}; known are {', '.join(sorted(CURVES))}")
    return CURVES[function](*parameters)
