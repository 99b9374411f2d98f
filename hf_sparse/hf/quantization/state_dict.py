"""Packed checkpoints in `load_state_dict`, which is how a Trainer reads them back.

`resume_from_checkpoint` and `load_best_model_at_end` give the tensors of `model.safetensors` to `load_state_dict`, as
they are in the file. A hook on every sparse model decodes them there. The manifest in the header of the file is not
among the tensors, so the Trainer's functions are wrapped (see `hf.patches`) to tell the hook which folder is read.
Outside of a Trainer the manifest in the config of the model is used, and has to fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import transformers.trainer
import transformers.trainer_utils
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ...errors import CheckpointError
from ...formats.codecs import SUFFIXES, decode, layout
from ...formats.layer_forms import FORMS_KEY
from ...formats.manifest import Manifest
from ...formats.model_folder import weight_files
from ...formats.sharding import opened
from ...formats.structure import EDITS_KEY
from ...pruning.compaction import edits_of
from ...pruning.compressions.saved_forms import forms_of
from ...utils.atomic_io import finish_replacing
from .. import patches
from .key_names import as_in_memory
from .load_plan import is_packed, manifest_of
from .pack_state import is_training_state

_FOLDER: ContextVar[Path | None] = ContextVar("hf_sparse_checkpoint_folder", default=None)


def hook_load(model: nn.Module) -> None:
    """Let a model take packed state dicts; a second call does nothing."""
    if not _is_hooked(model):
        model.register_load_state_dict_pre_hook(unpack_state_dict)


def unhook_load(model: nn.Module) -> None:
    """Take back `hook_load`."""
    hooks = model._load_state_dict_pre_hooks
    for number in [number for number, hook in hooks.items() if _unwrapped(hook) is unpack_state_dict]:
        del hooks[number]


def _is_hooked(model: nn.Module) -> bool:
    return any(_unwrapped(hook) is unpack_state_dict for hook in model._load_state_dict_pre_hooks.values())


def _unwrapped(hook: Any) -> Any:
    return getattr(hook, "hook", hook)  # torch wraps a hook together with its module


def unpack_state_dict(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Decode the packed tensors of a state dict, in place: the load hook of every sparse model.

    Raises:
        CheckpointError: for packed tensors of a checkpoint that is not known, corrupted, or of another structure.
    """
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    manifest = _manifest(model)
    if manifest is None or not _holds(manifest, own):
        _refuse_parts(model, own)
        return
    _check_structure(model, manifest)
    for key in own:
        del state[prefix + key]
    assert isinstance(model, PreTrainedModel)
    state.update({prefix + key: tensor for key, tensor in decoded(model, own, manifest).items()})


