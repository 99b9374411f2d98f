"""What `save_pretrained` does for a sparse model: packed tensors and their manifest, in files that are never half."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import RecipeError
from ...formats.manifest import Manifest
from ...formats.safetensors_io import settle_header, writing
from ...modeling.model_state import EDITS
from ...modeling.zero_preservation import warn_of_lost_zeros
from ...pruning.compaction import edits_of
from ...pruning.compressions.saved_forms import forms_of
from ...utils.atomic_io import replace_files
from .. import patches
from ..hub.push import push_model
from ..hub.sentence_card import watch_cards
from ..per_layer_config import expressed_in_config
from .pack_state import FORMATS, dense_state
from .shared_saving import is_divided, of_first, pack_together, write_together
from .state_dict import hook_load, unhook_load


class SaveRequest(NamedTuple):
    """What one `save_pretrained` was called with, for the quantizer that transformers calls in between.

    Attributes:
        state: the state dict to save; None = that of the model.
        codec: of the weights that are sparse.
        manifest: of what is packed and written already, by all processes together; None = nothing is yet.
    """

    state: Mapping[str, Tensor] | None = None
    codec: str = FORMATS["packed"]
    manifest: Manifest | None = None


_REQUEST: ContextVar[SaveRequest | None] = ContextVar("hf_sparse_save_request", default=None)


def save_request() -> SaveRequest:
    """Return the request of the save that is under way."""
    return _REQUEST.get() or SaveRequest()


def save_packed(model: PreTrainedModel) -> None:
    """Make a model write packed files (dense ones on request), and read them back in `load_state_dict`."""
    # A partial, because a bound method that the class does not have cannot be pickled.
    patches.put(model, "save_pretrained", update_wrapper(partial(_save_pretrained, model), _save_pretrained))
    patches.put(model, "push_to_hub", update_wrapper(partial(push_model, model), push_model))
    hook_load(model)


def save_plain(model: PreTrainedModel) -> None:
    """Take `save_packed` back."""
    patches.take(model, "save_pretrained")
    patches.take(model, "push_to_hub")
    unhook_load(model)


def save_parts_packed(model: PreTrainedModel) -> None:
    """Let the parts of a compacted model that can be saved by themselves (`model.bert`) save what they have lost."""
    quantizer = getattr(model, "hf_quantizer", None)
    for inner in model.modules() if quantizer is not None else ():
        if inner is not model and isinstance(inner, PreTrainedModel) and EDITS.get(inner):
            inner.hf_quantizer = quantizer  # type: ignore[assignment]  # nn.Module lets only tensors and modules be set
            save_packed(inner)


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

    A model that is divided over processes (FSDP2, tensor parallelism) is packed and written by all of them together, so
    each has to call this; the files are the same.

    Args:
        format: "packed" for small files that need `import hf_sparse` before `from_pretrained`, "smallest" for still
            smaller ones whose values are coded too and take longer to read, "dense" for files with plain zeros that any
            tool reads.

    Raises:
        RecipeError: for another format, or "dense" for a compacted model with sizes that config.json cannot express,
            unless its family reads `per_layer_config`: no other tool could load it.
    """
    if format not in FORMATS:
        raise RecipeError(f"`format` must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    config = None
    if format == "dense":
        refuse_forms(self, "saved dense")
    if format == "dense" and edits_of(self):
        config = expressed_in_config(self)
        if config is None:
            refuse_edited(self, "saved dense")
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", Path(save_directory).name)
    if is_main_process:
        warn_of_lost_zeros(self)
    watch_cards()  # a model of sentence-transformers around this one writes its card next
    save = type(self).save_pretrained
    if is_divided(self, state_dict) and not getattr(self, "_hf_peft_config_loaded", False):
        _save_divided(self, save_directory, state_dict, format, kwargs)
        return
    with staged(save_directory, is_main_process) as directory:
        if format != "dense":
            with _requested(SaveRequest(state_dict, FORMATS[format])):
                # The names are reverted before packing (`pack_state`), so not a second time.
                save(self, directory, is_main_process, None, save_original_format=False, **kwargs)
        else:
            with _unmarked(self, config):
                save(self, directory, is_main_process, dense_state(self, state_dict), **kwargs)


def refuse_forms(model: PreTrainedModel, what: str) -> None:
    """Raise `RecipeError` if layers hold something else than a matrix: no class of transformers has such layers."""
    if forms := forms_of(model):
        name, form = next(iter(forms.layers.items()))
        raise RecipeError(
            f"the model cannot be {what}: {len(forms.layers)} layers (first: '{name}') have the form '{form.form}', "
            "which config.json cannot express, so no tool could load it. Save it packed (the default)"
        )


def _save_divided(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor] | None,
    format: str,  # noqa: A002
    options: dict[str, Any],
) -> None:
    """Save a model of which every process has a share; process 0 also writes the config and all that goes with it."""
    if options.pop("push_to_hub", False):
        raise RecipeError("a model that is divided over processes cannot be pushed as it is saved: push the folder")
    limits = {"limit": options.get("max_shard_size", "50GB"), "variant": options.get("variant")}
    dense = format == "dense"
    save: Any = type(model).save_pretrained
    with contextlib.ExitStack() as stack:
        place = of_first(lambda: stack.enter_context(staged(folder, True)))
        tensors, manifest = pack_together(model, state, FORMATS[format], training=not dense)

        def write_config() -> None:
            with _undivided(model), _unmarked(model) if dense else _requested(SaveRequest({}, manifest=manifest)):
                save(model, place, True, {}, **options)

        of_first(write_config)
        write_together(tensors, manifest, Path(place), **limits, described=not dense)
        of_first(stack.pop_all().close)  # the new files take the place of the old ones


