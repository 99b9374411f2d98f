"""hf_sparse: make Transformers models sparse while they are fine-tuned, save them small, load them anywhere.

Importing the package registers it with transformers, so that `from_pretrained` reads packed checkpoints.
"""

__version__ = "0.1.0"

from . import patterns, schedules, scorers, selection  # noqa: F401  they fill the registries
from .callback import SparsityCallback
from .compaction import compact
from .config import GroupConfig, SparsityConfig
from .errors import BackendError, CheckpointError, PatternError, RecipeError, SparsityError
from .oneshot import sparsify
from .pruner import Pruner
from .quantizer import SparseConfig
from .report import Summary, summarize

__all__ = [
    "BackendError",
    "CheckpointError",
    "GroupConfig",
    "PatternError",
    "Pruner",
    "RecipeError",
    "SparseConfig",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityError",
    "Summary",
    "compact",
    "sparsify",
    "summarize",
]
