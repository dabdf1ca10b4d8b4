"""Images, slopes and lines of elementwise functions hold at every sampled point and are as tight as closed forms say.

Points are evaluated in 80-bit floats where numpy has the function, so nothing here needs a tolerance for soundness.
"""

from __future__ import annotations

import itertools
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
UNBOUNDED = ("reciprocal", "power", "sign")  # somewhere in an interval that holds 0
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
    low, high = everywhere(800)
    found = relaxations.lines(name, parameters, low, high)
    assert violations(name, parameters, low, high, found) == 0
    for x in (found.lower_slope, found.upper_slope):
        assert torch.isfinite(x).all()
    assert not torch.isnan(found.lower_intercept).any()
    assert not torch.isnan(found.upper_intercept).any()


@every_function
def test_images_hold_everywhere_on_their_interval(name, parameters):
    low, high = everywhere(800)
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


@every_function
def test_lines_of_any_slopes_hold(name, parameters):
    low, high = everywhere(400, seed=5)
    generator = torch.Generator().manual_seed(0)
    least, largest = relaxations.derivative(name, parameters, low, high)
    least, largest = least.clamp(-1e6, 1e6), largest.clamp(-1e6, 1e6)
    for stretch in (1.0, 3.0):
        where = (torch.rand(2, len(low), generator=generator, dtype=F64) - 0.5) * stretch + 0.5
        found = relaxations.lines_with_slopes(name, parameters, low, high, *(least + (largest - least) * where))
        assert violations(name, parameters, low, high, found) == 0


@every_function
def test_lines_in_float32_hold(name, parameters):
    low, high = (end.float() for end in everywhere(400, seed=6))
    found = relaxations.lines(name, parameters, low, high)
    assert found.lower_intercept.dtype == found.upper_slope.dtype == torch.float32
    assert violations(name, parameters, low, high, found) == 0
    least, largest = relaxations.image(name, parameters, low, high)
    at = exactly(name, parameters, points(low.double().numpy(), high.double().numpy(), np.random.default_rng(3)))
    assert not ((at < least.numpy()) | (at > largest.numpy())).any()


@every_function
def test_a_line_moved_by_little_is_noticed(name, parameters):
    """The lines touch f, and the sampling finds where: else it would prove nothing."""
    low, high = everywhere(400)
    keep = (high - low < 4) & (low.abs() < 30) & (high > low)
    keep &= ((low > 0.1) | (high < -0.1)) | (name not in UNBOUNDED)
    keep &= (low > 0) | (name not in ("log", "sqrt")) & (parameters not in ((0.5,), (1.5,)))
    low, high = low[keep], high[keep]
    found = relaxations.lines(name, parameters, low, high)
    size = 1 + torch.maximum(low.abs(), high.abs()) * (found.lower_slope.abs() + found.upper_slope.abs())
    size = size + found.lower_intercept.abs() + found.upper_intercept.abs()
    moved = 1e-5 * size
    for lower, upper in ((moved, 0), (0, -moved)):
        moved_lines = Lines(
            found.lower_slope, found.lower_intercept + lower, found.upper_slope, found.upper_intercept + upper
        )
        assert violations(name, parameters, low, high, moved_lines, rounds=4) > 0.99 * len(low)


@every_function
def test_no_other_slopes_give_a_smaller_area(name, parameters):
    low, high = everywhere(200, seed=7)
    keep = (high - low < 10) & (low.abs() < 20) & (high - low > 1e-3)
    low, high = low[keep], high[keep]
    own = relaxations.lines(name, parameters, low, high)
    least, largest = (end.clamp(-1e9, 1e9) for end in relaxations.derivative(name, parameters, low, high))
    middle = (low + high) / 2
    for fraction in torch.linspace(0, 1, 13, dtype=F64):
        slope = least + (largest - least) * fraction
        given = relaxations.lines_with_slopes(name, parameters, low, high, slope, slope)
        above = given.upper_slope * middle + given.upper_intercept
        below = given.lower_slope * middle + given.lower_intercept
        noise = 1e-9 * (1 + slope.abs() * (1 + middle.abs()) + own.upper_intercept.abs() + own.lower_intercept.abs())
        assert not (above + noise < own.upper_slope * middle + own.upper_intercept).any()
        assert not (below - noise > own.lower_slope * middle + own.lower_intercept).any()


