"""A tiny model of every family of transformers: default configs whose sizes are made small."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto import configuration_auto, modeling_auto

MAX_PARAMETERS = 25_000_000
ATTEMPTS = ("small", "proportional", "computed", "shallow", "small unchecked", "shallow unchecked")
"""Ways to shrink a config, tried in turn: not every model can be built of the same sizes."""

SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cosmos3_edge": {"text_config.rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
    "cvt": {"depth": [1, 2, 3]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 40},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "granite4_vision": {
        "deepstack_layer_map": [[1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": {"prediction_length": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [0, 1]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 4},
    "neucodec": {"quantization_dim": 64, "encoder_hidden_size": 4},
    "reformer": {"is_decoder": True},
    "time_series_transformer": {"prediction_length": 4},
    "xlnet": {"d_model": 32, "n_head": 4, "d_head": 8},
    "vibevoice": {"acoustic_tokenizer_config.num_filters": 2, "semantic_tokenizer_config.num_filters": 2},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 2,
        "semantic_tokenizer_encoder_config.num_filters": 2,
    },
    "xcodec2": {"quantization_dim": 64, "encoder_hidden_size": 4},
}
"""What a config of a family needs besides small sizes: its defaults are None, or fit no model."""

_LAYERS = ("layer", "depth", "block", "stage")
_HEADS = ("head", "num_attention_groups", "n_group")


def families() -> list[str]:
    """Return the model types that have a model."""
    return sorted(kind for kind in configuration_auto.CONFIG_MAPPING_NAMES if any(_class_names(kind)))


def model_class(kind: str) -> type[PreTrainedModel]:
    """Return the model with a head where there is one: it holds the base model below a prefix.

    Raises:
        ImportError, AttributeError: if it needs a package that is not installed.
    """
    import transformers

    return getattr(transformers, next(_class_names(kind)))


def _class_names(kind: str) -> Iterator[str]:
    mappings = [name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    base = "MODEL_MAPPING_NAMES"
    for name in sorted(mappings, key=lambda name: (name == base, "PRETRAINING" in name, name)):
        found = vars(modeling_auto)[name].get(kind)
        if found is not None:
            yield found if isinstance(found, str) else found[0]


def tiny_config(kind: str, attempt: str) -> PreTrainedConfig:
    """Return a config of a family with small sizes."""
    config: Any = model_class(kind).config_class
    made: Any = config()
    if type(getattr(made, "backbone_config", None)).__name__ == "TimmBackboneConfig":  # timm is not needed
        made = config(backbone_config=ResNetConfig(out_features=["stage4"]))  # type: ignore[call-arg]
    attempt, _, unchecked = attempt.partition(" ")
    if attempt == "computed":
        made = _recompute(made)
    else:
        _shrink(made, attempt)
    for name, value in SETTINGS.get(kind, {}).items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, made), last, value)
    if unchecked:  # a config that cannot be read again by itself, but as a part of another can
        return made
    with tempfile.TemporaryDirectory() as folder:  # what a saved model reads, with all checks
        made.save_pretrained(folder)
        return config.from_pretrained(folder)


def _recompute(config: Any) -> Any:
    """Build a config of small sizes anew, with the lists that it computes from them."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _recompute(value)
        elif type(value) is int and not name.startswith("_"):
            small[name] = _size(name, value, "small")
    return type(config)(**small)


def _shrink(config: Any, attempt: str, depth: int = 0) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig) and depth < 4:
            _shrink(value, attempt, depth + 1)
        elif type(value) is int:
            _set(config, name, _size(name, value, attempt))
        elif name in ("_out_indices", "_out_features"):
            _set(config, name, [1] if name == "_out_indices" else ["stage1"])
        elif name == "stage_names":
            _set(config, name, [each for each in value if each in ("stem", "stage1", "stage2")])
        elif isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
            small = [_size(name, each, attempt) for each in value]
            _set(config, name, type(value)(small[: _kept(value, layers)]))
        elif isinstance(value, (list, tuple)):
            _set(config, name, value[: _kept(value, layers)])


def _kept(value: Any, layers: Any) -> int:
    """Return how many entries of a list stay: what has one for each layer has two."""
    return 2 if len(value) == layers else len(value)


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, ValueError, TypeError, NotImplementedError):
        return  # computed from others


def _size(name: str, value: int, attempt: str) -> int:
    if name.startswith("_") or value <= 2:
        return value
    if name.endswith(("feat_extract_layers", "_period", "_offset")):  # fit lists, or each other
        return value
    if name.endswith(("_id", "_ids", "_index", "_token")):
        return min(value, 1)
    if "vocab" in name:
        return min(value, 100)
    if any(word in name for word in _LAYERS) and "size" not in name and "dim" not in name:
        return min(value, 2)
    if attempt == "shallow":
        return value
    if any(word in name for word in _HEADS) and "dim" not in name and "size" not in name:
        return min(value, 4)
    if attempt == "proportional":
        return max(value // 12, 4) if value >= 48 else value
    return 16 if "head" in name and value > 16 else min(value, 64)


def tiny_model(kind: str) -> PreTrainedModel:
    """Build a tiny model of a family.

    Raises:
        Exception: of the last attempt.
    """
    cls = model_class(kind)
    error: Exception = RuntimeError("no attempt")
    for attempt in ATTEMPTS:
        try:
            config = tiny_config(kind, attempt)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in cls(config).parameters())
            if count > MAX_PARAMETERS:
                raise ValueError(f"{count:,} parameters")
            torch.manual_seed(0)
            return cls(tiny_config(kind, attempt)).eval()
        except Exception as raised:  # noqa: BLE001  whatever a family does not like
            error = raised
    raise error
