"""The table of the GELU is what its script writes, and as near as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.tools import make_gelu_table


def test_header_is_what_the_script_writes() -> None:
    header = make_gelu_table.TARGET.read_text(encoding="utf-8")
    assert make_gelu_table.agrees(header)
    assert not make_gelu_table.agrees(header.replace("5.5f", "5.6f"))
    assert not make_gelu_table.agrees(header.replace("1.179269", "1.179369"))
    assert not make_gelu_table.agrees(header.replace("kGeluDegree = 8", "kGeluDegree = 7"))


@pytest.mark.parametrize("form", make_gelu_table.FORMS.values(), ids=make_gelu_table.FORMS)
def test_pieces_are_near_the_tail_of_the_normal_distribution(form: make_gelu_table.Form) -> None:
    table = make_gelu_table.table(form)
    for a in np.linspace(0, (form.pieces - 1.51) / form.scale, 4001):
        piece = round(a * form.scale)
        found = np.polyval(table[::-1, piece], a * form.scale - piece)
        wanted = math.erfc(a / math.sqrt(2)) / 2
        assert abs(found - wanted) < min(5e-9, 2.5e-5 * wanted), a
