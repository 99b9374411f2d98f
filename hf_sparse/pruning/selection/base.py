"""What a selection is, and how many groups a sparsity keeps."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar

from torch import Tensor


def kept_count(groups: int, sparsity: float) -> int:
    """Return `floor((1 - sparsity) * groups)`, but at least 1, computed in decimal.

    In binary, `int((1 - 0.9) * 1000)` is 99; a user who requests 0.9 expects one hundred.

    Example:
        >>> kept_count(1000, 0.9)
        100
    """
    return max(1, int((1 - Decimal(repr(float(sparsity)))) * groups))


class Selection:
    """Base: turn group scores into kept groups.

    Attributes:
        decides_sparsity: whether the options determine the sparsity, so that none can be requested.
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
