"""|G| and |W G|: weights whose gradient, or first-order effect on the loss, is small matter least."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import RecipeError
from .base import Scorer, is_number


@dataclasses.dataclass
class _Observing(Scorer):
    """Keep a decaying sum over optimizer steps, `I <- momentum I + |...|`.

    Args:
        momentum: 1 = plain sum over all steps, 0 = the last step alone.
    """

    observes = True
    momentum: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0.0 <= self.momentum <= 1.0:
            raise RecipeError(f"scorer '{self.name}': momentum={self.momentum!r} is no number from 0 to 1")

    def element_scores(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        assert importance is not None
        return importance


@SCORERS.register("gradient")
@dataclasses.dataclass
class Gradient(_Observing):
    """Score by the size of the gradient: `I <- momentum I + |G|`, with `G` dense (masked weights can come back).

    Example:
        >>> import torch
        >>> seen = torch.zeros(1, 2)
        >>> Gradient().observe(seen, torch.tensor([[5.0, 5.0]]), torch.tensor([[-2.0, 1.0]]))
        >>> seen.tolist()
        [[2.0, 1.0]]
    """

    def observe(self, importance: Tensor, weight: Tensor, gradient: Tensor) -> None:
        importance.mul_(self.momentum).add_(gradient.abs())


@SCORERS.register("taylor")
@dataclasses.dataclass
class Taylor(_Observing):
    """Score by the first-order effect on the loss of removing the weight: `I <- momentum I + |W G|`.

    Example:
        >>> import torch
        >>> seen = torch.zeros(1, 2)
        >>> Taylor().observe(seen, torch.tensor([[3.0, 5.0]]), torch.tensor([[-2.0, 1.0]]))
        >>> seen.tolist()
        [[6.0, 5.0]]

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", eq. 7;
    Lee et al. 2019, "SNIP", eq. 3.
    """

    def observe(self, importance: Tensor, weight: Tensor, gradient: Tensor) -> None:
        importance.mul_(self.momentum).add_((weight.detach() * gradient).abs_())
