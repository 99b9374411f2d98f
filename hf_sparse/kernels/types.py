"""What the operators of sparse layers take: weights, layer norms, activations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
"""In the order of `Activation` in csrc/kernels.h."""


class Weight(NamedTuple):
    """A sparse fp32 weight with its bias, as the operators pass it on; see `fp32_layout.PackedWeight`.

    Shapes:
        values: (blocks, rows). columns: (blocks,). pointers: (chunks, groups + 1). bias: (out_features,).
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor | None
    rows: int
    out_features: int
    in_features: int


class Int8Weight(NamedTuple):
    """A sparse int8 weight with its bias, as the operators pass it on; see `int8_layout.PackedInt8`.

    Shapes:
        values: (quads, rows, 4). columns: (quads, 4). pointers: (groups + 1,). scales, offsets, bias: (out_features,).
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor
    scales: Tensor
    offsets: Tensor
    bias: Tensor | None
    rows: int
    out_features: int
    in_features: int


class Norm(NamedTuple):
    """The layer norm after a sub-block of BERT.

    Shapes:
        weight, bias: (features,).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float


AnyWeight = Weight | Int8Weight
