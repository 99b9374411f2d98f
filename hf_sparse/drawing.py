"""The frame of every picture that is drawn with matplotlib: say what is missing, and what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import BackendError, RecipeError


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
