"""A self-contained HTML page from sections of tables, bars, heatmaps and figures; the markup is in templates/.

Names of weights, classes and files are untrusted: the template escapes every value, and the page's policy keeps a
browser from running or fetching anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jinja2
from markupsafe import Markup


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. Columns whose cells all look like numbers are aligned right."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[str(cell) for _, cell in zip(self.head, row, strict=True)] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        columns = list(zip(*self.cells, strict=True)) or [()] * len(self.head)
        return [bool(column) and all(map(_looks_like_number, column)) for column in columns]


def _looks_like_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, value))


@dataclasses.dataclass(frozen=True)
class Bars:
    """Horizontal bars of fractions in [0, 1] by name."""

    kind: ClassVar[str] = "bars"
    rows: Sequence[tuple[str, float]]

    @property
    def fractions(self) -> list[tuple[str, float]]:
        """The rows, clamped to [0, 1]."""
        return [(name, _clamp(value)) for name, value in self.rows]


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """Rows of cells shaded by fractions in [0, 1]; `separated` draws lines between the cells."""

    kind: ClassVar[str] = "heatmap"
    rows: Sequence[tuple[str, Sequence[float]]]
    separated: bool = False

    @property
    def fractions(self) -> list[tuple[str, list[float]]]:
        """The rows, clamped to [0, 1]."""
        return [(name, [_clamp(value) for value in values]) for name, values in self.rows]


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture: PNG in base64, its size on the page in pixels, and a text alternative."""

    png: str
    width: int
    height: int
    label: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """Images and charts (SVG from `reporting.charts`) with one caption; `omitted` says why one is missing."""

    caption: str
    images: Sequence[Image] = ()
    charts: Sequence[Markup] = ()
    omitted: str = ""


@dataclasses.dataclass(frozen=True)
class Figures:
    """A grid of figures; `small` fits more next to each other."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    small: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section: parts below a title and a note; `omitted` says why there are none."""

    title: str
    parts: Sequence[Table | Bars | Heatmap | Figures] = ()
    note: str = ""
    omitted: str = ""


def render(title: str, sections: Iterable[Section]) -> str:
    """Return the page.

    Example:
        >>> page = render("Page", [Section("Section", [Table(["name"], [["<b>"]])])])
        >>> '<td data-name="name"><span>&lt;b&gt;</span></td>' in page
        True
    """
    return _environment().get_template("page.html").render(title=title, sections=list(sections))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        keep_trailing_newline=True,
    )


def printable(value: Any) -> Any:
    r"""Return a value of the template without control characters, which HTML cannot hold.

    Example:
        >>> printable("a\x00b")
        'a\ufffdb'
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in value)
