"""Compacted models that a config can express: then they are saved dense, and load without hf_sparse.

Where all layers have lost as much, the sizes of the config do it (`intermediate_size`). Where they differ, transformers
5.23 has `per_layer_config`, which few families read, and not for every size (FORMAT.md lists them). Nothing is known
here about families: a config is tried, and counts if the model that transformers builds of it has every shape.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.architectures import known_sub_blocks
from ..modeling.class_swap import Swapped

SIZES = {"attention": ("num_attention_heads",), "feed_forward": ("intermediate_size", "hidden_dim", "ffn_dim", "d_ff")}
"""Names of the size of each kind of sub-block in configs; the first that a config has counts."""

_KEY_VALUE_HEADS = "num_key_value_heads"


def expressed_in_config(model: PreTrainedModel) -> Any:
    """Return the config of a model that builds it without edits, or None if no config does.

    Args:
        model: compacted.
    """
    if any(isinstance(module, Swapped) for module in model.modules()):
        return None  # a module computes something else than its class
    config: Any = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(name, None)
    text = config.get_text_config()
    try:
        overrides = _overrides(model, text)
        if overrides:
            text.per_layer_config = overrides
        with torch.device("meta"):
            built = type(model)._from_config(config)
    except Exception:  # noqa: BLE001  a config that does not fit is refused by each class in its own way
        return None
    return config if _shapes(built) == _shapes(model) else None


def _overrides(model: nn.Module, config: Any) -> dict[int, dict[str, int]]:
    """Put the sizes that all layers share into a config, and return those that differ, by layer.

    Raises:
        ValueError: if a layer has two sizes of a kind, or the config has no name for it.
    """
    overrides: dict[int, dict[str, int]] = {}
    for kind, names in SIZES.items():
        sizes = _sizes(model, kind)
        if not sizes:
            continue
        name = next((name for name in names if hasattr(config, name)), None)
        if name is None:
            raise ValueError(f"the config has no size for {kind}")
        if kind == "attention":
            sizes_of_keys = _key_value_heads(config, sizes, getattr(config, name))
            _put(config, overrides, _KEY_VALUE_HEADS, sizes_of_keys)
        _put(config, overrides, name, sizes)
    return overrides


def _sizes(model: nn.Module, kind: str) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for block in known_sub_blocks(model):
        numbers = [int(part) for part in block.name.split(".") if part.isdecimal()]
        if block.kind == kind and numbers and sizes.setdefault(numbers[-1], block.groups) != block.groups:
            raise ValueError(f"layer {numbers[-1]} has two sizes")
    return sizes


def _key_value_heads(config: Any, sizes: dict[int, int], before: int) -> dict[int, int]:
    """Return the key and value heads of each layer, where they are not one for each query head."""
    total = getattr(config, _KEY_VALUE_HEADS, None)
    if total is None:
        return {}
    return {layer: size * total // before for layer, size in sizes.items()}


def _put(config: Any, overrides: dict[int, dict[str, int]], name: str, sizes: dict[int, int]) -> None:
    if len(set(sizes.values())) == 1:
        setattr(config, name, next(iter(sizes.values())))
        return
    for layer, size in sizes.items():
        overrides.setdefault(layer, {})[name] = size


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
