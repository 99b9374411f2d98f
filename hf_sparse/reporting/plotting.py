"""The frame of every picture that is drawn with matplotlib: say what is missing, and what cannot be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError, RecipeError
from .label_placement import place_labels


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


def write_labels(
    figure: Any,
    axes: Any,
    marks: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Write labels beside their marks, where they cover nothing; one that found no room near gets a line to its mark.

    To be called when all else is drawn.

    Args:
        marks: points of all marks, in the units of the axes.
        texts: the label of each; an empty one is none.
    """
    figure.draw_without_rendering()  # the layout is known after that only
    point = figure.dpi / 72  # in pixels
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
    sizes: list[tuple[float, float] | None] = []
    for mark, text in zip(marks, texts, strict=True):
        trial = axes.annotate(text, mark, xytext=(0, 0), **style)
        extent = trial.get_window_extent()
        sizes.append((extent.width, extent.height) if text else None)
        trial.remove()
    places = [(float(x), float(y)) for x, y in axes.transData.transform(marks)]
    room = tuple(map(float, axes.get_window_extent().extents))
    spots = place_labels(places, sizes, room, 4 * point)  # type: ignore[arg-type]  # four numbers
    for mark, place, text, color, spot in zip(marks, places, texts, colors, spots, strict=True):
        if spot is not None:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6} if spot.far else None
            shift = ((spot.x - place[0]) / point, (spot.y - place[1]) / point)
            axes.annotate(text, mark, xytext=shift, color=color, arrowprops=line, **style)
