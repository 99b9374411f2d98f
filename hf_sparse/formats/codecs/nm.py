"""n:m: of every m consecutive elements exactly n are stored, each with its position among the m (2:4 needs 2 bits)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...utils.validation import check_integer
from ..manifest import TensorEntry
from .base import CODECS, Array, Codec, Part, Source, as_bits, pack_bits, unpack_bits

_COMMON = ((2, 4), (1, 4))


def _most_in_a_group(source: Source, m: int) -> int:
    if m == 4:  # two groups in a byte of the mask: sixteen times less to read than the bools
        return int(max(np.bitwise_count(source.mask & 15).max(), np.bitwise_count(source.mask >> 4).max()))
    return int(source.kept.reshape(-1, m).sum(axis=1).max())


@CODECS.register("n:m")
@dataclass(frozen=True)
class NM(Codec):
    """Store n values of every m (zeros where a group has fewer), and the position of each in `ceil(log2(m))` bits."""

    n: int = 2
    m: int = 4

    suffixes = ("_positions",)

    def __post_init__(self) -> None:
        check_integer("m", self.m, "[2, 256]")
        check_integer("n", self.n, f"[1, {self.m}]")

    @property
    def _width(self) -> int:
        return (self.m - 1).bit_length()

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        return (cls(n, m) for n, m in _COMMON)

    def _stored(self, numel: int) -> int:
        return numel // self.m * self.n

    def stored_bytes(self, source: Source) -> int | None:
        stored = self._stored(source.numel)
        if source.numel % self.m or source.nonzeros > stored or _most_in_a_group(source, self.m) > self.n:
            return None
        return stored * source.item_bytes + -(-stored * self._width // 8)

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        stored = self._stored(entry.numel)
        if entry.numel % self.m or entry.nonzeros > stored:
            raise CheckpointError(f"{entry.nonzeros} of {entry.numel} elements cannot be in pattern {self.n}:{self.m}")
        return {"": Part(entry.dtype, (stored,)), "_positions": Part("U8", (-(-stored * self._width // 8),))}

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        index = source.index
        if len(index) != self._stored(source.numel):
            # A group with fewer than n nonzeros is filled up with its first zeros, so that all have the same size.
            zeros = ~source.kept.reshape(-1, self.m)
            lacking = self.n - self.m + zeros.sum(axis=1, keepdims=True)
            index = np.flatnonzero(~zeros | (np.cumsum(zeros, axis=1) <= lacking))
        positions = (index % self.m).astype(np.uint8)
        bits = positions[:, None] >> np.arange(self._width, dtype=np.uint8) & np.uint8(1)
        return {}, {"": source.values(index), "_positions": torch.from_numpy(pack_bits(bits))}

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        values, positions = self.groups(entry, {**parts, "": as_bits(parts[""])})
        groups = torch.zeros(entry.numel // self.m, self.m, dtype=values.dtype)
        return groups.scatter_(1, torch.from_numpy(positions.astype(np.int64)), values).view(-1)

    def groups(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> tuple[Tensor, Array]:
        """Return the n values of each group, and the place of each among its m; places ascend.

        Raises:
            CheckpointError: if they do not.
        """
        values = parts[""].view(-1, self.n)
        positions = self._positions(parts["_positions"].numpy(), values.numel())
        if (positions >= self.m).any() or (positions[:, 1:] <= positions[:, :-1]).any():
            raise CheckpointError(f"the positions in a group of {self.m} are not in ascending order")
        return values, positions

    def _positions(self, packed: Array, count: int) -> Array:
        bits = unpack_bits(packed, count * self._width, "the positions").view(np.uint8).reshape(count, self._width)
        positions = bits[:, 0].copy()
        for place in range(1, self._width):
            positions |= bits[:, place] << np.uint8(place)
        return positions.reshape(-1, self.n)


CODECS.shorthand(r"(\d{1,3}):(\d{1,3})", lambda match: {"name": "n:m", "n": int(match[1]), "m": int(match[2])})
