"""|G| and |W G|: weights whose gradient, or first-order effect on the loss, is small matter least."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import SCORERS
from ...utils.validation import check_number
from .base import GradientScorer


@dataclasses.dataclass
class _Decaying(GradientScorer):
    """Keep a decaying sum over optimizer steps, `I <- momentum I + |...|`.

    Args:
        momentum: 1 = plain sum over all steps, 0 = the last step alone.
    """

    elementwise = True
    momentum: float = 1.0

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, "[0, 1]")

    @property
    def additive(self) -> bool:
        return self.momentum == 1.0


@SCORERS.register("gradient")
@dataclasses.dataclass
class Gradient(_Decaying):
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
class Taylor(_Decaying):
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
