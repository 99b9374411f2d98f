"""Base of scorers that look at the inputs of a layer: they prune weight by weight, on calibration data, in one shot."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ...errors import PatternError, RecipeError
from ..calibrated.statistics import InputStatistics
from ..patterns import Pattern
from ..selection import Selection
from ..unit import Unit
from .base import Scorer


@dataclasses.dataclass(frozen=True)
class Choice:
    """What turns scores of entries into a mask.

    Args:
        pattern: which entries form a group, of a weight as `(out, in)`.
        selection: which groups of one weight are kept.
        sparsity: of this weight.
    """

    pattern: Pattern
    selection: Selection
    sparsity: float

    def __call__(self, scores: Tensor) -> Tensor:
        """Return which entries to keep: of all inputs of a layer, or of as many as whole groups need.

        Shapes: `(out, in)` -> bool `(out, in)`.
        """
        kept = self.selection.select_alone(self.pattern.pool(scores), self.sparsity)
        return self.pattern.expand(kept, tuple(scores.shape))


class InputScorer(Scorer):
    """Base of scorers that look at the inputs of a layer.

    Attributes:
        needs_products: whether it needs the products of inputs with each other, and not their norms alone.
    """

    source = "inputs"
    needs_products: ClassVar[bool] = False

    def prune(self, weight: Tensor, inputs: InputStatistics, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return new values of a weight, and which entries are kept; values that are not kept do not matter.

        Args:
            weight: as `(out, in)`, in the type of the statistics.
            inputs: of its layer.
            choice: what turns scores into a mask.
        """
        raise NotImplementedError

    def check_selection(self, selection: Selection) -> None:
        if not selection.weight_by_weight:
            raise RecipeError(
                f"scorer '{self.name}' prunes block by block, so weights cannot compete with each other, as in "
                f"selection '{selection.name}'. Use 'per_row', 'uniform', or 'owl' for a sparsity of each block"
            )

    def check_pattern(self, pattern: Pattern) -> None:
        if pattern.inputs is None:
            raise PatternError(
                f"scorer '{self.name}' prunes entries, n:m groups and blocks, and does not work with pattern "
                f"'{pattern.name}'. Use scorer 'magnitude', 'gradient' or 'taylor' there"
            )

    def scores(self, unit: Unit) -> Tensor:
        raise RecipeError(
            f"scorer '{self.name}' has no scores without the inputs of the layer: call hf_sparse.sparsify"
        )
