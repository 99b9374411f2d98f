"""The operator `hf_sparse::bitmask_linear`: a bit for each entry of a weight, and its nonzero values. For few tokens.

A model that generates multiplies every weight with one token at each step, so that its time goes to the bytes of the
weights. At 50 % of zeros this layout has 9 bits an entry where bfloat16 holds every value exactly (a checkpoint in
bfloat16 that runs in fp32), else 17. Dense fp32 has 32, and the layout of the kernel "cpu", with a column for each
nonzero, 20.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from .library import library, why_not_built
from .native_bits import NativeBits
from .op_table import WeightFormat
from .operators import define_all, without_rows
from .registry import Kernel, Layout, register

WORD = 64
"""Columns of one word of bits."""

ENTRIES = 1 << 22
"""Entries that are packed at a time."""

SLACK = 256
"""Values after the last one that the C++ kernel may read, beside those of a row."""


class _Bitmask(ctypes.Structure):
    """`Bitmask` of csrc/kernels.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("values", "bits", "pointers", "bias")],
        ("count", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("out_features", "in_features", "halves")],
    )


class BitmaskWeight(NamedTuple):
    """A weight with its bias, as the operator passes it on; see `pack`."""

    values: Tensor
    bits: Tensor
    pointers: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


def is_bfloat16(weight: Tensor) -> bool:
    """Return whether bfloat16 holds every value of a weight exactly.

    Example:
        >>> is_bfloat16(torch.tensor([0.5, 1.0])), is_bfloat16(torch.tensor([0.1, 1.0]))
        (True, False)
    """
    return all(torch.equal(rows.bfloat16().to(rows.dtype), rows) for rows in weight.flatten().split(ENTRIES))


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values, the bits and the row pointers of a weight.

    Shapes:
        weight: (out, in). values: (stored entries + in + `SLACK`,), in bfloat16 if that is exact, else float32.
        bits: (out, words), int64; column j is bit j % 64 of word j // 64. pointers: (out + 1,), int32. Stored are the
        nonzeros, and the zeros of a row with few (see `pack_rows`), such as those of an LM head that is not pruned.

    Raises:
        BackendError: more nonzeros than int32 can count.

    Example:
        >>> values, bits, pointers = pack(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        >>> values[:1].tolist(), bits.tolist(), pointers.tolist()
        ([2.0], [[2], [0]], [0, 1, 1])
    """
    dtype = torch.bfloat16 if is_bfloat16(weight) else torch.float32
    return pack_rows(weight, dtype, -(-weight.shape[1] // WORD), lambda rows: rows)


Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Some rows with what is stored, and which entries are -> the stored numbers row after row, how many of each row."""


def pack_rows(
    weight: Tensor,
    dtype: torch.dtype,
    words: int,
    convert: Callable[[Tensor], Tensor],
    store: Store | None = None,
    whole_above: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, bits and row pointers of a weight, a few rows at a time: indexes of all entries would fill memory.

    Args:
        words: of each row of bits.
        convert: some rows of the weight -> their values, zero where nothing is stored.
        store: how the values of some rows are stored; None = one after the other.
        whole_above: share of nonzeros above which all entries of a row are stored: the C++ kernels do not read its
            bits then. None = where its zeros take fewer bytes than its bits.

    Raises:
        BackendError: more nonzeros than int32 can count.
    """
    out, width = weight.shape
    values: list[Tensor] = []
    whole_above = 1 - 1 / (8 * dtype.itemsize) if whole_above is None else whole_above
    counts, bits = torch.zeros(out, dtype=torch.int64), torch.zeros(out, words, dtype=torch.int64)
    for part in row_blocks(out, width):
        rows = convert(weight[part])
        kept = rows != 0
        if store is None:
            kept[kept.sum(1) > width * whole_above, :width] = True
        bits[part] = to_words(kept, words)
        stored, counts[part] = (rows[kept], kept.sum(1)) if store is None else store(rows, kept)
        values.append(stored.to(dtype))
    total = int(counts.sum())
    if total + width + SLACK >= 2**31:
        raise BackendError(f"weights in bits hold fewer than 2^31 nonzeros, and this one has {total}")
    values.append(torch.zeros(width + SLACK, dtype=dtype))
    return torch.cat(values), bits, F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows that hold a few million entries each."""
    step = max(1, ENTRIES // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def to_words(kept: Tensor, words: int) -> Tensor:
    """Return one bit for each entry, in rows of whole words."""
    rows, width = kept.shape
    padded = F.pad(kept, (0, words * WORD - width)).view(rows, words, WORD)
    bits = torch.zeros(rows, words, dtype=torch.int64)
    for place in range(WORD):  # not one product: that would take 64 bytes an entry
        bits |= padded[..., place].to(torch.int64) << place
    return bits


def from_words(bits: Tensor, width: int) -> Tensor:
    """Return what `to_words` was made from: (rows, width), bool."""
    places = torch.arange(WORD)
    kept = torch.empty(bits.shape[0], bits.shape[1] * WORD, dtype=torch.bool)
    for word in range(bits.shape[1]):
        kept[:, word * WORD : (word + 1) * WORD] = (bits[:, word, None] >> places) & 1 != 0
    return kept[:, :width]


def ones(bits: Tensor) -> Tensor:
    """Return how many bits of each word are set.

    Example:
        >>> ones(torch.tensor([0, 7, -1])).tolist()
        [0, 3, 64]
    """
    pairs = bits - (bits >> 1 & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333)
    eights = fours + (fours >> 4) & 0x0F0F0F0F0F0F0F0F
    return eights * 0x0101010101010101 >> 56


def check_bits(
    parts: tuple[Tensor, ...], in_features: int, words: int, sizes: Callable[[Tensor], Tensor] = ones
) -> None:
    """Refuse bits that do not say where the rows of the values begin: the kernels and `unpack` would differ.

    Args:
        parts: values, bits and pointers, perhaps others behind them.
        words: of each row.
        sizes: bits -> places that the values of each word take.

    Raises:
        BackendError: naming what does not fit.
    """
    values, bits, pointers = parts[:3]
    rows = len(bits) if bits.dim() == 2 else -1
    known = (bits.dtype, pointers.dtype) == (torch.int64, torch.int32)
    if not known or bits.shape != (rows, words) or pointers.shape != (rows + 1,):
        raise BackendError(f"bits are (out, {words}) in int64 and pointers (out + 1,) in int32")
    starts = pointers.long()
    if int(starts[0]) != 0 or starts[-1] + in_features + SLACK > values.numel():
        raise BackendError(f"pointers run from {int(starts[0])} to {int(starts[-1])} of {values.numel()} values")
    for part in row_blocks(rows, words):
        if not torch.equal(sizes(bits[part]).sum(1), starts[1:][part] - starts[:-1][part]):
            raise BackendError("the row pointers do not say how many bits of each row are set")
        for word in range(in_features // WORD, words):
            behind = -1 << max(0, in_features - word * WORD)  # columns that there are not
            if bool((bits[part, word] & behind).any()):
                raise BackendError(f"bits are set behind the last of {in_features} columns")


def unpack_rows(values: Tensor, bits: Tensor, pointers: Tensor, width: int) -> Tensor:
    """Return the values in their places: (rows, width), in float32."""
    rows = torch.zeros(bits.shape[0], width)
    for part in row_blocks(*rows.shape):
        kept = from_words(bits[part], width)
        start = int(pointers[part.start])
        rows[part] = rows[part].masked_scatter(kept, values[start : start + int(kept.sum())].to(torch.float32))
    return rows


def unpack(values: Tensor, bits: Tensor, pointers: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the dense weight, in float32."""
    return unpack_rows(values, bits, pointers, in_features)


def _check(weight: BitmaskWeight) -> None:
    values, bits, pointers, _, out_features, in_features = weight
    shapes = (bits.shape == (out_features, -(-in_features // WORD)), pointers.shape == (out_features + 1,))
    dtypes = (values.dtype in (torch.bfloat16, torch.float32), bits.dtype == torch.int64, pointers.dtype == torch.int32)
    if values.dim() != 1 or not all(shapes) or not all(dtypes):
        raise BackendError(
            f"values, bits and pointers of shapes {tuple(values.shape)}, {tuple(bits.shape)}, {tuple(pointers.shape)} "
            f"({values.dtype}, {bits.dtype}, {pointers.dtype}) do not form a weight of {out_features} x {in_features} "
            "as hf_sparse.kernels.bitmask.pack makes it"
        )


_native = NativeBits(
    "hf_sparse_bitmask", _Bitmask, lambda: library(), lambda values: (int(values.dtype == torch.bfloat16),)
)


def _matmul(x: Tensor, weight: BitmaskWeight) -> Tensor:
    if (native := _native(x, weight)) is not None:
        return native
    values, bits, pointers, bias, out_features, in_features = weight
    dense = unpack(values, bits, pointers, out_features, in_features).to(x)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


bitmask_linear = define_all(WeightFormat("bitmask", BitmaskWeight, _matmul, _check, _native.of_known))["linear"]


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, bits, pointers = parts
    return unpack(values, bits, pointers, out_features, in_features)


def _check_parts(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> None:
    check_bits(parts, in_features, -(-in_features // WORD))


def _joins(weights: Sequence[Tensor]) -> bool:
    """Return whether each stays in its type, and its outputs in the groups of four that C++ adds up together."""
    return all(weight.shape[0] % 4 == 0 for weight in weights) and len({is_bfloat16(each) for each in weights}) == 1


register(
    Kernel(
        name="bitmask",
        layout=Layout(("values", "bits", "pointers"), lambda weight, rows: pack(weight), _unpack, check=_check_parts),
        op=without_rows(bitmask_linear),
        isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
        unavailable=why_not_built,
        few_tokens=True,
        joins=_joins,
    )
)
