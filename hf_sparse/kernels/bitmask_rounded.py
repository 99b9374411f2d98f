"""What `bitmask_int8` and `bitmask_int4` share: weights in bits whose values are rounded to the grid of a few columns.

Inputs are rounded to int8 as they come, with a scale for each `GROUP` columns, which is that of int8 weights too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from ..modeling.value_grid import GRIDS, NOTHING, ValueGrid
from .bitmask import WORD, Store, check_bits, ones, pack_rows
from .int8_layout import STEPS, refusal
from .library import library, why_not_built
from .native_bits import NativeBits
from .op_table import WeightFormat
from .operators import define_all, without_rows
from .registry import Kernel, Layout, register

GROUP = GRIDS[8].group
"""Columns of inputs that share a scale."""

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


def pack_rounded(
    weight: Tensor, grid: ValueGrid, dtype: torch.dtype, store: Store | None = None, whole_above: float | None = None
) -> Parts:
    """Return the parts of a weight that is rounded to a grid; scales in float32.

    Args:
        dtype: of the values.
        store, whole_above: see `pack_rows`.
    """
    words = words_of(weight.shape[1])
    scales = [torch.zeros(0, words * WORD // grid.group)]

    def convert(rows: Tensor) -> Tensor:
        grouped = grid.grouped(F.pad(rows, (0, words * WORD - rows.shape[1])))
        each = grid.scales(grouped)
        scales.append(each.squeeze(-1))
        return grid.steps_of(grouped, each).flatten(1)  # what rounds to zero is not stored

    values, bits, pointers = pack_rows(weight, dtype, words, convert, store, whole_above)
    return values, bits, pointers, torch.cat(scales)


def words_of(in_features: int) -> int:
    """Return the words of bits of a row, of whole groups of inputs."""
    return -(-in_features // GROUP) * GROUP // WORD


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


def register_rounded(
    name: str,
    grid: ValueGrid,
    dtypes: Sequence[torch.dtype],
    pack: Callable[[Tensor], Parts],
    unpack: Callable[..., Tensor],
    lm_head: str | None = None,
    sizes: Callable[[Tensor], Tensor] = ones,
) -> Callable[..., Tensor]:
    """Define the operators of a kernel of rounded values, register it, and return the one of a layer.

    Args:
        dtypes: of its parts.
        pack: weight -> parts.
        unpack: (*parts, out_features, in_features) -> the dense weight after rounding, in float32.
        lm_head: see `Kernel`.
        sizes: see `check_bits`.
    """
    module = name.replace("-", "_")
    native = NativeBits(f"hf_sparse_{module}", RoundedStructure, lambda: library())

    def check(weight: RoundedWeight) -> None:
        check_parts(weight, grid, dtypes, f"hf_sparse.kernels.{module}.pack")

    def product(x: Tensor, weight: RoundedWeight) -> Tensor:
        if (found := native(x, weight)) is not None:
            return found
        values, bits, pointers, scales, bias, out_features, in_features = weight
        return matmul(x, unpack(values, bits, pointers, scales, out_features, in_features).to(x), bias)

    def unpack_parts(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
        return unpack(*parts, out_features, in_features)

    def check_file(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> None:
        check_bits(parts, in_features, words_of(in_features), sizes)

    linear: Any = define_all(WeightFormat(module, RoundedWeight, product, check, native.of_known))["linear"]
    register(
        Kernel(
            name=name,
            layout=Layout(
                ("values", "bits", "pointers", "scales"),
                lambda weight, rows: pack(weight),
                unpack_parts,
                check=check_file,
            ),
            op=without_rows(linear),
            reference=matmul,
            isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
            guard=refusal,
            unavailable=why_not_built,
            error=grid.error,
            few_tokens=True,
            joins=lambda weights: True,  # an output is that of its own row
            lm_head=lm_head,
        )
    )
    return linear
