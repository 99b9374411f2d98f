"""The operator `hf_sparse::csr_linear`: torch's CSR matmul, for machines where the C++ kernels are missing."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .op_table import WeightFormat
from .operators import define_all, without_rows
from .reference import csr_matmul
from .registry import Kernel, Layout, register


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, columns and row pointers of a weight, with 32-bit indices.

    Example:
        >>> [part.tolist() for part in pack(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))]
        [[2.0], [1], [0, 1, 1]]
    """
    with warnings.catch_warnings():  # torch calls its CSR tensors beta, once a process
        warnings.simplefilter("ignore", UserWarning)
        matrix = weight.detach().to_sparse_csr()
    # A copy: torch.export cannot look into a view of a sparse tensor.
    return matrix.values().clone(), matrix.col_indices().to(torch.int32), matrix.crow_indices().to(torch.int32)


def unpack(values: Tensor, columns: Tensor, pointers: Tensor, height: int, width: int) -> Tensor:
    """Return the dense weight."""
    return _matrix(values, columns, pointers, height, width).to_dense()


def _matrix(values: Tensor, columns: Tensor, pointers: Tensor, height: int, width: int) -> Tensor:
    return torch.sparse_csr_tensor(pointers, columns, values, (height, width), check_invariants=False)


class CsrWeight(NamedTuple):
    """A weight with its bias, as the operator passes it on; see `pack`."""

    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor | None
    height: int
    width: int

    @property
    def out_features(self) -> int:
        return self.height

    @property
    def in_features(self) -> int:
        return self.width


def _matmul(x: Tensor, weight: CsrWeight) -> Tensor:
    values, columns, pointers, bias, height, width = weight
    return csr_matmul(x, _matrix(values, columns, pointers, height, width), bias)


csr_linear = define_all(WeightFormat("csr", CsrWeight, _matmul))["linear"]


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return pack(weight)


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, columns, pointers = parts
    return unpack(values, columns, pointers, out_features, in_features)


def _check(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> None:
    values, columns, pointers = parts
    torch.sparse_csr_tensor(pointers, columns, values, (out_features, in_features), check_invariants=True)


register(
    Kernel(
        name="csr",
        layout=Layout(("values", "columns", "pointers"), _pack, _unpack, check=_check),
        op=without_rows(csr_linear),
    )
)
