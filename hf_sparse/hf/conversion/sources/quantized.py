"""Refused: checkpoints whose config or tensors say that the numbers in them are not the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ....errors import CheckpointError
from ....formats.compressed_tensors import METHOD
from ...quantization.config import METHOD as OURS
from ..checkpoint import Checkpoint
from ..source import PendingTensor, Source, register_source

_REASONS = {
    r"(mask_scores|ampere_permut_scores|mask_module\..*)$": (
        "it is a movement-pruning checkpoint from the middle of training: the mask is computed from scores and a "
        "threshold that is not in the file. Make the masks permanent first (counts_parameters.py and bertarize.py of "
        "the movement-pruning example, `compile_model` of nn_pruning)"
    ),
    r"(fake_quant|activation_post_process|\.quant\.|weight_quantizer|input_quantizer)": (
        "it is a quantization-aware checkpoint: its outputs are those of fake-quantized weights and activations, which "
        "no dense model has. Import the checkpoint from before quantization"
    ),
    r"\.(qweight|qzeros|weight_packed)$": "its weights are stored as quantized integers",
    r"^base_model\.model\..*\.lora_[AB]\.": "it holds LoRA adapters: merge them first (merge_and_unload of PEFT)",
}


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how a config says that the weights are stored; older compressed-tensors had a key of its own.

    Raises:
        CheckpointError: if that is not a mapping.
    """
    stated = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(stated, Mapping):
        raise CheckpointError("quantization_config in config.json should be a mapping")
    return stated


@register_source
class Quantized(Source):
    """What cannot be read, by the reason."""

    name = "quantized"
    rank = 10

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        stated = quantization(checkpoint.config)
        method = stated.get("quant_method")
        if method not in (None, OURS, METHOD):
            raise CheckpointError(f"the checkpoint is quantized ({method}), which convert does not read")
        for pattern, reason in _REASONS.items():
            found = [key for key in checkpoint.headers if re.search(pattern, key)]
            if found and method in (None, OURS):
                raise CheckpointError(f"'{found[0]}' and {len(found) - 1} more tensors cannot be imported: {reason}")
        return False

    def tensors(self) -> Iterator[PendingTensor]:
        raise NotImplementedError
