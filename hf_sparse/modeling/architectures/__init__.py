"""Architectures: which weights of a model family form a head or a neuron. A new family is one file and one import."""

from . import (  # noqa: F401  each registers its family
    bert,
    convolutional,
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
    vit,
)
from .base import FAMILIES, Attention, Family, FeedForward, HeadKeys, Heads, Kind, SubBlock, register_family
from .experts import ExpertBlock, Experts
from .filters import FilterBlock, Filters
from .fusion import AttentionFusion, FeedForwardFusion, ResidualNorm
from .matching import find_blocks, find_sub_blocks, known_experts, known_filters, known_sub_blocks, match_sub_blocks
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
    "FilterBlock",
    "Filters",
    "HeadKeys",
    "Heads",
    "Kind",
    "Part",
    "ResidualNorm",
    "SubBlock",
    "find_blocks",
    "find_sub_blocks",
    "known_experts",
    "known_filters",
    "known_sub_blocks",
    "match_sub_blocks",
    "register_family",
]
