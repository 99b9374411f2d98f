"""Architectures: which weights of a model family form a head or a neuron. A new family is one file and one import."""

from . import bert, distilbert, t5  # noqa: F401  each registers its family
from .base import FAMILIES, Attention, Family, FeedForward, Kind, SubBlock, register_family
from .fusion import AttentionFusion, FeedForwardFusion, ResidualNorm
from .matching import find_sub_blocks, known_sub_blocks, match_sub_blocks

__all__ = [
    "FAMILIES",
    "Attention",
    "AttentionFusion",
    "Family",
    "FeedForward",
    "FeedForwardFusion",
    "Kind",
    "ResidualNorm",
    "SubBlock",
    "find_sub_blocks",
    "known_sub_blocks",
    "match_sub_blocks",
    "register_family",
]
