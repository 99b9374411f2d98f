"""Compaction: heads, neurons and sub-blocks that contribute nothing leave the model, which computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SparsityError
from ..formats.structure import KINDS, Cut, Edits
from ..modeling.architectures import (
    ExpertBlock,
    FilterBlock,
    SubBlock,
    find_blocks,
    known_experts,
    known_filters,
    known_sub_blocks,
)
from ..modeling.architectures.base import Attention, FeedForward, Heads
from ..modeling.architectures.parts import remove_lines, taken
from ..modeling.integration import integration_of
from ..modeling.layer_kinds import matrix_shape, oriented, output_axis, set_matrix_shape
from ..modeling.model_state import EDITS
from .even_cuts import Cuts, Cuttable, move_to_config, unmark_dense
from .masked_weight import masked_weight
from .row_blocks import in_row_blocks, report_kept


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
    """Remove every head, neuron and filter whose weights are zero from a model, in place; return what is left of it.

    The model computes the same as before, up to the order of additions. A head goes if its output columns are zero, or
    its value rows with their biases; with grouped queries a KV head goes with the last head that reads it. A neuron
    goes if its output column is zero, or what comes to it is always 0; one whose rows alone are zero is a constant,
    which is added to the bias of the next layer. Where the layers before are zero in blocks of rows (pattern "block" of
    4 x 1), neurons go in whole blocks: kernels need them. A sub-block that has lost all of its heads or neurons gives
    the bias of its last layer and costs nothing. A filter goes with its entries of the batch norm if the input channels
    of the next layer that read it are zero, as pattern "filter" leaves them; one filter of each convolution stays.

    What is left is smaller matrices, not zeros: it is faster on every device. The layers get new parameters, so make
    the optimizer after this. A model of transformers saves and loads as before; it can be pruned and compacted again.

    Args:
        model: of a family that `hf_sparse.modeling.architectures` knows; pruned and baked.

    Where all sub-blocks have lost the same number, and the config of the family has a key for it, the config is changed
    instead: the model is then a smaller one of its class, which any tool loads, and later calls count from there.

    Returns:
        All that the model has lost now, with the numbers that heads and neurons had in the model that its `config`
        described before.

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
    blocks = find_blocks(model, "compact()")
    for block in blocks:
        for name, layer in (*block.inputs.items(), (block.output_name, block.output)):
            if masked_weight(layer) is not None:
                raise SparsityError(f"'{name}' still has a mask. End the pruning first: Pruner.bake()")
            if layer.weight.is_meta:
                raise SparsityError(f"'{name}' is not in memory (meta device). Load the whole model into memory first")
    cuts: Cuts = {kind: dict(getattr(edits_of(model), kind)) for kind in KINDS.values()}
    anything, in_blocks = False, []
    for block in blocks:
        living = living_groups(block)
        if isinstance(block, SubBlock) and block.kind == "feed_forward" and not bool(living.all()):
            living, found = in_row_blocks(block, living)
            in_blocks.append(found)
        if bool(living.all()):
            continue
        own = cuts[KINDS[block.kind]]
        kept = living.nonzero().flatten().tolist()
        own[block.name] = own.get(block.name, Cut.of(block.groups)).then(kept)
        cut_block(block, kept, own[block.name])
        anything = True
    edits = Edits(**cuts)
    report_kept(in_blocks)
    if anything:
        settle_edits(model, cuts)
    return edits


def settle_edits(model: nn.Module, cuts: Cuts) -> None:
    """Let a model that has become smaller remember what its config cannot express, and be saved with it."""
    edits = Edits(**move_to_config(model, cuts))
    remember_edits(model, edits)
    if not edits:
        unmark_dense(model)
    integration_of(model).after_compact(model)


@torch.no_grad()
def living_groups(block: SubBlock | FilterBlock) -> Tensor:
    """Return a flag for each head, neuron or filter: whether it contributes to the outputs.

    What a neuron contributes as a constant goes into the bias of the output layer, in place.
    """
    if isinstance(block, FilterBlock):
        return block.living()
    return _living_heads(block) if block.kind == "attention" else _living_neurons(block)


