"""One-shot pruning: no training, and data only where the method looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError
from ..modeling.model_state import sparse_weights
from ..utils.validation import check_batches
from .calibrated.blockwise import prune_blockwise
from .calibrated.tasks import LayerUpdate
from .group import PruningGroup
from .pruner import Pruner
from .selection import kept_count

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M,
    config: SparsityConfig | Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    on_layer: Callable[[LayerUpdate], None] | None = None,
) -> M:
    """Prune a model in place to its final sparsity, at once, and return it.

    Scorers that look at the inputs of layers (wanda, sparsegpt), selection "owl" and a reconstruction go block by
    block: each is calibrated, pruned, and run again with its pruned weights before the next. Their batches need no
    labels; padding does not count. Each of the experts that transformers stacks in one tensor (`targets: "*.experts"`)
    is a weight of its own, calibrated with the tokens that the router sends to it; without any, it is pruned by
    magnitude, and named in a warning.

    Args:
        model: any module with linear layers; a model of transformers saves packed from then on.
        config: `SparsityConfig`, or a mapping with its keys; schedules do not matter.
        batches: keyword arguments of the model, for the scorers that look at data: wanda and sparsegpt; with labels,
            gradient, taylor, head_importance (see `Pruner.measure`). Use training data.
        on_layer: called with the `LayerUpdate` of each layer that was pruned block by block: how much the weights that
            are kept were changed, and the error of the layer's output.

    Raises:
        RecipeError: for scorers that learn from training, for those that look at data if there are no batches, for
            batches that no scorer looks at, for less sparsity than an earlier pruning left, and as `Pruner`. The model
            is then as it was.
        SparsityError: if there are NaN among the weights, and as `Pruner.measure`. The model is then as it was. Block
            by block, what is wrong with a layer or its inputs is found when it is reached: the blocks before it are
            pruned by then, so load the model again.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", pattern="2:4"))
        >>> int((model[0].weight != 0).sum())
        16
    """
    if batches is not None:
        check_batches(batches)
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
                f"scorer '{name}' looks at data. Give sparsify some batches (hf-sparse prune: --data), or use "
                "'magnitude', which needs none"
            )
    _check_blockwise(pruner, batches)
    fitted = batches is not None and any(form.compression.fits_inputs for form in pruner.forms)
    blind = all(group.scorer.source == "weights" and not group.by_blocks for group in pruner.groups)
    if batches is not None and blind and not fitted:
        raise RecipeError(
            "there are batches, but no scorer looks at data: wanda, sparsegpt, gradient, taylor and head_importance do"
        )
    alive = _alive_before(pruner)
    if fitted or any(group.by_blocks for group in pruner.groups):
        assert batches is not None
        _check_left(pruner, alive)
        prune_blockwise(pruner, batches, on_layer=on_layer)
        pruner.mark()
        return model
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


def _check_blockwise(pruner: Pruner, batches: object) -> None:
    """Raise `RecipeError` for what only calibration data makes possible, without any."""
    for form in pruner.forms:
        if form.compression.needs_inputs and batches is None:
            raise RecipeError(
                f"compression '{form.compression.name}' is fitted to the inputs of layers. Give sparsify some batches "
                "(hf-sparse prune: --data)"
            )
    for group in pruner.groups:
        group.check_observable()
        if group.by_blocks and batches is None:
            if group.compression is not None:
                raise RecipeError(
                    f"compression '{group.compression.name}' looks at the inputs of layers. Give sparsify some batches "
                    "(hf-sparse prune: --data), or leave it out"
                )
            part = "a reconstruction" if group.config.reconstruction is not None else f"'{group.selection.name}'"
            raise RecipeError(
                f"{part} looks at the inputs of layers. Give sparsify some batches (hf-sparse prune: --data), or leave "
                "it out"
            )


def _check_left(pruner: Pruner, alive: Mapping[str, Tensor]) -> None:
    """Raise `RecipeError` if more would be kept than an earlier pruning has left, before anything is pruned."""
    for group in pruner.groups:
        if group.config.sparsity is None:
            continue
        units = [unit for unit in group.units if unit.name in alive]
        kept = [kept_count(unit.groups, group.sparsity_at(1.0)) for unit in units]
        # Each row, or each block of columns of SparseGPT, keeps a whole number of groups, rounded down.
        rounded = [unit.pattern.groups_shape(unit.members[0].shape)[0] for unit in units]
        _refuse_more(group, alive, sum(kept) - sum(rounded))


def _alive_before(pruner: Pruner) -> dict[str, Tensor]:
    """Return which groups are left of each unit with a weight that an earlier pruning made sparse, by its name."""
    sparse = set(sparse_weights(pruner.model))
    return {unit.name: unit.alive() for unit in pruner.units if any(member.name in sparse for member in unit.members)}


def _check_not_sparser(pruner: Pruner, alive: dict[str, Tensor]) -> None:
    """Raise `RecipeError` if masks would keep more than an earlier pruning has left: it cannot be brought back."""
    for group in pruner.groups:
        if group.config.sparsity is None:
            continue  # where the pattern or the selection decides, anything that is sparser fulfils it too
        _refuse_more(group, alive, sum(int(unit.kept().sum()) for unit in group.units if unit.name in alive))


def _refuse_more(group: PruningGroup, alive: Mapping[str, Tensor], kept: int) -> None:
    units = [unit for unit in group.units if unit.name in alive]
    left = sum(int(alive[unit.name].sum()) for unit in units)
    if left + len(units) < kept:
        total = sum(unit.groups for unit in units)
        raise RecipeError(
            f"sparsity {group.sparsity:g} was requested, but '{units[0].name}' and {len(units) - 1} more weights are "
            f"at {1 - left / total:.4f} since an earlier pruning, and removed weights cannot be restored. Request a "
            "higher sparsity, exclude these weights, or start from the dense model"
        )
