"""Tensors that are divided over processes (DTensor): placed alike, gathered one at a time, worked on where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor as `other` is: divided like it if that is sharded, else whole.

    Args:
        tensor: sharded, or whole on every process.
    """
    if not isinstance(other, DTensor):
        return whole(tensor)
    if isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.detach(), other.device_mesh, other.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every process that has a shard of it has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_as(tensor: Tensor, other: DTensor) -> DTensor:
    """Return the mean of what each process has, divided over the processes as `other` is; none gets all of it.

    Args:
        tensor: whole on every process, of the shape of `other`.
    """
    mesh = other.device_mesh
    terms = DTensor.from_local(tensor, mesh, [Partial()] * mesh.ndim, run_check=False)
    mean: DTensor = terms.redistribute(placements=other.placements)
    mean.div_(mesh.size())
    return mean


def replicated(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that every process has as a DTensor on the processes of `other`, if that is one."""
    if not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)


def row_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """Return the processes over which the rows of a tensor are divided in order; None if it is not placed like that."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(tensor.placements) if placement != Replicate()]
    if len(dims) != 1 or tensor.placements[dims[0]] != Shard(0):
        return None
    return tensor.device_mesh.get_group(dims[0])


def rows_per_process(tensor: Tensor) -> int:
    """Return how many rows a process has, the last ones fewer; 0 if rows are not what is divided."""
    group = row_group(tensor)
    return 0 if group is None else -(-len(tensor) // group.size())


def on_shards(function: Callable[[Tensor], Tensor], tensor: DTensor, rows: int) -> DTensor:
    """Apply a function to the rows that each process has, and put the results together as rows of one tensor.

    Args:
        function: local rows to local rows; of no rows it is not called.
        rows: of the result. The shards of the result have to be those of a tensor with so many rows.
    """
    local = tensor.to_local()
    sample = function(local) if len(local) else function(local.new_zeros((rows_per_process(tensor), *local.shape[1:])))
    done = sample if len(local) else sample[:0]
    shape = torch.Size((rows, *done.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        done.contiguous(), tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


def by_rows(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function that looks at each row alone, and gives as many rows: to the shards of a tensor that has some.

    Example:
        >>> by_rows(lambda rows: rows > rows.mean(1, keepdim=True), torch.tensor([[2.0, 1.0]])).tolist()
        [[True, False]]
    """
    if isinstance(tensor, DTensor) and row_group(tensor) is not None:
        return on_shards(function, tensor, len(tensor))
    return function(whole(tensor))


def total(count: Callable[[Tensor], int], tensors: Iterable[Tensor]) -> int:
    """Return a count over all entries of tensors; each process counts its own shards."""
    everywhere = 0
    here: dict[dist.ProcessGroup, tuple[int, torch.device]] = {}
    for tensor in tensors:
        group = row_group(tensor)
        if group is None:
            everywhere += count(whole(tensor.detach()))
        else:
            rows = local(tensor)
            here[group] = here.get(group, (0,))[0] + count(rows), rows.device
    for group, (number, device) in here.items():
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, group=group)
        everywhere += int(found)
    return everywhere


def count_true(masks: Iterable[Tensor]) -> int:
    """Return how many entries of bool tensors are True, over all processes where they are sharded.

    Example:
        >>> count_true([torch.tensor([True, False]), torch.tensor([True])])
        2
    """
    return total(lambda mask: int(torch.count_nonzero(mask)), masks)


def any_nan(tensors: Iterable[Tensor]) -> bool:
    """Return whether there are NaN among tensors, on any of the processes that they are divided over."""
    return total(lambda tensor: int(tensor.isnan().any()), tensors) > 0


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
