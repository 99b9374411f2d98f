"""The product with torch's CSR matrix, for machines where the own kernels are missing.

`F.linear` with a CSR weight is slower than dense at any sparsity; the matrix times a few columns at a time is not, from
about 85 % zeros on.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .validation import as_given

_TOKENS = 32


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, columns and row pointers of a weight, with 32-bit indices.

    Example:
        >>> [part.tolist() for part in pack(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))]
        [[2.0], [1], [0, 1, 1]]
    """
    with warnings.catch_warnings():  # torch calls its CSR tensors beta, once a process
        warnings.simplefilter("ignore", UserWarning)
        matrix = weight.detach().to_sparse_csr()
    return matrix.values(), matrix.col_indices().to(torch.int32), matrix.crow_indices().to(torch.int32)


def unpack(values: Tensor, columns: Tensor, pointers: Tensor, height: int, width: int) -> Tensor:
    """Return the dense weight."""
    return _matrix(values, columns, pointers, height, width).to_dense()


def _matrix(values: Tensor, columns: Tensor, pointers: Tensor, height: int, width: int) -> Tensor:
    return torch.sparse_csr_tensor(pointers, columns, values, (height, width), check_invariants=False)


@torch.library.custom_op("hf_sparse::csr_linear", mutates_args=())
def csr_linear(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    """Return `x W^T + b` for a weight in CSR.

    Shapes: `(..., width)` -> `(..., height)`
    """
    return as_given(_product)(x, values, columns, pointers, bias, height, width)


def _product(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    matrix = _matrix(values, columns, pointers, height, width)
    tokens = x.reshape(-1, width)
    out = x.new_empty((len(tokens), height))
    for first in range(0, len(tokens), _TOKENS):
        out[first : first + _TOKENS] = (matrix @ tokens[first : first + _TOKENS].t()).t()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], height)


@csr_linear.register_fake
def _(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], height))