@pytest.mark.parametrize(
    "name, parameters",
    [case for case in CASES if case[0] not in ("relu", "sign")],  # not differentiable in the middle
)
def test_gaps_shrink_with_the_square_of_the_width(name, parameters):
    middle = torch.tensor([0.7, 1.3, 2.5, 4.0], dtype=F64)
    gaps = []
    for width in (1e-2, 1e-3):
        low, high = middle - width / 2, middle + width / 2
        gaps.append(relaxations.tightness_loss(name, parameters, low, high) / width)
        curvature = gaps[-1] / width**2
        assert (curvature < 1e3).all()
    assert (gaps[1] <= gaps[0] / 90 + 1e-13).all()


@every_function
def test_an_interval_of_one_point_gives_its_value(name, parameters):
    z = torch.tensor([0.3, 1.0, 2.0, 3.0, 17.0], dtype=F64)
    value = torch.from_numpy(exactly(name, parameters, z.numpy()).astype(np.float64))
    found = relaxations.lines(name, parameters, z, z)
    for slope, intercept in (
        (found.lower_slope, found.lower_intercept),
        (found.upper_slope, found.upper_intercept),
    ):
        assert torch.allclose(slope * z + intercept, value, rtol=1e-13, atol=1e-13)
    for end in relaxations.image(name, parameters, z, z):
        assert torch.allclose(end, value, rtol=1e-13, atol=1e-299)


@every_function
def test_nothing_is_nan_for_infinite_and_undefined_intervals(name, parameters):
    ends = [-math.inf, -1e308, -1e30, -1.0, 0.0, 1e-320, 1.0, 800.0, math.inf]
    low, high = map(torch.tensor, zip(*[(a, b) for a in ends for b in ends if a <= b], strict=True))
    low, high = (torch.cat([end.double(), torch.tensor([math.nan])]) for end in (low, high))
    found = relaxations.lines(name, parameters, low, high)
    tilted = relaxations.lines_with_slopes(
        name, parameters, low, high, torch.full_like(low, 0.3), torch.full_like(low, -0.3)
    )
    parts = [*relaxations.image(name, parameters, low, high), *relaxations.derivative(name, parameters, low, high)]
    parts += [*vars(found).values(), *vars(tilted).values(), *relaxations.slopes_range(name, parameters, low, high)]
    for x in parts:
        assert not torch.isnan(x).any()
    for x in (found.lower_slope, found.upper_slope, *relaxations.slopes_range(name, parameters, low, high)):
        assert torch.isfinite(x).all()
    least, largest = relaxations.image(name, parameters, low, high)
    assert least[-1] == -math.inf
    assert largest[-1] == math.inf
    assert (least <= largest).all()
    assert (found.lower_intercept < math.inf).all()
    assert (found.upper_intercept > -math.inf).all()
    finite = torch.isfinite(low) & torch.isfinite(high) & (low.abs() < 1e100) & (high.abs() < 1e100)
    some = Lines(*(x[finite] for x in vars(tilted).values()))
    assert violations(name, parameters, low[finite], high[finite], some) == 0
    some = Lines(*(x[finite] for x in vars(found).values()))
    assert violations(name, parameters, low[finite], high[finite], some) == 0
    if name in ("log", "relu"):
        assert not torch.isnan(relaxations.branching_point(name, parameters, low[finite], high[finite])).any()


def test_an_interval_that_ends_before_it_begins_is_refused():
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    for ask in (relaxations.image, relaxations.derivative, relaxations.lines, relaxations.slopes_range):
        with pytest.raises(ValueError, match="ends before it begins"):
            ask("tanh", (), two, one)
    with pytest.raises(ValueError, match="ends before it begins"):
        relaxations.mccormick(one, two, two, one)
    with pytest.raises(ValueError, match="no curve is known"):
        relaxations.image("sinh", (), one, two)


