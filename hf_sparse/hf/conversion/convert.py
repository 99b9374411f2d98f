"""Convert a checkpoint of any origin to packed or dense files of ours, from its files alone.

No pickle is executed. One tensor is in memory at a time, and what is packed of one shard; `.bin` files are mapped where
torch can map them. A model is built (without weights) only where heads and neurons have to be found, and with weights
only for `compact`.

Which weights become `targets` of the manifest, those that were asked to be sparse, the source decides; of dense tensors
these are every `*.weight` with two or more dimensions of which at least a tenth is zero, and which got smaller by
packing. Embeddings (found by their names) stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import RecipeError
from ...formats.codecs import CODECS, encode
from ...formats.layer_forms import FORMS_KEY
from ...formats.manifest import Manifest, TensorEntry
from ...formats.model_folder import SINGLE, leads_out, weight_files
from ...formats.safetensors_io import MANIFEST_KEY, writing
from ...formats.sharding import ShardWriter
from ...formats.structure import EDITS_KEY, Edits
from ...formats.zero_patterns import find_pattern, looks_sparse
from ...pruning.compaction import apply_edits
from ...registry import Spec
from ...utils.atomic_io import replace_file
from ..per_layer_config import expressed_in_config
from ..quantization.config import METHOD, SparseConfig
from ..quantization.pack_state import FORMATS as PROFILES
from ..quantization.saving import staged
from . import sources as _sources  # noqa: F401 - importing them registers them
from .checkpoint import Checkpoint, open_checkpoint
from .compacting import compact_folder, dead_groups
from .download import fetched
from .report import Conversion, FoundPattern
from .source import PendingTensor, Source, source_of

SHARD_SIZE = "2GB"
_COPIED = {".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".md"}
_COPIED_BYTES = 1 << 27


def import_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "packed",  # noqa: A002  the word that save_pretrained has
    codec: Spec | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    compact: bool = False,
    revision: str = "main",
) -> Conversion:
    """Write a checkpoint of any origin in a format of hf_sparse. An old output stays whole until the new is complete.

    Reads dense tensors with or without zeros, `pruned_heads` of transformers before 5, nn_pruning, CoFi,
    torch.nn.utils.prune, compressed-tensors before 0.15, GGUF, and what hf_sparse wrote; as safetensors or as
    `pytorch_model.bin`, of which only tensors are taken and nothing is executed.

    Args:
        source: folder, a single file, or a Hub name.
        output: folder, or a file where the source is a file without a config.
        format: "packed", "smallest" (values coded too, slower to read), or "dense" (plain, read by any tool).
        codec: one codec for all that is packed, instead of the smallest of each.
        max_shard_size: of a file in a folder; a number of bytes or a text as in "2GB".
        compact: remove heads, neurons and filters whose weights are all zero, as `hf_sparse.compact` does.
        revision: branch, tag or commit on the Hub.

    Returns:
        What was found and done; `print` it.

    Raises:
        RecipeError: if output is the source, for an unknown format, codec or size, or "dense" of a compacted model.
        CheckpointError: if the source is corrupted, inconsistent, or cannot be expressed here; the message says why.

    Example:
        >>> import tempfile, torch, hf_sparse
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"layer.weight": torch.eye(64)}, folder / "pytorch_model.bin")
        >>> print(hf_sparse.import_checkpoint(folder, folder / "packed").patterns[0].pattern)
        element
    """
    output = Path(output)
    spec, limit = _spec(format, codec), shard_limit(max_shard_size)
    source = fetched(source, revision)
    if output.exists() and os.path.samefile(source, output):
        raise RecipeError(f"output {output} is the source itself, which would be lost; choose another")
    with open_checkpoint(source) as checkpoint:
        if compact and not checkpoint.config.get("model_type"):
            raise RecipeError(f"`compact` needs the config.json of the model, with its model_type, beside {source}")
        if source.is_file() and not checkpoint.config:
            return _convert_file(checkpoint, output, spec)
        with staged(output, writes=True) as staging:
            folder = Path(staging)
            done = _convert(checkpoint, folder, spec, limit)
            left = copy_small(checkpoint.path, checkpoint.files, folder)
            if compact:
                done = _compacted(done, folder)
    return dataclasses.replace(done, left=left)


def _convert_file(checkpoint: Checkpoint, output: Path, spec: Spec) -> Conversion:
    if output.is_dir():
        raise RecipeError(f"{checkpoint.path} is a file, so the output should be one, and {output} is a folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(output),
        replace_file(output) as temporary,
        tempfile.TemporaryDirectory(dir=output.parent, prefix=".saving-") as folder,
    ):
        done = _convert(checkpoint, Path(folder), spec, math.inf)
        os.replace(Path(folder) / SINGLE, temporary)
    return dataclasses.replace(done, files=(output.name,))


def _spec(profile: str, codec: Spec | None) -> Spec:
    if profile not in PROFILES:
        raise RecipeError(f"`format` must be one of {', '.join(map(repr, PROFILES))}, got {profile!r}")
    if codec is None:
        return PROFILES[profile]
    if profile != "packed":
        raise RecipeError(f"a codec goes with format 'packed', not with {profile!r}")
    if codec not in ("auto", "smallest") and CODECS.build(codec).name == "dense":
        raise RecipeError("codec 'dense' packs nothing; for a plain checkpoint use format 'dense'")
    return codec


def shard_limit(size: int | str) -> int:
    """Return the bytes of a shard.

    Raises:
        RecipeError: for anything but a number of bytes, or a text as in "2GB".
    """
    try:
        limit = convert_file_size_to_int(size)
    except ValueError:
        limit = 0
    if limit <= 0:
        raise RecipeError(f"the size of a shard is a number of bytes, or a text as in '2GB' or '500MB', not {size!r}")
    return limit


def _convert(checkpoint: Checkpoint, folder: Path, spec: Spec, limit: float) -> Conversion:
    """Write the weight files of a checkpoint, and its config if it has one, into an empty folder."""
    source = source_of(checkpoint)
    extra = source.extra()
    config = source.config()
    if spec == "dense" and extra.get(FORMS_KEY):
        raise RecipeError(
            f"{checkpoint.path} has layers of other forms (hashed, low rank), which no dense checkpoint can hold. "
            "Convert it to a packed one"
        )
    if spec == "dense" and extra.get(EDITS_KEY):
        config = _dense_config(checkpoint, config, Edits.from_dict(extra[EDITS_KEY]))
    writing_ = _Writing(source, ShardWriter(folder, limit), spec)
    made, written = writing_.all(extra)
    if checkpoint.config:
        text = json.dumps(_config_of(source, config, made), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in written)
    entries = writing_.entries
    count = sum(entry.codec != "dense" for entry in entries.values())
    kind = source.name if checkpoint.container == "safetensors" else f"{source.name} ({checkpoint.container})"
    return Conversion(
        kind, len(entries), count, checkpoint.size, size, tuple(file.name for file in written), made,
        patterns=tuple(writing_.patterns), notes=tuple(writing_.notes()), edits=edit_lines(extra),
        dead=dead_groups(checkpoint, writing_.readers, writing_.patterns) if not extra.get(EDITS_KEY) else None,
    )  # fmt: skip


@dataclasses.dataclass
class _Writing:
    """The tensors of one source on their way into the files.

    Attributes:
        entries: of the manifest, by key.
        targets: keys of the weights that were requested to be sparse.
        patterns: what the zeros of each of them look like.
        readers: what reads each tensor again, by key.
        negative: how many elements were -0.0, in weights whose zeros decide.
    """

    source: Source
    writer: ShardWriter
    spec: Spec
    entries: dict[str, TensorEntry] = dataclasses.field(default_factory=dict)
    targets: list[str] = dataclasses.field(default_factory=list)
    patterns: list[FoundPattern] = dataclasses.field(default_factory=list)
    readers: dict[str, Callable[[], Tensor]] = dataclasses.field(default_factory=dict)
    negative: int = 0

    def all(self, extra: Mapping[str, Any]) -> tuple[Manifest | None, list[Path]]:
        """Write all tensors, and return the manifest (None for plain dense files) and the files."""
        pending = sorted(self.source.tensors())
        self.readers = {tensor.key: tensor.read for tensor in pending}
        taken = {tensor.key for tensor in pending}
        for tensor in tqdm(pending, desc="Converting", unit="tensor", leave=False, disable=None):
            self._one(tensor, taken)
        made = None if self.spec == "dense" else Manifest(self.entries, tuple(self.targets), extra=extra)
        return made, self.writer.finish({} if made is None else {MANIFEST_KEY: made.to_json()})

    def _one(self, pending: PendingTensor, taken: set[str]) -> None:
        key, read, packed, target = pending
        tensor = read()
        if packed is None:
            tensor = self._without_negative_zeros(key, tensor)
            target = looks_sparse(key, tensor)
            packed = target and self.spec != "dense"
        entry, parts = encode(tensor, self.spec if packed else "dense")
        if any(key + suffix in taken for suffix in parts if suffix):  # the model has a tensor of that name itself
            entry, parts = encode(tensor, "dense")
        self.entries[key] = entry
        self.writer.add({key + suffix: part for suffix, part in parts.items()})
        if target:
            zeros = 1 - entry.nonzeros / max(tensor.numel(), 1)
            self.patterns.append(FoundPattern(key, find_pattern(tensor), zeros, entry.codec))
            if self.spec != "dense" and (self.source.keeps_targets or entry.codec != "dense"):
                self.targets.append(key)

    def _without_negative_zeros(self, key: str, tensor: Tensor) -> Tensor:
        """Return a weight with +0.0 for -0.0, which a program leaves that multiplies by its masks."""
        if not tensor.is_floating_point() or tensor.element_size() < 2 or tensor.ndim < 2:
            return tensor
        zero = tensor == 0
        negative = zero & torch.signbit(tensor)
        if not bool(negative.any()) or not looks_sparse(key, torch.where(zero, torch.zeros_like(tensor), tensor)):
            return tensor
        self.negative += int(negative.sum())
        return torch.where(zero, torch.zeros_like(tensor), tensor)

    def notes(self) -> list[str]:
        """Return what was changed that the bits of the source would not show."""
        if not self.negative:
            return []
        return [f"{self.negative} elements of sparse weights were -0.0 (a product with a mask) and are 0.0 now"]


def edit_lines(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is left of each sub-block that has lost heads or neurons."""
    edits = Edits.from_dict(extra.get(EDITS_KEY) or {})
    return tuple(f"{name}: {cut.count} of {cut.before} {kind}" for kind, name, cut in edits)


