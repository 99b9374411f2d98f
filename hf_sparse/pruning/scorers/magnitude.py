"""|W|: small weights matter least."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import SCORERS
from .base import Scorer


@SCORERS.register("magnitude")
@dataclasses.dataclass
class Magnitude(Scorer):
    """Score by the absolute value of the weight as it is now: `S = |W|`.

    Example:
        >>> import torch
        >>> Magnitude().element_scores(torch.tensor([[-2.0, 1.0]])).tolist()
        [[2.0, 1.0]]

    Source: Han et al. 2015, "Learning both Weights and Connections", section 3; Zhu and Gupta 2017.
    """

    elementwise = True
    keeps_largest = True

    def element_scores(self, weight: Tensor) -> Tensor:
        return weight.detach().abs()
