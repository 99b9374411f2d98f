"""Which units a pattern makes of the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..config.module_names import NamePattern
from ..modeling.architectures import FilterBlock, SubBlock, match_sub_blocks
from ..modeling.layer_matching import match_weights
from .patterns import Lines, OnMatrix, Pattern, Structure
from .unit import Member, Unit


def find_units(
    model: nn.Module, pattern: Pattern, targets: Sequence[NamePattern] | None, exclude: Sequence[NamePattern]
) -> list[Unit]:
    """Return the units that a pattern makes of the weights that are targeted; without masks.

    Raises:
        PatternError: if the pattern does not fit a weight, or needs an architecture that is not known.
        RecipeError: if targets or exclude match nothing.
    """
    if isinstance(pattern, Structure):
        blocks = match_sub_blocks(model, pattern.kinds, targets, exclude, f"pattern {pattern}")
        return [_unit(block, pattern) for block in blocks]
    units = []
    for name, slot in match_weights(model, targets, exclude).items():
        view = slot.view
        divided = pattern if view.is_plain else OnMatrix(pattern, view)
        member = Member(name, slot.module, divided, attribute=slot.attribute)
        divided.check(slot.shape, member.name)
        units.append(Unit([member]))
    return units


def _unit(block: SubBlock | FilterBlock, pattern: Structure) -> Unit:
    if isinstance(block, FilterBlock):
        reader = Member(block.output_name, block.output, Lines(axis=1, size=block.size))
        return Unit([reader], block.kind, source=block)
    return Unit(_members(block, pattern), block.kind)


def _members(block: SubBlock, pattern: Structure) -> list[Member]:
    """Return the weights of a sub-block that have lines of a group, the one that the groups leave by first."""
    exit_pattern = pattern.divide(block, [block.exit])
    assert exit_pattern is not None
    members = [Member(block.output_name, block.output, exit_pattern)]
    for name, layer in block.inputs.items():
        divided = pattern.divide(block, [part for part in block.parts if part.layer is layer])
        if divided is not None:
            members.append(Member(name, layer, divided, True))
    return members
