"""Exact top-k over many scores without sorting them: a sample brackets the cut, one pass counts, ties go by index.

Sorting 10 million scores costs seconds and `torch.kthvalue` tenths of a second on a CPU; selection runs at every step
of training, so it has to cost a few passes over memory. The bracket comes from a fixed pseudo-random sample (Floyd and
Rivest, "Expected time bounds for selection", CACM 1975); when the true cut falls outside, a full selection answers. On
other devices a stable sort is fast enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import SparsityError

_SAMPLE = 1 << 14
_SMALL = 1 << 15

Array = np.ndarray[Any, np.dtype[Any]]


def keep_highest(scores: Sequence[Tensor], keep: int) -> tuple[list[Tensor], float | None]:
    """Return masks that keep exactly `keep` scores, the highest, and the value at the cut.

    Equal scores at the cut are kept in order of their index (tensor by tensor), so that the count is exact even when
    all scores are the same, and every process that holds the same scores makes the same masks.

    Args:
        scores: float tensors of any shape; where they lie on several devices, the first one compares them.
        keep: how many to keep over all tensors together.

    Returns:
        One bool tensor for each tensor of scores, and the lowest score kept (None if all or none are kept).

    Raises:
        SparsityError: if there are NaN among the scores and not all or none are kept.

    Example:
        >>> masks, cut = keep_highest([torch.zeros(4), torch.ones(2)], 3)
        >>> [mask.tolist() for mask in masks], cut
        ([[True, False, False, False], [True, True]], 0.0)
    """
    total = sum(tensor.numel() for tensor in scores)
    if keep <= 0:
        return [torch.zeros_like(tensor, dtype=torch.bool) for tensor in scores], None
    if keep >= total:
        return [torch.ones_like(tensor, dtype=torch.bool) for tensor in scores], None
    refuse_nan(scores)
    flat = [tensor.detach().reshape(-1).to(scores[0].device, torch.float32) for tensor in scores]
    masks, cut = _on_cpu(flat, keep) if flat[0].device.type == "cpu" else _on_device(flat, keep)
    return [mask.view(tensor.shape).to(tensor.device) for mask, tensor in zip(masks, scores, strict=True)], cut


def refuse_nan(scores: Sequence[Tensor]) -> None:
    """Raise `SparsityError` if there are NaN among the scores.

    The maximum passes NaN on, and costs a fraction of a comparison of all scores; the ranks alone would not tell.
    """
    highest = [tensor.detach().amax().to(scores[0].device) for tensor in scores if tensor.numel()]
    if highest and bool(torch.stack(highest).isnan().any()):
        raise SparsityError(
            "cannot select by importance: there are NaN among the scores. The training has diverged; lower the "
            "learning rate, or look at the loss before this step"
        )


def kth_highest(arrays: Sequence[Array], k: int) -> float:
    """Return the k-th highest value over all arrays together.

    Args:
        arrays: 1-D floats.
        k: rank, from 1 (the maximum) to the number of values.

    Example:
        >>> kth_highest([np.array([3.0, 1.0]), np.array([2.0])], 2)
        2.0
    """
    total = sum(array.size for array in arrays)
    if not 1 <= k <= total:
        raise ValueError(f"k={k} is not between 1 and {total}")
    if total > _SMALL:
        low, high = _bracket(arrays, k, total)
        above = sum(int(np.count_nonzero(array > high)) for array in arrays)
        inside = np.concatenate([array[(array >= low) & (array <= high)] for array in arrays])
        if above < k <= above + inside.size:
            return low if low == high else _kth(inside, k - above)
    return _kth(np.concatenate(arrays), k)


def _kth(values: Array, k: int) -> float:
    rank = values.size - k
    return float(np.partition(values, rank)[rank])


def _bracket(arrays: Sequence[Array], k: int, total: int) -> tuple[float, float]:
    """Return two values that enclose the k-th highest with overwhelming probability."""
    # The generator is seeded anew each time, so that every rank and every resumed run draws the same sample and
    # the training's own random numbers are left alone.
    generator = np.random.Generator(np.random.PCG64(0))
    shares = [max(1, _SAMPLE * array.size // total) for array in arrays if array.size]
    filled = [array for array in arrays if array.size]
    drawn = [array[generator.integers(array.size, size=n)] for array, n in zip(filled, shares, strict=True)]
    sample = np.sort(np.concatenate(drawn))[::-1]
    rank = k / total * sample.size
    margin = 5.0 * (rank * (1 - k / total)) ** 0.5 + 8.0
    high = float(sample[int(rank - margin)]) if rank > margin else float("inf")
    low = float(sample[int(rank + margin)]) if rank + margin < sample.size else float("-inf")
    return low, high


def _on_cpu(flat: Sequence[Tensor], keep: int) -> tuple[list[Tensor], float]:
    arrays = [tensor.numpy() for tensor in flat]  # numpy compares and counts several times faster than torch here
    cut = kth_highest(arrays, keep)
    masks = [array > cut for array in arrays]
    left = keep - sum(int(np.count_nonzero(mask)) for mask in masks)
    for array, mask in zip(arrays, masks, strict=True):
        if left <= 0:
            break
        tied = np.flatnonzero(array == cut)[:left]
        mask[tied] = True
        left -= tied.size
    return [torch.from_numpy(mask) for mask in masks], cut


def _on_device(flat: Sequence[Tensor], keep: int) -> tuple[list[Tensor], float]:
    values, order = torch.cat(list(flat)).sort(descending=True, stable=True)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order[:keep]] = True
    return list(mask.split([tensor.numel() for tensor in flat])), float(values[keep - 1])
