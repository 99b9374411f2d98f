"""Layer forms: layers that hold something else than a dense matrix. A new form is one file here and one line below."""

from .base import FORMS, Form, form_of, put_layer, register_form, replace_layer, size_of
from .embedding_scale import embedding_scale
from .hashed import HashedEmbedding, HashedLinear, hashed_like, plain_weight
from .low_rank import LowRankEmbedding, LowRankLinear, LowRankPart, add_low_rank, is_low_rank, low_rank_like

__all__ = [
    "FORMS",
    "Form",
    "HashedEmbedding",
    "HashedLinear",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankPart",
    "add_low_rank",
    "embedding_scale",
    "form_of",
    "hashed_like",
    "is_low_rank",
    "low_rank_like",
    "plain_weight",
    "put_layer",
    "register_form",
    "replace_layer",
    "size_of",
]
