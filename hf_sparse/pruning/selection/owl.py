"""Sparsity by layer from the outliers of each block: blocks with more of them stay denser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ...config.sparsity import SELECTIONS
from ...errors import SparsityError
from ...utils.validation import check_number, check_one_of
from .base import Selection
from .per_row import PerRow
from .uniform import Uniform

WITHIN = {"row": PerRow(), "weight": Uniform()}


@SELECTIONS.register("owl")
@dataclasses.dataclass
class Owl(Selection):
    """Give each block a sparsity by its share of outliers, `S_i = S - (D_i - mean D)`, with `D` scaled to the spread.

    `D_i` is the fraction of the `|W_ij| ‖x_j‖₂` of a block that are above `outlier` times their mean, on calibration
    data. Over the blocks it is brought to a range of `2 spread`, so that no block is more than that away from another;
    the mean, weighted by the sizes of the blocks, is the sparsity that was requested.

    Args:
        spread: `lambda` of the paper, half the distance between the densest and the sparsest block, in [0, 1).
        outlier: `M` of the paper: how many times the mean an outlier is above.
        within: "row" or "weight": which weights of a layer compete.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.2.
    """

    weight_by_weight: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = True
    spread: float = 0.08
    outlier: float = 5.0
    within: str = "row"
    _offsets: list[float] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("spread", self.spread, "[0, 1)")
        check_number("outlier", self.outlier, "(0, inf)")
        check_one_of("within", self.within, WITHIN)

    def prepare_outliers(self, shares: Sequence[float], sizes: Sequence[int]) -> None:
        """Learn the share of outliers in the block of each unit.

        Args:
            shares: of outliers, in the order of the units; equal for the units of one block.
            sizes: entries of each unit.
        """
        low, high = min(shares), max(shares)
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        scaled = [(share - low) * scale for share in shares]
        mean = sum(value * size for value, size in zip(scaled, sizes, strict=True)) / sum(sizes)
        self._offsets = [mean - value for value in scaled]

    def sparsity_of(self, index: int, sparsity: float) -> float:
        if not self._offsets:
            raise SparsityError(
                "selection 'owl' looks at the inputs of layers on calibration data, and has seen none: it prunes in "
                "one shot, hf_sparse.sparsify(model, config, batches)"
            )
        return min(1.0, max(0.0, sparsity + self._offsets[index]))

    def select_alone(self, scores: Tensor, sparsity: float) -> Tensor:
        return WITHIN[self.within].select_alone(scores, sparsity)

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        return [self.select_alone(tensor, self.sparsity_of(i, sparsity)) for i, tensor in enumerate(scores)]
