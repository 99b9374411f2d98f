"""What a file holds, from the file alone: no model code, no weights decoded.

Packed files have a manifest in their header. In plain safetensors files the zeros are counted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils.atomic_io import PathLike
from ..utils.text import format_bytes, printable
from .codecs import layout
from .codecs.base import as_bits
from .manifest import ITEM_BYTES, Manifest, refuse_runtime
from .model_folder import safetensors_files
from .safetensors_io import Header, Stored, check_headers, manifests_in, open_safetensors, read_header
from .stored_layers import LayerGroup, layer_groups, removed_groups, removed_lines

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file holds it.

    Args:
        name: its key.
        codec: how it is stored; "plain" in a file without manifest.
        shape, dtype: of the decoded tensor, the type by its safetensors name.
        nonzeros: elements that are not zero.
        stored_bytes: its size in the file.
        targeted: whether sparsity was requested for it.
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
        """Its size when dense, in its own type."""
        return self.parameters * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one or more files of one checkpoint hold. `print` it for a table.

    Args:
        files: bytes of each file, by its name.
        tensors: all of them.
        packed: whether the files have a manifest.
        extra: what the manifest says beside its tensors: forms of layers, and what has left the model.
    """

    files: dict[str, int]
    tensors: tuple[StoredTensor, ...]
    packed: bool
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> tuple[StoredTensor, ...]:
        """The tensors for which sparsity was requested; where no manifest names any, all matrices."""
        targeted = tuple(tensor for tensor in self.tensors if tensor.targeted)
        return targeted or tuple(tensor for tensor in self.tensors if len(tensor.shape) > 1)

    @property
    def others(self) -> tuple[StoredTensor, ...]:
        """All other tensors: biases, norms, embeddings, heads."""
        weights = {tensor.name for tensor in self.weights}
        return tuple(tensor for tensor in self.tensors if tensor.name not in weights)

    @property
    def layers(self) -> list[LayerGroup]:
        """The layers by kind: matrices, convolutions, stacked experts, and other forms (hashed, low rank)."""
        return layer_groups(self.weights, self.tensors, self.extra)

    @property
    def removed(self) -> dict[str, tuple[int, int, int]]:
        """Of heads, neurons, experts and filters that have left: how many are left, of how many, in how many layers."""
        return removed_groups(self.extra)

    def size_line(self, names: Collection[str] | None = None) -> str:
        """Return the size in the file, and against dense fp32, of the tensors with these names (None = `weights`)."""
        wanted = None if names is None else set(names)
        tensors = self.weights if wanted is None else [tensor for tensor in self.tensors if tensor.name in wanted]
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
            "layers": [dataclasses.asdict(group) for group in self.layers],
            "removed": {
                kind: {"left": left, "of": before, "layers": places}
                for kind, (left, before, places) in self.removed.items()
            },
            "tensors": [
                dataclasses.asdict(tensor) | {"sparsity": tensor.sparsity, "dense_bytes": tensor.dense_bytes}
                for tensor in self.tensors
            ],
        }

    def __str__(self) -> str:
        weights, others = self.weights, self.others
        width = max([len(printable(tensor.name)) for tensor in weights] + [len("other tensors")])
        row = f"{{:<{width}}}  {{:<8}}  {{:>16}}  {{:<5}}  {{:>8}}  {{:>10}}  {{:>10}}  {{:>6}}"
        head = row.format("weight", "codec", "shape", "type", "sparsity", "stored", "dense", "share")
        lines = [] if self.packed else ["No manifest: not a file of hf_sparse, or saved dense. Zeros were counted.", ""]
        lines += [head, "-" * len(head)]
        for tensor in weights:
            shape, name = "x".join(map(str, tensor.shape)), printable(tensor.name)
            lines.append(row.format(name, tensor.codec, shape, tensor.dtype, *_figures(_totals([tensor]))))
        lines.append("-" * len(head))
        for name, tensors in (("weights", weights), ("other tensors", others)):
            lines.append(row.format(name, "", f"{_totals(tensors)['parameters']:,}", "", *_figures(_totals(tensors))))
        lines += [printable(str(group)) for group in self.layers if group.kind != "matrices"]
        lines += removed_lines(self.removed)
        lines += [printable(f"{name}: {format_bytes(size)}") for name, size in self.files.items()]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read what a safetensors file holds, or all those of a folder.

    Packed files are verified as loading them would, except for the content of packed tensors. A folder must hold all
    shards of its checkpoints; name the file to look at one shard alone.

    Raises:
        CheckpointError: if there is no such file, a shard is missing, or a file is corrupted, inconsistent, or from a
            newer version.
    """
    path = Path(path)
    files = safetensors_files(path) if path.is_dir() or not path.exists() else [path]
    headers: dict[PathLike, Header] = {file: read_header(file) for file in files}
    manifests = manifests_in(headers)
    packed = {file: manifest for file, manifest in manifests.items() if manifest is not None}
    for manifest in list(packed.values())[:1]:
        refuse_runtime(manifest, path)
        found = {key for file in packed for key in headers[file].tensors}
        if path.is_dir() or found >= manifest.tensors.keys():
            check_headers({file: headers[file] for file in packed}, manifests)
    tensors: list[StoredTensor] = []
    for file in files:
        header = headers[file].tensors
        tensors += _listed(header, packed[file]) if file in packed else _counted(file, header)
    extra = next((manifest.extra for manifest in packed.values()), {})
    return Inspection({file.name: file.stat().st_size for file in files}, tuple(tensors), bool(packed), extra)


def _listed(header: dict[str, Stored], manifest: Manifest) -> Iterator[StoredTensor]:
    """Yield the tensors of one packed file; all shards have the same manifest."""
    targets = set(manifest.targets)
    for name, entry in manifest.tensors.items():
        if name in header:
            stored = sum(part.nbytes for part in layout(entry, name).values())
            yield StoredTensor(name, entry.codec, entry.shape, entry.dtype, entry.nonzeros, stored, name in targets)


def _counted(file: Path, header: dict[str, Stored]) -> Iterator[StoredTensor]:
    """Yield the tensors of a plain file, with their zeros counted, one in memory at a time."""
    with open_safetensors(file) as tensors:
        for name, stored in header.items():
            nonzeros = _nonzeros(tensors.get_tensor(name))
            yield StoredTensor(name, "plain", stored.shape, stored.dtype, nonzeros, stored.nbytes)


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
