"""The files of a model in a folder: which hold its weights, whether all are there, and which may be published.

Folders are untrusted input. Files are found by listing the folder, never by a path that a file names. An index is not
read to find them, only verified before others read it: transformers on loading, or whoever downloads the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from ..utils.atomic_io import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.(?P<suffix>safetensors|bin)")


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the model: the file itself, or those of a folder that transformers would load.

    Raises:
        CheckpointError: if there are none, or a shard is missing.
    """
    if path.is_file():
        return [path]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = safetensors_files(path)
    shards = [file for file in files if (match := _SHARD.fullmatch(file.name)) and match["name"] == "model"]
    if not shards and len(files) == 1:
        return files
    if not shards:
        names = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"folder {path} must hold one model, or a file {SINGLE}: name one of {names}")
    return shards


def safetensors_files(folder: Path) -> list[Path]:
    """Return all safetensors files of a folder.

    Raises:
        CheckpointError: if there are none, or shards are missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no file or folder {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"folder {folder} holds no .safetensors file")
    check_shards(files)
    return files


def pickled_files(folder: Path) -> list[Path]:
    """Return the files in which torch before safetensors kept a model: `pytorch_model.bin`, or its shards; often none.

    Raises:
        CheckpointError: if a shard is missing.
    """
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    stem = PICKLED.removesuffix(".bin")
    files = [path for path in sorted(folder.glob(f"{stem}-*.bin")) if _SHARD.fullmatch(path.name)]
    check_shards(files)
    return files


def check_shards(files: Iterable[Path]) -> None:
    """Raise unless files named as shards, `NAME-00001-of-00005.safetensors` (or `.bin`), are complete sets.

    Raises:
        CheckpointError: naming one that is missing.
    """
    sets: dict[tuple[str, str], dict[int, set[int]]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            totals = sets.setdefault((match["name"], match["suffix"]), {})
            totals.setdefault(int(match["total"]), set()).add(int(match["number"]))
    for (name, suffix), totals in sets.items():
        if len(totals) > 1:
            several = " and ".join(map(str, sorted(totals)))
            raise CheckpointError(f"the shards {name}-*.{suffix} are of several checkpoints, of {several} files")
        ((total, numbers),) = totals.items()
        for number in numbers:
            if not 1 <= number <= total:
                raise CheckpointError(f"there is no shard {number} of {total}, as in {name}-{number:05}-of-{total:05}")
        if len(numbers) != total:
            lost = next(number for number in range(1, total + 1) if number not in numbers)
            raise CheckpointError(
                f"the checkpoint is not complete: {len(numbers)} of {total} shards are there, and "
                f"{name}-{lost:05}-of-{total:05}.{suffix} is missing"
            )


def check_index(folder: Path, exist: bool = True) -> None:
    """Raise unless every index of shards names files of its folder: transformers follows any path that stands there.

    Args:
        exist: whether the files must exist; an old index next to a single file does no harm until it is published.

    Raises:
        CheckpointError: naming the index and the entry.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        weight_map = (read_json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} must have a mapping `weight_map` from tensors to files")
        for name in sorted(set(weight_map.values())):
            if not name or re.search(r"[/\\\0]", name) or name in (".", ".."):
                raise CheckpointError(f"{index} names {name!r:.80}, which is not a file of its folder")
            if exist and not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name!r:.80}, and there is no such file in the folder")


def check_one_folder(files: Iterable[str]) -> None:
    """Raise unless the files that an index has led to are in one folder.

    Raises:
        CheckpointError: naming two that are not.
    """
    files = list(files)
    for file in files[1:]:
        if Path(file).absolute().parent != Path(files[0]).absolute().parent or ".." in Path(file).name:
            raise CheckpointError(f"the files of a checkpoint must be in one folder, got {files[0]} and {file}")


def check_link(path: Path) -> None:
    """Raise if a file of a folder is a link that leads out of it: what is read from there must not be published.

    Raises:
        CheckpointError: naming the target.
    """
    if (target := leads_out(path)) is not None:
        raise CheckpointError(f"{path} is a link to {target}, outside of its folder: copy the file here, or remove it")


def leads_out(path: Path) -> Path | None:
    """Return the target of a link that leads out of its folder, or None.

    A snapshot in the cache of the Hub, `snapshots/REVISION/FILE`, consists of links to the blobs of the same
    repository; these count as inside.
    """
    folder, target = path.parent.resolve(), path.resolve()
    # Not resolved once more: a folder `blobs` that is a link itself leads out, too.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    return None if folder in target.parents or target.parent == blobs else target
