"""Charts of a page: drawn by matplotlib, inlined as SVG that follows the colors of the page, also in dark mode.

The same values give the same bytes: ids are hashed with a fixed salt, and no date or version is written.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from .html import Image
from .plotting import new_figure, require_matplotlib, write_labels

INK, LINE, A, B = "#1d2530", "#d5dbe3", "#1f6fb4", "#c2500f"
THEME = {INK: "var(--ink)", LINE: "var(--line)", A: "var(--a)", B: "var(--b)"}
"""Colors that matplotlib draws with, and the colors of page.css that replace them."""

INCH = 72.0
SIZE, SMALL = (360 / INCH, 220 / INCH), (200 / INCH, 90 / INCH)
"""Sizes of charts in inches: about as wide as a phone, so that the letters keep their size there."""

RC: Any = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11.0,
    "grid.color": LINE,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_sparse",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
LARGEST = 1e150
"""Values are clipped to this: matplotlib computes squares and differences of them."""


def line_chart(points: Sequence[tuple[float, float]], x_label: str, label: str) -> Markup:
    """Return one line through points, with a marker at each where they are few.

    Args:
        label: text alternative, as in "loss by step".
    """
    with _context():
        figure = new_figure(*SIZE)
        axes = _axes(figure, x_label)
        x, y = zip(*((_clip(x), _clip(y)) for x, y in points), strict=True)
        axes.plot(x, y, color=A, linewidth=1.8, marker="o" if len(points) <= 40 else None, markersize=4)
        return inline_svg(figure, label)


def scatter(
    points: Sequence[tuple[float, float]],
    front: Sequence[int],
    x_label: str,
    names: Sequence[object],
    label: str,
    log_ticks: Mapping[float, str] | None = None,
) -> Markup:
    """Return points with short names, and a line through those of the Pareto front.

    Args:
        front: indices of points, by rising x.
        log_ticks: tick labels of a logarithmic x axis, by their values; None = the axis is linear.
    """
    with _context():
        figure = new_figure(*SIZE)
        axes = _axes(figure, x_label)
        points = [(_clip(x), _clip(y)) for x, y in points]
        axes.plot(*zip(*(points[index] for index in front), strict=True), color=B, linewidth=1.8, zorder=2)
        colors = [B if index in front else A for index in range(len(points))]
        axes.scatter(*zip(*points, strict=True), c=colors, s=40, zorder=3)
        axes.margins(0.08, 0.12)
        if log_ticks is not None:
            set_log_ticks(axes, log_ticks)
        write_labels(figure, axes, points, [str(name) for name in names], [INK] * len(points), size=11)
        return inline_svg(figure, label)


def set_log_ticks(axes: Any, ticks: Mapping[float, str]) -> None:
    """Make the x axis logarithmic, with these labels at the values in its range."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    shown = {value: text for value, text in ticks.items() if low <= value <= high}
    axes.set_xticks(list(shown), list(shown.values()))
    axes.minorticks_off()


def histogram(counts: Sequence[int], baseline: Sequence[int] | None, limit: float, label: str) -> Markup:
    """Return counts over equal bins from -limit to limit as bars, and those of a baseline as a line over them."""
    with _context():
        figure = new_figure(*SMALL)
        axes = figure.add_subplot()
        width = 2 / len(counts)
        middles = [-1 + (index + 0.5) * width for index in range(len(counts))]  # limit may be as small as floats go
        axes.bar(middles, counts, width=0.9 * width, color=A)
        if baseline is not None:
            axes.plot(middles, baseline, color=B, linewidth=1.5)
        axes.set_xticks([-1, 0, 1], [f"{-limit:.2g}", "0", f"{limit:.2g}"])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        return inline_svg(figure, label)


def mask_image(values: Tensor, label: str) -> Image:
    """Return a picture with one pixel per entry: white at 0, blue at 1.

    Shapes: values `(rows, columns)`.
    """
    require_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.image import imsave

    buffer, metadata = io.BytesIO(), dict[str, Any](Software=None)  # no version in the file
    blues = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#104a82"])
    imsave(buffer, values.numpy(), cmap=blues, vmin=0.0, vmax=1.0, format="png", metadata=metadata)
    rows, columns = values.shape
    scale = max(1, 176 // max(rows, columns))  # the browser enlarges small ones, pixel by pixel
    return Image(base64.b64encode(buffer.getvalue()).decode(), columns * scale, rows * scale, label)


def inline_svg(figure: Any, label: str) -> Markup:
    """Return a matplotlib figure as an `<svg>` element for a page.

    Args:
        label: text alternative.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    root = ET.fromstring(text)  # noqa: S314 - matplotlib wrote it just now
    prefix = "c" + hashlib.sha256(f"{label}\n{text}".encode()).hexdigest()[:10]  # ids are those of a whole page
    _clean(root)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in referred:
            element.set("id", f"{prefix}-{own}")
        for key, value in element.attrib.items():
            element.set(key, _themed(re.sub(r"(^|url\()#", rf"\1#{prefix}-", value) if _refers(key, value) else value))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - every text in it is escaped by ElementTree


def _refers(key: str, value: str) -> bool:
    return key == "href" or "url(#" in value


def _clean(root: ET.Element) -> None:
    """Drop namespaces, which HTML does not need, and what is for a file alone: metadata and a global style."""
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.tail = None
        if element.tag != "text":
            element.text = None
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                element.remove(child)


def _themed(value: str) -> str:
    for color, variable in THEME.items():
        value = value.replace(color, variable)
    return re.sub(r"font-family: [^;]+(; )?", "", value)  # that of the page


def _clip(value: float) -> float:
    return math.copysign(min(abs(value), LARGEST), value)


def _context() -> Any:
    require_matplotlib()
    from matplotlib import rc_context

    return rc_context(RC)


def _axes(figure: Any, x_label: str) -> Any:
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.locator_params(nbins=5)
    return axes
