"""Planes: as gap, and the values coded too: first all low bytes, ..., then all high bytes, as one deflate stream.

Signs and exponents lie in the high bytes and are far from random; the low bytes of a mantissa are left as they are by
deflate. About a sixth smaller than gap for fp16, a third for bf16, and several times slower to read: for the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..manifest import ITEM_BYTES, TensorEntry
from .base import CODECS, TORCH_DTYPES, Codec, Part, Source, as_bits, as_bytes
from .block import block_shape
from .deflate import deflate, inflate
from .gap import Gap


@CODECS.register("planes")
@dataclass(frozen=True)
class Planes(Gap):
    """Store the values of `kept` blocks as a deflate stream of `values` bytes, and gaps as `Gap` does."""

    facts = (*Gap.facts, "values")
    only_smallest = True

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        shape = source.once(block_shape)
        return (cls(), cls(*shape)) if shape else (cls(),)

    def _values(self, source: Source) -> Tensor:
        values = as_bytes(self.take(source, source.once(self._kept_index)))
        planes = values.reshape(-1, source.item_bytes).T.reshape(-1)
        return deflate(planes, pieces=source.item_bytes)

    def stored_bytes(self, source: Source) -> int | None:
        if not self.fits(source.shape):
            return None
        return source.once(self._values).numel() + source.once(self._coded)[1].numel()

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        return super().layout(entry) | {"": Part("U8", (entry.options["values"],))}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        facts, parts = super().encode(source)
        stream = source.once(self._values)
        return {**facts, "values": stream.numel()}, parts | {"": stream}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        width, count = ITEM_BYTES[entry.dtype], entry.options["kept"] * self.size
        planes = inflate(parts[""], count * width).reshape(width, count)
        values = torch.from_numpy(planes.T.copy().reshape(-1)).view(TORCH_DTYPES[entry.dtype])
        return self.place(as_bits(values), self._index(entry, parts), entry.shape)
