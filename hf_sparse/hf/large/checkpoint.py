"""`sparsify_checkpoint`: one-shot pruning of a checkpoint, block by block, with one block in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...config.sparsity import SparsityConfig
from ...errors import RecipeError
from ...formats.codecs import encode
from ...formats.manifest import Manifest, TensorEntry
from ...formats.model_folder import weight_files
from ...formats.safetensors_io import MANIFEST_KEY
from ...formats.sharding import Shards, ShardWriter, opened
from ...modeling.blocks import block_prefixes
from ...pruning.calibrated.tasks import OnLayer
from ...pruning.patterns import Structure
from ...pruning.pruner import Pruner
from ...utils.atomic_io import read_json
from ...utils.validation import check_batches
from ..conversion.convert import SHARD_SIZE, copy_small, shard_limit
from ..quantization.config import SparseConfig
from ..quantization.saving import staged
from .block_run import BlockRun
from .device_map import DeviceMap, check_device_map, place
from .lazy_model import LazyModel, source_files
from .work_folder import NAME, WorkFolder, run_facts

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


def sparsify_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SparsityConfig | Mapping[str, Any],
    batches: Iterable[Batch] | None = None,
    *,
    device_map: DeviceMap = "cpu",
    dtype: torch.dtype | None = None,
    spill: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    on_layer: OnLayer | None = None,
) -> Manifest:
    """Prune a checkpoint in one shot without ever holding the whole model, and write it packed.

    In memory are the embeddings, one block, the hidden states of all batches, and the statistics of the block's inputs.
    Of stacked experts (`targets: ["*.experts"]`), SparseGPT and reconstructions gather the products of the inputs of as
    many at a time as fit into 4 GiB, at least one, and the block runs again for the next ones. After each block its
    pruned weights are on disk, in a hidden folder of the output. A run that was interrupted goes on where it was when
    it is repeated, and its result is the same to the last bit: from the hidden states on disk with `spill`; without,
    finished blocks are run once more for them.

    Args:
        source: folder of a dense checkpoint of a model with one stack of blocks, a decoder or an encoder, or with an
            encoder and a decoder behind it; then the encoder's outputs of all batches are in memory too.
        output: folder that is written.
        config: `SparsityConfig`, or a mapping with its keys; scorers wanda, sparsegpt, magnitude and random, with
            selections that take weights one by one.
        batches: keyword arguments of the model; None for scorers of weights alone (magnitude, random), with which no
            block is run, and only the weights of one block are in memory.
        device_map: where blocks are calibrated and pruned: "auto" (an accelerator if there is one, else the CPU), one
            device as in "cpu", "cuda:1" or 1, or a mapping from names of modules to devices that covers the model, as
            of `from_pretrained`. What is outside of the blocks is computed where the embeddings are, and hidden states
            move between devices. The head is not computed.
        dtype: of weights and hidden states while they are computed with; None = float64 for a checkpoint in float64,
            else float32 if all is on the CPU, else that of the checkpoint. Weights are written in the type in which the
            checkpoint has them.
        spill: keep hidden states in files.
        max_shard_size: of a file; a number of bytes or a text as in "2GB".
        on_layer: called with the `LayerUpdate` of each layer.

    Returns:
        The manifest of what was written.

    Raises:
        RecipeError: if the config cannot be met block by block, output is the source, a model is there already, or
            `device_map` names what is not there, covers not all, or divides a block.
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
    if batches is not None:
        check_batches(batches)
        batches = list(batches)
    devices = check_device_map(device_map)
    with opened(files) as shards, torch.no_grad():
        dtype = dtype or _compute_dtype(shards, devices)
        lazy = LazyModel(source, shards, dtype)
        pruner = Pruner(lazy.model, config)
        batches = _needed(pruner, batches)
        blocks = _blocks(lazy, pruner)
        places = place(lazy.model, [name for stack in blocks for name in stack], devices)
        facts = run_facts(config.to_dict(), files, batches or (), dtype, list(places.blocks.values()))
        work = WorkFolder(output, facts)
        run = BlockRun(lazy, blocks, batches, places, work, spill)
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


def _needed(pruner: Pruner, batches: list[Batch] | None) -> list[Batch] | None:
    """Return the batches; None where nothing looks at inputs of layers.

    Raises:
        RecipeError: if something does, and there are none.
    """
    looking = next((group for group in pruner.groups if group.by_blocks), None)
    if looking is None:
        if batches is not None:
            logger.warning("`batches` are not used: no scorer, selection or reconstruction looks at inputs of layers")
        return None
    if not batches:
        wants = looking.scorer.name if looking.scorer.source == "inputs" else "a selection or reconstruction"
        found = "there are none" if batches is None else "`batches` is empty"
        raise RecipeError(
            f"{wants} looks at the inputs of layers, for which each block is run on data, and {found}: give some "
            "(hf-sparse prune: --data), or use scorer 'magnitude' alone, which needs none"
        )
    return batches


def _compute_dtype(shards: Shards, devices: Mapping[str, torch.device]) -> torch.dtype:
    stored = {entry.dtype for entry in shards.headers.values()}
    if stored & {"F64", "F32", "BF16", "F16"} == {"F64"}:  # not for a table of angles beside weights in bfloat16
        return torch.float64
    if all(device.type == "cpu" for device in devices.values()):
        return torch.float32
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32


def _blocks(lazy: LazyModel, pruner: Pruner) -> list[list[str]]:
    """Return the names of the blocks up to the last one with a layer that is pruned, by the stack they are in.

    Raises:
        RecipeError: if the config cannot be met block by block, or layers are outside of the stacks.
    """
    if pruner.forms or any(group.compression is not None for group in pruner.groups):
        raise RecipeError(
            "`compress` gives layers another form, which sparsify_checkpoint cannot. Use hf_sparse.sparsify"
        )
    for group in pruner.groups:
        group.check_observable()
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
    if not _is_in_order(lazy.model, lists) or not all(name.startswith(tuple(lists)) for name in names):
        raise RecipeError(
            f"the layers to prune are not in one list of blocks but in {lists or 'none'}: sparsify_checkpoint goes "
            "along one stack of blocks, or an encoder and then its decoder. Use hf_sparse.sparsify, or exclude what is "
            "outside"
        )
    unread = lazy.unwritable(member.name for group in pruner.groups for member in group.members)
    if unread:
        raise RecipeError(
            f"'{unread[0]}' is not stored as it is in memory, and cannot be brought back into that form. Exclude it, "
            "or use hf_sparse.sparsify"
        )
    found = []
    for number, prefix in enumerate(lists):
        pruned = [int(name[len(prefix) :].partition(".")[0]) for name in names if name.startswith(prefix)]
        whole = number + 1 < len(lists)  # a decoder needs what comes out of all blocks of its encoder
        last = len(lazy.model.get_submodule(prefix[:-1])) - 1 if whole else max(pruned)
        found.append([f"{prefix}{index}" for index in range(last + 1)])
    return found


def _is_in_order(model: Any, lists: Sequence[str]) -> bool:
    """Return whether one list of blocks is given, or those of an encoder and of the decoder behind it."""
    if len(lists) != 2 or not model.config.is_encoder_decoder:
        return len(lists) == 1
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    parts = [names.get(id(part), "?") for part in (model.get_encoder(), model.get_decoder())]
    return all(name.startswith(part) for name, part in zip(lists, parts, strict=True))


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
