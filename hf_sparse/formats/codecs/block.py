"""Block: one bit for each block of rows x cols, and the blocks that are not zero, whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import CheckpointError
from ...utils.validation import check_positive_int
from ..manifest import TensorEntry
from .base import CODECS, TORCH_DTYPES, Array, Codec, Part, Source, as_bits, pack_bits, unpack_bits

_COMMON = ((4, 1), (16, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))


@dataclass(frozen=True)
class Blocked(Codec):
    """The geometry of a tensor cut into blocks; rows are its first dimension, columns all the others.

    A tensor whose sides are not multiples of the block is padded with zeros below and to the right. Blocks are
    counted from left to right, then from top to bottom, and so are the elements within one.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        check_positive_int("rows", self.rows)
        check_positive_int("cols", self.cols)

    @property
    def size(self) -> int:
        """Elements in a block."""
        return self.rows * self.cols

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the tensor is at least as large as one block."""
        return self.rows <= shape[0] and self.cols <= math.prod(shape[1:])

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many blocks lie below and beside each other."""
        return -(-shape[0] // self.rows), -(-math.prod(shape[1:]) // self.cols)

    def _padded(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        (below, beside), (height, width) = self.grid(shape), (shape[0], math.prod(shape[1:]))
        missing = (0, beside * self.cols - width, 0, below * self.rows - height)
        return F.pad(flat.view(height, width), missing) if any(missing) else flat.view(height, width)

    def kept(self, flat: Array, shape: tuple[int, ...]) -> Array:
        """Return which blocks have a flag among theirs."""
        below, beside = self.grid(shape)
        flags = self._padded(torch.from_numpy(flat), shape).numpy()
        # Rows first: that is one pass over whole lines of memory, and leaves little for the short sums over columns.
        lines = np.logical_or.reduce(flags.reshape(below, self.rows, beside * self.cols), axis=1)
        return np.logical_or.reduce(lines.reshape(below * beside, self.cols), axis=1)

    def take(self, source: Source, index: Array) -> Tensor:
        """Return the elements of blocks one after the other, in the type of the tensor."""
        if self.size == 1:
            return source.values(index)
        below, beside = self.grid(source.shape)
        blocks = self._padded(source.bits, source.shape).view(below, self.rows, beside, self.cols).transpose(1, 2)
        values = blocks.reshape(below * beside, self.size).index_select(0, torch.from_numpy(index))
        return values.view(-1).view(TORCH_DTYPES[source.dtype])

    def place(self, values: Tensor, index: Array, shape: tuple[int, ...]) -> Tensor:
        """Return the bits of a tensor that is zero but for these blocks, flat."""
        below, beside = self.grid(shape)
        blocks = torch.zeros(below * beside, self.size, dtype=values.dtype)
        blocks.index_copy_(0, torch.from_numpy(index), values.view(-1, self.size))
        padded = blocks.view(below, beside, self.rows, self.cols).transpose(1, 2)
        padded = padded.reshape(below * self.rows, beside * self.cols)
        return padded[: shape[0], : math.prod(shape[1:])].reshape(-1)


def block_shape(source: Source) -> tuple[int, int] | None:
    """Return the largest common block that a slab from the middle of the tensor is made of, or None."""
    height, width = source.shape[0], math.prod(source.shape[1:])
    top = height // 2 // 64 * 64
    slab = source.kept[top * width : (top + 64) * width]
    flags, shape, found = np.count_nonzero(slab), (min(64, height - top), width), None
    for rows, cols in _COMMON:
        block = Blocked(rows, cols)
        if block.fits(shape) and np.count_nonzero(block.kept(slab, shape)) * block.size <= 1.02 * flags:
            found = (rows, cols)
        elif found is None:
            break  # all others are made of the first
    return found


@CODECS.register("block")
@dataclass(frozen=True)
class Block(Blocked):
    """Store the `kept` blocks that are not zero, and a bitmask of all blocks."""

    rows: int = 32
    cols: int = 32

    suffixes = ("_blocks",)
    facts = ("kept",)

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        shape = source.once(block_shape)
        return (cls(*shape),) if shape else ()

    def _flags(self, source: Source) -> Array:
        return self.kept(source.kept, source.shape)

    def stored_bytes(self, source: Source) -> int | None:
        if not self.fits(source.shape):
            return None
        flags = source.once(self._flags)
        return int(np.count_nonzero(flags)) * self.size * source.item_bytes + -(-len(flags) // 8)

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        if not self.fits(entry.shape):
            raise CheckpointError(f"blocks of {self.rows} x {self.cols} do not fit into shape {entry.shape}")
        count, kept = math.prod(self.grid(entry.shape)), entry.options["kept"]
        if kept > count or not kept <= entry.nonzeros <= kept * self.size:
            raise CheckpointError(f"{kept} of {count} blocks of {self.size} cannot hold {entry.nonzeros} nonzeros")
        return {"": Part(entry.dtype, (kept * self.size,)), "_blocks": Part("U8", (-(-count // 8),))}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        flags = source.once(self._flags)
        index = np.flatnonzero(flags)
        return {"kept": len(index)}, {"": self.take(source, index), "_blocks": torch.from_numpy(pack_bits(flags))}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        count = math.prod(self.grid(entry.shape))
        index = np.flatnonzero(unpack_bits(parts["_blocks"].numpy(), count, "the block bitmap"))
        if len(index) != entry.options["kept"]:
            raise CheckpointError(f"the bitmap keeps {len(index)} blocks, and there are {entry.options['kept']}")
        return self.place(as_bits(parts[""]), index, entry.shape)
