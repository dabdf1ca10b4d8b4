"""Backward bounds with optimised slopes (alpha-CROWN).

The lower line of an unstable ReLU may have any slope alpha in [0, 1]. Each row of each box has slopes of its own, which
begin as those of CROWN (`netassay.numerics.bounds.backward`) and climb by Adam; the best iterate of each row is kept,
so a bound is never looser than CROWN's over the same boxes. `relaxed` bounds the inputs of every ReLU that way, before
the slopes of the next layer are chosen.

Adam runs in float32 at will; what is returned is computed once more in float64 from the slopes it ended with, and
loses the rounding of that pass: the bounds hold in real arithmetic whatever the optimiser did.

Reference: Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh. Fast and complete: enabling complete verification with fast and
massively parallel incomplete verifiers. 2021. (Section 3.1; slopes of each intermediate neuron its own.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Graph, Relu
from netassay.numerics.bounds import backward
from netassay.numerics.bounds.backward import Block, Lines, Lower, Relaxation
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import operations
from netassay.numerics.bounds.regions import Ball, Box, Region

if TYPE_CHECKING:
    from torch import Tensor

#: Adam's steps and rate, and by what the rate shrinks a step: 20 and 0.1 are Xu et al.'s of 2020 (auto_LiRPA's
#: default of 0.5 gave nothing on three networks), the shrinking that of 2021.
STEPS, RATE, SHRINK = 20, 0.1, 0.98
#: Slopes of the rows of one call at once: 64 MiB in float32. More rows are taken in several calls.
SLOPES = 1 << 24


def lower(
    graph: Graph,
    region: Region,
    rows: Tensor,
    *,
    intermediates: backward.Intermediates = "backward",
    refined: bool = False,
    steps: int = STEPS,
    rate: float = RATE,
    block: int = backward.BLOCK,
    search: torch.dtype | None = None,
    flat: bool = False,
) -> Lower:
    """As `backward.lower`, with optimised slopes. refined: those of the inputs of ReLUs are optimised too, which costs
    as much as their number is larger than that of the rows. search: the precision of Adam, float32 unless told. Steps
    in float32 may turn another way in another block; in float64 bounds agree for any.
    """
    parts = []
    for which in (slice(start, start + block) for start in range(0, len(region), block)):
        mine, wanted = region[which], rows[None] if rows.dim() == 2 else rows[which]
        refine = refiner(graph, mine, steps, rate, search) if refined else None
        with torch.no_grad():
            known = backward.relaxed(graph, mine, intermediates, None, refine, flat)
        parts.append(_lower(graph, mine, wanted, known, steps, rate, search))
    return backward.joined(parts)


def _lower(
    graph: Graph, region: Region, rows: Tensor, block: Block, steps: int, rate: float, search: torch.dtype | None
) -> Lower:
    shaped = rows.unflatten(2, graph.output_shape)
    slopes = optimised(graph, region, shaped, graph.output, block.lines, steps, rate, search)
    with torch.no_grad():
        row = backward.walk(graph, shaped, graph.output, with_slopes(block.lines, slopes))
        return backward.concretised(graph, region, rows, row, block)


def refiner(
    graph: Graph, region: Region, steps: int = STEPS, rate: float = RATE, search: torch.dtype | None = None
) -> backward.Refine:
    """What tightens the inputs of ReLUs in `backward.relaxed`."""

    def refine(at: str, x: Interval, block: Block, slack: Tensor) -> Interval:
        unstable = (x.lower < 0) & (x.upper > 0)
        before = sum(lines.alpha[0].numel() for lines in block.lines.values() if isinstance(lines, Lines))
        for neurons, rows in backward.unit_rows(graph, at, unstable, len(region), x.lower.dtype):
            half = len(neurons)
            size = max(1, SLOPES // (2 * max(1, before) * len(region)))
            for which in torch.arange(half).split(size):
                some = rows[:, torch.cat([which, which + half])]
                slopes = optimised(graph, region, some, at, block.lines, steps, rate, search)
                row = backward.walk(graph, some, at, with_slopes(block.lines, slopes))
                least = row.d + region.minimum(row.a.flatten(2))
                x = backward.cut(x, neurons[which], least, slack, unstable)
        return x

    return refine


def with_slopes(lines: Mapping[str, Relaxation], slopes: Mapping[str, Tensor]) -> dict[str, Relaxation]:
    """Lines of which some have other lower slopes. slopes: by target, (batch, rows, *shape), in [0, 1]."""
    return {target: _sloped(line, slopes.get(target)) for target, line in lines.items()}


def _sloped(line: Relaxation, slope: Tensor | None) -> Relaxation:
    if slope is None or not isinstance(line, Lines):
        return line
    free = (line.intercept > 0)[:, None]
    return replace(line, alpha=torch.where(free, slope.to(line.alpha.dtype), line.alpha[:, None]))


def optimised(
    graph: Graph,
    region: Region,
    rows: Tensor,
    at: str,
    lines: Mapping[str, Relaxation],
    steps: int,
    rate: float,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The best slopes met for each row of each box, by target of the ReLU: (batch, rows, *shape).

    rows: (batch or 1, rows, *shape of at). dtype: of the search, float32 unless told.
    """
    dtype = dtype or torch.float32
    relus = {operation.target for operation in operations(graph) if isinstance(operation, Relu)}
    lines = in_dtype(lines, dtype)
    region, rows = region_in(region, dtype), rows.to(dtype)
    kept = {}
    for target, line in lines.items():
        if target in relus and isinstance(line, Lines):
            kept[target] = line.alpha[:, None].expand(-1, rows.shape[1], *line.alpha.shape[1:]).clone()

    def least(leaves: Sequence[Tensor]) -> Tensor:
        row = backward.walk(graph, rows, at, with_slopes(lines, dict(zip(kept, leaves, strict=True))))
        return row.d + region.minimum(row.a.flatten(2))

    best = climb(least, list(kept.values()), steps, rate)
    return dict(zip(kept, best, strict=True))


