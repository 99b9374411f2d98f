"""One-shot pruning: no training, no data."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .config import SparsityConfig
from .errors import RecipeError, SparsityError
from .pruner import Pruner
from .report import WEIGHTS_ATTRIBUTE

M = TypeVar("M", bound=nn.Module)


def sparsify(model: M, config: SparsityConfig) -> M:
    """Prune a model in place to its final sparsity, at once, and return it.

    Args:
        model: any module with linear layers; a model of transformers saves packed from then on.
        config: what is asked for; schedules do not matter.

    Raises:
        RecipeError: for scorers that need training or gradients, and as `Pruner`.
        SparsityError: if there are NaN among the weights; the model is then as it was.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", pattern="2:4"))
        >>> int((model[0].weight != 0).sum())
        16
    """
    pruner = Pruner(model, config)
    for plan in pruner.plans:
        if plan.scorer.learned or plan.scorer.observes:
            raise RecipeError(
                f"scorer '{plan.scorer.name}' learns from training, so it cannot prune in one shot. Use 'magnitude' "
                "here, or SparsityCallback with a Trainer"
            )
    pruner.attach()
    try:
        pruner.step(progress=1.0)
    except SparsityError:
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
        alive = [plan.pattern.pool((layer.weight != 0).float()) > 0 for layer in plan.layers.values()]
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
