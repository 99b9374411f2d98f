"""No information at all: the baseline that every method has to beat."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from .base import Scorer, check_seed


@SCORERS.register("random")
@dataclasses.dataclass
class Random(Scorer):
    """Score by a random number per entry, the same at every step, so that a removed weight stays removed.

    Args:
        seed: of the generator; the draw depends on the seed and the shape of the weight only.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 2)
        >>> torch.equal(Random(seed=1).element_scores(weight), Random(seed=1).element_scores(weight))
        True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def element_scores(self, weight: Tensor) -> Tensor:
        # Drawn on the CPU from an own generator: the same on every device and rank, and no use of the global one.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(weight.shape, generator=generator).to(weight.device)
        return drawn.masked_fill_(weight.isnan(), torch.nan)  # a weight without a value has no score either
