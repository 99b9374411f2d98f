"""What `save_pretrained` writes for a sparse model: the packed state dict, its manifest, and files that are never half.

A model that is still being pruned writes its training state too (removed values, scores), in the same file, so that the
checkpoint of a Trainer is one consistent thing: `from_pretrained` reads the masked model out of it, and
`resume_from_checkpoint` the whole state.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterator, Mapping
from contextvars import ContextVar
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...errors import RecipeError
from ...formats.codecs import SUFFIXES, encode
from ...formats.codecs.base import pack_bits
from ...formats.manifest import Manifest, TensorEntry
from ...formats.safetensors_io import settle_header, writing
from ...formats.structure import EDITS_KEY
from ...modeling.model_state import sparse_weights
from ...pruning import summary as report
from ...pruning.compaction import edits_of
from ...pruning.masked_weight import STATE_SUFFIXES
from ...utils.atomic_io import replace_files
from ..hub.push import push_model

FORMATS = {"packed": "auto", "smallest": "smallest", "dense": "dense"}
"""What `save_pretrained` and `convert` can be asked for, and the codec of the weights that are sparse."""


def pack_state(
    model: PreTrainedModel, state: Mapping[str, Tensor], codec: str = "auto"
) -> tuple[dict[str, Tensor], Manifest]:
    """Pack the weights that were asked to be sparse, and list every tensor in a manifest.

    Args:
        state: of the model, with the keys that `masking` gives masked weights.
        codec: of the weights that are not in training, see `codecs.encode`.

    Returns:
        The tensors to write, under the names of the checkpoint format of the model, and the manifest.

    Raises:
        RecipeError: if the model has a tensor of its own under the name of a part.
    """
    training = {key for key in state if is_training_state(key, state)}
    plain = {key: tensor for key, tensor in state.items() if key not in training}
    for ignored in model._keys_to_ignore_on_save or ():
        plain.pop(ignored, None)
    plain = _untied(remove_tied_weights_from_state_dict(plain, model), model)
    wanted = {id(plain[name]): name for name in sparse_weights(model) if name in plain}
    # Weights that are offloaded are read one at a time, below; only where stored tensors are computed from several of
    # memory (experts that are merged, say) all have to be there at once.
    offloaded = {id(tensor): name for name, tensor in plain.items() if tensor.is_meta}
    if offloaded and any(isinstance(c, WeightConverter) for c in getattr(model, "_weight_conversions", None) or ()):
        plain = {key: load_offloaded_parameter(model, key) if t.is_meta else t for key, t in plain.items()}
        wanted = {id(plain[name]): name for name in wanted.values()}
    # Some models are stored under other names than they have in memory; packing comes after that renaming.
    stored = revert_weight_conversion(model, plain)
    _refuse_taken_names(stored)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, TensorEntry] = {}
    targets = []
    for key, tensor in sorted(stored.items()):
        name = wanted.get(id(tensor))
        if tensor.is_meta:
            tensor = load_offloaded_parameter(model, offloaded[id(tensor)])
        chosen = "dense" if name is None else "bitmask" if f"{name}_kept" in training else codec
        entries[key], parts = encode(tensor, chosen)
        tensors.update({key + suffix: part for suffix, part in parts.items()})
        if name is None:
            continue
        targets.append(key)
        for suffix, part in _training_parts(state, name).items():
            entries[key + suffix], dense = encode(part, "dense")
            tensors[key + suffix] = dense[""]
    edits = edits_of(model)
    extra = {EDITS_KEY: edits.to_dict()} if edits else {}
    return tensors, Manifest(entries, targets=tuple(targets), extra=extra)


def _untied(plain: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Drop tied weights that transformers missed: each forward pass makes the offloaded ones other objects."""
    for twin, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if twin in plain and kept in plain and (plain[twin].is_meta or plain[kept].is_meta):
            values = [load_offloaded_parameter(model, k) if plain[k].is_meta else plain[k] for k in (twin, kept)]
            if torch.equal(values[0].cpu(), values[1].cpu()):
                plain.pop(twin)
    return plain


def is_training_state(key: str, keys: Container[str]) -> bool:
    """Return whether a key is of the training state of a weight, and not of a tensor that the model itself calls so.

    Args:
        keys: all that there are. Every weight in training has its `_kept` and `_hidden` among them.

    Example:
        >>> keys = {"w", "w_kept", "w_hidden", "v", "v_hidden"}
        >>> [is_training_state(key, keys) for key in ("w_hidden", "v_hidden")]
        [True, False]
    """
    if not key.endswith(STATE_SUFFIXES):
        return False
    owner = key[: key.rindex("_")]
    return all(each in keys for each in (owner, f"{owner}_kept", f"{owner}_hidden"))


def _refuse_taken_names(stored: Mapping[str, Tensor]) -> None:
    """Raise `RecipeError` if a tensor has a name that loading takes for a part of another."""
    for key in stored:
        for suffix in filter(None, (*SUFFIXES, *STATE_SUFFIXES)):
            owner = key.removesuffix(suffix)
            if owner != key and owner.rpartition(".")[2] == "weight" and owner in stored:
                raise RecipeError(
                    f"the model has a tensor '{key}' of its own, and packed files keep a part of '{owner}' under that "
                    "name. Save it with format='dense', or give that tensor another name"
                )


