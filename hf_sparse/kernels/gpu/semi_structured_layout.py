"""2:4 weights in the layout that CUTLASS reads: packed, unpacked, and taken from stored n:m without the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from ...errors import BackendError
from ...formats.codecs import NM, codec_of, layout
from ...formats.manifest import TensorEntry

BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
"""What computes the matmuls; each has its own layout and rules for shapes."""

FLOATS = (torch.float16, torch.bfloat16)
NAMES = {"cusparselt": "cuSPARSELt", "cutlass": "CUTLASS"}


class Packed(NamedTuple):
    """A 2:4 weight in the layout of CUTLASS.

    Attributes:
        values: `(out, in / 2)`, of the type of the weight.
        meta: the indices of the values, two bits each, in the order of the kernel.
    """

    values: Tensor
    meta: Tensor


def of_shape(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> str | None:
    """Return why a backend cannot take a weight of this shape, or None."""
    rules = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    if len(shape) != 2:
        return f"2:4 needs a matrix, and the weight has shape {shape}"
    for name, size, multiple in zip(
        ("out_features", "in_features"), shape, (rules.sparse_min_rows, rules.sparse_min_cols), strict=True
    ):
        if size % multiple or not size:
            return f"{NAMES[backend]} needs {name} to be a multiple of {multiple} in {short(dtype)}, not {size}"
    return None


def of_weight(weight: Tensor) -> str | None:
    """Return why these values are not a 2:4 weight, or None."""
    if weight.is_meta:
        return "the weight is not in memory (meta device)"
    groups = (weight.detach().reshape(-1, 4) != 0).sum(1, dtype=torch.int8)
    full = groups > 2
    if bad := int(torch.count_nonzero(full)):
        row, group = divmod(int(full.int().argmax()), weight.shape[1] // 4)
        return (
            f"the weight is not 2:4: {bad} of {full.numel()} groups of four inputs have more than two values, the "
            f"first in row {row}, columns {4 * group} to {4 * group + 3}"
        )
    # Unpacking from cuSPARSELt is a matmul with the identity, where inf * 0 is NaN; any other matmul gives NaN as well.
    if weight.is_floating_point() and not bool(torch.isfinite(weight.detach()).all()):
        return "the weight holds inf or NaN"
    return None


def short(dtype: torch.dtype) -> str:
    """Return the name of a type without the name of torch."""
    return str(dtype).removeprefix("torch.")


def pack_semi_structured(weight: Tensor) -> Packed:
    """Pack a weight as CUTLASS wants it; on any device.

    A negative zero is kept where its group has room, and is a plain zero otherwise.

    Args:
        weight: fp16, bf16 or int8.

    Shapes: `(out, in)` -> values `(out, in / 2)`, meta `(out, in / 16)`; in int8 `(out, in / 32)`.

    Raises:
        BackendError: if it is not 2:4, or of a type or shape that the layout has not.

    Example:
        >>> weight = torch.tensor([0.0, 2.0, 0.0, 3.0], dtype=torch.float16).repeat(32, 16)
        >>> packed = pack_semi_structured(weight)
        >>> packed.values[0, :4].tolist(), tuple(packed.meta.shape)
        ([2.0, 3.0, 2.0, 3.0], (32, 4))
        >>> torch.equal(unpack_semi_structured(packed), weight)
        True
    """
    weight = weight.detach().contiguous()
    _check_layout(tuple(weight.shape), weight.dtype)
    if why := of_weight(weight):
        raise BackendError(f"cannot pack as 2:4: {why}")
    groups = weight.view(-1, 4)
    bits = groups.view(torch.int8 if weight.element_size() == 1 else torch.int16)
    # Numbers first, then negative zeros, then zeros; among equals the lower index, so that all devices pack alike.
    last = (groups == 0).to(torch.int8) + (bits == 0).to(torch.int8)
    indices = last.sort(dim=1, stable=True).indices[:, :2].sort(dim=1).values
    return Packed(groups.gather(1, indices).view(weight.shape[0], -1), _meta(indices, weight.shape, weight.dtype))


def unpack_semi_structured(packed: Packed) -> Tensor:
    """Return the weight, bit for bit what was packed (but see there for negative zeros)."""
    rows, half = packed.values.shape
    ordered = _order(rows, packed.meta)
    each = torch.arange(0, packed.meta.element_size() * 8, 4, device=ordered.device)
    pairs = (ordered[:, :, None].long() >> each & 15).view(-1)
    indices = torch.stack([pairs & 3, pairs >> 2], dim=1)
    groups = packed.values.new_zeros((rows * half // 2, 4))
    return groups.scatter_(1, indices, packed.values.reshape(-1, 2)).view(rows, 2 * half)


def from_codec(entry: TensorEntry, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Packed | None:
    """Return a stored weight in the layout of CUTLASS without making the dense one.

    Its checksum is of the dense tensor, and so is not verified here.

    Args:
        entry: of the manifest.
        parts: as stored, by suffix, on the CPU.
        dtype: to convert the values to; None = as stored.

    Returns:
        None if it is not stored as 2:4 or 1:4; pack the decoded one then.

    Raises:
        CheckpointError: if the parts contradict the entry.
        BackendError: if the layout does not fit shape or type.
    """
    codec = codec_of(entry)
    if not isinstance(codec, NM) or codec.m != 4 or codec.n > 2 or len(entry.shape) != 2 or entry.shape[1] % 4:
        return None
    layout(entry)
    values, stored = codec.groups(entry, parts)
    indices = torch.from_numpy(stored).long()
    values = values if dtype is None else values.to(dtype)
    if codec.n == 1:  # the second is a zero beside it, and indices have to ascend
        zero, at_end = torch.zeros_like(values), indices == 3
        values = torch.where(at_end, torch.cat([zero, values], 1), torch.cat([values, zero], 1))
        indices = torch.cat([torch.where(at_end, 2, indices), torch.full_like(indices, 3)], 1)
    _check_layout(entry.shape, values.dtype)
    return Packed(values.reshape(entry.shape[0], -1), _meta(indices, entry.shape, values.dtype))


def _check_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype not in (*FLOATS, torch.int8):
        raise BackendError(f"the 2:4 layout of torch takes fp16, bf16 and int8, not {short(dtype)}")
    if why := of_shape(shape, dtype, "cutlass"):
        raise BackendError(f"cannot pack as 2:4: {why}")


def _meta(indices: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the indices `(groups, 2)` as CUTLASS stores them: four bits for a group, in words of 16 or 32 bits."""
    word = torch.int32 if dtype == torch.int8 else torch.int16
    each = torch.arange(0, word.itemsize * 8, 4, device=indices.device)
    words = ((indices[:, 0] | indices[:, 1] << 2).view(-1, len(each)) << each).sum(1).to(word).view(shape[0], -1)
    meta = torch.empty_like(words).view(-1)
    return meta.scatter_(0, _offsets(shape[0], words), words.view(-1)).view_as(words)


def _order(rows: int, meta: Tensor) -> Tensor:
    return meta.reshape(-1).gather(0, _offsets(rows, meta)).view_as(meta)


def _offsets(rows: int, meta: Tensor) -> Tensor:
    offsets: Tensor = _calculate_meta_reordering_scatter_offsets(rows, meta.shape[1], meta.dtype, meta.device)
    return offsets
