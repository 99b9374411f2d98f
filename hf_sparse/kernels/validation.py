"""Checks of the arguments of the sparse operators. All of them run at each call, so they read shapes and no element."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import BackendError
from .types import ACTIVATIONS, Norm


def scale_of(scale: float | None, inner: int, heads: int) -> float:
    """Return the factor of the attention scores: 1 / sqrt(head size) by default."""
    return max(inner // max(heads, 1), 1) ** -0.5 if scale is None else scale


def needs_derivative(*arguments: object) -> bool:
    """Return whether autograd needs a derivative of any tensor here, in backward or in forward mode.

    Example:
        >>> needs_derivative(torch.ones(1)), needs_derivative(None, torch.ones(1, requires_grad=True))
        (False, True)
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # Forward mode (torch.func.jvp as well) has no flag on the tensor: a tangent belongs to a level.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def check_no_derivative(arguments: Iterable[object]) -> None:
    """Refuse inputs that need a derivative: one that is silently missing trains a wrong model.

    Raises:
        BackendError: a tensor requires a gradient, or has a tangent of forward-mode autograd.
    """
    if needs_derivative(*arguments):
        raise BackendError(
            "the sparse operators have no backward (nor forward-mode derivative), and their input, bias, norm or mask "
            "needs one: call the model under torch.inference_mode() or torch.no_grad(), or restore it with "
            "hf_sparse.to_dense_runtime to train it"
        )


def check_input(x: Tensor, activation: str, in_features: int) -> None:
    """Refuse an input or an activation that no sparse operator takes."""
    if activation not in ACTIVATIONS:
        raise BackendError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != in_features:
        raise BackendError(
            f"`x` must be floating point of shape (..., {in_features}) for a weight with {in_features} inputs, got "
            f"{tuple(x.shape)} in {x.dtype}"
        )


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """Refuse a bias of another shape or type."""
    if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
        raise BackendError(
            f"`bias` must be floating point of shape ({out_features},), got {tuple(bias.shape)} in {bias.dtype}"
        )


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse a layer norm of another size, type or device than the features of x."""
    for part in (norm.weight, norm.bias):
        if part is not None and (part.shape != x.shape[-1:] or part.dtype != x.dtype or part.device != x.device):
            raise BackendError(
                f"the layer norm must have shape ({x.shape[-1]},) in {x.dtype} on {x.device}, got {tuple(part.shape)} "
                f"in {part.dtype} on {part.device}"
            )


def check_heads(x: Tensor, outputs: int, mask: Tensor | None, heads: int) -> None:
    """Refuse heads and masks that do not fit the input of an attention or its query, key and value."""
    if x.dim() != 3:
        raise BackendError(f"`x` of an attention must have shape (batch, length, in), got {tuple(x.shape)}")
    if heads < 1 or outputs % (3 * heads):
        raise BackendError(
            f"`heads` must divide the query, key and value of {outputs} outputs together, got {heads} heads"
        )
    if mask is None:
        return
    batch, length = x.shape[:2]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits = fits and mask.shape[2] in (1, length) and mask.shape[3] == length
    if not fits or not (mask.dtype == torch.bool or mask.dtype == x.dtype):
        raise BackendError(
            f"a mask of shape {tuple(mask.shape)} in {mask.dtype} does not fit an input of shape {tuple(x.shape)}: it "
            f"must be (1 or batch, 1, 1 or length, length), in bool or {x.dtype}"
        )


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask that is added to the scores.

    Shapes: (1 or batch, 1, 1 or length, length) -> (1 or batch, length, length)
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return mask[:, 0].expand(-1, x.shape[1], -1)
