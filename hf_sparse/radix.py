"""Exact top-k over scores that are spread over processes: counts travel, scores do not.

The bits of a float, read as a whole number, have the order of the floats. Counting their upper and then their lower
half (a radix selection in two passes of 65536 counts) finds the value at the cut; the counts are summed over the
processes, so that no process ever holds the scores of another. Equal scores at the cut are kept in the order of the
whole tensors, which is that of one process with all of them.

Source: Alabi et al. 2012, "Fast k-Selection Algorithms for Graphics Processing Units", section 4 (radix select).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import SparsityError

_HALF = 1 << 16


def keep_highest_across(
    shards: Sequence[Tensor], keep: int, group: dist.ProcessGroup | None = None
) -> tuple[list[Tensor], float | None]:
    """Return masks for this process's shards that keep exactly `keep` scores over all shards of all processes.

    Every process has to call it, with its shards of the same tensors in the same order. The shards of a tensor follow
    each other in the order of the ranks, as rows that are divided among processes do; then the masks are those that
    `keep_highest` makes of the whole tensors.

    Args:
        shards: float tensors of any shape, also empty ones, on one device; float64 is compared as float32.
        keep: how many to keep over all processes together.
        group: the processes; None = all.

    Returns:
        One bool tensor for each shard, and the lowest score kept anywhere (None if all or none are kept).

    Raises:
        SparsityError: on every process, if there are NaN among the scores of one.
    """
    device = shards[0].device
    flat = [_ordered(shard) for shard in shards]
    facts = torch.tensor(
        [sum(shard.numel() for shard in shards), sum(int(shard.isnan().any()) for shard in shards)], device=device
    )
    dist.all_reduce(facts, group=group)
    total, broken = facts.tolist()
    if not 0 < keep < total:
        return [torch.full_like(shard, keep > 0, dtype=torch.bool) for shard in shards], None
    if broken:
        raise SparsityError(
            "cannot select by importance: there are NaN among the scores. The training has diverged; lower the "
            "learning rate, or look at the loss before this step"
        )
    upper, left = _bucket([values >> 16 for values in flat], keep, group)
    same = [(values & (_HALF - 1))[values >> 16 == upper - _HALF // 2] - _HALF // 2 for values in flat]
    lower, left = _bucket(same, left, group)
    cut = (upper - _HALF // 2) * _HALF + lower
    masks = [values > cut for values in flat]
    _keep_ties(masks, [values == cut for values in flat], left, group)
    return [mask.view(shard.shape) for mask, shard in zip(masks, shards, strict=True)], _value(cut)


def _ordered(scores: Tensor) -> Tensor:
    """Return whole numbers (int32) in the order of the scores; both zeros are the same."""
    bits = (scores.detach().reshape(-1).float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(number: int) -> float:
    """Return the score that `_ordered` makes this number of."""
    bits = number ^ ((number >> 31) & 0x7FFFFFFF)
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _bucket(parts: Sequence[Tensor], k: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the bucket (from 0) of the k-th highest of numbers from -32768 to 32767, and its rank in the bucket."""
    counts = torch.zeros(_HALF, dtype=torch.int64, device=parts[0].device)
    for part in parts:
        counts += torch.bincount(part + _HALF // 2, minlength=_HALF)
    dist.all_reduce(counts, group=group)
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, k))
    above = int(from_top[index - 1]) if index else 0
    return _HALF - 1 - index, k - above


def _keep_ties(masks: list[Tensor], ties: list[Tensor], left: int, group: dist.ProcessGroup | None) -> None:
    """Keep the first `left` of the entries at the cut: tensor by tensor, in each rank by rank."""
    own = torch.stack([tie.sum() for tie in ties])
    everyone = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    counts = torch.stack(everyone, 1)  # (tensors, ranks)
    before = (counts.flatten().cumsum(0).view_as(counts) - counts)[:, dist.get_rank(group)].tolist()
    for mask, tie, first in zip(masks, ties, before, strict=True):
        if first < left:
            mask |= tie & (tie.cumsum(0) <= left - first)
