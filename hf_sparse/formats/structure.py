"""Fact: what was cut out of a model, so that it can be built again without it. (`manifest` says what a file contains.)

Like the manifest this comes from strangers: `from_dict` accepts exactly what FORMAT.md describes.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError

KINDS = {"attention": "heads", "feed_forward": "neurons"}
"""The key of FORMAT.md for each kind of sub-block."""

EDITS_KEY = "edits"
"""Where `extra` of a manifest keeps what was cut out of the model."""

MAX_GROUPS = 2**24
"""More heads or neurons in one sub-block are a mistake or an attack."""

_NAME = re.compile(r"[\w.-]{1,500}", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is left of one sub-block.

    Args:
        before: how many heads or neurons it has in a model that is built from `config.json`.
        kept: the numbers of those that are left, ascending, counted from 0 in that model.

    Example:
        >>> Cut(12, (0, 3)).to_dict()
        {'of': 12, 'kept': '0900'}
    """

    before: int
    kept: tuple[int, ...]

    def then(self, kept: Sequence[int]) -> Cut:
        """Return this cut and another after it, whose numbers count what this one has left."""
        return Cut(self.before, tuple(self.kept[index] for index in kept))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `kept` is the bitmask of FORMAT.md, as hexadecimal digits."""
        mask = bytearray(-(-self.before // 8))
        for index in self.kept:
            mask[index // 8] |= 1 << index % 8
        return {"of": self.before, "kept": mask.hex()}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Cut:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        if not isinstance(data, Mapping) or set(data) != {"of", "kept"}:
            raise CheckpointError(f"{where} is a mapping with the keys 'of' and 'kept', and nothing else")
        before, text = data["of"], data["kept"]
        if type(before) is not int or not 1 <= before <= MAX_GROUPS:
            raise CheckpointError(f"{where}: 'of' is a whole number from 1 to {MAX_GROUPS}")
        if not isinstance(text, str) or len(text) != 2 * -(-before // 8) or not _HEX.fullmatch(text):
            raise CheckpointError(f"{where}: 'kept' is a bitmask of {before} flags in hexadecimal digits")
        mask = bytes.fromhex(text)
        kept = tuple(8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1)
        if kept and kept[-1] >= before:
            raise CheckpointError(f"{where}: 'kept' has bits behind the end of its {before} flags")
        return cls(before, kept)


@dataclasses.dataclass(frozen=True)
class Edits:
    """List the sub-blocks of a model that have lost heads or neurons. Falsy if there are none.

    Args:
        heads: by name of the attention.
        neurons: by name of the feed-forward sub-block.

    Example:
        >>> edits = Edits({"layer.0.attention": Cut(4, (1, 2))})
        >>> Edits.from_dict(edits.to_dict()) == edits
        True
    """

    heads: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    neurons: Mapping[str, Cut] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.heads or self.neurons)

    def __iter__(self) -> Iterator[tuple[str, str, Cut]]:
        """Yield kind ("heads" or "neurons"), name and cut."""
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
            raise CheckpointError(f"edits is a mapping with no other keys than {', '.join(known)}")
        parts: dict[str, dict[str, Cut]] = {}
        given = {kind: cuts for kind, cuts in data.items() if kind != "checksum"}
        for kind, cuts in given.items():
            if not isinstance(cuts, Mapping):
                raise CheckpointError(f"{kind} of the edits is a mapping from names of modules")
            for name in cuts:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    raise CheckpointError(f"{kind} of the edits: {repr(name)[:80]} is no name of a module")
            parts[kind] = {name: Cut.from_dict(cut, f"{kind} of '{name}'") for name, cut in cuts.items()}
        if data.get("checksum") != (_checksum(given) if given else None):
            raise CheckpointError("the checksum of the edits is not that of what they say: the file is damaged")
        return cls(**parts)


def _checksum(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Return CRC-32 over the lines of FORMAT.md: which heads of T5 are left, no shape of a tensor would tell."""
    lines = [f"{kind} {name} {cut['of']} {cut['kept']}\n" for kind, cuts in data.items() for name, cut in cuts.items()]
    return f"crc32:{zlib.crc32(''.join(sorted(lines)).encode('ascii')):08x}"
