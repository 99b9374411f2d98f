"""The plug into transformers: `SparseConfig` in `config.json`, `SparseQuantizer` in `from_pretrained` and saving.

transformers calls every way to store weights differently "quantization"; nothing is rounded here. A packed checkpoint
is loaded exactly, into plain dense weights with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import compaction, pruner
from .codecs import SUFFIXES, decode
from .compaction import apply_edits
from .config import SparsityConfig
from .edits import Edits
from .errors import CheckpointError, RecipeError
from .files import MANIFEST_KEY, check_files
from .manifest import Manifest
from .masking import STATE_SUFFIXES
from .oneshot import sparsify
from .packing import EDITS_KEY, pack_state, refuse_edited, save_packed, save_plain
from .report import WEIGHTS_ATTRIBUTE
from .zeros import free_zeros, keep_zeros

METHOD = "hf_sparse"

logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """Say how a model is sparse, as `quantization_config` of `from_pretrained` and in `config.json`.

    Args:
        intent: a `SparsityConfig` or its `to_dict()`; instead of it, its keywords can be given.
        manifest: what the checkpoint contains; written by saving, never by hand.
        **sparsity: the keywords of `SparsityConfig`.

    Raises:
        RecipeError: as `SparsityConfig`.

    Example:
        >>> from hf_sparse import SparseConfig
        >>> SparseConfig(sparsity=0.5, scorer="magnitude", pattern="2:4").to_dict()["intent"]
        {'groups': [{'pattern': '2:4', 'sparsity': 0.5}]}
    """

    def __init__(
        self,
        intent: SparsityConfig | Mapping[str, Any] | None = None,
        manifest: Manifest | Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **sparsity: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        if sparsity and intent is not None:
            raise RecipeError(f"give either intent or its keywords, not both: {', '.join(sorted(sparsity))}")
        if sparsity:
            intent = SparsityConfig(**sparsity)
        elif isinstance(intent, Mapping):
            intent = SparsityConfig.from_dict(intent)
        self.intent = intent
        self.manifest = Manifest.from_dict(manifest) if isinstance(manifest, Mapping) else manifest

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        out: dict[str, Any] = {"quant_method": METHOD}
        if self.intent is not None:
            out["intent"] = self.intent.to_dict()
        if self.manifest is not None:
            out["manifest"] = self.manifest.to_dict()
        return out


class Unpack(ConversionOps):
    """Decode one weight while a checkpoint is loaded; weights that are not packed pass through."""

    def __init__(self, hf_quantizer: SparseQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        # transformers copies the op for every weight; the quantizer, which holds the manifest, is one.
        return Unpack(self.hf_quantizer)

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[Tensor] | Tensor],
        *,
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = {
            key.removeprefix("weight"): part[0] if isinstance(part, list) else part for key, part in input_dict.items()
        }
        parts = {suffix: part for suffix, part in parts.items() if suffix not in STATE_SUFFIXES}
        try:
            weight = self.hf_quantizer.unpack(full_layer_name, parts, model)
        except CheckpointError as error:
            # transformers turns what an op raises into a general report; ours is kept and raised after loading.
            self.hf_quantizer.failures.append(error)
            reference = model.get_parameter_or_buffer(full_layer_name)
            weight = torch.zeros(reference.shape, dtype=reference.dtype, device=parts[""].device)
        return {target_patterns[0]: weight if self.dtype is None else weight.to(self.dtype)}


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Load packed checkpoints, prune dense ones on request (one-shot), and pack on saving."""

    quantization_config: SparseConfig
    serialized_names = {  # noqa: RUF012  an instance variable for transformers
        "weight": [f"weight{suffix}" for suffix in (*SUFFIXES, *STATE_SUFFIXES)]
    }

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.manifest = quantization_config.manifest
        self.failures: list[CheckpointError] = []
        self.given_state: dict[str, Tensor] | None = None
        if not self.pre_quantized and quantization_config.intent is None:
            raise RecipeError("SparseConfig() asks for nothing: give a sparsity, as in SparseConfig(sparsity=0.5)")

    def get_load_operations(self) -> dict[str, Any]:
        """Name the op that `from_pretrained` runs on each weight."""
        return {"deserialize": Unpack}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave the stored types as they are; the op casts after decoding, when the checksum has been verified."""
        ours = [op for op in getattr(converter, "operations", ()) if isinstance(op, Unpack)]
        if not ours:
            return super().get_new_dtype(converter, param, dtype)
        # A piece of a file, or a tensor of a state dict that was given.
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype).removeprefix("torch.").upper()
        if name.startswith(("F", "BF")):
            ours[0].dtype = dtype
        return None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized and checkpoint_files:
            # The manifest in the files is the one that goes with their bytes. The copy in config.json can be of another
            # save, if a save was killed between replacing the weights and replacing the config.
            copy, self.manifest = self.manifest, check_files(checkpoint_files)
            if copy is not None and copy != self.manifest:
                logger.warning(
                    "config.json describes another save of this checkpoint than its weight files hold (was a save "
                    "interrupted?). The weight files are whole and are loaded; save the model again to mend it"
                )
        if self.pre_quantized and self.manifest is not None and EDITS_KEY in self.manifest.extra:
            # Before the weights arrive and before a device map is made, so that it is made of the real sizes.
            apply_edits(model, Edits.from_dict(self.manifest.extra[EDITS_KEY]), model.base_model_prefix)

    def unpack(self, name: str, parts: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """Decode a weight of the model from the parts that the checkpoint has for it.

        Raises:
            CheckpointError: if the manifest does not describe it, the content is damaged, or the shape is another.
        """
        if self.manifest is None:
            raise CheckpointError("the checkpoint has no manifest, neither in config.json nor in its files")
        entry = self.manifest.tensors.get(_key_in(self.manifest, name, model))
        if entry is None:
            raise CheckpointError(f"the manifest does not list '{name}'")
        weight = decode(entry, parts, name) if entry.codec != "dense" else parts[""]
        if weight.shape != model.get_parameter_or_buffer(name).shape:
            raise CheckpointError(
                f"'{name}' has shape {tuple(weight.shape)} in the checkpoint, but the model built from config.json has "
                f"{tuple(model.get_parameter_or_buffer(name).shape)}"
            )
        return weight

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failures:
            raise self.failures[0]
        if not self.pre_quantized:
            assert self.quantization_config.intent is not None
            sparsify(model, self.quantization_config.intent)
            return model
        # Our op decodes and has no reverse; saving packs by `get_state_dict_and_metadata` instead.
        loaded = cast(Any, model)
        loaded._weight_conversions = [c for c in loaded._weight_conversions or () if not _is_ours(c)]
        assert self.manifest is not None
        names = {_key_in(self.manifest, name, model): name for name in dict(model.named_parameters())}
        setattr(model, WEIGHTS_ATTRIBUTE, tuple(names[key] for key in self.manifest.targets if key in names))
        keep_zeros(_layers(model))
        for parameter in model.parameters():
            if not parameter.numel():  # left by compaction, which does the same
                parameter.requires_grad_(False)
        save_packed(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Pack the model for `save_pretrained`, and put the manifest into its config."""
        state = model.state_dict() if self.given_state is None else self.given_state
        tensors, manifest = pack_state(model, state)
        model.config.quantization_config = SparseConfig(self.quantization_config.intent, manifest)
        return tensors, {MANIFEST_KEY: manifest.to_json()}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        refuse_edited(model, "made a model without marks")
        # The weights are plain already; what goes are the marks that keep zeros and make saving pack them.
        save_plain(model)
        free_zeros(_layers(model))
        if hasattr(model, WEIGHTS_ATTRIBUTE):
            delattr(model, WEIGHTS_ATTRIBUTE)
        return model

    def is_serializable(self) -> bool:
        """Saving is what this is for."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded weights are plain parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They can be trained themselves, not only adapters on top of them."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing is left in the forward pass that a compiler would mind."""
        return True


