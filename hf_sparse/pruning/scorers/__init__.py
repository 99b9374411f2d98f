"""Scorers: how important a weight is. A new scorer is one file here and one line below."""

from .base import GradientScorer, LearnedScorer, Scorer
from .dynamic import SET, DynamicScorer, RigL
from .effective_resistance import EffectiveResistance
from .gradient import Gradient, Taylor
from .head_importance import HeadImportance
from .inputs import Choice, InputScorer
from .magnitude import Magnitude
from .movement import Movement, SoftMovement
from .random import Random
from .sparsegpt import SparseGPT
from .wanda import Wanda

__all__ = [
    "SET", "Choice", "DynamicScorer", "EffectiveResistance", "Gradient", "GradientScorer", "HeadImportance",
    "InputScorer", "LearnedScorer", "Magnitude", "Movement", "Random", "RigL", "Scorer",
    "SoftMovement", "SparseGPT", "Taylor", "Wanda",
]  # fmt: skip
