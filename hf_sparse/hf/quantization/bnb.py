"""A second quantization, by bitsandbytes, of the weights that hf_sparse decodes or prunes.

Where nothing is pruned, the quantizer of transformers for bitsandbytes takes each weight as it is decoded, so that the
dense model is never in memory. Pruning looks at many weights at once, so there it quantizes the whole model afterwards.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from ...errors import RecipeError
from ...pruning.compaction import edits_of
from .. import patches
from .config import SparseConfig
from .saving import save_plain


def second_quantizer(config: SparseConfig) -> HfQuantizer | None:
    """Make the quantizer that a config asks for beside ours, if any."""
    if config.quantization_config is None:
        return None
    return AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=False)


def check_one_device(device_map: Any) -> None:
    """Raise `RecipeError` if a model that is to be quantized as a whole is spread over several devices."""
    if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
        raise RecipeError(
            "pruning and quantizing in one load needs the whole model on one device, but device_map spreads it over "
            f"{sorted(map(str, set(device_map.values())))}. Prune and save first, then load with quantization_config"
        )


@torch.no_grad()
def quantize(model: PreTrainedModel, second: HfQuantizer, device_map: Any) -> None:
    """Quantize a model that is loaded, in place."""
    before = dict(model.named_modules())
    second._process_model_before_weight_loading(model, device_map=device_map)
    for name, new in list(model.named_modules()):
        old = before.get(name)
        if old is None or old is new:
            continue
        key = f"{name}.weight"
        new.weight = second.get_quantize_ops().convert({key: cast(Any, old).weight.detach()}, model=model)[key]
        new.bias = old.bias
        new.train(old.training)


def hand_over(model: PreTrainedModel, second: HfQuantizer) -> PreTrainedModel:
    """Make the model one of the second quantizer, which saves, dequantizes and loads it from now on."""
    loaded = cast(Any, model)
    save_plain(model)
    if edits_of(model):
        patches.put(model, "save_pretrained", _refuse_to_save)
    loaded.hf_quantizer = second
    loaded.quantization_method = second.quantization_config.quant_method
    model.config.quantization_config = second.quantization_config
    return second._process_model_after_weight_loading(model)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stand in for `save_pretrained` of a model that nothing could load again."""
    raise RecipeError(
        "a compacted model that bitsandbytes has quantized cannot be saved: its layers have sizes that a "
        "checkpoint of bitsandbytes cannot express. Keep the packed checkpoint and quantize it at each load"
    )
