"""Pruning of models of transformers: they are saved packed from then on; offloaded weights are read from accelerate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from ...config.sparsity import SparsityConfig
from ...errors import RecipeError
from ...modeling.forms import form_of
from ...modeling.integration import ModelIntegration, integration_of
from ...modeling.model_state import sparse_weights
from ...pruning.compaction import edits_of
from ...pruning.group import joined
from .. import patches
from .config import SparseConfig
from .parts import sparse_parts
from .quantizer import SparseQuantizer
from .saving import save_packed, save_parts_packed, save_plain

_LAYER_NUMBERS = ("mlp_only_layers",)
"""Keys of configs with the numbers of some layers."""
_FIRST_LAYERS = ("max_window_layers", "first_k_dense_replace")
"""Keys of configs with the number of layers at the beginning that are different."""

logger = logging.getLogger(__name__)


class AnyModule(ModelIntegration):
    """Modules that are not models of transformers: those inside them are prepared, and accelerate may offload them."""

    def after_attach(self, model: nn.Module, config: SparsityConfig) -> None:
        for inner in sparse_parts(model):
            integration_of(inner).after_attach(inner, config)

    def after_compact(self, model: nn.Module) -> None:
        for inner in sparse_parts(model):
            integration_of(inner).after_compact(inner)

    def after_keep_zeros(self, model: nn.Module) -> None:
        for inner in sparse_parts(model):
            integration_of(inner).after_keep_zeros(inner)

    def retie(self, model: nn.Module) -> None:
        for part in model.modules():
            if not isinstance(part, PreTrainedModel):
                continue
            for name in ("_tied_weights_keys", "all_tied_weights_keys"):
                tied = getattr(part, name, None)
                if isinstance(tied, dict) and (renamed := _parts_tied(part, tied)) != tied:
                    setattr(part, name, renamed)

    def read_offloaded(self, model: nn.Module, name: str) -> Tensor | None:
        try:
            return load_offloaded_parameter(cast(PreTrainedModel, model), name)  # any module that was dispatched
        except ValueError:  # nothing has offloaded it
            return None


class TransformersModel(AnyModule):
    """Models of transformers."""

    def after_attach(self, model: nn.Module, config: SparsityConfig) -> None:
        """Make a quantizer of ours the one of the model.

        Raises:
            RecipeError: if its weights are quantized, so that they have no values to mask.
        """
        earlier = _earlier(model)
        _prepare(model, config if earlier is None else joined(model, earlier, config))

    def after_compact(self, model: nn.Module) -> None:
        """As `after_attach`; what was requested of the model is known from the pruning, if that was here.

        A model that has neither zeros nor edits left is a plain one, and is saved as such.
        """
        if not edits_of(model) and not sparse_weights(model):
            if isinstance(present := getattr(model, "hf_quantizer", None), SparseQuantizer):
                save_plain(cast(PreTrainedModel, model))
                present.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            return
        _prepare(model, _earlier(model))
        save_parts_packed(cast(PreTrainedModel, model))

    def after_keep_zeros(self, model: nn.Module) -> None:
        """As `after_compact`."""
        self.after_compact(model)

    def rebuilt(self, model: nn.Module, changes: Mapping[str, Any]) -> nn.Module | None:
        config = copy.deepcopy(cast(PreTrainedModel, model).config)
        _set(config, changes)
        values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        try:
            # As it would be read from config.json, which verifies more than setting an attribute.
            changed = type(config).from_dict(values)
            with torch.device("meta"):
                return cast(Any, type(model))(changed)
        except Exception as error:  # noqa: BLE001 - every family has errors of its own for what it cannot be
            logger.info(f"{type(model).__name__} cannot be built with {dict(changes)}: {error}")
            return None

    def without_layers(self, model: nn.Module, kept: Sequence[int], count: int) -> Mapping[str, Any] | None:
        config = cast(PreTrainedModel, model).config.get_text_config()
        if getattr(config, "num_hidden_layers", None) != count:
            return None
        changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for key, value in config.to_dict().items():
            if key in _LAYER_NUMBERS and isinstance(value, list):
                changes[key] = [kept.index(index) for index in value if index in kept]
            elif key in _FIRST_LAYERS and isinstance(value, int):
                changes[key] = sum(index < value for index in kept)
            elif isinstance(value, list) and len(value) == count:
                changes[key] = [value[index] for index in kept]
        return changes

    def change_config(self, model: nn.Module, changes: Mapping[str, Any]) -> None:
        _set(cast(PreTrainedModel, model).config, changes)


def _parts_tied(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Return which tensors are tied, where the layers of both ends may have another form: its parts are."""
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}
    for key, source in tied.items():
        ends = [modules.get(name.removesuffix(".weight")) for name in (key, source)]
        forms = [None if end is None else form_of(end) for end in ends]
        if forms[0] is None or forms[0] is not forms[1]:
            found[key] = source
            continue
        paths = [name.removesuffix("weight") for name in (key, source)]
        found.update({f"{paths[0]}{part}": f"{paths[1]}{part}" for part in forms[0].parts})
    return found


def _set(config: Any, changes: Mapping[str, Any]) -> None:
    inner = config.get_text_config()
    for key, value in changes.items():
        setattr(inner, key, value)


def _earlier(model: nn.Module) -> SparsityConfig | None:
    present = getattr(model, "hf_quantizer", None)
    return present.quantization_config.intent if isinstance(present, SparseQuantizer) else None


def _prepare(model: Any, intent: SparsityConfig | None) -> None:
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, SparseQuantizer):
        method = present.quantization_config.quant_method
        raise RecipeError(
            f"the model is quantized ({method}), so its weights cannot be pruned. Load it without quantization"
        )
    config = SparseConfig(intent)
    model.hf_quantizer = SparseQuantizer(config)
    model.config.quantization_config = config
    save_packed(model)


def save_around(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `PreTrainedModel.save_pretrained`: a model that was made around a compacted part is saved packed too.

    Raises:
        RecipeError: if it is quantized, so that nothing could load what it saves.
    """
    if "save_pretrained" in vars(model) or not edits_of(model):
        return original(model, *args, **kwargs)
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, SparseQuantizer):
        raise RecipeError(
            f"the model is quantized ({present.quantization_config.quant_method}) and has a compacted part, whose "
            "sizes config.json cannot express, so nothing could load what is saved. Save it without quantization"
        )
    _prepare(model, _earlier(model))
    return model.save_pretrained(*args, **kwargs)


patches.wrap(PreTrainedModel, "save_pretrained", save_around)

_ANY_MODULE, _TRANSFORMERS_MODEL = AnyModule(), TransformersModel()
integration_of.register(nn.Module, lambda model: _ANY_MODULE)
integration_of.register(PreTrainedModel, lambda model: _TRANSFORMERS_MODEL)