def _layers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name.rpartition(".")[0]) for name in getattr(model, WEIGHTS_ATTRIBUTE, ())]


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, Unpack) for op in getattr(conversion, "operations", ()))


def _key_in(manifest: Manifest, name: str, model: PreTrainedModel) -> str:
    """Return the checkpoint key of a weight: a base model loads from a model with a head, and the other way round."""
    prefix = f"{model.base_model_prefix}."
    for key in (name, prefix + name, name.removeprefix(prefix)):
        if key in manifest.tensors:
            return key
    return name


def mark_sparse(model: nn.Module, intent: SparsityConfig | None) -> None:
    """Prepare a model of transformers that is given masks, or was compacted, for saving; leave other modules alone.

    Raises:
        RecipeError: if its weights are quantized, and so are no plain numbers that could be masked.
    """
    if not isinstance(model, PreTrainedModel):
        return
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, SparseQuantizer):
        method = present.quantization_config.quant_method
        raise RecipeError(
            f"the model is quantized ({method}), so its weights cannot be pruned. Load it without quantization"
        )
    config = SparseConfig(intent)
    cast(Any, model).hf_quantizer = SparseQuantizer(config)
    model.config.quantization_config = config
    save_packed(model)


def mark_compacted(model: nn.Module) -> None:
    """Prepare a compacted model for saving; what it was asked to be is known from the pruning, if that was here."""
    present = getattr(model, "hf_quantizer", None)
    mark_sparse(model, present.quantization_config.intent if isinstance(present, SparseQuantizer) else None)


pruner.after_attach.append(mark_sparse)
compaction.after_compact.append(mark_compacted)
