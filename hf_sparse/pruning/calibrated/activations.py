"""The hidden states between two blocks, one tensor for each batch: in memory, or in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ...formats.safetensors_io import reading, writing
from ...utils.atomic_io import replace_file

_KEY = "hidden_states"


def moved(value: Any, device: torch.device | None) -> Any:
    """Return what a block is called with, or returns, on a device: tensors, also in tuples, lists and dictionaries.

    Args:
        device: None = everything stays where it is.
    """
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


class Activations:
    """Hidden states that go into one block, by batch.

    Args:
        count: number of batches.
        folder: for one file a batch; None = in memory.
        on_cpu: keep them in the memory of the CPU; else tensors stay where they are.
    """

    def __init__(self, count: int, folder: Path | None = None, on_cpu: bool = False) -> None:
        self.count, self.folder, self.on_cpu = count, folder, on_cpu
        self._held: list[Tensor | None] = [None] * count
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, index: int, device: torch.device | None = None) -> Tensor:
        """Return those of a batch.

        Args:
            device: where they are needed; None = where they are kept.

        Raises:
            CheckpointError: if their file is missing or corrupted.
        """
        if self.folder is not None:
            path = self._path(index)
            with reading(path):
                found = load_file(path)
            if list(found) != [_KEY]:
                raise CheckpointError(f"{path} must hold '{_KEY}', got {sorted(found)}")
            read: Tensor = moved(found[_KEY], device)
            return read
        held = self._held[index]
        if held is None:
            raise CheckpointError(f"there are no hidden states of batch {index}")
        hidden: Tensor = moved(held, device)
        return hidden

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep those of a batch."""
        if self.folder is None:
            self._held[index] = hidden.detach().cpu() if self.on_cpu else hidden.detach()
            return
        path = self._path(index)
        with writing(path), replace_file(path) as temporary:
            save_file({_KEY: hidden.detach().contiguous()}, temporary)

    def drop(self, index: int) -> None:
        """Free the memory of a batch; a file stays until `clear`."""
        self._held[index] = None

    def clear(self) -> None:
        """Remove everything."""
        self._held = [None] * self.count
        if self.folder is not None and self.folder.is_dir():
            for index in range(self.count):
                self._path(index).unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def complete(self) -> bool:
        """Whether every batch is there."""
        if self.folder is not None:
            return all(self._path(index).is_file() for index in range(self.count))
        return all(held is not None for held in self._held)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:05}.safetensors"
