"""Pages: every value is escaped, numbers are aligned, nothing is fetched."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from hf_sparse.reporting.html import Bars, Figure, Figures, Heatmap, Image, Section, Table, render
from tests.helpers.pages import EVIL, check_page

EVERYTHING = [
    Section(EVIL, [Table([EVIL, "b"], [[EVIL, 1], ["x", '" onload="alert(1)']])], EVIL),
    Section("bars", [Bars([(EVIL, 0.5)]), Heatmap([(EVIL, [0.0, 1.0])], separated=True)], omitted=EVIL),
    Section("figures", [Figures([Figure(EVIL, [Image("AAAA", 2, 2, EVIL)], omitted=EVIL)], small=True)]),
]


def test_names_come_out_escaped_wherever_they_stand() -> None:
    text = render(EVIL, EVERYTHING)
    check_page(text)
    assert text.count("&lt;script&gt;") == 14
    assert 'onload="' not in text


def test_control_characters_do_not_reach_the_page() -> None:
    text = render("a\x00b\x1b[31m\ud800", [Section("s", [Table(["\x07"], [["\x08"]])])])
    assert not {sign for sign in text if not sign.isprintable()} - {"\n"}
    assert "a\ufffdb" in text
    text.encode("utf-8")


def test_columns_of_numbers_are_aligned_right_and_others_left() -> None:
    text = render("t", [Section("s", [Table(["name", "n", "signed"], [["a", 1, "+0.5"], ["3 b", "-", "-1"]])])])
    assert '<th>name</th><th class="number">n</th><th class="number">signed</th>' in text
    assert '<td data-name="name"><span>3 b</span></td>' in text
    assert '<td class="number" data-name="signed"><span>-1</span></td>' in text


def test_table_without_rows_has_its_head_and_ragged_rows_are_refused() -> None:
    check_page(text := render("t", [Section("s", [Table(["a", "b"], [])])]))
    assert "<th>b</th>" in text
    with pytest.raises(ValueError, match="zip"):
        render("t", [Section("s", [Table(["a", "b"], [["only one"]])])])


def test_fractions_out_of_range_are_clamped() -> None:
    text = render("t", [Section("s", [Bars([("low", -1.0), ("high", 2.0)]), Heatmap([("h", [5.0, -5.0])])])])
    assert 'style="width:0.00%"' in text
    assert 'style="width:100.00%"' in text
    assert 'style="--v:1.000"' in text
    assert "--v:5" not in text


def test_charts_are_inlined_as_they_are() -> None:
    assert "<svg></svg>" in render("t", [Section("s", [Figures([Figure("c", charts=[Markup("<svg></svg>")])])])])


def test_policy_of_the_page_allows_no_script_and_no_request() -> None:
    text = render("t", [])
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in text
    check_page(text)
