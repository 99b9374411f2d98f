"""The plug into transformers: `SparseConfig` in `config.json`, `SparseQuantizer` in `from_pretrained` and saving.

transformers calls every way to store weights differently "quantization"; nothing is rounded here. A packed checkpoint
is loaded exactly, into plain dense weights with zeros.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import logging

from ...config.sparsity import SparsityConfig
from ...errors import BackendError, CheckpointError, RecipeError
from ...formats.codecs import SUFFIXES, decode
from ...formats.codecs.base import TORCH_DTYPES
from ...formats.manifest import Manifest
from ...formats.safetensors_io import MANIFEST_KEY, check_files
from ...formats.structure import EDITS_KEY, Edits
from ...modeling.model_state import SPARSE_WEIGHTS, sparse_weights, unmark_sparse_weights
from ...modeling.zero_preservation import free_zeros, keep_zeros
from ...pruning import compaction, pruner
from ...pruning.compaction import apply_edits
from ...pruning.group import joined
from ...pruning.masked_weight import STATE_SUFFIXES
from ...pruning.oneshot import sparsify
from ...runtime import is_runtime, to_dense_runtime, to_runtime
from ...runtime.lazy_weights import can_wait, waiting
from .bnb import check_one_device, hand_over, quantize, second_quantizer
from .config import METHOD, SparseConfig
from .saving import FORMATS, pack_state, refuse_edited, save_packed, save_plain

logger = logging.get_logger(__name__)


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
            if (later := self.hf_quantizer.waiting(full_layer_name, parts, model, self.dtype)) is not None:
                return {target_patterns[0]: later}
            weight = self.hf_quantizer.unpack(full_layer_name, parts, model)
        except CheckpointError as error:
            # transformers turns what an op raises into a general report; ours is kept and raised after loading.
            self.hf_quantizer.failures.append(error)
            reference = model.get_parameter_or_buffer(full_layer_name)
            weight = torch.zeros(reference.shape, dtype=reference.dtype, device=parts[""].device)
        weight = weight if self.dtype is None else weight.to(self.dtype)
        second = self.hf_quantizer.second
        if second is not None and second.param_needs_quantization(model, full_layer_name):
            return second.get_quantize_ops().convert({full_layer_name: weight}, model=model)
        return {target_patterns[0]: weight}


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Load packed checkpoints, prune dense ones on request (one-shot), and pack on saving."""

    quantization_config: SparseConfig
    serialized_names = {  # noqa: RUF012  an instance variable for transformers
        "weight": [f"weight{suffix}" for suffix in (*SUFFIXES, *STATE_SUFFIXES)]
    }

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            quantization_config.take_stated()
        elif quantization_config.stated:
            logger.warning(
                f"{', '.join(quantization_config.stated)} in config.json has no effect: how a checkpoint is run is for "
                "the one who loads it, as in from_pretrained(..., quantization_config=SparseConfig(...))"
            )
        self.manifest = quantization_config.manifest
        self.failures: list[CheckpointError] = []
        self.checked = False
        self.given_state: dict[str, Tensor] | None = None
        self.codec = FORMATS["packed"]
        self.second = second_quantizer(quantization_config)
        self.prune_to = quantization_config.prune_to if self.pre_quantized else quantization_config.intent
        self.device_map: Any = None
        if not self.pre_quantized and self.prune_to is None and quantization_config.backend is None:
            raise RecipeError("SparseConfig() asks for nothing: give a sparsity, as in SparseConfig(sparsity=0.5)")

    # -- what a second quantization has to say while the load is planned ---------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Let bitsandbytes check device and device map, if the weights go on to it."""
        if self.second is not None:
            if self.prune_to is not None:
                check_one_device(kwargs.get("device_map"))
            self.second.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """Let bitsandbytes choose its device, if the weights go on to it."""
        return device_map if self.second is None else self.second.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Let bitsandbytes reserve what it needs, if the weights go on to it."""
        return max_memory if self.second is None else self.second.adjust_max_memory(max_memory)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return bytes per entry in memory: decoded, in the dtype of the model, or quantized a second time."""
        if self.second is None:
            return super().param_element_size(model, param_name, param)
        return self.second.param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell which weights are quantized a second time, and so have another shape in memory."""
        return self.second is not None and self.second.param_needs_quantization(model, param_name, **kwargs)

    # -- loading -----------------------------------------------------------------------------------------------------

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
        _refuse_shards(model)
        self.device_map = kwargs.get("device_map")
        if self.pre_quantized and checkpoint_files:
            # The manifest in the files is the one that goes with their bytes. The copy in config.json can be of another
            # save, if a save was killed between replacing the weights and replacing the config.
            copy, self.manifest = self.manifest, check_files(checkpoint_files)
            self.checked = True
            if copy is not None and copy != self.manifest:
                logger.warning(
                    "config.json describes another save of this checkpoint than its weight files hold (was a save "
                    "interrupted?). The weight files are whole and are loaded; save the model again to mend it"
                )
        if self.pre_quantized and self.manifest is not None and EDITS_KEY in self.manifest.extra:
            # Before the weights arrive and before a device map is made, so that it is made of the real sizes.
            apply_edits(model, Edits.from_dict(self.manifest.extra[EDITS_KEY]), model.base_model_prefix)
        if self.second is not None and self.prune_to is None:
            self.second._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def unpack(self, name: str, parts: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """Decode a weight of the model from the parts that the checkpoint has for it.

        Raises:
            CheckpointError: if the manifest does not describe it, the content is damaged, or the shape is another.
        """
        if self.manifest is None:
            raise CheckpointError("the checkpoint has no manifest, neither in config.json nor in its files")
        entry = self.manifest.tensors.get(_key_in(self.manifest, name, model))
        # Old names (LayerNorm.gamma) are renamed on the way here. What arrives whole under a name that is not listed is
        # a dense tensor that has been verified under its own: packed ones have several parts and another shape.
        renamed = self.checked and parts.keys() == {""}
        if entry is None and not renamed:
            raise CheckpointError(f"the manifest does not list '{name}'")
        weight = parts[""] if entry is None or entry.codec == "dense" else decode(entry, parts, name)
        expected = model.get_parameter_or_buffer(name).shape
        # transformers judges dense weights (a head for another task, with ignore_mismatched_sizes), but looks at no
        # weight that is quantized on the way.
        judged = weight is parts[""] and not self.param_needs_quantization(model, name)
        if not judged:
            _check_shape(name, tuple(weight.shape), tuple(expected))
        return weight

    def waiting(
        self, name: str, parts: dict[str, Tensor], model: PreTrainedModel, dtype: torch.dtype | None
    ) -> nn.Parameter | None:
        """Return a weight that is decoded when `to_runtime` packs it, so that all are never dense at once; or None.

        Raises:
            CheckpointError: for another shape; what can only be seen by decoding is raised then.
        """
        entry = None if self.manifest is None else self.manifest.tensors.get(_key_in(self.manifest, name, model))
        packs = self.quantization_config.backend not in (None, "dense") and self.prune_to is None
        if not packs or self.second is not None or entry is None or entry.codec == "dense":
            return None
        kind = dtype or TORCH_DTYPES[entry.dtype]
        if not can_wait(model.get_submodule(name.rpartition(".")[0]), name, kind, self.device_map):
            return None
        expected = tuple(model.get_parameter_or_buffer(name).shape)
        _check_shape(name, entry.shape, expected)
        return waiting(expected, kind, lambda: decode(entry, parts, name).to(kind))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failures:
            raise self.failures[0]
        if self.pre_quantized:
            self._settle(model)
        if self.prune_to is not None and not (self.pre_quantized and self.prune_to == self.quantization_config.intent):
            sparsify(model, self.prune_to)
        if self.second is None:
            if self.quantization_config.backend is not None:
                to_runtime(model, self.quantization_config.backend)
            return model
        if self.prune_to is not None:
            quantize(model, self.second, self.device_map)
        return hand_over(model, self.second)

    def _settle(self, model: PreTrainedModel) -> None:
        """Make a model that was packed keep its zeros, and pack again when it is saved."""
        # Our op decodes and has no reverse; saving packs by `get_state_dict_and_metadata` instead.
        loaded = cast(Any, model)
        loaded._weight_conversions = [c for c in loaded._weight_conversions or () if not _is_ours(c)]
        assert self.manifest is not None
        names = {_key_in(self.manifest, name, model): name for name in dict(model.named_parameters())}
        SPARSE_WEIGHTS.set(model, tuple(names[key] for key in self.manifest.targets if key in names))
        for parameter in model.parameters():
            if not parameter.numel():  # left by compaction, which does the same
                parameter.requires_grad_(False)
        if self.second is None or self.prune_to is not None:
            keep_zeros(_layers(model))
            save_packed(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Pack the model for `save_pretrained`, and put the manifest into its config."""
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapters, and nothing else
            return (model.state_dict() if self.given_state is None else self.given_state), {}
        state = model.state_dict() if self.given_state is None else self.given_state
        if any(key.endswith(".base_layer.weight") for key in state):
            raise RecipeError(
                "the model is wrapped in adapters, and would be saved under names that nothing can load. Save the "
                "adapters (PeftModel.save_pretrained), or the model that merge_and_unload() or unload() returns"
            )
        tensors, manifest = pack_state(model, state, self.codec)
        model.config.quantization_config = SparseConfig(self.quantization_config.intent, manifest)
        return tensors, {MANIFEST_KEY: manifest.to_json()}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        refuse_edited(model, "made a model without marks")
        if is_runtime(model):
            to_dense_runtime(model)
        # The weights are plain already; what goes are the marks that keep zeros and make saving pack them.
        save_plain(model)
        free_zeros(_layers(model))
        unmark_sparse_weights(model)
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


