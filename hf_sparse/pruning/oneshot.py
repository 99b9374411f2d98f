"""One-shot pruning: no training, and data only where the method looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError
from .pruner import Pruner
from .summary import WEIGHTS_ATTRIBUTE
from .unit import Share

M = TypeVar("M", bound=nn.Module)


def sparsify(model: M, config: SparsityConfig, batches: Iterable[Mapping[str, Any]] | None = None) -> M:
    """Prune a model in place to its final sparsity, at once, and return it.

    Args:
        model: any module with linear layers; a model of transformers saves packed from then on.
        config: what is asked for; schedules do not matter.
        batches: keyword arguments of the model, with labels, for the scorers that look at data: gradient, taylor,
            head_importance (see `Pruner.measure`). Use training data.

    Raises:
        RecipeError: for scorers that learn from training, for those that look at data if there are no batches, for
            batches that no scorer looks at, and as `Pruner`.
        SparsityError: if there are NaN among the weights; the model is then as it was. As `Pruner.measure`.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", pattern="2:4"))
        >>> int((model[0].weight != 0).sum())
        16
    """
    pruner = Pruner(model, config)
    for plan in pruner.plans:
        name, looks = plan.scorer.name, plan.scorer.observes or plan.scorer.measures
        if plan.scorer.learned:
            raise RecipeError(
                f"scorer '{name}' learns from training, so it cannot prune in one shot. Use 'magnitude' here, or "
                "SparsityCallback with a Trainer"
            )
        if looks and batches is None:
            raise RecipeError(
                f"scorer '{name}' looks at data. Give sparsify some batches with labels (hf-sparse prune: --data), or "
                "use 'magnitude', which needs none"
            )
    if batches is not None and not any(plan.scorer.observes or plan.scorer.measures for plan in pruner.plans):
        raise RecipeError("there are batches, but no scorer looks at data: gradient, taylor and head_importance do")
    pruner.attach()
    try:
        if batches is not None:
            pruner.measure(batches)
        pruner.step(progress=1.0)
    except BaseException:
        for unit in pruner.units:
            unit.keep_all()
        raise
    finally:
        pruner.bake()
    return model


def prune_further(model: M, config: SparsityConfig) -> M:
    """Prune a model that is sparse already, as `sparsify` does.

    Raises:
        RecipeError: if the model is sparser than what is asked for, since what was removed cannot be brought back; and
            as `sparsify`.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.75))
        >>> prune_further(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.5))
        Traceback (most recent call last):
            ...
        hf_sparse.errors.RecipeError: sparsity 0.5 was asked for, but the model is at 0.7500 already, ...
    """
    for plan in Pruner(model, config).plans:
        alive = [_alive(shares) for shares in plan.shares]
        groups, kept = sum(mask.numel() for mask in alive), sum(int(mask.sum()) for mask in alive)
        # Where the pattern or the selection decides, anything that is sparser fulfils it too.
        if plan.config.sparsity is not None and kept + len(alive) < (1 - plan.sparsity) * groups:
            raise RecipeError(
                f"sparsity {plan.sparsity:g} was asked for, but the model is at {1 - kept / groups:.4f} already, and "
                "what was removed cannot be brought back. Ask for more, or load the dense model"
            )
    before = getattr(model, WEIGHTS_ATTRIBUTE, ())
    sparsify(model, config)
    # What is sparse from before and no target this time stays packed when saved.
    setattr(model, WEIGHTS_ATTRIBUTE, tuple(dict.fromkeys((*before, *getattr(model, WEIGHTS_ATTRIBUTE)))))
    return model


def _alive(shares: Sequence[Share]) -> Tensor:
    """Return which groups of a unit that has no masks have anything left in any of its weights."""
    return torch.stack([share.pattern.pool((share.layer.weight != 0).float(), "sum") for share in shares]).sum(0) > 0
