"""CoFi (Xia et al. 2022) and others that store fewer heads and neurons than the config says, and often not which.

Of BERT's heads and neurons all are alike: which of them are left does not matter, only how many. A layer norm over
fewer dimensions cannot be expressed, nor can a layer without one (CoFi leaves it out together with the sub-block).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....errors import CheckpointError
from ....formats.structure import Edits
from ....modeling.architectures import known_sub_blocks
from ..checkpoint import Checkpoint
from ..source import PendingTensor, register_source
from ..structure import cuts_by_size, is_uneven, sub_blocks
from .pruned_heads import KEY, PrunedHeads

_PREFIX = "CoFi"
_DISTILLATION = "layer_transformation."
"""A layer that CoFi trains with, and the model does not use."""


@register_source
class CoFi(PrunedHeads):
    """Sub-blocks of other sizes than the config has."""

    name = "CoFi"
    rank = 35

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        if not checkpoint.config.get("model_type"):
            return False
        named = any(str(name).startswith(_PREFIX) for name in checkpoint.config.get("architectures") or ())
        if super().recognizes(checkpoint):
            return named
        try:
            blocks = known_sub_blocks(checkpoint.model)
        except CheckpointError:
            return False
        return named or any(is_uneven(checkpoint, block) for block in blocks)

    def tensors(self) -> Iterator[PendingTensor]:
        for tensor in super().tensors():
            if not tensor.key.startswith(_DISTILLATION):
                yield tensor

    def config(self) -> dict[str, Any]:
        """Return the config, with the class of transformers that computes the same once heads and neurons are gone."""
        return with_plain_class(super().config())

    def edits(self) -> Edits:
        if self.checkpoint.config.get(KEY):
            return super().edits()
        blocks = [block for block in sub_blocks(self.checkpoint) if is_uneven(self.checkpoint, block)]
        return Edits(
            heads=cuts_by_size(self.checkpoint, [block for block in blocks if block.kind == "attention"]),
            neurons=cuts_by_size(self.checkpoint, [block for block in blocks if block.kind == "feed_forward"]),
        )


def with_plain_class(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that names the class of transformers that CoFi's is derived from."""
    classes = config.get("architectures")
    if not isinstance(classes, list):
        return config
    return {**config, "architectures": [str(name).removeprefix(_PREFIX) for name in classes]}
