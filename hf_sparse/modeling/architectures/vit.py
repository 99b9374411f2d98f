"""ViT and DeiT. The patch embedding is a convolution whose filters are the hidden dimension, so they stay."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Attention, Family, FeedForward, Heads, register_family
from .decoder import remove_all, set_counts

_NAMES = ("ViT", "DeiT")


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    set_counts(module, num_attention_heads=len(heads.kept))
    if not heads.kept:
        remove_all(core, "o_proj")


VIT = Family(
    "ViT (ViT, DeiT)",
    attentions=(
        Attention(
            classes=frozenset(f"{name}Attention" for name in _NAMES),
            inputs=("q_proj", "k_proj", "v_proj"),
            output="o_proj",
            head_size="head_dim",
            resize=_resize,
            heads_alike=True,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset(f"{name}MLP" for name in _NAMES),
            inputs=("fc1",),
            output="fc2",
            activation="activation_fn",
            key="intermediate_size",
        ),
    ),
)

register_family(VIT)
