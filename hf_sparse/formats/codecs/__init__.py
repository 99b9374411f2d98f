"""Bytes <-> tensor: each codec is one file, and "auto" writes the smallest. The format is specified in FORMAT.md."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...registry import Spec
from ..manifest import TensorEntry
from .base import CODECS, DTYPE_NAMES, TORCH_DTYPES, Codec, Part, Source, as_bits, checksum, codec_of
from .bitmask import Bitmask
from .block import Block
from .csr import CSR
from .deflate import Deflate
from .dense import Dense
from .gap import Gap
from .nm import NM
from .planes import Planes

__all__ = [
    "CODECS",
    "CSR",
    "DTYPE_NAMES",
    "NM",
    "SUFFIXES",
    "TORCH_DTYPES",
    "Bitmask",
    "Block",
    "Codec",
    "Deflate",
    "Dense",
    "Gap",
    "Part",
    "Planes",
    "Source",
    "checksum",
    "codec_of",
    "decode",
    "encode",
    "encode_all",
    "layout",
    "pack",
    "verify",
]

SUFFIXES: tuple[str, ...] = ("", *dict.fromkeys(suffix for name in CODECS for suffix in CODECS[name].suffixes))
"""Every suffix that a codec may add to a key. The values are always under the key itself ("")."""

MAX_RATIO = 1024
_ENTRY_BYTES = 64
_WORTH_PACKING = 1 / 64
"""A tensor with fewer zeros (an embedding with one padding row) is left plain by "auto": there is nothing to gain."""


def _within_ratio(nbytes: int, stored: int) -> bool:
    # A file may not make a reader allocate out of all proportion to its own size: a few bytes could stand for
    # terabytes of zeros otherwise. The rule is part of the format, so writers obey it and readers enforce it.
    return nbytes <= MAX_RATIO * (stored + _ENTRY_BYTES)


def encode(tensor: Tensor, codec: Spec = "auto") -> tuple[TensorEntry, dict[str, Tensor]]:
    """Pack a tensor.

    Args:
        tensor: any tensor of a type that safetensors can store; moved to the CPU.
        codec: "auto" for the smallest that decodes fast, "smallest" for the smallest of all, or one codec. A tensor
            with fewer than two dimensions or no elements, or one that does not get smaller, is stored dense.

    Returns:
        The entry for the manifest, and the parts to store: each under the key of the tensor plus its suffix. The values
        (suffix "") have one dimension whenever the tensor is packed, so that a reader that ignores the manifest fails
        over the shape instead of loading nonsense.

    Raises:
        RecipeError: for an unknown codec or option.
        CheckpointError: for a type of tensor that the format does not know.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
        >>> entry, parts = encode(weight, "bitmask")
        >>> {suffix: part.tolist() for suffix, part in parts.items()}
        {'': [2.0, 3.0], '_mask': [130]}
        >>> torch.equal(decode(entry, parts), weight)
        True
    """
    if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
        raise CheckpointError(f"the format cannot store a tensor of type {tensor.dtype} and layout {tensor.layout}")
    source = Source(tensor.detach().cpu())
    for candidate in _ranked(source, codec):
        entry, parts = pack(source, candidate)
        # Some sizes are estimates: only what is there says whether readers will take it.
        if _within_ratio(entry.nbytes, sum(part.nbytes for part in parts.values())):
            break
    return entry, parts


def pack(source: Source, codec: Codec) -> tuple[TensorEntry, dict[str, Tensor]]:
    """Return entry and parts of a tensor that the codec can hold, whether or not that makes it smaller."""
    facts, parts = codec.encode(source)
    digest = checksum(source.bits, source.dtype, source.shape)
    options = {**dataclasses.asdict(codec), **facts}
    return TensorEntry(codec.name, source.shape, source.dtype, source.nonzeros, digest, options), parts


def encode_all(
    tensors: Iterable[Tensor], codecs: Iterable[Spec] = itertools.repeat("auto")
) -> list[tuple[TensorEntry, dict[str, Tensor]]]:
    """Pack several tensors as `encode` does, on as many threads as torch uses.

    Raises:
        RecipeError, CheckpointError: as `encode`.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(encode, tensors, codecs))


