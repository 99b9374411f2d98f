"""A safetensors file whose tensors can be used where it is mapped: each begins at a multiple of 64 bytes.

torch allocates at such addresses. A matrix product may round otherwise at another one, and vectors that lie across two
cache lines are loaded more slowly. safetensors allows no gaps between tensors, so zeros fill them, as tensors too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..utils.atomic_io import PathLike
from .codecs.base import DTYPE_NAMES, as_bytes

ALIGNMENT = 64
"""Bytes."""

FILLER = "hf_sparse.filler."
"""Beginning of the names of zeros between tensors."""


def with_fillers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the order in which they are written, with zeros between them.

    Example:
        >>> {name: tensor.nbytes for name, tensor in with_fillers({"a": torch.ones(3), "b": torch.ones(16)}).items()}
        {'a': 12, 'hf_sparse.filler.0': 52, 'b': 64}
    """
    filled: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        filled[name] = tensor
        if gap := -tensor.nbytes % ALIGNMENT:
            filled[f"{FILLER}{number}"] = torch.zeros(gap, dtype=torch.uint8)
    return filled


def write_aligned(tensors: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str]) -> None:
    """Write a file, one tensor after the other.

    Args:
        tensors: as `with_fillers` returns them.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(as_bytes(tensor).data)
        file.flush()
        os.fsync(file.fileno())
