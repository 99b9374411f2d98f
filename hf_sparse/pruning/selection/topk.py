"""Exact top-k over many scores without sorting them: a sample brackets the cut, one pass counts, ties go by index.

Sorting 10 million scores costs seconds and `torch.kthvalue` tenths of a second on a CPU; selection runs at every step
of training, so it has to cost a few passes over memory. The bracket comes from a fixed pseudo-random sample (Floyd and
Rivest, "Expected time bounds for selection", CACM 1975); when the true cut falls outside, a full selection decides.
Other devices count (`radix`), which needs no copy of all scores in one piece and no sort either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import SparsityError
from ..shards import any_nan, row_group
from .topk_radix import keep_highest_across, keep_highest_alone

_SAMPLE = 1 << 14
_SMALL = 1 << 15
_ALL = (float("-inf"), float("inf"))

Array = np.ndarray[Any, np.dtype[Any]]


def keep_highest(scores: Sequence[Tensor], keep: int) -> tuple[list[Tensor], float | None]:
    """Return masks that keep exactly `keep` scores, the highest, and the value at the cut.

    Equal scores at the cut are kept in order of their index (tensor by tensor), so that the count is exact even when
    all scores are the same, and every process that holds the same scores makes the same masks.

    Args:
        scores: float tensors of any shape; where they lie on several devices, the first one compares them. All may be
            sharded over the same processes, rows divided in order (`fully_shard`): then so are the masks, every process
            has to call this, and none gathers scores.
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
    if scores and isinstance(scores[0], DTensor):
        return _on_shards(cast(Sequence[DTensor], scores), keep)
    total = sum(tensor.numel() for tensor in scores)
    if keep <= 0:
        return [torch.zeros_like(tensor, dtype=torch.bool) for tensor in scores], None
    if keep >= total:
        return [torch.ones_like(tensor, dtype=torch.bool) for tensor in scores], None
    refuse_nan(scores)
    flat = [tensor.detach().reshape(-1).to(scores[0].device, torch.float32) for tensor in scores]
    masks, cut = (_on_cpu if flat[0].device.type == "cpu" else keep_highest_alone)(flat, keep)
    return [mask.view(tensor.shape).to(tensor.device) for mask, tensor in zip(masks, scores, strict=True)], cut


def refuse_nan(scores: Sequence[Tensor]) -> None:
    """Raise `SparsityError` if there are NaN among the scores.

    The maximum passes NaN on, and costs a fraction of a comparison of all scores; the ranks alone would not tell.
    """
    if any(isinstance(tensor, DTensor) for tensor in scores):
        broken = any_nan(scores)
    else:
        highest = [tensor.detach().amax().to(scores[0].device) for tensor in scores if tensor.numel()]
        broken = bool(highest) and bool(torch.stack(highest).isnan().any())
    if broken:
        raise SparsityError(
            "cannot select by importance: there are NaN among the scores. The training has diverged; lower the "
            "learning rate, or look at the loss before this step"
        )


def _kth(values: Array, k: int) -> float:
    """Return the k-th highest value, k from 1 (the maximum) on."""
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
    total = sum(array.size for array in arrays)
    low, high = _bracket(arrays, keep, total) if total > _SMALL else _ALL
    masks, near, left = _split(arrays, keep, low, high)
    if not 0 < left <= sum(int(np.count_nonzero(mask)) for mask in near):
        low, high = _ALL
        masks, near, left = _split(arrays, keep, low, high)
    if low < high and sum(int(np.count_nonzero(mask)) for mask in near) > total // 8:
        # Seldom but slow: very many scores are equal to the lower end, as those of dead neurons are.
        inside = [np.greater(array > low, mask) for array, mask in zip(arrays, masks, strict=True)]
        count = sum(int(np.count_nonzero(mask)) for mask in inside)
        if left > count:
            for mask, part, rest in zip(masks, inside, near, strict=True):
                mask |= part
                rest &= ~part
            left, high = left - count, low
        else:
            near = inside
    if low == high:
        return _with_ties(masks, (np.flatnonzero(mask) for mask in near), left), low
    # Few lie near the cut, so that all that follows looks at them alone.
    places = [np.flatnonzero(mask) for mask in near]
    values = [array[place] for array, place in zip(arrays, places, strict=True)]
    cut = _cut(np.concatenate(values), left, low, high)
    for mask, place, value in zip(masks, places, values, strict=True):
        higher = place[value > cut]
        mask[higher] = True
        left -= higher.size
    ties = (place[value == cut] for place, value in zip(places, values, strict=True))
    return _with_ties(masks, ties, left), cut


def _cut(values: Array, k: int, low: float, high: float) -> float:
    """Return the k-th highest of values from low to high, many of which may be equal to one of the two.

    A value that many scores have becomes an end of the bracket, and partitioning many equal values takes seconds.
    """
    highest = int(np.count_nonzero(values == high))
    if k <= highest:
        return high
    between = values[(values > low) & (values < high)]
    return _kth(between, k - highest) if k - highest <= between.size else low


def _split(arrays: Sequence[Array], keep: int, low: float, high: float) -> tuple[list[Array], list[Array], int]:
    """Return what lies above the bracket, what lies in it, and how many of these are to be kept."""
    above = [array > high for array in arrays]
    near = [np.greater(array >= low, mask) for array, mask in zip(arrays, above, strict=True)]
    return above, near, keep - sum(int(np.count_nonzero(mask)) for mask in above)


def _with_ties(masks: list[Array], ties: Iterable[Array], left: int) -> list[Tensor]:
    """Keep the first `left` of the entries at the cut, array by array."""
    for mask, places in zip(masks, ties, strict=True):
        mask[places[:left]] = True
        left -= min(left, places.size)
        if not left:
            break
    return [torch.from_numpy(mask) for mask in masks]


def _on_shards(scores: Sequence[DTensor], keep: int) -> tuple[list[Tensor], float | None]:
    group = row_group(scores[0])
    for tensor in scores:
        # Columns would not be in the order in which ties are kept.
        if group is None or row_group(tensor) != group:
            raise SparsityError(
                f"cannot select among scores that are placed as {tensor.placements} on {tensor.device_mesh}: only rows "
                "divided over one dimension of processes (as fully_shard does), with copies over the others"
            )
    masks, cut = keep_highest_across([tensor.to_local() for tensor in scores], keep, group)
    return [
        DTensor.from_local(
            mask, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        for mask, tensor in zip(masks, scores, strict=True)
    ], cut