def _refuse_shards(model: PreTrainedModel) -> None:
    """Raise if transformers would cut the tensors of the file into one piece per process."""
    asked = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(asked, f"{name}_size", None) for name in ("tp", "fsdp", "dp", "ep", "pp")}
    parallel = [f"{name}_size={size}" for name, size in sizes.items() if (size or 1) > 1]
    if parallel:
        raise BackendError(
            f"a packed checkpoint cannot be loaded into shards ({', '.join(parallel)}): transformers cuts the tensors "
            "of the file before they are decoded. Save it with format='dense' and load that with tp_plan"
        )


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(
            f"'{name}' has shape {found} in the checkpoint, but the model built from config.json has {expected}"
        )


def _layers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name.rpartition(".")[0]) for name in sparse_weights(model)]


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
    earlier = present.quantization_config.intent if isinstance(present, SparseQuantizer) else None
    config = SparseConfig(intent if earlier is None or intent is None else joined(model, earlier, intent))
    cast(Any, model).hf_quantizer = SparseQuantizer(config)
    model.config.quantization_config = config
    save_packed(model)


def mark_compacted(model: nn.Module) -> None:
    """Prepare a compacted model for saving; what it was asked to be is known from the pruning, if that was here."""
    present = getattr(model, "hf_quantizer", None)
    mark_sparse(model, present.quantization_config.intent if isinstance(present, SparseQuantizer) else None)


pruner.after_attach.append(mark_sparse)
compaction.after_compact.append(mark_compacted)
