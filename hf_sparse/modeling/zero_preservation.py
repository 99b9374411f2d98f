"""Zeros that stay zero: fine-tuning a sparse model must not fill it up again behind its owner's back.

A gradient hook sets the gradient to zero where the weight is zero. Every optimizer that works element by element then
leaves these weights alone (momentum and decay of zero are zero), the forward pass costs nothing, no mask is stored, and
the layers stay plain `nn.Linear`. The hook goes onto the parameter in the first forward pass that trains, so it is also
there in copies of the model (`copy.deepcopy` and `pickle` drop hooks on parameters, but not those on modules).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError

_KEEPS = "hf_sparse_keeps_zeros"
_ARMED = "hf_sparse_armed"


def keep_zeros(layers: Iterable[nn.Module]) -> None:
    """Let the weights of these layers that are zero stay zero in training, until `free_zeros`.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[0.0, 1.0]]))
        >>> keep_zeros([layer])
        >>> layer(torch.ones(2)).backward()
        >>> layer.weight.grad.tolist()
        [[0.0, 1.0]]
    """
    for layer in layers:
        if _KEEPS not in vars(layer):
            layer.register_forward_pre_hook(_arm)
        setattr(layer, _KEEPS, True)


def free_zeros(layers: Iterable[nn.Module]) -> None:
    """Let all weights of these layers train again."""
    for layer in layers:
        if _KEEPS in vars(layer):
            setattr(layer, _KEEPS, False)


def keeps_zeros(layer: nn.Module) -> bool:
    """Return whether the zeros of this layer stay zero."""
    return bool(vars(layer).get(_KEEPS, False))


def is_guard(hook: object) -> bool:
    """Return whether a forward hook is the one that keeps zeros."""
    return hook is _arm


class _Armed:
    """Know which parameter has the hook. Copies and pickles know of none, because theirs has none."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weakref.ref(weight)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _arm(layer: nn.Module, _: Any) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or not getattr(layer, _KEEPS) or not weight.requires_grad:
        return
    if weight.is_meta:
        if layer.training and torch.is_grad_enabled():
            # accelerate brings it in for the forward pass only, as another tensor, whose gradient is thrown away.
            raise RecipeError(
                "a layer whose weight is offloaded cannot train: its gradient would be lost. Load the model onto one "
                "device (without device_map) to train it, or call eval() and torch.no_grad() for inference"
            )
        return
    armed: _Armed | None = getattr(layer, _ARMED, None)
    if armed is not None and armed.weight() is weight:
        return
    owner = weakref.ref(layer)

    def only_kept(gradient: Tensor) -> Tensor:
        present = owner()
        if present is None or not getattr(present, _KEEPS):
            return gradient
        kept: Tensor = present._parameters["weight"]  # type: ignore[assignment]
        return torch.where(kept.detach() != 0, gradient, 0.0)

    weight.register_hook(only_kept)
    setattr(layer, _ARMED, _Armed(weight))
