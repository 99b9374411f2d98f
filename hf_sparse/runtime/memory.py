"""The memory that the weights of a model take, in runtime form or not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .lm_head import FewTokenLinear
from .packed_linear import PackedLinear


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, and of what the runtime keeps beside them.

    That is the dense weights of packed layers (`keep_dense`, or for short calls) and the copy of an LM head. Tensors
    that several modules share count once.

    Example:
        >>> bytes_of(nn.Linear(4, 2))
        40
    """
    held = {id(own): own for own in (*model.parameters(), *model.buffers(), *_beside(model))}
    return sum(own.nbytes for own in held.values())


def _beside(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield from module.dense
        elif isinstance(module, FewTokenLinear) and module.few_token_copy is not None:
            yield from module.few_token_copy[1]