def interval(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([low], dtype=F64), torch.tensor([high], dtype=F64)


def test_a_convex_function_has_its_secant_above_and_its_middle_tangent_below():
    found = relaxations.lines("exp", (), *interval(-1, 2))
    secant = (math.exp(2) - math.exp(-1)) / 3
    assert found.upper_slope.item() == pytest.approx(secant, rel=1e-14)
    assert found.upper_intercept.item() == pytest.approx(math.exp(2) - 2 * secant, rel=1e-13)
    assert found.lower_slope.item() == pytest.approx(math.exp(0.5), rel=1e-14)
    assert found.lower_intercept.item() == pytest.approx(math.exp(0.5) / 2, rel=1e-13)


def test_tanh_right_of_zero_has_its_secant_below():
    found = relaxations.lines("tanh", (), *interval(0.5, 1.5))
    assert found.lower_slope.item() == pytest.approx(math.tanh(1.5) - math.tanh(0.5), rel=1e-13)
    assert found.upper_slope.item() == pytest.approx(1 / math.cosh(1) ** 2, rel=1e-13)


def test_tanh_through_zero_has_tangents_through_its_ends():
    found = relaxations.lines("tanh", (), *interval(-3, 3))
    a, b = found.upper_slope.item(), found.upper_intercept.item()
    assert a * -3 + b == pytest.approx(math.tanh(-3), abs=1e-12)
    touching = math.acosh(1 / math.sqrt(a))  # where f' is a
    assert a * touching + b == pytest.approx(math.tanh(touching), abs=1e-12)
    assert found.lower_slope.item() == pytest.approx(a, rel=1e-9)
    assert found.lower_intercept.item() == pytest.approx(-b, rel=1e-9)


def test_sine_from_crest_to_crest_has_constant_lines():
    for name, shift in (("sin", math.pi / 2), ("cos", 0.0)):
        found = relaxations.lines(name, (), *interval(shift, shift + 2 * math.pi))
        line = [x.item() for x in vars(found).values()]
        assert line == pytest.approx([0, -1, 0, 1], abs=1e-12)
        for low, high in ((-1e9, 1e9), (3e6, 3e6 + 1), (0, 13)):
            found = relaxations.lines(name, (), *interval(low, high))
            assert [x.item() for x in vars(found).values()] == [0, -1, 0, 1]


def test_sine_from_zero_to_zero_is_better_than_constant_lines():
    assert relaxations.tightness_loss("sin", (), *interval(0, 2 * math.pi)).item() < 0.7 * 2 * 2 * math.pi


def test_relu_has_its_triangle():
    low = torch.tensor([-1.0, -2.0, -1.0, 1.0, -2.0, 0.0, 0.0], dtype=F64)
    high = torch.tensor([1.0, 1.0, 3.0, 2.0, -1.0, 0.0, 1.0], dtype=F64)
    found = relaxations.lines("relu", (), low, high)
    assert found.lower_slope.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert found.lower_intercept.tolist() == [0] * 7
    assert found.upper_slope.tolist() == [0.5, 1 / 3, 0.75, 1, 0, 0, 1]
    assert found.upper_intercept.tolist() == pytest.approx([0.5, 2 / 3, 0.75, 0, 0, 0, 0], rel=1e-15)
    least, largest = relaxations.image("relu", (), low, high)
    assert least.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert largest.tolist() == [1, 1, 3, 2, 0, 0, 1]


def test_where_a_function_is_affine_its_lines_are_exact():
    for name, parameters, low, high, slope in (
        ("elu", (2.0,), 0.1, 7.3, 1),
        ("hard_swish", (), 3.0, 11.7, 1),
        ("hard_swish", (), -9.1, -3.0, 0),
        ("power", (1.0,), -0.3, 0.7, 1),
        ("sign", (), 0.1, 0.2, 0),
    ):
        found = relaxations.lines(name, parameters, *interval(low, high))
        constant = 1.0 if name == "sign" else 0.0
        assert [x.item() for x in vars(found).values()] == [slope, constant, slope, constant]


def test_minima_of_dipping_functions_are_found():
    for name, least in (("gelu", -0.169971), ("silu", -0.278465), ("mish", -0.308843), ("hard_swish", -0.375)):
        assert relaxations.image(name, (), *interval(-4, 1))[0].item() == pytest.approx(least, abs=1e-6)
    assert relaxations.image("hard_swish", (), *interval(-4, 1))[0].item() == pytest.approx(-0.375, rel=1e-13)


def test_slopes_are_those_of_the_derivative():
    for name, parameters, ends, expected in (
        ("tanh", (), (-1, 2), (1 / math.cosh(2) ** 2, 1)),
        ("sigmoid", (), (1, 2), tuple(s * (1 - s) for s in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))))),
        ("sin", (), (-1, 4), (-1, 1)),
        ("sqrt", (), (0, 1), (0.5, math.inf)),
        ("power", (3.0,), (-1, 2), (0, 12)),
        ("reciprocal", (), (1, 2), (-1, -0.25)),
        ("elu", (2.0,), (-1, 1), (2 * math.exp(-1), 2)),
        ("relu", (), (-1, 1), (0, 1)),
        ("hard_swish", (), (-4, 4), (-0.5, 1.5)),
        ("sign", (), (-1, 1), (-math.inf, math.inf)),
        ("sign", (), (1, 2), (0, 0)),
    ):
        found = [x.item() for x in relaxations.derivative(name, parameters, *interval(*ends))]
        assert found == pytest.approx(expected, rel=1e-12)


