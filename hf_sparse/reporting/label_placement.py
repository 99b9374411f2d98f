"""Where the labels of a chart go, so that they cover neither each other nor the marks, as far as there is room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Box = tuple[float, float, float, float]
"""Left, top, right, bottom (or bottom, top: which of them is up is the same to all here)."""


class Spot(NamedTuple):
    """Where the middle of a label goes, and whether that is so far from its mark that a line should lead there."""

    x: float
    y: float
    far: bool


def place_labels(
    marks: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float] | None],
    room: Box,
    radius: float,
) -> list[Spot | None]:
    """Return a spot for the label of each mark: the nearest that covers nothing, or the least, one label after another.

    Args:
        marks: their middles.
        sizes: width and height of each label; None = the mark has none.
        room: what labels should stay within.
        radius: of the marks.

    Example:
        >>> place_labels([(50.0, 50.0), (52.0, 50.0)], [(20.0, 8.0), None], (0.0, 0.0, 100.0, 100.0), 3.0)
        [Spot(x=36.0, y=50.0, far=False), None]
    """
    taken = [_around((x, y), 2 * radius, 2 * radius) for x, y in marks]
    spots: list[Spot | None] = []
    for (x, y), size in zip(marks, sizes, strict=True):
        if size is None:
            spots.append(None)
            continue
        best: tuple[float, Spot, Box] | None = None
        for gap, right, up in _offsets(*size, radius):
            spot = Spot(x + right, y + up, gap > radius)
            box = _around(spot[:2], *size)
            covered = size[0] * size[1] - _shared(box, room) + sum(_shared(box, other) for other in taken)
            if best is None or covered < best[0] - 1e-6:
                best = covered, spot, box
        assert best is not None
        spots.append(best[1])
        taken.append(best[2])
    return spots


def _offsets(width: float, height: float, radius: float) -> Iterator[tuple[float, float, float]]:
    """Yield (gap, right, up) of places for the middle of a label around its mark, the better ones first."""
    for gap in (radius / 3, 2 * radius, 5 * radius, 8 * radius, 11 * radius):
        for turn in (0, 4, 1, 7, 3, 5, 2, 6):  # eighths of a full turn: right and left first
            right, up = math.cos(math.pi * turn / 4), math.sin(math.pi * turn / 4)
            reach = radius + gap
            yield gap, reach * right + width / 2 * _side(right), reach * up + height / 2 * _side(up)


def _side(part: float) -> int:
    return 0 if abs(part) < 1e-6 else int(math.copysign(1, part))


def _around(middle: tuple[float, float], width: float, height: float) -> Box:
    x, y = middle
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _shared(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
