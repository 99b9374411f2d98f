"""hf_sparse: make Transformers models sparse while they are fine-tuned, save them small, load them anywhere.

Importing the package registers it with transformers, so that `from_pretrained` reads packed checkpoints.
"""

__version__ = "0.1.0"

from . import adapters, budget, patterns, quantizer, schedules, scorers, selection  # noqa: F401  they register themselves
from .callback import SparsityCallback
from .checkpoint import last_checkpoint
from .compaction import compact
from .config import GroupConfig, SparsityConfig
from .distillation_config import DistillationConfig
from .errors import BackendError, CheckpointError, HubError, PatternError, RecipeError, SparsityError
from .filling import fill
from .oneshot import sparsify
from .pruner import Pruner
from .report import Summary, summarize
from .runtime import to_dense_runtime, to_runtime
from .sparse_config import SparseConfig

__all__ = [
    "BackendError",
    "CheckpointError",
    "DistillationConfig",
    "GroupConfig",
    "HubError",
    "PatternError",
    "Pruner",
    "RecipeError",
    "SparseConfig",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityError",
    "Summary",
    "compact",
    "fill",
    "last_checkpoint",
    "sparsify",
    "summarize",
    "to_dense_runtime",
    "to_runtime",
]
