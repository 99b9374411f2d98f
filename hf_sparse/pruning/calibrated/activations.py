"""The hidden states between two blocks, one tensor for each batch: in memory, or in files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ...formats.safetensors_io import reading, writing
from ...utils.atomic_io import replace_file

_KEY = "hidden_states"


class Activations:
    """Hidden states that go into one block, by batch.

    Args:
        count: number of batches.
        folder: for one file a batch; None = in memory.
        device: of what `get` returns, while memory is that of the CPU; None = tensors stay where they are.
    """

    def __init__(self, count: int, folder: Path | None = None, device: torch.device | None = None) -> None:
        self.count, self.folder, self.device = count, folder, device
        self._held: list[Tensor | None] = [None] * count
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, index: int) -> Tensor:
        """Return those of a batch.

        Raises:
            CheckpointError: if their file is missing or corrupted.
        """
        if self.folder is not None:
            path = self._path(index)
            with reading(path):
                found = load_file(path)
            if list(found) != [_KEY]:
                raise CheckpointError(f"{path} must hold '{_KEY}', got {sorted(found)}")
            return found[_KEY] if self.device is None else found[_KEY].to(self.device)
        held = self._held[index]
        if held is None:
            raise CheckpointError(f"there are no hidden states of batch {index}")
        return held if self.device is None else held.to(self.device)

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep those of a batch."""
        if self.folder is None:
            self._held[index] = hidden.detach() if self.device is None else hidden.detach().cpu()
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
