"""hf_sparse: make Transformers models sparse while they are fine-tuned, save them small, load them anywhere.

Importing the package registers it with transformers, so that `from_pretrained` reads packed checkpoints.
"""

from ._moved import install as _install
from ._version import __version__ as __version__
from .config import DistillationConfig, GroupConfig, SparsityConfig
from .errors import BackendError, CheckpointError, HubError, PatternError, RecipeError, SparsityError
from .hf import peft as _peft  # registers itself with PEFT
from .hf.quantization import quantizer as _quantizer  # registers itself with transformers
from .hf.quantization.config import SparseConfig
from .hf.trainer.callback import SparsityCallback
from .hf.trainer.checkpoint import last_checkpoint
from .pruning.compaction import compact
from .pruning.fill import fill
from .pruning.oneshot import sparsify
from .pruning.pruner import Pruner
from .pruning.summary import Summary, summarize
from .runtime import to_dense_runtime, to_runtime

_install()

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
