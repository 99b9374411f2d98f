"""What is kept of a pruning that is under way: which run it is, each finished block, and hidden states on request."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ...errors import CheckpointError
from ...formats.manifest import TensorEntry
from ...formats.safetensors_io import check_files, load_file, save_file
from ...formats.sharding import opened
from ...utils.atomic_io import read_json, write_text

NAME = ".pruning"


def run_facts(
    config: Mapping[str, Any],
    files: Sequence[Path],
    batches: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    devices: Sequence[torch.device],
) -> dict[str, Any]:
    """Return what decides the bits of a result.

    Args:
        devices: of the blocks.
    """
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(key.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(repr(value).encode())
    return {
        "version": __version__,
        "config": dict(config),
        "source": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "batches": digest.hexdigest(),
        "dtype": str(dtype),
        "device_map": [device.type for device in devices],
    }


class WorkFolder:
    """The folder, inside that of the output.

    Args:
        output: folder that is written in the end.
        facts: of this run.

    Raises:
        CheckpointError: if a run with other facts was interrupted there.
    """

    def __init__(self, output: Path, facts: Mapping[str, Any]) -> None:
        self.path = output / NAME
        recorded = read_json(self.path / "run.json") if self.path.is_dir() else None
        plain = json.loads(json.dumps(facts))
        if recorded is not None and recorded != plain:
            changed = [key for key in plain if recorded.get(key) != plain[key]]
            raise CheckpointError(
                f"{self.path} holds the finished blocks of an interrupted run with another {' and '.join(changed)}. "
                "Repeat that run to continue it, or remove the folder"
            )
        (self.path / "blocks").mkdir(parents=True, exist_ok=True)
        if recorded is None:
            write_text(self.path / "run.json", json.dumps(plain, indent=2) + "\n")

    @property
    def activations(self) -> Path:
        """Where hidden states go."""
        return self.path / "activations"

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        count = 0
        while self._block(count).is_file():
            count += 1
        return count

    @property
    def experts(self) -> dict[str, Any]:
        """How many experts the finished blocks have, and which of them no token reached: arguments of `Unreached`."""
        noted = read_json(self._experts(self.done - 1)) or {"total": 0, "missed": []}
        return {"total": int(noted["total"]), "missed": [(str(name), int(number)) for name, number in noted["missed"]]}

    def note_experts(self, index: int, total: int, missed: Sequence[tuple[str, int]]) -> None:
        """Keep the same, up to a block that is about to be finished."""
        if total:
            self._experts(index).parent.mkdir(exist_ok=True)
            write_text(self._experts(index), json.dumps({"total": total, "missed": missed}) + "\n")

    def save_block(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the pruned weights of a block, packed, by their keys in the checkpoint; written as a whole."""
        save_file(weights, self._block(index), targets=sorted(weights))

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Return the pruned weights of a finished block, dense.

        Raises:
            CheckpointError: if the file is corrupted.
        """
        return load_file(self._block(index))

    def packed(self, index: int) -> dict[str, tuple[TensorEntry, dict[str, Tensor]]]:
        """Return entry and parts of each weight of a finished block, by key."""
        path = self._block(index)
        manifest = check_files(path)
        with opened([path]) as shards:
            found = {}
            for key, entry in manifest.tensors.items():
                suffixes = [name.removeprefix(key) for name in shards.headers if _belongs(name, key, manifest.tensors)]
                found[key] = entry, {suffix: shards.get(key + suffix).clone() for suffix in suffixes}
        return found

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _experts(self, index: int) -> Path:
        return self.path / "experts" / f"{index:05}.json"

    def _block(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:05}.safetensors"


def _belongs(name: str, key: str, keys: Mapping[str, object]) -> bool:
    return name == key or (name.startswith(f"{key}_") and name not in keys)
