"""Masking of tensors with exact zeros: +0.0 where the mask is False, and every other bit as it was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masks_by_bits(values: Tensor) -> bool:
    """Return whether values can be masked as integers.

    Multiplying their bits with 0 or 1 gives the same as `where`, and is three to ten times as fast on a CPU, where
    `where` decides for each entry. Compilers and exporters optimize `where` themselves, and cannot follow bits.
    """
    plain = values.device.type == "cpu" and not isinstance(values, DTensor) and values.element_size() in _BITS
    return plain and not torch.compiler.is_compiling()


def mask_values(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` where the mask is True and +0.0 elsewhere.

    Not `values * mask`, which makes -0.0 of negative values and NaN of infinite ones.

    Example:
        >>> mask_values(torch.tensor([-1.0, float("inf"), 2.0]), torch.tensor([False, False, True])).tolist()
        [0.0, 0.0, 2.0]
    """
    differentiable = values.requires_grad and torch.is_grad_enabled()  # gradients of gradients
    if differentiable or not masks_by_bits(values):
        return torch.where(mask, values, 0.0)
    bits = _BITS[values.element_size()]
    return mask.to(bits).mul_(values.view(bits)).view(values.dtype)


def mask_values_(values: Tensor, mask: Tensor) -> None:
    """Set `values` to +0.0 in place where the mask is False.

    Example:
        >>> values = torch.tensor([-1.0, float("nan"), 2.0])
        >>> mask_values_(values, torch.tensor([False, False, True]))
        >>> values.tolist()
        [0.0, 0.0, 2.0]
    """
    if masks_by_bits(values):
        values.view(_BITS[values.element_size()]).mul_(mask)
    else:
        values.masked_fill_(~mask, 0)
