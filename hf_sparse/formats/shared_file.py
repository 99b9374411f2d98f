"""One safetensors file written by several processes: the header by one, and by each the tensors that it has.

None needs the tensors of the others, only their types and shapes. The file has the bytes that safetensors itself writes
for all tensors together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.atomic_io import PathLike
from .codecs.base import Part

_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Types in the order of safetensors, which puts the last ones first, so that tensors are aligned."""


class FilePlan(NamedTuple):
    """Where everything goes.

    Attributes:
        header: with its length in front.
        starts: of each tensor, in bytes from the beginning of the file.
        size: of the file.
    """

    header: bytes
    starts: dict[str, int]
    size: int


def plan_file(tensors: Mapping[str, Part], metadata: Mapping[str, str]) -> FilePlan:
    """Plan a file.

    Example:
        >>> plan = plan_file({"b": Part("F32", (2,)), "a": Part("U8", (3,))}, {})
        >>> {key: start - len(plan.header) for key, start in plan.starts.items()}, plan.size - len(plan.header)
        ({'b': 0, 'a': 8}, 11)
    """
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    ends: dict[str, int] = {}
    end = 0
    for key, part in sorted(tensors.items(), key=lambda item: (-_ORDER.index(item[1].dtype), item[0])):
        start, end = end, end + part.nbytes
        header[key] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
        ends[key] = start
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    first = 8 + len(text)
    return FilePlan(
        len(text).to_bytes(8, "little") + text, {key: first + start for key, start in ends.items()}, first + end
    )


def begin_file(plan: FilePlan, path: PathLike) -> None:
    """Write the header, and make the file as long as it will be.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "xb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


def fill_file(plan: FilePlan, path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to their places in a file that was begun, also by another process; those of other files are left.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "rb+") as file:
        for key, tensor in tensors.items():
            if key in plan.starts:
                file.seek(plan.starts[key])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
