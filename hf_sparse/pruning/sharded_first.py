"""Masks on a model that `fully_shard` (FSDP2) has divided already.

`fully_shard` notes the module and the name where it found a parameter, and puts the gathered parameter there for a
pass, then the shard again. A parametrisation moves the parameter, so what was noted has to move with it. torch has no
public way to tell: `fully_shard` refuses a module a second time, and `unshard` gathers without letting go. So the note
itself is changed (`FSDPParam._module_info`), once it is seen to be where torch 2.13 has it. Else masks are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize

from ..errors import SparsityError


def movable(model: nn.Module) -> set[int]:
    """Return the `id` of each sharded parameter that can be moved; all are sharded again, where they were gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {id(noted.sharded_param) for noted in _noted(model) if _is_there(noted)}


def follow(model: nn.Module) -> None:
    """Let `fully_shard` write parameters to where parametrisations have moved them.

    Raises:
        SparsityError: if one is not there.
    """
    for noted in _noted(model):
        info = noted._module_info
        places = [_place(info.module, info.param_name)]
        places += [_place(*pair) for pair in zip(info.shared_modules, info.shared_param_names, strict=True)]
        (info.module, info.param_name), *shared = places
        info.shared_modules, info.shared_param_names = [each for each, _ in shared], [name for _, name in shared]
        if not _is_there(noted):
            raise SparsityError(
                f"fully_shard does not find its parameter '{info.param_name}' any more. Put masks on first "
                "(Pruner.attach), then shard"
            )


def _noted(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", ()):
                yield from group.fsdp_params


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    if not parametrize.is_parametrized(module, name):
        return module, name
    moved: nn.Module = module.parametrizations[name]  # type: ignore[index,assignment]
    return moved, "original"


def _is_there(noted: Any) -> bool:
    info = getattr(noted, "_module_info", None)
    module, name = getattr(info, "module", None), getattr(info, "param_name", None)
    found: Tensor | None = module._parameters.get(name) if isinstance(module, nn.Module) and name else None
    return found is not None and found is noted.sharded_param
