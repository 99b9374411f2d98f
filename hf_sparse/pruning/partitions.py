"""The partitions that DeepSpeed ZeRO-3 has of parameters: each process a share of the flat weight, divided as it is.

Only calls that DeepSpeed documents reach them: `safe_get_local_fp32_param` and `safe_set_local_fp32_param`, and
`partition` and `all_gather` of a parameter. None of them but the last is a collective.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import RecipeError
from .shards import local, whole


def is_partitioned(parameter: Tensor | None) -> bool:
    """Return whether DeepSpeed ZeRO-3 has partitioned a parameter, which then has shape (0,) between passes.

    Example:
        >>> is_partitioned(torch.nn.Parameter(torch.zeros(2)))
        False
    """
    return hasattr(parameter, "ds_id")


def check_partition(name: str, parameter: Any) -> None:
    """Raise `RecipeError` if the partition of a parameter is not in memory, or has copies that are not known here."""
    zero = getattr(parameter, "_z3_optimizer", None)
    if zero is None:
        raise RecipeError(
            f"'{name}' is partitioned by DeepSpeed ZeRO-3, and no optimizer of DeepSpeed has it: masks are made of the "
            "float32 weights there. Give deepspeed.initialize the optimizer, with Pruner.parameter_groups()"
        )
    settings = {
        "offloading to NVMe": getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False),
        "zenflow": getattr(zero, "zenflow", False),
        "zero_hpz_partition_size": getattr(parameter, "ds_secondary_tensor", None) is not None,
        "zero_quantized_weights": hasattr(parameter.ds_tensor, "ds_quant_scale"),
    }
    found = [setting for setting, used in settings.items() if used]
    if found:
        raise RecipeError(
            f"pruning does not work with {found[0]} of DeepSpeed ZeRO-3, with which it has weights elsewhere than in "
            "the partitions in memory, where the zeros are. Leave it out"
        )


def read_share(parameter: Any) -> Tensor:
    """Return a copy of the share of this process, of the float32 weight if that is trained; flat, padded at the end."""
    master = importlib.import_module("deepspeed.utils").safe_get_local_fp32_param(parameter)
    share: Tensor = parameter.ds_tensor if master is None else master
    return share.detach().clone()


def write_master(parameter: Any, share: Tensor) -> None:
    """Write to the share of the float32 weight, within a step: DeepSpeed then copies it to where it computes."""
    importlib.import_module("deepspeed.utils").safe_set_local_fp32_param(parameter, share)


def write_share(parameter: Any, share: Tensor) -> None:
    """Write to the share of a weight, and to all that DeepSpeed has of it between steps; every process has to call."""
    write_master(parameter, share)
    parameter.ds_tensor.data.copy_(share)
    if parameter.ds_status.name == "AVAILABLE":  # small ones stay gathered (stage3_param_persistence_threshold)
        parameter.partition()
        parameter.all_gather()


def to_rows(tensor: Tensor, parameter: Any) -> DTensor:
    """Divide by rows what is whole on every process."""
    return distribute_tensor(tensor, _mesh(parameter), [Shard(0)], src_data_rank=None)


def share_of_rows(rows: DTensor, parameter: Any) -> Tensor:
    """Return the share of the flat partition of what is divided by rows; its padding is 1."""
    if len(rows) % _mesh(parameter).size() == 0:
        return local(rows).flatten()
    flat = to_rows(whole(rows).flatten(), parameter).to_local()
    return torch.cat([flat, flat.new_ones(parameter.ds_tensor.numel() - len(flat))])


def rows_of_share(share: Tensor, parameter: Any, shape: tuple[int, ...]) -> DTensor:
    """Return what is divided as the flat partition divided by rows."""
    mesh, size, count = _mesh(parameter), share.numel(), torch.Size(shape).numel()
    if shape[0] % mesh.size() == 0:
        return DTensor.from_local(share.view(-1, *shape[1:]), mesh, [Shard(0)], run_check=False)
    own = min(max(count - mesh.get_local_rank() * size, 0), size)
    flat = DTensor.from_local(share[:own], mesh, [Shard(0)], run_check=False, shape=torch.Size((count,)), stride=(1,))
    return to_rows(flat.full_tensor().view(shape), parameter)


def _mesh(parameter: Any) -> DeviceMesh:
    return _mesh_of(parameter.ds_process_group, parameter.device.type)


@lru_cache
def _mesh_of(group: dist.ProcessGroup, device: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device)
