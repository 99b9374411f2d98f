"""The frame of every picture that is drawn with matplotlib: say what is missing, and what cannot be written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BackendError, RecipeError


class Label(NamedTuple):
    """A word beside a mark at a point, given in the units of the axes."""

    point: tuple[float, float]
    text: str
    color: str


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches.

    Raises:
        BackendError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Find out before anything is measured whether a picture could be written.

    Raises:
        BackendError: without matplotlib.
        RecipeError: for an ending that matplotlib cannot write, or a folder that is not there.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending and ending not in known:
        raise RecipeError(
            f"cannot write the picture {os.fspath(path)}: its ending is none of {', '.join(sorted(known))}"
        )
    if not Path(path).parent.is_dir():
        raise RecipeError(f"cannot write the picture {os.fspath(path)}: there is no folder {Path(path).parent}")


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as png, pdf or svg, by the ending of the path.

    Raises:
        RecipeError: for an ending that matplotlib cannot write, or a path that cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise RecipeError(f"cannot write the picture {os.fspath(path)}: {error}") from error


def place_labels(figure: Any, axes: Any, labels: Sequence[Label], marks: Sequence[tuple[float, float]]) -> None:
    """Write labels beside their marks so that they cover neither each other nor any mark, as far as there is room.

    To be called when all else is drawn. A label that found room only at some distance gets a line to its mark.

    Args:
        marks: points of all marks, in the units of the axes, those without a label too.
    """
    if not labels:
        return
    figure.draw_without_rendering()  # the layout is known after that only
    point = figure.dpi / 72  # pixels
    room = axes.get_window_extent().extents
    centers = axes.transData.transform(marks)
    taken = [(x - 3 * point, y - 3 * point, x + 3 * point, y + 3 * point) for x, y in centers]
    for label in labels:
        style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7, "color": label.color}
        trial = axes.annotate(label.text, label.point, xytext=(0, 0), **style)
        extent = trial.get_window_extent()
        trial.remove()
        x, y = axes.transData.transform(label.point)
        best: tuple[float, float, float, float, tuple[float, float, float, float]] | None = None
        for gap, right, up in _offsets(extent.width / point, extent.height / point):
            left, bottom = x + right * point - extent.width / 2, y + up * point - extent.height / 2
            box = (left, bottom, left + extent.width, bottom + extent.height)
            covered = extent.width * extent.height - _shared(box, room) + sum(_shared(box, other) for other in taken)
            if best is None or covered < best[0] - 1e-6:
                best = covered, gap, right, up, box
        assert best is not None
        _, gap, right, up, box = best
        line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.5, "alpha": 0.6} if gap > 1 else None
        axes.annotate(label.text, label.point, xytext=(right, up), arrowprops=line, **style)
        taken.append(box)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Yield (gap, right, up) of places for the middle of a label around its mark, the better ones first; in points."""
    for gap in (1.0, 6.0, 14.0, 24.0):
        for turn in (0, 4, 1, 7, 3, 5, 2, 6):  # eighths of a full turn: right and left first
            right, up = math.cos(math.pi * turn / 4), math.sin(math.pi * turn / 4)
            yield gap, (4 + gap) * right + width / 2 * _side(right), (4 + gap) * up + height / 2 * _side(up)


def _side(part: float) -> int:
    return 0 if abs(part) < 1e-6 else int(math.copysign(1, part))


def _shared(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the area that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