@every_function
def test_ranges_of_slopes_hold_and_are_reached(name, parameters):
    low, high = everywhere(600, seed=8)
    keep = (high - low < 20) & (high > low) & ((low > 0) | (high < 0) | (name not in UNBOUNDED))
    keep &= (low > 0) | (name not in ("log", "sqrt")) & (parameters not in ((0.5,), (1.5,)))
    low, high = low[keep], high[keep]
    least, largest = relaxations.derivative(name, parameters, low, high)
    z = torch.from_numpy(points(low.numpy(), high.numpy(), np.random.default_rng(4), 60)).requires_grad_()
    with torch.enable_grad():
        value = torch.relu(z) if name == "relu" else FUNCTIONS[name](z, *parameters)
        (slope,) = torch.autograd.grad(value.sum(), z)
    # Where a formula of the network's is made of two branches autograd gives a slope of its own.
    kinks = {"softplus": (0.0,), "hard_swish": (-3.0, 3.0)}.get(name, ())
    for kink in kinks:
        slope = torch.where((z - kink).abs() < 1e-9, torch.minimum(torch.maximum(slope, least), largest), slope)
    noise = 1e-12 * (1 + slope.abs())
    assert not ((slope < least - noise) | (slope > largest + noise)).any()
    # Inflection points are among the sampled ones for the functions that dip, ends for the others.
    smooth = ~((low <= 0) & (high >= 0)) | (name not in ("relu", "elu", "sign"))
    if name not in ("sin", "cos", "silu", "mish", "gelu_tanh", "hard_swish"):
        for reached, end in ((slope.amin(0), least), (slope.amax(0), largest)):
            assert torch.allclose(reached[smooth], end[smooth], rtol=1e-11, atol=1e-13)


def test_intercepts_have_the_gradient_of_the_envelope():
    low, high = interval(-2, 1)
    for name in ("tanh", "gelu", "sin", "relu", "exp"):
        slopes = [torch.tensor([s], dtype=F64, requires_grad=True) for s in (0.2, 0.45)]
        found = relaxations.lines_with_slopes(name, (), low, high, *slopes)
        (found.lower_intercept + 3 * found.upper_intercept).sum().backward()
        step = 1e-6
        for factor, slope, which in ((1, slopes[0], "lower_intercept"), (3, slopes[1], "upper_intercept")):
            ends = []
            for moved in (slope.detach() - step, slope.detach() + step):
                moved_lines = relaxations.lines_with_slopes(name, (), low, high, moved, moved)
                ends.append(getattr(moved_lines, which))
            numeric = factor * (ends[1] - ends[0]) / (2 * step)
            assert slope.grad is not None
            assert slope.grad.item() == pytest.approx(numeric.item(), abs=1e-5)


def test_slopes_may_have_axes_of_their_own():
    low, high = -torch.ones(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64)
    slopes = torch.rand(5, 3, 2, dtype=F64)
    found = relaxations.lines_with_slopes("tanh", (), low, high, slopes, slopes)
    alone = relaxations.lines_with_slopes("tanh", (), low, high, slopes[4], slopes[4])
    assert found.lower_intercept.shape == (5, 3, 2)
    assert torch.equal(found.lower_intercept[4], alone.lower_intercept)


