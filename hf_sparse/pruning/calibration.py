"""Scores from a pass over data, for pruning in one shot: what a scorer would have seen in training, without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import PatternError, RecipeError, SparsityError
from .head_importance import head_sensitivity, loss_of
from .processes import are_several, sum_of_counts
from .scorers import HeadImportance, Scorer
from .unit import Unit

Batch = Mapping[str, Any]


def observe_batches(model: nn.Module, pairs: list[tuple[Scorer, Unit]], batches: Iterable[Batch]) -> None:
    """Show each batch's gradients to scorers that look at gradients. The model runs as in evaluation (no dropout).

    Gradients of the parameters (`grad`) are left as they are. Several processes show batches of their own, and what
    they have seen is added up, as if one had shown them all.

    Raises:
        RecipeError: if there are several processes, and a scorer weighs batches by their order.
        SparsityError: if there is no batch, the model returns no loss, or a gradient is not finite.
    """
    for scorer, _ in pairs if are_several() else ():
        if not scorer.additive:
            raise RecipeError(
                f"{scorer} weighs the last batches most, so it depends on their order, and there is none among several "
                "processes. Use momentum=1, or one process"
            )
    members = [member for _, unit in pairs for member in unit.members]
    for member in members:
        if isinstance(member.hidden, DTensor):
            raise RecipeError(
                f"'{member.name}' is sharded (fully_shard), and batches are shown to scorers of gradients without "
                "training. Call Pruner.measure before fully_shard: what it finds is sharded with the weights"
            )
    weights = [member.hidden for member in members]
    training, seen = model.training, 0
    model.eval()
    try:
        for batch in batches:
            with torch.enable_grad():
                # Unused weights are allowed: a layer that takes no part has no gradient, and its scores stay 0.
                torch.autograd.grad(loss_of(model, batch, "a scorer of gradients"), weights, allow_unused=True)
            with torch.no_grad():
                for scorer, unit in pairs:
                    if not unit.take_gradients(average=False):
                        raise SparsityError(
                            f"the gradient of '{unit.name}' must be finite, and in batch {seen} (from 0) it has NaN or "
                            "infinite entries. Look at the loss of that batch: labels that are all ignored (-100), NaN "
                            "in the model, or float16 that overflows"
                        )
                    scorer.on_gradient(unit)
                    unit.drop_gradients()
            seen += 1
    finally:
        model.train(training)
    for scorer, unit in pairs:
        scorer.sum_over_processes(unit)
    if not sum_of_counts(seen):
        raise SparsityError("scorers of gradients need data, and there was no batch")


def measure_heads(model: nn.Module, pairs: list[tuple[HeadImportance, Unit]], batches: Iterable[Batch]) -> None:
    """Give each unit of heads the importance of its heads.

    Raises:
        PatternError: for a unit that has no heads.
        SparsityError: as `head_importance`.
    """
    found = {f"{block.output_name}.weight": values for block, values in head_sensitivity(model, batches)}
    for scorer, unit in pairs:
        if unit.name not in found or found[unit.name].numel() != unit.groups:
            raise PatternError(
                f"scorer 'head_importance' scores attention heads, but groups of '{unit.name}' are not heads. Use it "
                "with pattern 'head', and another scorer for the rest"
            )
        scorer.on_measurement(unit, found[unit.name])
