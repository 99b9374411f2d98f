"""Figures of matplotlib: a clear error where it is missing, and labels that do not overlap."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError, RecipeError
from .label_placement import place_labels


def require_matplotlib() -> None:
    """Find out before anything is measured whether charts can be drawn.

    Raises:
        BackendError: without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendError("charts need matplotlib, which is not installed: pip install 'hf_sparse[plot]'") from error


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure.

    Units: inches.

    Raises:
        BackendError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Find out before anything is measured whether a picture can be written.

    Raises:
        BackendError: without matplotlib.
        RecipeError: for a suffix that matplotlib cannot write, or a folder that does not exist.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix and suffix not in known:
        raise RecipeError(f"cannot write {os.fspath(path)}: the suffix must be one of {', '.join(sorted(known))}")
    if not Path(path).parent.is_dir():
        raise RecipeError(f"cannot write {os.fspath(path)}: the folder {Path(path).parent} does not exist")


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as png, pdf or svg, by the suffix of the path. A png holds its `describe_figure` as metadata.

    Raises:
        RecipeError: for a suffix that matplotlib cannot write, or a path that cannot be written.
    """
    literal_texts(figure)
    metadata = {"Description": describe_figure(figure)} if Path(path).suffix.lower() == ".png" else None
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except (ValueError, OSError) as error:
        raise RecipeError(f"cannot write {os.fspath(path)}: {error}") from error


def literal_texts(figure: Any) -> None:
    """Show all labels of a figure literally: names are untrusted, and a `$` in one would begin a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def describe_figure(figure: Any) -> str:
    """Return what a figure shows, as JSON: labels, points and lines of its axes, not how they are drawn.

    Example:
        >>> figure = new_figure(2, 2)
        >>> _ = figure.subplots().plot([0.0, 1.0], [0.5, 0.25])
        >>> describe_figure(figure)
        '[{"x": "", "y": "", "scale": "linear", "lines": [[[0.0, 0.5], [1.0, 0.25]]], "points": [], "labels": []}]'
    """
    return json.dumps(
        [
            {
                "x": axes.get_xlabel(),
                "y": axes.get_ylabel(),
                "scale": axes.get_xscale(),
                "lines": [_rounded(line.get_xydata()) for line in axes.lines],
                "points": [
                    [dots.get_label(), *_rounded(dots.get_offsets())]
                    for dots in axes.collections
                    if hasattr(dots, "get_sizes")
                ],
                "labels": [[text.get_text(), *_rounded([text.xy])] for text in axes.texts],
            }
            for axes in figure.axes
        ]
    )


def _rounded(points: Any) -> list[list[float]]:
    return [[round(float(value), 6) for value in point] for point in points]


def write_labels(
    figure: Any,
    axes: Any,
    marks: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str],
    size: float = 7,
) -> None:
    """Write a label next to each marker so that none overlap; a label far from its marker gets a line to it.

    Call this when everything else is drawn.

    Args:
        marks: positions of all markers, in data coordinates.
        texts: label of each marker; "" = without a label.  words: ok
        size: of the font, in points.
    """
    literal_texts(figure)
    figure.draw_without_rendering()  # the layout is known only after that
    point = figure.dpi / 72  # in pixels
    style: dict[str, Any] = {
        "textcoords": "offset points", "ha": "center", "va": "center", "fontsize": size, "parse_math": False,
    }  # fmt: skip
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