def decoded(model: PreTrainedModel, tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Return a state dict with dense tensors, under the names of the model in memory.

    The training state of masked weights stays as it is in the file; the masks read it (`pruning.mask_state_dict`).

    Raises:
        CheckpointError: if the content is corrupted.
    """
    dense: dict[str, Tensor] = {}
    rest = dict(tensors)
    for key, entry in manifest.tensors.items():
        parts = {suffix: rest[key + suffix] for suffix in layout(entry, key) if key + suffix in rest}
        if entry.codec == "dense" or not parts:
            continue
        dense[key] = decode(entry, parts, key)
        for suffix in parts:
            del rest[key + suffix]
    return as_in_memory(model, {**rest, **dense})


def read_state(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, of one file or of several, packed or dense, under the names in memory.

    Raises:
        CheckpointError: if they are missing, corrupted, or of another structure than the model.
    """
    files = weight_files(folder)
    manifest = manifest_of(files)
    with opened(files) as shards:
        tensors = {key: shards.get(key) for key in shards.headers}
    if manifest is None:
        return tensors
    _check_structure(model, manifest)
    return decoded(model, tensors, manifest)


# -- wrappers of the Trainer's functions, see `hf.patches` -------------------------------------------------------------


def load_from_checkpoint(original: Callable[..., Any], trainer: Any, checkpoint: str, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Trainer._load_from_checkpoint`: the hook of the model gets the folder.

    Raises:
        CheckpointError: if the folder is packed and the model was neither pruned nor loaded from a packed checkpoint.
    """
    with _reading(checkpoint, trainer.model):
        return original(trainer, checkpoint, *args, **kwargs)


def load_best_model(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Trainer._load_best_model`, as `load_from_checkpoint`."""
    with _reading(trainer.state.best_model_checkpoint, trainer.model):
        return original(trainer, *args, **kwargs)


def load_sharded(original: Callable[..., Any], model: Any, folder: Any, strict: bool = True, **kwargs: Any) -> Any:
    """Wrap `load_sharded_checkpoint`: parts of a tensor can be in two shards, so packed shards are read together."""
    if not _is_packed_folder(folder) or not isinstance(model, PreTrainedModel):
        return original(model, folder, strict, **kwargs)
    return model.load_state_dict(read_state(Path(folder), model), strict=strict)


patches.wrap(Trainer, "_load_from_checkpoint", load_from_checkpoint)
patches.wrap(Trainer, "_load_best_model", load_best_model)
patches.wrap(transformers.trainer, "load_sharded_checkpoint", load_sharded)
patches.wrap(transformers.trainer_utils, "load_sharded_checkpoint", load_sharded)


@contextlib.contextmanager
def _reading(folder: Any, model: nn.Module) -> Iterator[None]:
    if folder is not None:
        with contextlib.suppress(OSError):
            finish_replacing(folder)
    if folder is None or not _is_packed_folder(folder):
        yield
        return
    if not any(map(_is_hooked, model.modules())):
        raise CheckpointError(
            f"{folder} holds a sparse model, and the model of this Trainer is dense. To go on with its training, use "
            "the same SparsityCallback; to fine-tune it, load it with from_pretrained"
        )
    token = _FOLDER.set(Path(folder))
    try:
        yield
    finally:
        _FOLDER.reset(token)


def _is_packed_folder(folder: Any) -> bool:
    return any(is_packed(str(path)) for path in sorted(Path(folder).glob("model*.safetensors"))[:1])


def _manifest(model: nn.Module) -> Manifest | None:
    folder = _FOLDER.get()
    if folder is not None:
        return manifest_of(weight_files(folder))
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    manifest = getattr(config, "manifest", None)
    return manifest if isinstance(manifest, Manifest) else None


def _holds(manifest: Manifest, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are packed as the manifest says, and not dense."""
    for key, entry in manifest.tensors.items():
        if entry.codec == "dense" or key not in tensors:
            continue
        parts = layout(entry, key)
        if tuple(tensors[key].shape) == parts[""].shape and all(key + suffix in tensors for suffix in parts):
            return True
    return False


def _refuse_parts(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise if tensors are packed, by something that is not known here; masked weights read theirs themselves."""
    known = None
    for key in tensors:
        suffix = next((suffix for suffix in filter(None, SUFFIXES) if key.endswith(suffix)), None)
        owner = key.removesuffix(suffix) if suffix else key
        if suffix is None or owner not in tensors or is_training_state(f"{owner}_kept", tensors):
            continue
        known = set(model.state_dict()) if known is None else known
        if key not in known:
            raise CheckpointError(
                f"'{owner}' is packed in this state dict, by another save than the model knows, so it cannot be "
                "decoded. Load the folder with from_pretrained, or the file with hf_sparse.formats.safetensors_io."
                "load_file"
            )


def _check_structure(model: nn.Module, manifest: Manifest) -> None:
    edits = edits_of(model)
    if (manifest.extra.get(EDITS_KEY) or None) != (edits.to_dict() if edits else None):
        raise CheckpointError(
            "the checkpoint and the model have not lost the same heads and neurons, so their weights differ in shape. "
            "Load the checkpoint with from_pretrained"
        )
    if (manifest.extra.get(FORMS_KEY) or {}) != forms_of(model).to_dict():
        raise CheckpointError(
            "the layers of the checkpoint and of the model do not have the same forms (hashed, low rank), so their "
            "tensors differ. Load the checkpoint with from_pretrained"
        )
