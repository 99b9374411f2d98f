"""Llama and the decoders with its layout: separate query, key and value with grouped queries, and a gated MLP."""

from __future__ import annotations

from .base import Family, register_family
from .decoder import gated_mlp, grouped_attention

_NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "SmolLM3")

LLAMA = Family(
    "Llama (Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3)",
    attentions=(grouped_attention(_NAMES),),
    feed_forwards=(gated_mlp(_NAMES),),
)

register_family(LLAMA)
