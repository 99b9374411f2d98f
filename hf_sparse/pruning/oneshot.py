"""One-shot pruning: no training, and data only where the method looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError
from ..modeling.model_state import sparse_weights
from .pruner import Pruner

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M, config: SparsityConfig | Mapping[str, Any], batches: Iterable[Mapping[str, Any]] | None = None
) -> M:
    """Prune a model in place to its final sparsity, at once, and return it.

    Args:
        model: any module with linear layers; a model of transformers saves packed from then on.
        config: `SparsityConfig`, or a mapping with its keys; schedules do not matter.
        batches: keyword arguments of the model, with labels, for the scorers that look at data: gradient, taylor,
            head_importance (see `Pruner.measure`). Use training data.

    Raises:
        RecipeError: for scorers that learn from training, for those that look at data if there are no batches, for
            batches that no scorer looks at, for less sparsity than an earlier pruning left, and as `Pruner`. The model
            is then as it was.
        SparsityError: if there are NaN among the weights, and as `Pruner.measure`. The model is then as it was.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", pattern="2:4"))
        >>> int((model[0].weight != 0).sum())
        16
    """
    pruner = Pruner(model, config)
    for group in pruner.groups:
        name = group.scorer.name
        if group.scorer.source == "training":
            raise RecipeError(
                f"scorer '{name}' learns from training, so it cannot prune in one shot. Use 'magnitude' here, or "
                "SparsityCallback with a Trainer"
            )
        if group.scorer.source != "weights" and batches is None:
            raise RecipeError(
                f"scorer '{name}' looks at data. Give sparsify some batches with labels (hf-sparse prune: --data), or "
                "use 'magnitude', which needs none"
            )
    if batches is not None and all(group.scorer.source == "weights" for group in pruner.groups):
        raise RecipeError("there are batches, but no scorer looks at data: gradient, taylor and head_importance do")
    alive = _alive_before(pruner)
    pruner.put_masks()
    try:
        if batches is not None:
            pruner.measure(batches)
        pruner.step(progress=1.0)
        _check_not_sparser(pruner, alive)
    except BaseException:
        pruner.detach()
        raise
    pruner.bake()
    pruner.mark()
    return model


def _alive_before(pruner: Pruner) -> dict[str, Tensor]:
    """Return which groups are left of each unit with a weight that an earlier pruning made sparse, by its name."""
    sparse = set(sparse_weights(pruner.model))
    return {unit.name: unit.alive() for unit in pruner.units if any(member.name in sparse for member in unit.members)}


def _check_not_sparser(pruner: Pruner, alive: dict[str, Tensor]) -> None:
    """Raise `RecipeError` if masks would keep more than an earlier pruning has left: it cannot be brought back."""
    for group in pruner.groups:
        if group.config.sparsity is None:
            continue  # where the pattern or the selection decides, anything that is sparser fulfils it too
        units = [unit for unit in group.units if unit.name in alive]
        left, kept = sum(int(alive[u.name].sum()) for u in units), sum(int(u.kept().sum()) for u in units)
        if left + len(units) < kept:
            total = sum(unit.groups for unit in units)
            raise RecipeError(
                f"sparsity {group.sparsity:g} was requested, but '{units[0].name}' and {len(units) - 1} more weights "
                f"are at {1 - left / total:.4f} since an earlier pruning, and removed weights cannot be restored. "
                "Request a higher sparsity, exclude these weights, or start from the dense model"
            )
