"""What comes after a sub-block of BERT and its kin: dropout, which does nothing here, the residual, the layer norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..kernels.types import Norm
from ..modeling.zero_preservation import is_guard


def norm_of(after: Any) -> Norm | None:
    """Return the layer norm of such a module, for an operator to compute; None if that would be noticed.

    Args:
        after: a module with the attributes `dense`, `dropout` and `LayerNorm`.
    """
    norm, dropout = after.LayerNorm, after.dropout
    if type(norm) is not nn.LayerNorm or norm.weight is None or len(norm.normalized_shape) != 1:
        return None
    if not is_own(after) or type(dropout) is not nn.Dropout or dropout.training:
        return None  # the dropout of a model in eval() can be switched on alone, to draw many answers (MC dropout)
    if any(watched(module) for module in (after, after.dense, after.dropout, norm)):
        return None
    return Norm(norm.weight, norm.bias, norm.eps)


def is_own(module: nn.Module) -> bool:
    """Return whether a module is of a class of transformers: one made of it, or of its name, may compute otherwise."""
    return type(module).__module__.startswith("transformers.models.")


def watched(module: nn.Module) -> bool:
    """Return whether somebody sees each call of a module: hooks (but for the one that keeps zeros), a new forward."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):  # looked at in each call of each block
        if hooks and not all(map(is_guard, hooks.values())):
            return True
    return "forward" in module.__dict__
