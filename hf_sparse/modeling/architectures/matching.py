"""Find the attention and feed-forward sub-blocks of a model, all of them or those that globs name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from torch import nn

from ...config.module_names import NamePattern, entries, matches
from ...errors import PatternError, RecipeError
from ...utils.text import kind_of_name
from ..layer_matching import refuse_runtime
from ..model_state import check_model
from ..ownership import count_owners
from .base import FAMILIES, Attention, Family, FeedForward, Kind, SubBlock
from .experts import ExpertBlock
from .filters import FilterBlock, filters_in

logger = logging.getLogger(__name__)


def known_sub_blocks(model: nn.Module) -> list[SubBlock]:
    """Return the attention and feed-forward sub-blocks that a family describes, in the order of the model.

    Those that share a weight with another module (an encoder tied to its decoder) are left out: what is pruned here
    would be pruned there.
    """
    owners = count_owners(model)
    tables: list[tuple[Attention | FeedForward, Family]] = []
    for family in FAMILIES.values():
        tables += [(table, family) for table in family.attentions]
        tables += [(table, family) for table in family.feed_forwards]
    found = []
    for name, module in model.named_modules():
        matches = (table.find(name, module, family.package) for table, family in tables)
        found += [block for block in matches if block is not None]
    return [
        block
        for block in found
        if all(owners[id(own)] == 1 for layer in (*block.inputs.values(), block.output) for own in layer.parameters())
    ]


def known_experts(model: nn.Module) -> list[ExpertBlock]:
    """Return the mixtures of experts that a family describes, in the order of the model."""
    tables = [table for family in FAMILIES.values() for table in family.experts]
    found = [table.find(name, module) for name, module in model.named_modules() for table in tables]
    return [block for block in found if block is not None]


def known_filters(model: nn.Module) -> list[FilterBlock]:
    """Return the convolutions that a family describes and whose filters can leave, in the order of the model."""
    return filters_in(model, [table for family in FAMILIES.values() for table in family.filters])


def find_blocks(model: nn.Module, wanted: str) -> list[SubBlock | FilterBlock]:
    """Return the sub-blocks of a model and the convolutions whose filters can leave.

    Args:
        wanted: what they are for, the subject of the error.

    Raises:
        PatternError: if no family knows any module of the model.
        BackendError: if the model is in runtime form.
    """
    check_model(model)
    filters = known_filters(model)
    if filters:
        refuse_runtime(model, wanted)
        return [*known_sub_blocks(model), *filters]
    return [*find_sub_blocks(model, wanted)]


def find_sub_blocks(model: nn.Module, wanted: str) -> list[SubBlock]:
    """Return the sub-blocks of a model.

    Args:
        wanted: what they are for, the subject of the error.

    Raises:
        PatternError: if no family knows any module of the model.
        BackendError: if the model is in runtime form.
    """
    check_model(model)
    refuse_runtime(model, wanted)
    found = known_sub_blocks(model)
    if not found:
        raise PatternError(
            f"{wanted} needs to know which weights form a head, a neuron or a filter, and hf_sparse does not know "
            f"that of {type(model).__name__}. It knows the families {', '.join(FAMILIES)}; another is one file in "
            "hf_sparse/modeling/architectures (its tables name the modules, as bert.py does). Patterns element, block, "
            "row, column and n:m work on any model"
        )
    return found


def match_sub_blocks(
    model: nn.Module,
    kinds: Sequence[Kind],
    targets: Sequence[NamePattern] | None,
    exclude: Sequence[NamePattern],
    wanted: str,
) -> list[SubBlock | FilterBlock]:
    """Return the sub-blocks that a group means.

    Args:
        kinds: "attention", "feed_forward", "convolution", or several.
        targets: shell globs over names of sub-blocks or of their layers; None = all.
        exclude: globs of what to leave out.
        wanted: the pattern, for messages.

    Raises:
        PatternError: if no family knows the model.
        RecipeError: if nothing is left, or a glob or a name of a list matches nothing.
    """
    experts = known_experts(model) if "feed_forward" in kinds else []
    # One that compaction has left without a head or a neuron has none to remove.
    every = [block for block in find_blocks(model, wanted) if block.kind in kinds and block.groups]
    if not every:
        why = f". {_of_experts(model, experts)}" if experts else ""
        raise RecipeError(f"{wanted} finds no {' or '.join(kinds)} in this {type(model).__name__}{why}")
    listed = f"{wanted} could match: {', '.join(dict.fromkeys(kind_of_name(block.name) for block in every))}."
    for key, globs in (("targets", targets or ()), ("exclude", exclude)):
        for glob, stated in entries(globs, key):
            if not any(_matches(block, glob) for block in every):
                raise RecipeError(f"{stated} matches no {' or '.join(kinds)} of the model. {listed}")
    chosen = [
        block
        for block in every
        if (targets is None or any(_matches(block, glob) for glob in targets))
        and not any(_matches(block, glob) for glob in exclude)
    ]
    if not chosen:
        raise RecipeError(f"targets and exclude together leave no {' or '.join(kinds)}. {listed}")
    if experts and targets is None:
        logger.warning(f"{wanted} leaves something out. {_of_experts(model, experts)}")
    return chosen


def _of_experts(model: nn.Module, experts: Collection[ExpertBlock]) -> str:
    """Say that the neurons of experts are not a group of any pattern."""
    held = sum(parameter.numel() for block in experts for parameter in block.experts.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"The neurons of the experts in {len(experts)} mixtures ({held / max(1, total):.1%} of the model's parameters) "
        "are not pruned by patterns: whole experts leave with hf_sparse.prune_experts or merge_experts (hf-sparse drop "
        "--experts)"
    )


def _matches(block: SubBlock | FilterBlock, glob: NamePattern) -> bool:
    return any(matches(name, glob) for name in (block.name, *block.inputs, block.output_name))
