"""Scorers: how important a weight is. A new scorer is one file here and one line below."""

from .base import GradientScorer, LearnedScorer, Scorer
from .dynamic import SET, DynamicScorer, RigL
from .gradient import Gradient, Taylor
from .head_importance import HeadImportance
from .magnitude import Magnitude
from .movement import Movement, SoftMovement
from .random import Random

__all__ = [
    "SET", "DynamicScorer", "Gradient", "GradientScorer", "HeadImportance", "LearnedScorer", "Magnitude", "Movement",
    "Random", "RigL", "Scorer", "SoftMovement", "Taylor",
]  # fmt: skip
