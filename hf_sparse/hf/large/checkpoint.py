"""`sparsify_checkpoint`: one-shot pruning of a checkpoint, block by block, with one block in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...config.sparsity import SparsityConfig
from ...errors import RecipeError
from ...formats.codecs import encode
from ...formats.manifest import Manifest, TensorEntry
from ...formats.model_folder import weight_files
from ...formats.safetensors_io import MANIFEST_KEY
from ...formats.sharding import Shards, ShardWriter, opened
from ...modeling.blocks import block_prefixes
from ...pruning.calibrated.outliers import outlier_shares
from ...pruning.calibrated.recording import record
from ...pruning.calibrated.tasks import OnLayer, Task, prune_block, tasks_of
from ...pruning.calibrated.walk import Chain, ChainStep, Step
from ...pruning.group import PruningGroup
from ...pruning.patterns import Structure
from ...pruning.pruner import Pruner
from ...pruning.selection import Owl
from ...utils.atomic_io import read_json, write_text
from ...utils.validation import check_batches
from ..conversion.convert import SHARD_SIZE, copy_small, shard_limit
from ..quantization.config import SparseConfig
from ..quantization.saving import staged
from .lazy_model import LazyModel, source_files
from .work_folder import NAME, WorkFolder, run_facts

Batch = Mapping[str, Any]


def sparsify_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SparsityConfig | Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    spill: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    on_layer: OnLayer | None = None,
) -> Manifest:
    """Prune a checkpoint in one shot without ever holding the whole model, and write it packed.

    In memory are the embeddings, one block, the hidden states of all batches, and the statistics of the block's inputs.
    After each block its pruned weights are on disk, in a hidden folder of the output. A run that was interrupted goes
    on where it was when it is repeated, and its result is the same to the last bit: from the hidden states on disk with
    `spill`; without, finished blocks are run once more for them.

    Args:
        source: folder of a dense checkpoint of a model with one stack of blocks: a decoder, or an encoder.
        output: folder that is written.
        config: `SparsityConfig`, or a mapping with its keys; scorers wanda, sparsegpt, magnitude and random, with
            selections that take weights one by one.
        batches: keyword arguments of the model.
        device: where blocks are computed, as in "cuda".
        dtype: of weights and hidden states while they are computed with; None = float32 on the CPU, else that of the
            checkpoint. Weights are written in the type in which the checkpoint has them.
        spill: keep hidden states in files.
        max_shard_size: of a file; a number of bytes or a text as in "2GB".
        on_layer: called with the `LayerUpdate` of each layer.

    Returns:
        The manifest of what was written.

    Raises:
        RecipeError: if the config cannot be met block by block, output is the source, or a model is there already.
        CheckpointError: if the checkpoint is corrupted or packed, or another run was interrupted in the output folder.
        SparsityError: as `sparsify`.

    Example:
        >>> import hf_sparse
        >>> # hf_sparse.sparsify_checkpoint("big-model", "out", {"scorer": "wanda", "pattern": "2:4"}, batches)
    """
    source, output, config = Path(source), Path(output), SparsityConfig.of(config)
    limit, files = shard_limit(max_shard_size), source_files(source)
    if output.exists() and os.path.samefile(source, output):
        raise RecipeError(f"output {output} is the source itself, which would be lost; choose another")
    _refuse_finished(output)
    check_batches(batches)
    device, batches = torch.device(device), list(batches)
    if not batches:
        raise RecipeError("sparsify_checkpoint goes from block to block with data, and `batches` is empty")
    with opened(files) as shards, torch.no_grad():
        dtype = dtype or _compute_dtype(shards, device)
        lazy = LazyModel(source, shards, dtype, device)
        pruner = Pruner(lazy.model, config)
        blocks = _blocks(lazy, pruner)
        work = WorkFolder(output, run_facts(config.to_dict(), files, batches, dtype, device))
        run = _Run(lazy, blocks, [_on(device, batch) for batch in batches], work, spill)
        run.prune(pruner.groups, on_layer)
        manifest = _write(source, output, config, shards, work, limit)
    work.remove()
    return manifest


def _refuse_finished(output: Path) -> None:
    """Raise `RecipeError` if a folder holds a model and no run that goes on there: hours of work may be in it."""
    held = [path.name for path in sorted(output.glob("*.safetensors"))] if output.is_dir() else []
    if held and not (output / NAME).is_dir():
        raise RecipeError(
            f"output {output} holds a model already ({held[0]}), finished or of something else: choose another folder, "
            "or remove that one"
        )


def _compute_dtype(shards: Shards, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    stored = {entry.dtype for entry in shards.headers.values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32


def _on(device: torch.device, batch: Batch) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _blocks(lazy: LazyModel, pruner: Pruner) -> list[str]:
    """Return the names of the blocks up to the last one with a layer that is pruned.

    Raises:
        RecipeError: if the config cannot be met block by block, or layers are not all in one list of blocks.
    """
    if pruner.forms or any(group.compression is not None for group in pruner.groups):
        raise RecipeError(
            "`compress` gives layers another form, which sparsify_checkpoint cannot. Use hf_sparse.sparsify"
        )
    for group in pruner.groups:
        if isinstance(group.pattern, Structure) or group.scorer.source not in ("weights", "inputs"):
            raise RecipeError(
                f"scorer '{group.scorer.name}' with pattern '{group.pattern.name}' needs the whole model, and "
                "sparsify_checkpoint holds one block. Use wanda, sparsegpt or magnitude with element, n:m or block"
            )
        if not group.selection.weight_by_weight:
            raise RecipeError(
                f"selection '{group.selection.name}' compares weights of different blocks, and sparsify_checkpoint "
                "holds one. Use 'uniform', 'per_row' or 'owl'"
            )
    names = [name for group in pruner.groups for name in group.layers]
    lists = [prefix for prefix in block_prefixes(lazy.model) if any(name.startswith(prefix) for name in names)]
    if len(lists) != 1 or not all(name.startswith(lists[0]) for name in names):
        raise RecipeError(
            f"the layers to prune are not in one list of blocks but in {lists or 'none'}: sparsify_checkpoint goes "
            "along one stack of blocks. Use hf_sparse.sparsify, or exclude what is outside"
        )
    unread = [name for name in names if f"{name}.weight" not in lazy.keys]
    if unread:
        raise RecipeError(
            f"'{unread[0]}.weight' is not stored as it is in memory, so it cannot be written back. Exclude it, or use "
            "hf_sparse.sparsify"
        )
    last = max(int(name[len(lists[0]) :].partition(".")[0]) for name in names)
    return [f"{lists[0]}{number}" for number in range(last + 1)]


class _Run:
    """Blocks of a lazy model, one after the other."""

    def __init__(self, lazy: LazyModel, names: list[str], batches: list[Batch], work: WorkFolder, spill: bool) -> None:
        self.lazy, self.names, self.batches, self.work, self.spill = lazy, names, batches, work, spill
        self.model, self.layers = lazy.model, names
        lazy.load_rest(names)

    def prune(self, groups: Sequence[PruningGroup], on_layer: OnLayer | None) -> None:
        """Prune the blocks that are not finished."""
        self._prepare_outliers(groups)
        tasks = tasks_of(groups, {})
        bar = tqdm(total=len(self.names), desc="Pruning block by block", initial=self.work.done, disable=None)
        with bar:
            for index, step in self._walk(self.work.done, self.work.activations if self.spill else None):
                prune_block(step, tasks, on_layer)
                weights = self._rounded(step.name, tasks)
                step.advance()
                self.work.save_block(index, weights)
                bar.update()

    def steps(self) -> Iterator[Step]:
        """Yield all blocks as they are in the checkpoint."""
        for _, step in self._walk(0, None):
            yield step

    def _walk(self, done: int, spill: Path | None) -> Iterator[tuple[int, ChainStep]]:
        """Yield each block that is not finished, loaded; the one before must have been advanced over."""
        if done == len(self.names):
            return
        self.lazy.load_block(self.names[0])
        blocks = [self.model.get_submodule(name) for name in self.names]
        recording = record(self.model, blocks, self.batches)
        if recording is None:
            raise RecipeError(
                f"the blocks from '{self.names[0]}' on do not hand their hidden states straight to each other, so they "
                "cannot be loaded one by one. Use hf_sparse.sparsify"
            )
        self.lazy.unload(self.names[0])
        chain = Chain(self.names, blocks, recording, self.batches, spill, done, self.lazy.device)
        for index in range(chain.done, len(self.names)):
            block = self.lazy.load_block(self.names[index])
            if index < done:
                self._restore(index)
                chain.advance(block, recording.calls[index])
            else:
                yield index, ChainStep(chain, index, last=index + 1 == len(self.names))
            chain.drop_before()
            self.lazy.unload(self.names[index])
        chain.activations.clear()

    def _restore(self, index: int) -> None:
        """Put the pruned weights of a finished block into the block."""
        names = {key: name for name, key in self.lazy.keys.items()}
        for key, weight in self.work.load_block(index).items():
            parameter = self.model.get_parameter(names[key])
            parameter.data.copy_(weight)

    def _rounded(self, block: str, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
        """Round the pruned weights of a block to the type of the checkpoint, and return them by key."""
        found = {}
        for name, task in tasks.items():
            if name.startswith(f"{block}."):
                key = self.lazy.keys[f"{name}.weight"]
                stored = self.lazy.shards.get(key).dtype
                weight = task.layer.weight.data
                found[key] = weight.to(stored).cpu()
                weight.copy_(found[key])
        return found

    def _prepare_outliers(self, groups: Sequence[PruningGroup]) -> None:
        path = self.work.path / "outliers.json"
        for number, group in enumerate(groups):
            if not isinstance(group.selection, Owl):
                continue
            known: dict[str, Any] = read_json(path) or {}
            if str(number) not in known:
                known[str(number)] = outlier_shares(self, group.layers, group.selection.outlier)
                write_text(path, json.dumps(known) + "\n")
            shares = [float(known[str(number)][unit.members[0].layer_name]) for unit in group.units]
            group.selection.prepare_outliers(shares, [unit.module.weight.numel() for unit in group.units])


def _write(
    source: Path, output: Path, config: SparsityConfig, shards: Shards, work: WorkFolder, limit: float
) -> Manifest:
    """Write all tensors into the output folder: the pruned ones packed, the others as they are."""
    entries: dict[str, TensorEntry] = {}
    targets: list[str] = []
    with staged(output, writes=True) as folder:
        writer = ShardWriter(Path(folder), limit)
        for index in range(work.done):
            for key, (entry, parts) in work.packed(index).items():
                entries[key] = entry
                targets.append(key)
                writer.add({key + suffix: part for suffix, part in parts.items()})
        for key in sorted(shards.headers):
            if key not in entries:
                entries[key], parts = encode(shards.get(key), "dense")
                writer.add({key + suffix: part for suffix, part in parts.items()})
        manifest = Manifest(dict(sorted(entries.items())), tuple(sorted(targets)))
        writer.finish({MANIFEST_KEY: manifest.to_json()})
        plain: dict[str, Any] = read_json(source / "config.json") or {}
        plain["quantization_config"] = SparseConfig(config, manifest).to_dict()
        text = json.dumps(plain, indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")
        copy_small(source, weight_files(source), Path(folder))
    return manifest
