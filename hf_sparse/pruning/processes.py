"""Sums over all processes of a program, for what each of them measures on batches of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def are_several() -> bool:
    """Return whether there is a default group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(tensor: Tensor) -> None:
    """Add up a tensor over all processes, in place; alone, do nothing. Every process has to call it."""
    if are_several():
        moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor  # which takes nothing that is on the CPU
        dist.all_reduce(moved)
        tensor.copy_(moved)


def sum_of_counts(count: int) -> int:
    """Return the sum of a count over all processes.

    Example:
        >>> sum_of_counts(3)
        3
    """
    total = torch.tensor(count)
    sum_over_processes(total)
    return int(total)


def have_same(value: Any) -> bool:
    """Return whether all processes have the same value.

    Example:
        >>> have_same({"a": 1})
        True
    """
    if not are_several():
        return True
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)
