"""Exact top-k by counting instead of sorting: on a GPU, and over scores that are spread over processes.

The bits of a float, read as a whole number, have the order of the floats. Counting their upper and then their lower
half (a radix selection in two passes of 65536 counts) finds the value at the cut. Nothing is concatenated; over several
processes the counts travel and the scores do not, so that none ever holds the scores of another. Equal scores at the
cut are kept in the order of the whole tensors, which is that of one process with all of them.

Source: Alabi et al. 2012, "Fast k-Selection Algorithms for Graphics Processing Units", section 4 (radix select).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import SparsityError

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

    def add_up(counts: Tensor) -> None:
        dist.all_reduce(counts, group=group)

    def before(own: Tensor) -> list[int]:
        everyone = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, own, group=group)
        counts = torch.stack(everyone, 1)  # (tensors, ranks)
        first: list[int] = (counts.flatten().cumsum(0).view_as(counts) - counts)[:, dist.get_rank(group)].tolist()
        return first

    return _keep_highest(shards, keep, add_up, before)


def keep_highest_alone(scores: Sequence[Tensor], keep: int) -> tuple[list[Tensor], float]:
    """Return masks that keep exactly `keep` scores over all tensors, and the lowest score kept.

    Args:
        scores: float tensors of any shape on one device, without NaN; float64 is compared as float32.
        keep: how many, at least 1 and fewer than there are.

    Example:
        >>> keep_highest_alone([torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])], 2)
        ([tensor([False,  True]), tensor([ True, False])], 3.0)
    """
    return _keep_highest(scores, keep, lambda counts: None, lambda own: (own.cumsum(0) - own).tolist())


def _keep_highest(
    tensors: Sequence[Tensor], keep: int, add_up: Callable[[Tensor], None], before: Callable[[Tensor], list[int]]
) -> tuple[list[Tensor], float]:
    """Select.

    Args:
        add_up: sums counts over all who hold scores, in place.
        before: of how many entries at the cut each tensor has here, how many come before these in the whole order.
    """
    flat = [_ordered(tensor) for tensor in tensors]
    upper, left = _bucket((values >> 16 for values in flat), keep, add_up, flat[0].device)
    same = ((values & (_HALF - 1))[values >> 16 == upper - _HALF // 2] - _HALF // 2 for values in flat)
    lower, left = _bucket(same, left, add_up, flat[0].device)
    cut = (upper - _HALF // 2) * _HALF + lower
    ties = torch.stack([torch.count_nonzero(values == cut) for values in flat])
    masks = []
    for values, tie_count, first, tensor in zip(flat, ties.tolist(), before(ties), tensors, strict=True):
        mask = values > cut
        if tie_count and first < left:  # the first `left` of the entries at the cut are kept
            tie = values == cut
            mask |= tie if first + tie_count <= left else tie & (tie.cumsum(0) <= left - first)
        masks.append(mask.view(tensor.shape))
    return masks, _value(cut)


def _ordered(scores: Tensor) -> Tensor:
    """Return whole numbers (int32) in the order of the scores; both zeros are the same."""
    bits = (scores.detach().reshape(-1).float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(number: int) -> float:
    """Return the score that `_ordered` makes this number of."""
    bits = number ^ ((number >> 31) & 0x7FFFFFFF)
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _bucket(parts: Iterable[Tensor], k: int, add_up: Callable[[Tensor], None], device: torch.device) -> tuple[int, int]:
    """Return the bucket (from 0) of the k-th highest of numbers from -32768 to 32767, and its rank in the bucket."""
    counts = torch.zeros(_HALF, dtype=torch.int64, device=device)
    for part in parts:
        counts += torch.bincount(part + _HALF // 2, minlength=_HALF)
    add_up(counts)
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, k))
    above = int(from_top[index - 1]) if index else 0
    return _HALF - 1 - index, k - above
