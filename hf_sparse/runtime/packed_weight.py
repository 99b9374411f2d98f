"""The packed form of one weight, or of several above each other, whatever multiplies by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..formats.codecs.base import pack_bits, unpack_bits
from ..kernels import csr_op as csr

Kernel = str
"""Name of a kernel in `hf_sparse.kernels.KERNELS`."""

INT8_PARTS = ("int8_values", "int8_columns", "int8_pointers", "int8_scales", "int8_offsets")
PARTS = ("values", "columns", "pointers", "negative", *INT8_PARTS)

HEIGHTS = {1: 1.0, 2: 0.77, 4: 0.7, 8: 0.69, 16: 0.69}
"""Output rows that share a column -> time per stored value, relative to that of single values."""

INT8_HEIGHTS = {1: 1.0, 2: 0.68, 4: 0.6}
"""The same of the int8 kernel."""


class Packed(NamedTuple):
    """A weight as a kernel reads it; of "int8", the exact weight packed as for "cpu", and the rounded one beside it.

    A tuple: layers make it anew in each call, which a dataclass takes several times as long for.

    Attributes:
        negative: bits of the zeros with a minus sign, which no kernel stores; None without any.
    """

    kernel: Kernel
    rows: int
    out_features: int
    in_features: int
    values: Tensor
    columns: Tensor
    pointers: Tensor
    negative: Tensor | None
    int8_values: Tensor | None = None
    int8_columns: Tensor | None = None
    int8_pointers: Tensor | None = None
    int8_scales: Tensor | None = None
    int8_offsets: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, kernel: Kernel, rows: int = 1) -> Packed:
        """Pack a dense weight.

        Example:
            >>> weight = torch.tensor([[0.0, -0.0], [2.0, 0.0]])
            >>> torch.signbit(Packed.of(weight, "csr").dense()).tolist()
            [[False, True], [False, False]]
        """
        weight = weight.detach()
        if kernel == "csr":
            parts = csr.pack(weight)
        else:
            made = kernels.pack(weight, rows)
            parts = (made.values, made.columns, made.pointers)
        lost = torch.signbit(weight) & (weight == 0)
        negative = torch.from_numpy(pack_bits(lost.reshape(-1).numpy())) if bool(lost.any()) else None
        rounded = kernels.pack_int8(weight, choose_rows(weight, INT8_HEIGHTS)).parts if kernel == "int8" else ()
        height, width = weight.shape
        return cls(kernel, rows, height, width, *parts, negative, *rounded)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that the operators take, in their order."""
        if self.kernel != "int8":
            return self.values, self.columns, self.pointers
        return tuple(getattr(self, name) for name in INT8_PARTS)

    @property
    def height(self) -> int:
        """Output rows that share a column in what multiplies."""
        return self.rows if self.int8_values is None else self.int8_values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(part.nbytes for name in PARTS if (part := getattr(self, name)) is not None)

    def dense(self) -> Tensor:
        """Return the weight, every bit as it was."""
        parts, shape = (self.values, self.columns, self.pointers), (self.out_features, self.in_features)
        if self.kernel == "csr":
            weight = csr.unpack(*parts, *shape)
        else:
            weight = kernels.unpack(kernels.PackedWeight(*parts, self.rows, *shape))
        if self.negative is not None:
            lost = torch.from_numpy(unpack_bits(self.negative.numpy(), weight.numel(), "a packed weight")).view(
                weight.shape
            )
            weight[lost] = -0.0
        return weight

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`
        """
        parts, shape = self.operands, (self.out_features, self.in_features)
        if self.kernel == "csr":
            out: Tensor = torch.ops.hf_sparse.csr_linear(x, *parts, bias, *shape)
        elif self.kernel == "int8":
            out = torch.ops.hf_sparse.int8_linear(x, *parts, bias, self.height, *shape, "none")
        else:
            out = torch.ops.hf_sparse.sparse_linear(x, *parts, bias, self.rows, *shape, "none")
        return out

    def error(self, weight: Tensor, seed: int = 0) -> float:
        """Return how far products are from those with a dense weight, on normally distributed inputs; 0.01 is 1 %.

        The norm of the difference over that of the product, of 64 tokens. Real inputs have greater outliers.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(64, self.in_features, generator=generator, dtype=torch.float32, device="cpu")
        wanted = torch.nn.functional.linear(x, weight.detach())
        return float((self.multiply(x, None) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def choose_rows(weight: Tensor, heights: Mapping[int, float] = HEIGHTS) -> int:
    """Return how many output rows should share a column: more are faster per value, but store more zeros.

    Example:
        >>> choose_rows(torch.eye(16)), choose_rows(torch.eye(16).repeat_interleave(4, dim=0))
        (1, 4)
    """
    kept = weight.detach() != 0
    costs = {rows: stored(kept, rows) * time for rows, time in heights.items()}
    return min(costs, key=lambda rows: costs[rows])


def stored(kept: Tensor, rows: int) -> int:
    """Return how many values a pack with blocks of this height holds."""
    padded = torch.nn.functional.pad(kept, (0, 0, 0, -kept.shape[0] % rows))
    return int(padded.view(-1, rows, kept.shape[1]).any(dim=1).sum()) * rows
