"""A unit: weights that share one mask. So far always one weight alone; architectures will add heads and neurons."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .masking import MaskedWeight, hidden
from .patterns import Pattern
from .scorers import Scorer


@dataclasses.dataclass
class Unit:
    """One masked weight of a model.

    Attributes:
        name: of the weight in the model, `....weight`.
        module: the layer that has it.
        masked: the mask on it.
        pattern: which entries form a group.
    """

    name: str
    module: nn.Module
    masked: MaskedWeight
    pattern: Pattern

    def group_scores(self, scorer: Scorer) -> Tensor:
        """Return the score of each group, of the shape `pattern.groups_shape(weight.shape)`."""
        if self.masked.scores is not None:
            return self.masked.scores.detach()
        return self.pattern.pool(scorer.element_scores(hidden(self.module).detach(), self.masked.importance))

    def keep(self, groups: Tensor) -> None:
        """Keep the groups that are True, remove the others."""
        self.masked.mask.copy_(self.pattern.expand(groups, tuple(self.masked.mask.shape)))

    def observe(self, scorer: Scorer) -> None:
        """Show the scorer the gradient gathered since the last optimizer step, averaged over all processes."""
        gradient, self.masked.gathered = self.masked.gathered, None
        if gradient is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        # A loss scaler that overflowed skips its step; the scores must not remember it.
        if bool(torch.isfinite(gradient.sum())):
            assert self.masked.importance is not None
            scorer.observe(self.masked.importance, hidden(self.module).detach(), gradient)
