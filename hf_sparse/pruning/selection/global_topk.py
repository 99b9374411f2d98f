"""One ranking over all weights of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ...config.sparsity import SELECTIONS
from .base import Selection, kept_count
from .topk import keep_highest


@SELECTIONS.register("global")
@dataclasses.dataclass
class Global(Selection):
    """Keep a fraction of all groups of all weights together, so that weights compete with each other.

    Example:
        >>> import torch
        >>> [mask.tolist() for mask in Global().select([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], 0.5)]
        [[False, False], [True, True]]
    """

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        total = sum(tensor.numel() for tensor in scores)
        kept, self.threshold = keep_highest(scores, kept_count(total, sparsity))
        return kept
