"""The loss of a model without some of its weights or heads: nothing is trained, and nothing stays changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import RecipeError, SparsityError
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..pruning.selection import kept_count
from ..pruning.selection.topk import keep_highest

Batch = Mapping[str, Any]


def layer_losses(
    model: nn.Module, layers: Mapping[str, nn.Linear], data: Sequence[Batch], levels: Sequence[float]
) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Return the loss of the model, and with the lowest magnitudes of one layer removed, for each layer and level.

    The weights are restored to the last bit, whatever happens.

    Raises:
        RecipeError: for levels that are not ascending in (0, 1), or no batch.
        SparsityError: if the model returns no loss, or there are NaN among the weights.

    Source: Han et al. 2015, "Learning both Weights and Connections", section 4.
    """
    if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
        raise RecipeError(f"levels are ascending sparsities above 0 and below 1, not {list(levels)}")
    if not data:
        raise RecipeError("sensitivity needs data, and there was no batch")
    training = model.training
    model.eval()
    try:
        dense = mean_loss(model, data)
        found = {}
        for name, layer in tqdm(layers.items(), desc="Sensitivity"):
            found[name] = tuple(_pruned_losses(model, layer.weight, data, levels))
    finally:
        model.train(training)
    return dense, found


@torch.no_grad()
def _pruned_losses(model: nn.Module, weight: Tensor, data: Sequence[Batch], levels: Sequence[float]) -> list[float]:
    before = weight.clone()
    losses = []
    try:
        for level in levels:
            (kept,), _ = keep_highest([before.abs().float()], kept_count(weight.numel(), level))
            weight.copy_(torch.where(kept, before, 0.0))
            losses.append(mean_loss(model, data))
    finally:
        weight.copy_(before)
    return losses


def head_losses(
    model: nn.Module, data: Sequence[Batch], levels: Sequence[float]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each attention the loss with each of its heads masked alone, and with the least needed ones masked.

    What a masked head gives to the output layer is 0. The heads that are masked together at a level are those without
    which the loss was lowest; at least one of them stays.

    Args:
        levels: fractions of the heads of one attention that are masked together, as far as whole heads allow.

    Returns:
        By name of the attention: one loss for each head that it has now, and one for each level. Nothing where no
        family of architectures knows the model.

    Raises:
        RecipeError: if there is no batch.
        SparsityError: if the model returns no loss.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 3.
    """
    if not data:
        raise RecipeError("sensitivity needs data, and there was no batch")
    training = model.training
    model.eval()
    found: dict[str, tuple[list[float], list[float]]] = {}
    blocks = [block for block in known_sub_blocks(model) if block.kind == "attention" and block.groups]
    try:
        for block in tqdm(blocks, desc="Heads"):
            alone = [_loss_without(model, block, [head], data) for head in range(block.groups)]
            order = sorted(range(block.groups), key=alone.__getitem__)
            counts = [min(block.groups - 1, round(level * block.groups)) for level in levels]
            found[block.name] = (alone, [_loss_without(model, block, order[:count], data) for count in counts])
    finally:
        model.train(training)
    return found


def _loss_without(model: nn.Module, block: SubBlock, heads: Sequence[int], data: Sequence[Batch]) -> float:
    kept = torch.ones(block.groups, dtype=torch.bool)
    kept[list(heads)] = False

    def mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs
        return (torch.where(kept.repeat_interleave(block.size).to(hidden.device), hidden, 0.0),)

    hook = block.output.register_forward_pre_hook(mask)
    try:
        return mean_loss(model, data)
    finally:
        hook.remove()


@torch.no_grad()
def mean_loss(model: nn.Module, data: Iterable[Batch]) -> float:
    """Return the mean of the losses of batches, each counted by its rows."""
    total, rows = 0.0, 0
    for batch in data:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise SparsityError(
                "the model returned no loss, which sensitivity is about; are there labels in the batch?"
            )
        size = len(batch["labels"])
        total, rows = total + float(loss) * size, rows + size
    return total / rows
