"""Head importance: how much the loss of single samples reacts to a head, measured on data before pruning."""

from __future__ import annotations

import dataclasses

from ...config.sparsity import SCORERS
from ...errors import RecipeError
from .base import Scorer


@SCORERS.register("head_importance")
@dataclasses.dataclass
class HeadImportance(Scorer):
    """Score a head by `E_x |dL(x)/dxi|`, `xi` a gate on what it gives: the absolute value per sample, then the mean.

    Args:
        normalize: divide by the L2 norm over the heads of an attention, so that attentions can be compared with each
            other (selection "global" or "budget"); within one attention it changes nothing.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1.
    """

    measures = True
    normalize: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool):
            raise RecipeError(f"scorer 'head_importance': normalize is true or false, not {self.normalize!r}")
