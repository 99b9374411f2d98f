"""Which callback has put the masks on a model, so that a second Trainer on the same model can take over.

A notebook cell that makes a model's Trainer is run twice, or is interrupted and run again. The first callback may be
out of reach by then, with its masks still on the model.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import nn
from transformers.utils import logging

from ...pruning.mask_state_dict import bake_mask
from ...pruning.masked_weight import masks_on
from ...pruning.shards import count_true

logger = logging.get_logger(__name__)


class Owner(Protocol):
    """A callback that lets go of its model on request."""

    def detach(self) -> None:
        """Take the masks off."""


_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def set_owner(model: nn.Module, owner: Owner) -> None:
    """Record that a callback has put the masks on a model."""
    _OWNERS[model] = weakref.ref(owner)


def release(model: nn.Module) -> None:
    """Forget the owner of a model, whose masks are off."""
    _OWNERS.pop(model, None)


def take_over(model: nn.Module) -> None:
    """Take the masks of an earlier callback off a model; masks of a `Pruner` in a loop of the user's are left alone."""
    reference = _OWNERS.pop(model, None)
    if reference is None:
        return
    masks = [masked.mask for module in model.modules() for masked in masks_on(module).values()]
    if count_true(masks) < sum(mask.numel() for mask in masks):
        logger.warning(
            "the model has masks of an earlier SparsityCallback whose training did not end. They are taken off: its "
            "dense weights are back, and pruning starts over"
        )
    owner = reference()
    if owner is not None:
        owner.detach()
    else:
        remove_masks(model)


@torch.no_grad()
def remove_masks(model: nn.Module) -> None:
    """Take all masks off a model, with the dense weights that were under them in place."""
    for module in model.modules():
        for attribute, masked in masks_on(module).items():
            masked.keep_all()
            bake_mask(module, attribute)
