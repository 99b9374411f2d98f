"""The second stage of Lagunas et al.: after structured pruning, what is left of the model trains dense again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from ..errors import SparsityError
from ..modeling.layer_kinds import Slot
from ..modeling.model_state import check_model, sparse_weights, unmark_sparse_weights
from ..modeling.zero_preservation import free_zeros

M = TypeVar("M", bound=nn.Module)


def fill(model: M) -> M:
    """Let the zeros that are left in a pruned model train again, in place, and return it.

    After `compact`, zeros inside the heads and neurons that are left cost as much time as any other weight, so the
    model may as well use them. It saves and loads as before; it just has no weights any more that are meant to be
    sparse.

    Args:
        model: pruned or loaded, compacted or not; without masks.

    Raises:
        SparsityError: if nothing in it is held at zero, or there are masks on it.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.5))
        >>> model = fill(model)
        >>> model(torch.ones(4)).backward()
        >>> model[0].weight.grad.tolist()
        [[1.0, 1.0, 1.0, 1.0]]

    Source: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 4.3 ("hybrid filled").
    """
    check_model(model)
    names = sparse_weights(model)
    if not names:
        raise SparsityError("the model holds no weights at zero, so there is nothing to fill; prune it first")
    slots = [Slot.of(model, name) for name in names]
    if any("parametrizations" in slot.module._modules for slot in slots):
        raise SparsityError("there are masks on the model. End the pruning first: Pruner.bake()")
    free_zeros(slots)
    unmark_sparse_weights(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config.intent = None  # the request does not hold any more
    return model
