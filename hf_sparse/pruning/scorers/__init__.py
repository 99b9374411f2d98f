"""Scorers: how important a weight is. A new scorer is one file here and one line below."""

from .base import Scorer
from .dynamic import SET, RigL
from .gradient import Gradient, Taylor
from .head_importance import HeadImportance
from .magnitude import Magnitude
from .movement import Movement, SoftMovement
from .random import Random

__all__ = [
    "SET", "Gradient", "HeadImportance", "Magnitude", "Movement", "Random", "RigL", "Scorer", "SoftMovement", "Taylor",
]  # fmt: skip
