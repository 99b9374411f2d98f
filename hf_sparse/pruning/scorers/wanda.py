"""|W| times the norm of the input: weights that are small, or whose input is, matter least."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import SCORERS
from ..calibrated.statistics import InputStatistics
from ..selection import PerRow, Selection
from .inputs import Choice, InputScorer


@SCORERS.register("wanda")
@dataclasses.dataclass
class Wanda(InputScorer):
    """Score by `|W_ij| ‖x_j‖₂`, compared within each output row; the weights that are kept do not change.

    In one shot only, see `hf_sparse.sparsify`.

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3.
    """

    def own_selection(self) -> Selection:
        return PerRow()

    def prune(self, weight: Tensor, inputs: InputStatistics, choice: Choice) -> tuple[Tensor, Tensor]:
        return weight, choice(weight.abs() * inputs.norms.to(weight.device))
