"""Names of tensors in a checkpoint and in memory: transformers renames, merges and splits some while it loads.

A ViT is stored as `vit.encoder.layer.0...` and is `vit.layers.0...` in memory; a base model loads from a model with a
head and the other way round; experts that are stored one by one are one tensor in memory. The rules are those of
transformers (`core_model_loading`), applied here to names, and to the tensors of a state dict.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .pack_state import is_training_state


class InMemory(NamedTuple):
    """Where a stored tensor goes.

    Attributes:
        names: of the tensors in memory that it becomes, or becomes a part of.
        converted: whether its values are rearranged on the way, and not only its name.
    """

    names: tuple[str, ...]
    converted: bool = False

    @property
    def name(self) -> str:
        """The first name, of several if the tensor is split."""
        return self.names[0]


class _Rules:
    """The renamings and conversions of one load; they keep state, so each pass over the keys has its own copy."""

    def __init__(self, model: PreTrainedModel, mapping: Sequence[Any] | None) -> None:
        rules = copy.deepcopy(list(mapping or ()))
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()

    def apply(self, key: str) -> tuple[str, str | None]:
        """Return the name in memory, and the pattern of the conversion that takes the tensor, if any."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return name, pattern


def names_in_memory(
    model: PreTrainedModel, keys: Iterable[str], mapping: Sequence[Any] | None = None
) -> dict[str, InMemory]:
    """Return where stored tensors go, by key; those that the model has no place for are left out.

    Args:
        keys: all keys of the checkpoint (some rules look at several).
        mapping: rules of the load; None = those that transformers has for this model.
    """
    rules = _Rules(model, get_model_conversion_mapping(model) if mapping is None else mapping)
    found: dict[str, InMemory] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rules.apply(key)
        if name not in rules.state:
            continue
        if pattern is None:
            found[key] = InMemory((name,))
        else:
            found[key] = InMemory(_targets(name, rules.by_pattern[pattern].target_patterns, rules.state), True)
    return found


def _targets(name: str, patterns: Sequence[str], state: Container[str] | Iterable[str]) -> tuple[str, ...]:
    """Return the names of all tensors that a conversion makes, from the name of the first."""
    first, names = patterns[0], []
    for pattern in patterns:
        other = name.replace(first, pattern, 1)
        if "*" in other:
            shape = re.compile(re.escape(other).replace(r"\*", r"\d+"))
            names += [each for each in state if shape.fullmatch(each)]  # type: ignore[union-attr]
        else:
            names.append(other)
    return tuple(names)


def as_in_memory(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a dense state dict of a checkpoint under the names, and in the layout, that the model has in memory.

    The training state of a weight follows its name. A key that the model has no place for stays, so that it is reported
    as unexpected.
    """
    rules = _Rules(model, get_model_conversion_mapping(model))
    out: dict[str, Tensor] = {}
    pending: dict[str, WeightConverter] = {}
    training = [key for key in state if is_training_state(key, state)]
    for key in sorted(state.keys() - set(training), key=dot_natural_key):
        name, pattern = rules.apply(key)
        if name not in rules.state:
            out[key] = state[key]
        elif pattern is None:
            out[name] = state[key]
            out |= {name + part.removeprefix(key): state[part] for part in training if part.rpartition("_")[0] == key}
        else:
            converter = pending.setdefault(name, copy.deepcopy(rules.by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, state[key])  # type: ignore[arg-type]
    # That of a weight which is merged or split has its name in memory already.
    out |= {key: state[key] for key in training if key.rpartition("_")[0] not in state}
    for name, converter in pending.items():
        for target, tensor in converter.convert(name, model=model, config=model.config).items():
            out[target] = tensor[0] if isinstance(tensor, list) else tensor
    return out
