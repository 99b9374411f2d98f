"""Heads, neurons and filters that are zero as a whole: counted while converting, removed on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SparsityError
from ...formats.manifest import Manifest
from ...formats.model_folder import weight_files
from ...formats.safetensors_io import read_manifest
from ...modeling.architectures import FilterBlock, SubBlock, known_filters, known_sub_blocks
from ...pruning.compaction import compact, living_groups
from ..auto import load_whole
from ..quantization.key_names import names_in_memory
from .checkpoint import Checkpoint
from .report import DeadGroups, FoundPattern


def dead_groups(
    checkpoint: Checkpoint, readers: Mapping[str, Callable[[], Tensor]], sparse: Iterable[FoundPattern]
) -> DeadGroups | None:
    """Return how many heads, neurons and filters contribute nothing; None where no family knows the model.

    One sub-block is in memory at a time, and only those with a sparse weight are read.

    Args:
        readers: what reads each tensor of the output, by its key.
        sparse: weights with zeros.
    """
    sparse_keys = {found.key for found in sparse}
    if not sparse_keys or not checkpoint.config.get("model_type") or checkpoint.manifest is not None:
        return None
    try:
        blocks: list[SubBlock | FilterBlock] = [*known_sub_blocks(checkpoint.model), *known_filters(checkpoint.model)]
    except CheckpointError:
        return None
    places = names_in_memory(checkpoint.model, readers)
    keys = {place.name: key for key, place in places.items() if not place.converted}
    counts = {"attention": [0, 0], "feed_forward": [0, 0], "convolution": [0, 0]}
    for block in blocks:
        counts[block.kind][1] += block.groups
        weights = [keys.get(f"{name}.weight") for name in (*block.inputs, block.output_name)]
        if sparse_keys.isdisjoint(weights) or not _materialize(block, readers, keys):
            continue
        counts[block.kind][0] += block.groups - int(living_groups(block).sum())
        for layer in (*block.inputs.values(), block.output):
            layer.to("meta")
    return DeadGroups(*(count for both in counts.values() for count in both)) if blocks else None


def _materialize(
    block: SubBlock | FilterBlock, readers: Mapping[str, Callable[[], Tensor]], keys: Mapping[str, str]
) -> bool:
    """Give the layers of a sub-block their weights; return whether the files have them all, in their shapes."""
    for name, layer in (*block.inputs.items(), (block.output_name, block.output)):
        for own, parameter in list(layer.named_parameters()):
            key = keys.get(f"{name}.{own}")
            tensor = None if key is None else readers[key]()
            if tensor is None or tensor.shape != parameter.shape:
                return False
            # A copy: counting folds constants into the bias.
            layer._parameters[own] = nn.Parameter(tensor.clone(), requires_grad=False)
    return True


def compact_folder(folder: Path) -> Manifest | None:
    """Remove the zero heads, neurons and filters of a written model, in place; return the new manifest, None if none.

    Raises:
        PatternError: if no architecture knows the model.
        CheckpointError: if transformers cannot build the model from its config.json.
    """
    try:
        model = load_whole(str(folder))
    except SparsityError:
        raise
    except Exception as error:
        raise CheckpointError(
            "`compact` needs a model that transformers can build, and it cannot from this config.json: "
            f"{type(error).__name__}: {error}"
        ) from error
    before = model.num_parameters()
    with torch.no_grad():
        compact(model)
    if model.num_parameters() == before:
        return None
    model.save_pretrained(folder)
    return read_manifest(weight_files(folder)[0])
