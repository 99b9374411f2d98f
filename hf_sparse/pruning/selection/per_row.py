"""The same fraction of every row: weights of one output compete with each other, and with no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...config.sparsity import SELECTIONS
from ..shards import by_rows
from .base import Selection, kept_count
from .topk import keep_highest, refuse_nan


@SELECTIONS.register("per_row")
@dataclasses.dataclass
class PerRow(Selection):
    """Keep the same fraction of every row of a weight: `kept_count` of its groups, the highest.

    Where groups are blocks, a row is one of blocks. Groups that are whole rows, columns, heads or neurons have no rows
    to compare, and compete over their weight.

    Example:
        >>> PerRow().select([torch.tensor([[1.0, 2.0], [9.0, 8.0]])], 0.5)[0].tolist()
        [[False, True], [True, False]]

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3.
    """

    weight_by_weight: ClassVar[bool] = True

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        refuse_nan(scores)
        return [self.select_alone(tensor.detach(), sparsity) for tensor in scores]

    def select_alone(self, scores: Tensor, sparsity: float) -> Tensor:
        refuse_nan([scores])
        if scores.ndim == 1:
            (kept,), _ = keep_highest([scores], kept_count(len(scores), sparsity))
            return kept
        return by_rows(partial(_highest, sparsity), scores)


def _highest(sparsity: float, scores: Tensor) -> Tensor:
    rows = scores.reshape(len(scores), -1)
    keep = kept_count(rows.shape[1], sparsity)
    # A stable sort keeps the lower index of equal scores, so that ties break the same way everywhere.
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)
