"""Datasets drawn by a formula: the kind by name, the number of examples, a seed.

    {generator: two_moons, samples: 500, noise: 0.1, seed: 0}

Example i has the class y_i = floor(i / 3) mod k for k classes: three in a row, of which the first two are for training
and the third for the test, so that both splits hold all classes equally often (up to two). In the formulas t ~ U(a, b)
is uniform, e ~ N(0, I) standard normal, drawn anew for each example; `noise` and `spread` are standard deviations.

==================  ================================================================================================
two_moons           y = 0: (cos t, sin t); y = 1: (1 - cos t, 1/2 - sin t); t ~ U(0, pi); plus noise e
circles             r_y (cos t, sin t), r_0 = 1, r_1 = factor, t ~ U(0, 2 pi); plus noise e
spirals             t (cos a, sin a), a = 2 pi (turns t + y / classes), t ~ U(0, 1); plus noise e
blobs               c_y + spread e, the centres c_k ~ U(-extent, extent) in each coordinate
gaussian_mixture    +-(separation / 2) u + e, u = (1, ..., 1) / sqrt(dimension), + for y = 1: no classifier is right
                    more often than Phi(separation / 2), Phi the standard normal distribution function
checkerboard        uniform in a square of [-1, 1]^2, cut into cells x cells, whose row + column is y mod 2; plus
                    noise e. With two cells a side this is XOR.
random_labels       e, or e / ||e|| on the sphere; the class says nothing about it: what is learnt is memorised
==================  ================================================================================================

Draws come from NumPy's `Generator(PCG64(seed))`, centres first, then one array at a time for all examples. They are the
same wherever NumPy draws the same from a seed, which it may change between versions (a test holds the first numbers),
and up to the last bit of sine and cosine, most of which the rounding to float32 takes away.

Only classification so far: y are classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from netassay.data.splits import PERIOD, Facts, Scale, scaled
from netassay.fields import Seed
from netassay.job import canonical
from netassay.method import Contract

if TYPE_CHECKING:
    import numpy

from netassay.heavy import np

#: Numbers of a generated dataset: 2 GiB in float64.
LARGEST = 2**28

_Spread = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False, description="a standard deviation")]
_Length = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
_Classes = Annotated[int, Field(ge=2, le=1000)]
_Dimension = Annotated[int, Field(ge=1, le=100_000)]


class Drawn(Contract):
    """What all generators share. version: raised when the same fields would draw other examples."""

    samples: Annotated[int, Field(ge=6, le=10_000_000)] = 500
    """examples of both splits together; at least three of each class"""
    seed: Seed = 0
    scale: Scale = "none"
    """none, minmax (each feature to [0, 1]) or unit (divided by the largest absolute value)"""
    version: Literal[1] = 1

    def facts(self) -> Facts:
        return Facts(self.samples, (getattr(self, "dimension", 2),), getattr(self, "classes", 2))

    @model_validator(mode="after")
    def _sized(self) -> Drawn:
        facts = self.facts()
        if self.samples < PERIOD * facts.classes:
            raise ValueError(
                f"{self.samples} samples are too few for {facts.classes} classes: at least {PERIOD * facts.classes}, "
                "so that both splits hold every class"
            )
        if self.samples * math.prod(facts.shape) > LARGEST:
            raise ValueError(f"samples x dimension is more than {LARGEST:,} numbers (2 GiB); take fewer of either")
        return self


class TwoMoons(Drawn):
    """Two half circles that reach into each other."""

    generator: Literal["two_moons"]
    noise: _Spread = 0.1


class Circles(Drawn):
    """A circle of radius 1 and one of radius `factor` inside."""

    generator: Literal["circles"]
    noise: _Spread = 0.05
    factor: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] = 0.5


class Spirals(Drawn):
    """As many arms as classes, wound `turns` times around each other."""

    generator: Literal["spirals"]
    classes: _Classes = 2
    turns: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    noise: _Spread = 0.02


class Blobs(Drawn):
    """One normal cloud a class, of standard deviation `spread`, its centre at random in [-extent, extent]."""

    generator: Literal["blobs"]
    classes: _Classes = 3
    dimension: _Dimension = 2
    spread: _Spread = 1.0
    extent: _Length = 10.0


class GaussianMixture(Drawn):
    """Two normal clouds of covariance I, their means `separation` apart."""

    generator: Literal["gaussian_mixture"]
    dimension: _Dimension = 2
    separation: _Spread = 2.0


class Checkerboard(Drawn):
    """The two colours of a board of cells x cells squares on [-1, 1]^2."""

    generator: Literal["checkerboard"]
    cells: Annotated[int, Field(ge=2, le=1000)] = 2
    """squares on a side; with 2, XOR"""
    noise: _Spread = 0.0


class RandomLabels(Drawn):
    """Inputs that say nothing about their class."""

    generator: Literal["random_labels"]
    classes: _Classes = 2
    dimension: _Dimension = 2
    inputs: Literal["gaussian", "sphere"] = "gaussian"
    """normal with covariance I, or uniform on the sphere of radius 1"""


Generator = TwoMoons | Circles | Spirals | Blobs | GaussianMixture | Checkerboard | RandomLabels

KINDS: dict[str, type[Generator]] = {
    "blobs": Blobs,
    "checkerboard": Checkerboard,
    "circles": Circles,
    "gaussian_mixture": GaussianMixture,
    "random_labels": RandomLabels,
    "spirals": Spirals,
    "two_moons": TwoMoons,
}


def parse(mapping: Mapping[str, Any]) -> Generator:
    """The complete generator of a mapping. Raises ValueError with one line for each field that is wrong."""
    kind = mapping.get("generator")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"there is no generator {kind!r:.80}; try one of {', '.join(KINDS)}")
    try:
        return _adapter().validate_python(dict(mapping))
    except ValidationError as error:
        raise ValueError("; ".join(_told(kind, one) for one in error.errors(include_url=False))) from None


@functools.cache
def _adapter() -> TypeAdapter[Generator]:
    return TypeAdapter(Annotated[Generator, Field(discriminator="generator")])


def _told(kind: str, problem: Any) -> str:
    """One line for one error of pydantic's; the first part of its place is the kind."""
    place = ".".join((kind, *map(str, problem["loc"][1:])))
    if problem["type"] == "extra_forbidden":
        names = [name for name in KINDS[kind].model_fields if name not in ("generator", "version")]
        return f"{place}: is not known; {kind} takes {', '.join(sorted(names))}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


