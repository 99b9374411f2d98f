"""Pruning of models of transformers: they are saved packed from then on; offloaded weights are read from accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from ...config.sparsity import SparsityConfig
from ...errors import RecipeError
from ...modeling.integration import ModelIntegration, integration_of
from ...pruning.compaction import edits_of
from ...pruning.group import joined
from .. import patches
from .config import SparseConfig
from .parts import sparse_parts
from .quantizer import SparseQuantizer
from .saving import save_packed, save_parts_packed


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
        """As `after_attach`; what was requested of the model is known from the pruning, if that was here."""
        _prepare(model, _earlier(model))
        save_parts_packed(cast(PreTrainedModel, model))

    def after_keep_zeros(self, model: nn.Module) -> None:
        """As `after_compact`."""
        self.after_compact(model)


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
