"""LoRA in a recipe: low-rank updates train beside a sparse model, and are merged with its zeros kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..hf.peft import log_update
from ..utils.text import shorten

FOLDER = "adapter"
"""In the output, with the updates alone."""


def check_lora(given: Any) -> None:
    """Refuse what cannot be options of `peft.LoraConfig`, as far as that is known without PEFT.

    Raises:
        RecipeError: if it is not a mapping from names, or trains whole layers too.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise RecipeError(f"`model.lora` must be a mapping with fields of peft.LoraConfig, got {shorten(given)}")
    if given.get("modules_to_save"):
        raise RecipeError("`model.lora.modules_to_save` trains layers in whole, and LoRA is merged here: leave it out")


def check_run(recipe: Any) -> None:
    """Refuse sections of a recipe that do not go with LoRA, before anything is loaded.

    Raises:
        RecipeError: naming them.
    """
    if recipe.model.lora is None:
        return
    others = [key for key in ("sparsity", "vocabulary", "freeze") if getattr(recipe, key)]
    if others or recipe.model.fill:
        raise RecipeError(
            f"`model.lora` trains low-rank updates beside the model as it is, and {(others or ['model.fill'])[0]} was "
            "given too: leave out one of the two"
        )
    if (strategy := recipe.training.get("save_strategy", "steps")) != "no":
        raise RecipeError(
            "`model.lora` is merged at the end, and a run cannot be resumed in between: set training.save_strategy to "
            f"'no', got {strategy!r}"
        )


def add_lora(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Put trainable low-rank updates beside the layers of a model; everything else is frozen.

    Args:
        given: fields of `peft.LoraConfig`, as in `{"r": 8, "target_modules": "all-linear"}`.

    Raises:
        RecipeError: if PEFT is not installed, or does not take the options.
    """
    try:
        import peft
    except ImportError as error:
        raise RecipeError(f"`model.lora` needs PEFT: pip install peft ({error})") from None
    try:
        model.add_adapter(peft.LoraConfig(**given))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`model.lora` does not fit peft.LoraConfig or the model: {error}") from error


def merge_lora(model: PreTrainedModel, output: Path | None) -> None:
    """Add the updates to the weights that are not zero, and leave a plain model; what falls on zeros is lost, and said.

    Args:
        output: the updates alone are kept there, in `FOLDER`; None = they are not (another process does).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if output is not None:
        model.save_pretrained(output / FOLDER)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            _replace(model, name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)
    log_update(model)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, layer)
