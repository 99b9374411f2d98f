"""What a user asks for: sparsity, groups of weights, distillation. What a file contains is in `formats.manifest`."""

from .distillation import DistillationConfig
from .sparsity import PATTERNS, SCHEDULES, SCORERS, SELECTIONS, GroupConfig, SparsityConfig

__all__ = ["PATTERNS", "SCHEDULES", "SCORERS", "SELECTIONS", "DistillationConfig", "GroupConfig", "SparsityConfig"]
