"""Masked weights of a model under `fully_shard` are freed between forward and backward pass, as gathered ones are.

Autograd keeps what a layer multiplies by, for the gradient of its input: here a tensor of the size of the whole weight,
on every process and for every layer. `fully_shard` frees the memory of what it has gathered after the forward pass of a
block, and gathers it again before its backward pass. What masks have made of it is freed and made again with it.

Where what autograd keeps goes through hooks (activation checkpointing, offload to the CPU), those decide.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.masked_values import mask_values
from .shards import placed_as, whole


def free_between_passes(module: nn.Module, masked: Any) -> None:
    """Free what a mask makes in forward passes of a module until their backward pass.

    Args:
        masked: the mask, which notes in `made` what it has made.
    """
    if isinstance(module, nn.Embedding):  # whose backward pass reads no weight
        return
    module.register_forward_pre_hook(partial(_begin, masked))
    module.register_forward_hook(partial(_end, masked), always_call=True)


def _begin(masked: Any, *_: Any) -> None:
    masked.made = None if torch.compiler.is_compiling() else []


def _end(masked: Any, module: nn.Module, inputs: Any, output: Any) -> None:
    made, masked.made = masked.made, None
    if not made or not isinstance(output, Tensor) or not output.requires_grad or _others_decide():
        return
    for weight in made:
        memory = weight.untyped_storage()
        if memory.data_ptr() == output.untyped_storage().data_ptr():
            continue
        # No hook holds the tensor, which holds hooks: the cycle would never be freed.
        output.register_hook(partial(_fill, masked, module, memory, memory.nbytes(), weight.dtype))
        if weight.requires_grad:
            weight.register_hook(partial(_free, memory))
        memory.resize_(0)


def _fill(masked: Any, module: nn.Module, memory: Any, size: int, dtype: torch.dtype, gradient: Tensor) -> None:
    dense = whole(module.parametrizations[masked.attribute].original.detach())  # type: ignore[index,union-attr]
    memory.resize_(size)
    with torch.no_grad():
        weight = torch.empty(0, dtype=dtype, device=dense.device).set_(memory, 0, dense.shape, dense.stride())
        weight.copy_(mask_values(dense, placed_as(masked.mask, dense)))


def _free(memory: Any, gradient: Tensor) -> None:
    memory.resize_(0)


def _others_decide() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
