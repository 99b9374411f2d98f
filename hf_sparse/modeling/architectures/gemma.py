"""Gemma 1, 2 and 3 (text): as Llama, with layers that see a sliding window between those that see everything."""

from __future__ import annotations

from .base import Family, register_family
from .decoder import gated_mlp, grouped_attention

_NAMES = ("Gemma", "Gemma2", "Gemma3")

GEMMA = Family(
    "Gemma (1, 2, 3)",
    attentions=(grouped_attention(_NAMES),),
    feed_forwards=(gated_mlp(_NAMES),),
)

register_family(GEMMA)
