"""Deflate: the bitmask, compressed (RFC 1951). Finds structure that no other codec knows: 2:4, whole rows, columns.

The strategy matters more than the level: for a random mask Huffman codes alone are both smallest and fastest, and only
regular masks gain from string matching. A sample of the mask decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..manifest import TensorEntry
from .base import CODECS, Array, Codec, Part, Source, as_bits
from .bitmask import expand

_HUFFMAN = (1, zlib.Z_HUFFMAN_ONLY)
_MATCHES = (6, zlib.Z_DEFAULT_STRATEGY)
_PIECE = 1 << 12


def _compress(data: Array, level: int, strategy: int, pieces: int = 1) -> bytes:
    coder = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    out = []
    for piece in np.split(data, pieces):
        out += [coder.compress(piece.data), coder.flush(zlib.Z_SYNC_FLUSH if pieces > 1 else zlib.Z_NO_FLUSH)]
    return b"".join(out) + coder.flush()


def plan(data: Array) -> tuple[tuple[int, int], int]:
    """Return level and strategy that suit the data, and about how many bytes that leaves, from a sample."""
    middle = len(data) // 2
    sample = data if middle < 2 * _PIECE else np.concatenate([data[:_PIECE], data[middle : middle + _PIECE]])
    # Level 1 is enough to see whether there is anything to match, and ten times as fast as level 6 where there is not.
    sizes = {way: len(_compress(sample, 1, way[1])) for way in (_HUFFMAN, _MATCHES)}
    best = min(sizes, key=sizes.__getitem__)
    return best, sizes[best] * len(data) // max(1, len(sample)) + 8


def _plan(source: Source) -> tuple[tuple[int, int], int]:
    return plan(source.mask)


def deflate(data: Array, pieces: int = 1) -> Tensor:
    """Return bytes as a raw deflate stream (no zlib header: the checksum of the entry covers it).

    Args:
        data: the bytes.
        pieces: of how many equal pieces of different statistics they consist; codes start anew with each.
    """
    return torch.frombuffer(bytearray(_compress(data, *plan(data)[0], pieces)), dtype=torch.uint8)


def inflate(stream: Tensor, length: int) -> Array:
    """Return exactly `length` bytes out of a raw deflate stream, never allocating more.

    Raises:
        CheckpointError: if the stream is corrupted, longer, shorter, or followed by anything.
    """
    decoder = zlib.decompressobj(-15)
    try:
        data = decoder.decompress(stream.numpy().data, length + 1)
    except zlib.error as error:
        raise CheckpointError(f"the deflate stream is corrupted: {error}") from None
    if len(data) != length or not decoder.eof or decoder.unused_data:
        raise CheckpointError(f"the deflate stream does not hold exactly {length} bytes")
    return np.frombuffer(data, np.uint8)


@CODECS.register("deflate")
@dataclass(frozen=True)
class Deflate(Codec):
    """Store the bitmask as a deflate stream of `deflated` bytes, and the values kept."""

    suffixes = ("_mask_deflated",)
    facts = ("deflated",)

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        return (cls(),)

    def stored_bytes(self, source: Source) -> int | None:
        return source.nonzeros * source.item_bytes + source.once(_plan)[1]

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        return {
            "": Part(entry.dtype, (entry.nonzeros,)),
            "_mask_deflated": Part("U8", (entry.options["deflated"],)),
        }

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        stream = deflate(source.mask)
        return {"deflated": stream.numel()}, {"": source.values(source.index), "_mask_deflated": stream}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        mask = inflate(parts["_mask_deflated"], -(-entry.numel // 8))
        return expand(mask, as_bits(parts[""]), entry.numel)
