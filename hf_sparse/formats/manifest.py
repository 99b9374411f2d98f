"""Fact: what a checkpoint contains, tensor by tensor. (What the user requested is intent, and is in `config`.)

The manifest is plain JSON, kept in the header of every safetensors file and in `config.json`. It is untrusted input:
`from_dict` accepts exactly what FORMAT.md describes and refuses the rest before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._version import __version__
from ..errors import CheckpointError
from ..utils.text import shorten

FORMAT_VERSION = 1

ITEM_BYTES: dict[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Bytes of one element, by the name that safetensors gives the type."""

MAX_BYTES = 2**46
"""A single tensor above 64 TiB is a mistake or an attack; the limit also keeps every size inside 64 bits."""

RUNTIME_KEY = "runtime"
"""Key in `extra` of what `save_runtime` wrote: tensors as kernels read them."""

_MAX_DIMENSIONS = 32
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")
_WORD = re.compile(r"[a-z0-9_:]{1,32}")


def _keys(data: Any, required: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where} must be a mapping, got {shorten(data)}")
    for key in data:
        if key not in required and key not in optional:
            raise CheckpointError(f"{where} has the unknown key {shorten(key)}; unknown keys belong under 'extra'")
    for key in required:
        if key not in data:
            raise CheckpointError(f"{where} lacks the key '{key}'")


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be written: JSON may escape half of a character alone."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Return whether a value read from JSON is an integer from 0 to 2**63 - 1 (True is not)."""
    return type(value) is int and 0 <= value < 2**63


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Describe one tensor of a checkpoint and how it is stored.

    Args:
        codec: name of the codec that stored it.
        shape: shape of the decoded tensor.
        dtype: type of the decoded tensor, by its safetensors name ("F32", "BF16", "F8_E4M3").
        nonzeros: how many elements have at least one bit set.
        checksum: `crc32:` and eight hex digits, over type, shape and decoded bytes (little-endian, C order).
        options: the integers that the codec needs to decode, as in `{"n": 2, "m": 4}`.

    Raises:
        CheckpointError: for a value that cannot be true of any tensor.

    Example:
        >>> TensorEntry("bitmask", (2, 8), "F16", 3, "crc32:00000000").nbytes
        32
    """

    codec: str
    shape: tuple[int, ...]
    dtype: str
    nonzeros: int
    checksum: str
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.codec, str) or not _WORD.fullmatch(self.codec):
            raise CheckpointError(f"codec must be the name of a codec, got {shorten(self.codec)}")
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            raise CheckpointError(f"dtype {shorten(self.dtype)} is not one of {', '.join(ITEM_BYTES)}")
        if not isinstance(self.shape, tuple) or not all(map(is_count, self.shape)) or len(self.shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"shape must be a list of integers, got {shorten(self.shape)}")
        if math.prod(max(size, 1) for size in self.shape) * ITEM_BYTES[self.dtype] > MAX_BYTES:
            raise CheckpointError(f"shape {shorten(self.shape)} is larger than {MAX_BYTES} bytes")
        if not is_count(self.nonzeros) or self.nonzeros > self.numel:
            raise CheckpointError(f"nonzeros must be an integer in [0, {self.numel}], got {shorten(self.nonzeros)}")
        if not isinstance(self.checksum, str) or not _CHECKSUM.fullmatch(self.checksum):
            raise CheckpointError(f"checksum must be 'crc32:' and 8 hex digits, got {shorten(self.checksum)}")
        if not isinstance(self.options, Mapping) or len(self.options) > 8:
            raise CheckpointError(f"options must be a mapping from names to integers, got {shorten(self.options)}")
        for name, value in self.options.items():
            if not isinstance(name, str) or not _WORD.fullmatch(name) or not is_count(value):
                raise CheckpointError(f"option {shorten(name)} must be an integer, got {shorten(value)}")

    @property
    def numel(self) -> int:
        """Elements of the decoded tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.numel * ITEM_BYTES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; options are left out when there are none."""
        # By hand: `dataclasses.asdict` copies deeply, and saving a model calls this several times for every tensor.
        out: dict[str, Any] = {"codec": self.codec, "shape": list(self.shape), "dtype": self.dtype}
        out |= {"nonzeros": self.nonzeros, "checksum": self.checksum}
        return out | {"options": dict(self.options)} if self.options else out

    @classmethod
    def from_dict(cls, data: Any) -> TensorEntry:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        _keys(data, fields[:-1], fields[-1:], "a tensor entry")
        if not isinstance(data["shape"], list):
            raise CheckpointError(f"shape must be a list of integers, got {shorten(data['shape'])}")
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """List every tensor of a checkpoint, those stored dense too.

    Args:
        tensors: entries by checkpoint key. A file that holds a key the manifest lacks is refused.
        targets: keys of the weights for which sparsity was requested, also those that are smallest when dense.
        version: version of the format.
        generator: version of the hf_sparse that wrote it.
        extra: anything else, in plain JSON; readers ignore what they do not know in here.

    Raises:
        CheckpointError: if a target is not among the tensors.

    Example:
        >>> entry = TensorEntry("dense", (3,), "F32", 3, "crc32:0badcafe")
        >>> manifest = Manifest({"bias": entry})
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    tensors: Mapping[str, TensorEntry]
    targets: tuple[str, ...] = ()
    version: int = FORMAT_VERSION
    generator: str = dataclasses.field(default=__version__)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.generator, str) or len(self.generator) > 100:
            raise CheckpointError(f"generator must be the version of hf_sparse, got {shorten(self.generator)}")
        if not isinstance(self.extra, Mapping):
            raise CheckpointError(f"extra must be a mapping, got {shorten(self.extra)}")
        for text in (self.generator, *self.tensors):
            if not _is_text(text):
                raise CheckpointError(f"{shorten(text)} is not text that a file can hold")
        if not all(isinstance(key, str) for key in self.targets) or len(set(self.targets)) != len(self.targets):
            raise CheckpointError(f"targets must be a list of different keys, got {shorten(self.targets)}")
        for key in self.targets:
            if key not in self.tensors:
                raise CheckpointError(f"target {shorten(key)} is not among the tensors")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; what is empty is left out."""
        out: dict[str, Any] = {"version": self.version, "generator": self.generator}
        if self.targets:
            out["targets"] = list(self.targets)
        out["tensors"] = {key: entry.to_dict() for key, entry in self.tensors.items()}
        if self.extra:
            out["extra"] = dict(self.extra)
        return out

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for a newer version, an unknown or missing key, or a value that cannot be.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint is in version {version} of the format, and this hf_sparse reads up to version "
                f"{FORMAT_VERSION}; upgrade it: pip install --upgrade hf-sparse"
            )
        _keys(data, ("version", "generator", "tensors"), ("targets", "extra"), "the manifest")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(f"the version of the format must be an integer from 1, got {shorten(version)}")
        if not isinstance(data["tensors"], Mapping):
            raise CheckpointError(f"tensors must be a mapping from keys to entries, got {shorten(data['tensors'])}")
        if not isinstance(data.get("targets", []), list):
            raise CheckpointError(f"targets must be a list of keys, got {shorten(data['targets'])}")
        tensors = {}
        for key, entry in data["tensors"].items():
            try:
                tensors[key] = TensorEntry.from_dict(entry)
            except CheckpointError as error:
                raise CheckpointError(f"tensor {shorten(key)} in the manifest: {error}") from None
        targets = tuple(data.get("targets", ()))
        return cls(tensors, targets, version, data["generator"], data.get("extra", {}))

    def to_json(self) -> str:
        """Return the manifest as compact JSON.

        Raises:
            CheckpointError: if `extra` holds what JSON cannot: NaN, infinity, other types.
        """
        try:
            return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"extra of the manifest cannot be written as JSON: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what `to_json` returns.

        Raises:
            CheckpointError: if the text is not valid JSON, names a key twice, holds a number that cannot be written
                again, or as `from_dict`.
        """
        try:
            data = json.loads(text, object_pairs_hook=without_repeats, parse_constant=_no_constant, parse_float=_finite)
        except CheckpointError as error:
            raise CheckpointError(f"the manifest {error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the manifest is not valid JSON: {error}") from None
        return cls.from_dict(data)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of a JSON object, for `object_pairs_hook`.

    Raises:
        CheckpointError: if it names a key twice.
    """
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"names the key {shorten(twice)} twice")
    return out


def _no_constant(name: str) -> Any:
    raise CheckpointError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise CheckpointError(f"holds the number {shorten(text)}, which is too large")
    return value


def is_runtime_form(manifest: Manifest | None) -> bool:
    """Return whether `save_runtime` wrote a file, by its manifest; None = the file has none."""
    return manifest is not None and RUNTIME_KEY in manifest.extra


def refuse_runtime(manifest: Manifest | None, where: object) -> None:
    """Raise `CheckpointError` if a file is in runtime form: its tensors are those of kernels, not of the model."""
    if is_runtime_form(manifest):
        raise CheckpointError(
            f"{where} is in runtime form, which hf_sparse.save_runtime wrote for inference alone: name the checkpoint "
            "that it was made from"
        )
