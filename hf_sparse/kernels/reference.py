"""The products in plain torch: right on every device, slower than the C++ ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .fp32_layout import dense

if TYPE_CHECKING:
    from .types import Norm, Weight

SPARSE_FROM = 0.85
"""Share of zeros from which torch's CSR product, tokens in chunks, beats its dense one on a CPU."""

TOKENS = 32
"""Tokens a chunk of the CSR product: its activations stay in the cache."""

_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> version, weight; gone with the values


def linear(x: Tensor, weight: Weight, activation: str) -> Tensor:
    """Compute a product, its bias and its activation; in fp32, or in fp64 where x is."""
    return _linear(x.to(_dtype(x)), weight, activation).to(x.dtype)


def ffn(x: Tensor, weights: list[Weight], activation: str) -> Tensor:
    """Compute (gate,) up and down."""
    inner = x.to(_dtype(x))
    hidden = _linear(inner, weights[0], activation)
    if len(weights) == 3:
        hidden = hidden * _linear(inner, weights[1], "none")
    return _linear(hidden, weights[-1], "none").to(x.dtype)


def attention(x: Tensor, heads: int, mask: Tensor | None, scale: float) -> Tensor:
    """Compute the attention of queries, keys and values that lie beside each other.

    Shapes: x: (batch, length, 3 * inner). Result: (batch, length, inner).
    """
    batch, length, width = x.shape
    query, key, value = x.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, width // 3)


def normalise(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """Compute the layer norm of a sum."""
    weight, bias, eps = norm
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


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


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _linear(x: Tensor, weight: Weight, activation: str) -> Tensor:
    matrix, bias = _unpack(weight).to(x.dtype), weight[3]
    bias = None if bias is None else bias.to(x.dtype)
    if matrix.layout == torch.strided:
        return activate(F.linear(x, matrix, bias), activation)
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_empty(flat.shape[0], matrix.shape[0])
    for start in range(0, flat.shape[0], TOKENS):
        out[start : start + TOKENS] = (matrix @ flat[start : start + TOKENS].T).T
    if bias is not None:
        out += bias
    return activate(out, activation).view(*x.shape[:-1], matrix.shape[0])


def _unpack(weight: Weight) -> Tensor:
    """Make the CSR or the dense weight, once for as long as the packed values live and stay what they are."""
    values, columns, pointers, _, rows, out_features, in_features = weight
    version = None if values.is_inference() else (values._version, columns._version, pointers._version)
    known = _unpacked.get(values)
    if (
        known is not None
        and version is not None
        and known[0] == version
        and known[1].shape == (out_features, in_features)
    ):
        return known[1]
    matrix = dense(values, columns, pointers, rows, out_features, in_features)
    filled = matrix.count_nonzero() if matrix.is_cpu and matrix.numel() else matrix.numel()
    if filled < (1 - SPARSE_FROM) * matrix.numel():
        matrix = matrix.to_sparse_csr()
    _unpacked[values] = (version, matrix)
    return matrix
