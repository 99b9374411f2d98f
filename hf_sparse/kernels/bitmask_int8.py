"""The operator `hf_sparse::bitmask_int8_linear`: a bit for each entry of a weight, and its nonzero values in int8.

For models that generate, and not exact: 5.25 bits an entry at 50 % of zeros. Weights and inputs are rounded to steps of
the largest of each `GROUP` columns / 127, so that one large number costs its neighbors their digits and no others.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from .bitmask import WORD, bound_function, call, is_native, pack_rows, unpack_rows
from .int8_layout import NOTHING, STEPS, refusal
from .library import library, why_not_built
from .op_table import WeightFormat
from .operators import define_all, without_rows
from .registry import Kernel, Layout, register

GROUP = 128
"""Columns that share a scale."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class _BitmaskInt8(ctypes.Structure):
    """`BitmaskInt8` of csrc/kernels.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("values", "bits", "pointers", "scales", "bias")],
        ("count", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("out_features", "in_features")],
    )


class BitmaskInt8Weight(NamedTuple):
    """A weight with its bias, as the operator passes it on; see `pack`."""

    values: Tensor
    bits: Tensor
    pointers: Tensor
    scales: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last dimension to steps, group by group.

    Shapes:
        x: (..., features). Returns the steps, (..., groups, `GROUP`), and what a step is worth, (..., groups, 1).

    Example:
        >>> steps, scales = rounded(torch.tensor([1.27, 0.006]))
        >>> steps[0, :3].tolist(), round(scales.item(), 3)
        ([127.0, 1.0, 0.0], 0.01)
    """
    groups = -(-x.shape[-1] // GROUP)
    grouped = F.pad(x, (0, groups * GROUP - x.shape[-1])).unflatten(-1, (groups, GROUP))
    largest = grouped.abs().amax(-1, keepdim=True) if groups else grouped.new_zeros((*grouped.shape[:-1], 1))
    inverse = torch.where(largest < NOTHING, 0.0, STEPS / largest)
    scales = torch.where(largest.isfinite(), largest / STEPS, torch.nan)
    return (grouped * inverse).round(), scales


def pack(weight: Tensor) -> Parts:
    """Return the values, the bits, the row pointers and the scales of a weight.

    Shapes:
        weight: (out, in). values: (nonzeros + in + slack,), int8. bits: (out, words), int64, words of whole groups.
        pointers: (out + 1,), int32. scales: (out, groups), float32.

    Raises:
        BackendError: more nonzeros than int32 can count.

    Example:
        >>> values, bits, pointers, scales = pack(torch.tensor([[0.0, 1.27, 0.01]]))
        >>> values[:2].tolist(), bits.tolist(), pointers.tolist(), round(scales.item(), 3)
        ([127, 1], [[6, 0]], [0, 2], 0.01)
    """
    scales: list[Tensor] = []

    def convert(rows: Tensor) -> Tensor:
        steps, each = rounded(rows)
        scales.append(each.squeeze(-1))
        return steps.flatten(1)  # what rounds to zero is not stored

    groups = -(-weight.shape[1] // GROUP)
    values, bits, pointers = pack_rows(weight, torch.int8, groups * GROUP // WORD, convert)
    return values, bits, pointers, torch.cat([torch.zeros(0, groups), *scales])


def unpack(
    values: Tensor, bits: Tensor, pointers: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return the dense weight after rounding, in float32."""
    width = bits.shape[1] * WORD
    steps = unpack_rows(values, bits, pointers, width)
    weight = steps.view(out_features, -1, GROUP) * scales[..., None] if width else steps
    return weight.view(out_features, width)[:, :in_features].contiguous()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `round(x) @ weight.T + bias`.

    Args:
        weight: after rounding, as `unpack` gives it.
    """
    steps, scales = rounded(x)
    y = F.linear((steps * scales).flatten(-2)[..., : x.shape[-1]], weight)
    return y if bias is None else y + bias.to(x.dtype)


def _check(weight: BitmaskInt8Weight) -> None:
    values, bits, pointers, scales, _, out_features, in_features = weight
    groups = -(-in_features // GROUP)
    shapes = [tuple(part.shape) for part in (bits, pointers, scales)]
    fits = shapes == [(out_features, groups * GROUP // WORD), (out_features + 1,), (out_features, groups)]
    dtypes = [part.dtype for part in (values, bits, pointers, scales)]
    if values.dim() != 1 or not fits or dtypes != [torch.int8, torch.int64, torch.int32, torch.float32]:
        raise BackendError(
            f"values, bits, pointers and scales of shapes {tuple(values.shape)}, {shapes} ({dtypes}) do not form a "
            f"weight of {out_features} x {in_features} as hf_sparse.kernels.bitmask_int8.pack makes it"
        )


def _matmul(x: Tensor, weight: BitmaskInt8Weight) -> Tensor:
    values, bits, pointers, scales, bias, out_features, in_features = weight
    loaded = library()
    if loaded is None or not is_native(x, values, bits, pointers, scales, bias):
        return matmul(x, unpack(values, bits, pointers, scales, out_features, in_features).to(x), bias)
    values, bits, pointers, scales = values.contiguous(), bits.contiguous(), pointers.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    structure = _BitmaskInt8(
        *(values.data_ptr(), bits.data_ptr(), pointers.data_ptr(), scales.data_ptr()),
        *(None if bias is None else bias.data_ptr(), values.numel(), out_features, in_features),
    )
    return call(bound_function(loaded, "hf_sparse_bitmask_int8", _BitmaskInt8), structure, x, out_features)


bitmask_int8_linear = define_all(WeightFormat("bitmask_int8", BitmaskInt8Weight, _matmul, _check))["linear"]


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, bits, pointers, scales = parts
    return unpack(values, bits, pointers, scales, out_features, in_features)


register(
    Kernel(
        name="bitmask-int8",
        layout=Layout(("values", "bits", "pointers", "scales"), lambda weight, rows: pack(weight), _unpack),
        op=without_rows(bitmask_int8_linear),
        reference=matmul,
        isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
        guard=refusal,
        unavailable=why_not_built,
        error=0.5 / STEPS,
        few_tokens=True,
    )
)
