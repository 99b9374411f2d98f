"""A weight as the blocks that are not zero (BCSR): packing, its inverse, and which blocks a weight was pruned in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import CheckpointError
from ...formats.codecs import codec_of, layout
from ...formats.codecs.base import as_bits, unpack_bits
from ...formats.codecs.block import Block
from ...formats.manifest import TensorEntry

SIDES = (16, 32, 64, 128)
"""Rows or columns of a block that the kernel takes: what a tensor core multiplies, and what fits into its registers."""

TRIED = (64, 32)
EMPTY = 0.4
"""Fraction of zero blocks below which the kernel is not tried."""


class Blocks(NamedTuple):
    """A weight as the blocks that are not zero.

    Attributes:
        values: `(blocks, rows, cols)`.
        columns: int32, which column of blocks each is in; ascending within a row of blocks.
        pointers: int32, `(rows of blocks + 1)`: where each row of blocks begins.
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor


def pack_blocks(weight: Tensor, rows: int = 32, cols: int = 32) -> Blocks:
    """Return the blocks of a weight that have a bit set, on its device.

    Where a side is not a multiple of the block, the weight is padded with zeros.

    Shapes: `(out, in)`.

    Example:
        >>> weight = torch.zeros(4, 4)
        >>> weight[2, 1] = 5.0
        >>> pack_blocks(weight, 2, 2).values.tolist(), pack_blocks(weight, 2, 2).pointers.tolist()
        ([[[0.0, 5.0], [0.0, 0.0]]], [0, 0, 1])
    """
    weight = weight.detach()
    out, into = weight.shape
    filled = F.pad(weight, (0, -into % cols, 0, -out % rows))
    blocks = filled.view(-1, rows, filled.shape[1] // cols, cols).transpose(1, 2).contiguous()
    kept = (as_bits(blocks) != 0).view(*blocks.shape[:2], -1).any(-1)
    return Blocks(blocks[kept], *_places(kept))


def _places(kept: Tensor) -> tuple[Tensor, Tensor]:
    columns = kept.nonzero()[:, 1].to(torch.int32)
    return columns, F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def unpack_blocks(blocks: Blocks, shape: tuple[int, int]) -> Tensor:
    """Return the weight, bit for bit what was packed.

    Args:
        shape: of the weight.
    """
    values, columns, pointers = blocks
    _, rows, cols = values.shape
    below, beside = len(pointers) - 1, -(-shape[1] // cols)
    filled = values.new_zeros((below, beside, rows, cols))
    filled[_rows(pointers, len(columns)), columns.long()] = values
    return filled.transpose(1, 2).reshape(below * rows, beside * cols)[: shape[0], : shape[1]].contiguous()


def _rows(pointers: Tensor, count: int) -> Tensor:
    lengths = (pointers[1:] - pointers[:-1]).long()
    return torch.arange(len(lengths), device=pointers.device).repeat_interleave(lengths, output_size=count)


def from_codec(entry: TensorEntry, parts: Mapping[str, Tensor]) -> Blocks | None:
    """Return a stored weight as blocks without making the dense one.

    Its checksum is of the dense tensor, and so is not verified here.

    Args:
        entry: of the manifest.
        parts: as stored, by suffix, on the CPU.

    Returns:
        None if it is not stored as blocks of the sides that the kernel takes.

    Raises:
        CheckpointError: if the parts contradict the entry.
    """
    codec = codec_of(entry)
    if not isinstance(codec, Block) or not {codec.rows, codec.cols} <= set(SIDES) or len(entry.shape) != 2:
        return None
    layout(entry)
    below, beside = codec.grid(entry.shape)
    kept = torch.from_numpy(unpack_bits(parts["_blocks"].numpy(), below * beside, "the block bitmap"))
    if int(kept.sum()) != entry.options["kept"]:
        raise CheckpointError(f"the bitmap keeps {int(kept.sum())} blocks, and there are {entry.options['kept']}")
    return Blocks(parts[""].view(-1, codec.rows, codec.cols), *_places(kept.view(below, beside)))


def block_side(weight: Tensor) -> int | None:
    """Return the side of the blocks in which a weight is pruned, if many of them are zero.

    Example:
        >>> weight = torch.zeros(128, 128)
        >>> weight[:32, :64] = 1.0
        >>> block_side(weight), block_side(torch.ones(64, 64))
        (64, None)
    """
    for side in TRIED:
        filled = F.pad(weight != 0, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
        blocks = filled.view(-1, side, filled.shape[1] // side, side).transpose(1, 2).flatten(2).any(2)
        if float((~blocks).float().mean()) >= EMPTY:
            return side
    return None
