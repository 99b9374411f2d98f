"""FSDP2 in the Trainer: what it cannot do is refused before step one, and its checkpoints hold the model once.

The Trainer's own way reads a model back by the names that parameters have in memory, and broadcasts it from process 0.
Masked weights have other names in a state dict, so they would silently stay as they were. But the Trainer also writes
`model.safetensors` into each checkpoint, in which we put all that a training needs to go on. So its two functions for
the model are wrapped, once: they leave out the second copy, and read the first. For models without masks the wrappers
change nothing. The optimizer's state is saved and loaded as ever.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import transformers.trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...errors import RecipeError
from ...modeling.model_state import is_marked
from ...pruning.group import refuse_shards
from ...pruning.masked_weight import placed_as
from ...pruning.pruner import Pruner
from ..quantization.state_dict import read_state

logger = logging.get_logger(__name__)


def check_fsdp(trainer: Trainer, pruner: Pruner) -> None:
    """Raise `RecipeError` if pruning does not work with the FSDP settings of a Trainer; without FSDP, do nothing.

    Where FSDP was requested and the Trainer does not do it, warn.
    """
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            logger.warning(
                "fsdp was requested, but accelerate shards on GPUs only; on this device the run is plain DDP"
            )
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    settings = {
        f"version={plugin.fsdp_version}": plugin.fsdp_version != 2,
        "cpu_ram_efficient_loading=true": plugin.cpu_ram_efficient_loading,
        "state_dict_type=SHARDED_STATE_DICT": "FULL_STATE_DICT" not in str(plugin.state_dict_type),
    }
    reasons = {
        f"version={plugin.fsdp_version}": "it flattens weights, and masks are of their shape. Use version 2",
        "cpu_ram_efficient_loading=true": "it takes the weights away when masks are on them already. Leave it out",
        "state_dict_type=SHARDED_STATE_DICT": "its checkpoints hold no model that can be loaded. Use FULL_STATE_DICT",
    }
    for setting, wrong in settings.items():
        if wrong:
            raise RecipeError(f"SparsityCallback does not work with fsdp_config {setting}: {reasons[setting]}")
    for group in pruner.groups:
        refuse_shards(group)


def announce_fsdp() -> None:
    """Wrap what the Trainer saves and loads models with under FSDP; a second call does nothing."""
    module: Any = transformers.trainer
    if getattr(module.save_fsdp_model, "knows_masks", False):
        return
    save_plain, load_plain = module.save_fsdp_model, module.load_fsdp_model

    @functools.wraps(save_plain)
    def save(plugin: Any, accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_marked(model):
            return None  # `model.safetensors` is there, and has all of it
        return save_plain(plugin, accelerator, model, *args, **kwargs)

    @functools.wraps(load_plain)
    def load(plugin: Any, accelerator: Any, model: nn.Module, folder: str, *args: Any, **kwargs: Any) -> Any:
        if not is_marked(model):
            return load_plain(plugin, accelerator, model, folder, *args, **kwargs)
        accelerator.wait_for_everyone()
        loaded = load_whole_state(model, read_state(Path(folder), cast(PreTrainedModel, model)))
        accelerator.wait_for_everyone()
        return loaded

    save.knows_masks = True  # type: ignore[attr-defined]
    module.save_fsdp_model, module.load_fsdp_model = save, load


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> Any:
    """Load a state dict of whole tensors into a model that may be sharded; each process takes its share.

    Returns:
        What `load_state_dict` does: the keys that are missing, and those that are not expected.
    """
    parameters = dict(model.named_parameters())
    placed = {key: placed_as(tensor, parameters[key]) if key in parameters else tensor for key, tensor in state.items()}
    return model.load_state_dict(placed, strict=False)
