"""The operator `hf_sparse::bitmask_int4_linear`: a bit for each entry of a weight, and its nonzero values in 4 bits.

For models that generate, and not exact: 3.3 bits an entry at 50 % of zeros. Since a zero has its bit and no value, the
16 values are 8 steps to either side. Each 64 columns of an output have a scale, in bfloat16; inputs are rounded to
int8, as in `bitmask_int8`. Weights that `{"name": "sparsegpt", "bits": 4}` made are on this grid, and lose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.value_grid import GRIDS
from .bitmask import WORD, from_words, ones, row_blocks
from .bitmask_rounded import Parts, pack_rounded, register_rounded, scaled

GRID = GRIDS[4]

CODES = torch.tensor([*range(-GRID.steps, 0), *range(1, GRID.steps + 1)], dtype=torch.float32)
"""The steps that the 16 values stand for."""


def pack(weight: Tensor) -> Parts:
    """Return the values, the bits, the row pointers and the scales of a weight.

    Shapes:
        weight: (out, in). values: (bytes + in + slack,), uint8, two values a byte, the first in the lower half; those
        of each word of 64 columns begin with a byte. bits: (out, words), int64, words of whole groups of inputs.
        pointers: (out + 1,), int32, in bytes. scales: (out, words), bfloat16.

    Raises:
        BackendError: more bytes than int32 can count.

    Example:
        >>> values, bits, pointers, scales = pack(torch.tensor([[0.0, 0.5, -0.125, 0.0625]]))
        >>> [hex(two) for two in values[:2].tolist()], bits.tolist(), pointers.tolist(), scales.tolist()
        (['0x6f', '0x8'], [[14, 0]], [0, 2], [[0.0625, 0.0]])
    """
    values, bits, pointers, scales = pack_rounded(weight, GRID, torch.uint8, _store)
    return values, bits, pointers, scales.to(torch.bfloat16)


def _places(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the byte of each entry, whether it is in the upper half, and the bytes of each row.

    Shapes: (rows, columns), bool -> twice (stored entries,); (rows,).
    """
    words = kept.unflatten(1, (-1, WORD)) if kept.numel() else kept.view(len(kept), 0, WORD)
    place = words.cumsum(-1) - 1
    sizes = (words.sum(-1) + 1) // 2
    first = sizes.flatten().cumsum(0).view(sizes.shape) - sizes
    return (first[..., None] + place // 2)[words], (place % 2)[words], sizes.sum(1)


def _store(steps: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    byte, upper, sizes = _places(kept)
    found = steps[kept].to(torch.int64)
    codes = torch.where(found < 0, found + GRID.steps, found + GRID.steps - 1)
    values = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
    return values.index_add_(0, byte, (codes << 4 * upper).to(torch.uint8)), sizes


def unpack(
    values: Tensor, bits: Tensor, pointers: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Return the dense weight after rounding, in float32."""
    width = bits.shape[1] * WORD
    steps = torch.zeros(out_features, width)
    for part in row_blocks(out_features, width):
        kept = from_words(bits[part], width)
        byte, upper, _ = _places(kept)
        codes = values[byte + int(pointers[part.start])].long() >> 4 * upper & 15
        steps[part] = steps[part].masked_scatter(kept, CODES[codes])
    return scaled(steps, scales.float(), GRID.group, in_features)


DTYPES = (torch.uint8, torch.int64, torch.int32, torch.bfloat16)

bitmask_int4_linear = register_rounded(
    "bitmask-int4", GRID, DTYPES, pack, unpack, lm_head="bitmask-int8", sizes=lambda bits: (ones(bits) + 1) // 2
)