def text(generator: Generator) -> str:
    """Canonical JSON: what the digest of `generator:<sha-256>` is taken of, and what is kept."""
    return canonical(generator)


def draw(generator: Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
    """x (samples, dimension), float64 holding float32 numbers; y (samples,), int64."""
    facts = generator.facts()
    y = np.arange(facts.size, dtype=np.int64) // PERIOD % facts.classes
    x = _points(generator, y, np.random.Generator(np.random.PCG64(generator.seed)))
    return scaled(x, generator.scale).astype(np.float32).astype(np.float64), y


def _points(generator: Generator, y: numpy.ndarray, random: numpy.random.Generator) -> numpy.ndarray:
    n = len(y)
    if isinstance(generator, Blobs):
        size = (generator.classes, generator.dimension)
        centres = generator.extent * (2.0 * random.random(size) - 1.0)
        return centres[y] + generator.spread * random.standard_normal((n, generator.dimension))
    if isinstance(generator, GaussianMixture):
        each = generator.separation / 2 / math.sqrt(generator.dimension)
        return (each * (2 * y - 1))[:, None] + random.standard_normal((n, generator.dimension))
    if isinstance(generator, RandomLabels):
        x = random.standard_normal((n, generator.dimension))
        return x / np.linalg.norm(x, axis=1, keepdims=True) if generator.inputs == "sphere" else x
    if isinstance(generator, TwoMoons):
        t = math.pi * random.random(n)
        across, along = np.cos(t), np.sin(t)
        x = np.stack([np.where(y == 0, across, 1.0 - across), np.where(y == 0, along, 0.5 - along)], axis=1)
    elif isinstance(generator, Circles):
        t = 2.0 * math.pi * random.random(n)
        x = np.where(y == 0, 1.0, generator.factor)[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    elif isinstance(generator, Spirals):
        t = random.random(n)
        angle = 2.0 * math.pi * (generator.turns * t + y / generator.classes)
        x = t[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        x = _on_a_board(generator, y, random)
    return x + generator.noise * random.standard_normal(x.shape)


def _on_a_board(board: Checkerboard, y: numpy.ndarray, random: numpy.random.Generator) -> numpy.ndarray:
    """Points in uniformly drawn squares of their colour. Squares are numbered row by row."""
    squares = np.arange(board.cells**2)
    row, column = squares // board.cells, squares % board.cells
    of_colour = [squares[(row + column) % 2 == colour] for colour in (0, 1)]
    chosen = random.random(len(y))
    square = np.empty(len(y), dtype=np.int64)
    for colour, among in enumerate(of_colour):
        square[y == colour] = among[(chosen[y == colour] * len(among)).astype(np.int64)]
    corner = np.stack([column[square], row[square]], axis=1)
    return 2.0 * (corner + random.random((len(y), 2))) / board.cells - 1.0
