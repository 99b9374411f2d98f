"""The operator `hf_sparse::csr_linear`: torch's CSR matmul, for machines where the C++ kernels are missing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .operators import define
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


def _run(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    return csr_matmul(x, _matrix(values, columns, pointers, height, width), bias)


def _fake(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], height))


csr_linear = define(
    "csr_linear(Tensor x, Tensor values, Tensor columns, Tensor pointers, Tensor? bias, SymInt height, SymInt width) "
    "-> Tensor",
    _run,
    _fake,
)


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return pack(weight)


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, columns, pointers = parts
    return unpack(values, columns, pointers, out_features, in_features)


def _matmul(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    bias: Tensor | None,
    rows: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    out: Tensor = csr_linear(x, values, columns, pointers, bias, out_features, in_features)
    return out


register(Kernel(name="csr", layout=Layout(("values", "columns", "pointers"), _pack, _unpack), op=_matmul))
