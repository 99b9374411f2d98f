"""What every codec has in common: the tensor seen as bits, the parts an entry demands, and bit packing.

A codec never looks at numbers, only at bits: tensors of every type are handled as integers of the same width, so -0.0
and NaN payloads survive, and one implementation serves all types. "Zero" means all bits zero.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, RecipeError
from ...registry import Registry
from ..manifest import ITEM_BYTES, TensorEntry

CODECS: Registry[Codec] = Registry("codec")

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


def as_bits(tensor: Tensor) -> Tensor:
    """Return the elements as a 1-D tensor of integers of the same width, sharing memory where they are contiguous."""
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


def as_bytes(tensor: Tensor) -> Array:
    """Return the bytes of a CPU tensor in C order, sharing memory where it is contiguous."""
    return as_bits(tensor).view(torch.uint8).numpy()


def checksum(bits: Tensor, dtype: str, shape: tuple[int, ...]) -> str:
    """Return `crc32:` and eight hex digits over type, shape and bytes, so that none of them can be mistaken.

    Example:
        >>> checksum(torch.tensor([1, 2], dtype=torch.int16), "I16", (2,))  # over b"I16[2]" and 01 00 02 00
        'crc32:d9a4df01'
    """
    start = zlib.crc32(f"{dtype}[{','.join(map(str, shape))}]".encode())
    return f"crc32:{zlib.crc32(as_bytes(bits).data, start):08x}"


def pack_bits(flags: Array) -> Array:
    """Return bools as bytes; flag `i` is bit `i % 8`, counted from the lowest, of byte `i // 8`."""
    return np.packbits(flags, bitorder="little")


def unpack_bits(packed: Array, count: int, what: str) -> Array:
    """Return the first `count` flags of `pack_bits`.

    Raises:
        CheckpointError: if a bit behind the last flag is set.
    """
    flags = np.unpackbits(packed, bitorder="little").view(bool)
    if flags[count:].any():
        raise CheckpointError(f"bits behind the end of {what} are set")
    return flags[:count]


@dataclasses.dataclass(frozen=True)
class Part:
    """What the file must hold under one key: type and shape, both known from the entry alone."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Source:
    """A tensor to be encoded, with what several codecs want to know about it computed once."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = DTYPE_NAMES[tensor.dtype]
        self.shape = tuple(tensor.shape)
        self.numel = tensor.numel()
        self.item_bytes = tensor.element_size()
        self.bits = as_bits(tensor)
        self._made: dict[Callable[[Source], Any], Any] = {}

    @cached_property
    def kept(self) -> Array:
        """Flat bools: which elements have a bit set."""
        return self.bits.numpy() != 0  # numpy's comparison is ten times as fast as torch's here

    @cached_property
    def nonzeros(self) -> int:
        """How many elements have a bit set."""
        return int(np.count_nonzero(self.bits.numpy()))

    @cached_property
    def index(self) -> Array:
        """Flat positions of the elements that have a bit set."""
        return np.flatnonzero(self.kept)

    @cached_property
    def mask(self) -> Array:
        """`kept` as a bitmask."""
        return pack_bits(self.kept)

    def once(self, make: Callable[[Source], T]) -> T:
        """Return `make(self)`, computed at the first call: what a codec needs both to estimate and to encode."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def values(self, index: Array) -> Tensor:
        """Return the elements at flat positions, in the type of the tensor."""
        return self.bits.index_select(0, torch.from_numpy(index)).view(TORCH_DTYPES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Codec:
    """One way to store a tensor: `encode`, `decode`, and the parts that an entry demands.

    A codec is a dataclass; its fields are the choices of the writer. Numbers that only the data decide (how many blocks
    are kept) are `facts`. Both go into the options of the entry, and with them the entry alone gives the exact size of
    every part, which is what lets a reader check a file before it allocates anything.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()
    only_smallest: ClassVar[bool] = False
    """Left out of "auto", because decoding takes too long to be what everyone gets."""

    @classmethod
    def candidates(cls, source: Source) -> Iterable[Codec]:
        """Yield the codecs of this kind that may be the smallest for this tensor."""
        return ()

    def stored_bytes(self, source: Source) -> int | None:
        """Return the bytes of all parts without encoding, or None if the codec cannot hold the tensor."""
        raise NotImplementedError

    def layout(self, entry: TensorEntry) -> dict[str, Part]:
        """Return the part that the file must hold for each suffix ("" = the values).

        Raises:
            CheckpointError: if the options cannot be true of the shape.
        """
        raise NotImplementedError

    def encode(self, source: Source) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Return the facts and the parts."""
        raise NotImplementedError

    def decode(self, entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the bits of the tensor, flat. The parts have been checked against `layout`.

        Raises:
            CheckpointError: if the content of the parts contradicts itself.
        """
        raise NotImplementedError


def codec_of(entry: TensorEntry) -> Codec:
    """Return the codec of an entry, with its options.

    Raises:
        CheckpointError: for an unknown codec, or options that are not exactly those of the codec.
    """
    if entry.codec not in CODECS:
        raise CheckpointError(f"unknown codec '{entry.codec}'; this hf_sparse knows {', '.join(CODECS)}")
    cls = CODECS[entry.codec]
    fields = [field.name for field in dataclasses.fields(cls)]
    if set(entry.options) != {*fields, *cls.facts}:
        raise CheckpointError(f"codec {cls.name} has the options {[*fields, *cls.facts]}, not {sorted(entry.options)}")
    try:
        return cls(**{name: entry.options[name] for name in fields})
    except RecipeError as error:
        raise CheckpointError(str(error)) from None
