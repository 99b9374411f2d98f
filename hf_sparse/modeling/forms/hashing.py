"""The hash of `HashedLinear`: a bucket and a sign for each entry of a matrix, from its row, its column and a seed.

Integers of 64 bits that wrap around, so that every device and every version of torch gives the same. `mix` is the
finalizer of SplitMix64. Of row i and column j it makes the odd numbers

    r_i = mix(seed + (2i + 1) g) >> 33 | 1        c_j = mix(seed + (2j + 2) g) >> 33 | 1        g = 0x9E3779B97F4A7C15

and of these, for K buckets, the slot `s(i, j) = 2K ((r_i c_j mod 2^47) >> 16) >> 31` in [0, 2K): multiplication and
high bits, which is universal hashing for a random odd factor (Dietzfelbinger et al. 1997). Entry (i, j) is bucket s
with sign +1 for s < K, and bucket s - K with sign -1 otherwise. Only rows and columns are mixed; each entry takes five
cheap operations.
"""

from __future__ import annotations

from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

MAX_BUCKETS = 2**31
"""Slots are 32 bits of the hash times 2K, which must stay below 2^63."""


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned integers do; torch repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def row_keys(rows: Tensor, seed: int) -> Tensor:
    """Return `r_i` of row numbers, int64."""
    return _shifted(_mixed((2 * rows + 1) * _GOLDEN + seed), 33) | 1


def column_keys(columns: Tensor, seed: int) -> Tensor:
    """Return `c_j` of column numbers, int64."""
    return _shifted(_mixed((2 * columns + 2) * _GOLDEN + seed), 33) | 1


def slots(rows: Tensor, columns: Tensor, buckets: int) -> Tensor:
    """Return the slot of each entry.

    Args:
        rows: keys of the rows, `(rows,)`.
        columns: keys of the columns, `(columns,)`.

    Shapes: -> `(rows, columns)`, int64 in [0, 2 buckets).

    Example:
        >>> import torch
        >>> rows, columns = row_keys(torch.arange(2), 7), column_keys(torch.arange(3), 7)
        >>> slots(rows, columns, 4).shape
        torch.Size([2, 3])
    """
    found = rows[:, None] * columns
    found >>= 16
    found &= (1 << 31) - 1
    found *= 2 * buckets
    found >>= 31
    return found
