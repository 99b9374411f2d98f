"""What a file holds, from the file alone: no model code, no weights decoded.

Packed files say it themselves, in the manifest of their header. Of plain safetensors files the zeros are counted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..utils.text import format_bytes
from .codecs import layout
from .codecs.base import as_bits
from .manifest import ITEM_BYTES, Manifest
from .safetensors_io import Stored, check_files, read_header, read_manifest

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file.

    Args:
        name: its key.
        codec: how it is stored; "plain" in a file without manifest.
        shape, dtype: of the decoded tensor, the type by its safetensors name.
        nonzeros: elements that are not zero.
        stored_bytes: what it takes in the file.
        targeted: whether it was asked to be sparse.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    dtype: str
    nonzeros: int
    stored_bytes: int
    targeted: bool = False

    @property
    def parameters(self) -> int:
        """Elements of the decoded tensor."""
        return torch.Size(self.shape).numel()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def dense_bytes(self) -> int:
        """What it would take dense, in its own type."""
        return self.parameters * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one or more files of one checkpoint hold. `print` it for a table.

    Args:
        files: bytes of each file, by its name.
        tensors: all of them.
        packed: whether the files have a manifest.
    """

    files: dict[str, int]
    tensors: tuple[StoredTensor, ...]
    packed: bool

    @property
    def weights(self) -> tuple[StoredTensor, ...]:
        """The tensors that were asked to be sparse; where no manifest names any, all matrices."""
        targeted = tuple(tensor for tensor in self.tensors if tensor.targeted)
        return targeted or tuple(tensor for tensor in self.tensors if len(tensor.shape) > 1)

    @property
    def others(self) -> tuple[StoredTensor, ...]:
        """The tensors that are no `weights`: biases, norms, embeddings, heads."""
        weights = {tensor.name for tensor in self.weights}
        return tuple(tensor for tensor in self.tensors if tensor.name not in weights)

    def size_line(self, names: Collection[str] | None = None) -> str:
        """Return the size in the file, and against dense fp32, of the tensors with these names (None = `weights`)."""
        tensors = self.weights if names is None else [tensor for tensor in self.tensors if tensor.name in names]
        stored = sum(tensor.stored_bytes for tensor in tensors)
        dense = sum(tensor.parameters for tensor in tensors) * FP32_BYTES
        share = f", {stored / dense:.4f} of dense fp32 ({format_bytes(dense)})" if dense else ""
        return f"{format_bytes(stored)}{share}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "packed": self.packed,
            "files": self.files,
            "weights": _totals(self.weights),
            "others": _totals(self.others),
            "tensors": [
                dataclasses.asdict(tensor) | {"sparsity": tensor.sparsity, "dense_bytes": tensor.dense_bytes}
                for tensor in self.tensors
            ],
        }

    def __str__(self) -> str:
        wide = max([len(tensor.name) for tensor in self.weights] + [len("other tensors")])
        row = f"{{:<{wide}}}  {{:<8}}  {{:>16}}  {{:<5}}  {{:>8}}  {{:>10}}  {{:>10}}  {{:>6}}"
        head = row.format("weight", "codec", "shape", "type", "sparsity", "stored", "dense", "share")
        lines = [] if self.packed else ["No manifest: not a file of hf_sparse, or saved dense. Zeros were counted.", ""]
        lines += [head, "-" * len(head)]
        for tensor in self.weights:
            shape = "x".join(map(str, tensor.shape))
            lines.append(row.format(tensor.name, tensor.codec, shape, tensor.dtype, *_figures(_totals([tensor]))))
        lines.append("-" * len(head))
        for name, tensors in (("weights", self.weights), ("other tensors", self.others)):
            lines.append(row.format(name, "", f"{_totals(tensors)['parameters']:,}", "", *_figures(_totals(tensors))))
        lines += [f"{name}: {format_bytes(size)}" for name, size in self.files.items()]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read what a safetensors file holds, or all those of a folder.

    Packed files are checked as loading them would, but for what is packed itself. One shard of several can be looked at
    alone.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, inconsistent, or from a newer version.
    """
    files = _files(Path(path))
    headers = {file: read_header(file)[1] for file in files}
    manifests = {file: manifest for file in files if (manifest := read_manifest(file)) is not None}
    for manifest in list(manifests.values())[:1]:
        found = {key for file in manifests for key in headers[file]}
        if len(files) > 1 or found >= manifest.tensors.keys():
            check_files(manifests)
    tensors: list[StoredTensor] = []
    for file in files:
        tensors += _listed(headers[file], manifests[file]) if file in manifests else _counted(file, headers[file])
    return Inspection({file.name: file.stat().st_size for file in files}, tuple(tensors), bool(manifests))


def _files(path: Path) -> Sequence[Path]:
    """Return the files, found by looking: an index file could name any path."""
    if path.is_dir():
        if found := sorted(path.glob("*.safetensors")):
            return found
        raise CheckpointError(f"folder {path} holds no .safetensors file")
    if not path.is_file():
        raise CheckpointError(f"there is no file or folder {path}")
    return [path]


def _listed(header: dict[str, Stored], manifest: Manifest) -> Iterator[StoredTensor]:
    """Yield the tensors of one packed file; all shards have the same manifest."""
    targets = set(manifest.targets)
    for name, entry in manifest.tensors.items():
        if name in header:
            stored = sum(part.nbytes for part in layout(entry, name).values())
            yield StoredTensor(name, entry.codec, entry.shape, entry.dtype, entry.nonzeros, stored, name in targets)


def _counted(file: Path, header: dict[str, Stored]) -> Iterator[StoredTensor]:
    """Yield the tensors of a plain file, with their zeros counted, one in memory at a time."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name, stored in header.items():
                nonzeros = _nonzeros(tensors.get_tensor(name))
                yield StoredTensor(name, "plain", stored.shape, stored.dtype, nonzeros, stored.nbytes)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _nonzeros(tensor: torch.Tensor) -> int:
    """Count the elements that are not 0; -0.0, which `weight * mask` leaves behind, is 0."""
    if not tensor.is_floating_point():
        tensor = as_bits(tensor)  # torch cannot count all unsigned types
    elif tensor.element_size() == 1:
        tensor = tensor.float()  # nor those of eight bits
    return int(torch.count_nonzero(tensor))


def _totals(tensors: Any) -> dict[str, Any]:
    keys = ("parameters", "nonzeros", "stored_bytes", "dense_bytes")
    totals = {key: sum(getattr(tensor, key) for tensor in tensors) for key in keys}
    parameters = totals["parameters"]
    return totals | {"sparsity": 1.0 - totals["nonzeros"] / parameters if parameters else 0.0}


def _figures(totals: dict[str, Any]) -> tuple[str, ...]:
    stored, dense = totals["stored_bytes"], totals["dense_bytes"]
    return (
        f"{totals['sparsity']:.2%}",
        format_bytes(stored),
        format_bytes(dense),
        f"{stored / dense:.3f}" if dense else "",
    )
