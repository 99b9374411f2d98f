"""Charts: escaped, the same bytes each time, in the colors of the page, with what they are given at its place."""

from __future__ import annotations

import base64
import io
import itertools
import re
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.reporting.html import Figure, Figures, Section, render
from tests.helpers.pages import EVIL, check_page

pytest.importorskip("matplotlib")
from hf_sparse.reporting import charts

POINTS = [(0.01, 0.8), (0.1, 0.8), (1.0, 0.9)]


def page_of(*drawn: object) -> str:
    return render("t", [Section("s", [Figures([Figure("c", charts=drawn)])])])  # type: ignore[arg-type]


def parsed(chart: str) -> ET.Element:
    return ET.fromstring(chart)  # noqa: S314 - made here


def texts(chart: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(chart).iter("text")]


def markers(chart: str) -> list[tuple[float, float]]:
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in parsed(chart).iter("use")]


@pytest.mark.parametrize("name", [EVIL, '" onload="alert(1)', "--><script>", "$\\frac{1}$", "a $b", "_hidden", "]]>"])
def test_names_in_a_chart_are_plain_text(name: str) -> None:
    chart = charts.scatter(POINTS, [0, 2], name, [name, "b", "c"], name)
    check_page(page_of(chart))
    assert texts(chart).count(name) == 2
    assert parsed(chart).get("aria-label") == name


def test_charts_of_one_page_share_no_id() -> None:
    drawn = [charts.scatter(POINTS, [0, 2], "x", "abc", label) for label in ("one", "two")]
    drawn += [charts.line_chart(POINTS, "step", "three"), charts.histogram([1, 2], [2, 1], 1.0, "four")]
    check_page(page_of(*drawn))


def test_same_values_give_the_same_bytes() -> None:
    for draw in (
        lambda: charts.line_chart(POINTS, "step", "loss"),
        lambda: charts.histogram([1, 0, 2], [2, 1, 0], 1.0, "h"),
        lambda: charts.scatter(POINTS, [0], "x", "abc", "s"),
        lambda: charts.mask_image(torch.eye(4), "m"),
    ):
        assert draw() == draw()


def test_colors_are_those_of_the_page() -> None:
    drawn = [charts.scatter(POINTS, [0, 2], "x", "abc", "s"), charts.histogram([1, 2], [2, 1], 1.0, "h")]
    for chart in drawn:
        assert not re.search(r"(fill|stroke): #", chart)
        assert "font-family" not in chart
        assert "var(--a)" in chart
        assert "var(--b)" in chart


def test_logarithmic_axis_has_equal_ratios_at_equal_distances() -> None:
    chart = charts.scatter(POINTS, [0], "kept", "abc", "s", {0.001: "0.1 %", 0.1: "10 %", 1.0: "100 %"})
    x = [place for place, _ in markers(chart)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.01)
    assert "10 %" in texts(chart)
    assert "0.1 %" not in texts(chart)  # outside


def test_line_chart_has_a_marker_for_each_point_where_they_are_few() -> None:
    few, many = ([(float(x), float(x * x)) for x in range(count)] for count in (5, 50))
    marks = markers(charts.line_chart(few, "step", "l"))
    assert len(marks) == 5
    steps = [right - left for (left, _), (right, _) in itertools.pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * 4, abs=1e-3)
    assert [y for _, y in marks] == sorted((y for _, y in marks), reverse=True)  # down is more
    assert markers(charts.line_chart(many, "step", "l")) == []


@pytest.mark.parametrize("values", [(1e308, -1e308), (5e-324, 0.0), (1.0, 1.0), (1e-300, 1e300)])
@pytest.mark.filterwarnings("error")
def test_values_as_far_apart_as_floats_can_be_are_drawn(values: tuple[float, float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    check_page(page_of(charts.line_chart(points, "step", "l"), charts.scatter(points, [0], "x", "ab", "s")))
    check_page(page_of(charts.histogram([3, 4], None, max(values), "h")))


def test_mask_is_white_where_weights_are_pruned_and_blue_where_they_are_kept() -> None:
    image_module = pytest.importorskip("PIL.Image")
    picture = charts.mask_image(torch.tensor([[0.0, 1.0, 0.5]]), "m")
    decoded = image_module.open(io.BytesIO(base64.b64decode(picture.png))).convert("RGB")
    assert decoded.size == (3, 1)
    white, blue, between = (decoded.getpixel((x, 0)) for x in range(3))
    assert (white, blue) == ((255, 255, 255), (16, 74, 130))
    assert all(low < value < high for low, value, high in zip(blue, between, white, strict=True))
    assert (picture.width, picture.height) == (3 * 58, 58)


def test_missing_matplotlib_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: charts.line_chart(POINTS, "x", "l"), lambda: charts.mask_image(torch.eye(2), "m")):
        with pytest.raises(BackendError, match=r"hf_sparse\[plot\]"):
            draw()
