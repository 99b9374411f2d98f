from __future__ import annotations

from typing import Any

import pytest

from hf_sparse import PatternError, RecipeError
from hf_sparse.config.sparsity import PATTERNS
from hf_sparse.pruning.patterns import NM
from hf_sparse.pruning.selection import WithinInputs


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:32", 1, 32)])
def test_nm_is_written_for_short(text: str, n: int, m: int) -> None:
    assert PATTERNS.build(text) == PATTERNS.build({"name": "n:m", "n": n, "m": m}) == NM(n, m)
    assert str(NM(n, m)) == text


def test_nm_decides_the_sparsity_and_the_selection() -> None:
    assert NM(2, 4).fixed_sparsity == 0.5
    assert NM(1, 4).fixed_sparsity == 0.75
    assert NM(1, 4).own_selection() == WithinInputs(1, 4)


def test_nm_refuses_inputs_that_m_does_not_divide() -> None:
    NM(2, 4).check((3070, 768), "dense.weight")  # along the inputs only
    with pytest.raises(PatternError) as caught:
        NM(2, 4).check((768, 3070), "bert.encoder.layer.3.output.dense.weight")
    assert str(caught.value) == (
        "pattern 2:4 needs the input dimension to be a multiple of 4, but 'bert.encoder.layer.3.output.dense.weight' "
        'has shape (768, 3070). Exclude it with exclude: "bert.encoder.layer.3.output.dense" or use pattern element.'
    )


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4), (2, 4.0), (True, 4), ("2", "4")])
def test_nm_refuses_what_is_no_n_of_m(n: Any, m: Any) -> None:
    with pytest.raises(RecipeError, match="must be integers with 1 <= n < m, got "):
        NM(n, m)


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4"])
def test_nm_refuses_a_short_name_that_is_no_n_of_m(text: str) -> None:
    with pytest.raises(RecipeError, match="must be integers with 1 <= n < m, got "):
        PATTERNS.build(text)


@pytest.mark.parametrize("text", ["2:", ":4", "2:4:8", "2-4", "12345:4", "2: 4"])
def test_nm_is_not_seen_in_other_names(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown pattern"):
        PATTERNS.build(text)
