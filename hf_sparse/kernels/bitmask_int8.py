"""The operator `hf_sparse::bitmask_int8_linear`: a bit for each entry of a weight, and its nonzero values in int8.

For models that generate, and not exact: 5.25 bits an entry at 50 % of zeros. Weights and inputs are rounded to steps of
the largest of each `GROUP` columns / 127, so that one large number costs its neighbors their digits and no others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from ..modeling.value_grid import GRIDS, NOTHING, ValueGrid
from .bitmask import WORD, Store, bound_function, call, is_native, pack_rows, unpack_rows
from .int8_layout import STEPS, refusal
from .library import Library, library, why_not_built
from .op_table import WeightFormat
from .operators import define_all, without_rows
from .registry import Kernel, Layout, register

GRID = GRIDS[8]
GROUP = GRID.group
"""Columns that share a scale, of weights and of inputs."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class RoundedStructure(ctypes.Structure):
    """`BitmaskInt8` and `BitmaskInt4` of csrc/kernels.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("values", "bits", "pointers", "scales", "bias")],
        ("count", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("out_features", "in_features")],
    )


class RoundedWeight(NamedTuple):
    """A weight with its bias, as the operators of rounded values pass it on; see `pack`."""

    values: Tensor
    bits: Tensor
    pointers: Tensor
    scales: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last dimension of inputs to steps, group by group.

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
    return pack_rounded(weight, GRID, torch.int8)


def pack_rounded(weight: Tensor, grid: ValueGrid, dtype: torch.dtype, store: Store | None = None) -> Parts:
    """Return the parts of a weight that is rounded to a grid; scales in float32.

    Args:
        dtype: of the values.
        store: see `pack_rows`.
    """
    words = words_of(weight.shape[1])
    scales = [torch.zeros(0, words * WORD // grid.group)]

    def convert(rows: Tensor) -> Tensor:
        grouped = grid.grouped(F.pad(rows, (0, words * WORD - rows.shape[1])))
        each = grid.scales(grouped)
        scales.append(each.squeeze(-1))
        return grid.steps_of(grouped, each).flatten(1)  # what rounds to zero is not stored

    values, bits, pointers = pack_rows(weight, dtype, words, convert, store)
    return values, bits, pointers, torch.cat(scales)


def words_of(in_features: int) -> int:
    """Return the words of bits of a row, of whole groups of inputs."""
    return -(-in_features // GROUP) * GROUP // WORD


def unpack(
    values: Tensor, bits: Tensor, pointers: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return the dense weight after rounding, in float32."""
    steps = unpack_rows(values, bits, pointers, bits.shape[1] * WORD)
    return scaled(steps, scales, GROUP, in_features)


def scaled(steps: Tensor, scales: Tensor, group: int, in_features: int) -> Tensor:
    """Return steps times their scales, without the columns that fill up the last group."""
    if not steps.numel():
        return steps[:, :in_features]
    return (steps.unflatten(1, (-1, group)) * scales[..., None]).flatten(1)[:, :in_features].contiguous()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `round(x) @ weight.T + bias`.

    Args:
        weight: after rounding, as `unpack` gives it.
    """
    steps, scales = rounded(x)
    y = F.linear((steps * scales).flatten(-2)[..., : x.shape[-1]], weight)
    return y if bias is None else y + bias.to(x.dtype)


def check_parts(weight: RoundedWeight, grid: ValueGrid, dtypes: Sequence[torch.dtype], maker: str) -> None:
    """Refuse parts whose shapes or types are not those of a weight that `maker` packs."""
    values, bits, pointers, scales, _, out_features, in_features = weight
    shapes = [tuple(part.shape) for part in (bits, pointers, scales)]
    words = words_of(in_features)
    fits = shapes == [(out_features, words), (out_features + 1,), (out_features, words * WORD // grid.group)]
    found = [part.dtype for part in (values, bits, pointers, scales)]
    if values.dim() != 1 or not fits or found != list(dtypes):
        raise BackendError(
            f"values, bits, pointers and scales of shapes {tuple(values.shape)}, {shapes} ({found}) do not form a "
            f"weight of {out_features} x {in_features} as {maker} makes it"
        )


def _check(weight: RoundedWeight) -> None:
    dtypes = (torch.int8, torch.int64, torch.int32, torch.float32)
    check_parts(weight, GRID, dtypes, "hf_sparse.kernels.bitmask_int8.pack")


def native_matmul(loaded: Library | None, name: str, x: Tensor, weight: RoundedWeight) -> Tensor | None:
    """Return what the C function of this name computes, or None where it cannot."""
    values, bits, pointers, scales, bias, out_features, in_features = weight
    if loaded is None or not is_native(x, values, bits, pointers, scales, bias):
        return None
    values, bits, pointers, scales = values.contiguous(), bits.contiguous(), pointers.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    structure = RoundedStructure(
        *(values.data_ptr(), bits.data_ptr(), pointers.data_ptr(), scales.data_ptr()),
        *(None if bias is None else bias.data_ptr(), values.numel(), out_features, in_features),
    )
    return call(bound_function(loaded, name, RoundedStructure), structure, x, out_features)


def _matmul(x: Tensor, weight: RoundedWeight) -> Tensor:
    native = native_matmul(library(), "hf_sparse_bitmask_int8", x, weight)
    if native is not None:
        return native
    values, bits, pointers, scales, bias, out_features, in_features = weight
    return matmul(x, unpack(values, bits, pointers, scales, out_features, in_features).to(x), bias)


bitmask_int8_linear = define_all(WeightFormat("bitmask_int8", RoundedWeight, _matmul, _check))["linear"]


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
        error=GRID.error,
        few_tokens=True,
    )
)
