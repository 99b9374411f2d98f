"""Selections: how many groups are kept, and among which they compete. A new one is one file here and one line below."""

from .base import Selection, kept_count
from .budget import Budget
from .global_topk import Global
from .multiples import in_multiples
from .owl import Owl
from .per_row import PerRow
from .threshold import Threshold
from .topk import keep_highest
from .uniform import Uniform
from .within_inputs import WithinInputs

__all__ = [
    "Budget",
    "Global",
    "Owl",
    "PerRow",
    "Selection",
    "Threshold",
    "Uniform",
    "WithinInputs",
    "in_multiples",
    "keep_highest",
    "kept_count",
]
