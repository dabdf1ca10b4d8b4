"""The values of an axis: listed, evenly spaced, from file names, or drawn at random. Their number is known unmade.

    [a, b, c]                       these
    {range: [0, 10, 2]}             0, 2, 4, 6, 8: whole numbers, start, stop[, step], without the stop
    {linspace: [0, 1, 11]}          0, 0.1, ..., 1: so many in even steps, both ends among them
    {geomspace: [1e-4, 1e-1, 4]}    1e-4, 1e-3, 1e-2, 1e-1: so many in even ratios, both ends among them
    {glob: "nets/*.onnx"}           the files that match, sorted

Random draws (`random: {count: 100, seed: 1, draw: {lr: {log_uniform: [1e-4, 1e-1]}}}`) are by counter, not by a stream:
draw i of axis a is made from BLAKE2b(f"{seed}/{a}/{i}", 32 bytes) alone. So the first 10 of 100 draws are the 10 draws
of count 10, an axis more changes no other, and the values are the same on every platform and version of Python: only
operations that are correctly rounded everywhere are used (+ - * /, square root, and decimal's ln and exp).

    {uniform: [a, b]}       a + (b - a) u, with u the digest's first 53 bits / 2^53
    {log_uniform: [a, b]}   a exp(u ln(b / a)), ends above 0
    {integers: [a, b]}      a whole number from a to b, both among them, each as likely
    {choice: [x, y, ...]}   one of these, each as likely
    {normal: [m, s]}        m + s z, z standard normal by the polar method of Marsaglia
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from producer import wording

#: Decimal digits of intermediate results: so many that only the last rounding, to a float of 17 digits, counts.
_DECIMAL = Context(prec=30)
#: The longest axis: more rows than a batch can hold, and still a length that Python can count.
LONGEST = 10**9

_FORMS = ("range", "linspace", "geomspace", "glob")
_DRAWS = ("uniform", "log_uniform", "integers", "choice", "normal")


@dataclass(frozen=True)
class Computed(Sequence[Any]):
    """`length` values, each made when it is asked for, by its place."""

    length: int
    make: Callable[[int], Any]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.make(at) for at in range(self.length)[place]]
        return self.make(range(self.length)[place])


def axis(values: Any, base: Path) -> Sequence[Any]:
    """The values of an axis as a sweep writes them. base: the folder that a glob starts from. Raises ValueError."""
    if isinstance(values, Mapping) and len(values) == 1:
        ((form, given),) = values.items()
        match form:
            case "range":
                return _range(given)
            case "linspace":
                return _spaced("linspace", given)
            case "geomspace":
                return _spaced("geomspace", given)
            case "glob":
                return _glob(given, base)
        if near := wording.nearest(form, _FORMS):
            raise ValueError(f"`{form}` is not known here{near} (known: {', '.join(_FORMS)})")
    if not isinstance(values, list):
        raise ValueError(
            f"is {wording.short(values)}, must be a list of values or {{range: [start, stop]}} (also known: "
            f"{', '.join(_FORMS[1:])})"
        )
    if not values:
        raise ValueError("is an empty list, which makes no jobs; leave it out to use the default")
    return values


def _range(ends: Any) -> Sequence[int]:
    whole = isinstance(ends, list) and all(_is_whole(end) for end in ends)
    if not whole or len(ends) not in (2, 3):
        raise ValueError(f"range is {wording.short(ends)}, must be [start, stop] or [start, stop, step], whole numbers")
    if len(ends) == 3 and ends[2] == 0:
        raise ValueError("range has step 0")
    values = range(*ends)
    if not values:
        raise ValueError(f"range {wording.short(ends)} is empty; the stop itself is not part of it")
    step = ends[2] if len(ends) == 3 else 1
    _bounded("range", (ends[1] - ends[0]) // step)
    return values


def _spaced(form: str, given: Any) -> Sequence[float]:
    right = isinstance(given, list) and len(given) == 3 and all(map(_is_number, given[:2])) and _is_whole(given[2])
    if not right or given[2] < 2:
        raise ValueError(
            f"{form} is {wording.short(given)}, must be [first, last, n]: two finite numbers and how many values, 2 or "
            "more, both ends among them"
        )
    first, last, count = given
    _bounded(form, count)
    if form == "linspace":
        # As the numbers are written, so that [0, 1, 11] yields 0.3 and not 0.30000000000000004.
        low, high = Fraction(str(first)), Fraction(str(last))
        return Computed(count, lambda place: float(low + (high - low) * place / (count - 1)))
    if first == 0 or last == 0 or (first > 0) != (last > 0):
        raise ValueError(f"geomspace is {wording.short(given)}, must have ends of the same sign, neither of them 0")
    start = Decimal(str(first))
    ratio = _DECIMAL.ln(_DECIMAL.divide(Decimal(str(last)), start))

    def at(place: int) -> float:
        if place == count - 1:
            return float(last)
        share = _DECIMAL.divide(_DECIMAL.multiply(ratio, Decimal(place)), Decimal(count - 1))
        return float(_DECIMAL.multiply(start, _DECIMAL.exp(share)))

    return Computed(count, at)


def _glob(pattern: Any, base: Path) -> Sequence[str]:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"glob is {wording.short(pattern)}, must be a pattern of file names such as 'nets/*.onnx'")
    found = sorted(path for path in glob.glob(pattern, root_dir=base, recursive=True) if (base / path).is_file())
    if not found:
        raise ValueError(f"glob {pattern!r} matches no file in {base.absolute()}; it starts from the sweep's folder")
    return found


# --- random draws -----------------------------------------------------------------------------------------------------


def draws(given: Any) -> dict[str, Sequence[Any]]:
    """The axes of an entry's `random`, all of the same length. Raises ValueError with all that is wrong, in lines."""
    known = ("count", "seed", "draw")
    if not isinstance(given, Mapping):
        raise ValueError(f"is {wording.short(given)}, must be a mapping with count, seed and draw")
    wrongs = [
        f"`{key}` is not known here{wording.nearest(key, known)} (known: {', '.join(known)})"
        for key in given
        if key not in known
    ]
    count, seed, draw = given.get("count"), given.get("seed", 0), given.get("draw")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= LONGEST:
        wrongs.append(
            "count is missing; it says how many points are drawn"
            if count is None
            else f"count is {wording.short(count)}, must be a whole number from 1 to {LONGEST:,}"
        )
        count = 1
    if not _is_whole(seed):
        wrongs.append(f"seed is {wording.short(seed)}, must be a whole number")
    axes: dict[str, Sequence[Any]] = {}
    if not isinstance(draw, Mapping) or not draw or not all(isinstance(name, str) for name in draw):
        wrongs.append(
            f"draw is {wording.short(draw)}, must be a mapping from names of parameters to such as {{uniform: [0, 1]}}"
        )
    else:
        for name, rule in draw.items():
            try:
                axes[name] = Computed(count, _draw(rule, f"{seed}/{name}"))
            except ValueError as error:
                wrongs.append(f"{name} {error}")
    if wrongs:
        raise ValueError("\n".join(wrongs))
    return axes


