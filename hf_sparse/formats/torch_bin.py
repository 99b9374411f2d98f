"""Read the `.bin` files that torch wrote before safetensors: pickles, of which only tensors are taken.

`torch.load(weights_only=True)` executes nothing: it knows the few names that a state dict needs and refuses all others.
Untrusted files can do harm without code too, so a file is refused if it is compressed (it could expand without bound),
or if a tensor is larger than the bytes that it is a view of (a stride of 0 makes one element a terabyte).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..utils.atomic_io import require_regular
from ..utils.text import shorten
from .codecs.base import DTYPE_NAMES
from .safetensors_io import Stored

_NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training loops keep a state dict among other things."""
_MOST_SHARING = 8
"""Several tensors may share their bytes (tied weights), but not so many that a small file stands for a large one."""


class TorchTensors:
    """All tensors of several `.bin` files, in memory (mapped where the file allows it).

    Args:
        headers: type, shape and size of each tensor, by key.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.headers = {key: _stored(key, tensor) for key, tensor in tensors.items()}

    def get(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[key].detach().contiguous()

    def ties(self) -> dict[str, str]:
        """Return each key whose tensor is that of an earlier key, with that key."""
        first: dict[Any, str] = {}
        ties = {}
        for key, tensor in self._tensors.items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and first.setdefault(place, key) != key:
                ties[key] = first[place]
        return ties


def read_torch_bin(paths: Sequence[Path]) -> TorchTensors:
    """Read the state dict in one file, or in all shards of one.

    Raises:
        CheckpointError: if a file is truncated, holds anything but tensors (code is never run), or claims more than its
            size; or if two files hold the same key.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        tensors = _load(path)
        for key in tensors.keys() & found.keys():
            raise CheckpointError(f"tensor {shorten(key)} is in two files of {path.parent}")
        found.update(tensors)
    return TorchTensors(found)


def _load(path: Path) -> dict[str, Tensor]:
    zipped = True
    try:
        require_regular(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_stored(path)
        # Only the newer of the two formats can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001  a hostile pickle can make the reader raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "Unsupported" in str(error) or "weights_only" in str(error):
            reason = f"it is a pickle with more than tensors in it, which could run code: {_refused(str(error))}"
        elif not zipped:
            reason = f"it is not a file of torch.save, or is corrupted ({shorten(reason)})"
        raise CheckpointError(
            f"cannot read {path}: {reason}. Nothing was executed. Download the file again, or save the model as "
            "safetensors with the program that wrote it"
        ) from None
    state = _state_dict(content, path)
    _check_sizes(state, path)
    return state


def _check_stored(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{path} is compressed, which torch.save never does; it could expand to any size")


def _refused(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return shorten(lines[0] if lines else text, 160)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of what was loaded, also from the checkpoint of a training loop that holds a state dict."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = type(value).__name__
            raise CheckpointError(f"{path} must hold tensors by name only, got {what} under {shorten(key)}")
    if not content:
        raise CheckpointError(f"{path} holds no tensor")
    return {key: value.resolve_conj().resolve_neg() for key, value in content.items()}


def _check_sizes(state: Mapping[str, Tensor], path: Path) -> None:
    total = 0
    for key, tensor in state.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: {shorten(key)} is {tensor.dtype}, {tensor.layout} on {tensor.device}; only "
                "plain dense tensors with values are read"
            )
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {shorten(key)} of shape {tuple(tensor.shape)} is larger than the bytes it is stored in"
            )
    if total > _MOST_SHARING * max(os.path.getsize(path), 1 << 16):
        raise CheckpointError(f"{path} claims {total} bytes of tensors, many times its own size")


def _stored(key: str, tensor: Tensor) -> Stored:
    return Stored(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
