"""Masks on a model that DeepSpeed ZeRO-3 partitions: beside the weights, in shares, with no parametrisation.

ZeRO-3 gathers the parameters of a layer for its pass and lets go of them after it. What a parametrisation makes of one
would stay from the forward to the backward pass, the whole weight on every process. So here the weights themselves have
the zeros, in DeepSpeed's own partitions: all that it gathers, copies and saves has them then. Each process keeps the
mask of its share and the removed values, which the optimizer and the next selection read:

* before a step of the optimizer inside DeepSpeed the removed values are put back, after it they are taken out again;
* the gradient of a weight is masked on its way to DeepSpeed, so that norms are those of the masked model;
* masks are divided by rows as under `fully_shard`, so patterns and selections work on them as they do there. The rows
  of a process are its share of DeepSpeed's flat partition, if all have as many; else one weight at a time is gathered;
* a state dict has the shares, so DeepSpeed's checkpoints do, and resume.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import CheckpointError, RecipeError
from ..modeling.layer_kinds import Slot
from ..modeling.masked_values import mask_values, mask_values_
from ..modeling.model_state import MASKS_BESIDE
from .group import PruningGroup
from .mask_state_dict import take_off
from .masked_weight import MaskedWeight
from .partitions import (
    check_partition,
    is_partitioned,
    read_share,
    rows_of_share,
    share_of_rows,
    to_rows,
    write_master,
    write_share,
)
from .scorers import Scorer
from .shards import local, whole
from .state_fields import HIDDEN, KEPT
from .unit import Member


def refuse_partitioned(model: nn.Module) -> None:
    """Raise `RecipeError` if a model was partitioned before it has masks, which are of the shapes of its weights."""
    name = next((name for name, parameter in model.named_parameters() if is_partitioned(parameter)), None)
    if name is not None:
        raise RecipeError(
            f"'{name}' was partitioned by DeepSpeed ZeRO-3 before there was a mask on it, so it has shape (0,). Put "
            "masks on first (Pruner.attach, or a Trainer with SparsityCallback). Make or load the model before "
            "TrainingArguments and Accelerator, or with zero3_init_flag: false, and evaluate after training"
        )


def check_partitionable(groups: Sequence[PruningGroup], tied: Sequence[nn.Module]) -> None:
    """Raise `RecipeError` if masks of these groups cannot be kept beside partitioned weights.

    Args:
        tied: modules that share a masked weight.
    """
    for group in groups:
        if group.scorer.source != "weights" or type(group.scorer).update is not Scorer.update:
            raise RecipeError(
                f"scorer '{group.scorer.name}' does not work with DeepSpeed ZeRO-3: it learns from gradients or writes "
                "to weights, and there no process has a gradient or a weight except in the pass of its layer. Use "
                "scorer 'magnitude', or ZeRO-2 or FSDP2 (fsdp_version: 2)"
            )
        if any(unit.source is not None for unit in group.units):
            raise RecipeError(
                f"pattern {group.pattern} does not work with DeepSpeed ZeRO-3: filters are scored by the weight of one "
                "layer and leave by that of another. Use 'element', blocks, n:m, heads or neurons, or ZeRO-2"
            )
        frozen = next((member.name for member in group.members if not member.hidden.requires_grad), None)
        if frozen is not None:
            raise RecipeError(
                f"'{frozen}' is frozen (requires_grad=False), and DeepSpeed ZeRO-3 has no float32 partition of it, of "
                "which a mask could be made. Unfreeze it, or exclude it"
            )
    if tied:
        raise RecipeError(
            "a weight that two modules share cannot be given a mask with DeepSpeed ZeRO-3: each module would apply it, "
            "and there the weight itself has the zeros. Exclude it, or use ZeRO-2 or FSDP2 (fsdp_version: 2)"
        )


def are_under(groups: Sequence[PruningGroup]) -> bool:
    """Return whether masks are in parametrisations of weights that have been partitioned since."""
    members = (member for group in groups for member in group.members)
    return any(is_partitioned(member.hidden) and not isinstance(member.mask, MaskBeside) for member in members)


def put_beside(groups: Sequence[PruningGroup], tied: Sequence[nn.Module]) -> list[Member]:
    """Take the masks off the weights and keep them beside, before or after `deepspeed.initialize`; return the weights.

    Raises:
        RecipeError: as `check_partitionable`, and for settings of DeepSpeed that keep weights elsewhere.
    """
    check_partitionable(groups, tied)
    members = [member for group in groups for member in group.members]
    for member in members:
        if is_partitioned(member.hidden):
            check_partition(member.name, member.hidden)
    for member in members:
        if not isinstance(member.mask, MaskBeside):
            member.mask = MaskBeside(member)
    return members


def in_memory(slots: Iterable[Slot]) -> list[Slot]:
    """Leave out the weights that DeepSpeed ZeRO-3 has partitioned, whose zeros stay without a guard of their own."""
    return [slot for slot in slots if not is_partitioned(slot.parameter)]


class MaskBeside(MaskedWeight):
    """The mask of a weight that is or will be partitioned, in place of the one in its parametrisation.

    Args:
        member: with a mask on it.
    """

    def __init__(self, member: Member) -> None:
        before, module, attribute = member.masked, member.module, member.attribute
        super().__init__(before.mask, before.pattern, before.fields, before.shared)
        self.mask.copy_(before.mask)
        shown = [f"{attribute}{field.suffix}" for field in (KEPT, HIDDEN, *before.fields)]
        take_off(module, before.order, before.hooks, False, attribute, shown)  # type: ignore[arg-type]
        weight = module._parameters[attribute]
        assert weight is not None
        self.attribute, self._name, self._module = attribute, member.name, weakref.ref(module)
        self._weight: tuple[Any, ...] = (weight,)  # in a tuple, so that it is not a parameter of this module
        self._kept: Tensor | None = None  # of the share of this process, flat; None = everything
        self.removed: Tensor | None = None  # the values of the other entries; None once the zeros are permanent
        weight.register_hook(self._mask_gradient)
        self.hooks = (
            module.register_state_dict_post_hook(partial(MaskBeside._save, self)),
            module.register_load_state_dict_pre_hook(partial(MaskBeside._load, self)),
        )
        MASKS_BESIDE.set(module, {**(MASKS_BESIDE.get(module) or {}), attribute: self})
        _steps.follow(self)

    # -- what units and groups ask ------------------------------------------------------------------------------------

    def layout(self, weight: Tensor) -> Tensor:
        self.place(weight)
        return self.mask

    @torch.no_grad()
    def place(self, weight: Tensor) -> None:
        if is_partitioned(self._weight[0]) and not isinstance(self.mask, DTensor):
            check_partition(self._name, self._weight[0])
            self.mask = to_rows(self.mask, self._weight[0]).clone()

    @torch.no_grad()
    def dense_of(self, weight: Tensor) -> Tensor:
        if not is_partitioned(weight):
            return weight.detach()
        return rows_of_share(self._dense(), weight, tuple(self.mask.shape))

    @torch.no_grad()
    def renew(self, kept: Tensor, weight: Tensor) -> None:
        dense = self._dense()
        super().renew(kept, weight)
        assert isinstance(self.mask, DTensor)
        self._kept = share_of_rows(self.mask, self._weight[0])
        write_share(self._weight[0], self._hide(dense))

    def keep_all(self) -> None:
        if self._kept is not None:
            self.renew(torch.ones_like(self.mask), self.mask)

    @torch.no_grad()
    def zero_beside(self, bias: nn.Parameter, removed: Tensor) -> None:
        if not is_partitioned(bias):
            super().zero_beside(bias, removed)
            return
        share, flat = read_share(bias), local(to_rows(removed, bias))
        share[: len(flat)].masked_fill_(flat, 0.0)
        write_share(bias, share)

    def seal(self) -> None:
        """Make the zeros permanent: they stay where they are, in training too, and other values are forgotten."""
        super().seal()
        self.removed = None
        for hook in self.hooks:
            hook.remove()
        module = self._module()
        if module is not None:
            beside = MASKS_BESIDE.pop(module) or {}
            if left := {name: mask for name, mask in beside.items() if mask is not self}:
                MASKS_BESIDE.set(module, left)

    # -- around a step of the optimizer -------------------------------------------------------------------------------

    def trained_by(self, optimizer: Optimizer) -> bool:
        """Return whether it is the optimizer, inside DeepSpeed, of this weight."""
        zero = getattr(self._weight[0], "_z3_optimizer", None)
        return any(optimizer is getattr(zero, name, None) for name in ("optimizer", "backup_optimizer"))

    @torch.no_grad()
    def before_step(self) -> None:
        """Put the removed values back."""
        if self.removed is not None:
            write_master(self._weight[0], self._dense())

    @torch.no_grad()
    def after_step(self) -> None:
        """Take them out again; DeepSpeed then copies what is left."""
        if self._kept is not None:
            write_master(self._weight[0], self._hide(read_share(self._weight[0])))

    def _mask_gradient(self, gradient: Tensor) -> Tensor:
        return gradient if self._kept is None else mask_values(gradient, whole(self.mask))

    def _dense(self) -> Tensor:
        """Return the share of the float32 weight with the removed values in their places."""
        share = read_share(self._weight[0])
        if self._kept is not None and self.removed is not None:
            share[~self._kept] = self.removed
        return share

    def _hide(self, share: Tensor) -> Tensor:
        """Make the removed entries of a share zero in place, and remember what they were."""
        assert self._kept is not None
        self.removed = None if self.sealed else share[~self._kept]
        mask_values_(share, self._kept)
        return share

    # -- state dicts --------------------------------------------------------------------------------------------------

    def _save(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._kept is not None and self.removed is not None:
            name = prefix + self.attribute
            state[name + KEPT.suffix], state[name + HIDDEN.suffix] = self._kept, self.removed

    @torch.no_grad()
    def _load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        name, parameter = prefix + self.attribute, self._weight[0]
        kept, removed = state.pop(name + KEPT.suffix, None), state.pop(name + HIDDEN.suffix, None)
        if kept is None or removed is None:
            return
        size = parameter.ds_tensor.numel() if is_partitioned(parameter) else None
        if kept.dtype != torch.bool or kept.shape != (size,) or removed.shape != (int((~kept).sum()),):
            raise CheckpointError(
                f"'{name}_kept' is not the share of this process ({size} entries) of the mask on a weight that "
                "DeepSpeed ZeRO-3 has partitioned. Load what as many processes have saved, by load_checkpoint of the "
                "engine"
            )
        self.place(parameter)
        self._kept, self.removed = kept.to(self.mask.device), removed.to(self.mask.device)
        local(self.mask).copy_(local(rows_of_share(self._kept, parameter, tuple(self.mask.shape))))


class _Steps:
    """Hooks around the steps of optimizers, from the first mask beside a weight on."""

    def __init__(self) -> None:
        self._followed: weakref.WeakSet[MaskBeside] = weakref.WeakSet()
        self._installed = False

    def follow(self, mask: MaskBeside) -> None:
        """Put the removed values of a weight back for each step of its optimizer."""
        self._followed.add(mask)
        if not self._installed:
            register_optimizer_step_pre_hook(self._before)
            register_optimizer_step_post_hook(self._after)
            self._installed = True

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        for mask in [each for each in self._followed if each.trained_by(optimizer)]:
            mask.before_step()

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for mask in [each for each in self._followed if each.trained_by(optimizer)]:
            mask.after_step()


_steps = _Steps()
