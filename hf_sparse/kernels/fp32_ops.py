"""The sparse operators on fp32 weights (`sparse_linear`, `sparse_ffn`, ...), and functions that call them.

`sparse_ffn_norm` and `sparse_attention_norm` are whole sub-blocks of BERT: with the inputs added and the layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .fp32_layout import PackedWeight, check_layout, dense, pack, unpack
from .library import NativeOps, library, why_not_built
from .operators import WeightFormat, define_all
from .reference import csr_matmul
from .registry import Kernel, Layout, register
from .types import Norm, Weight
from .validation import scale_of

SHORTEST = 16
"""Tokens from which the C++ attention and layer norm are used: they work on tiles of as many, one for each thread."""

SPARSE_FROM = 0.85
"""Fraction of zeros from which the reference uses torch's CSR matmul on a CPU: it beats the dense one there."""

_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> version, weight; gone with the values


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Compute `activation(x @ weight.T + bias)`.

    Shapes:
        x: (..., in). bias: (out,). Result: (..., out).

    Raises:
        BackendError: shapes or types that do not fit, an unknown activation, or an input that needs a gradient.
    """
    out: Tensor = torch.ops.hf_sparse.sparse_linear(
        x,
        *weight.parts,
        bias,
        weight.rows,
        weight.out_features,
        weight.in_features,
        activation,
    )
    return out


def ffn(
    x: Tensor,
    up: PackedWeight,
    up_bias: Tensor | None,
    down: PackedWeight,
    down_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Compute `activation(x @ up.T + up_bias) @ down.T + down_bias`, the hidden features never leaving the cache.

    Shapes:
        x: (..., in). up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    out: Tensor = torch.ops.hf_sparse.sparse_ffn(
        x,
        *up.parts,
        up_bias,
        *down.parts,
        down_bias,
        *(up.rows, down.rows, up.out_features, down.out_features, up.in_features),
        activation,
    )
    return out


def gated_ffn(
    x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, activation: str = "gelu_tanh"
) -> Tensor:
    """Compute `(activation(x @ gate.T) * (x @ up.T)) @ down.T`, as gated T5 does.

    Shapes:
        x: (..., in). gate, up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    out: Tensor = torch.ops.hf_sparse.sparse_gated_ffn(
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
    return out


def attention(
    x: Tensor,
    qkv: PackedWeight,
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
    """
    out: Tensor = torch.ops.hf_sparse.sparse_attention(
        x,
        *(*qkv.parts, bias, mask, qkv.rows, qkv.out_features, qkv.in_features, heads),
        scale_of(scale, qkv.out_features // 3, heads),
    )
    return out


def ffn_norm(
    x: Tensor,
    up: PackedWeight,
    up_bias: Tensor | None,
    down: PackedWeight,
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
    out: Tensor = torch.ops.hf_sparse.sparse_ffn_norm(
        x,
        *up.parts,
        up_bias,
        *down.parts,
        down_bias,
        *(*norm, up.rows, down.rows, up.out_features, up.in_features, activation),
    )
    return out


def attention_norm(
    x: Tensor,
    qkv: PackedWeight,
    bias: Tensor | None,
    output: PackedWeight,
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
    out: Tensor = torch.ops.hf_sparse.sparse_attention_norm(
        x,
        *qkv.parts,
        bias,
        *output.parts,
        output_bias,
        *(*norm, mask, qkv.rows, output.rows, output.in_features, qkv.in_features, heads),
        scale_of(scale, output.in_features, heads),
    )
    return out


def _native(x: Tensor, weights: Sequence[Weight]) -> NativeOps | None:
    """Return the C++ kernels if they take these: fp32 on the CPU."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return None
    for values, columns, pointers, bias, _, _, _ in weights:
        if not (values.is_cpu and columns.is_cpu and pointers.is_cpu and (bias is None or bias.is_cpu)):
            return None
    loaded = library()
    return None if loaded is None else loaded.fp32


def _check(weight: Weight) -> None:
    values, columns, pointers, _, rows, out_features, in_features = weight
    check_layout(values, columns, pointers, rows, out_features, in_features, "the weight of a sparse operator")


def _fuses_norm(tokens: int, threads: int) -> bool:
    return tokens >= SHORTEST * threads


def _fuses_heads(batch: int, length: int, weight: Weight) -> bool:
    # Several short sequences fill the tiles of one matmul better than tiles of their own; taller blocks do not mind.
    return length >= SHORTEST and not (batch > 2 and length < 2 * SHORTEST and weight.rows < 4)


def _matmul(x: Tensor, weight: Weight) -> Tensor:
    matrix, bias = _unpack(weight).to(x.dtype), weight.bias
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, matrix, bias) if matrix.layout == torch.strided else csr_matmul(x, matrix, bias)


def _unpack(weight: Weight) -> Tensor:
    """Return the CSR or the dense weight, made once for as long as the packed values live and do not change."""
    values, columns, pointers, _, rows, out_features, in_features = weight
    version = None if values.is_inference() else (values._version, columns._version, pointers._version)
    cached = _unpacked.get(values)
    if (
        cached is not None
        and version is not None
        and cached[0] == version
        and cached[1].shape == (out_features, in_features)
    ):
        matrix: Tensor = cached[1]
        return matrix
    matrix = dense(values, columns, pointers, rows, out_features, in_features)
    filled = matrix.count_nonzero() if matrix.is_cpu and matrix.numel() else matrix.numel()
    if filled < (1 - SPARSE_FROM) * matrix.numel():
        matrix = matrix.to_sparse_csr()
    _unpacked[values] = (version, matrix)
    return matrix


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return pack(weight, rows).parts


def _unpack_parts(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, columns, pointers = parts
    return unpack(PackedWeight(values, columns, pointers, rows, out_features, in_features))


FP32 = WeightFormat("sparse", Weight, _check, _native, _matmul, _fuses_norm, _fuses_heads)
OPERATORS = define_all(FP32)

register(
    Kernel(
        name="cpu",
        label="sparse",
        layout=Layout(("values", "columns", "pointers"), _pack, _unpack_parts),
        op=OPERATORS["linear"],
        fused=OPERATORS,
        isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
        unavailable=why_not_built,
        heights={1: 1.0, 2: 0.77, 4: 0.7, 8: 0.69, 16: 0.69},
    )
)

library()  # now: a process that forks later is then known to have done so