@contextlib.contextmanager
def _requested(request: SaveRequest) -> Iterator[None]:
    token = _REQUEST.set(request)
    try:
        yield
    finally:
        _REQUEST.reset(token)


@contextlib.contextmanager
def _undivided(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save a config alone, on one process: it would gather the shards for it."""
    config: Any = model.config
    asked = vars(config).get("distributed_config")
    if asked is not None:
        config.distributed_config = None
    try:
        yield
    finally:
        if asked is not None:
            config.distributed_config = asked


def refuse_edited(model: PreTrainedModel, what: str) -> None:
    """Raise `RecipeError` if a model has lost heads or neurons: without our marks nobody could load what it saves."""
    if edits_of(model):
        raise RecipeError(
            f"a compacted model cannot be {what}: its layers have sizes that config.json cannot express, so "
            "no tool could load it. Save it packed (the default), or save it dense before compact()"
        )


@contextlib.contextmanager
def _unmarked(model: PreTrainedModel, other: Any = None) -> Iterator[None]:
    """Make the model look like one that was never sparse, for transformers.

    Args:
        other: a config that expresses what a compacted model has lost; None = its own.
    """
    whole, quantizer, config = model.config, model.hf_quantizer, model.config.quantization_config
    del model.hf_quantizer, model.config.quantization_config
    if other is not None:
        model.config = other
    try:
        yield
    finally:
        model.config = whole
        model.hf_quantizer, model.config.quantization_config = quantizer, config


WEIGHTS = re.compile(r"model(?P<variant>\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<index>\.[\w-]+)?\.json)?")


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str], writes: bool) -> Iterator[str]:
    """Yield a directory to write into, whose files replace those of `directory` one by one at the end."""
    if not writes:
        yield os.fspath(directory)
        return
    # The config last: with the old weights the old config still stands.
    with (
        writing(directory),
        replace_files(directory, last="config.json", stale=partial(_stale, Path(directory))) as folder,
    ):
        yield os.fspath(folder)
        for path in list(folder.glob("*.safetensors")):
            settle_header(path)


def _stale(directory: Path, fresh: Sequence[str]) -> list[str]:
    """Return the weights of an earlier save with another number of shards: `from_pretrained` might prefer them."""
    variants = {match["variant"] or match["index"] for name in fresh if (match := WEIGHTS.fullmatch(name))}
    found = []
    for path in directory.iterdir():
        match = WEIGHTS.fullmatch(path.name)
        if match and (match["variant"] or match["index"]) in variants and path.name not in fresh:
            found.append(path.name)
    return found
