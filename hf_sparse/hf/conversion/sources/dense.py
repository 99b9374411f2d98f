"""Plain dense tensors, with or without zeros, of any program: oBERT, Prune-OFA, Wanda, SparseGPT, and all others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ..checkpoint import Checkpoint
from ..source import PendingTensor, Source, register_source


@register_source
class Dense(Source):
    """The zeros of each weight decide whether it is sparse."""

    name = "dense"
    rank = 100

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        return True

    def tensors(self) -> Iterator[PendingTensor]:
        tied = self.checkpoint.dropped_ties()
        for key in self.checkpoint.headers:
            if key not in tied:
                yield PendingTensor(key, partial(self.read, key), None)

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self.checkpoint.get(key)
