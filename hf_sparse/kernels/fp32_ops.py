"""The sparse operators on fp32 weights (`sparse_linear`, `sparse_ffn`, ...); `functional` has functions that call them.

`sparse_ffn_norm` and `sparse_attention_norm` are whole sub-blocks of BERT: with the inputs added and the layer norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .fp32_layout import PackedWeight, check_layout, dense, pack, unpack
from .functional import attention, attention_norm, ffn, ffn_norm, gated_ffn, linear
from .library import NativeOps, library, why_not_built
from .op_table import FusedFormat
from .operators import define_all
from .reference import csr_matmul
from .registry import Kernel, Layout, register
from .types import Weight

__all__ = ["FP32", "OPERATORS", "attention", "attention_norm", "ffn", "ffn_norm", "gated_ffn", "linear"]

MANY, SHORT = 3, 32
"""So many sequences of less than so many tokens share the tiles of one matmul, in blocks of less than 4 rows."""

SPARSE_FROM = 0.85
"""Fraction of zeros from which the reference uses torch's CSR matmul on a CPU: it beats the dense one there."""

_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> version, weight; gone with the values


def _loaded() -> NativeOps | None:
    loaded = library()
    return None if loaded is None else loaded.fp32


def _check(weight: Weight) -> None:
    values, columns, pointers, _, rows, out_features, in_features = weight
    check_layout(values, columns, pointers, rows, out_features, in_features, "the weight of a sparse operator")


def _fuses_heads(batch: int, length: int, rows: int) -> bool:
    return batch < MANY or length >= SHORT or rows >= 4


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


def _checked(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> PackedWeight:
    values, columns, pointers = parts
    return PackedWeight(values, columns, pointers, rows, out_features, in_features)


def _unpack_parts(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    return unpack(_checked(parts, rows, out_features, in_features))


FP32 = FusedFormat(*("sparse", Weight, _matmul, _check), loaded=_loaded, fuses_heads=_fuses_heads)
OPERATORS = define_all(FP32)

register(
    Kernel(
        name="cpu",
        label="sparse",
        layout=Layout(("values", "columns", "pointers"), _pack, _unpack_parts, check=_checked),
        op=OPERATORS["linear"],
        fused=OPERATORS,
        isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
        unavailable=why_not_built,
        heights={1: 1.0, 2: 0.77, 4: 0.7, 8: 0.69, 16: 0.69},
    )
)

library()  # now: a process that forks later is then known to have done so
