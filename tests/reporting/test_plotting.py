"""Pictures of matplotlib: labels that do not overlap, texts taken literally, what they show in their metadata."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from hf_sparse.errors import RecipeError
from hf_sparse.reporting.plotting import check_picture, describe_figure, new_figure, write_figure, write_labels

text_module = pytest.importorskip("matplotlib.text")
image_module = pytest.importorskip("PIL.Image")
CROWD = [(50 + 0.05 * index, 0.8 + 0.001 * (index % 3)) for index in range(7)] + [(60.0, 0.9)]


def test_labels_of_a_picture_cover_neither_each_other_nor_marks() -> None:
    extent = text_module.Text.get_window_extent  # without the line to the marker
    figure = new_figure(4, 4)
    axes = figure.subplots()
    axes.scatter(*zip(*CROWD, strict=True))
    names = [f"{10 * index} %" for index in range(7)] + [""]
    write_labels(figure, axes, CROWD, names, ["C0"] * 8)
    figure.draw_without_rendering()
    boxes = [extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == names[:-1]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert not box.count_contains(axes.transData.transform(CROWD))
        assert axes.get_window_extent().count_contains([box.min, box.max]) == 2


def test_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    figure = new_figure(2, 2)
    axes = figure.subplots()
    axes.scatter([0.0], [1.0], label=r"$\frac$")
    axes.set_xlabel(r"$\no_such{macro$")
    figure.legend()
    write_labels(figure, axes, [(0.0, 1.0)], [r"$\frac{$"], ["C0"])
    write_figure(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_png_says_what_it_shows(tmp_path: Path) -> None:
    figure = new_figure(2, 2)
    axes = figure.subplots()
    axes.plot([1.0, 2.0], [3.0, 4.0])
    axes.scatter([5.0], [6.0], label="run")
    axes.vlines(5.0, 5.5, 6.5)
    axes.set_xlabel("size")
    write_labels(figure, axes, [(5.0, 6.0)], ["90 %"], ["C0"])
    for name in ("a.png", "b.svg", "c.pdf"):
        write_figure(figure, tmp_path / name)
    stored = image_module.open(tmp_path / "a.png").text["Description"]
    assert stored == describe_figure(figure)
    assert json.loads(stored) == [
        {
            "x": "size",
            "y": "",
            "scale": "linear",
            "lines": [[[1.0, 3.0], [2.0, 4.0]]],
            "points": [["run", [5.0, 6.0]]],
            "labels": [["90 %", [5.0, 6.0]]],
        }
    ]


def test_picture_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suffix must be one of .*png"):
        check_picture(tmp_path / "x.xyz")
    with pytest.raises(RecipeError, match="does not exist"):
        check_picture(tmp_path / "no" / "x.png")
    check_picture(tmp_path / "x.png")
    with pytest.raises(RecipeError, match="cannot write"):
        write_figure(new_figure(1, 1), tmp_path / "no" / "x.png")
