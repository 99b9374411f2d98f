"""Sparse matmuls for inference as torch operators: C++ on the CPU where the library is built, plain torch elsewhere.

Example:
    >>> import torch
    >>> from hf_sparse.kernels import pack, unpack
    >>> weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    >>> packed = pack(weight)
    >>> torch.equal(unpack(packed), weight)
    True
    >>> from hf_sparse.kernels.fp32_ops import linear
    >>> linear(torch.tensor([[1.0, 1.0, 1.0]]), packed)
    tensor([[3., 3.]])
"""

from __future__ import annotations

from . import csr_op as csr  # registers the operators
from . import dense_gemv as dense  # registers the operators
from . import fp32_ops as ops  # registers the operators
from . import int8_ops as int8  # registers the operators
from .fp32_layout import PackedWeight, pack, unpack
from .int8_layout import PackedInt8, pack_int8, unpack_int8
from .library import LibraryStatus, library_status

int8_blocks = int8
"""The name of before: one table makes the operators of whole sub-blocks with all others."""

__all__ = [
    "LibraryStatus",
    "PackedInt8",
    "PackedWeight",
    "csr",
    "dense",
    "int8",
    "int8_blocks",
    "library_status",
    "ops",
    "pack",
    "pack_int8",
    "unpack",
    "unpack_int8",
]
