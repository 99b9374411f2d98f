"""`save_pretrained` of a model that is divided over processes (FSDP2, tensor parallelism): all of them pack and write.

Sharded tensors are gathered one at a time, each process encodes about as many bytes as the others and writes them to
their places in the files, which are those that one process would write. No process ever holds the whole model: the peak
is its share, its part of the packed model, and one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import SparsityError
from ...formats.codecs import layout
from ...formats.codecs.base import TORCH_DTYPES
from ...formats.manifest import Manifest
from ...formats.model_folder import INDEX
from ...formats.safetensors_io import MANIFEST_KEY
from ...formats.shared_file import FilePlan, begin_file, fill_file, plan_file
from .pack_state import Packed, Share, keys_to_save, pack_share


def is_divided(model: PreTrainedModel, state: Mapping[str, Tensor] | None) -> bool:
    """Return whether what is to be saved is divided over processes, each of which has to take part in saving it."""
    tensors = model.parameters() if state is None else state.values()
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def pack_together(
    model: PreTrainedModel, state: Mapping[str, Tensor] | None, codec: str, training: bool = True
) -> tuple[dict[str, Tensor], Manifest]:
    """Pack a share of a divided model on each process.

    Args:
        training: whether the training state of weights with masks is packed too.

    Returns:
        The tensors of this share, and the manifest of all.

    Raises:
        RecipeError: as `pack_state`, on every process.
    """
    state = model.state_dict() if state is None else state
    # Tied tensors are found by their memory, and an empty shard has none; process 0 has the first rows of all.
    keys = of_first(lambda: keys_to_save(model, state))
    plain = {key: state[key] for key in keys}
    share = Share(dist.get_rank(), dist.get_world_size())
    packed: Packed = pack_share(model, state if training else plain, plain, codec, share)
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, packed.entries)
    return packed.tensors, packed.manifest(others)


def write_together(
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    folder: Path,
    limit: int | str = "50GB",
    variant: str | None = None,
    described: bool = True,
) -> None:
    """Write the files of a model, each process its tensors.

    Args:
        tensors: of this process, from `pack_together`.
        manifest: of all.
        folder: without such files, on a file system that all processes see.
        limit: bytes of a file, as `max_shard_size` of transformers.
        variant: of the file names, as in transformers.
        described: whether the files hold the manifest; dense files for other tools do not.

    Raises:
        SparsityError: on every process, if one of them cannot write.
    """
    parts = {key + suffix: part for key, entry in manifest.tensors.items() for suffix, part in layout(entry).items()}
    metadata = {MANIFEST_KEY: manifest.to_json()} if described else {}
    pattern = f"model{'.' + variant if variant else ''}{{suffix}}.safetensors"
    sizes = {key: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype], device="meta") for key, part in parts.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=limit)
    plans = {
        folder / name: plan_file({key: parts[key] for key in keys}, metadata)
        for name, keys in split.filename_to_tensors.items()
    }
    of_first(lambda: _begin(plans, folder, split, variant))

    def fill() -> None:
        for path, plan in plans.items():
            fill_file(plan, path, tensors)

    _together(fill)


def _begin(plans: Mapping[Path, FilePlan], folder: Path, split: Any, variant: str | None) -> None:
    for path, plan in plans.items():
        begin_file(plan, path)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        name = INDEX.replace(".json", f".{variant}.json") if variant else INDEX
        (folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def of_first(work: Callable[[], Any]) -> Any:
    """Do something on process 0, and return its result on all; an error of it is raised on all."""
    return _together(work if dist.get_rank() == 0 else lambda: None)[0]


def _together(work: Callable[[], Any]) -> list[Any]:
    """Do something on every process and return the results; if one fails, all raise, so that none waits for another."""
    result, error = None, None
    try:
        result = work()
    except Exception as found:  # noqa: BLE001  of whatever kind, the others have to learn of it
        error = found
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    failed = [f"process {rank}: {text}" for rank, (_, text) in enumerate(results) if text is not None]
    if failed:
        raise SparsityError(f"the model was not saved, since another process failed ({'; '.join(failed)})")
    return [result for result, _ in results]
