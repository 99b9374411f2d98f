"""Safetensors files: read without trust, written so that an interruption never costs the old file.

Everything that a header and a manifest claim is checked against each other, and against the length of the file, before
a tensor is touched. Reading never follows a path that a file names.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from ..errors import CheckpointError, SparsityError
from ..registry import Spec
from ..utils.atomic_io import PathLike, replace_file, require_regular
from .codecs import decode, encode, encode_all, layout, verify
from .manifest import ITEM_BYTES, MAX_BYTES, Manifest, TensorEntry, without_repeats

MANIFEST_KEY = "hf_sparse"
"""Where the header of a file keeps the manifest."""


class Stored(NamedTuple):
    """A tensor as a file holds it: type by its safetensors name, shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Header(NamedTuple):
    """The header of a file: its metadata, and each tensor by key."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


@contextlib.contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turn what safetensors and the system find wrong with a file into a `CheckpointError` that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error}") from error


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Turn what safetensors and the system say while files are replaced, as of a full disk, into a `SparsityError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # of a connection, as in a push while saving
            raise
        raise SparsityError(f"cannot write {os.fspath(path)}: {error}. The old files are unchanged") from error


@contextlib.contextmanager
def open_safetensors(path: PathLike) -> Iterator[Any]:
    """Open a file, to read single tensors.

    Raises:
        CheckpointError: if it is not a regular file, or not valid.
    """
    with contextlib.ExitStack() as stack:
        with reading(path):
            require_regular(path)
            file = stack.enter_context(safe_open(path, framework="pt"))
        try:
            yield file
        except SafetensorError as error:  # an OSError may be of another file
            raise CheckpointError(f"cannot read {os.fspath(path)}: {error}") from error


def write_safetensors(tensors: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str]) -> None:
    """Write a file with the metadata that transformers needs.

    Raises:
        OSError: if it cannot be written; `writing` makes words of it.
    """
    try:
        safetensors_torch.save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), os.fspath(path)) from error


def read_header(path: PathLike) -> Header:
    """Read the header of a file, and no tensor.

    Raises:
        CheckpointError: if the file is missing or truncated, or its header is not valid, names a key twice, or does not
            fit the length of the file.
    """
    # safetensors checks length, offsets, gaps, overlaps, shapes and its limit of 100 MB.
    with open_safetensors(path), open(path, "rb") as file:
        content = file.read(int.from_bytes(file.read(8), "little"))
    try:
        # safetensors takes the last of several entries with one name, where another reader may take the first.
        data = json.loads(content, object_pairs_hook=without_repeats)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: its header {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error}") from None
    metadata = data.pop("__metadata__", None) or {}
    return Header(metadata, {key: _stored(key, entry, path) for key, entry in data.items()})


def _stored(key: str, entry: Mapping[str, Any], path: PathLike) -> Stored:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{os.fspath(path)}: tensor {key!r} has the unknown type {dtype}")
    # safetensors lets any side stand next to one of 0, also one that no tensor can have.
    if math.prod(max(side, 1) for side in shape) * ITEM_BYTES[dtype] > MAX_BYTES:
        raise CheckpointError(f"{os.fspath(path)}: tensor {key!r} has a shape that no tensor can have: {shape}")
    return Stored(dtype, shape, math.prod(shape) * ITEM_BYTES[dtype])


def read_manifest(path: PathLike) -> Manifest | None:
    """Read the manifest in the header of a file; None if hf_sparse did not write it.

    Raises:
        CheckpointError: as `read_header`, or if the manifest is not valid or from a newer version.
    """
    return manifests_in({path: read_header(path)})[path]


def manifests_in(headers: Mapping[PathLike, Header]) -> dict[PathLike, Manifest | None]:
    """Return the manifest in each header, or None; equal ones are parsed once.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    parsed: dict[str | None, Manifest | None] = {None: None}
    for path, header in headers.items():
        text = header.metadata.get(MANIFEST_KEY)
        if text in parsed:
            continue
        assert text is not None
        try:
            parsed[text] = Manifest.from_json(text)
        except CheckpointError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    return {path: parsed[header.metadata.get(MANIFEST_KEY)] for path, header in headers.items()}


