"""hf_sparse: make Transformers models sparse while they are fine-tuned, save them small, load them anywhere.

Importing the package registers it with transformers, so that `from_pretrained` reads packed checkpoints.
"""

from ._moved import install as _install
from ._version import __version__ as __version__
from .config import DistillationConfig, GroupConfig, SparsityConfig
from .errors import BackendError, CheckpointError, ConfigError, HubError, PatternError, RecipeError, SparsityError
from .formats.structure import Edits
from .hf import layer_kinds as _layer_kinds  # registers the layers of transformers that are not nn.Linear
from .hf.conversion.convert import import_checkpoint
from .hf.large.checkpoint import sparsify_checkpoint
from .hf.lora import load_lora, save_lora
from .hf.peft import merged_update  # the module registers itself with PEFT
from .hf.quantization import integration as _integration  # registers itself, and its quantizer with transformers
from .hf.quantization.config import SparseConfig
from .hf.runtime_file import load_runtime, save_runtime
from .hf.trainer.callback import SparsityCallback
from .hf.trainer.checkpoint import last_checkpoint
from .hf.trainer.distillation_callback import DistillationCallback
from .pruning.compaction import compact
from .pruning.depth import drop_layers, layer_importance, prune_layers
from .pruning.experts import drop_experts, expert_saliency, prune_experts
from .pruning.fill import fill
from .pruning.head_importance import head_importance
from .pruning.keep_zeros import keep_zeros
from .pruning.merging import merge_experts
from .pruning.oneshot import sparsify
from .pruning.pruner import Pruner
from .pruning.summary import Summary, summarize
from .runtime import LayerReport, RuntimeReport, to_dense_runtime, to_runtime
from .vocabulary import VocabularyReport, trim_vocabulary

_install()

# The same under other names: those of the field, and those that Hugging Face users expect.
HfSparseConfig = SparseConfig
SparsitySummary = Summary
unfreeze_zeros = fill
prepare_for_inference, restore_dense = to_runtime, to_dense_runtime

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DistillationCallback",
    "DistillationConfig",
    "Edits",
    "GroupConfig",
    "HfSparseConfig",
    "HubError",
    "LayerReport",
    "PatternError",
    "Pruner",
    "RecipeError",
    "RuntimeReport",
    "SparseConfig",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityError",
    "SparsitySummary",
    "Summary",
    "VocabularyReport",
    "compact",
    "drop_experts",
    "drop_layers",
    "expert_saliency",
    "fill",
    "head_importance",
    "import_checkpoint",
    "keep_zeros",
    "last_checkpoint",
    "layer_importance",
    "load_lora",
    "load_runtime",
    "merge_experts",
    "merged_update",
    "prepare_for_inference",
    "prune_experts",
    "prune_layers",
    "restore_dense",
    "save_lora",
    "save_runtime",
    "sparsify",
    "sparsify_checkpoint",
    "summarize",
    "to_dense_runtime",
    "to_runtime",
    "trim_vocabulary",
    "unfreeze_zeros",
]
