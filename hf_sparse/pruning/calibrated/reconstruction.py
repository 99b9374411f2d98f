"""Local reconstruction: the weights that a mask keeps are fitted to what the dense layer computed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...config.sparsity import RECONSTRUCTIONS
from ...utils.validation import check_number, check_positive_int
from .statistics import InputStatistics


class Reconstruction:
    """Base: what fits the weights of one layer. A new one is registered with `RECONSTRUCTIONS`."""

    def fit(self, weight: Tensor, kept: Tensor, dense: Tensor, inputs: InputStatistics) -> Tensor:
        """Return new values of a weight.

        Args:
            weight: where to start, `(out, in)`, zero where it is not kept.
            kept: the mask, which stays as it is.
            dense: the weight before pruning.
            inputs: of the layer, with products.
        """
        raise NotImplementedError


@RECONSTRUCTIONS.register("cg")
@dataclasses.dataclass
class ConjugateGradient(Reconstruction):
    """Minimize `‖(W - W_dense) X‖²` over the entries that are kept, by conjugate gradients, all rows at once.

    The gradient of a row is `(w - w_dense) H` with `H = 2/n X Xᵀ`, masked; steps are scaled by the diagonal of H. No
    step makes the error larger, so few are enough, and the mask never changes. The damping keeps entries near their
    dense values where the calibration data says little about them.

    Args:
        steps: products with H, each as much work as all tokens of one batch of `in` tokens.
        damping: of the mean of the diagonal of H, added to it.

    Source: Hestenes and Stiefel 1952; for layers of pruned language models Boža 2024, "Fast and Effective Weight Update
    for Pruned Large Language Models", section 3 (the same objective, solved by ADMM).
    """

    steps: int = 20
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_positive_int("steps", self.steps)
        check_number("damping", self.damping, "[0, inf)")

    def fit(self, weight: Tensor, kept: Tensor, dense: Tensor, inputs: InputStatistics) -> Tensor:
        hessian = inputs.hessian()
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean())
        # An input that is always zero has a gradient of zero, and its weights stay.
        scale = torch.where(hessian.diagonal() > 0, hessian.diagonal(), 1.0)
        weight = weight.clone()
        residual = ((dense - weight) @ hessian).masked_fill_(~kept, 0.0)
        scaled = residual / scale
        direction, before = scaled, (residual * scaled).sum(1, keepdim=True)
        tiny = torch.finfo(weight.dtype).tiny
        for _ in range(self.steps):
            product = (direction @ hessian).masked_fill_(~kept, 0.0)
            length = before / (direction * product).sum(1, keepdim=True).clamp_min(tiny)
            length = torch.where(before > tiny, length, 0.0)  # rows that are solved stay
            weight.addcmul_(length, direction)
            residual.addcmul_(length, product, value=-1)
            scaled = residual / scale
            after = (residual * scaled).sum(1, keepdim=True)
            direction = scaled + direction * torch.where(before > tiny, after / before.clamp_min(tiny), 0.0)
            before = after
        return weight
