"""What the operators of sparse layers take: weights, norms, activations."""

from __future__ import annotations

from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
"""In the order of `Activation` in csrc/kernels.h."""

Weight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, int]
"""values, columns, pointers, bias, rows, out_features, in_features."""

Norm = tuple[Tensor, Tensor | None, float]
"""weight, bias, epsilon of a layer norm."""
