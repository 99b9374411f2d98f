"""Distillation losses by name: what of the outputs is compared. A new one is one file here and one line below."""

from .base import Comparison, Term
from .embedding import EmbeddingCosine, EmbeddingMse, EmbeddingSimilarity
from .layers import Attention, Hidden
from .logits import Logits

__all__ = [
    "Attention",
    "Comparison",
    "EmbeddingCosine",
    "EmbeddingMse",
    "EmbeddingSimilarity",
    "Hidden",
    "Logits",
    "Term",
]
