"""What the operators of sparse products refuse, and what their arguments are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ..errors import BackendError
from .fp32_layout import check_layout
from .types import ACTIVATIONS, Norm, Weight

SHORTEST = 16
"""Tokens from which the own attention and layer norm are used: they work on tiles of as many, one for each thread."""


NORM = "Tensor norm_weight, Tensor? norm_bias, float norm_eps"
"""The same in the schema of an operator."""


def scale_of(scale: float | None, inner: int, heads: int) -> float:
    """Give what scores are multiplied by: one over the root of the size of a head, if nothing else is asked for."""
    return max(inner // max(heads, 1), 1) ** -0.5 if scale is None else scale


def as_given(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let an operator compute in the types that it is given, whatever torch.autocast says around it.

    Autocast reaches into the plain torch inside: an attention would come out in bfloat16, for a kernel that reads fp32.
    """

    @wraps(run)
    def alone(x: Tensor, *arguments: object) -> Tensor:
        if x.is_cpu and not torch.is_autocast_enabled("cpu"):  # nearly always, and at each call
            return run(x, *arguments)
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return run(x, *arguments)
        with torch.autocast(kind, enabled=False):
            return run(x, *arguments)

    return alone


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Say whether autograd would want a gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_gradients(*tensors: Tensor | None) -> None:
    """Refuse what needs a gradient: one that is silently missing trains a wrong model."""
    if needs_gradient(*tensors):
        raise BackendError(
            "the sparse products have no backward, and their input, bias, norm or mask needs a gradient: call the "
            "model under torch.inference_mode() or torch.no_grad(), or bring it back with hf_sparse.to_dense_runtime "
            "to train it"
        )


def check_input(x: Tensor, activation: str, in_features: int) -> None:
    """Refuse what no sparse product takes, whatever its weights are in."""
    check_gradients(x)
    if activation not in ACTIVATIONS:
        raise BackendError(f"unknown activation {activation!r}; the sparse products know {', '.join(ACTIVATIONS)}")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != in_features:
        raise BackendError(
            f"a sparse product of {in_features} inputs was called with {tuple(x.shape)} in {x.dtype}; "
            "the last dimension has to be the inputs, in floating point"
        )


def check(x: Tensor, activation: str, *weights: Weight) -> None:
    """Refuse an input, an activation and weights that one operator cannot take together."""
    check_input(x, activation, weights[0][6])
    check_weights(*weights)


def check_weights(*weights: Weight) -> None:
    """Refuse packed weights and biases that do not fit together."""
    for values, columns, pointers, bias, rows, out_features, in_features in weights:
        check_layout(values, columns, pointers, rows, out_features, in_features, "the weight of a sparse product")
        check_gradients(values, bias)
        if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
            raise BackendError(f"a bias {tuple(bias.shape)} in {bias.dtype} for {out_features} outputs")


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse a layer norm that is none of the features of x."""
    check_gradients(*norm[:2])
    for part in norm[:2]:
        if part is not None and (part.shape != x.shape[-1:] or part.dtype != x.dtype or part.device != x.device):
            raise BackendError(
                f"a layer norm {tuple(part.shape)} in {part.dtype} on {part.device} for {x.shape[-1]} features in "
                f"{x.dtype} on {x.device}"
            )


def check_attention(x: Tensor, weight: Weight, mask: Tensor | None, heads: int) -> None:
    """Refuse an input, a weight of queries, keys and values, and heads that do not fit together."""
    check(x, "none", weight)
    check_heads(x, weight[5], mask, heads)


def check_heads(x: Tensor, outputs: int, mask: Tensor | None, heads: int) -> None:
    """Refuse heads and masks that do not fit an input of attention or its queries, keys and values."""
    if x.dim() != 3:
        raise BackendError(f"sparse attention takes x of shape (batch, length, in), not {tuple(x.shape)}")
    if heads < 1 or outputs % (3 * heads):
        raise BackendError(f"{outputs} outputs are no queries, keys and values of {heads} heads")
    if mask is None:
        return
    check_gradients(mask)
    batch, length = x.shape[:2]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits = fits and mask.shape[2] in (1, length) and mask.shape[3] == length
    if not fits or not (mask.dtype == torch.bool or mask.dtype == x.dtype):
        raise BackendError(
            f"a mask of shape {tuple(mask.shape)} in {mask.dtype} for an input of shape {tuple(x.shape)}: it has to be "
            f"(1 or batch, 1, 1 or length, length), in bool or {x.dtype}"
        )


def added(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Make a mask one that is added to the scores.

    Shapes: (1 or batch, 1, 1 or length, length) -> (1 or batch, length, length)
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return mask[:, 0].expand(-1, x.shape[1], -1)
