"""Dense: the tensor as it is, under its own key and in its own shape, readable by anything that reads safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..manifest import TensorEntry
from .base import CODECS, TORCH_DTYPES, Codec, Part, Source, as_bits


@CODECS.register("dense")
@dataclass(frozen=True)
class Dense(Codec):
    """Store every element."""

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        return (cls(),)

    def stored_bytes(self, source: Source) -> int | None:
        return source.numel * source.item_bytes

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        return {"": Part(entry.dtype, entry.shape)}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        return {}, {"": source.bits.view(TORCH_DTYPES[source.dtype]).view(source.shape)}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        return as_bits(parts[""])
