"""Open parts of a search, of which those with the least bounds are taken first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from netassay.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Pool:
    """Open parts, as rows of tensors that grow, by name; one of them, `bound`, holds lower bounds: (parts,)."""

    def __init__(self) -> None:
        self.fields: dict[str, Tensor] = {}
        self.free: list[int] = []
        self.used = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return int(self.used.sum())

    def put(self, part: Mapping[str, Tensor]) -> None:
        count = len(part["bound"])
        if not count:
            return
        if len(self.free) < count:
            size, more = len(self.used), max(len(self.used), 2 * count, 1024)
            for name, value in part.items():
                rows = value.new_zeros(more, *value.shape[1:])
                self.fields[name] = torch.cat([self.fields[name], rows]) if size else rows
            self.used = torch.cat([self.used, torch.zeros(more, dtype=torch.bool)])
            self.free += range(size, size + more)
        places = torch.tensor([self.free.pop() for _ in range(count)])
        for name, value in part.items():
            self.fields[name][places] = value
        self.used[places] = True

    def take(self, count: int) -> dict[str, Tensor]:
        """The parts with the least bounds."""
        bound = torch.where(self.used, self.fields["bound"], torch.inf)
        places = bound.topk(min(count, len(self)), largest=False).indices
        self.used[places] = False
        self.free += places.tolist()
        return {name: value[places] for name, value in self.fields.items()}

    def least(self) -> float:
        return float(torch.where(self.used, self.fields["bound"], torch.inf).amin()) if len(self) else math.inf