@every_function
def test_useful_slopes_hold_the_best_one_and_no_steeper_one_is_better_anywhere(name, parameters):
    low, high = everywhere(200, seed=9)
    keep = (high - low < 10) & (high - low > 1e-2) & (low.abs() < 20)
    keep &= (low > 1e-3) | (name not in ("log", "sqrt", *UNBOUNDED))
    low, high = low[keep], high[keep]
    ranges = relaxations.slopes_range(name, parameters, low, high)
    best = relaxations.lines(name, parameters, low, high)
    z = low + (high - low) * torch.linspace(0, 1, 21, dtype=F64)[:, None]
    for least, largest, slope in ((*ranges[:2], best.lower_slope), (*ranges[2:], best.upper_slope)):
        noise = 1e-6 * (1 + slope.abs())
        assert (least <= largest).all()
        assert ((slope >= least - noise) & (slope <= largest + noise)).all()
    for end, beyond in ((0, -0.1), (1, 0.1)):
        at_end = relaxations.lines_with_slopes(name, parameters, low, high, ranges[end], ranges[2 + end])
        outside = relaxations.lines_with_slopes(
            name, parameters, low, high, ranges[end] + beyond, ranges[2 + end] + beyond
        )
        size = 1e-6 * (1 + z.abs() * at_end.upper_slope.abs() + at_end.upper_intercept.abs())
        size = size + 1e-6 * (z.abs() * at_end.lower_slope.abs() + at_end.lower_intercept.abs())
        difference = (outside.lower_slope - at_end.lower_slope) * z + outside.lower_intercept - at_end.lower_intercept
        assert (difference <= size).all()
        difference = (outside.upper_slope - at_end.upper_slope) * z + outside.upper_intercept - at_end.upper_intercept
        assert (difference >= -size).all()


def test_mccormick_planes_of_a_square():
    low, high = interval(-1, 1)
    for t, expected in ((1.0, (-1, -1, -1, 1, -1, 1)), (0.5, (0, 0, -1, 0, 0, 1)), (0.0, (1, 1, -1, -1, 1, 1))):
        found = relaxations.mccormick(low, high, low, high, t)
        assert [x.item() for x in vars(found).values()] == list(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mccormick_planes_hold_and_touch(dtype):
    generator = np.random.default_rng(0)
    scale = 10.0 ** generator.uniform(-6, 3, (2, 5000))
    middle = generator.normal(size=(2, 5000))
    (lx, ly), (ux, uy) = ((torch.from_numpy(middle + s * scale).to(dtype)) for s in (-1, 1))
    t, s = torch.from_numpy(generator.uniform(size=(2, 5000))).to(dtype)
    found = relaxations.mccormick(lx, ux, ly, uy, t, s)
    planes = [x.double().numpy().astype(LONG) for x in vars(found).values()]
    fractions = np.concatenate([[[0, 0], [0, 1], [1, 0], [1, 1]], generator.uniform(size=(30, 2))])
    gaps = []
    for f, g in fractions:
        x = np.clip((lx + (ux - lx) * f).double().numpy(), lx.double().numpy(), ux.double().numpy()).astype(LONG)
        y = np.clip((ly + (uy - ly) * g).double().numpy(), ly.double().numpy(), uy.double().numpy()).astype(LONG)
        x = ux.double().numpy().astype(LONG) if f == 1 else x
        y = uy.double().numpy().astype(LONG) if g == 1 else y
        below = x * y - (planes[0] * x + planes[1] * y + planes[2])
        above = planes[3] * x + planes[4] * y + planes[5] - x * y
        assert (below >= 0).all()
        assert (above >= 0).all()
        gaps.append((below, above))
    size = (torch.maximum(lx.abs(), ux.abs()) * torch.maximum(ly.abs(), uy.abs())).double().numpy()
    for side in (0, 1):
        nearest = np.min([gap[side] for gap in gaps[:4]], axis=0)
        assert (nearest <= 40 * torch.finfo(dtype).eps * size).all()


def test_mccormick_planes_follow_their_weight_and_infinite_factors_have_none():
    (lx, ux), (ly, uy) = interval(-1, 2), interval(0.5, 3)
    t = torch.tensor([0.3], dtype=F64, requires_grad=True)
    found = relaxations.mccormick(lx, ux, ly, uy, t)
    (slope,) = torch.autograd.grad(found.lower_constant.sum(), t)
    assert slope.item() == pytest.approx(0.5 * 1 + 2 * 3)  # of -(t lx ly + (1 - t) ux uy)
    none = relaxations.mccormick(*interval(-math.inf, 1), ly, uy)
    assert [x.item() for x in vars(none).values()] == [0, 0, -math.inf, 0, 0, math.inf]


def test_relu_is_split_at_zero_and_its_triangle_has_its_area():
    low = torch.tensor([-1.0, -0.001, -7.0, -1.0], dtype=F64)
    high = torch.tensor([2.0, 3.0, 6.0, 40.0], dtype=F64)
    assert relaxations.branching_point("relu", (), low, high).tolist() == [0] * 4
    # Between the chord and max(0, z): its area is (-l) u / 2; below the chord with slope 1 or 0 min(l^2, u^2) / 2 more.
    loss = relaxations.tightness_loss("relu", (), low, high)
    assert loss.tolist() == pytest.approx((-low * high / 2 + torch.minimum(low**2, high**2) / 2).tolist())
    stable = relaxations.branching_point("relu", (), high, high + 2)
    assert stable.tolist() == (high + 1).tolist()


def split_of_tabled(name: str, parameters: tuple[float, ...], count: int) -> tuple[torch.Tensor, ...]:
    """Branching points of intervals of the table, their middles, and the loss of both."""
    step = 2 * relaxations.RANGE / relaxations.GRID
    i, j = torch.triu_indices(relaxations.GRID + 1, relaxations.GRID + 1, offset=5)
    some = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))[:count]
    low, high = (step * (k[some].double() - relaxations.GRID / 2) for k in (i, j))
    if name in ("log", "sqrt", "power", "reciprocal"):
        low, high = low[low > 0], high[low > 0]
    point, middle = relaxations.branching_point(name, parameters, low, high), (low + high) / 2
    assert ((point > low) & (point < high)).all()
    losses = [
        relaxations.tightness_loss(name, parameters, low, p) + relaxations.tightness_loss(name, parameters, p, high)
        for p in (point, middle)
    ]
    whole = relaxations.tightness_loss(name, parameters, low, high)
    assert (losses[0] <= whole + 1e-12 * (1 + whole)).all()
    return point, middle, *losses


