"""The sparse operators on int8 weights (`int8_linear`, `int8_ffn`, ...); `functional` has functions that call them.

They are those of fp32_ops with weights in int8. What a matmul is given is rounded as it comes: each token to steps of
its largest feature / 127. So are the input, the output of the heads, the hidden features. Sums are exact in int32;
queries, keys, values, scores and the layer norm are in fp32. A token with an infinity or NaN comes out as NaN.
The C++ runs on AVX-512 with VNNI, on AVX2 and on 64-bit ARM with the dot product, and rounds and sums to the same bits
on each; everything else is computed in plain torch, from the same rounded numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import attention, attention_norm, ffn_norm, linear
from .int8_layout import NOTHING, STEPS, check_int8, dense_int8, pack_int8, refusal
from .library import NativeOps, library, library_status
from .op_table import FusedFormat
from .operators import define_all
from .registry import Kernel, Layout, register
from .types import Int8Weight

NEEDED = "AVX2, or 64-bit ARM with the dot product"
"""Of a processor, for the C++."""

MANY, SHORT = 3, 20
"""So many sequences of less than so many tokens are faster as single matmuls, where they share tiles."""

int8_linear, int8_attention = linear, attention
int8_ffn_norm, int8_attention_norm = ffn_norm, attention_norm
"""The names of before: a function of `functional` takes a weight of either format."""


def why_not_int8() -> str | None:
    """Return why the C++ int8 kernels cannot run here; None if they can."""
    if native() is not None:
        return None
    status = library_status()
    lacks = f"the int8 kernels need {NEEDED}, and these do not have it here"
    return f"{status.message}; {lacks}" if status.available else status.message


def native() -> NativeOps | None:
    """Return the C++ int8 kernels, or None where there are none, or this processor cannot run them."""
    loaded = library()
    return None if loaded is None else loaded.int8


def int8_matmul(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `round(x) @ matrix.T + bias`, each token rounded to steps of its largest feature / 127.

    Args:
        matrix: the dense weight after rounding, as `unpack_int8` gives it.

    Shapes: `(..., in)` -> `(..., out)`
    """
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    empty = largest < NOTHING
    steps = torch.where(empty, 0.0, STEPS / largest) * x
    size = torch.where(empty, 0.0, torch.where(largest.isfinite(), largest / STEPS, torch.nan))
    y = F.linear(steps.round(), matrix) * size
    return y if bias is None else y + bias.to(x.dtype)


def _loaded() -> NativeOps | None:
    return native()


def _check(weight: Int8Weight) -> None:
    values, columns, pointers, scales, offsets, _, rows, out_features, in_features = weight
    check_int8((values, columns, pointers, scales, offsets), rows, out_features, in_features)


def _fuses_heads(batch: int, length: int, rows: int) -> bool:
    return batch < MANY or length >= SHORT


def _matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    values, columns, pointers, scales, _, bias, rows, out_features, in_features = weight
    matrix = dense_int8(values, columns, pointers, scales, rows, out_features, in_features).to(x.dtype)
    return int8_matmul(x, matrix, bias)


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return pack_int8(weight, rows).parts


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, columns, pointers, scales, _ = parts
    return dense_int8(values, columns, pointers, scales, rows, out_features, in_features)


INT8 = FusedFormat(*("int8", Int8Weight, _matmul, _check), loaded=_loaded, fuses_heads=_fuses_heads)
OPERATORS = define_all(INT8)

register(
    Kernel(
        name="int8",
        backend="cpu-int8",
        layout=Layout(("values", "columns", "pointers", "scales", "offsets"), _pack, _unpack),
        op=OPERATORS["linear"],
        reference=int8_matmul,
        fused=OPERATORS,
        isas=("avx512vnni", "avx2", "neon"),
        guard=refusal,
        unavailable=why_not_int8,
        heights={1: 1.0, 2: 0.68, 4: 0.6},
        error=0.5 / STEPS,
    )
)
