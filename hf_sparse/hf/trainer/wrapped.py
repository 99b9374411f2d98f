"""Training checkpoints of modules that wrap a `PreTrainedModel`, such as a SentenceTransformer.

A `PreTrainedModel` writes masks, scores and removed values into its own checkpoint. A wrapper may save and load itself
in another way, which knows the weights alone. The training state then goes into a file of its own in the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...modeling.layer_kinds import Slot
from ...pruning.mask_state_dict import training_state
from ...pruning.masked_weight import masks_on
from ...utils.atomic_io import replace_file

FILE = "sparsity_state.safetensors"


def save_training_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write masks, scores and removed values beside a checkpoint that does not hold them; else write nothing."""
    path = Path(folder) / FILE
    path.unlink(missing_ok=True)
    if isinstance(model, PreTrainedModel):
        return
    state = _masked_entries(model)
    if not state or next(key for key in state if key.endswith("_kept")) in _stored_keys(Path(folder)):
        return
    # Clones, as safetensors refuses tensors that share memory.
    with replace_file(path) as temporary:
        safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, temporary)


def load_training_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load what `save_training_state` has written, if it has.

    Raises:
        CheckpointError: if the file cannot be read, or is of other masks than those on the model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read the training state {path}: {error}") from error
    wanted = _masked_entries(model)
    if _masks(state) != _masks(wanted) or not wanted.keys() <= state.keys():
        raise CheckpointError(f"the training state {path} is of other masks than those on the model")
    model.load_state_dict(state, strict=False)


def _masked_entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the state-dict entries of all masked weights."""
    return {
        f"{Slot(module, attribute).name(path)}{suffix}": tensor
        for path, module in model.named_modules()
        for attribute in masks_on(module)
        for suffix, tensor in training_state(module, attribute).items()
    }


def _masks(state: Mapping[str, Tensor]) -> set[str]:
    return {key for key in state if key.endswith("_kept")}


def _stored_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            keys |= set(file.keys())
    return keys
