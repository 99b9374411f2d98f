"""Architectures: which weights of a model family form a head or a neuron. A new family is one file and one import."""

from . import (  # noqa: F401  each registers its family
    bert,
    deberta,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    modernbert,
    moe,
    mpnet,
    opt,
    phi3,
    t5,
)
from .base import FAMILIES, Attention, Family, FeedForward, HeadKeys, Heads, Kind, SubBlock, register_family
from .experts import ExpertBlock, Experts
from .fusion import AttentionFusion, FeedForwardFusion, ResidualNorm
from .matching import find_sub_blocks, known_experts, known_sub_blocks, match_sub_blocks
from .parts import Part

__all__ = [
    "FAMILIES",
    "Attention",
    "AttentionFusion",
    "ExpertBlock",
    "Experts",
    "Family",
    "FeedForward",
    "FeedForwardFusion",
    "HeadKeys",
    "Heads",
    "Kind",
    "Part",
    "ResidualNorm",
    "SubBlock",
    "find_sub_blocks",
    "known_experts",
    "known_sub_blocks",
    "match_sub_blocks",
    "register_family",
]
