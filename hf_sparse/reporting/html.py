"""A self-contained HTML page: sections, tables, bars, heatmaps and charts. No script, no font, nothing from a network.

Every text goes through `escape`, since names of weights, classes and files come from strangers. Charts are drawn about
as wide as a phone and laid side by side where there is room, so that their letters keep their size.
"""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .label_placement import place_labels

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 24, 12, 40  # right: half of the last number below the axis stands out there
LETTER = 7.5  # as wide as the digits of the usual fonts at most, at the size of STYLE

STYLE = """
:root { color-scheme: light dark; --ink:#1d2530; --soft:#5b6675; --paper:#ffffff; --card:#f4f6f9; --line:#d5dbe3;
  --a:#1f6fb4; --b:#c2500f; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaf0; --soft:#a3aebd; --paper:#14181e; --card:#1d232b;
  --line:#38424f; --a:#62aef0; --b:#f0975a; } }
* { box-sizing: border-box; }
body { margin:0 auto; padding:1rem; max-width:75rem; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui, sans-serif; overflow-wrap:anywhere; }
h1 { font-size:1.5rem; line-height:1.25; } h2 { font-size:1.2rem; margin:2rem 0 .5rem; } p { max-width:46rem; }
.note, .left-out, figcaption, th { color:var(--soft); } .left-out { font-style:italic; }
table { border-collapse:collapse; font-size:.9rem; }
th, td { padding:.25rem .6rem; border-bottom:1px solid var(--line); text-align:left; vertical-align:top; }
th { font-weight:600; } .number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums; }
.grid { display:grid; gap:1rem; grid-template-columns:repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.small { grid-template-columns:repeat(auto-fill, minmax(min(10rem, 100%), 1fr)); }
figure { margin:0; padding:.6rem; background:var(--card); border-radius:.4rem; min-width:0; }
figcaption { font-size:.85rem; } figure svg { display:block; width:100%; height:auto; max-width:34rem; }
.map { display:block; max-width:100%; max-height:12rem; image-rendering:pixelated; border:1px solid var(--line);
  margin:.4rem 0; }
.bar { display:grid; grid-template-columns:minmax(0, 1fr) minmax(0, 1fr) 4.5rem; gap:.1rem .6rem; align-items:center;
  font-size:.85rem; margin:.15rem 0; }
.track { height:.8rem; background:var(--card); border:1px solid var(--line); }
.fill { height:100%; background:var(--a); }
.heat { font-size:.85rem; margin:.3rem 0; } .cells { display:flex; height:1.1rem; border:1px solid var(--line); }
.cells i { flex:1 1 0; min-width:0;
  background:color-mix(in srgb, var(--a) calc(var(--v) * 100%), var(--paper)); }
.heads .cells i { border-right:1px solid var(--line); } .heads .cells i:last-child { border-right:0; }
.scale { display:flex; gap:.5rem; align-items:center; font-size:.85rem; color:var(--soft); margin:.5rem 0; }
.scale b { width:8rem; height:.8rem; border:1px solid var(--line);
  background:linear-gradient(to right, var(--paper), var(--a)); }
pre { background:var(--card); padding:.6rem; overflow-x:auto; }
svg text { fill:var(--ink); font:12px system-ui, sans-serif; } .axis { stroke:var(--line); }
.lead { stroke:var(--soft); stroke-width:.7; }
.la { stroke:var(--a); fill:none; stroke-width:2; } .lb { stroke:var(--b); fill:none; stroke-width:2; }
.fa { fill:var(--a); } .fb { fill:var(--b); } .ka { color:var(--a); } .kb { color:var(--b); }
@media (max-width:40rem) { .bar { grid-template-columns:minmax(0, 1fr) 4.5rem; }
  .bar > :first-child { grid-column:1 / -1; } thead { display:none; } table, tr, td { display:block; }
  tr { padding:.4rem 0; border-bottom:1px solid var(--line); }
  td { display:grid; grid-template-columns:8rem minmax(0, 1fr); gap:.5rem; border:0; padding:.1rem 0; }
  td.number { text-align:left; white-space:normal; }
  td::before { content:attr(data-name); color:var(--soft); } }
"""


