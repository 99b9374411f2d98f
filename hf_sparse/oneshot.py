"""One-shot pruning: no training, no data."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .config import SparsityConfig
from .errors import RecipeError, SparsityError
from .pruner import Pruner

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