@pytest.fixture
def coarse_table(monkeypatch):
    monkeypatch.setattr(relaxations, "GRID", 60)
    relaxations._branching_table.cache_clear()
    yield
    relaxations._branching_table.cache_clear()


@pytest.mark.parametrize(
    "name, parameters",
    [(name, ()) for name in ("exp", "gelu", "log", "relu", "sign", "sin", "tanh")]
    + [("elu", (2.0,)), ("power", (2.0,))],
)
def test_branching_points_are_no_worse_than_the_middle(coarse_table, name, parameters):
    point, middle, split, halved = split_of_tabled(name, parameters, 1000)
    assert (split <= halved * (1 + 1e-9) + 1e-12).all()
    if parameters == (2.0,) and name == "power":
        assert (point - middle).abs().max() < 0.085  # a parabola is the same everywhere; odd widths have no grid middle
    elif name in ("gelu", "tanh", "sin", "log", "exp"):
        assert (split < 0.9 * halved).any()


@pytest.mark.slow
@every_function
def test_branching_points_of_the_whole_table_are_no_worse_than_the_middle(name, parameters):
    _, _, split, halved = split_of_tabled(name, parameters, 1 << 20)
    assert (split <= halved * (1 + 1e-9) + 1e-12).all()


def test_branching_points_of_a_wave_repeat_with_its_period(coarse_table):
    low, high = interval(-1.5, 1.1)
    at_home = relaxations.branching_point("sin", (), low, high)
    away = relaxations.branching_point("sin", (), low + 20 * math.pi, high + 20 * math.pi)
    assert away.item() - 20 * math.pi == pytest.approx(at_home.item(), abs=0.2)


