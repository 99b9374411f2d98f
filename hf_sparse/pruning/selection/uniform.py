"""The same fraction of every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ...config.sparsity import SELECTIONS
from .base import Selection, kept_count
from .topk import keep_highest


@SELECTIONS.register("uniform")
@dataclasses.dataclass
class Uniform(Selection):
    """Keep the same fraction of every weight: `kept_count` of its groups, the highest.

    Example:
        >>> import torch
        >>> Uniform().select([torch.tensor([1.0, 2.0, 3.0, 4.0])], 0.5)[0].tolist()
        [False, False, True, True]
    """

    weight_by_weight: ClassVar[bool] = True

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        kept = []
        for tensor in scores:
            masks, _ = keep_highest([tensor], kept_count(tensor.numel(), sparsity))
            kept += masks
        return kept
