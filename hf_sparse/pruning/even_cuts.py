"""Even cuts: what all sub-blocks of a model have lost alike is a number in its config, and needs no edits.

Such a model is a smaller model of its class, which any tool loads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import nn

from ..formats.structure import KINDS, Cut
from ..modeling.architectures import ExpertBlock, FilterBlock, SubBlock, known_experts, known_filters, known_sub_blocks
from ..modeling.integration import integration_of
from ..modeling.layer_kinds import Slot
from ..modeling.model_state import SPARSE_WEIGHTS, sparse_weights
from ..modeling.zero_preservation import free_zeros

Cuttable = SubBlock | ExpertBlock | FilterBlock

Cuts = dict[str, dict[str, Cut]]
"""Kind of edits -> name of the sub-block -> what is left of it."""


def move_to_config(model: nn.Module, cuts: Cuts) -> Cuts:
    """Write cuts that a config expresses into the config of a model, and return the others.

    They are expressed if a model that is built from the changed config has the same shapes and the same attributes.
    """
    blocks: list[Cuttable] = [*known_sub_blocks(model), *known_experts(model), *known_filters(model)]
    kinds = [kind for kind, key in KINDS.items() if cuts.get(key)]
    # All kinds together, or as many as the config can express.
    for count in range(len(kinds), 0, -1):
        for chosen in itertools.combinations(kinds, count):
            if _move(model, blocks, chosen, cuts):
                moved = {KINDS[kind] for kind in chosen}
                return {key: {} if key in moved else left for key, left in cuts.items()}
    return cuts


def _move(model: nn.Module, blocks: Sequence[Cuttable], kinds: Sequence[str], cuts: Cuts) -> bool:
    """Let the config express what the blocks of these kinds have lost, if it can; return whether it does."""
    changes, integration = _changes(blocks, kinds), integration_of(model)
    rebuilt = None if changes is None else integration.rebuilt(model, changes)
    if changes is None or rebuilt is None:
        return False
    others = [block for block in blocks if block.kind not in kinds and block.name in cuts[KINDS[block.kind]]]
    if not _is_same(model, rebuilt, [block for block in blocks if block.kind in kinds], others):
        return False
    before = integration.rebuilt(model, {})
    integration.change_config(model, changes)
    follow(model, before, rebuilt)
    return True


def follow(model: nn.Module, before: nn.Module | None, after: nn.Module) -> None:
    """Change the attributes of a model that depend on what has changed in its config.

    Args:
        before, after: models of its class, built from the config before and after the change.
    """
    modules, others = dict(after.named_modules()), {} if before is None else dict(before.named_modules())
    for name, module in model.named_modules():
        if name in modules and name in others:
            old, new = scalars(others[name]), scalars(modules[name])
            for key in old.keys() & new.keys():
                if old[key] != new[key]:
                    setattr(module, key, new[key])


def unmark_dense(model: nn.Module) -> None:
    """Forget of the weights that are meant to be sparse those that have no zeros any more."""
    names = sparse_weights(model)
    dense = {name for name in names if bool((model.get_parameter(name) != 0).all())}
    if dense:
        for module in model.modules():
            SPARSE_WEIGHTS.pop(module)
        SPARSE_WEIGHTS.set(model, tuple(name for name in names if name not in dense))
        free_zeros([Slot.of(model, name) for name in dense])


def _changes(blocks: Sequence[Cuttable], kinds: Sequence[str]) -> Mapping[str, int] | None:
    """Return keys of the config and their values, or None if the blocks of these kinds differ."""
    found: dict[str, int] = {}
    for kind in kinds:
        each = [block.config_values for block in blocks if block.kind == kind]
        if each[0] is None or any(values != each[0] for values in each):
            return None
        found |= each[0]
    return found or None


def _is_same(model: nn.Module, rebuilt: nn.Module, blocks: list[Cuttable], others: list[Cuttable]) -> bool:
    """Return whether a rebuilt model has the shapes of a model, and its sub-blocks the attributes of these.

    Args:
        others: sub-blocks that differ, and are in the edits.
    """
    apart = tuple(f"{name}." for block in others for name in block.layer_names)
    found, expected = rebuilt.state_dict(), model.state_dict()
    if found.keys() != expected.keys():
        return False
    if any(found[key].shape != expected[key].shape for key in found if not key.startswith(apart)):
        return False
    modules = dict(rebuilt.named_modules())
    return all(
        type(module) is type(modules.get(name)) and scalars(module) == scalars(modules[name])
        for block in blocks
        for name, module in _modules(model, block)
    )


def _modules(model: nn.Module, block: Cuttable) -> list[tuple[str, nn.Module]]:
    around = model.get_submodule(block.name)
    return [(f"{block.name}.{path}".strip("."), module) for path, module in around.named_modules()]


def scalars(module: nn.Module) -> dict[str, object]:
    """Return the plain numbers and strings among the attributes of a module: its sizes, positions, scales.

    Example:
        >>> scalars(nn.Linear(2, 3))
        {'in_features': 2, 'out_features': 3}
    """
    skipped = ("training", "gradient_checkpointing")
    kinds = (int, float, str)
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, kinds) and not key.startswith("_") and key not in skipped
    }
