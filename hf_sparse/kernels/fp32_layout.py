"""The packed layout of fp32 weights: columns in chunks that stay in a cache, rows x 1 blocks.

The columns of a weight are cut into chunks of equal width. Inside a chunk, group after group of `rows` outputs, every
block column that holds a nonzero is kept: one byte for its index in the chunk, `rows` floats for its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BackendError
from .types import Packed

WIDEST = 256
"""Maximum number of columns of a chunk: the index of a block in it is one byte."""

NARROW = 128
"""Columns a chunk of 1 x 1 and 2 x 1 blocks, of which more than `DENSE` are kept: as 64 tokens of fp32 fill 32 KiB."""

MIDDLE = 192
"""The same, where fewer are kept: the sums, stored and loaded between chunks, then cost more than a second cache does.
Taller blocks load an input once for all their rows, which the second cache can serve: they take `WIDEST`."""

DENSE = 0.3

_STEP = 16
"""The width of a chunk is a multiple of this, a whole number of blocks of any height."""

ROWS = (1, 2, 4, 8, 16)
"""Block heights of the kernels."""


@dataclass(frozen=True)
class PackedWeight(Packed):
    """A sparse fp32 weight, made by `pack`. It is checked when it is made, so that no kernel reads out of bounds.

    Shapes:
        values: (blocks, rows), fp32.
        columns: (blocks,), uint8, inside the chunk of the block; ascending within a group.
        pointers: (chunks, groups + 1), int32: chunk c and group g have the blocks from [c, g] to [c, g + 1].

    Raises:
        BackendError: the tensors do not fit together.
    """

    operators: ClassVar[str] = "sparse"
    values: Tensor
    columns: Tensor
    pointers: Tensor
    rows: int
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        check_layout(
            self.values,
            self.columns,
            self.pointers,
            self.rows,
            self.out_features,
            self.in_features,
            "this PackedWeight",
        )
        if not self.pointers.is_meta:
            _check_indexes(self)

    @property
    def chunk(self) -> int:
        """Columns a chunk."""
        return chunk_width(self.in_features, self.pointers.shape[0])

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All its tensors, in the order of the operators."""
        return self.values, self.columns, self.pointers


