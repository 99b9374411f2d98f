"""The end of a sub-block: dropout (which does nothing in inference), residual, layer norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels.types import Norm
from ..modeling.architectures import ResidualNorm, SubBlock


class FusedEnd:
    """The layer norm at the end of a fused sub-block, for an operator to compute.

    Args:
        block: the sub-block, with its packed layers.
        table: names the modules.

    Attributes:
        paths: of the modules that are not called, for `FusedParts`.
    """

    def __init__(self, block: SubBlock, table: ResidualNorm) -> None:
        module = block.module
        self.dropout: Any = module.get_submodule(table.dropout)
        self.norm: Any = module.get_submodule(table.norm)
        self.paths = (table.module, table.dropout, table.norm)
        plain = type(self.norm) is nn.LayerNorm and type(self.dropout) is nn.Dropout
        one_axis = plain and len(self.norm.normalized_shape) == 1  # type: ignore[arg-type]
        self.fusible = one_axis and block.is_own(module.get_submodule(table.module))

    def operand(self) -> Norm | None:
        """Return the layer norm for an operator; None if it has to be called."""
        # The dropout of a model in eval() may be switched on alone, to sample predictions (MC dropout).
        if not self.fusible or self.dropout.training:
            return None
        norm = self.norm
        weight = norm.weight
        return None if weight is None else Norm(weight, norm.bias, norm.eps)

    def apply(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return `norm(dropout(hidden) + residual)`."""
        out: Tensor = self.norm(self.dropout(hidden) + residual)
        return out
