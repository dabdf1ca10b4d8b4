"""Sets of inputs over which outputs are bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from netassay.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ball:
    """A batch of balls {x : ||x - centre|| <= radius, low <= x <= high}.

    norm: "inf", "2" or "1", over all axes but the first. centre: (batch, *shape). radius: (batch,), in units of the
    input, not negative. low, high: the domain, e.g. [0, 1] of images; infinite: open. Raises ValueError where a
    centre lies outside the domain or a radius is negative or not finite.
    """

    norm: Literal["inf", "2", "1"]
    centre: Tensor
    radius: Tensor
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.norm not in ("inf", "2", "1"):
            raise ValueError(f"norm {self.norm!r} is not known; balls are of norm 'inf', '2' or '1'")
        if self.radius.shape != self.centre.shape[:1]:
            raise ValueError(f"{len(self.centre)} centres need as many radii, not {tuple(self.radius.shape)}")
        if not bool(torch.isfinite(self.radius).all()) or bool((self.radius < 0).any()):
            raise ValueError("a radius is negative or not finite")
        outside = bool((self.centre < self.low).any()) or bool((self.centre > self.high).any())
        if outside or not bool(torch.isfinite(self.centre).all()):
            raise ValueError(f"a centre is not in the domain [{self.low}, {self.high}]; scale the data into it first")

    def __len__(self) -> int:
        return len(self.centre)

    def __getitem__(self, which: slice | Tensor | list[int]) -> Ball:
        return Ball(self.norm, self.centre[which], self.radius[which], self.low, self.high)

    def spread(self) -> Tensor:
        """radius, shaped to broadcast against centre."""
        return self.radius.reshape(-1, *[1] * (self.centre.dim() - 1))

    def box(self) -> tuple[Tensor, Tensor]:
        """The smallest box around the set, rounded outward: lower, upper, each (batch, *shape)."""
        infinity = torch.tensor(torch.inf, dtype=self.centre.dtype)
        spread = self.spread()
        # At radius zero the difference is exact, and the box is the point.
        lower = torch.where(spread > 0, torch.nextafter(self.centre - spread, -infinity), self.centre)
        upper = torch.where(spread > 0, torch.nextafter(self.centre + spread, infinity), self.centre)
        return lower.clamp(min=self.low), upper.clamp(max=self.high)

    def minimum(self, a: Tensor) -> Tensor:
        """A lower bound of min a.x over each ball, up to rounding (see `rounding`).

        a: (batch or 1, rows, inputs). Returns (batch, rows). Exact for norm inf, and for norms 2 and 1 without a
        domain; else the better of the dual norm, a.centre - radius ||a||_2 or radius max |a|, and the box.
        """
        if self.norm == "inf":
            return _least(a, *self.box())
        length = _norm(a) if self.norm == "2" else a.abs().amax(-1)
        dual = _product(a, self.centre.flatten(1)) - self.radius[:, None] * length
        if math.isinf(self.low) and math.isinf(self.high):
            return dual
        return torch.maximum(dual, _least(a, *self.box()))


@dataclass(frozen=True, eq=False)
class Box:
    """A batch of boxes {x : lower <= x <= upper}, every coordinate with ends of its own.

    lower, upper: (batch, *shape). Raises ValueError where an end is not finite or lower > upper. It answers all that a
    `Ball` of norm "inf" does.
    """

    lower: Tensor
    upper: Tensor
    norm: ClassVar[Literal["inf"]] = "inf"

    def __post_init__(self) -> None:
        if not bool((torch.isfinite(self.lower) & torch.isfinite(self.upper)).all()):
            raise ValueError("an end of a box is not finite")
        if bool((self.lower > self.upper).any()):
            raise ValueError("a box is empty: its lower end lies above its upper one")

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, which: slice | Tensor | list[int]) -> Box:
        return Box(self.lower[which], self.upper[which])

    @property
    def centre(self) -> Tensor:
        """The middle of each box, rounded."""
        return torch.minimum(torch.maximum(self.lower / 2 + self.upper / 2, self.lower), self.upper)

    def spread(self) -> Tensor:
        """Half the width of each coordinate, rounded: (batch, *shape)."""
        return self.upper / 2 - self.lower / 2

    def box(self) -> tuple[Tensor, Tensor]:
        return self.lower, self.upper

    def minimum(self, a: Tensor) -> Tensor:
        """As `Ball.minimum`: min a.x over each box, up to rounding. a: (batch or 1, rows, inputs). (batch, rows)."""
        return _least(a, self.lower, self.upper)


Region = Ball | Box


def _least(a: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """min a.x over boxes. a: (batch or 1, rows, inputs); lower, upper: (batch, *shape). Returns (batch, rows)."""
    lower, upper = lower.flatten(1), upper.flatten(1)
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    return _product(a, middle) - _product(a.abs(), half)


def _norm(a: Tensor) -> Tensor:
    """||a||_2 of each row, in units of its largest entry: squares of entries below 1e-154 would be 0. (batch, rows)."""
    largest = a.abs().amax(-1).clamp(min=torch.finfo(a.dtype).tiny)
    return torch.linalg.vector_norm(a / largest[..., None], dim=-1) * largest


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a.x per row. a: (batch or 1, rows, n), x: (batch or 1, n). Returns (batch, rows)."""
    if len(a) == 1:
        return x @ a[0].T
    if len(x) == 1:
        return a @ x[0]
    return torch.bmm(a, x[:, :, None])[:, :, 0]