def _dense_config(checkpoint: Checkpoint, config: dict[str, Any], edits: Edits) -> dict[str, Any]:
    """Return a config that expresses what a compacted model has lost.

    Raises:
        RecipeError: if there is none.
    """
    if config.get("model_type"):
        model = checkpoint.model
        apply_edits(model, edits, model.base_model_prefix)
        expressed = expressed_in_config(model)
        if expressed is not None:
            return {**expressed.to_dict(), "architectures": config.get("architectures")}
    raise RecipeError(
        "a compacted model cannot be written dense: its layers have sizes that config.json cannot express, "
        "so no tool could load it. Convert it to 'packed' or 'smallest'"
    )


def _config_of(source: Source, config: dict[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """Return a config that says how the weights are stored now; what was asked of the model stays."""
    out = dict(config)
    if manifest is not None:
        stated = source.checkpoint.config.get("quantization_config") or {}
        intent = stated.get("intent") if stated.get("quant_method") == METHOD else None
        out["quantization_config"] = SparseConfig(intent, manifest).to_dict()
    return out


def _compacted(done: Conversion, folder: Path) -> Conversion:
    """Remove the zero heads and neurons of what was written, in place."""
    manifest = compact_folder(folder)
    if manifest is None:
        return dataclasses.replace(done, notes=(*done.notes, "compact: no head, neuron or filter is zero as a whole"))
    files = weight_files(folder)
    count = sum(entry.codec != "dense" for entry in manifest.tensors.values())
    return dataclasses.replace(
        done, tensors=len(manifest.tensors), packed=count, output_bytes=sum(file.stat().st_size for file in files),
        files=tuple(file.name for file in files), manifest=manifest, dead=None, edits=edit_lines(manifest.extra),
    )  # fmt: skip


def copy_small(source: Path, files: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Copy tokenizer, documents and other small files; return the names of those that were not copied."""
    left = []
    weights = {file.name for file in files}
    for path in sorted(path for path in source.iterdir() if path.is_file() and path.name not in weights):
        if (folder / path.name).exists() or path.name.endswith(".index.json"):
            continue
        small = path.suffix in _COPIED and path.stat().st_size <= _COPIED_BYTES
        if small and leads_out(path) is None:  # what is converted is going to be published
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    return tuple(left)
