"""Origins of checkpoints. A new one is one file here and one line in `SOURCES`."""

from ....errors import CheckpointError
from ..checkpoint import Checkpoint
from ..source import Source
from .block_pruning import BlockPruning
from .cofi import CoFi
from .compressed_tensors import CompressedTensors
from .dense import Dense
from .packed import Packed
from .pruned_heads import PrunedHeads
from .quantized import Quantized
from .torch_prune import TorchPrune

__all__ = ["SOURCES", "source_of"]

SOURCES: tuple[type[Source], ...] = (
    Packed,
    Quantized,
    CompressedTensors,
    TorchPrune,
    BlockPruning,
    CoFi,
    PrunedHeads,
    Dense,
)
"""All origins, in the order in which they are tried; the last takes any checkpoint that is left."""


def source_of(checkpoint: Checkpoint) -> Source:
    """Return the source that recognizes a checkpoint.

    Raises:
        CheckpointError: if it is of an origin that cannot be read.
    """
    for cls in SOURCES:
        if cls.recognizes(checkpoint):
            return cls(checkpoint)
    raise CheckpointError(f"{checkpoint.path} is of no origin that is read here")
