"""torch.nn.utils.prune without `prune.remove`: `weight_orig` and `weight_mask` instead of `weight`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ....errors import CheckpointError
from ..checkpoint import Checkpoint
from ..source import PendingTensor, register_source
from .dense import Dense

_ORIG, _MASK = "_orig", "_mask"


@register_source
class TorchPrune(Dense):
    """Masked weights are computed; the matrices among them are the targets."""

    name = "torch.nn.utils.prune"
    rank = 25

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        return bool(_masked(checkpoint))

    def tensors(self) -> Iterator[PendingTensor]:
        masked = _masked(self.checkpoint)
        parts = {name + suffix for name in masked for suffix in (_ORIG, _MASK)}
        for name in masked:
            matrix = len(self.checkpoint.headers[name + _ORIG].shape) > 1
            yield PendingTensor(name, partial(self._product, name), packed=matrix, target=matrix)
        for tensor in super().tensors():
            if tensor.key not in parts:
                yield tensor

    def _product(self, name: str) -> Tensor:
        weight, mask = self.checkpoint.get(name + _ORIG), self.checkpoint.get(name + _MASK)
        if weight.shape != mask.shape:
            raise CheckpointError(f"'{name}{_MASK}' is of shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(f"'{name}{_MASK}' must hold 0 and 1 only")
        # Not by multiplication, as torch does it: that leaves -0.0, which is not a zero of a file.
        return torch.where(mask != 0, weight, torch.zeros((), dtype=weight.dtype))


def _masked(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the parameters that have a mask."""
    names = [key.removesuffix(_ORIG) for key in checkpoint.headers if key.endswith(_ORIG)]
    return [name for name in names if name + _MASK in checkpoint.headers and name not in checkpoint.headers]
