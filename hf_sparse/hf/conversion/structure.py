"""Which heads and neurons a checkpoint of another program has lost: the sub-blocks of its model and stored shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from ...errors import CheckpointError
from ...formats.structure import Cut, Edits
from ...modeling.architectures import SubBlock, known_sub_blocks
from ...modeling.architectures.base import Attention
from ...modeling.layer_kinds import matrix_shape, output_axis
from ...pruning.compaction import apply_edits
from .checkpoint import Checkpoint


def sub_blocks(checkpoint: Checkpoint) -> list[SubBlock]:
    """Return the sub-blocks of the model that the config describes.

    Raises:
        CheckpointError: if hf_sparse does not know which weights form a head in it.
    """
    found = known_sub_blocks(checkpoint.model)
    if not found:
        kind = type(checkpoint.model).__name__
        raise CheckpointError(
            f"the checkpoint has lost heads or neurons, and hf_sparse does not know which weights form one in {kind}. "
            "Convert it with the program that wrote it to plain zeros, or add the family (CONTRIBUTING.md)"
        )
    return found


def self_attentions(checkpoint: Checkpoint) -> dict[int, SubBlock]:
    """Return the self-attention of each layer, by the number of the layer.

    Raises:
        CheckpointError: if a number stands for two layers (of an encoder and a decoder).
    """
    found: dict[int, SubBlock] = {}
    for block in sub_blocks(checkpoint):
        numbers = [int(part) for part in block.name.split(".") if part.isdecimal()]
        if block.kind != "attention" or block.is_cross_attention or not numbers:
            continue
        layer = numbers[0]  # further ones count parts of it
        if layer in found:
            raise CheckpointError(
                f"layer {layer} is in both '{found[layer].name}' and '{block.name}', so it is not known which of the "
                "two has lost heads"
            )
        found[layer] = block
    return found


def stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor in the files by its name in the model; None if it is missing."""
    key = checkpoint.keys_by_name.get(name)
    return None if key is None else checkpoint.headers[key].shape


def groups_left(checkpoint: Checkpoint, block: SubBlock) -> int | None:
    """Return how many heads or neurons of a sub-block are in the files; None if none of its weights are.

    Raises:
        CheckpointError: if its weights contradict each other, or are not whole heads.
    """
    if not block.is_plain:
        raise CheckpointError(
            f"'{block.name}' is smaller in the files than config.json says, and several of its parts share a weight or "
            "a head, so its size alone does not say what is left"
        )
    rows = {name: stored_shape(checkpoint, f"{name}.weight") for name in block.inputs}
    output = stored_shape(checkpoint, f"{block.output_name}.weight")
    if output is None and not any(rows.values()):
        return None
    if block.is_grouped:
        raise CheckpointError(
            f"'{block.name}' is stored with other sizes than config.json says: {rows}, output {output}. Several of its "
            "heads read one KV head, and the files do not say which heads are left"
        )
    axes = {name: output_axis(layer) for name, layer in block.inputs.items()}
    # A fused projection has several lines for each line of the output layer.
    parts = {name: sum(part.name == name for part in block.parts) for name in rows}
    sides = {shape[axes[name]] / parts[name] for name, shape in rows.items() if shape}
    hidden = {shape[1 - axes[name]] for name, shape in rows.items() if shape}
    if output is not None:
        sides, hidden = sides | {output[block.exit.axis]}, hidden | {output[1 - block.exit.axis]}
    expected = {matrix_shape(layer)[1] for layer in block.inputs.values()} | {matrix_shape(block.output)[0]}
    if output is None or None in rows.values() or len(sides) != 1:
        raise CheckpointError(f"the weights of '{block.name}' do not fit together: {rows}, output {output}")
    if hidden != expected:
        raise CheckpointError(
            f"'{block.name}' is stored for {min(hidden)} hidden dimensions, and config.json says {min(expected)}: "
            f"the checkpoint has lost dimensions of the residual stream. Its layer norms run over "
            f"those that are left while heads keep the size of {min(expected)}, which no config of transformers "
            "expresses. Import the checkpoint from before this step, with zeros in their place"
        )
    side = output[block.exit.axis]
    if side % block.size or side // block.size > block.groups:
        raise CheckpointError(f"'{block.name}' has {side} rows, which are not up to {block.groups} of {block.size}")
    return side // block.size


def cuts_by_size(checkpoint: Checkpoint, blocks: Iterable[SubBlock]) -> dict[str, Cut]:
    """Return what is left of each sub-block that is smaller in the files than the config says.

    Which heads or neurons these are the files do not say; where all are alike it does not matter.

    Raises:
        CheckpointError: if a sub-block is missing, its heads are not alike, or its hidden size is another.
    """
    found = {}
    for block in blocks:
        left = groups_left(checkpoint, block)
        if left is None:
            raise CheckpointError(
                f"'{block.name}' is not in the files at all: the checkpoint has lost the whole sub-block with its "
                "layer norm, which a model of transformers always computes, so its outputs would be wrong"
            )
        if left == block.groups:
            continue
        if isinstance(block.table, Attention) and not block.table.heads_alike:
            raise CheckpointError(
                f"{left} of {block.groups} heads of '{block.name}' are left, and the files do not say which; they "
                "differ, because each has a position bias of its own"
            )
        found[block.name] = Cut.of(block.groups, range(left))
    return found


def is_uneven(checkpoint: Checkpoint, block: SubBlock) -> bool:
    """Return whether a sub-block is stored with other sizes than the config says, or not at all in a layer that is."""
    layers = (*block.inputs.items(), (block.output_name, block.output))
    stored = [(stored_shape(checkpoint, f"{name}.weight"), tuple(layer.weight.shape)) for name, layer in layers]
    if all(shape is None for shape, _ in stored):
        layer = block.name.rpartition(".")[0]
        return bool(layer) and any(name.startswith(f"{layer}.") for name in checkpoint.keys_by_name)
    return any(shape != expected for shape, expected in stored)


def check_cut(checkpoint: Checkpoint, block: SubBlock, cut: Cut) -> None:
    """Raise `CheckpointError` unless the files hold as many heads of a block as a config says are left."""
    left = groups_left(checkpoint, block) if block.is_plain else None
    if left is not None and left != cut.count:
        raise CheckpointError(
            f"according to config.json {cut.count} of {block.groups} heads of '{block.name}' are left, and there are "
            f"{left} in the files"
        )


def check_shapes(checkpoint: Checkpoint, edits: Edits) -> None:
    """Raise `CheckpointError` unless the files have the shapes of the model that the edits make of the config."""
    names = dict(checkpoint.keys_by_name)  # before the model is a smaller one
    model = copy.deepcopy(checkpoint.model)
    apply_edits(model, edits, model.base_model_prefix)
    for name, tensor in model.state_dict().items():
        key = names.get(name)
        if key is not None and checkpoint.headers[key].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"'{key}' has shape {checkpoint.headers[key].shape} in the files, and {tuple(tensor.shape)} in the "
                "model without the heads and neurons that are gone"
            )