def precisely(name: str, parameters: tuple[float, ...]):
    """f for mpmath's numbers."""
    mp = pytest.importorskip("mpmath").mp

    def sigmoid(v):
        return 1 / (1 + mp.exp(-v))

    return {
        "cos": mp.cos,
        "elu": lambda z: z if z > 0 else mp.mpf(parameters[0]) * mp.expm1(z),
        "erf": mp.erf,
        "exp": mp.exp,
        "gelu": lambda z: z * mp.erfc(-z / mp.sqrt(2)) / 2,
        "gelu_tanh": lambda z: z * sigmoid(2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)),
        "hard_swish": lambda z: z * min(max(z + 3, 0), 6) / 6,
        "log": mp.log,
        "mish": lambda z: z * mp.tanh(mp.log1p(mp.exp(z))),
        "power": lambda z: z ** (int(parameters[0]) if parameters[0] == int(parameters[0]) else mp.mpf(parameters[0])),
        "reciprocal": lambda z: 1 / z,
        "relu": lambda z: max(z, 0),
        "sigmoid": sigmoid,
        "sign": mp.sign,
        "silu": lambda z: z * sigmoid(z),
        "sin": mp.sin,
        "softplus": lambda z: mp.log1p(mp.exp(z)),
        "sqrt": mp.sqrt,
        "tanh": mp.tanh,
    }[name]


@every_function
def test_errors_of_values_and_slopes_are_within_their_bounds(name, parameters):
    mp = pytest.importorskip("mpmath").mp
    generator = np.random.default_rng(0)
    z = generator.choice([-1.0, 1.0], 60) * 10 ** generator.uniform(-8, 1.55, 60)
    z = np.concatenate([z, z[:20] * 17, [0.75, -0.7517915246935644, -1.27846, 1.0000001, 30.0, 3.14159]])
    c = curves.curve(name, parameters)
    if c.domain in ("positive", "nonnegative"):
        z = abs(z)
    f, at = precisely(name, parameters), torch.from_numpy(z)
    with mp.workdps(150):
        value, error = c.value(at)
        for k, point in enumerate(z.tolist()):
            assert abs(mp.mpf(value[k].item()) - f(mp.mpf(point))) <= mp.mpf(error[k].item())
        for number, piece in enumerate(c.pieces(at)):
            if name == "sign":
                continue
            start, end = (torch.as_tensor(e, dtype=F64).expand_as(at) for e in (piece.start, piece.end))
            slope, error = piece.slope(at)
            for k in ((at > start + 1e-6) & (at < end - 1e-6)).nonzero()[:25, 0].tolist():
                point = mp.mpf(at[k].item())
                step = mp.mpf(10) ** -15 * min(1, abs(point))
                exact = (f(point + step) - f(point - step)) / (2 * step)
                allowed = mp.mpf(error[k].item()) + mp.mpf(10) ** -25 * abs(exact)
                assert abs(mp.mpf(slope[k].item()) - exact) <= allowed, (number, point)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "mish"])
def test_minima_and_inflection_points_are_roots_and_there_are_no_others(name):
    mp = pytest.importorskip("mpmath").mp
    f, c = precisely(name, ()), curves.curve(name)
    zero = torch.zeros(1, dtype=F64)
    with mp.workdps(80):
        for order, points_of_it in ((1, c.turns(zero)), (2, [piece.start for piece in c.pieces(zero)][1:])):
            signs = [mp.sign(mp.diff(f, mp.mpf(k) / 10 + mp.mpf("0.05"), order)) for k in range(-120, 110)]
            assert sum(a != b for a, b in itertools.pairwise(signs)) == len(points_of_it)
            for point in points_of_it:
                near = [mp.mpf(point) * (1 + k * mp.mpf(2) ** -52) for k in (-1, 1)]
                assert mp.sign(mp.diff(f, near[0], order)) != mp.sign(mp.diff(f, near[1], order))


@every_function
def test_touching_points_have_their_slope(name, parameters):
    z = torch.tensor([0.2, 0.9, 1.7, 2.6, 5.0, -0.4, -1.1, -2.2, -4.0], dtype=F64)
    c = curves.curve(name, parameters)
    for number, piece in enumerate(c.pieces(z)):
        if piece.touching is None:
            continue
        start, end = (torch.as_tensor(e, dtype=F64).expand_as(z) for e in (piece.start, piece.end))
        inside = z[(z > start) & (z < end)]
        again = c.pieces(inside)[number]
        assert again.touching is not None
        assert torch.allclose(again.touching(again.slope(inside)[0]), inside, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@every_function
def test_a_million_points_a_function_are_between_the_lines(name, parameters):
    for seed in (100, 200, 300):
        low, high = everywhere(4000, seed)
        found = relaxations.lines(name, parameters, low, high)
        assert violations(name, parameters, low, high, found) == 0
        low, high = low.float(), high.float()
        assert violations(name, parameters, low, high, relaxations.lines(name, parameters, low, high)) == 0
