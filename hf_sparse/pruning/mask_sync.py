"""All processes of a training hold the same masks: exchanged as one number, compared, an error otherwise."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import SparsityError
from .shards import whole


def digest(masks: Iterable[Tensor]) -> int:
    """Return a number that is the same for the same masks, and almost never for others.

    Args:
        masks: bool tensors of any shape; every process has to ask for the number of sharded ones.

    Example:
        >>> digest([torch.tensor([True, False])]) == digest([torch.tensor([False, True])])
        False
    """
    number = 0
    for mask in masks:
        number = zlib.crc32(whole(mask.detach()).cpu().contiguous().numpy().data, number)
    return number


def check_same_masks(masks: Iterable[Tensor], when: str) -> None:
    """Raise if the processes of the default group hold different masks; with one process, do nothing.

    Every process has to call it at the same point.

    Args:
        when: for the message, as in "step 100".

    Raises:
        SparsityError: on every process, naming those that differ from process 0.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    masks = [mask for mask in masks if not isinstance(mask, DTensor)]  # a sharded mask is one for all processes
    ours = torch.tensor([digest(masks)], dtype=torch.int64, device=masks[0].device if masks else "cpu")
    gathered = [torch.zeros_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, ours)
    numbers = [int(number) for number in gathered]
    different = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if different:
        raise SparsityError(
            f"at {when} the masks of process {', '.join(map(str, different))} differ from those of process 0. The "
            "processes no longer train the same model: are their models, data types and hf_sparse versions the same, "
            "and does every gradient go through DDP?"
        )