def _ranked(source: Source, spec: Spec) -> list[Codec]:
    """Return the codecs that make a tensor smaller, the smallest first, and last of all the plain one."""
    dense = source.numel * source.item_bytes
    sizes: list[tuple[int, Codec]] = []
    for candidate in _candidates(source, spec) if len(source.shape) > 1 and source.numel else ():
        size = candidate.stored_bytes(source)
        if size is not None and size < dense and _within_ratio(dense, size):
            sizes.append((size, candidate))
    return [*(codec for _, codec in sorted(sizes, key=lambda pair: pair[0])), Dense()]


def _candidates(source: Source, spec: Spec) -> Iterable[Codec]:
    if spec not in ("auto", "smallest"):
        return (CODECS.build(spec),)
    if spec == "auto" and source.numel - source.nonzeros < _WORTH_PACKING * source.numel:
        return ()
    kinds = [CODECS[name] for name in CODECS]
    return (
        codec for kind in kinds if spec == "smallest" or not kind.only_smallest for codec in kind.candidates(source)
    )


def layout(entry: TensorEntry, name: str = "") -> dict[str, Part]:
    """Return the type and shape of every part that an entry demands, by suffix.

    Raises:
        CheckpointError: for an unknown codec, options that contradict the shape, or a tensor that would be more than
            1024 times larger than its parts.
    """
    with _naming(entry, name):
        if entry.codec != "dense" and (len(entry.shape) < 2 or not entry.numel):
            raise CheckpointError(f"only tensors with elements and two dimensions are packed, not shape {entry.shape}")
        parts = codec_of(entry).layout(entry)
        stored = sum(part.nbytes for part in parts.values())
        if not _within_ratio(entry.nbytes, stored):
            raise CheckpointError(f"{stored} bytes claim to hold {entry.nbytes}, more than {MAX_RATIO} times as many")
        return parts


def decode(entry: TensorEntry, parts: Mapping[str, Tensor], name: str = "") -> Tensor:
    """Unpack a tensor and verify it.

    Args:
        entry: what the manifest says about the tensor.
        parts: the stored parts by suffix, exactly those of `layout(entry)`.
        name: key of the tensor, for error messages.

    Returns:
        The tensor, on the device of the values, bit for bit what was encoded.

    Raises:
        CheckpointError: if a part is missing, unknown, or of another size or type (found before anything is
            allocated), or if the content does not have the count and the checksum of the entry.
    """
    demanded = layout(entry, name)
    with _naming(entry, name):
        _check_parts(demanded, parts)
        bits = codec_of(entry).decode(entry, {suffix: part.detach().cpu() for suffix, part in parts.items()})
    tensor = bits.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
    verify(entry, tensor, name)
    return tensor.to(parts[""].device)


def verify(entry: TensorEntry, tensor: Tensor, name: str = "") -> None:
    """Raise unless a decoded tensor has the count of nonzeros and the checksum of its entry.

    Raises:
        CheckpointError: if it does not.
    """
    with _naming(entry, name):
        bits = as_bits(tensor)
        if (found := checksum(bits, entry.dtype, entry.shape)) != entry.checksum:
            raise CheckpointError(f"the content is corrupted: the checksum is {found}, and should be {entry.checksum}")
        if (count := int(np.count_nonzero(bits.numpy()))) != entry.nonzeros:
            raise CheckpointError(f"the manifest says {entry.nonzeros} nonzeros, and there are {count}")


@contextlib.contextmanager
def _naming(entry: TensorEntry, name: str) -> Iterator[None]:
    """Put the name of the tensor into every error of the block: the codecs do not know it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"tensor '{name}' (codec {entry.codec}): {error}") from None


def _check_parts(demanded: Mapping[str, Part], parts: Mapping[str, Tensor]) -> None:
    if set(parts) != set(demanded):
        raise CheckpointError(f"it needs the parts {sorted(demanded)}, and there are {sorted(parts)}")
    for suffix, part in demanded.items():
        found = parts[suffix]
        if tuple(found.shape) != part.shape or DTYPE_NAMES.get(found.dtype) != part.dtype:
            raise CheckpointError(
                f"part '{suffix}' must be {part.dtype} of shape {part.shape}, and is {found.dtype} {tuple(found.shape)}"
            )
