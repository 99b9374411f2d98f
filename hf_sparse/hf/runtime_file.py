"""`save_runtime` and `load_runtime`: a model in runtime form, in a file that many processes map and start with."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BackendError, CheckpointError, RecipeError
from ..formats.aligned_file import with_fillers, write_aligned
from ..formats.codecs import encode
from ..formats.layer_forms import FORMS_KEY, LayerForms
from ..formats.manifest import RUNTIME_KEY, Manifest, is_runtime_form
from ..formats.model_folder import SINGLE
from ..formats.safetensors_io import MANIFEST_KEY, read_manifest
from ..formats.structure import EDITS_KEY
from ..modeling.class_swap import plain_class_of
from ..modeling.integration import integration_of
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.model_state import check_model
from ..pruning.compaction import apply_edits, edits_of
from ..pruning.compressions.saved_forms import apply_forms, forms_of
from ..runtime import is_runtime
from ..runtime.saved_form import SavedRuntime
from ..runtime.saved_model import describe, packed_tensors
from ..utils.atomic_io import PathLike, finish_replacing, read_json
from . import patches
from .auto import load_whole
from .embedding.pooling import MODULES
from .embedding.wrapper import inner_model
from .quantization.config import SparseConfig
from .quantization.saving import staged

WRAPPERS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
"""Classes of sentence-transformers that a folder may name."""
WRAPPER_CONFIG = "config_sentence_transformers.json"


def save_runtime(model: nn.Module, folder: PathLike) -> None:
    """Save a model in runtime form, as `load_runtime` and `from_pretrained` map it: nothing is packed or timed again.

    Several processes that load the file share one copy of its weights in memory. It is for machines with the kernels
    that it was made with, and not for storage: it holds embeddings dense, and the packed layers as the kernels read
    them. Keep the checkpoint. `to_dense_runtime` restores the exact weights of a model that was loaded from it.

    Args:
        model: of transformers or sentence-transformers, after `to_runtime`. A tokenizer is saved as ever, beside it; a
            model of sentence-transformers saves its own.
        folder: made if there is none; the files of an earlier `save_runtime` are replaced when the new ones are
            complete. A folder with a checkpoint is refused.

    Raises:
        RecipeError: if it is another model, has adapters, or would replace a checkpoint.
        BackendError: if it is not in runtime form, or was changed since.
        SparsityError: if the folder cannot be written.

    Example:
        >>> import tempfile, torch, transformers, hf_sparse
        >>> config = transformers.BertConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
        ... )
        >>> model = transformers.BertModel(config).eval()
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(sparsity=0.5))
        >>> _ = hf_sparse.to_runtime(model, "csr")
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_sparse.save_runtime(model, folder)
        ...     loaded = hf_sparse.load_runtime(folder)
        ...     torch.equal(loaded(tokens).pooler_output, model(tokens).pooler_output)
        True
    """
    check_model(model)
    inner = inner_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise RecipeError(
            f"save_runtime takes a model of transformers or sentence-transformers, got a {type(model).__name__}"
        )
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise RecipeError("save_runtime got a model with adapters: merge them first, and call to_runtime then")
    if not is_runtime(inner):
        raise BackendError(
            f"save_runtime got a {type(inner).__name__} of which nothing is packed: call hf_sparse.to_runtime(model) "
            "first. If dense is faster there for all its layers, save it with save_pretrained"
        )
    _refuse_checkpoint(Path(folder))
    if inner is model:
        _save(inner, folder)
        return
    inside = set(map(id, inner.modules()))
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, InRuntimeForm)]
    others = [name for name, module in packed if id(module) not in inside]
    if others:
        raise BackendError(
            f"save_runtime saves the transformer of a {type(model).__name__} in runtime form, and '{others[0]}' beside "
            "it is packed too: call hf_sparse.to_runtime on the transformer alone"
        )
    before = vars(inner).get("save_pretrained")
    patches.put(inner, "save_pretrained", partial(_save, inner))
    try:
        model.save_pretrained(os.fspath(folder))  # type: ignore[operator]
    finally:
        patches.take(inner, "save_pretrained")
        if before is not None:
            patches.put(inner, "save_pretrained", before)


def load_runtime(folder: PathLike) -> Any:
    """Load what `save_runtime` has written: with the class that it had, mapped into memory, ready to run.

    `from_pretrained`, `pipeline` and the classes of sentence-transformers read such a folder too.

    Args:
        folder: on this machine.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: if there is no such file, it is corrupted, or was made for other kernels than this machine has;
            the message says what to do.
        RecipeError: if config.json does not fit it.
    """
    path = Path(folder)
    with contextlib.suppress(OSError):  # a folder that cannot be written is read as it is
        finish_replacing(path)
    if not (path / SINGLE).is_file():
        raise CheckpointError(f"there is no {SINGLE} in {path}: name a folder that hf_sparse.save_runtime has written")
    if not is_runtime_form(read_manifest(path / SINGLE)):
        raise CheckpointError(
            f"{path} holds a checkpoint, and no runtime form: load it with from_pretrained, call hf_sparse.to_runtime "
            "and hf_sparse.save_runtime"
        )
    if (path / MODULES).is_file():
        return _wrapper_class(path)(os.fspath(path), device="cpu", local_files_only=True)
    return load_whole(os.fspath(path))


def _refuse_checkpoint(folder: Path) -> None:
    """Raise if a folder has weights that are not in runtime form: they may be the only ones that there are."""
    if not folder.is_dir():
        return
    if (folder / SINGLE).is_file() and is_runtime_form(read_manifest(folder / SINGLE)):
        return
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        raise RecipeError(
            f"save_runtime would replace the checkpoint in {folder} ({found[0]}) by a file for one kind of processor: "
            "name another folder"
        )


def _wrapper_class(folder: Path) -> Any:
    name = (read_json(folder / WRAPPER_CONFIG) or {}).get("model_type", WRAPPERS[0])
    if name not in WRAPPERS:
        raise CheckpointError(f"{folder / WRAPPER_CONFIG}: `model_type` must be one of {WRAPPERS}, got {name!r:.80}")
    try:
        import sentence_transformers
    except ImportError as error:
        raise RecipeError(f"{folder} holds a {name}: pip install sentence-transformers ({error})") from None
    return getattr(sentence_transformers, name)


def _save(model: PreTrainedModel, folder: PathLike, **ignored: Any) -> None:
    """Write the config and the file of one transformer, in place of its `save_pretrained`."""
    if sys.byteorder != "little":
        raise BackendError("save_runtime writes tensors as they are in memory, for little-endian processors alone")
    saved, tensors = describe(model)
    extra: dict[str, Any] = {RUNTIME_KEY: saved.to_dict()}
    if edits := edits_of(model):
        extra[EDITS_KEY] = edits.to_dict()
    if forms := forms_of(model):
        extra[FORMS_KEY] = forms.to_dict()
    _check_config(model, saved, tensors)
    filled = with_fillers(tensors)
    entries = {name: encode(tensor, "dense")[0] for name, tensor in filled.items()}
    manifest = Manifest(entries, extra=extra)
    with staged(folder, True) as place:
        _config_of(model).save_pretrained(place)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(place)
        write_aligned(filled, Path(place) / SINGLE, {MANIFEST_KEY: manifest.to_json()})


def _config_of(model: PreTrainedModel) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = [plain_class_of(model).__name__]
    config.dtype = torch.float32
    config.quantization_config = SparseConfig(getattr(getattr(config, "quantization_config", None), "intent", None))
    return config


def _check_config(model: PreTrainedModel, saved: SavedRuntime, tensors: dict[str, Tensor]) -> None:
    """Refuse a model that its config does not describe, as nobody could load it."""
    built = integration_of(model).rebuilt(model, {})
    if built is None:
        raise BackendError(f"save_runtime cannot build a {type(model).__name__} from its config, as loading has to do")
    if edits := edits_of(model):
        apply_edits(built, edits, model.base_model_prefix)
    if forms := forms_of(model):
        apply_forms(built, LayerForms.from_dict(forms.to_dict()), model.base_model_prefix)
    packed = packed_tensors(saved)
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in packed}
    here |= {alias: here[name] for alias, name in saved.shared.items() if name in here}
    for name in (name for unit in saved.units for name in unit.layers):
        layer: Any = model.get_submodule(name)
        here[f"{name}.weight"] = (layer.out_features, layer.in_features)
    there = {name: tuple(own.shape) for name, own in built.state_dict().items()}
    if different := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise BackendError(
            f"save_runtime got a {type(model).__name__} that is another than its config describes (first: "
            f"'{different[0]}'): a part of it was replaced after it was made"
        )
