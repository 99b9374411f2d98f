"""Mixtral and the mixtures of experts of Qwen: 3-D parameters with all experts, and a router with a row for each."""

from __future__ import annotations

from .base import Family, register_family
from .decoder import gated_mlp, grouped_attention
from .experts import Experts

_QWEN = ("Qwen2Moe", "Qwen3Moe")

MOE = Family(
    "MoE (Mixtral, Qwen2-MoE, Qwen3-MoE)",
    attentions=(grouped_attention(("Mixtral", *_QWEN)),),
    # The feed-forward parts of layers without experts, and the expert that all tokens share. Neither is as wide as the
    # other, so the config cannot express how many neurons are left.
    feed_forwards=(gated_mlp(_QWEN, key=None),),
    experts=(
        Experts(classes=frozenset({"MixtralSparseMoeBlock"}), key="num_local_experts"),
        Experts(classes=frozenset(f"{name}SparseMoeBlock" for name in _QWEN), key="num_experts"),
    ),
)

register_family(MOE)
