"""FSDP2 in the Trainer: what it cannot do is refused before step one, and its checkpoints hold the model once.

With `state_dict_type: SHARDED_STATE_DICT`, the default of accelerate, a checkpoint has the model and the optimizer as
`torch.distributed.checkpoint` writes them: each process its shards, masks and scores among them, and any number of
processes reads them again. The Trainer never writes a model that `from_pretrained` loads then, so `save_model` is given
one (`save_packed_model`).

With `FULL_STATE_DICT` the Trainer loads a model by the names that parameters have in memory, and broadcasts it from
process 0. Masked weights have other names in a state dict, so they would silently keep their values. But the Trainer
also writes `model.safetensors` into each checkpoint, and ours has the whole state of the training. So the two functions
for the model are wrapped (see `hf.patches`): they leave out the second copy, and read the first. For models without
masks the wrappers change nothing. The state of the optimizer is saved and loaded by the Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import transformers.trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...errors import CheckpointError, RecipeError
from ...modeling.model_state import is_marked
from ...pruning.group_checks import refuse_shards
from ...pruning.pruner import Pruner
from ...pruning.shards import placed_as
from .. import patches
from ..quantization.state_dict import read_state
from .checkpoint import SHARDS

logger = logging.get_logger(__name__)


def check_fsdp(trainer: Trainer, pruner: Pruner) -> None:
    """Raise `RecipeError` if pruning does not work with the FSDP settings of a Trainer; without FSDP, do nothing.

    Where FSDP was requested and the Trainer does not do it, warn.
    """
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            logger.warning(
                "fsdp was requested, but accelerate shards on GPUs only; on this device the run is plain DDP"
            )
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            f"SparsityCallback does not work with fsdp_config version={plugin.fsdp_version}: it flattens weights, and "
            "masks are of their shape. Use version 2"
        )
    for group in pruner.groups:
        refuse_shards(group)


def is_sharded(plugin: Any) -> bool:
    """Return whether checkpoints have the shards of each process."""
    return "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


def save_fsdp_model(
    original: Callable[..., Any], plugin: Any, accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Wrap the function of that name: `model.safetensors` of the checkpoint has the whole state of a masked model."""
    if is_marked(model) and not is_sharded(plugin):
        return None
    return original(plugin, accelerator, model, *args, **kwargs)


def load_fsdp_model(
    original: Callable[..., Any],
    plugin: Any,
    accelerator: Any,
    model: nn.Module,
    folder: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrap the function of that name: each process reads a masked model from `model.safetensors`, or its shards.

    Raises:
        CheckpointError: if the checkpoint was written with another `state_dict_type`.
    """
    if not is_marked(model):
        return original(plugin, accelerator, model, folder, *args, **kwargs)
    sharded = (Path(folder) / SHARDS).is_dir()
    if sharded != is_sharded(plugin):
        kinds = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
        raise CheckpointError(
            f"checkpoint {folder} was written with fsdp_config state_dict_type={kinds[sharded]}, and this run has "
            f"{kinds[not sharded]}. Resume with the former"
        )
    if sharded:
        return original(plugin, accelerator, model, folder, *args, **kwargs)
    accelerator.wait_for_everyone()
    loaded = load_whole_state(model, read_state(Path(folder), cast(PreTrainedModel, model)))
    accelerator.wait_for_everyone()
    return loaded


def writes_no_model(trainer: Any) -> bool:
    """Return whether `Trainer.save_model` would write nothing for a sparse model, as it does with sharded state."""
    model = trainer.model
    return (
        trainer.is_fsdp_enabled
        and is_sharded(trainer.accelerator.state.fsdp_plugin)
        and isinstance(model, PreTrainedModel)
        and is_marked(model)
    )


def save_packed_model(trainer: Any, folder: str) -> None:
    """Write the model of a Trainer packed, by all processes together, and on one of them what goes with it."""
    if trainer.args.should_save:
        trainer._save(folder)
    else:
        trainer.model.save_pretrained(folder, is_main_process=False)


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> Any:
    """Load a state dict of whole tensors into a model that may be sharded; each process takes its share.

    Returns:
        What `load_state_dict` does: the keys that are missing, and those that are not expected.
    """
    parameters = dict(model.named_parameters())
    placed = {key: placed_as(tensor, parameters[key]) if key in parameters else tensor for key, tensor in state.items()}
    return model.load_state_dict(placed, strict=False)


patches.wrap(transformers.trainer, "save_fsdp_model", save_fsdp_model)
patches.wrap(transformers.trainer, "load_fsdp_model", load_fsdp_model)
