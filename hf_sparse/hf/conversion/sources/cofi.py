"""CoFi (Xia et al. 2022) and others that store fewer heads and neurons than the config says, and not which.

Of BERT's heads and neurons all are alike: which of them are left does not matter, only how many. A layer norm over
fewer dimensions cannot be expressed, nor can a layer without one (CoFi leaves it out together with the sub-block).
"""

from __future__ import annotations

from collections.abc import Iterator

from ....errors import CheckpointError
from ....formats.structure import KINDS, Cut, Edits
from ....modeling.architectures import SubBlock, known_sub_blocks
from ....modeling.architectures.base import Attention
from ..checkpoint import Checkpoint
from ..source import PendingTensor, register_source
from ..structure import groups_left, stored_shape, sub_blocks
from .dense import Dense

_ZS = ("zs.pt", "l0_module.pt")
_DISTILLATION = "layer_transformation."
"""A layer that CoFi trains with, and the model does not use."""


@register_source
class CoFi(Dense):
    """Sub-blocks of other sizes than the config has."""

    name = "CoFi"

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        if not checkpoint.config.get("model_type"):
            return False
        masks = [name for name in _ZS if checkpoint.path.is_dir() and (checkpoint.path / name).exists()]
        try:
            blocks = known_sub_blocks(checkpoint.model)
        except CheckpointError:
            if masks:
                raise
            return False
        if not any(_differs(checkpoint, block) for block in blocks):
            if masks:
                raise CheckpointError(
                    f"the checkpoint is one of CoFi whose masks are still in {masks[0]}, so its weights are not what "
                    "the model computes with. Apply them first: load_model of CoFiPruning, then save_pretrained"
                )
            return False
        return True

    def tensors(self) -> Iterator[PendingTensor]:
        for tensor in super().tensors():
            if not tensor.key.startswith(_DISTILLATION):
                yield tensor

    def edits(self) -> Edits:
        blocks = sub_blocks(self.checkpoint)
        self._check_hidden_size(blocks)
        parts: dict[str, dict[str, Cut]] = {kind: {} for kind in KINDS.values()}
        for block in blocks:
            left = groups_left(self.checkpoint, block)
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
            parts[KINDS[block.kind]][block.name] = Cut.of(block.groups, range(left))
        return Edits(**parts)

    def _check_hidden_size(self, blocks: list[SubBlock]) -> None:
        for block in blocks:
            shape = stored_shape(self.checkpoint, f"{block.output_name}.weight")
            expected = block.output.out_features
            if shape is not None and shape[0] != expected:
                raise CheckpointError(
                    f"'{block.output_name}' has {shape[0]} hidden dimensions and the config {expected}: the checkpoint "
                    "has lost dimensions of the residual stream. Its layer norms run over those that are left while "
                    f"heads keep the size of {expected}, which no config of transformers expresses. Train CoFi without "
                    "the hidden mask (pruning_type without 'hidden'), or import its sparsity as zeros"
                )


def _differs(checkpoint: Checkpoint, block: SubBlock) -> bool:
    """Return whether a sub-block is stored with other sizes than the config says, or not at all."""
    layers = (*block.inputs.items(), (block.output_name, block.output))
    stored = [(stored_shape(checkpoint, f"{name}.weight"), tuple(layer.weight.shape)) for name, layer in layers]
    if all(shape is None for shape, _ in stored):
        return any(checkpoint.keys_by_name.values()) and _has_siblings(checkpoint, block)
    return any(shape != expected for shape, expected in stored)


def _has_siblings(checkpoint: Checkpoint, block: SubBlock) -> bool:
    """Return whether the files have anything of the same layer: a part that is missing as a whole is another matter."""
    layer = block.name.rpartition(".")[0]
    return bool(layer) and any(name.startswith(f"{layer}.") for name in checkpoint.keys_by_name)