def escape(text: object) -> str:
    """Return a text as HTML, quotes too, without control characters that no page may hold.

    Example:
        >>> escape('<b title="x">')
        '&lt;b title=&quot;x&quot;&gt;'
    """
    plain = "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in str(text))
    return html.escape(plain, quote=True)


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole page. The policy in its head keeps a browser from fetching or running anything."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """Return a section; `body` is HTML."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}\n{body}</section>"


def left_out(title: str, why: str) -> str:
    """Return a section that says why it has nothing to show."""
    return section(title, f'<p class="left-out">Left out: {escape(why)}</p>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; columns whose cells all look like numbers stand right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(_numeric(row[place]) for row in cells) and bool(cells) for place in range(len(head))]

    def line(row: Sequence[str]) -> str:
        out = []
        for name, cell, number in zip(head, row, right, strict=True):
            kind = ' class="number"' if number else ""
            # On a phone the head is hidden and each cell has its name beside it.
            out.append(f'<td{kind} data-name="{escape(name)}"><span>{escape(cell)}</span></td>')
        return f"<tr>{''.join(out)}</tr>"

    names = [
        f"<th{' class=number' if number else ''}>{escape(name)}</th>" for name, number in zip(head, right, strict=True)
    ]
    lines = [f"<thead><tr>{''.join(names)}</tr></thead>", *map(line, cells)]
    return "<table>" + "\n".join(lines) + "</table>"


def _numeric(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


def bars(rows: Iterable[tuple[str, float]]) -> str:
    """Return horizontal bars of fractions in [0, 1], each with its name and its value."""
    return "\n".join(
        f'<div class="bar"><span>{escape(name)}</span><div class="track"><div class="fill" '
        f'style="width:{100 * min(1.0, max(0.0, value)):.2f}%"></div></div>'
        f'<span class="number">{value:.2%}</span></div>'
        for name, value in rows
    )


def heat(rows: Iterable[tuple[str, Sequence[float]]], kind: str = "") -> str:
    """Return rows of cells shaded by fractions in [0, 1]. `kind` "heads" draws lines between the cells."""
    out = [f'<div class="heatmap {escape(kind)}">']
    for name, values in rows:
        cells = "".join(
            f'<i style="--v:{min(1.0, max(0.0, v)):.3f}" title="{place}: {v:.1%} left"></i>'
            for place, v in enumerate(values)
        )
        out.append(f'<div class="heat"><span>{escape(name)}</span><div class="cells">{cells}</div></div>')
    return "\n".join([*out, "</div>", '<div class="scale">0 % left<b></b>100 % left</div>'])


def figure(body: str, caption: str) -> str:
    """Return a picture with a caption; `body` is HTML."""
    # The name of a layer may break after its dots, before it breaks anywhere.
    breakable = re.sub(r"\.(?=[a-z_])", ".<wbr>", escape(caption))
    return f"<figure>{body}<figcaption>{breakable}</figcaption></figure>"


def bitmap(values: Tensor, label: str) -> str:
    """Return a picture with one dot per entry: white at 0, blue at 1.

    Shapes: values `(rows, columns)`.
    """
    shade = values.clamp(0, 1)[..., None]
    white, blue = shade.new_tensor([255.0, 255.0, 255.0]), shade.new_tensor([16.0, 74.0, 130.0])
    dots = (white + shade * (blue - white)).round().byte()
    rows, columns = values.shape
    lines = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in dots)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in parts
    )
    # Small ones are enlarged by the browser, dot by dot.
    scale = max(1, 176 // max(rows, columns))
    return (
        f'<img class="map" width="{columns * scale}" height="{rows * scale}" alt="{escape(label)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that divide a range.

    Example:
        >>> ticks(0.0, 1400.0)
        [0.0, 500.0, 1000.0]
    """
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * count >= span)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(values: Iterable[float], least: float = 0.0) -> tuple[float, float]:
    """Return a range that holds the values with some room, wider than `least` and never empty."""
    found = [min(max(value, -1e300), 1e300) for value in values]  # the range itself must not be infinite
    low, high = min(found), max(found)
    room = max((high - low) * 0.08, least, abs(high) * 1e-3, 1e-9)
    return low - room, high + room


class Axes:
    """Two axes of a chart with their labels; turns values into places.

    Args:
        x_ticks: texts below the x axis, by their values; None = round numbers.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        x_ticks: Mapping[float, str] | None = None,
    ) -> None:
        self.x_range, self.y_range = x, y
        self.parts = [f"<title>{escape(y_label)} by {escape(x_label)}</title>"]
        for value in ticks(*y):
            place = self.y(value)
            self.parts.append(
                f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
            )
            self.parts.append(f'<text x="{LEFT - 5}" y="{place + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value, text in ({value: f"{value:g}" for value in ticks(*x)} if x_ticks is None else x_ticks).items():
            self.parts.append(
                f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> str:
        """Return the picture."""
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(self.parts)}</svg>'


def line_chart(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """Return one line through points, with a dot at each where they are few."""
    axes = Axes(spread(x for x, _ in points), spread((y for _, y in points), 0.005), x_label, y_label)
    places = [(axes.x(x), axes.y(y)) for x, y in points]
    axes.parts.append(f'<polyline class="la" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    if len(places) <= 40:
        axes.parts += [f'<circle class="fa" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    return axes.draw()


def scatter(
    points: Sequence[tuple[float, float]],
    front: Sequence[int],
    x_label: str,
    y_label: str,
    names: Sequence[object],
    log_ticks: Mapping[float, str] | None = None,
) -> str:
    """Return points with short names, and a line through those of the front.

    Args:
        log_ticks: texts below a logarithmic x axis, by their values; None = the axis is linear.
    """
    if log_ticks is not None:
        points = [(math.log10(x), y) for x, y in points]
    low, high = spread(x for x, _ in points)
    x_ticks = log_ticks and {math.log10(x): text for x, text in log_ticks.items() if low <= math.log10(x) <= high}
    axes = Axes((low, high), spread((y for _, y in points), 0.005), x_label, y_label, x_ticks)
    marks = [(axes.x(x), axes.y(y)) for x, y in points]
    sizes = [(LETTER * len(str(name)), 12.0) for name in names]
    spots = place_labels(marks, sizes, (LEFT, TOP - 10, WIDTH, HEIGHT - BOTTOM), 4)
    leads, circles, texts = [], [], []
    for place, ((x, y), name, spot) in enumerate(zip(marks, names, spots, strict=True)):
        assert spot is not None
        if spot.far:
            part = 1 - 8 / math.dist((x, y), spot[:2])  # up to the label, not into it
            end = x + part * (spot.x - x), y + part * (spot.y - y)
            leads.append(f'<line class="lead" x1="{x:.1f}" x2="{end[0]:.1f}" y1="{y:.1f}" y2="{end[1]:.1f}"/>')
        kind = "fb" if place in front else "fa"
        circles.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        texts.append(f'<text x="{spot.x:.1f}" y="{spot.y + 4:.1f}" text-anchor="middle">{escape(name)}</text>')
    edge = " ".join(f"{marks[place][0]:.1f},{marks[place][1]:.1f}" for place in front)
    axes.parts += [*leads, f'<polyline class="lb" points="{edge}"/>', *circles, *texts]
    return axes.draw()


def histogram(own: Sequence[int], other: Sequence[int] | None, limit: float) -> str:
    """Return counts over equal bins from -limit to limit: filled, and those of another model as a line over them."""
    width, height, base = 200, 90, 72
    highest = max([*own, *(other or ()), 1])
    step = width / len(own)
    parts = [
        f'<rect class="fa" x="{place * step:.2f}" y="{base - 68 * count / highest:.2f}" width="{step * 0.9:.2f}" '
        f'height="{68 * count / highest:.2f}"/>'
        for place, count in enumerate(own)
        if count
    ]
    if other is not None:
        line = " ".join(f"{(place + 0.5) * step:.1f},{base - 68 * n / highest:.1f}" for place, n in enumerate(other))
        parts.append(f'<polyline class="lb" points="{line}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>')
    for x, value, anchor in ((0, -limit, "start"), (width / 2, 0.0, "middle"), (width, limit, "end")):
        parts.append(f'<text x="{x}" y="{height - 4}" text-anchor="{anchor}">{value:.2g}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
