"""Origins of checkpoints. A new one is one file here and one line below."""

from .block_pruning import BlockPruning
from .cofi import CoFi
from .cofi_masks import CoFiMasks
from .compressed_tensors import CompressedTensors
from .dense import Dense
from .packed import Packed
from .pruned_heads import PrunedHeads
from .quantized import Quantized
from .torch_prune import TorchPrune

__all__ = [
    "BlockPruning", "CoFi", "CoFiMasks", "CompressedTensors", "Dense", "Packed", "PrunedHeads", "Quantized",
    "TorchPrune",
]  # fmt: skip
