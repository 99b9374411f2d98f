"""Convert a checkpoint from its files alone: dense, packed, or compressed-tensors before 0.15, to packed or dense.

No model is built and no pickle read. One tensor is in memory at a time, and what is packed of one shard.

Which weights become `targets` of the manifest, those that were asked to be sparse:

* from a packed checkpoint: the targets it has;
* from compressed-tensors: the weights that it compressed;
* from a dense one: every `*.weight` with two or more dimensions of which at least a tenth is zero, and which got
  smaller by packing. Embeddings (told by their names) stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import convert_file_size_to_int
from torch import Tensor

from ...errors import CheckpointError, RecipeError
from ...formats.codecs import CODECS, decode, encode, layout
from ...formats.codecs.base import as_bits
from ...formats.compressed_tensors import FORMATS, METHOD, decompress, find_compressed
from ...formats.manifest import Manifest, TensorEntry
from ...formats.model_folder import SINGLE, check_link, leads_out, weight_files
from ...formats.safetensors_io import MANIFEST_KEY, writing
from ...formats.sharding import Shards, ShardWriter, opened
from ...formats.structure import EDITS_KEY
from ...registry import Spec
from ...utils.atomic_io import read_json, replace_file
from ...utils.text import printable
from .config import METHOD as OURS
from .config import SparseConfig
from .load_plan import manifest_of
from .pack_state import FORMATS as PROFILES
from .pack_state import is_training_state
from .saving import staged

SHARD_SIZE = "2GB"
MIN_ZEROS = 0.1
"""Of a dense checkpoint, weights with fewer zeros are left as they are: their zeros are chance, not intent."""

_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
_COPIED = {".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".md"}
_COPIED_BYTES = 1 << 27


class _Waiting(NamedTuple):
    """A tensor that is not read yet; `packed` is None where its zeros decide, and make it a target."""

    key: str
    read: Callable[[], Tensor]
    packed: bool | None
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done. `print` it for a few lines.

    Args:
        kind: what the source was.
        packed: how many tensors are packed now, of `tensors`.
        source_bytes, output_bytes: of the weight files.
        files: weight files written.
        manifest: of what was written; None if it is dense.
        left: files of the source that were not copied.
    """

    kind: str
    tensors: int
    packed: int
    source_bytes: int
    output_bytes: int
    files: tuple[str, ...]
    manifest: Manifest | None
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = f" ({self.output_bytes / self.source_bytes:.3f})" if self.source_bytes else ""
        sizes = f"{self.source_bytes / 1e6:.2f} MB to {self.output_bytes / 1e6:.2f} MB{share}"
        lines = [f"{self.kind}: {self.tensors} tensors, {self.packed} packed now, {sizes} in {len(self.files)} file(s)"]
        return "\n".join(lines + [printable(f"not copied: {', '.join(self.left)}")] * bool(self.left))


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "packed",  # noqa: A002  the word that save_pretrained has
    codec: Spec | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> Conversion:
    """Write a checkpoint in another format. An old output stays whole until the new one is complete.

    Args:
        source: folder, or a single .safetensors file.
        output: folder, or a file where the source is one.
        format: "packed", "smallest" (values coded too, slower to read), or "dense" (plain, read by any tool).
        codec: one codec for all that is packed, instead of the smallest of each.
        max_shard_size: of a file in a folder; a number of bytes or a text as in "2GB".

    Raises:
        RecipeError: if output is the source, for an unknown format, codec or size, or "dense" of a compacted model.
        CheckpointError: if the source is corrupted, inconsistent, or stored in a way that is not one of these.
    """
    source, output = Path(source), Path(output)
    spec, limit = _spec(format, codec), _limit(max_shard_size)
    files = weight_files(source)
    if output.exists() and os.path.samefile(source, output):
        raise RecipeError(f"output {output} is the source itself, which would be lost; choose another")
    if source.is_file():
        return _convert_file(source, output, spec)
    check_link(source / "config.json")
    config = read_json(source / "config.json") or {}
    method = _method(config) if config else None
    described = _described(config) if method == OURS else None
    with staged(output, writes=True) as folder:
        done = _convert(files, method, described, Path(folder), spec, limit)
        if config:
            text = json.dumps(_config_of(config, done.manifest), indent=2, sort_keys=True)
            (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")
        left = _copy_small(source, Path(folder))
    return dataclasses.replace(done, left=left)


def _convert_file(source: Path, output: Path, spec: Spec) -> Conversion:
    if output.is_dir():
        raise RecipeError(f"{source} is a file, so the output should be one, and {output} is a folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(output),
        replace_file(output) as temporary,
        tempfile.TemporaryDirectory(dir=output.parent, prefix=".saving-") as folder,
    ):
        done = _convert([source], None, None, Path(folder), spec, math.inf)
        os.replace(Path(folder) / SINGLE, temporary)
    return dataclasses.replace(done, files=(output.name,))


def _spec(profile: str, codec: Spec | None) -> Spec:
    if profile not in PROFILES:
        raise RecipeError(f"format is {', '.join(map(repr, PROFILES))}, not {profile!r}")
    if codec is None:
        return PROFILES[profile]
    if profile != "packed":
        raise RecipeError(f"a codec goes with format 'packed', not with {profile!r}")
    if codec not in ("auto", "smallest") and CODECS.build(codec).name == "dense":
        raise RecipeError("codec 'dense' packs nothing; for a plain checkpoint use format 'dense'")
    return codec


def _limit(size: int | str) -> int:
    try:
        limit = convert_file_size_to_int(size)
    except ValueError:
        limit = 0
    if limit <= 0:
        raise RecipeError(f"the size of a shard is a number of bytes, or a text as in '2GB' or '500MB', not {size!r}")
    return limit


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how the config says that the weights are stored; older compressed-tensors had a key of its own."""
    stated = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(stated, Mapping):
        raise CheckpointError("quantization_config in config.json should be a mapping")
    return stated


def _method(config: Mapping[str, Any]) -> str:
    """Return how the config says that the weights are stored: "dense", or by whom.

    Raises:
        CheckpointError: if it names a way to store weights that is not read here.
    """
    stated = _quantization(config)
    method = stated.get("quant_method", METHOD if "sparsity_config" in stated else None)
    if method in (None, OURS):
        return method or "dense"
    if method != METHOD:
        raise CheckpointError(f"the checkpoint is quantized ({method}), which convert does not read")
    if stated.get("config_groups") or stated.get("transform_config"):
        raise CheckpointError(f"the checkpoint is quantized ({METHOD}), not only sparse, which convert does not read")
    sparsity = stated.get("sparsity_config") or {}
    found = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
    if found not in (*FORMATS, "dense"):
        raise CheckpointError(f"the format of {METHOD} is {found!r}, and convert reads {', '.join(FORMATS)}")
    return METHOD if found in FORMATS else "dense"


def _described(config: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest in a config; files have their own, which is the one that counts."""
    manifest = _quantization(config).get("manifest")
    return None if manifest is None else Manifest.from_dict(manifest)


def _config_of(config: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """Return a config that says how the weights are stored now; what was asked of the model stays."""
    stated = _quantization(config)
    out = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if manifest is not None:
        intent = stated.get("intent") if stated.get("quant_method") == OURS else None
        out["quantization_config"] = SparseConfig(intent, manifest).to_dict()
    return out


def _convert(
    files: Sequence[Path], method: str | None, described: Manifest | None, folder: Path, spec: Spec, limit: float
) -> Conversion:
    """Write the weight files into an empty folder; without a config (no method) they say themselves what they are."""
    manifest = manifest_of(files, described)
    if spec == "dense" and manifest is not None and manifest.extra.get(EDITS_KEY):
        raise RecipeError(
            "a compacted model cannot be written dense: its layers differ in size, which config.json cannot express, "
            "so no tool could load it. Convert it to 'packed' or 'smallest'"
        )
    entries: dict[str, TensorEntry] = {}
    targets: list[str] = []
    writer = ShardWriter(folder, limit)
    with opened(files) as shards:
        if manifest is not None:
            kind, waiting = "packed", _packed(shards, manifest)
        elif method == METHOD or (method is None and find_compressed(shards.headers)):
            kind, waiting = METHOD, _compressed(shards)
        else:
            kind, waiting = "dense", (_Waiting(key, partial(shards.get, key), None) for key in shards.headers)
        pending = sorted(waiting)
        taken = {tensor.key for tensor in pending}
        for key, read, packed, target in pending:
            tensor = read()
            if packed is None:
                packed = spec != "dense" and looks_sparse(key, tensor)
                target = packed
            entry, parts = encode(tensor, spec if packed else "dense")
            if any(key + suffix in taken for suffix in parts if suffix):  # the model has a tensor of that name itself
                entry, parts = encode(tensor, "dense")
            entries[key] = entry
            writer.add({key + suffix: part for suffix, part in parts.items()})
            if target and (manifest is not None or entry.codec != "dense"):
                targets.append(key)
        made = None
        if spec != "dense":
            made = Manifest(entries, tuple(targets), extra={} if manifest is None else manifest.extra)
        written = writer.finish({} if made is None else {MANIFEST_KEY: made.to_json()})
    before, after = (sum(file.stat().st_size for file in some) for some in (files, written))
    count = sum(entry.codec != "dense" for entry in entries.values())
    return Conversion(kind, len(entries), count, before, after, tuple(file.name for file in written), made)


def _packed(shards: Shards, manifest: Manifest) -> Iterator[_Waiting]:
    """Yield the tensors of a packed checkpoint. What a Trainer needs to go on with training stays behind."""
    targets = set(manifest.targets)
    for key, entry in manifest.tensors.items():
        if is_training_state(key, manifest.tensors):
            continue
        target = key in targets
        yield _Waiting(key, partial(_decode, shards, key, entry), target or entry.codec != "dense", target)


def _decode(shards: Shards, key: str, entry: TensorEntry) -> Tensor:
    return decode(entry, {suffix: shards.get(key + suffix) for suffix in layout(entry, key)}, key)


def _compressed(shards: Shards) -> Iterator[_Waiting]:
    found = find_compressed(shards.headers)
    for prefix, parts in found.items():
        read = partial(decompress, prefix, parts, shards.get)
        matrix = math.prod(parts["shape"].shape) > 1
        yield _Waiting(f"{prefix}.weight", read, packed=matrix, target=matrix)
    known = {f"{prefix}.{name}" for prefix, parts in found.items() for name in parts}
    for key in shards.headers.keys() - known:
        yield _Waiting(key, partial(shards.get, key), packed=False)


def looks_sparse(key: str, tensor: Tensor) -> bool:
    """Return whether the zeros of a dense tensor look like intent.

    Example:
        >>> import torch
        >>> looks_sparse("layer.0.query.weight", torch.eye(4)), looks_sparse("word_embeddings.weight", torch.eye(4))
        (True, False)
    """
    if tensor.ndim < 2 or not key.endswith(".weight") or not tensor.numel() or tensor.is_meta:
        return False
    if any(word in key.lower() for word in _EMBEDDINGS):
        return False
    zeros = tensor.numel() - int(np.count_nonzero(as_bits(tensor.detach().cpu()).numpy()))
    return zeros >= MIN_ZEROS * tensor.numel()


def _copy_small(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy tokenizer, documents and other small files; return the names of those that were not copied."""
    left = []
    weights = {file.name for file in weight_files(source)}
    for path in sorted(path for path in source.iterdir() if path.is_file() and path.name not in weights):
        if (folder / path.name).exists() or path.name.endswith(".index.json"):
            continue
        small = path.suffix in _COPIED and path.stat().st_size <= _COPIED_BYTES
        if small and leads_out(path) is None:  # what is converted is going to be published
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    return tuple(left)