def _draw(rule: Any, stream: str) -> Callable[[int], Any]:
    if not isinstance(rule, Mapping) or len(rule) != 1:
        raise ValueError(f"is {wording.short(rule)}, must be one of {', '.join(f'{{{name}: ...}}' for name in _DRAWS)}")
    ((kind, given),) = rule.items()
    if kind not in _DRAWS:
        raise ValueError(f"`{kind}` is not known here{wording.nearest(kind, _DRAWS)} (known: {', '.join(_DRAWS)})")
    if kind == "choice":
        if not isinstance(given, list) or not given:
            raise ValueError(f"choice is {wording.short(given)}, must be a list of at least one value")
        return lambda place: given[_bits(f"{stream}/{place}", 256) * len(given) >> 256]
    number = _is_whole if kind == "integers" else _is_number
    if not isinstance(given, list) or len(given) != 2 or not all(map(number, given)):
        what = "two whole numbers" if kind == "integers" else "two finite numbers"
        names = "[mean, deviation]" if kind == "normal" else "[lowest, highest]"
        raise ValueError(f"{kind} is {wording.short(given)}, must be {names}, {what}")
    low, high = given
    if kind == "integers":
        _ordered(kind, low, high)
        return lambda place: low + (_bits(f"{stream}/{place}", 256) * (high - low + 1) >> 256)
    low, high = float(low), float(high)
    if kind == "normal":
        if high < 0:
            raise ValueError(f"normal has the deviation {high}, must be at least 0")
        return lambda place: low + high * _standard_normal(f"{stream}/{place}")
    _ordered(kind, low, high)
    if kind == "uniform":
        if not math.isfinite(high - low):
            raise ValueError(f"uniform is {wording.short(given)}, whose width is beyond the largest number")
        return lambda place: low + (high - low) * _share(f"{stream}/{place}")
    if low <= 0:
        raise ValueError(f"log_uniform is {wording.short(given)}, must have ends above 0")
    start = Decimal(low)
    ratio = _DECIMAL.ln(_DECIMAL.divide(Decimal(high), start))

    def at(place: int) -> float:
        share = Decimal(_share(f"{stream}/{place}"))
        return float(_DECIMAL.multiply(start, _DECIMAL.exp(_DECIMAL.multiply(ratio, share))))

    return at


def _standard_normal(stream: str) -> float:
    """By pairs (x, y) in the unit disc, s = x^2 + y^2: x sqrt(-2 ln(s) / s)."""
    for attempt in itertools.count():
        digest = _bits(f"{stream}/{attempt}" if attempt else stream, 256)
        x, y = (2 * (part / 2**53) - 1 for part in (digest >> 203, (digest >> 75) & (2**53 - 1)))
        s = x * x + y * y
        if 0 < s < 1:
            break
    return x * math.sqrt(-2 * float(_DECIMAL.ln(Decimal(s))) / s)


def _share(stream: str) -> float:
    """A number from 0 up to but without 1."""
    return _bits(stream, 53) / 2**53


def _bits(stream: str, count: int) -> int:
    """The first bits of a stream's digest, as a whole number."""
    digest = hashlib.blake2b(stream.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    return int.from_bytes(digest, "big") >> (256 - count)


def _ordered(kind: str, low: float, high: float) -> None:
    if low > high:
        raise ValueError(f"{kind} is [{low}, {high}], must have the smaller end first")


def _bounded(form: str, count: int) -> None:
    if count > LONGEST:
        raise ValueError(f"{form} has more than {LONGEST:,} values, which no batch can hold")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False
