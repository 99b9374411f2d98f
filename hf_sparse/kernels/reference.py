"""The sparse operators in plain torch: correct on every device, slower than the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import AnyWeight, Norm

TOKENS = 32
"""Tokens a chunk of the CSR matmul: its activations stay in the cache."""

W = TypeVar("W", bound=AnyWeight)


def forward(x: Tensor, weights: Sequence[W], activation: str, matmul: Callable[[Tensor, W], Tensor]) -> Tensor:
    """Compute one linear layer and its activation, or (gate,) up and down; in fp32, or in fp64 where x is.

    Args:
        matmul: computes `x @ weight.T + bias`.
    """
    inner = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    hidden = activate(matmul(inner, weights[0]), activation)
    if len(weights) == 3:
        hidden = hidden * matmul(inner, weights[1])
    return (hidden if len(weights) == 1 else matmul(hidden, weights[-1])).to(x.dtype)


def attention(x: Tensor, heads: int, mask: Tensor | None, scale: float) -> Tensor:
    """Compute the attention of concatenated queries, keys and values.

    Shapes: x: (batch, length, 3 * inner). Result: (batch, length, inner).
    """
    batch, length, width = x.shape
    query, key, value = x.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, width // 3)


def normalize(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """Compute the layer norm of a sum."""
    return F.layer_norm(x + residual, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name in the operators."""
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
        case _:
            return x


def csr_matmul(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `x @ matrix.T + bias` for a matrix in CSR, some tokens at a time.

    `F.linear` with a CSR weight is slower than dense at any sparsity; the matrix times a few columns is not, from about
    85 % zeros on.

    Shapes: `(..., in)` -> `(..., out)`
    """
    tokens = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    out = x.new_empty((len(tokens), matrix.shape[0]))
    for start in range(0, len(tokens), TOKENS):
        out[start : start + TOKENS] = (matrix @ tokens[start : start + TOKENS].t()).t()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], matrix.shape[0])
