"""What the operators of sparse layers take: weights, layer norms, activations."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
"""In the order of `Activation` in csrc/kernels.h."""


class Packed:
    """Base of packed weights: tensors, and the operators that multiply by them.

    Attributes:
        operators: prefix of their names ("sparse" of `sparse_linear`).
    """

    operators: ClassVar[str]
    rows: int
    out_features: int
    in_features: int

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All its tensors, in the order of the operators."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.nbytes for part in self.parts)


class LinearWeight(Protocol):
    """A packed weight as the operators pass it on: a NamedTuple of tensors, the bias last, and integers.

    Attributes:
        in_features: None where the integers do not state it.
    """

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int | None: ...


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
