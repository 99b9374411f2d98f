"""`nn.Linear`, and layers that store the same matrix the other way round (`Conv1D` of GPT-2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import LayerKind, register_layer_kind
from .view import MatrixView


class Linear(LayerKind):
    """A weight `(out, in)`."""

    is_linear = True

    def shape(self, module: Any, attribute: str) -> tuple[int, ...]:
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        return super().shape(module, attribute)  # an embedding

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        return MatrixView(self.shape(module, attribute))

    def resize(self, module: Any, outputs: int, inputs: int) -> None:
        module.out_features, module.in_features = outputs, inputs


class TransposedLinear(LayerKind):
    """A weight `(in, out)`; the module counts its outputs as `nf` and its inputs as `nx`."""

    is_linear = True

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        return MatrixView(self.shape(module, attribute), (1, 0))

    def resize(self, module: Any, outputs: int, inputs: int) -> None:
        module.nf, module.nx = outputs, inputs
        if not inputs:
            swap_class(module, NoInputs)


class NoInputs(Swapped):
    """A `Conv1D` without inputs, which its plain class cannot compute."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the bias for each position."""
        return torch.zeros((*x.shape[:-1], self.nf), dtype=x.dtype, device=x.device) + self.bias


register_layer_kind(Linear(), nn.Linear)