def _has_columns(block: SubBlock) -> Tensor:
    """Return which heads or neurons the output layer reads."""
    return (block.exit.weights() != 0).flatten(1).any(1)


def _living_heads(block: SubBlock) -> Tensor:
    value = block.parts[-1]
    living = (value.weights() != 0).flatten(1).any(1)
    biases = value.biases()
    if biases is not None:
        living |= (biases != 0).any(1)
    if block.is_grouped:
        living = living[torch.tensor(block.kv_of, device=living.device)]
    return _has_columns(block) & living


def _living_neurons(block: SubBlock) -> Tensor:
    """Return which neurons are needed, once the constants that others contribute are in the bias of the next layer."""
    table, output = block.table, block.output
    assert isinstance(table, FeedForward)
    columns = oriented(output, output.weight.detach())
    dead, constant = ~_has_columns(block), torch.ones_like(columns[0], dtype=torch.bool)
    product = torch.ones_like(columns[0])
    for index, part in enumerate(block.parts):
        no_rows, biases = (part.weights() == 0).flatten(1).all(1), part.biases()
        value = torch.zeros_like(product) if biases is None else biases.flatten()
        value = table.act(block.module, value) if index == 0 else value
        dead |= no_rows & (value == 0)
        constant &= no_rows
        product *= value
    constant &= ~dead
    if output.bias is not None and bool(constant.any()):
        # In double precision: the sum of many constants is rounded once.
        added = columns[:, constant].double() @ product[constant].double()
        output.bias.copy_(output.bias.double() + added)
        dead |= constant
    return ~dead


def cut_block(block: SubBlock | FilterBlock, kept: Sequence[int], cut: Cut) -> None:
    """Keep the groups with these numbers, counted now; `cut` has them as they were at first."""
    if isinstance(block, FilterBlock):
        block.cut(kept)
        return
    readers = Counter(block.kv_of[head] for head in kept) if block.heads_per_kv else Counter()
    if isinstance(block.table, Attention):
        per_kv = tuple(readers[kv] for kv in sorted(readers))
        block.table.resize(block.core, Heads(cut.kept, cut.before, per_kv))
    elif block.table.width in vars(block.module):
        setattr(block.module, block.table.width, len(kept))
    for layer in block.inputs.values():
        lines = [part.lines(sorted(readers) if part.shared else kept) for part in block.parts if part.layer is layer]
        joined = torch.cat([each.flatten() for each in lines]).sort().values
        remove_lines(layer, output_axis(layer), joined)
        set_matrix_shape(layer, len(joined), matrix_shape(layer)[1])
    columns = block.exit.lines(kept).flatten()
    remove_lines(block.output, block.exit.axis, columns)
    set_matrix_shape(block.output, matrix_shape(block.output)[0], len(columns))


def cut_experts(block: ExpertBlock, kept: Sequence[int]) -> None:
    """Keep the experts with these numbers, and their rows of the router."""
    numbers, table = torch.tensor(list(kept), dtype=torch.long), block.table
    for module, names in ((block.router, ("weight",)), (block.experts, table.parameters)):
        for name in names:
            setattr(module, name, taken(module.get_parameter(name), numbers, 0))
        setattr(module, table.count, len(kept))


def apply_edits(model: nn.Module, edits: Edits, prefix: str = "") -> None:
    """Give a model that was built from its config the shapes that a compacted one has; for meta tensors.

    Args:
        edits: of a checkpoint. Those of parts that the model does not have (for an encoder, the decoder) are left out.
        prefix: what names in a model with a head have in front, and those in a base model do not.

    Raises:
        CheckpointError: if the edits do not fit the model.
    """
    every: list[Cuttable] = [*known_sub_blocks(model), *known_experts(model), *known_filters(model)]
    blocks = {(KINDS[block.kind], block.name): block for block in every}
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
        if isinstance(block, ExpertBlock):
            if cut.count < block.top_k:
                raise CheckpointError(
                    f"according to the checkpoint {cut.count} experts of '{match}' are left, and each token needs "
                    f"{block.top_k}"
                )
            cut_experts(block, cut.kept)
        else:
            cut_block(block, cut.kept, cut)
    remember_edits(model, Edits(**parts))
