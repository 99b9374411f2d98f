"""The operator `hf_sparse::bitmask_int8_linear`: a bit for each entry of a weight, and its nonzero values in int8.

For models that generate, and not exact: 5.25 bits an entry at 50 % of zeros, but with AVX2 alone (`WHOLE_ABOVE`).
Weights and inputs are rounded to steps of the largest of each `GROUP` columns / 127, so that one large number costs its
neighbors their digits and no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.value_grid import GRIDS
from .bitmask import WORD, unpack_rows
from .bitmask_rounded import GROUP, Parts, pack_rounded, register_rounded, scaled
from .library import library_status

GRID = GRIDS[8]

WHOLE_ABOVE = dict.fromkeys(("avx512", "avx2"), 0.38)
"""Share of nonzeros above which rows are stored with their zeros, by instruction set.

Where no instruction spreads bytes over their places, the tables that do it take longer than memory takes for the zeros:
see the rows for `bitmask-int8` of `scripts/benchmarks/bench_one_token.py`.
"""


def pack(weight: Tensor) -> Parts:
    """Return the values, the bits, the row pointers and the scales of a weight.

    Shapes:
        weight: (out, in). values: (stored entries + in + slack,), int8; see `bitmask.pack`.
        bits: (out, words), int64, words of whole groups. pointers: (out + 1,), int32. scales: (out, groups), float32.

    Raises:
        BackendError: more nonzeros than int32 can count.

    Example:
        >>> values, bits, pointers, scales = pack(torch.tensor([[0.0, 1.27, 0.0, 0.0, 0.01, 0.0]]))
        >>> values[:2].tolist(), bits.tolist(), pointers.tolist(), round(scales.item(), 3)
        ([127, 1], [[18, 0]], [0, 2], 0.01)
    """
    return pack_rounded(weight, GRID, torch.int8, whole_above=WHOLE_ABOVE.get(library_status().isa or ""))


def unpack(
    values: Tensor, bits: Tensor, pointers: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return the dense weight after rounding, in float32."""
    steps = unpack_rows(values, bits, pointers, bits.shape[1] * WORD)
    return scaled(steps, scales, GROUP, in_features)


DTYPES = (torch.int8, torch.int64, torch.int32, torch.float32)

bitmask_int8_linear = register_rounded("bitmask-int8", GRID, DTYPES, pack, unpack)
