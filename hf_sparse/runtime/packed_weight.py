"""The packed form of one weight, or of several concatenated along their output rows, for any kernel of the registry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.codecs.base import pack_bits, unpack_bits
from ..kernels import KERNELS

EXACT = "cpu"
"""Kernel in whose layout the exact weight is kept, beside the operands of a kernel that rounds."""


class RoundingErrors(NamedTuple):
    """What rounding changes; 0.01 is 1 %.

    Attributes:
        output: norm of the difference of the matmul, over that of the exact one.
        weight: the same of the weight; 0 where it was on the grid of the kernel.
    """

    output: float
    weight: float


class Packed(NamedTuple):
    """A weight as a kernel reads it; of a kernel that rounds, also the exact weight.

    A tuple: layers make it anew in each call, which a dataclass takes several times as long for.

    Attributes:
        kernel: its name in `hf_sparse.kernels.KERNELS`.
        rows: output rows that share a column.
        operands: tensors that the operators take, in their order.
        negative: bits of the zeros with a minus sign, which layouts do not keep; None without any.
        exact: the exact weight in the layout of the kernel `EXACT`; empty if the operands are exact.
        exact_rows: its block height.
    """

    kernel: str
    rows: int
    out_features: int
    in_features: int
    operands: tuple[Tensor, ...]
    negative: Tensor | None = None
    exact: tuple[Tensor, ...] = ()
    exact_rows: int = 0

    @classmethod
    def of(cls, weight: Tensor, kernel: str, rows: int | None = None) -> Packed:
        """Pack a dense weight.

        Args:
            rows: block height; None = the fastest for this weight.

        Raises:
            BackendError: the kernel cannot take the weight.

        Example:
            >>> weight = torch.tensor([[0.0, -0.0], [2.0, 0.0]])
            >>> torch.signbit(Packed.of(weight, "csr").dense()).tolist()
            [[False, True], [False, False]]
        """
        weight, record = weight.detach(), KERNELS[kernel]
        rows = record.choose_rows(weight) if rows is None else rows
        lost = torch.signbit(weight) & (weight == 0)
        negative = torch.from_numpy(pack_bits(lost.reshape(-1).numpy())) if bool(lost.any()) else None
        operands = record.pack(weight, rows)
        packed = cls(kernel, rows, weight.shape[0], weight.shape[1], operands, negative)
        # A weight that is on the grid of a kernel that rounds loses nothing.
        if record.exact or torch.equal(packed.multiplied(), weight):
            return packed
        exact_rows = KERNELS[EXACT].choose_rows(weight)
        return packed._replace(exact=KERNELS[EXACT].pack(weight, exact_rows), exact_rows=exact_rows)

    def buffers(self) -> dict[str, Tensor | None]:
        """Return all tensors by name, for a module that holds them."""
        operands = zip(operand_names(self.kernel), self.operands, strict=True)
        exact = zip(self.exact_names, self.exact, strict=True)
        return {**dict(operands), "packed_negative": self.negative, **dict(exact)}

    @property
    def exact_names(self) -> tuple[str, ...]:
        """The names of the buffers of the exact weight, where that is kept beside the operands."""
        return tuple(f"exact_{part}" for part in KERNELS[EXACT].layout.parts) if self.exact else ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.buffers().values() if part is not None)

    def multiplied(self) -> Tensor:
        """Return the weight that the kernel multiplies by: rounded, where it rounds."""
        return KERNELS[self.kernel].layout.unpack(self.operands, self.rows, self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """Return the weight, every bit as it was."""
        shape = (self.out_features, self.in_features)
        weight = KERNELS[EXACT].layout.unpack(self.exact, self.exact_rows, *shape) if self.exact else self.multiplied()
        if self.negative is not None:
            bits = unpack_bits(self.negative.numpy(), weight.numel(), "a packed weight")
            weight[torch.from_numpy(bits).view(weight.shape)] = -0.0
        return weight

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`
        """
        return KERNELS[self.kernel].op(x, *self.operands, bias, self.rows, self.out_features, self.in_features)

    def errors(self, weight: Tensor, seed: int = 0) -> RoundingErrors:
        """Measure what a kernel that rounds changes, on the inputs of 64 tokens that are normally distributed.

        Real inputs have greater outliers.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(64, self.in_features, generator=generator, dtype=torch.float32, device="cpu")
        weight = weight.detach()
        output = _relative(self.multiply(x, None), torch.nn.functional.linear(x, weight))
        return RoundingErrors(output, _relative(self.multiplied(), weight))


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()  # squares of very small weights are zero in float32
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def operand_names(kernel: str) -> tuple[str, ...]:
    """Return the names of the buffers of the operands of a kernel.

    Example:
        >>> operand_names("csr")
        ('packed_values', 'packed_columns', 'packed_pointers')
    """
    return tuple(f"packed_{part}" for part in KERNELS[kernel].layout.parts)
