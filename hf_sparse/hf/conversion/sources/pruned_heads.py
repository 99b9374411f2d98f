"""transformers before 5: `pruned_heads` in config.json, a mapping from layers to heads, and weights without them.

transformers 5 ignores the key and builds all layers at full size. Here the heads become edits of our manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import CheckpointError
from ....formats.structure import Cut, Edits
from ....utils.text import shorten
from ....utils.validation import is_integer
from ..checkpoint import Checkpoint
from ..source import register_source
from ..structure import check_cut, check_shapes, cuts_by_size, is_uneven, self_attentions, sub_blocks
from .dense import Dense

KEY = "pruned_heads"


@register_source
class PrunedHeads(Dense):
    """Heads that are not in the files."""

    name = "transformers < 5 with pruned heads"
    rank = 40

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        return bool(_stated(checkpoint.config))

    def edits(self) -> Edits:
        blocks = self_attentions(self.checkpoint)
        heads: dict[str, Cut] = {}
        for layer, gone in _stated(self.checkpoint.config).items():
            if layer not in blocks:
                raise CheckpointError(
                    f"`{KEY}` of config.json must name layers from 0 to {len(blocks) - 1}, got layer {layer}"
                )
            block = blocks[layer]
            if any(head >= block.groups for head in gone):
                raise CheckpointError(f"`{KEY}` names head {max(gone)} of layer {layer}, which has {block.groups}")
            heads[block.name] = Cut.of(block.groups, sorted(set(range(block.groups)) - gone))
            check_cut(self.checkpoint, block, heads[block.name])
        # Neurons that were removed are not in the config of transformers 4; their number is in the shapes.
        neurons = [block for block in sub_blocks(self.checkpoint) if block.kind == "feed_forward"]
        uneven = [block for block in neurons if is_uneven(self.checkpoint, block)]
        edits = Edits(heads=heads, neurons=cuts_by_size(self.checkpoint, uneven))
        check_shapes(self.checkpoint, edits)
        return edits

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in super().config().items() if key != KEY}


def _stated(config: Mapping[str, Any]) -> dict[int, set[int]]:
    """Return the heads that a config names as pruned, by layer; lists can be in any order, and name a head twice."""
    stated = config.get(KEY) or {}
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"`{KEY}` of config.json must be a mapping from layers to heads, got {shorten(stated)}")
    found: dict[int, set[int]] = {}
    for layer, heads in stated.items():
        if not (isinstance(layer, str) and layer.isdecimal() and len(layer) < 8):
            raise CheckpointError(f"`{KEY}` of config.json must have numbers of layers as keys, got {shorten(layer)}")
        listed = isinstance(heads, Sequence) and not isinstance(heads, str)
        if not listed or not all(is_integer(head) and head >= 0 for head in heads):
            raise CheckpointError(f"`{KEY}` of layer {layer} must be a list of numbers of heads, got {shorten(heads)}")
        if heads:
            found.setdefault(int(layer), set()).update(heads)
    return found
