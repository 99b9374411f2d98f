"""What a conversion did, in a few lines."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...formats.manifest import Manifest
from ...utils.text import kind_of_name, printable

_MOST_LINES = 12


class FoundPattern(NamedTuple):
    """The zeros of one weight.

    Attributes:
        key: of the weight.
        pattern: see `formats.zero_patterns.find_pattern`.
        zeros: share of them.
        codec: that it is packed with; "dense" if that did not make it smaller.
    """

    key: str
    pattern: str
    zeros: float
    codec: str


class DeadGroups(NamedTuple):
    """Heads, neurons and filters of a model that contribute nothing, of how many."""

    heads: int
    of_heads: int
    neurons: int
    of_neurons: int
    filters: int = 0
    of_filters: int = 0

    def __str__(self) -> str:
        named = (("heads", *self[:2]), ("neurons", *self[2:4]), ("filters", *self[4:]))
        return ", ".join(f"{dead} of {of} {kind}" for kind, dead, of in named if dead)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done. `print` it for a few lines.

    Args:
        kind: what the source was.
        packed: how many tensors are packed now, of `tensors`.
        source_bytes, output_bytes: of the weight files.
        files: weight files written.
        manifest: of what was written; None if it is dense.
        left: files of the source that were not copied.
        patterns: what the zeros of each sparse weight look like.
        dead: heads, neurons and filters that `compact` would remove; None where no family knows the model.
        notes: what else a reader should know, a sentence each.
        edits: heads, neurons and filters that are gone, as text, a line for each sub-block.
    """

    kind: str
    tensors: int
    packed: int
    source_bytes: int
    output_bytes: int
    files: tuple[str, ...]
    manifest: Manifest | None
    left: tuple[str, ...] = ()
    patterns: tuple[FoundPattern, ...] = ()
    dead: DeadGroups | None = None
    notes: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = f" ({self.output_bytes / self.source_bytes:.3f})" if self.source_bytes else ""
        sizes = f"{self.source_bytes / 1e6:.2f} MB to {self.output_bytes / 1e6:.2f} MB{share}"
        lines = [f"{self.kind}: {self.tensors} tensors, {self.packed} packed now, {sizes} in {len(self.files)} file(s)"]
        lines += _shortened([*pattern_lines(self.patterns)])
        if self.dead is not None and str(self.dead):
            lines.append(f"zero as a whole: {self.dead}; --compact removes them")
        lines += _shortened(list(self.edits))
        lines += self.notes
        if self.left:
            lines.append(f"not copied: {', '.join(self.left)}")
        return "\n".join(map(printable, lines))


def pattern_lines(patterns: Iterable[FoundPattern]) -> Iterable[str]:
    """Yield a line for each kind of layer, pattern and codec.

    Example:
        >>> found = [FoundPattern(f"layer.{i}.query.weight", "2:4", 0.5, "n:m") for i in range(12)]
        >>> list(pattern_lines(found))
        ['layer.*.query.weight: 12 with pattern 2:4, zeros 50.0 %, packed as n:m']
    """
    kinds: Mapping[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for found in patterns:
        kinds[kind_of_name(found.key), found.pattern, found.codec].append(found.zeros)
    for (kind, pattern, codec), zeros in kinds.items():
        low, high = f"{min(zeros):.1%}".replace("%", " %"), f"{max(zeros):.1%}".replace("%", " %")
        share = low if low == high else f"{low} to {high}"
        stored = f"packed as {codec}" if codec != "dense" else "stored dense"
        yield f"{kind}: {len(zeros)} with pattern {pattern}, zeros {share}, {stored}"


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return lines if more <= 1 else [*lines[:_MOST_LINES], f"... and {more} more lines like these"]