def pack(weight: Tensor, rows: int = 1) -> PackedWeight:
    """Pack a weight, keeping the block columns in which any of `rows` neighbouring outputs is nonzero.

    Args:
        weight: fp32; not changed.
        rows: height of a block, one of `ROWS`; other numbers of outputs are padded inside.

    Shapes:
        weight: (out, in).

    Raises:
        BackendError: not a matrix of fp32, or a height that the kernels do not have.
    """
    check_matrix("pack", weight, rows, ROWS)
    weight = weight.detach()
    out, width = weight.shape
    groups, target = -(-out // rows), WIDEST
    if rows <= 2:
        target = NARROW if int(weight.count_nonzero()) > DENSE * weight.numel() else MIDDLE
    chunk = chunk_width(width, -(-width // target))
    chunks = -(-width // chunk)
    padded = torch.nn.functional.pad(weight, (0, chunks * chunk - width, 0, groups * rows - out))
    blocks = padded.view(groups, rows, chunks, chunk).permute(2, 0, 3, 1)  # chunk, group, column, row
    kept = (blocks != 0).any(dim=-1)
    if int(kept.sum()) > torch.iinfo(torch.int32).max:
        raise BackendError(f"a weight of shape {tuple(weight.shape)} has more blocks than int32 can count")
    ends = kept.sum(dim=-1).flatten().cumsum(0).view(chunks, groups)
    starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]]) if groups and chunks else ends.new_zeros(chunks)
    return PackedWeight(
        values=blocks[kept].contiguous(),
        columns=kept.nonzero()[:, 2].to(torch.uint8),
        pointers=torch.cat([starts[:, None], ends], dim=1).to(torch.int32),
        rows=rows,
        out_features=out,
        in_features=width,
    )


def check_matrix(caller: str, weight: Tensor, rows: int, known: Sequence[int]) -> None:
    """Refuse what is not a matrix in fp32, and block heights that the kernels do not have.

    Args:
        caller: the function that was called.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise BackendError(
            f"{caller} takes a weight of shape (out, in) in float32, got {tuple(weight.shape)} in {weight.dtype}"
        )
    if rows not in known:
        raise BackendError(f"{caller} takes blocks of {', '.join(map(str, known))} rows, got {rows} rows")


def unpack(packed: PackedWeight) -> Tensor:
    """Return the dense weight, bit for bit, except that a zero outside of every kept block becomes +0.0."""
    return dense(packed.values, packed.columns, packed.pointers, packed.rows, packed.out_features, packed.in_features)


def dense(values: Tensor, columns: Tensor, pointers: Tensor, rows: int, out_features: int, in_features: int) -> Tensor:
    """Write the blocks into zeros; the parts of a `PackedWeight` one by one, as the operators have them."""
    chunks, groups = pointers.shape[0], pointers.shape[1] - 1
    chunk = chunk_width(in_features, chunks)
    weight = values.new_zeros(chunks * groups * chunk, rows)
    weight[block_cells(columns, pointers, chunk)] = values
    weight = weight.view(chunks, groups, chunk, rows).permute(1, 3, 0, 2).reshape(groups * rows, chunks * chunk)
    return weight[:out_features, :in_features].contiguous()


def chunk_width(in_features: int, chunks: int) -> int:
    """Return the number of columns of each chunk but the last.

    Example:
        >>> chunk_width(768, 3), chunk_width(768, 5), chunk_width(7, 1)
        (256, 160, 16)
    """
    each = -(-in_features // max(chunks, 1))
    return max(-(-each // _STEP), 1) * _STEP


def block_cells(columns: Tensor, pointers: Tensor, chunk: int) -> Tensor:
    """Return the index of each block, counted over (chunk, group, column)."""
    counts = pointers.long().diff(dim=1).flatten()
    slots = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return slots * chunk + columns.long()


def check_layout(
    values: Tensor, columns: Tensor, pointers: Tensor, rows: int, out_features: int, in_features: int, whose: str
) -> None:
    """Refuse tensors whose shapes, types or memory do not fit together; reads no element, so it is cheap."""
    if rows not in ROWS or out_features < 0 or in_features < 0:
        raise BackendError(f"{whose}: blocks of {rows} rows in a weight of shape ({out_features}, {in_features})")
    chunks = pointers.shape[0] if pointers.dim() == 2 else 0
    chunk = chunk_width(in_features, chunks)
    if chunk > WIDEST or chunks != -(-in_features // chunk):
        chunks = -(-in_features // WIDEST)
    shape = (chunks, -(-out_features // rows) + 1)
    if (
        values.dtype != torch.float32
        or columns.dtype != torch.uint8
        or pointers.dtype != torch.int32
        or values.dim() != 2
        or values.shape[1] != rows
        or columns.shape != values.shape[:1]
        or pointers.shape != shape
    ):
        actual = ", ".join(
            f"{name} {tuple(part.shape)} {part.dtype}"
            for name, part in (("values", values), ("columns", columns), ("pointers", pointers))
        )
        raise BackendError(
            f"{whose} of {out_features} outputs and {in_features} inputs holds {actual}, where values (blocks, {rows}) "
            f"float32, columns (blocks,) uint8 and pointers {shape} int32 belong: make it with hf_sparse.kernels.pack"
        )
    if not (values.is_contiguous() and columns.is_contiguous() and pointers.is_contiguous()):
        raise BackendError(f"{whose} has parts that are not contiguous: make it with hf_sparse.kernels.pack")


def _check_indexes(packed: PackedWeight) -> None:
    """Refuse pointers that run backwards or past the blocks, and columns beyond the last one."""
    pointers, blocks = packed.pointers, packed.columns.numel()
    flat = pointers.flatten()
    if flat.numel() and packed.out_features:
        fits = int(flat[0]) == 0 and int(flat[-1]) == blocks and bool((flat.diff() >= 0).all())
        fits = fits and torch.equal(pointers[1:, 0], pointers[:-1, -1])
    else:
        fits = blocks == 0 and not bool(flat.any())
    if not fits:
        raise BackendError(f"the pointers of a PackedWeight do not count its {blocks} blocks from first to last")
    if blocks:
        chunk, last = packed.chunk, int(pointers[-1, 0])
        beyond = int(packed.columns.max()) >= chunk
        tail = packed.columns[last:]
        if beyond or (tail.numel() and int(tail.max()) >= packed.in_features - (pointers.shape[0] - 1) * chunk):
            raise BackendError(f"the columns of a PackedWeight go beyond its {packed.in_features} inputs")
