"""The weight files of a checkpoint as one: read tensor by tensor from all shards, and written shard by shard."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .model_folder import INDEX, SINGLE
from .safetensors_io import Stored, open_safetensors, read_header, reading, settle_header, write_safetensors


class Shards:
    """All tensors of several files, each read when it is requested.

    Args:
        headers: type, shape and size of each tensor, by key.
    """

    def __init__(self, headers: dict[str, Stored], files: dict[str, tuple[Path, Any]]) -> None:
        self.headers = headers
        self._files = files

    def get(self, key: str) -> Tensor:
        """Map one tensor.

        Raises:
            CheckpointError: if the file cannot be read any more.
        """
        path, file = self._files[key]
        with reading(path):
            return file.get_tensor(key)

    def slice(self, key: str) -> Any:
        """Return a tensor as a safetensors slice, which is read when it is indexed.

        Raises:
            CheckpointError: if the file cannot be read any more.
        """
        path, file = self._files[key]
        with reading(path):
            return file.get_slice(key)


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[Shards]:
    """Open files together.

    Raises:
        CheckpointError: if one cannot be read, or two hold the same key.
    """
    headers: dict[str, Stored] = {}
    files: dict[str, tuple[Path, Any]] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            tensors = read_header(path)[1]
            for key in tensors.keys() & headers.keys():
                raise CheckpointError(f"tensor '{key}' is in two files: {files[key][0]} and {path}")
            headers.update(tensors)
            file = stack.enter_context(open_safetensors(path))
            files.update(dict.fromkeys(tensors, (path, file)))
        yield Shards(headers, files)


class ShardWriter:
    """Write tensors into files of a bounded size, of which one is in memory at a time.

    What the headers say can depend on all tensors (the manifest does), so it is given at the end.

    Args:
        folder: an empty one.
        limit: bytes of a file; a single tensor may be larger.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit
        self._written: list[dict[str, int]] = []
        self._waiting: dict[str, Tensor] = {}
        self._size = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one tensor, which stay together."""
        size = sum(part.nbytes for part in parts.values())
        if self._waiting and self._size + size > self.limit:
            self._flush({})
        self._waiting.update(parts)
        self._size += size

    def finish(self, metadata: Mapping[str, str]) -> list[Path]:
        """Write what is left, give every file its metadata and its name, and return the files.

        Where there are several, there is an index too, as transformers needs it.
        """
        first = len(self._written)
        self._flush(metadata)
        total = len(self._written)
        if total == 1:
            return [self._part(0).rename(self.folder / SINGLE)]
        names = [f"model-{number + 1:05}-of-{total:05}.safetensors" for number in range(total)]
        for number, name in enumerate(names):
            if number < first and metadata:
                _copy_with(metadata, self._part(number), self.folder / name)
                self._part(number).unlink()
            else:
                self._part(number).rename(self.folder / name)
        weight_map = {key: name for sizes, name in zip(self._written, names, strict=True) for key in sizes}
        size = sum(sum(sizes.values()) for sizes in self._written)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return [self.folder / name for name in names]

    def _part(self, number: int) -> Path:
        return self.folder / f"{number}.part"

    def _flush(self, metadata: Mapping[str, str]) -> None:
        path = self._part(len(self._written))
        path.touch()
        rights = path.stat().st_mode  # what the user's umask gives; safetensors gives fewer
        write_safetensors(self._waiting, path, metadata)
        path.chmod(rights)
        settle_header(path)
        self._written.append({key: part.nbytes for key, part in self._waiting.items()})
        self._waiting, self._size = {}, 0


def _copy_with(metadata: Mapping[str, str], source: Path, target: Path) -> None:
    """Copy a file, with more metadata in its header. The data are copied in pieces."""
    with source.open("rb") as old, target.open("xb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = dict(sorted({**header["__metadata__"], **metadata}.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 20)
