"""One-shot pruning block by block: each is calibrated, pruned, and run with its pruned weights before the next."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...config.sparsity import SparsityConfig
from ...modeling.zero_preservation import free_zeros, keep_zeros
from ..group import PruningGroup
from ..pruner import Pruner
from ..scorers import InputScorer
from ..selection import Owl
from .embeddings import fit_embeddings
from .one_block import prune_block
from .outliers import outlier_shares
from .stacks import Unreached
from .tasks import AnyTask, OnLayer, form_tasks, tasks_of
from .walk import Walk


@torch.no_grad()
def prune_blockwise(
    pruner: Pruner,
    batches: Iterable[Mapping[str, Any]],
    spill: Path | None = None,
    on_layer: OnLayer | None = None,
) -> None:
    """Prune a model in place.

    Args:
        pruner: without masks. Groups whose scorers do not look at inputs have their masks chosen on the dense model,
            all at once, and are reconstructed if they ask for that.
        batches: keyword arguments of the model.
        spill: folder for the hidden states between blocks; None = they stay in memory.
        on_layer: called with what happened to each layer.

    Raises:
        SparsityError: if there is no batch, a layer takes no part or has inputs that are not finite. Blocks before it
            are pruned by then.
    """
    for group in pruner.groups:
        group.check_free()
    batches = list(batches)
    formed = form_tasks(pruner.model, pruner.forms)
    walk = Walk(pruner.model, batches, [*(name for group in pruner.groups for name in group.layers), *formed], spill)
    with evaluating(pruner.model):
        fit_embeddings(pruner.model, pruner.forms, batches, on_layer)
        if not walk.layers:
            return
        prepare_outliers(pruner.groups, walk)
        tasks = tasks_of(pruner.groups, masks_of(pruner, batches))
        slots = [task.member.slot for task in tasks.values()]
        free_zeros(slots)
        every: dict[str, AnyTask] = {**tasks, **formed}
        unreached = Unreached()
        steps = tqdm(walk.steps(), desc="Pruning block by block", total=walk.count, disable=None)
        for step in steps:
            prune_block(step, every, on_layer, unreached)
            step.advance()
    keep_zeros(slots)
    unreached.warn()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and leave the model as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def prepare_outliers(groups: Sequence[PruningGroup], walk: Walk) -> None:
    """Let selections that spread the sparsity over blocks look at the dense model."""
    for group in groups:
        if isinstance(group.selection, Owl):
            shares = outlier_shares(walk, group.slots, group.selection.outlier)
            names = [unit.members[0].layer_name for unit in group.units]
            sizes = [math.prod(unit.members[0].shape) for unit in group.units]
            group.selection.prepare_outliers([shares[name] for name in names], sizes)


def masks_of(pruner: Pruner, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the masks of the groups whose scorers do not look at inputs, by layer; the weights stay dense.

    Biases that belong to removed heads and neurons are set to zero.
    """
    plain = [group for group in pruner.groups if not isinstance(group.scorer, InputScorer)]
    if not plain:
        return {}
    part = Pruner(pruner.model, SparsityConfig(groups=[group.config for group in plain]))
    for ours, theirs in zip(part.groups, plain, strict=True):
        ours.selection = theirs.selection  # which may have looked at data
    part.put_masks()
    try:
        if any(group.scorer.source != "weights" for group in plain):
            part.measure(batches)
        part.step(progress=1.0)
        members = [member for group in part.groups for member in group.members]
        masks = {member.layer_name: member.masked.mask.clone() for member in members}
    finally:
        part.detach()
    for member in members:
        bias = getattr(member.module, "bias", None)
        if member.has_bias and isinstance(bias, nn.Parameter):
            bias.data.masked_fill_(~member.slot.view.to_matrix(masks[member.layer_name]).any(1), 0.0)
    return masks
