"""Keep groups by the chunk: of each unit a multiple of some number, as kernels and hardware want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..shards import whole


def in_multiples(
    scores: Sequence[Tensor], multiples: Sequence[int], choose: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Return which groups to keep, so many of each unit that it is a multiple, or all.

    Groups are taken in the order of their scores, so many at a time, and such a chunk has the mean of their scores.

    Args:
        scores: of the groups of each unit, in one dimension where a multiple is above 1.
        multiples: of each unit.
        choose: returns which chunks to keep, given the scores of those of each unit, highest first.

    Returns:
        A bool tensor for each unit.

    Example:
        >>> from hf_sparse.pruning.selection import Uniform
        >>> scores = [torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0])]
        >>> in_multiples(scores, [2], lambda chunks: Uniform().select(chunks, 0.4))[0].tolist()
        [True, False, True, False, False]
    """
    if all(multiple == 1 for multiple in multiples):
        return choose(list(scores))
    chunks, orders = [], []
    for tensor, multiple in zip(scores, multiples, strict=True):
        values, order = whole(tensor.detach()).sort(descending=True, stable=True)  # the lower index of equals first
        chunks.append(torch.stack([part.mean() for part in values.split(multiple)]))
        orders.append(order)
    kept = []
    for mask, order, multiple in zip(choose(chunks), orders, multiples, strict=True):
        of_ranks = mask.repeat_interleave(multiple)[: len(order)].to(order.device)
        kept.append(torch.zeros_like(of_ranks).scatter_(0, order, of_ranks))
    return kept
