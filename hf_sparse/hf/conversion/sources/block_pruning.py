"""nn_pruning ("block pruning", Lagunas et al. 2021): heads are gone, neurons are rows and columns of zeros.

Its `-opt-` models replace LayerNorm by NoNorm, a scale and a shift, which the classes of transformers do not compute.
"""

from __future__ import annotations

from ....errors import CheckpointError
from ....utils.text import shorten
from ..checkpoint import Checkpoint
from ..source import register_source
from .pruned_heads import PrunedHeads


@register_source
class BlockPruning(PrunedHeads):
    """What nn_pruning has compiled."""

    name = "nn_pruning"
    rank = 30

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        kind = checkpoint.config.get("layer_norm_type")
        if kind not in (None, "layer_norm"):
            raise CheckpointError(
                f"the model is one of nn_pruning with `layer_norm_type` {shorten(kind)}: its LayerNorm was replaced by "
                "a scale and a shift (NoNorm), which no class of transformers computes, so its outputs would be wrong. "
                "Import the variant without '-opt-' in its name"
            )
        return kind is not None and super().recognizes(checkpoint)
