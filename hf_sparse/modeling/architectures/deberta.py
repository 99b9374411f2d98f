"""DeBERTa-v3: as BERT, with relative positions that pass through the projections of query and key.

DeBERTa-v2 has projections of its own for positions (`share_att_key` is false); its attentions are left alone.
"""

from __future__ import annotations

from .base import Attention, Family, FeedForward, register_family
from .bert import resize

DEBERTA = Family(
    "DeBERTa-v3",
    attentions=(
        Attention(
            classes=frozenset({"DebertaV2Attention"}),
            inputs=("self.query_proj", "self.key_proj", "self.value_proj"),
            output="output.dense",
            core="self",
            head_size="attention_head_size",
            resize=resize,
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
