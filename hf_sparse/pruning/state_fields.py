"""What training needs of a masked weight to go on, beside the weight: one table for saving, loading and names.

Each entry is a tensor of the module's state dict under `weight_<name>`. Two of them belong to every mask; a scorer
declares its own (`Scorer.fields`). The state-dict hooks and the savers read this table and know no name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..config.sparsity import SCORERS
from ..errors import CheckpointError
from ..formats.codecs.base import unpack_bits
from .masked_weight import MaskedWeight
from .shards import placed_as, replicated, whole


@dataclasses.dataclass(frozen=True)
class StateField:
    """One entry.

    Args:
        name: without the underscore in front.
        encode: returns what a state dict holds, from the mask and the dense weight under it; None = nothing now.
        decode: returns what torch should load into the attribute `name` of the mask, from the mask, the entry of a
            state dict and its key; None = it is taken already.
    """

    name: str
    encode: Callable[[MaskedWeight, Tensor], Tensor | None]
    decode: Callable[[MaskedWeight, Tensor, str], Tensor | None]

    @property
    def suffix(self) -> str:
        """Ending of the key."""
        return f"_{self.name}"


def tensor_field(name: str) -> StateField:
    """Return the entry of a parameter or buffer of the mask, such as learned scores."""
    return StateField(name, partial(_encode_tensor, name), partial(_decode_tensor, name))


def shared_field(name: str) -> StateField:
    """Return the entry of a number that all masks of a group share (`MaskedWeight.shared`), such as a count."""
    return StateField(name, partial(_encode_shared, name), partial(_decode_shared, name))


def _encode_tensor(name: str, masked: MaskedWeight, dense: Tensor) -> Tensor | None:
    tensor: Tensor | None = getattr(masked, name, None)
    return None if tensor is None else placed_as(tensor.detach(), dense)


def _decode_tensor(name: str, masked: MaskedWeight, given: Tensor, key: str) -> Tensor:
    present: Tensor | None = getattr(masked, name, None)
    return given if present is None else placed_as(given, present)


def _encode_shared(name: str, masked: MaskedWeight, dense: Tensor) -> Tensor:
    return replicated(masked.shared[name].clone(), dense)


def _decode_shared(name: str, masked: MaskedWeight, given: Tensor, key: str) -> None:
    tensor, given = masked.shared[name], whole(given)
    if given.shape != tensor.shape or not bool(torch.isfinite(given).all()):
        raise CheckpointError(f"'{key}' must be a finite number, got {given}: this training cannot go on from it")
    tensor.copy_(given)


def _decode_kept(masked: MaskedWeight, given: Tensor, key: str) -> Tensor:
    """Return a mask from itself or from bits."""
    shape = masked.mask.shape
    if given.dtype == torch.bool and given.shape == shape:
        return given
    if given.dtype != torch.uint8 or given.shape != (-(-shape.numel() // 8),):
        raise CheckpointError(f"'{key}' does not fit the weight of shape {tuple(shape)}")
    return torch.from_numpy(unpack_bits(given.cpu().numpy(), shape.numel(), key)).view(shape)


KEPT = StateField("kept", lambda masked, dense: placed_as(masked.mask, dense), _decode_kept)
HIDDEN = StateField("hidden", lambda masked, dense: dense, lambda masked, given, key: given)


def state_suffixes() -> tuple[str, ...]:
    """Return the endings of all keys that only a training that goes on needs; everyone else ignores them.

    Example:
        >>> {"_kept", "_hidden", "_scores", "_importance"} <= set(state_suffixes())
        True
    """
    fields = [KEPT, HIDDEN, *(field for name in SCORERS for field in SCORERS[name].fields)]
    return tuple(dict.fromkeys(field.suffix for field in fields))
