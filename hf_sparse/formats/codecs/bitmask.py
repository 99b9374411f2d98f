"""Bitmask: one bit for each element, and the elements that are not zero. Never far from the best below 80 % zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..manifest import TensorEntry
from .base import CODECS, Array, Codec, Part, Source, as_bits

_CHUNK = 1 << 18
"""Elements expanded at a time: the positions of one chunk stay in cache, and memory beyond the result stays small."""


def expand(mask: Array, values: Tensor, numel: int) -> Tensor:
    """Return `numel` bits: the values in order where the mask has a one, zero elsewhere.

    Raises:
        CheckpointError: if the mask does not have one bit for each value, or has bits behind the end.
    """
    if int(np.bitwise_count(mask).sum(dtype=np.int64)) != values.numel():
        raise CheckpointError(f"the mask does not have as many ones as there are values ({values.numel()})")
    if numel % 8 and mask[-1] >> (numel % 8):
        raise CheckpointError("bits behind the end of the mask are set")
    out = torch.zeros(numel, dtype=values.dtype)
    done = 0
    for start in range(0, numel, _CHUNK):
        flags = np.unpackbits(mask[start // 8 : (start + _CHUNK) // 8], bitorder="little").view(bool)
        index = torch.from_numpy(np.flatnonzero(flags))
        out[start : start + _CHUNK].index_copy_(0, index, values[done : done + index.numel()])
        done += index.numel()
    return out


@CODECS.register("bitmask")
@dataclass(frozen=True)
class Bitmask(Codec):
    """Store one bit for each element, and the values kept."""

    suffixes = ("_mask",)

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        return (cls(),)

    def stored_bytes(self, source: Source) -> int | None:
        return source.nonzeros * source.item_bytes + -(-source.numel // 8)

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        return {"": Part(entry.dtype, (entry.nonzeros,)), "_mask": Part("U8", (-(-entry.numel // 8),))}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        return {}, {"": source.values(source.index), "_mask": torch.from_numpy(source.mask)}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        return expand(parts["_mask"].numpy(), as_bits(parts[""]), entry.numel)
