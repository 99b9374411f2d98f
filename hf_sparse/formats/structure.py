"""Fact: which heads, neurons, experts and filters a model has lost, so that it can be built without them.

`manifest` lists the tensors.

Like the manifest this is untrusted input: `from_dict` accepts exactly what FORMAT.md describes.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..utils.text import shorten

KINDS = {"attention": "heads", "feed_forward": "neurons", "experts": "experts", "convolution": "filters"}
"""The key of FORMAT.md for each kind of sub-block, and field of `Edits`."""

EDITS_KEY = "edits"
"""Key in `extra` of a manifest for the heads, neurons and experts that were removed."""

MAX_GROUPS = 2**24
"""More heads, neurons or experts in one sub-block are a mistake or an attack."""

_NAME = re.compile(r"[\w.-]{1,500}", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is left of one sub-block.

    Args:
        before: number of heads or neurons in a model that is built from `config.json`.
        mask: bitmask of those that are left, as FORMAT.md defines it. It stays one: a file may list 2**24 neurons for
            each of many sub-blocks that the model does not have.

    Example:
        >>> Cut.of(12, (0, 3)).to_dict()
        {'of': 12, 'kept': '0900'}
    """

    before: int
    mask: bytes

    @classmethod
    def of(cls, before: int, kept: Iterable[int] | None = None) -> Cut:
        """Build from the numbers of those that are left (None = all), counted from 0."""
        flags = np.zeros(before, dtype=bool)
        flags[list(kept) if kept is not None else slice(None)] = True
        return cls(before, np.packbits(flags, bitorder="little").tobytes())

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of those that are left, ascending, counted from 0 in the model that `config.json` describes."""
        flags = np.unpackbits(np.frombuffer(self.mask, dtype=np.uint8), count=self.before, bitorder="little")
        return tuple(np.flatnonzero(flags).tolist())

    @property
    def count(self) -> int:
        """How many are left."""
        return int.from_bytes(self.mask).bit_count()

    def then(self, kept: Sequence[int]) -> Cut:
        """Return this cut and another after it, whose numbers count what this one has left."""
        before = self.kept
        return Cut.of(self.before, (before[index] for index in kept))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `kept` is the bitmask as hexadecimal digits."""
        return {"of": self.before, "kept": self.mask.hex()}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Cut:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        if not isinstance(data, Mapping) or set(data) != {"of", "kept"}:
            raise CheckpointError(f"{where} must be a mapping with the keys 'of' and 'kept', and nothing else")
        before, text = data["of"], data["kept"]
        if type(before) is not int or not 1 <= before <= MAX_GROUPS:
            raise CheckpointError(f"{where}: 'of' must be an integer in [1, {MAX_GROUPS}], got {shorten(before)}")
        if not isinstance(text, str) or len(text) != 2 * -(-before // 8) or not _HEX.fullmatch(text):
            raise CheckpointError(f"{where}: 'kept' must be a bitmask of {before} flags in hexadecimal digits")
        mask = bytes.fromhex(text)
        if before % 8 and mask[-1] >> before % 8:
            raise CheckpointError(f"{where}: 'kept' has bits behind the end of its {before} flags")
        return cls(before, mask)


@dataclasses.dataclass(frozen=True)
class Edits:
    """List the sub-blocks of a model that have lost heads, neurons, experts or filters. Falsy if there are none.

    Args:
        heads: by name of the attention.
        neurons: by name of the feed-forward sub-block.
        experts: by name of the mixture of experts.
        filters: by name of the convolution.

    Example:
        >>> edits = Edits({"layer.0.attention": Cut.of(4, (1, 2))})
        >>> Edits.from_dict(edits.to_dict()) == edits
        True
    """

    heads: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    neurons: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    experts: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    filters: Mapping[str, Cut] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.heads or self.neurons or self.experts or self.filters)

    def __iter__(self) -> Iterator[tuple[str, str, Cut]]:
        """Yield kind ("heads", "neurons", "experts" or "filters"), name and cut."""
        for kind in KINDS.values():
            for name, cut in getattr(self, kind).items():
                yield kind, name, cut

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; what is empty is left out."""
        out: dict[str, Any] = {}
        for kind, name, cut in self:
            out.setdefault(kind, {})[name] = cut.to_dict()
        return {**out, "checksum": _checksum(out)} if out else {}

    @classmethod
    def from_dict(cls, data: Any) -> Edits:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        known = (*KINDS.values(), "checksum")
        if not isinstance(data, Mapping) or not set(data) <= set(known):
            raise CheckpointError(f"edits must be a mapping with no other keys than {', '.join(known)}")
        parts: dict[str, dict[str, Cut]] = {}
        given = {kind: cuts for kind, cuts in data.items() if kind != "checksum"}
        for kind, cuts in given.items():
            if not isinstance(cuts, Mapping):
                raise CheckpointError(f"{kind} of the edits must be a mapping from names of modules")
            for name in cuts:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    raise CheckpointError(f"{kind} of the edits: {shorten(name)} is not a name of a module")
            parts[kind] = {name: Cut.from_dict(cut, f"{kind} of '{name}'") for name, cut in cuts.items()}
        if data.get("checksum") != (_checksum(given) if given else None):
            raise CheckpointError("the checksum of the edits does not match their content: the file is corrupted")
        return cls(**parts)


def _checksum(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Return CRC-32 over the lines of FORMAT.md: which heads of T5 are left, no shape of a tensor would tell."""
    lines = [f"{kind} {name} {cut['of']} {cut['kept']}\n" for kind, cuts in data.items() for name, cut in cuts.items()]
    return f"crc32:{zlib.crc32(''.join(sorted(lines)).encode('ascii')):08x}"
