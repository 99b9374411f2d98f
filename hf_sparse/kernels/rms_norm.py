"""The operator `hf_sparse::rms_norm`: RMSNorm of a few tokens in one pass, which takes plain torch eight operators.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BackendError
from .library import library
from .operators import define


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


def _run(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    _check(x, weight)
    native = library()
    plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
    return (
        native.rms_norm(x, weight, eps, offset) if native is not None and plain else reference(x, weight, eps, offset)
    )


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
