"""DeepSpeed in the Trainer: ZeRO-1 and 2 divide what the optimizer keeps, and masks work as in DDP; ZeRO-3 does not."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ...errors import RecipeError
from ...pruning.pruner import Pruner


def check_deepspeed(trainer: Trainer, pruner: Pruner) -> None:
    """Raise `RecipeError` if pruning does not work with the DeepSpeed settings of a Trainer; else do nothing."""
    if not trainer.is_deepspeed_enabled:
        return
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise RecipeError(
            "SparsityCallback does not work with DeepSpeed ZeRO-3: between passes it leaves each parameter empty, of "
            "shape (0,), on every process, and masks, selections and checkpoints read the weights there. Use ZeRO-1 or "
            "2, or FSDP2 (fsdp_version: 2), which divides weights too"
        )
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
