"""Compacted models that a config can express: then they are saved dense, and load without hf_sparse.

Where all layers have lost as much, the sizes of the config do it (`intermediate_size`). Where they differ, transformers
5.23 has `per_layer_config`, which few families read, and not for every size (FORMAT.md lists them). Nothing is known
here about families: a config is tried, and counts if the model that transformers builds of it has every shape and every
number of this one. (`compact` does the same for the families whose keys it knows.)
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..formats.structure import KINDS
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..pruning.compaction import edits_of
from ..pruning.even_cuts import scalars

NEURONS = ("intermediate_size", "hidden_dim", "ffn_dim", "d_ff")
"""Names of the width of the feed-forward part in configs; the first that a config has counts."""


def expressed_in_config(model: PreTrainedModel) -> Any:
    """Return the config of a model that builds it without edits, or None if no config does.

    Args:
        model: compacted.
    """
    config: Any = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(name, None)
    try:
        _change(config.get_text_config(), model)
        with torch.device("meta"):
            built = type(model)._from_config(config)
    except Exception:  # noqa: BLE001  a config that does not fit is refused by each class in its own way
        return None
    return config if _is_same(built, model) else None


def _change(config: Any, model: nn.Module) -> None:
    """Put the sizes of the sub-blocks that have lost something into a config.

    Raises:
        ValueError: if it has no name for one, or two sub-blocks of a layer differ.
    """
    edits = edits_of(model)
    if edits.experts:
        raise ValueError("experts are not a size of a layer")
    values: dict[str, dict[int, int]] = defaultdict(dict)
    for block in known_sub_blocks(model):
        if not getattr(edits, KINDS[block.kind]):
            continue
        layer = next(int(part) for part in block.name.split(".") if part.isdecimal())
        for name, value in _sizes(block, config).items():
            if values[name].setdefault(layer, value) != value:
                raise ValueError(f"layer {layer} has two sizes")
    overrides: dict[int, dict[str, int]] = defaultdict(dict)
    for name, of_layers in values.items():
        if len(set(of_layers.values())) == 1:
            setattr(config, name, next(iter(of_layers.values())))
            continue
        for layer, value in of_layers.items():
            overrides[layer][name] = value
    if overrides:
        config.per_layer_config = dict(overrides)


def _sizes(block: SubBlock, config: Any) -> Mapping[str, int]:
    """Return the keys of a config for the size of a sub-block."""
    if block.config_values is not None:
        return block.config_values
    if block.kind == "attention":
        if block.is_grouped or not block.groups:
            raise ValueError(f"no config has a size for '{block.name}'")
        return {"num_attention_heads": block.groups}
    return {next(name for name in NEURONS if hasattr(config, name)): block.groups}


def _is_same(built: nn.Module, model: nn.Module) -> bool:
    """Return whether two models have the same modules, shapes and numbers."""
    found, expected = dict(built.named_modules()), dict(model.named_modules())
    if found.keys() != expected.keys() or built.state_dict().keys() != model.state_dict().keys():
        return False
    if any(tensor.shape != model.state_dict()[name].shape for name, tensor in built.state_dict().items()):
        return False
    return all(
        type(found[name]) is type(module) and scalars(found[name]) == scalars(module)
        for name, module in expected.items()
    )
