"""The plug into transformers: `SparseConfig` in `config.json`, `SparseQuantizer` in `from_pretrained` and saving.

transformers calls every way to store weights differently "quantization"; nothing is rounded here. A packed checkpoint
is loaded exactly, into plain dense weights with zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import logging

from ...errors import BackendError, CheckpointError, RecipeError
from ...formats.manifest import Manifest
from ...formats.safetensors_io import MANIFEST_KEY
from ...formats.zero_patterns import looks_sparse
from ...modeling.layer_kinds import Slot
from ...modeling.model_state import SPARSE_WEIGHTS, sparse_weights, unmark_sparse_weights
from ...modeling.zero_preservation import free_zeros, keep_zeros
from ...pruning.keep_zeros import keep_zeros as keep_all_zeros
from ...pruning.oneshot import sparsify
from ...runtime import is_runtime, to_dense_runtime, to_runtime
from .. import patches
from .bnb import check_one_device, hand_over, quantize, second_quantizer
from .config import METHOD, SparseConfig
from .load_plan import LoadPlan, is_packed, settled
from .pack_state import is_training_state, pack_state
from .runtime_plan import RuntimePlan, plan_of
from .saving import refuse_edited, refuse_forms, save_packed, save_parts_packed, save_plain, save_request

logger = logging.get_logger(__name__)


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Load packed checkpoints, prune dense ones on request (one-shot), and pack on saving."""

    quantization_config: SparseConfig

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            quantization_config.take_stated()
        elif quantization_config.stated:
            logger.warning(
                f"{', '.join(quantization_config.stated)} in config.json has no effect: how a checkpoint is run is for "
                "the one who loads it, as in from_pretrained(..., quantization_config=SparseConfig(...))"
            )
        self.plan: LoadPlan | None = None
        self.second = second_quantizer(quantization_config)
        self.prune_to = quantization_config.prune_to if self.pre_quantized else quantization_config.intent
        self.device_map: Any = None
        requested = (self.prune_to, quantization_config.backend, quantization_config.keep_zeros or None)
        if not self.pre_quantized and all(each is None for each in requested):
            raise RecipeError(
                "SparseConfig() asks for nothing: give a sparsity, as in SparseConfig(sparsity=0.5), or keep_zeros=True"
            )

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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        _check_shards(model, self.quantization_config.backend)
        self.device_map = kwargs.get("device_map")
        self.plan = self._plan(checkpoint_files or ())
        if self.plan is not None:
            self.plan.shape_model(model)  # before a device map is made, so that it is made of the real sizes
        if self.second is not None and self.prune_to is None:
            self.second._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def _plan(self, files: Sequence[str]) -> LoadPlan | None:
        copy = self.quantization_config.manifest if self.pre_quantized else None
        if not files:
            return None if copy is None else LoadPlan(copy)
        plan = plan_of(files, copy)
        if isinstance(plan, RuntimePlan):
            self._refuse_requests()
        # The manifest in the files is the one that goes with their bytes. The copy in config.json can be of another
        # save, if a save was killed between replacing the weights and replacing the config.
        if plan is not None and copy is not None and copy != plan.manifest:
            logger.warning(
                "config.json describes another save of this checkpoint than its weight files hold (was a save "
                "interrupted?). The weight files are complete and are loaded; save the model again to repair it"
            )
        return plan

    def _refuse_requests(self) -> None:
        """Raise if a model in runtime form is to become something else while it is loaded."""
        config = self.quantization_config
        requested = {"backend": config.backend, "sparsity": self.prune_to, "quantization_config": self.second}
        if not self.pre_quantized:
            raise CheckpointError(
                "the file is in runtime form, and its config.json does not say so: use the one that save_runtime wrote"
            )
        if names := [name for name, value in requested.items() if value is not None]:
            raise RecipeError(
                f"the file is in runtime form already, for the kernels that it was made with: leave out {names[0]}, or "
                "load the checkpoint that it was made of"
            )

    def load(self, original: Callable[..., Any], model: PreTrainedModel, state: Any, files: Any, load: Any) -> Any:
        """Do what `PreTrainedModel._load_pretrained_model` does, with the tensors of the plan."""
        assert self.plan is not None
        lazy = self.quantization_config.backend not in (None, "dense") and self.prune_to is None and self.second is None
        if self.second is not None:  # it quantizes each weight as it is read, as it does for a dense file
            load = dataclasses.replace(load, hf_quantizer=self.second if self.prune_to is None else None)
        return self.plan.load(original, model, None if self.plan.files else state, load, lazy)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        sparse = self.plan is not None
        if self.plan is not None:
            self._settle(model, self.plan)
            self.plan.finish(model)
            self.plan = None
        elif self.pre_quantized:
            sparse = self._settle_dense(model)
        if self.prune_to is not None and not (sparse and self.prune_to == self.quantization_config.intent):
            sparsify(model, self.prune_to)
        if self.quantization_config.keep_zeros and not sparse:
            keep_all_zeros(model)
        if self.second is None:
            if self.quantization_config.backend is not None:
                to_runtime(model, self.quantization_config.backend)
            return model
        if self.prune_to is not None:
            quantize(model, self.second, self.device_map)
        return hand_over(model, self.second)

    def _settle(self, model: PreTrainedModel, plan: LoadPlan) -> None:
        """Make a model that was packed keep its zeros, and pack again when it is saved."""
        SPARSE_WEIGHTS.set(model, plan.targets)
        for parameter in model.parameters():
            if not parameter.numel():  # left by compaction, which does the same
                parameter.requires_grad_(False)
        if self.second is None or self.prune_to is not None:
            keep_zeros(_slots(model), map(plan.nonzeros.get, sparse_weights(model)))
            save_packed(model)
            save_parts_packed(model)

    def _settle_dense(self, model: PreTrainedModel) -> bool:
        """Do the same for dense files beside a config.json that says "hf_sparse"; return whether anything is sparse.

        Such are a part of a sparse model that was saved by itself, or a dense model that was given its config.
        """
        names = tuple(name for name, parameter in model.named_parameters() if looks_sparse(name, parameter))
        if names:
            SPARSE_WEIGHTS.set(model, names)
            keep_zeros(_slots(model))
            save_packed(model)
            save_parts_packed(model)
        else:
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return bool(names)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Pack the model for `save_pretrained`, and put the manifest into its config."""
        request = save_request()
        if request.manifest is not None:
            return {}, self._describe(model, request.manifest)
        state = model.state_dict() if request.state is None else request.state
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapters, and nothing else
            return dict(state), {}
        if any(key.endswith(".base_layer.weight") for key in state):
            raise RecipeError(
                "the model is wrapped in adapters, and would be saved under names that nothing can load. Save the "
                "adapters (PeftModel.save_pretrained), or the model that merge_and_unload() or unload() returns"
            )
        tensors, manifest = pack_state(model, state, request.codec)
        return tensors, self._describe(model, manifest)

    def _describe(self, model: PreTrainedModel, manifest: Manifest) -> dict[str, str]:
        """Put a manifest into the config of a model, and return the metadata of its files."""
        model.config.quantization_config = SparseConfig(self.quantization_config.intent, manifest)
        return {MANIFEST_KEY: manifest.to_json()}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        refuse_edited(model, "made a model without marks")
        refuse_forms(model, "made a model without marks")
        if is_runtime(model):
            to_dense_runtime(model)
        # The weights are plain already; what goes are the marks that keep zeros and make saving pack them.
        save_plain(model)
        free_zeros(_slots(model))
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


def _check_shards(model: PreTrainedModel, backend: str | None) -> None:
    """Raise if a model that is divided over processes is to run with packed weights.

    Loading alone works: each tensor is decoded when transformers reads it, and cut then.
    """
    asked = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(asked, f"{name}_size", None) for name in ("tp", "fsdp", "dp", "ep", "pp")}
    parallel = [f"{name}_size={size}" for name, size in sizes.items() if (size or 1) > 1]
    if parallel and backend not in (None, "dense"):
        raise BackendError(
            f"backend '{backend}' does not work on a model that is divided over processes ({', '.join(parallel)}): it "
            "packs whole weights, and each process has a part. Load it without backend"
        )


def _slots(model: nn.Module) -> list[Slot]:
    return [Slot.of(model, name) for name in sparse_weights(model)]


def load_pretrained(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap `PreTrainedModel._load_pretrained_model`: read packed files as if they were dense.

    Args:
        original: what is wrapped.
        *args: the model on the meta device, the tensors where they are given, the files of the checkpoint, and the
            `LoadStateDictConfig`.
        **kwargs: none of `from_pretrained`; adapters are loaded with `expected_keys`, into a model that is there.
    """
    if kwargs or len(args) != 4:
        return original(*args, **kwargs)
    model, state, files, load = args
    files = files if state is not None or not files else list(settled(files))
    quantizer = load.hf_quantizer
    if isinstance(quantizer, SparseQuantizer):
        if quantizer.plan is None:
            information, offloaded = original(model, state, files, load)
            # A part that was saved while the whole was being pruned has the training state of its weights beside them.
            names = information.unexpected_keys | model.state_dict().keys()
            information.unexpected_keys -= {key for key in names if is_training_state(key, names)}
            return information, offloaded
        return quantizer.load(original, model, state, files, load)
    if state is not None or not files or not is_packed(files[0]):
        return original(model, state, files, load)
    # The config names no quantization: that of one tower of a CLIP, or one that the user made. The files are packed.
    plan = plan_of(files)
    assert plan is not None
    if isinstance(plan, RuntimePlan):
        raise CheckpointError(f"{files[0]} is in runtime form: use the config.json that save_runtime wrote beside it")
    plan.shape_model(model)
    loaded = plan.load(original, model, None, load, lazy=False)
    if quantizer is None:
        config = SparseConfig(manifest=plan.manifest)
        ours = SparseQuantizer(config, pre_quantized=True)
        ours._settle(model, plan)
        cast(Any, model).hf_quantizer = ours
        model.config.quantization_config = config
    return loaded


patches.wrap(PreTrainedModel, "_load_pretrained_model", load_pretrained)
