"""Origins of checkpoints, in the order in which they are tried. A new one is one file here and one line below."""

from .packed import Packed  # isort: skip
from .quantized import Quantized  # isort: skip
from .compressed_tensors import CompressedTensors  # isort: skip
from .torch_prune import TorchPrune  # isort: skip
from .block_pruning import BlockPruning  # isort: skip
from .pruned_heads import PrunedHeads  # isort: skip
from .cofi import CoFi  # isort: skip
from .dense import Dense  # isort: skip

__all__ = [
    "BlockPruning",
    "CoFi",
    "CompressedTensors",
    "Dense",
    "Packed",
    "PrunedHeads",
    "Quantized",
    "TorchPrune",
]
