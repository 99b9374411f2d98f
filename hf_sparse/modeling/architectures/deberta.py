"""DeBERTa-v3: as BERT, with relative positions that pass through the projections of query and key.

DeBERTa-v2 has projections of its own for positions (`share_att_key` is false); its attentions are left alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, Family, FeedForward, Heads, register_family


class Headless(Swapped):
    """A self-attention module, without its output layer, all of whose heads are pruned."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zero features; the output layer adds its bias to nothing."""
        return hidden_states[..., :0], None


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    module.num_attention_heads = len(heads.kept)
    module.all_head_size = len(heads.kept) * module.attention_head_size
    if not heads.kept:
        swap_class(core, Headless)


DEBERTA = Family(
    "DeBERTa-v3",
    attentions=(
        Attention(
            classes=frozenset({"DebertaV2Attention"}),
            inputs=("self.query_proj", "self.key_proj", "self.value_proj"),
            output="output.dense",
            core="self",
            head_size="attention_head_size",
            resize=_resize,
            heads_alike=True,
            absent=("pos_key_proj", "pos_query_proj"),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"DebertaV2Layer"}),
            inputs=("intermediate.dense",),
            output="output.dense",
            activation="intermediate.intermediate_act_fn",
            name="intermediate",
        ),
    ),
)

register_family(DEBERTA)
