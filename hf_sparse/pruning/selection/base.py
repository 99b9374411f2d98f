"""How many groups survive, and compared with whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...config.sparsity import SELECTIONS
from ...errors import RecipeError
from .topk import keep_highest, refuse_nan


def kept_count(groups: int, sparsity: float) -> int:
    """Return `floor((1 - sparsity) * groups)`, but at least 1, computed in decimal.

    In binary, `int((1 - 0.9) * 1000)` is 99; a user who asks for 0.9 means one hundred.

    Example:
        >>> kept_count(1000, 0.9)
        100
    """
    return max(1, int((1 - Decimal(repr(float(sparsity)))) * groups))


class Selection:
    """Base: turn group scores into kept groups.

    Attributes:
        decides_sparsity: whether the options fix the outcome, so that no sparsity can be asked for.
        threshold: the score at the cut of the last `select`, where one number describes it.
    """

    name: ClassVar[str]
    threshold: float | None = None

    @property
    def decides_sparsity(self) -> bool:
        return False

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """Return for each tensor of scores a bool tensor of the same shape, True = kept.

        Raises:
            SparsityError: if there are NaN among the scores.
        """
        raise NotImplementedError

    def logs(self) -> dict[str, float]:
        """Return numbers worth logging about the last selection, beside the threshold."""
        return {}


@SELECTIONS.register("uniform")
@dataclasses.dataclass
class Uniform(Selection):
    """Keep the same fraction of every weight: `kept_count` of its groups, the highest.

    Example:
        >>> Uniform().select([torch.tensor([1.0, 2.0, 3.0, 4.0])], 0.5)[0].tolist()
        [False, False, True, True]
    """

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        kept = []
        for tensor in scores:
            masks, _ = keep_highest([tensor], kept_count(tensor.numel(), sparsity))
            kept += masks
        return kept


@SELECTIONS.register("global")
@dataclasses.dataclass
class Global(Selection):
    """Keep a fraction of all groups of all weights together, so that weights compete with each other.

    Example:
        >>> [mask.tolist() for mask in Global().select([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], 0.5)]
        [[False, False], [True, True]]
    """

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        total = sum(tensor.numel() for tensor in scores)
        kept, self.threshold = keep_highest(scores, kept_count(total, sparsity))
        return kept


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
        if self.value is None:
            return
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise RecipeError(f"the value of selection 'threshold' is a finite number, not {self.value!r}")

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


@dataclasses.dataclass
class WithinInputs(Selection):
    """Keep the n highest of every m consecutive inputs (what n:m patterns do); not for a recipe to name.

    While the schedule rises, as many of every m are dropped as the sparsity of the moment allows.
    """

    n: int
    m: int
    name: ClassVar[str] = "within"

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        # 1 - n/m is seldom a number that a float can hold: (1 - 4/5) * 5 has to be one weight, not 0.9999999999999998.
        keep = max(self.n, self.m - int(sparsity * self.m + 1e-9))
        refuse_nan(scores)
        kept = []
        for tensor in scores:
            rows = tensor.detach().reshape(-1, self.m)
            # A stable sort puts the lower index first among equals, so that ties break the same way everywhere.
            order = rows.sort(dim=1, descending=True, stable=True).indices[:, :keep]
            kept.append(torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view_as(tensor))
        return kept