def check_files(paths: PathLike | Iterable[PathLike], manifest_from_config: Manifest | None = None) -> Manifest:
    """Verify all files of a checkpoint together, before anything is loaded.

    Every file must hold the same manifest, and the files together exactly the tensors that it demands, each in the type
    and shape that its codec derives from its entry. Dense tensors are verified to the last bit, in place (the file is
    mapped, not read into memory); packed ones are verified when `codecs.decode` unpacks them.

    Args:
        paths: the file, or all shards in any order.
        manifest_from_config: the manifest of `config.json`, which must be the same.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file or the tensor and what is wrong with it.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    headers = {path: read_header(path) for path in paths}
    if len(headers) != len(paths):
        raise CheckpointError(f"a file is listed twice: {', '.join(sorted(str(path) for path in paths))}")
    return check_headers(headers, manifests_in(headers), manifest_from_config)


def check_headers(
    headers: Mapping[PathLike, Header],
    manifests: Mapping[PathLike, Manifest | None],
    manifest_from_config: Manifest | None = None,
) -> Manifest:
    """Verify files whose headers have been read, as `check_files` does."""
    manifest, where, found = manifest_from_config, "config.json", {}
    home: dict[str, PathLike] = {}
    for path, (_, tensors) in headers.items():
        own = manifests[path]
        if own is None:
            raise CheckpointError(
                f"{os.fspath(path)} has no hf_sparse manifest in its header; load it as a dense model"
            )
        if manifest is not None and own is not manifest and own != manifest:
            raise CheckpointError(f"{os.fspath(path)} has another manifest than {where}: files of two checkpoints")
        manifest, where = own, os.fspath(path)
        for key in tensors.keys() & home.keys():
            raise CheckpointError(f"tensor '{key}' is in two files: {os.fspath(home[key])} and {os.fspath(path)}")
        home.update(dict.fromkeys(tensors, path))
        found.update(tensors)
    if manifest is None or not headers:
        raise CheckpointError("there are no files to check")
    _check_parts(manifest, found)
    _verify_dense(manifest, home)
    return manifest


def _check_parts(manifest: Manifest, found: Mapping[str, Stored]) -> None:
    """Raise unless the files hold exactly the parts that the manifest demands."""
    owner: dict[str, str] = {}
    for key, entry in manifest.tensors.items():
        for suffix, part in layout(entry, key).items():
            name = key + suffix
            if name in owner:
                raise CheckpointError(f"'{name}' would have to hold both '{key}' and '{owner[name]}'")
            owner[name] = key
            if name not in found:
                raise CheckpointError(f"tensor '{key}' lacks its part '{name}'; is a shard missing?")
            if found[name][:2] != (part.dtype, part.shape):
                raise CheckpointError(
                    f"tensor '{key}': '{name}' must be {part.dtype} of shape {part.shape} for codec {entry.codec}, and "
                    f"is {found[name].dtype} of shape {found[name].shape}"
                )
    if unknown := found.keys() - owner.keys():
        raise CheckpointError(f"the manifest does not list {', '.join(map(repr, sorted(unknown)[:3]))}")


def _verify_dense(manifest: Manifest, home: Mapping[str, PathLike]) -> None:
    dense: dict[PathLike, list[str]] = {}
    for key, entry in manifest.tensors.items():
        if entry.codec == "dense":
            dense.setdefault(home[key], []).append(key)
    for path, keys in dense.items():
        with open_safetensors(path) as file:
            for key in keys:
                verify(manifest.tensors[key], file.get_tensor(key), key)


def settle_header(path: PathLike) -> None:
    """Sort the metadata in the header of a file, in place, so that equal models are equal files.

    safetensors writes the metadata in an order that changes from process to process.
    """
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        settled = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(settled) <= size:  # always, unless safetensors escapes a character otherwise; the file is right as it is
            file.seek(8)
            file.write(settled.ljust(size))


def save_file(
    tensors: Mapping[str, Tensor], path: PathLike, targets: Sequence[str] = (), codec: Spec = "auto"
) -> Manifest:
    """Write tensors into one file, each packed if that makes it smaller.

    Args:
        tensors: by checkpoint key. Tied tensors (the same memory under two keys) belong in once.
        path: of the file, replaced completely or not at all.
        targets: keys of the weights for which sparsity was requested.
        codec: "auto", "smallest" or one codec for all, see `codecs.encode`; "dense" packs none.

    Returns:
        The manifest, which is also in the header of the file.

    Raises:
        RecipeError: for an unknown codec.
        CheckpointError: for a type of tensor that the format does not know, or a target that is not a tensor.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = save_file({"weight": torch.eye(64)}, f"{folder}/model.safetensors")
        ...     torch.equal(load_file(f"{folder}/model.safetensors")["weight"], torch.eye(64))
        True
    """
    entries: dict[str, TensorEntry] = {}
    stored: dict[str, Tensor] = {}
    packed = encode_all(tensors.values(), itertools.repeat(codec))
    for (key, tensor), (entry, parts) in zip(tensors.items(), packed, strict=True):
        if any(key + suffix in tensors for suffix in parts if suffix):  # the model has a tensor of that name itself
            entry, parts = encode(tensor, "dense")
        entries[key] = entry
        stored.update({key + suffix: part for suffix, part in parts.items()})
    manifest = Manifest(entries, targets=tuple(targets))
    with writing(path), replace_file(path) as temporary:
        write_safetensors(stored, temporary, {MANIFEST_KEY: manifest.to_json()})
        settle_header(temporary)
    return manifest


def load_file(path: PathLike) -> dict[str, Tensor]:
    """Read and unpack all tensors of a file that `save_file` wrote.

    Raises:
        CheckpointError: if anything about the file is not exactly as it was written.
    """
    manifest = check_files(path)
    with open_safetensors(path) as file:
        return {
            key: decode(entry, {suffix: file.get_tensor(key + suffix) for suffix in layout(entry, key)}, key)
            for key, entry in manifest.tensors.items()
        }
