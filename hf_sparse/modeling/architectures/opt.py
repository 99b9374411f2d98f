"""OPT: separate query, key and value, all with biases; the feed-forward layers are in the block itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Attention, Family, FeedForward, Heads, register_family
from .decoder import remove_all, set_counts


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    set_counts(core, num_heads=len(heads.kept), embed_dim=len(heads.kept) * module.head_dim)
    if not heads.kept:
        remove_all(core, "out_proj")


OPT = Family(
    "OPT",
    attentions=(
        Attention(
            classes=frozenset({"OPTAttention"}),
            inputs=("q_proj", "k_proj", "v_proj"),
            output="out_proj",
            head_size="head_dim",
            resize=_resize,
            heads_alike=True,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"OPTDecoderLayer"}),
            inputs=("fc1",),
            output="fc2",
            activation="activation_fn",
            name="fc1",
            key="ffn_dim",
        ),
    ),
)

register_family(OPT)
