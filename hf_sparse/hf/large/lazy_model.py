"""A model whose blocks have no values until they are loaded from the files of its checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from ...errors import CheckpointError, RecipeError
from ...formats.model_folder import check_index, weight_files
from ...formats.safetensors_io import read_manifest
from ...formats.sharding import Shards
from ..auto import model_class
from ..quantization.key_names import as_in_memory, names_in_memory


def source_files(folder: Path) -> list[Path]:
    """Return the weight files of a dense checkpoint.

    Raises:
        CheckpointError: if they are missing, or packed.
        RecipeError: if the model is quantized.
    """
    files = weight_files(folder)
    check_index(folder, exist=False)
    config = AutoConfig.from_pretrained(folder)
    stated = getattr(config, "quantization_config", None)
    if any(read_manifest(file) is not None for file in files):
        raise CheckpointError(f"{folder} is packed: write it dense first (hf-sparse convert {folder} --format dense)")
    if stated is not None:
        raise RecipeError(f"{folder} is quantized, so its weights cannot be pruned. Give the checkpoint before that")
    return files


def empty_model(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Return the model that a folder holds without its values: parameters are on the meta device.

    Buffers that are computed (rotary embeddings) have values at once.
    """
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = model_class(config.architectures, config)._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


class LazyModel:
    """A model on the meta device with what its first block needs, and blocks that are loaded on request.

    Args:
        folder: of the checkpoint.
        shards: its weights.
        dtype: of weights and hidden states.

    Attributes:
        model: of transformers.
    """

    def __init__(self, folder: Path, shards: Shards, dtype: torch.dtype) -> None:
        self.shards, self.dtype = shards, dtype
        self.model: Any = empty_model(folder, dtype)
        self._places = names_in_memory(self.model, shards.headers)
        self._keys = {place.name: key for key, place in self._places.items() if not place.converted}

    def load_rest(self, blocks: Iterable[str], device: torch.device) -> None:
        """Load all that is outside of blocks, but the output embeddings, which no block needs."""
        inside = tuple(f"{block}." for block in blocks)
        head = self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        left_out = (*inside, f"{names[id(head)]}.") if head is not None and id(head) in names else inside
        state = {}
        for key, place in self._places.items():
            if not all(name.startswith(left_out) for name in place.names):
                state[key] = self.shards.get(key)
        self._put(self.model, "", as_in_memory(self.model, state), device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.model.tie_weights()

    def load_block(self, name: str, device: torch.device) -> nn.Module:
        """Load one block.

        Raises:
            CheckpointError: if the checkpoint lacks a tensor of it.
        """
        prefix = f"{name}."
        keys = [k for k, place in self._places.items() if any(n.startswith(prefix) for n in place.names)]
        block: nn.Module = self.model.get_submodule(name)
        self._put(self.model, prefix, as_in_memory(self.model, {key: self.shards.get(key) for key in keys}), device)
        for module in block.modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[own] = buffer.to(device)
        missing = [own for own, tensor in block.named_parameters() if tensor.is_meta]
        if missing:
            raise CheckpointError(f"the checkpoint lacks '{prefix}{missing[0]}' and {len(missing) - 1} more tensors")
        return block

    def unload(self, name: str) -> None:
        """Free the memory of a block."""
        for module in self.model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def unwritable(self, names: Iterable[str]) -> list[str]:
        """Return the weights that cannot be written back: the checkpoint has them in a form that cannot be restored."""
        found = []
        for name in names:
            keys = {key for key, place in self._places.items() if name in place.names}
            try:
                stored = self._as_stored(name, self.model.get_parameter(name))
            except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError):
                stored = {}
            shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
            if not keys or shapes != {key: tuple(self.shards.headers[key].shape) for key in keys}:
                found.append(name)
        return found

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights as the checkpoint has them, by its keys: in its types, and split where it has several.

        Args:
            weights: by name in memory.
        """
        found = {}
        for name, weight in weights.items():
            for key, part in self._as_stored(name, weight).items():
                found[key] = part.to(self.shards.get(key).dtype).cpu().contiguous()
        return found

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Put weights into a block that is loaded.

        Args:
            stored: what `stored` has returned.
        """
        for name, weight in as_in_memory(self.model, stored).items():
            self.model.get_parameter(name).data.copy_(weight)

    def _as_stored(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        if name in self._keys:
            return {self._keys[name]: weight}
        return dict(revert_weight_conversion(self.model, {name: weight}))

    def _put(self, model: nn.Module, prefix: str, state: Mapping[str, Tensor], device: torch.device) -> None:
        for name, tensor in state.items():
            path, _, own = name.rpartition(".")
            if not name.startswith(prefix):
                continue
            module = model.get_submodule(path)
            held = module._parameters.get(own)
            values = tensor.to(device, self.dtype if tensor.is_floating_point() else None, copy=True)
            if own in module._buffers:
                module._buffers[own] = values
            elif held is not None:
                if held.shape != values.shape:
                    raise CheckpointError(
                        f"'{name}' must be of shape {tuple(held.shape)} by config.json, and is {tuple(values.shape)}"
                    )
                module._parameters[own] = nn.Parameter(values, requires_grad=False)
