"""What the zeros of a dense tensor look like: meant or not, and their pattern (rows, columns, n:m, blocks, elements).

A pattern is recognized by what it leaves: the rows, groups or blocks that are kept are nearly full. `_FULL` allows for
weights that became 0 by themselves.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .codecs.base import Array, as_bits

MIN_ZEROS = 0.1
"""Weights with fewer zeros are left as they are: their zeros are chance, not intent."""

_FULL = 0.98
_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
_NM = ((4, 8, 16, 32), 0.95)
_SIDES = (64, 32, 16, 8, 4, 1)
_SMALLEST = ((1, 4), (4, 1))
"""Every larger block consists of these."""


def looks_sparse(key: str, tensor: Tensor) -> bool:
    """Return whether the zeros of a dense tensor look like intent.

    Example:
        >>> import torch
        >>> looks_sparse("layer.0.query.weight", torch.eye(4)), looks_sparse("word_embeddings.weight", torch.eye(4))
        (True, False)
    """
    if tensor.ndim < 2 or not key.endswith(".weight") or not tensor.numel() or tensor.is_meta:
        return False
    if any(word in key.lower() for word in _EMBEDDINGS):
        return False
    zeros = tensor.numel() - int(np.count_nonzero(as_bits(tensor.detach().cpu()).numpy()))
    return zeros >= MIN_ZEROS * tensor.numel()


def find_pattern(tensor: Tensor) -> str:
    """Return the coarsest pattern that explains the zeros of a tensor, as a recipe would name it.

    Args:
        tensor: two or more dimensions; rows are its first.

    Returns:
        "dense" (no zeros), "zero" (nothing else), "row", "column", "row+column", "2:4" and the like, "block RxC", or
        "element".

    Example:
        >>> import torch
        >>> find_pattern(torch.eye(8).repeat_interleave(4, 1))
        'block 1x4'
        >>> find_pattern(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 4.0, 0.0]]).repeat(8, 8))
        '2:4'
    """
    kept = as_bits(tensor.detach().cpu()).numpy().reshape(tensor.shape[0], -1) != 0
    count = int(kept.sum())
    if count in (0, kept.size):
        return "dense" if count else "zero"
    rows, columns = int(kept.any(axis=1).sum()), int(kept.any(axis=0).sum())
    lines = {"row": (rows, kept.shape[1]), "column": (kept.shape[0], columns), "row+column": (rows, columns)}
    for name, (height, width) in lines.items():
        if count >= _FULL * height * width:
            return name
    return _of_blocks(kept, count) or _of_groups(kept, count) or "element"


def _of_blocks(kept: Array, count: int) -> str | None:
    if not any(_consists_of(kept, count, rows, cols) for rows, cols in _SMALLEST):
        return None
    sizes = sorted(((rows, cols) for rows in _SIDES for cols in _SIDES if rows * cols > 1), key=math.prod, reverse=True)
    return next((f"block {rows}x{cols}" for rows, cols in sizes if _consists_of(kept, count, rows, cols)), None)


def _consists_of(kept: Array, count: int, rows: int, cols: int) -> bool:
    if kept.shape[0] % rows or kept.shape[1] % cols:
        return False
    blocks = kept.reshape(kept.shape[0] // rows, rows, kept.shape[1] // cols, cols).any(axis=(1, 3))
    return not blocks.all() and count >= _FULL * int(blocks.sum()) * rows * cols


def _of_groups(kept: Array, count: int) -> str | None:
    sizes, share = _NM
    for m in sizes:
        if kept.shape[1] % m:
            continue
        most = int(kept.reshape(-1, m).sum(axis=1).max())
        if most < m and count >= share * most * (kept.size // m):
            return f"{most}:{m}"
    return None
