"""The n highest of every m consecutive inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..shards import by_rows
from .base import Selection
from .topk import refuse_nan


@dataclasses.dataclass
class WithinInputs(Selection):
    """Keep the n highest of every m consecutive inputs (what n:m patterns do); not for a recipe to name.

    While the schedule rises, as many of every m are dropped as the sparsity of the moment allows.
    """

    n: int
    m: int
    name: ClassVar[str] = "within"
    weight_by_weight: ClassVar[bool] = True

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        # 1 - n/m is seldom a number that a float can hold: (1 - 4/5) * 5 has to be one weight, not 0.9999999999999998.
        keep = max(self.n, self.m - int(sparsity * self.m + 1e-9))
        refuse_nan(scores)
        return [by_rows(partial(self._highest, keep), tensor.detach()) for tensor in scores]

    def _highest(self, keep: int, scores: Tensor) -> Tensor:
        rows = scores.reshape(-1, self.m)
        # A stable sort puts the lower index first among equals, so that ties break the same way everywhere.
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view_as(scores)
