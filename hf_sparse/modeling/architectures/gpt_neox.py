"""GPT-NeoX (Pythia): one projection with query, key and value of each head side by side."""

from __future__ import annotations

from torch import nn

from .base import Attention, Family, FeedForward, Heads, register_family
from .decoder import remove_all
from .fusion import FeedForwardFusion


def _resize(core: nn.Module, heads: Heads) -> None:
    if not heads.kept:
        remove_all(core, "dense")


_QKV = "query_key_value"

GPT_NEOX = Family(
    "GPT-NeoX",
    attentions=(
        Attention(
            classes=frozenset({"GPTNeoXAttention"}),
            inputs=(_QKV, _QKV, _QKV),
            output="dense",
            head_size="head_size",
            resize=_resize,
            heads_alike=True,
            layout="interleaved",
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"GPTNeoXMLP"}),
            inputs=("dense_h_to_4h",),
            output="dense_4h_to_h",
            activation="act",
            fusion=FeedForwardFusion(method="forward"),
            key="intermediate_size",
        ),
    ),
)

register_family(GPT_NEOX)
