"""Low-rank parts as a LoRA adapter of PEFT, and back: never merged, because the sum is a dense matrix."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, SparsityError
from ..modeling.forms import LowRankPart, add_low_rank
from ..modeling.layer_kinds import is_linear, is_plain, matrix_shape
from ..modeling.model_state import check_model
from ..utils.atomic_io import read_json, replace_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def low_rank_parts(model: nn.Module) -> dict[str, LowRankPart]:
    """Return the low-rank parts beside sparse weights, by name of the layer."""
    parts = {name: module._modules.get("low_rank") for name, module in model.named_modules()}
    return {name: part for name, part in parts.items() if isinstance(part, LowRankPart)}


def save_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the low-rank parts of a model as a LoRA adapter, for the sparse model without them.

    Args:
        model: pruned with `compress: {name: low_rank}` and a sparsity.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.

    Raises:
        SparsityError: if there are no low-rank parts, or of different ranks.

    Example:
        >>> import hf_sparse
        >>> # hf_sparse.save_lora(model, "adapter")
        >>> # peft.PeftModel.from_pretrained(sparse_model, "adapter")
    """
    check_model(model)
    parts = low_rank_parts(model)
    if not parts:
        raise SparsityError(
            f"this {type(model).__name__} has no low-rank parts to save. They are made by "
            'sparsify(model, {"sparsity": ..., "compress": {"name": "low_rank", "rank": ...}}, batches)'
        )
    ranks = sorted({part.down.shape[0] for part in parts.values()})
    transposed = {not is_plain(model.get_submodule(name)) for name in parts}
    if len(ranks) > 1 or len(transposed) > 1:
        raise SparsityError(f"an adapter has one rank and one kind of layers, and this model has ranks {ranks}")
    config = {
        "peft_type": "LORA",
        "r": ranks[0],
        "lora_alpha": ranks[0],  # a factor of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "target_modules": sorted(parts),
    }
    tensors = {}
    for name, part in parts.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = part.down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = part.up.detach().cpu().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replace_files(Path(folder), last=CONFIG) as written:
        save_file(tensors, written / WEIGHTS, metadata={"format": "pt"})
        (written / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def load_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put a LoRA adapter beside the weights of a model, in place: they are saved and loaded together from then on.

    Args:
        model: sparse, or not; layers that have a low-rank part get this one instead.
        folder: of a plain LoRA adapter of PEFT, trained or written by `save_lora`.

    Raises:
        CheckpointError: if it is not one, or does not fit the model.
    """
    check_model(model)
    config = read_json(Path(folder) / CONFIG)
    if config is None or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{os.fspath(folder)} has no {CONFIG} of a LoRA adapter")
    other = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if other or config.get("bias", "none") != "none":
        raise CheckpointError(f"the adapter uses {', '.join(other) or 'bias'}, which no low-rank part can hold")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        factor = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        tensors = load_file(Path(folder) / WEIGHTS)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(folder)} is not a LoRA adapter: {error!r:.120}") from error
    for name, (down, up) in _pairs(tensors, model).items():
        add_low_rank(model.get_submodule(name), down, up * factor)


def _pairs(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    modules, found = dict(model.named_modules()), {}
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    for full in names:
        name = full.removeprefix(_PREFIX)
        down, up = tensors.get(f"{full}.lora_A.weight"), tensors.get(f"{full}.lora_B.weight")
        layer = modules.get(name)
        if down is None or up is None or layer is None or not is_linear(layer):
            raise CheckpointError(
                f"the adapter has tensors for '{name}', and the model has no linear layer of that name"
            )
        outputs, inputs = matrix_shape(layer)
        if (up.shape, down.shape) != ((outputs, len(down)), (len(down), inputs)):
            raise CheckpointError(
                f"the adapter of '{name}' is {tuple(up.shape)} times {tuple(down.shape)}, and the layer "
                f"{outputs} x {inputs}"
            )
        found[name] = (down, up)
    return found
