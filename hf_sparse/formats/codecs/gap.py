"""Gap: how many zeros lie before each value, as bytes, then Huffman codes: within 1 % of the entropy from 80 % zeros.

The gaps of a random mask follow a geometric distribution, for which deflate's Huffman codes are nearly ideal, and
decoding is a cumulative sum. The same for blocks: zero blocks before each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...errors import CheckpointError
from ..manifest import TensorEntry
from .base import CODECS, Array, Codec, Part, Source, as_bits
from .block import Blocked, block_shape
from .deflate import deflate, inflate

_SKIP = 255
"""The byte that stands for 255 zeros with no value behind them; smaller ones count the zeros before a value."""


def _gaps(index: Array) -> Array:
    zeros = np.diff(index, prepend=-1) - 1
    wide = np.flatnonzero(zeros >= _SKIP)
    if not len(wide):
        return zeros.astype(np.uint8)
    skips, zeros[wide] = np.divmod(zeros[wide], _SKIP)
    return np.insert(zeros.astype(np.uint8), np.repeat(wide, skips), _SKIP)


def _index(gaps: Array, count: int, total: int) -> Array:
    """Return the positions of `count` values among `total`.

    Raises:
        CheckpointError: if the gaps do not place exactly these values, or lead behind the end.
    """
    placed = gaps != _SKIP
    if np.count_nonzero(placed) != count or not placed[-1:].all():
        raise CheckpointError(f"the gaps do not place exactly {count} values")
    # A value is one step behind the zeros before it, and a skip is not a value: 255 at most in both, so still a byte.
    # Cast first: a sum that casts as it goes takes eight times as long.
    index = np.cumsum((gaps + placed).astype(np.int64))
    index -= 1
    if count != len(gaps):
        index = index[placed]
    if count and index[-1] >= total:
        raise CheckpointError(f"the gaps lead behind the last of {total}")
    return index


@CODECS.register("gap")
@dataclass(frozen=True)
class Gap(Blocked):
    """Store the `kept` blocks that are not zero, and `gaps` gap bytes as a deflate stream of `deflated` bytes."""

    rows: int = 1
    cols: int = 1

    suffixes = ("_gaps",)
    facts: ClassVar[tuple[str, ...]] = ("kept", "gaps", "deflated")

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        if source.nonzeros * 6 > source.numel:
            return ()  # with more than that kept, deflate is as small, and its bitmask is faster to decode
        shape = source.once(block_shape)
        return (cls(), cls(*shape)) if shape else (cls(),)

    def _kept_index(self, source: Source) -> Array:
        return source.index if self.size == 1 else np.flatnonzero(self.kept(source.kept, source.shape))

    def _coded(self, source: Source) -> tuple[int, Tensor]:
        gaps = _gaps(source.once(self._kept_index))
        return len(gaps), deflate(gaps)

    def stored_bytes(self, source: Source) -> int | None:
        if not self.fits(source.shape):
            return None
        return len(source.once(self._kept_index)) * self.size * source.item_bytes + source.once(self._coded)[1].numel()

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        if not self.fits(entry.shape):
            raise CheckpointError(f"blocks of {self.rows} x {self.cols} do not fit into shape {entry.shape}")
        count, kept, gaps = math.prod(self.grid(entry.shape)), entry.options["kept"], entry.options["gaps"]
        if kept > count or not kept <= entry.nonzeros <= kept * self.size:
            raise CheckpointError(f"{kept} of {count} blocks of {self.size} cannot hold {entry.nonzeros} nonzeros")
        if not kept <= gaps <= kept + count // _SKIP:
            raise CheckpointError(f"{gaps} gap bytes cannot place {kept} of {count} blocks")
        return {"": Part(entry.dtype, (kept * self.size,)), "_gaps": Part("U8", (entry.options["deflated"],))}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        index, (gaps, stream) = source.once(self._kept_index), source.once(self._coded)
        facts = {"kept": len(index), "gaps": gaps, "deflated": stream.numel()}
        return facts, {"": self.take(source, index), "_gaps": stream}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        return self.place(as_bits(parts[""]), self._index(entry, parts), entry.shape)

    def _index(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Array:
        gaps = inflate(parts["_gaps"], entry.options["gaps"])
        return _index(gaps, entry.options["kept"], math.prod(self.grid(entry.shape)))
