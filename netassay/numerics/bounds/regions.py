"""Sets of inputs over which outputs are bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netassay.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ball:
    """A batch of balls {x : ||x - centre|| <= radius, low <= x <= high}.

    norm: "inf" or "2", over all axes but the first. centre: (batch, *shape). radius: (batch,), in units of the input,
    not negative. low, high: the domain, e.g. [0, 1] of images; infinite: open. Raises ValueError where a
    centre lies outside the domain or a radius is negative or not finite.
    """

    norm: Literal["inf", "2"]
    centre: Tensor
    radius: Tensor
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.norm not in ("inf", "2"):
            raise ValueError(f"norm {self.norm!r} is not known; balls are of norm 'inf' or '2'")
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

        a: (batch or 1, rows, inputs). Returns (batch, rows). Exact for norm inf and for norm 2 without a domain; else
        the better of the dual norm, a.centre - radius ||a||_2, and the box.
        """
        lower, upper = (side.flatten(1) for side in self.box())
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        if self.norm == "inf":
            return _product(a, middle) - _product(a.abs(), half)
        dual = _product(a, self.centre.flatten(1)) - self.radius[:, None] * _norm(a)
        if math.isinf(self.low) and math.isinf(self.high):
            return dual
        return torch.maximum(dual, _product(a, middle) - _product(a.abs(), half))


def _norm(a: Tensor) -> Tensor:
    """||a||_2 of each row, in units of its largest entry: squares of entries below 1e-154 would be 0. (batch, rows)."""
    largest = a.abs().amax(-1).clamp(min=torch.finfo(a.dtype).tiny)
    return torch.linalg.vector_norm(a / largest[..., None], dim=-1) * largest


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a.x per row. a: (batch or 1, rows, n), x: (batch, n). Returns (batch, rows)."""
    if len(a) == 1:
        return x @ a[0].T
    return torch.bmm(a, x[:, :, None])[:, :, 0]