def climb(bound: Callable[[Sequence[Tensor]], Tensor], start: list[Tensor], steps: int, rate: float) -> list[Tensor]:
    """Of each (batch, row), the slopes of the largest bound met in `steps` of Adam, kept in [0, 1].

    bound: slopes, each (batch, rows, ...), -> (batch, rows).
    """
    with torch.enable_grad():
        leaves = [slopes.clone().requires_grad_() for slopes in start]
        best, top = start, None
        used: list[Tensor] = leaves
        for step in range(steps + 1):
            value = bound(leaves)
            if top is None:
                top = value.detach()
            else:
                better = value.detach() > top
                top = torch.where(better, value.detach(), top)
                best = [
                    torch.where(better.reshape(*better.shape, *[1] * (old.dim() - 2)), leaf.detach(), old)
                    for old, leaf in zip(best, leaves, strict=True)
                ]
            if step == steps or not value.requires_grad:
                break
            if step == 0:
                optimiser = torch.optim.Adam(used, lr=rate)
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, SHRINK)
            optimiser.zero_grad()
            (-value.sum()).backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.clamp_(0, 1)
    return best


def in_dtype(lines: Mapping[str, Relaxation], dtype: torch.dtype) -> dict[str, Relaxation]:
    """Lines and planes in another precision, by target."""
    return {target: _in(line, dtype) for target, line in lines.items()}


def _in(line: Relaxation, dtype: torch.dtype) -> Relaxation:
    """The lines in another precision."""
    if isinstance(line, Lines):
        below = None if line.below is None else line.below.to(dtype)
        return Lines(line.alpha.to(dtype), line.slope.to(dtype), line.intercept.to(dtype), below)
    (a, b, c), (d, e, f) = line.below, line.above
    return backward.Planes((a.to(dtype), b.to(dtype), c.to(dtype)), (d.to(dtype), e.to(dtype), f.to(dtype)))


def region_in(region: Region, dtype: torch.dtype) -> Region:
    if isinstance(region, Box):
        return Box(region.lower.to(dtype), region.upper.to(dtype))
    return Ball(region.norm, region.centre.to(dtype), region.radius.to(dtype), region.low, region.high)
