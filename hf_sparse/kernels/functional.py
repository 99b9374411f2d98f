"""Functions that call the sparse operators on a packed weight: those of its format, fp32 or int8.

In int8, what a matmul is given is rounded too: see `int8_ops`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .types import Norm, Packed
from .validation import scale_of


def _operator(weight: Packed, name: str) -> Callable[..., Tensor]:
    operator: Callable[..., Tensor] = getattr(torch.ops.hf_sparse, f"{weight.operators}_{name}")
    return operator


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Compute `activation(x @ weight.T + bias)`.

    Shapes:
        x: (..., in). bias: (out,). Result: (..., out).

    Raises:
        BackendError: shapes or types that do not fit, an unknown activation, or an input that needs a gradient.

    Example:
        >>> from hf_sparse.kernels import pack, pack_int8
        >>> weight, x = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.1]])
        >>> linear(x, pack(weight)), linear(x, pack_int8(weight))
        (tensor([[0.2000]]), tensor([[0.2047]]))
    """
    return _operator(weight, "linear")(
        x,
        *weight.parts,
        bias,
        weight.rows,
        weight.out_features,
        weight.in_features,
        activation,
    )


def ffn(
    x: Tensor,
    up: Packed,
    up_bias: Tensor | None,
    down: Packed,
    down_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Compute `activation(x @ up.T + up_bias) @ down.T + down_bias`, the hidden features never leaving the cache.

    Shapes:
        x: (..., in). up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    return _operator(up, "ffn")(
        x,
        *up.parts,
        up_bias,
        *down.parts,
        down_bias,
        *(up.rows, down.rows, up.out_features, down.out_features, up.in_features),
        activation,
    )


def gated_ffn(x: Tensor, gate: Packed, up: Packed, down: Packed, activation: str = "gelu_tanh") -> Tensor:
    """Compute `(activation(x @ gate.T) * (x @ up.T)) @ down.T`, as gated T5 does.

    Shapes:
        x: (..., in). gate, up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    return _operator(up, "gated_ffn")(
        x,
        *gate.parts,
        None,
        *up.parts,
        None,
        *down.parts,
        None,
        *(gate.rows, up.rows, down.rows, up.out_features, down.out_features, up.in_features),
        activation,
    )


def attention(
    x: Tensor,
    qkv: Packed,
    bias: Tensor | None,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the self-attention of every head: `softmax(scale * q k^T + mask) v`, `q, k, v = x @ qkv.T + bias`.

    A query that may see no key gets zeros, as in torch.

    Args:
        qkv: the weights of queries, keys and values above each other.
        mask: bool, True = may be seen, or floats that are added to the scores.
        scale: one over the root of the size of a head by default.

    Shapes:
        x: (batch, length, in). mask: broadcast to (batch, 1, length, length). Result: (batch, length, out / 3).

    Raises:
        BackendError: as `linear`; or heads that do not divide the outputs, or a mask of another shape or type.

    Example:
        >>> from hf_sparse.kernels import pack_int8
        >>> x = torch.tensor([[[127.0, 1.0]]])
        >>> attention(x, pack_int8(torch.eye(2).repeat(3, 1)), None, heads=1)  # one token: its own value
        tensor([[[127.,   1.]]])
    """
    return _operator(qkv, "attention")(
        x,
        *(*qkv.parts, bias, mask, qkv.rows, qkv.out_features, qkv.in_features, heads),
        scale_of(scale, qkv.out_features // 3, heads),
    )


def ffn_norm(
    x: Tensor,
    up: Packed,
    up_bias: Tensor | None,
    down: Packed,
    down_bias: Tensor | None,
    norm: Norm,
    activation: str = "gelu",
) -> Tensor:
    """Compute `layer_norm(x + ffn(x, ...))`, the whole feed-forward sub-block of BERT.

    Shapes:
        x: (..., in). up: (hidden, in). down: (in, hidden). Weight and bias of the norm: (in,). Result: (..., in).

    Raises:
        BackendError: as `linear`; or a norm of another size or type.
    """
    return _operator(up, "ffn_norm")(
        x,
        *up.parts,
        up_bias,
        *down.parts,
        down_bias,
        *(*norm, up.rows, down.rows, up.out_features, up.in_features, activation),
    )


def attention_norm(
    x: Tensor,
    qkv: Packed,
    bias: Tensor | None,
    output: Packed,
    output_bias: Tensor | None,
    norm: Norm,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `layer_norm(x + attention(x, ...) @ output.T + output_bias)`, the whole attention sub-block of BERT.

    Shapes:
        x: (batch, length, in). output: (in, inner), where qkv is (3 * inner, in). Else as `attention`.
        Result: (batch, length, in).

    Raises:
        BackendError: as `attention`; or a norm of another size or type.
    """
    return _operator(qkv, "attention_norm")(
        x,
        *qkv.parts,
        bias,
        *output.parts,
        output_bias,
        *(*norm, mask, qkv.rows, output.rows, output.in_features, qkv.in_features, heads),
        scale_of(scale, output.in_features, heads),
    )