def _training_parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the training state of a weight as it goes to disk, by suffix: nothing that the weight itself holds."""
    parts = {suffix: state[name + suffix].cpu() for suffix in STATE_SUFFIXES if name + suffix in state}
    if parts:
        removed = ~parts["_kept"]
        parts["_hidden"] = parts["_hidden"][removed]
        parts["_kept"] = torch.from_numpy(pack_bits((~removed).view(-1).numpy()))
    return parts


def dense_state(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of the masked model with plain dense weights and nothing else."""
    state = model.state_dict() if state is None else state
    return {key: tensor for key, tensor in state.items() if not is_training_state(key, state)}


class SaveRequest(NamedTuple):
    """What one `save_pretrained` was called with, for the quantizer that transformers calls in between.

    Attributes:
        state: the state dict to save; None = that of the model.
        codec: of the weights that are sparse.
    """

    state: Mapping[str, Tensor] | None = None
    codec: str = FORMATS["packed"]


_REQUEST: ContextVar[SaveRequest | None] = ContextVar("hf_sparse_save_request", default=None)


def save_request() -> SaveRequest:
    """Return the request of the save that is under way."""
    return _REQUEST.get() or SaveRequest()


def save_packed(model: PreTrainedModel) -> None:
    """Give a model a `save_pretrained` that writes packed weights, dense ones on request, and files that are whole."""
    # A partial, because a bound method that the class does not have cannot be pickled.
    model.save_pretrained = update_wrapper(partial(_save_pretrained, model), _save_pretrained)  # type: ignore[method-assign]
    model.push_to_hub = update_wrapper(partial(push_model, model), push_model)


def save_plain(model: PreTrainedModel) -> None:
    """Take `save_packed` back."""
    vars(model).pop("save_pretrained", None)
    vars(model).pop("push_to_hub", None)


def _save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *,
    format: str = "packed",  # noqa: A002  the word that users look for
    **kwargs: Any,
) -> None:
    """Save the model as `PreTrainedModel.save_pretrained` does, packed.

    Each file is written beside the old one and put in its place when it is complete, so that an interrupted save
    leaves the old one whole.

    Args:
        format: "packed" for small files that need `import hf_sparse` before `from_pretrained`, "smallest" for still
            smaller ones whose values are coded too and take longer to read, "dense" for files with plain zeros that any
            tool reads.

    Raises:
        RecipeError: for another format, or "dense" for a compacted model, which no other tool could load.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {', '.join(map(repr, FORMATS))}, not {format!r}")
    if format == "dense":
        refuse_edited(self, "saved dense")
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", Path(save_directory).name)
    save = type(self).save_pretrained
    with staged(save_directory, is_main_process) as directory:
        if format != "dense":
            token = _REQUEST.set(SaveRequest(state_dict, FORMATS[format]))
            try:
                # The names are reverted before packing (`pack_state`), so not a second time.
                save(self, directory, is_main_process, None, save_original_format=False, **kwargs)
            finally:
                _REQUEST.reset(token)
        else:
            with _unmarked(self):
                save(self, directory, is_main_process, dense_state(self, state_dict), **kwargs)


def refuse_edited(model: PreTrainedModel, what: str) -> None:
    """Raise `RecipeError` if a model has lost heads or neurons: without our marks nobody could load what it saves."""
    if edits_of(model):
        raise RecipeError(
            f"a compacted model cannot be {what}: its layers differ in size, which config.json has no words for, so "
            "no tool could load it. Save it packed (the default), or save it dense before compact()"
        )


@contextlib.contextmanager
def _unmarked(model: PreTrainedModel) -> Iterator[None]:
    """Make the model look like one that was never sparse, for transformers."""
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    del model.hf_quantizer, model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config


WEIGHTS = re.compile(r"model(?P<variant>\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<index>\.[\w-]+)?\.json)?")


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str], writes: bool) -> Iterator[str]:
    """Yield a directory to write into, whose files replace those of `directory` one by one at the end."""
    if not writes:
        yield os.fspath(directory)
        return
    # The config last: with the old weights the old config still stands.
    with writing(directory), replace_files(directory, last="config.json") as folder:
        yield os.fspath(folder)
        fresh = {path.name for path in folder.iterdir() if path.is_file()}
        for name in fresh:
            if name.endswith(".safetensors"):
                settle_header(folder / name)
    if any(map(WEIGHTS.fullmatch, fresh)):
        _remove_stale(Path(directory), fresh)


def _remove_stale(directory: Path, fresh: set[str]) -> None:
    """Remove weights of an earlier save with another number of shards: `from_pretrained` might prefer them."""
    variants = {match["variant"] or match["index"] for name in fresh if (match := WEIGHTS.fullmatch(name))}
    for path in directory.iterdir():
        match = WEIGHTS.fullmatch(path.name)
        if match and (match["variant"] or match["index"]) in variants and path.name not in fresh:
            path.unlink()


def _read_offloaded(model: nn.Module, name: str) -> Tensor | None:
    try:
        return load_offloaded_parameter(cast(PreTrainedModel, model), name)  # any module that accelerate dispatched
    except ValueError:  # nothing has offloaded it
        return None


report.read_offloaded.append(_read_offloaded)
