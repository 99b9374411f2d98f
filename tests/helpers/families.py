"""Every model class of transformers that an Auto class knows, without weights: on the meta device, with few layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


@functools.cache
def class_names() -> dict[str, str]:
    """Return the names of all model classes, each with its model type."""
    names: dict[str, str] = {}
    for key, mapping in vars(modeling_auto).items():
        if key.startswith("MODEL") and key.endswith("_MAPPING_NAMES"):
            for kind, classes in mapping.items():
                for name in [classes] if isinstance(classes, str) else classes:
                    names.setdefault(name, kind)
    return names


def few_layers(config: Any) -> Any:
    """Reduce the number of layers of a config, and of those inside it, to four."""
    for key in COUNTS:
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > 4:
            setattr(config, key, 4)
    for inner in vars(config).values():
        if isinstance(inner, transformers.PreTrainedConfig):
            few_layers(inner)
    return config


def on_meta(name: str) -> Any:
    """Return a model of this class with the default config of its type; None if it cannot be built like this."""
    cls = getattr(transformers, name, None)  # some names in the mappings are not exported
    if cls is None:
        return None
    for reduce in (few_layers, lambda config: config):  # some lists in a config are as long as the model is deep
        try:
            config = (getattr(cls, "config_class", None) or transformers.CONFIG_MAPPING[class_names()[name]])()
            if type(getattr(config, "backbone_config", None)).__name__ == "TimmBackboneConfig":  # timm is not needed
                backbone: Any = transformers.ResNetConfig
                config = cls.config_class(backbone_config=backbone(out_features=["stage4"]))
            with torch.device("meta"):
                return cls(reduce(config))
        except Exception:  # noqa: BLE001, S112 - a missing package, a config that needs arguments, a tensor that meta cannot make
            continue
    return None
