"""Sparse matmuls for inference as torch operators: C++ on the CPU where the library is built, plain torch elsewhere.

Example:
    >>> import torch
    >>> from hf_sparse.kernels import pack, unpack
    >>> weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    >>> packed = pack(weight)
    >>> torch.equal(unpack(packed), weight)
    True
    >>> from hf_sparse.kernels.functional import linear
    >>> linear(torch.tensor([[1.0, 1.0, 1.0]]), packed)
    tensor([[3., 3.]])
"""

from __future__ import annotations

# Each of these modules registers a kernel and its operators, the preferred one first.
from . import fp32_ops as ops  # isort: skip
from . import int8_ops as int8  # isort: skip
from . import csr_op as csr  # isort: skip
from . import bitmask, bitmask_int8, bitmask_int4  # isort: skip
from . import dense_gemv as dense  # isort: skip
from .gpu import block_sparse, semi_structured  # isort: skip
from .fp32_layout import PackedWeight, pack, unpack
from .int8_layout import PackedInt8, pack_int8, unpack_int8
from .library import LibraryStatus, library_status
from .registry import KERNELS, Kernel, Layout, register

int8_blocks = int8
"""The name of before: one table makes the operators of whole sub-blocks with all others."""

__all__ = [
    "KERNELS",
    "Kernel",
    "Layout",
    "LibraryStatus",
    "PackedInt8",
    "PackedWeight",
    "bitmask",
    "bitmask_int4",
    "bitmask_int8",
    "block_sparse",
    "csr",
    "dense",
    "int8",
    "int8_blocks",
    "library_status",
    "ops",
    "pack",
    "pack_int8",
    "register",
    "semi_structured",
    "unpack",
    "unpack_int8",
]
