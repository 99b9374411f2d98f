"""Scores above a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...config.sparsity import SELECTIONS
from ...utils.validation import check_number
from .base import Selection, kept_count
from .topk import keep_highest, refuse_nan


@SELECTIONS.register("threshold")
@dataclasses.dataclass
class Threshold(Selection):
    """Keep every group whose score is above one threshold.

    With a `value` the threshold rises along the schedule from zero to it, and the sparsity is what comes out; but the
    highest 0.5 % of the groups of each weight stay, and one at least, as in the code of Sanh et al. 2020, so that no
    value removes a weight whole. Without, the threshold is placed so that the scheduled sparsity is met exactly.

    Args:
        value: the final threshold, in the units of the scores.

    Example:
        >>> Threshold(value=2.0).select([torch.tensor([1.0, 2.0, 3.0])], 1.0)[0].tolist()
        [False, False, True]
    """

    value: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None:
            check_number("value", self.value)

    @property
    def decides_sparsity(self) -> bool:
        return self.value is not None

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        if self.value is None:
            total = sum(tensor.numel() for tensor in scores)
            kept, self.threshold = keep_highest(scores, kept_count(total, sparsity))
            return kept
        if sparsity == 0.0:
            return [torch.ones_like(tensor, dtype=torch.bool) for tensor in scores]
        refuse_nan(scores)
        threshold = self.threshold = self.value * sparsity
        return [_above(tensor.detach(), threshold) for tensor in scores]


def _above(scores: Tensor, threshold: float) -> Tensor:
    kept = scores > threshold
    least = int(0.005 * scores.numel()) + 1
    count = kept.sum()
    # Sharded scores are counted over all processes, so that all of them take the same way.
    if int(count.full_tensor() if isinstance(count, DTensor) else count) >= least:
        return kept
    (kept,), _ = keep_highest([scores], least)
    return kept
