"""Layer forms: layers that hold something else than a dense matrix. A new form is one file here and one line below."""

from .base import FORMS, Form, put_layer, register_form, size_of
from .hashed import HashedEmbedding, HashedLinear, hashed_like, plain_weight
from .low_rank import LowRankLinear, LowRankPart, add_low_rank, is_low_rank, low_rank_like

__all__ = [
    "FORMS",
    "Form",
    "HashedEmbedding",
    "HashedLinear",
    "LowRankLinear",
    "LowRankPart",
    "add_low_rank",
    "hashed_like",
    "is_low_rank",
    "low_rank_like",
    "plain_weight",
    "put_layer",
    "register_form",
    "size_of",
]
