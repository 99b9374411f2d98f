"""Putting masks on and taking them off, and what a masked module looks like in a state dict.

Never like torch's `parametrizations....original`, which would be loaded as random weights by everyone else, but

    weight             the masked weight, what any plain model wants
    weight_kept        bool, True = kept
    weight_hidden      the dense weight underneath
    weight_<state>     whatever the method needs to go on: scores, importance, ...

All of them are attributes of the module too, as `torch.distributed.checkpoint` wants of the keys of a state dict.

`load_state_dict` takes these keys, a plain dense `weight` alone, and the form that training checkpoints have on disk:
`weight` packed by the bitmask codec, `weight_kept` as bits, `weight_hidden` the removed values alone. Where weights are
sharded (`fully_shard`), every process gives full tensors or its shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..errors import CheckpointError
from ..formats.codecs.base import as_bits
from ..formats.codecs.bitmask import expand
from .masked_weight import MaskedWeight, apply_mask, check_free, hidden, masked_weight
from .shards import placed_as
from .state_fields import HIDDEN, KEPT


def attach_mask(module: nn.Module, masked: MaskedWeight, where: str, attribute: str = "weight") -> None:
    """Put a mask on a weight of a module.

    Raises:
        RecipeError: as `check_free`.
    """
    check_free(module, where, attribute, sharded=True)
    masked.order, masked.attribute, masked.owner = tuple(module._parameters), attribute, (module,)
    if isinstance(masked.mask, DTensor):
        masked.free_between_passes()
    parametrize.register_parametrization(module, attribute, masked)
    masked.hooks = (  # type: ignore[assignment]
        module.register_state_dict_post_hook(partial(_plain_keys, attribute)),
        module.register_load_state_dict_pre_hook(partial(_own_keys, attribute)),
    )
    for suffix in training_state(module, attribute):
        if suffix:  # the class is one of this module alone, made by torch, and goes with the parametrisation
            setattr(type(module), f"{attribute}{suffix}", property(partial(_entry, attribute, suffix)))


def _entry(attribute: str, suffix: str, module: nn.Module) -> Tensor:
    return training_state(module, attribute)[suffix]


def bake_mask(module: nn.Module, attribute: str = "weight") -> None:
    """Make the zeros part of the weight and take the mask off; the parameter stays the same object.

    `fully_shard` puts the weights of each forward pass where it found them, so from weights that it has divided nothing
    can be taken off. There the mask stays, but state dicts show a plain weight from now on.
    """
    masked = masked_weight(module, attribute)
    if masked is None:
        return
    if not parametrize.is_parametrized(module, attribute):
        masked.seal()  # it is beside the weight, which has the zeros
        return
    dense = hidden(module, attribute)
    if isinstance(dense, DTensor):
        with torch.no_grad():
            dense.copy_(apply_mask(dense, masked.mask))
        masked.seal()
        return
    shown = [f"{attribute}{suffix}" for suffix in training_state(module, attribute) if suffix]
    take_off(module, masked.order, masked.hooks, True, attribute, shown)  # type: ignore[arg-type]


def take_off(
    module: nn.Module,
    order: Iterable[str],
    hooks: Iterable[Any],
    keep_values: bool,
    attribute: str = "weight",
    shown: Iterable[str] = (),
) -> None:
    """Take the parametrisation off a weight of a module; the parameter stays the same object.

    Args:
        order: names of the parameters of the module before.
        hooks: to remove.
        keep_values: give the parameter the values that the parametrisation shows.
        shown: names of properties of the class that go with it.
    """
    for hook in hooks:
        hook.remove()
    # A copy of the model (copy.deepcopy) has the same class, and torch takes the weight off the class here.
    kind = type(module)
    gone = {"__dict__", "__weakref__", *shown}
    members = {key: value for key, value in vars(kind).items() if key not in gone}
    module.__class__ = type(kind.__name__, kind.__bases__, members)
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=keep_values)
    # torch puts the weight behind the bias, but the state of an optimizer knows parameters by their place.
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


INNER = "parametrizations.weight."
"""What torch puts in front of the keys of a parametrised `weight`."""


def _inner(prefix: str, attribute: str) -> str:
    return f"{prefix}parametrizations.{attribute}."


def _plain_keys(attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: what torch wrote for the parametrised weight becomes the keys of the module docstring."""
    masked = masked_weight(module, attribute)
    assert masked is not None
    inner = _inner(prefix, attribute)
    for key in [key for key in state if key.startswith(inner)]:
        del state[key]
    # A module under two names gives the same tensors twice, so that savers see that they are tied.
    first = f"{masked.prefix}{attribute}"
    if masked.prefix != prefix and state.get(f"{first}_kept") is masked.mask:
        entries = {suffix: state[first + suffix] for suffix in training_state(module, attribute)}
    else:
        masked.prefix, entries = prefix, training_state(module, attribute)
    state.update({f"{prefix}{attribute}{suffix}": tensor for suffix, tensor in entries.items()})


