"""Read the sparse formats of compressed-tensors before 0.15, `sparse-bitmask` and `sparse-24-bitmask`; none is written.

A weight `<prefix>.weight` of shape (..., C) is stored as

* `<prefix>.shape`: I64, its sides, as a list or as a column;
* `<prefix>.bitmask`: U8, (..., ceil(C / 8)), one bit for each element, the lowest first, each row in bytes of its own;
* `<prefix>.compressed`: the elements kept, in order. In `sparse-bitmask` one list; in `sparse-24-bitmask` C / 2 in each
  row of a matrix, zeros among them where a group of four has fewer than two others;
* `<prefix>.row_offsets`: I64, how many elements are kept before each row; only in `sparse-bitmask`.

There are no checksums. What can be checked is: sizes before anything is allocated, the number of ones, the offsets.

Source: compressed-tensors 0.14.0, compressors/sparse_compressors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .codecs.base import Array, as_bits, pack_bits
from .codecs.bitmask import expand
from .manifest import ITEM_BYTES, MAX_BYTES
from .safetensors_io import Stored

METHOD = "compressed-tensors"
FORMATS = ("sparse-bitmask", "sparse-24-bitmask")

_NEEDED = ("shape", "bitmask", "compressed")
_MAX_DIMENSIONS = 32


def find_compressed(headers: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Return the parts of each compressed weight, by its prefix and the name of the part.

    Raises:
        CheckpointError: if a part is missing, or the weight is there uncompressed too.
    """
    found = {}
    for prefix in sorted(key.removesuffix(".compressed") for key in headers if key.endswith(".compressed")):
        parts = {name: headers[key] for name in (*_NEEDED, "row_offsets") if (key := f"{prefix}.{name}") in headers}
        for name in _NEEDED:
            if name not in parts:
                raise CheckpointError(f"weight '{prefix}.weight' lacks its part '{prefix}.{name}'; is a shard missing?")
        if f"{prefix}.weight" in headers:
            raise CheckpointError(f"weight '{prefix}.weight' is there twice, compressed and not")
        found[prefix] = parts
    return found


def decompress(prefix: str, parts: Mapping[str, Stored], get: Callable[[str], Tensor]) -> Tensor:
    """Return a weight, dense.

    Args:
        prefix: name of the weight without `.weight`.
        parts: what the headers say, of `find_compressed`.
        get: reads a tensor by its key.

    Raises:
        CheckpointError: if the parts contradict each other; sizes are compared before anything is allocated.
    """
    try:
        _check_type(parts, "shape", "I64")
        _check_type(parts, "bitmask", "U8")
        sides = _sides(parts["shape"], lambda: get(f"{prefix}.shape"))
        _check_sizes(parts, sides)
        values = as_bits(get(f"{prefix}.compressed"))
        mask = get(f"{prefix}.bitmask").numpy()
        offsets = get(f"{prefix}.row_offsets").numpy() if "row_offsets" in parts else None
        _check_counts(mask, sides, values.numel(), offsets)
        flat = mask.reshape(-1)
        if sides[-1] % 8:  # rows end within a byte
            flags = np.unpackbits(mask, axis=-1, count=sides[-1], bitorder="little")
            flat = pack_bits(flags.reshape(-1))
        bits = expand(flat, values, math.prod(sides)) if len(flat) else torch.zeros(0, dtype=values.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"weight '{prefix}.weight' of {METHOD}: {error}") from None
    return bits.view(get(f"{prefix}.compressed").dtype).view(sides)


def _check_type(parts: Mapping[str, Stored], name: str, dtype: str) -> None:
    if parts[name].dtype != dtype:
        raise CheckpointError(f"its {name} is {parts[name].dtype}, and should be {dtype}")


def _sides(stored: Stored, read: Callable[[], Tensor]) -> tuple[int, ...]:
    count = stored.shape[0] if stored.shape else 0
    if not 1 <= count <= _MAX_DIMENSIONS or stored.shape not in ((count,), (count, 1)):
        raise CheckpointError(f"its shape should be 1 to {_MAX_DIMENSIONS} numbers, not a tensor of {stored.shape}")
    return tuple(read().view(-1).tolist())


def _check_sizes(parts: Mapping[str, Stored], sides: tuple[int, ...]) -> None:
    """Compare the shape with the sizes of the parts: a bit for each element, so no shape is larger than the file."""
    values = parts["compressed"]
    if min(sides) < 0 or math.prod(max(side, 1) for side in sides) * ITEM_BYTES[values.dtype] > MAX_BYTES:
        raise CheckpointError(f"no tensor can have the shape {sides}")
    expected = {"bitmask": (*sides[:-1], -(-sides[-1] // 8))}
    if "row_offsets" in parts:
        _check_type(parts, "row_offsets", "I64")
        expected["row_offsets"] = sides[:-1]
        expected["compressed"] = (math.prod(values.shape),)
    elif len(sides) == 2:
        expected["compressed"] = (sides[0], sides[1] // 2)
    else:
        raise CheckpointError(f"without row_offsets it should be {FORMATS[1]}, a matrix, and its shape is {sides}")
    for name, shape in expected.items():
        if parts[name].shape != shape:
            raise CheckpointError(f"with shape {sides} its {name} should be {shape}, and is {parts[name].shape}")


def _check_counts(mask: Array, sides: tuple[int, ...], kept: int, offsets: Array | None) -> None:
    """Compare the ones in each row of the mask with the offsets, or with two of four."""
    rows = np.bitwise_count(mask).sum(axis=-1, dtype=np.int64)
    if int(rows.sum()) != kept:
        raise CheckpointError(f"its bitmask has {int(rows.sum())} ones, and there are {kept} elements")
    if offsets is None:
        if (rows != sides[-1] // 2).any():
            raise CheckpointError(f"its bitmask does not keep {sides[-1] // 2} of {sides[-1]} elements in every row")
    elif np.any(offsets != (np.cumsum(rows, axis=0) - rows if rows.ndim else 0)):
        raise CheckpointError("its row_offsets are not those of its bitmask")
    if sides[-1] % 8 and (mask[..., -1] >> sides[-1] % 8).any():
        raise CheckpointError("bits behind the end of a row of its bitmask are set")
