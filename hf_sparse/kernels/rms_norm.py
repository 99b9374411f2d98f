"""The operator `hf_sparse::rms_norm`: RMSNorm of a few tokens in one pass, which takes plain torch eight operators.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from .library import Library, checked, library, readable
from .operators import define

_TYPES = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, *[ctypes.c_float] * 2]


def reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Compute the same in plain torch."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension. It has no derivative.

    Shapes:
        x: (..., features), float32. weight: (features,), float32. Result: (..., features).

    Args:
        offset: 1 for models whose weight is stored without it (Gemma).

    Raises:
        BackendError: the weight does not fit the input, or a derivative is wanted.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
        tensor([0.8485, 1.1314])
    """
    out: Tensor = _operator(x, weight, eps, offset)
    return out


@cache
def _function(loaded: Library) -> Any:
    return loaded.bound("hf_sparse_rms_norm", _TYPES)


def _run(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    _check(x, weight)
    loaded, width = library(), weight.numel()
    plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
    if loaded is None or not plain:
        return reference(x, weight, eps, offset)
    x, weight = readable(x), weight.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    result = _function(loaded)(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, offset)
    return checked(result, y)


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    _check(x, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.dim() or weight.shape != x.shape[-1:]:
        raise BackendError(
            f"`weight` must have the shape of the last dimension of an input, got {tuple(weight.shape)} "
            f"for an input of shape {tuple(x.shape)}"
        )


_operator = define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor", _run, _fake)
