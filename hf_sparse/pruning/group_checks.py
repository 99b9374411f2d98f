"""What is checked of the groups of a config once they are bound to a model, and what a user is warned of."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from ..errors import RecipeError
from ..modeling.zero_preservation import keeps_zeros
from .compressions import FormGroup
from .group import PruningGroup
from .patterns import Element
from .selection import Uniform, kept_count

logger = logging.getLogger(__name__)

ROUNDING = 0.01
"""How far the sparsity that whole groups allow may be from the requested one without a warning."""


def warn_of_freed_zeros(groups: Sequence[PruningGroup]) -> None:
    """Warn if zeros that weights have kept since an earlier pruning would train again, which few expect."""
    freed = []
    for group in groups:
        # Masks that begin with the smallest weights cover the zeros, if they begin with as many of them.
        smallest = isinstance(group.pattern, Element) and group.scorer.keeps_largest
        for member in group.members:
            weight = member.weight
            if keeps_zeros(member.slot) and not weight.is_meta:  # offloaded: attaching refuses it
                left = int(torch.count_nonzero(weight))
                covered = smallest and kept_count(weight.numel(), group.sparsity_at(0.0)) <= left
                freed += [] if covered or left == weight.numel() else [member.name]
    if freed:
        logger.warning(
            f"{len(freed)} weights (first: {freed[0]}) have zeros of an earlier pruning, and these are free to train "
            "from now on: the new masks begin with other weights than those. To go on from them, use scorer "
            "'magnitude' and pattern 'element', and let the schedule begin where they are, as initial=0.9 for 90 %"
        )


def warn_of_rounding(groups: Sequence[PruningGroup]) -> None:
    """Warn where the groups of a pattern are so few that the masks will be at another sparsity than the requested."""
    for group in groups:
        sizes = [unit.groups for unit in group.units]
        multiple = max(group.pattern.multiple(unit.kind) for unit in group.units)
        if group.config.sparsity is None or min(sizes) * ROUNDING >= multiple:
            continue
        reached = group.reached()
        if abs(reached - group.sparsity) > ROUNDING:
            few = str(min(sizes)) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
            number = "a whole number of" if multiple == 1 else f"a multiple of {multiple}"
            logger.warning(
                f"sparsity {group.sparsity:g} was requested, and the masks will be at {reached:.4g}: pattern "
                f"{group.pattern} keeps {number} groups, at least one, and there are {few} in each of "
                f"{len(sizes)} places. {'A finer pattern' if multiple == 1 else 'A smaller multiple'} rounds less"
                + ("; selection 'global' rounds once for all of them" if isinstance(group.selection, Uniform) else "")
            )


def check_disjoint(groups: Sequence[PruningGroup | FormGroup]) -> None:
    """Raise `RecipeError` if a weight is in two groups."""
    owner: dict[str, int] = {}
    for index, group in enumerate(groups):
        for name in group.layers:
            if name in owner:
                raise RecipeError(
                    f"'{name}' is in group {owner[name]} and in group {index}, but a weight has one mask. Exclude it "
                    "from one of them"
                )
            owner[name] = index


def check_shards(group: PruningGroup) -> None:
    """Raise `RecipeError` if the weights are divided in a way in which those of this group cannot be scored."""
    if any(isinstance(member.hidden, DTensor) for member in group.members):
        refuse_shards(group)


def refuse_shards(group: PruningGroup) -> None:
    """Raise `RecipeError` if this group does not work on weights that are going to be sharded."""
    if not group.scorer.works_on_shards():
        raise RecipeError(
            f"scorer '{group.scorer.name}' does not work on weights that fully_shard has divided: what it keeps of an "
            "entry depends on gradients of other entries (`elementwise` is False), and each process has some rows of "
            "each gradient. Use scorer 'taylor', 'movement' or 'magnitude'"
        )
    if not group.selection.works_on_shards:
        raise RecipeError(
            f"pattern {group.pattern} with selection '{group.selection.name}' does not work on weights that "
            "fully_shard has divided. Use selection 'uniform' or 'global'"
        )
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in [*group.hidden, *group.scores]}
    if group.scores and len(types) > 1:
        raise RecipeError(
            f"fully_shard wants one data type, but weights and scores are {' and '.join(sorted(types))}. Give the "
            "scorer the dtype of the weights"
        )
