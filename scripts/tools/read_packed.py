"""Read a packed checkpoint with NumPy alone: hf_sparse/formats/FORMAT.md in code that shares nothing with it.

    python scripts/tools/read_packed.py model.safetensors [more shards ...]

Types that NumPy lacks come back as unsigned integers of the same width, so their bits can be compared. This reader
verifies what it relies on; hf_sparse itself refuses more (FORMAT.md has the list).
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "BOOL": "?"}
TYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "C64": "<c8", "BF16": "<u2"}
TYPES |= dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), "u1")


class FormatError(ValueError):
    """The file is not what FORMAT.md describes."""


def expect(condition: object, complaint: str) -> None:
    """Raise `FormatError` unless the condition holds."""
    if not condition:
        raise FormatError(complaint)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata and the tensors of a file, mapped and not read."""
    data = np.memmap(path, np.uint8, "r")
    expect(len(data) >= 8, "too short")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    expect(start <= len(data), "truncated header")
    header = json.loads(data[8:start].tobytes())
    tensors = {}
    for key, info in header.items():
        if key != "__metadata__":
            begin, end = (start + offset for offset in info["data_offsets"])
            kind = np.dtype(TYPES[info["dtype"]])
            expect(end <= len(data) and end - begin == math.prod(info["shape"]) * kind.itemsize, f"{key}: size")
            tensors[key] = data[begin:end].view(kind).reshape(info["shape"])
    return header.get("__metadata__", {}), tensors


def flags(packed: Array, count: int) -> Array:
    """Return the flags of a bitmask."""
    expect(len(packed) == -(-count // 8), "size of a bitmask")
    bits = np.unpackbits(packed, bitorder="little")
    expect(not bits[count:].any(), "bits behind the end")
    return bits[:count].astype(bool)


def inflate(stream: Array, length: int) -> Array:
    """Return exactly `length` bytes of a deflate stream."""
    decoder = zlib.decompressobj(-15)
    data = decoder.decompress(stream.tobytes(), length + 1)
    expect(len(data) == length and decoder.eof and not decoder.unused_data, "length of a deflate stream")
    return np.frombuffer(data, np.uint8)


def scatter(values: Array, index: Array, count: int) -> Array:
    """Return `count` zeros with the values at these positions."""
    expect(len(values) == len(index) and (not len(index) or index[-1] < count), "number of values")
    expect((np.diff(index) > 0).all(), "order of positions")
    out = np.zeros((count, *values.shape[1:]), values.dtype)
    out[index] = values
    return out


def unpack(entry: dict[str, Any], part: dict[str, Array]) -> Array:
    """Return the elements of a packed tensor, as unsigned integers in C order."""
    options, shape, codec = entry.get("options", {}), entry["shape"], entry["codec"]
    kind = np.dtype(TYPES[entry["dtype"]])
    rows, cols, total = shape[0], math.prod(shape[1:]), math.prod(shape)
    stored = sum(array.nbytes for array in part.values())
    expect(len(shape) > 1 and 0 < total * kind.itemsize <= 1024 * (stored + 64), "size of a packed tensor")
    values = part[""].view(f"<u{kind.itemsize}") if codec != "planes" else part[""]
    if codec == "bitmask":
        return scatter(values, np.flatnonzero(flags(part["_mask"], total)), total)
    if codec == "deflate":
        return scatter(values, np.flatnonzero(flags(inflate(part["_mask_deflated"], -(-total // 8)), total)), total)
    if codec == "csr":
        counts, columns = part["_counts"].astype(np.int64), part["_columns"].astype(np.int64)
        expect(len(counts) == rows and counts.sum() == len(columns) and (columns < cols).all(), "counts and columns")
        return scatter(values, np.repeat(np.arange(rows) * cols, counts) + columns, total)
    if codec == "n:m":
        n, m = options["n"], options["m"]
        width = (m - 1).bit_length()
        bits = flags(part["_positions"], total // m * n * width).reshape(-1, width)
        positions = (bits << np.arange(width)).sum(axis=1)
        expect(total % m == 0 and (positions < m).all(), "positions")
        return scatter(values, positions + np.repeat(np.arange(0, total, m), n), total)
    expect(codec in ("block", "gap", "planes"), f"unknown codec {codec}")
    height, width, size = options["rows"], options["cols"], options["rows"] * options["cols"]
    expect(1 <= height <= rows and 1 <= width <= cols, "size of a block")
    below, beside = -(-rows // height), -(-cols // width)
    if codec == "block":
        index = np.flatnonzero(flags(part["_blocks"], below * beside))
    else:
        expect(options["gaps"] <= options["kept"] + below * beside // 255, "number of gaps")
        gaps = inflate(part["_gaps"], options["gaps"])
        index = (np.cumsum(gaps + (gaps != 255).astype(np.int64)) - 1)[gaps != 255]
    if codec == "planes":
        planes = inflate(values, options["kept"] * size * kind.itemsize).reshape(kind.itemsize, -1)
        values = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{kind.itemsize}")
    blocks = scatter(values.reshape(-1, size), index, below * beside).reshape(below, beside, height, width)
    return blocks.transpose(0, 2, 1, 3).reshape(below * height, beside * width)[:rows, :cols].reshape(-1)


def read(*paths: Path) -> dict[str, Array]:
    """Return all tensors of a checkpoint."""
    files = [read_safetensors(path) for path in paths]
    stored = {key: tensor for _, tensors in files for key, tensor in tensors.items()}
    manifests = [json.loads(metadata["hf_sparse"]) for metadata, _ in files]
    expect(manifests and all(manifest == manifests[0] for manifest in manifests), "different manifests")
    expect(manifests[0]["version"] == 1, "version: newer than this reader")
    out = {}
    for key, entry in manifests[0]["tensors"].items():
        suffixes = SUFFIXES[entry["codec"]]
        part = {suffix: stored.pop(key + suffix) for suffix in ("", *suffixes)}
        kind = np.dtype(TYPES[entry["dtype"]])
        elements = part[""].reshape(-1) if entry["codec"] == "dense" else unpack(entry, part)
        out[key] = np.ascontiguousarray(elements).view(kind).reshape(entry["shape"])
        described = f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]".encode()
        found = f"crc32:{zlib.crc32(described + out[key].tobytes()):08x}"
        expect(found == entry["checksum"], f"{key}: checksum {found}, expected {entry['checksum']}")
    expect(not stored, f"unknown keys {sorted(stored)}")
    return out


SUFFIXES = {"dense": (), "bitmask": ("_mask",), "deflate": ("_mask_deflated",), "csr": ("_columns", "_counts")}
SUFFIXES |= {"n:m": ("_positions",), "block": ("_blocks",), "gap": ("_gaps",), "planes": ("_gaps",)}

if __name__ == "__main__":
    for name, tensor in read(*map(Path, sys.argv[1:])).items():
        print(f"{name}  {tensor.dtype}  {tensor.shape}  {np.count_nonzero(tensor)} of {tensor.size} are not zero")
