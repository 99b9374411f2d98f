"""CSR: the column of each value and the count of each row, in the narrowest integers. For all but empty tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..manifest import ITEM_BYTES, TensorEntry
from .base import CODECS, Codec, Part, Source, as_bits

_INDEX_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}


def index_type(columns: int) -> str:
    """Return the narrowest unsigned type that can hold the number of columns, and so every column and every count."""
    return next(name for name in _INDEX_TYPES if columns < 1 << 8 * ITEM_BYTES[name])


@CODECS.register("csr")
@dataclass(frozen=True)
class CSR(Codec):
    """Store values row by row with their columns; rows are the first dimension, columns all the others."""

    suffixes = ("_columns", "_counts")

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        return (cls(),)

    def stored_bytes(self, source: Source) -> int | None:
        width = ITEM_BYTES[index_type(math.prod(source.shape[1:]))]
        return source.nonzeros * (source.item_bytes + width) + source.shape[0] * width

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        index = index_type(math.prod(entry.shape[1:]))
        return {
            "": Part(entry.dtype, (entry.nonzeros,)),
            "_columns": Part(index, (entry.nonzeros,)),
            "_counts": Part(index, entry.shape[:1]),
        }

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        width = math.prod(source.shape[1:])
        dtype = _INDEX_TYPES[index_type(width)]
        rows, columns = np.divmod(source.index, width)
        counts = np.bincount(rows, minlength=source.shape[0])
        return {}, {
            "": source.values(source.index),
            "_columns": torch.from_numpy(columns.astype(dtype)),
            "_counts": torch.from_numpy(counts.astype(dtype)),
        }

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        width = math.prod(entry.shape[1:])
        counts, columns = (parts[suffix].numpy().astype(np.int64) for suffix in ("_counts", "_columns"))
        # Sizes are below 2**46, so a sum can only be wrong, never wrap, once no single count is above the width.
        if (counts.size and counts.view(np.uint64).max() > width) or int(counts.sum()) != entry.nonzeros:
            raise CheckpointError(f"the counts of the rows do not add up to {entry.nonzeros} values")
        if columns.size and columns.view(np.uint64).max() >= width:
            raise CheckpointError(f"a column is not among the {width} of the tensor")
        index = np.repeat(np.arange(entry.shape[0]) * width, counts) + columns
        if (np.diff(index) <= 0).any():
            raise CheckpointError("the columns of a row are not in ascending order")
        values = as_bits(parts[""])
        return torch.zeros(entry.numel, dtype=values.dtype).index_copy_(0, torch.from_numpy(index), values)
