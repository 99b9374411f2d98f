"""Sparse transfer: fine-tune a sparse model of any origin on a new task, with its zeros fixed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from ..config.sparsity import GroupConfig
from ..errors import SparsityError
from ..formats.zero_patterns import MIN_ZEROS, looks_sparse
from ..modeling import zero_preservation
from ..modeling.integration import integration_of
from ..modeling.layer_kinds import Slot
from ..modeling.layer_matching import match_weights, refuse_runtime
from ..modeling.model_state import check_model, mark_sparse_weights

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def keep_zeros(model: M, targets: Sequence[str] | str | None = None) -> M:
    """Keep the zeros of a model in training, in place, and return it.

    For models that are sparse and do not know it: dense files with zeros, of whatever program. Train it in any Trainer
    or loop then, with a teacher or without, with any optimizer of torch: what is zero now stays zero. A model of
    transformers is saved packed from then on. (Models that hf_sparse has pruned or loaded packed keep their zeros
    anyway.) `hf_sparse.fill(model)` lets them train again.

    Args:
        model: without masks; call it before DistributedDataParallel or `fully_shard` wrap the model.
        targets: shell globs over names of layers, whose zeros all stay. None = every weight with two or more
            dimensions of which at least a tenth is zero, except embeddings.

    Raises:
        SparsityError: if no weight is sparse, or there are masks or adapters on the model.
        RecipeError: for a glob that matches no layer.
        BackendError: if the model is in runtime form.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> model[0].weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = torch.optim.AdamW(hf_sparse.keep_zeros(model).parameters(), lr=1.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> (model[0].weight != 0).tolist()
        [[True, False], [False, True]]
    """
    check_model(model)
    refuse_runtime(model, "keep_zeros()")
    _refuse_wrapped(model)
    paths = {module: path for path, module in model.named_modules()}
    if targets is not None:
        globs = GroupConfig(targets=targets, sparsity=0.5).target_names  # checks what they are
        names = [slot.name(paths[slot.module]) for slot in match_weights(model, globs).values()]
    else:
        names = [name for name, parameter in model.named_parameters() if looks_sparse(name, parameter)]
        _warn_of_others(model, names)
    if not any(bool((parameter == 0).any()) for name, parameter in model.named_parameters() if name in set(names)):
        raise SparsityError(
            f"the model has no sparse weight: none with two dimensions is zero in at least {MIN_ZEROS:.0%} of its "
            "elements. Prune it first (hf_sparse.sparsify), or name layers with `targets`"
        )
    mark_sparse_weights(model, names)
    zero_preservation.keep_zeros([Slot.of(model, name) for name in names])
    integration_of(model).after_keep_zeros(model)
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "parametrizations" in module._modules:
            raise SparsityError(f"'{name}' has a mask or another parametrization. End the pruning first: Pruner.bake()")
        if name.rpartition(".")[2] == "base_layer":
            raise SparsityError(
                f"'{name.removesuffix('.base_layer')}' is wrapped in adapters: call keep_zeros first, and put adapters "
                "on then"
            )


def _warn_of_others(model: nn.Module, names: Sequence[str]) -> None:
    """Warn once of matrices with as many zeros that are not kept: embeddings, and parameters of other names."""
    zeros: Mapping[str, int] = {
        name: int((parameter == 0).sum())
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in set(names) and not parameter.is_meta
    }
    many = {name: count for name, count in zeros.items() if count > MIN_ZEROS * model.get_parameter(name).numel()}
    if many:
        logger.warning(
            f"keep_zeros: {sum(many.values()):,} zeros of {len(many)} other parameters (first: {next(iter(many))}) "
            "are not kept, because they are embeddings or not weights of a layer"
        )