def training_state(module: nn.Module, attribute: str = "weight") -> dict[str, Tensor]:
    """Return what a state dict holds of a masked weight: key suffix -> tensor ("" is the masked weight itself)."""
    masked = masked_weight(module, attribute)
    assert masked is not None
    dense = hidden(module, attribute).detach()
    if masked.sealed:
        return {"": dense}
    state = {"": apply_mask(dense, masked.mask)}
    for field in (KEPT, HIDDEN, *masked.fields):
        tensor = field.encode(masked, dense)
        if tensor is not None:
            state[field.suffix] = tensor
    return state


def _own_keys(attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the keys of the module docstring, dense or packed, become what torch expects."""
    masked = masked_weight(module, attribute)
    assert masked is not None
    name = prefix + attribute
    inner, dense_weight = _inner(prefix, attribute), hidden(module, attribute)
    if name not in state:
        if (
            isinstance(dense_weight, DTensor) and inner + "original" in state
        ):  # torch's names, and its own values, fill the gap
            raise CheckpointError(
                f"this process was given no '{name}', so its share of that weight would stay as it was. Give every "
                "process the whole state dict, or sharded tensors; broadcast_from_rank0 does not work with masks"
            )
        return
    weight = _unpacked(state.pop(name), state.pop(f"{name}_mask", None), masked.mask.shape, name)
    kept, dense = state.pop(name + KEPT.suffix, None), state.pop(name + HIDDEN.suffix, None)
    mask = masked.mask if kept is None else KEPT.decode(masked, kept, name + KEPT.suffix)
    assert mask is not None
    masked.place(dense_weight)
    state[inner + "0.mask"] = placed_as(mask, masked.mask)
    state[inner + "original"] = placed_as(weight if dense is None else _under(weight, dense, mask, name), dense_weight)
    alone = kept is None and dense is None
    for field in masked.fields:
        key, present = name + field.suffix, getattr(masked, field.name, None)
        if key in state:
            tensor = field.decode(masked, state.pop(key), key)
        else:  # a plain dense weight brings none: what is there stays, as the mask does
            tensor = present.detach() if alone and present is not None else None
        if tensor is not None:
            state[f"{inner}0.{field.name}"] = tensor


def _unpacked(weight: Tensor, mask: Tensor | None, shape: torch.Size, name: str) -> Tensor:
    if weight.shape == shape:
        return weight
    if mask is None or mask.dtype != torch.uint8 or mask.shape != (-(-shape.numel() // 8),):
        raise CheckpointError(
            f"'{name}' has shape {tuple(weight.shape)} and no bitmask that fits {tuple(shape)}. A model that is being "
            "pruned takes training checkpoints and dense weights; load anything else with from_pretrained"
        )
    return expand(mask.cpu().numpy(), as_bits(weight.cpu()), shape.numel()).view(weight.dtype).view(shape)


def _under(weight: Tensor, dense: Tensor, kept: Tensor, name: str) -> Tensor:
    """Return the dense weight, from itself or from the removed values alone."""
    if dense.shape == weight.shape:
        return dense
    removed = ~kept.to(dense.device)
    if dense.shape != (int(torch.count_nonzero(removed)),):
        raise CheckpointError(
            f"'{name}_hidden' holds {tuple(dense.shape)} values, but {int(removed.sum())} are removed"
        )
    return weight.to(dense.device, copy=True).masked_scatter_(removed, dense)
