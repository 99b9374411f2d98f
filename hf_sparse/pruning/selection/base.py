"""What a selection is, and how many groups a sparsity keeps."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, ClassVar

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
        works_on_shards: whether scores may be sharded over processes (fully_shard).
        weight_by_weight: whether weights do not compete with each other, so that each can be selected from alone.
        needs_inputs: whether it looks at the inputs of layers on calibration data before it selects.
        threshold: the score at the cut of the last `select`, where one number describes it.
    """

    name: ClassVar[str]
    works_on_shards: ClassVar[bool] = True
    weight_by_weight: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    threshold: float | None = None

    def prepare_units(self, units: Sequence[Any], pattern: Any) -> None:
        """Look at the units whose scores `select` will be given; they have no masks yet.

        Args:
            units: `Unit`s, in the order of the scores.
            pattern: of the group.

        Raises:
            PatternError: if the selection does not suit the pattern.
        """

    @property
    def decides_sparsity(self) -> bool:
        return False

    def sparsity_of(self, index: int, sparsity: float) -> float:
        """Return how sparse one weight is to be, at a sparsity of all.

        Args:
            index: of the unit.
        """
        return sparsity

    def select_alone(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return which groups of one weight to keep; where `weight_by_weight`."""
        return self.select([scores], sparsity)[0]

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """Return for each tensor of scores a bool tensor of the same shape, True = kept.

        Raises:
            SparsityError: if there are NaN among the scores.
        """
        raise NotImplementedError

    def logs(self) -> dict[str, float]:
        """Return numbers worth logging about the last selection, beside the threshold."""
        return {}
