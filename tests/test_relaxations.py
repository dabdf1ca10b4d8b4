"""Images, slopes and lines of elementwise functions hold at every sampled point and are as tight as closed forms say.

Points are evaluated in 80-bit floats where numpy has the function, so nothing here needs a tolerance for soundness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from netassay.networks.functions import FUNCTIONS  # noqa: E402
from netassay.numerics.bounds import curves, relaxations  # noqa: E402
from netassay.numerics.bounds.relaxations import Lines  # noqa: E402

F64 = torch.float64
LONG = np.longdouble
PARAMETERS = {"elu": (0.5, 1.0, 2.0), "power": (2.0, 3.0, 4.0, 5.0, -1.0, -2.0, 0.5, 1.5)}
CASES = [
    (name, (parameter,) if parameter is not None else ())
    for name in sorted(curves.CURVES)
    for parameter in PARAMETERS.get(name, (None,))
]
IDS = ["-".join(map(str, (name, *parameters))) for name, parameters in CASES]
every_function = pytest.mark.parametrize("name, parameters", CASES, ids=IDS)


def exactly(name: str, parameters: tuple[float, ...], z: np.ndarray) -> np.ndarray:
    """f(z) in 80 bits; erf and gelu in 64, where what the bounds allow is far above the error."""
    z = z.astype(LONG)

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    with np.errstate(all="ignore"):
        if name in ("erf", "gelu"):
            return FUNCTIONS[name](torch.from_numpy(z.astype(np.float64))).numpy().astype(LONG)
        if name == "power":
            exponent = parameters[0]
            if not float(exponent).is_integer():
                return z ** LONG(exponent)
            power = np.ones_like(z)
            for _ in range(abs(int(exponent))):
                power = power * z
            return power if exponent >= 0 else 1 / power
        softplus = np.maximum(z, 0) + np.log1p(np.exp(-abs(z)))
        inner = 2 * np.sqrt(2 / LONG(math.pi)) * (z + LONG("0.044715") * z**3)
        return {
            "cos": lambda: np.cos(z),
            "elu": lambda: np.where(z > 0, z, LONG(parameters[0]) * np.expm1(np.minimum(z, 0))),
            "exp": lambda: np.exp(z),
            "gelu_tanh": lambda: z * sigmoid(inner),
            "hard_swish": lambda: z * np.clip(z + 3, 0, 6) / 6,
            "log": lambda: np.log(z),
            "mish": lambda: z * np.tanh(softplus),
            "reciprocal": lambda: 1 / z,
            "relu": lambda: np.maximum(z, 0),
            "sigmoid": lambda: sigmoid(z),
            "sign": lambda: np.sign(z),
            "silu": lambda: z * sigmoid(z),
            "sin": lambda: np.sin(z),
            "softplus": lambda: softplus,
            "sqrt": lambda: np.sqrt(z),
            "tanh": lambda: np.tanh(z),
        }[name]()


def intervals(count: int, seed: int = 0, positive: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints of all sizes, widths from 1e-12 to 1e3, and intervals that begin, end or turn where functions do."""
    generator = np.random.default_rng(seed)
    width = 10 ** generator.uniform(-12, 3, count)
    middle = generator.normal(size=count) * 10 ** generator.uniform(-3, 1.5, count)
    low, high = middle - width / 2, middle + width / 2
    special = [0.0, 1.0, -1.0, 3.0, -3.0, 1.5, math.sqrt(2), 0.75, 1.28, 2.4, 1.4905711794854284, 20.0, 1e-9, 1e3]
    special += [k * math.pi / 2 for k in range(-9, 10)]
    special += [-s for s in special]
    near = [np.nextafter(s, s + d) for s in special for d in (-1, 1)] + special
    a, b = generator.choice(near, count // 2), generator.choice(near, count // 2)
    low, high = np.r_[low, np.minimum(a, b)], np.r_[high, np.maximum(a, b)]
    if positive:
        low, high = np.abs(low), np.abs(high)
        low, high = np.minimum(low, high), np.maximum(low, high)
    return torch.from_numpy(low), torch.from_numpy(high)


def everywhere(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [intervals(count // 2, seed), intervals(count // 2, seed + 1, positive=True)]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def points(low: np.ndarray, high: np.ndarray, generator: np.random.Generator, count: int = 24) -> np.ndarray:
    """(count + a few, n): the ends, their neighbours, the middle, where functions turn or bend, random ones."""
    ends = [low, high, np.nextafter(low, high), np.nextafter(high, low), low / 2 + high / 2]
    bends = [0, -0.7517915246935645, -0.7524614220710163, -1.2784645427610737, -1.1924312145154952, -1.5, 3, -3]
    bends += [math.sqrt(2), -math.sqrt(2), math.pi / 2, -math.pi / 2, 3 * math.pi / 2]
    random = [low + (high - low) * generator.uniform(size=low.shape) for _ in range(count)]
    return np.clip(np.stack([*ends, *[np.full_like(low, b) for b in bends], *random]), low, high)


def rises(
    name: str, parameters: tuple[float, ...], low: np.ndarray, high: np.ndarray, found: Lines, rounds: int = 3
) -> Iterator[np.ndarray]:
    """How far f is below the lower line, then above the upper one, at the worst point found: positive is a violation.

    Each round samples again around the worst point of the last one, where a line touches f.
    """
    for side, slope, intercept in (
        (-1, found.lower_slope, found.lower_intercept),
        (1, found.upper_slope, found.upper_intercept),
    ):
        generator = np.random.default_rng(1)
        a, b = slope.double().numpy().astype(LONG), intercept.double().numpy().astype(LONG)
        left, right, worst = low, high, np.full(low.shape, -np.inf, LONG)
        for _ in range(rounds):
            z = points(left, right, generator)
            with np.errstate(invalid="ignore"):
                rise = side * (exactly(name, parameters, z) - (a * z.astype(LONG) + b))
            rise = np.where(np.isnan(rise), -np.inf, rise)
            best = rise.argmax(0)
            worst = np.maximum(worst, np.take_along_axis(rise, best[None], 0)[0])
            at, reach = np.take_along_axis(z, best[None], 0)[0], (right - left) / 50
            left, right = np.clip(at - reach, low, high), np.clip(at + reach, low, high)
        yield worst


def violations(
    name: str, parameters: tuple[float, ...], low: torch.Tensor, high: torch.Tensor, found: Lines, rounds: int = 3
) -> int:
    ends = low.double().numpy(), high.double().numpy()
    return sum(int((worst > 0).sum()) for worst in rises(name, parameters, *ends, found, rounds))


@every_function
def test_lines_hold_everywhere_on_their_interval(name, parameters):
    low, high = everywhere(2000)
    found = relaxations.lines(name, parameters, low, high)
    assert violations(name, parameters, low, high, found) == 0
    for x in (found.lower_slope, found.upper_slope):
        assert torch.isfinite(x).all()
    assert not torch.isnan(found.lower_intercept).any()
    assert not torch.isnan(found.upper_intercept).any()


@every_function
def test_images_hold_everywhere_on_their_interval(name, parameters):
    low, high = everywhere(2000)
    least, largest = relaxations.image(name, parameters, low, high)
    found = exactly(name, parameters, points(low.numpy(), high.numpy(), np.random.default_rng(2)))
    assert not (found < least.numpy()).any()
    assert not (found > largest.numpy()).any()


@pytest.mark.parametrize("name, parameters", [("tanh", ()), ("gelu", ()), ("sin", ()), ("relu", ())])
def test_exchanged_slopes_are_noticed(name, parameters):
    low, high = intervals(500)
    keep = (high - low > 0.5) & (high - low < 5) & (low < -0.2) & (high > 0.2)
    low, high = low[keep], high[keep]
    found = relaxations.lines(name, parameters, low, high)
    swapped = Lines(found.upper_slope, found.lower_intercept, found.lower_slope, found.upper_intercept)
    assert violations(name, parameters, low, high, found) == 0
    assert violations(name, parameters, low, high, swapped) > 0
