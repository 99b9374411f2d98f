"""One mask for all modules that share a weight: embeddings and the LM head that is tied to them.

The mask is on the module that is pruned; its scores, its state and its keys in a state dict are there alone. The others
apply it too, in forward and backward, and a state dict has the masked weight under their names, as the same tensor, so
that savers see that it is tied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import RecipeError
from .mask_state_dict import INNER, take_off, training_state
from .masked_weight import MaskedWeight, hidden


class TiedMask(nn.Module):
    """The parametrisation of a module that shares a masked weight.

    Args:
        owner: the module that is pruned.
        masked: its mask.
    """

    def __init__(self, owner: nn.Module, masked: MaskedWeight) -> None:
        super().__init__()
        self._shared = (owner, masked)  # in a tuple, so that they do not become submodules of this one
        self.order: tuple[str, ...] = ()
        self.hooks: tuple[Any, ...] = ()

    @property
    def owner(self) -> nn.Module:
        """The module that is pruned."""
        return self._shared[0]

    @property
    def masked(self) -> MaskedWeight:
        """Its mask."""
        return self._shared[1]

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = self.masked(weight)
        return masked


def sharers(model: nn.Module, module: nn.Module, where: str) -> list[nn.Module]:
    """Return the other modules that hold `module.weight`.

    Raises:
        RecipeError: if one holds it under another name than `weight`, where no mask can be put on it.
    """
    weight, found = module._parameters.get("weight"), []
    for path, other in model.named_modules():
        for name, parameter in other._parameters.items():
            if parameter is None or parameter is not weight or other is module:
                continue
            if name != "weight":
                raise RecipeError(
                    f"'{where}' is tied to '{path}.{name}', and only a `weight` can be given a mask. Prune it in one "
                    "shot: hf_sparse.sparsify(model, config), and fine-tune afterwards, which keeps the zeros of both"
                )
            found.append(other)
    return found


def attach_tied(module: nn.Module, owner: nn.Module, masked: MaskedWeight) -> None:
    """Let a module apply the mask of the one that it shares its weight with."""
    tied = TiedMask(owner, masked)
    tied.order = tuple(module._parameters)
    parametrize.register_parametrization(module, "weight", tied)
    tied.hooks = (
        module.register_state_dict_post_hook(_plain_key),
        module.register_load_state_dict_pre_hook(_own_key),
    )


def free_tied(module: nn.Module) -> None:
    """Give a module the shared weight back, before the mask on its owner is taken off."""
    tied = _tied(module)
    if tied is not None and not tied.masked.sealed:
        take_off(module, tied.order, tied.hooks, keep_values=False)


def _tied(module: nn.Module) -> TiedMask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, TiedMask) else None


def _plain_key(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: the masked weight, the same tensor as that of the owner if that was before."""
    tied = _tied(module)
    assert tied is not None
    for key in [key for key in state if key.startswith(prefix + INNER)]:
        del state[key]
    first = f"{tied.masked.prefix}weight"
    same = state.get(f"{first}_kept") is tied.masked.mask
    state[f"{prefix}weight"] = state[first] if same else training_state(tied.owner)[""]


def _own_key(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the owner reads the weight and what is under its mask; here it stays what it is."""
    for suffix in ("", "_mask"):
        state.pop(f"{prefix}weight{suffix}", None)
    with torch.no_grad():
        state[f"{prefix}{INNER}original"] = hidden(module).detach()
