"""DeepSpeed in the Trainer: with ZeRO-1 and 2 masks work as in DDP; with ZeRO-3 they are beside the weights."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ...errors import RecipeError
from ...pruning.pruner import Pruner

GATHERS = "stage3_gather_16bit_weights_on_model_save"


def check_deepspeed(trainer: Trainer, pruner: Pruner) -> None:
    """Raise `RecipeError` if pruning does not work with the DeepSpeed settings of a Trainer.

    Otherwise do nothing, but make masks ready for ZeRO-3, which is about to partition the model.
    """
    if not trainer.is_deepspeed_enabled:
        return
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        if plugin.deepspeed_config.get("zero_optimization", {}).get(GATHERS) in (False, "false", None):
            raise RecipeError(
                f"with DeepSpeed ZeRO-3 the Trainer saves a model only if {GATHERS} is true in the config of DeepSpeed "
                "(zero3_save_16bit_model: true in that of accelerate). Set it"
            )
        pruner.move_beside()
    warming = next((group.scorer.name for group in pruner.groups if group.scorer.warmup), None)
    if warming is not None:
        raise RecipeError(
            f"scorer '{warming}' with a `warmup` does not work with DeepSpeed: its optimizer has the scores and all "
            "else in one flat tensor, so their learning rate cannot rise alone. Leave `warmup` out"
        )
    if plugin.deepspeed_config.get("fp16", {}).get("enabled") in (True, "true") and any(
        group.scorer.source == "gradients" for group in pruner.groups
    ):
        raise RecipeError(
            "a scorer of gradients does not work with DeepSpeed in fp16, which scales the loss by a number that is not "
            "known here. Use bf16, or scorer 'movement' or 'magnitude'"
        )
