"""Compaction: heads, neurons and sub-blocks that contribute nothing leave the model, which computes what it did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SparsityError
from ..formats.structure import KINDS, Cut, Edits
from ..modeling.architectures import SubBlock, find_sub_blocks, known_sub_blocks
from ..modeling.architectures.base import Attention, FeedForward
from ..modeling.integration import integration_of
from ..modeling.model_state import EDITS
from .masked_weight import masked_weight


def edits_of(model: nn.Module) -> Edits:
    """Return what compaction has removed from a model since it was made, or the empty `Edits`."""
    edits: Edits | None = getattr(model, EDITS.name, None)  # a wrapper hands attributes on
    if edits:
        return edits
    parts: dict[str, dict[str, Cut]] = {}
    for prefix, module in model.named_modules():
        # A compacted model inside one that was made around it; those inside another are in its edits already.
        inside = EDITS.get(module)
        if inside and prefix:
            for kind, name, cut in inside:
                parts.setdefault(kind, {}).setdefault(f"{prefix}.{name}" if name else prefix, cut)
    return Edits(**parts)


def remember_edits(model: nn.Module, edits: Edits) -> None:
    """Put the edits of a model on it, and those of each part that can be saved by itself on that part."""
    for prefix, module in model.named_modules():
        if module is model:
            EDITS.set(module, edits)
        elif hasattr(type(module), "save_pretrained"):
            parts: dict[str, dict[str, Cut]] = {}
            for kind, name, cut in edits:
                if name.startswith(f"{prefix}."):
                    parts.setdefault(kind, {})[name.removeprefix(f"{prefix}.")] = cut
            EDITS.set(module, Edits(**parts))


@torch.no_grad()
def compact(model: nn.Module) -> Edits:
    """Remove every head and neuron whose weights are zero from a model, in place, and return what is left of it.

    The model computes the same as before, up to the order of additions. A head goes if its output columns are zero, or
    its value rows with their biases. A neuron goes if its output column is zero, or what comes to it is always 0; one
    whose rows alone are zero is a constant, which is added to the bias of the next layer. A sub-block that has lost all
    of its heads or neurons gives the bias of its last layer and costs nothing.

    What is left is smaller matrices, not zeros: it is faster on every device. The layers get new parameters, so make
    the optimizer after this. A model of transformers saves and loads as before; it can be pruned and compacted again.

    Args:
        model: of a family that `hf_sparse.modeling.architectures` knows; pruned and baked.

    Returns:
        All that was removed since the model was made, with the numbers that heads and neurons had then.

    Raises:
        PatternError: if no architecture knows the model.
        SparsityError: if there are masks on it, or it is not in memory.

    Example:
        >>> import hf_sparse
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
        >>> model = BertModel(BertConfig(vocab_size=10, **sizes))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(pattern="head", sparsity=0.75))
        >>> edits = hf_sparse.compact(model)
        >>> model.encoder.layer[0].attention.self.query.weight.shape
        torch.Size([8, 32])
    """
    blocks = find_sub_blocks(model, "compact()")
    for block in blocks:
        for name, layer in (*block.inputs.items(), (block.output_name, block.output)):
            if masked_weight(layer) is not None:
                raise SparsityError(f"'{name}' still has a mask. End the pruning first: Pruner.bake()")
            if layer.weight.is_meta:
                raise SparsityError(f"'{name}' is not in memory (meta device). Load the whole model into memory first")
    edits = edits_of(model)
    parts: dict[str, dict[str, Cut]] = {kind: dict(getattr(edits, kind)) for kind in KINDS.values()}
    for block in blocks:
        living = living_groups(block)
        if bool(living.all()):
            continue
        cuts = parts[KINDS[block.kind]]
        kept = living.nonzero().flatten().tolist()
        cuts[block.name] = cuts.get(block.name, Cut.of(block.groups)).then(kept)
        _cut(block, kept, cuts[block.name])
    edits = Edits(**parts)
    if edits:
        remember_edits(model, edits)
        integration_of(model).after_compact(model)
    return edits


@torch.no_grad()
def living_groups(block: SubBlock) -> Tensor:
    """Return a flag for each head or neuron of a sub-block: whether it contributes to the outputs.

    What a neuron contributes as a constant goes into the bias of the output layer, in place.
    """
    return _living_heads(block) if block.kind == "attention" else _living_neurons(block)


def _groups(block: SubBlock, lines: Tensor) -> Tensor:
    """Turn a flag for each row or column into one for each group: whether any is set."""
    return lines.view(block.groups, block.size).any(1)


def _has_columns(block: SubBlock) -> Tensor:
    return _groups(block, (block.output.weight != 0).any(0))


def _living_heads(block: SubBlock) -> Tensor:
    *_, value = block.inputs.values()
    rows = (value.weight != 0).any(1)
    if value.bias is not None:
        rows = rows | (value.bias != 0)
    return _has_columns(block) & _groups(block, rows)


def _living_neurons(block: SubBlock) -> Tensor:
    """Return which neurons are needed, once the constants that others contribute are in the bias of the next layer."""
    table, output = block.table, block.output
    assert isinstance(table, FeedForward)
    dead, constant = ~_has_columns(block), torch.ones_like(output.weight[0], dtype=torch.bool)
    product = torch.ones_like(output.weight[0])
    for index, layer in enumerate(block.inputs.values()):
        no_rows = (layer.weight == 0).all(1)
        value = torch.zeros_like(product) if layer.bias is None else layer.bias.detach()
        value = table.act(block.module, value) if index == 0 else value
        dead |= no_rows & (value == 0)
        constant &= no_rows
        product *= value
    constant &= ~dead
    if output.bias is not None and bool(constant.any()):
        # In double precision: the sum of many constants is rounded once.
        added = output.weight[:, constant].double() @ product[constant].double()
        output.bias.copy_(output.bias.double() + added)
        dead |= constant
    return ~dead


def _cut(block: SubBlock, kept: Sequence[int], cut: Cut) -> None:
    """Keep the groups with these numbers, counted now; `cut` has them as they were at first."""
    if isinstance(block.table, Attention):
        block.table.resize(block.core, cut.kept, cut.before)
    lines = (torch.tensor(kept, dtype=torch.long)[:, None] * block.size + torch.arange(block.size)).flatten()
    for layer in block.inputs.values():
        layer.weight = _taken(layer.weight, lines, 0)
        layer.bias = None if layer.bias is None else _taken(layer.bias, lines, 0)
        layer.out_features = len(lines)
    block.output.weight = _taken(block.output.weight, lines, 1)
    block.output.in_features = len(lines)


def _taken(parameter: Tensor, lines: Tensor, axis: int) -> nn.Parameter:
    taken = parameter.detach().index_select(axis, lines.to(parameter.device))
    # What is empty has nothing to train; DDP would wait for its gradient.
    return nn.Parameter(taken, requires_grad=parameter.requires_grad and taken.numel() > 0)


def apply_edits(model: nn.Module, edits: Edits, prefix: str = "") -> None:
    """Give a model that was built from its config the shapes that a compacted one has; for meta tensors.

    Args:
        edits: of a checkpoint. Those of parts that the model does not have (for an encoder, the decoder) are left out.
        prefix: what names in a model with a head have in front, and those in a base model do not.

    Raises:
        CheckpointError: if the edits do not fit the model.
    """
    blocks = {(KINDS[block.kind], block.name): block for block in known_sub_blocks(model)}
    modules = {name for name, _ in model.named_modules()}
    parts: dict[str, dict[str, Cut]] = {kind: {} for kind in KINDS.values()}
    for kind, name, cut in edits:
        names = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
        match = next((each for each in names if (kind, each) in blocks), None)
        if match is None:
            if taken := modules.intersection(names):
                raise CheckpointError(
                    f"the checkpoint has lost {kind} of '{taken.pop()}', but this version of hf_sparse does not know "
                    f"of any there in {type(model).__name__}; is it from a newer one? pip install --upgrade hf-sparse"
                )
            continue
        block = blocks[kind, match]
        if match in parts[kind] or cut.before != block.groups:
            raise CheckpointError(
                f"the checkpoint has lost {kind} of '{match}', which had {cut.before}, but with this config.json it "
                f"has {block.groups}"
            )
        parts[kind][match] = cut
        _cut(block, cut.kept, cut)
    remember_edits(model, Edits(**parts))
