"""How many are kept, and which: counts written by hand, ties by index, n:m on its way to n."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse import RecipeError, SparsityError
from hf_sparse.pruning.selection import Global, Selection, Threshold, Uniform, WithinInputs, kept_count


@pytest.mark.parametrize(
    ("groups", "sparsity", "kept"),
    [(1000, 0.9, 100), (1000, 0.97, 30), (100, 0.29, 71), (7, 0.5, 3), (3, 0.0, 3), (5, 0.9, 1), (1, 0.999, 1)],
)
def test_kept_count_rounds_down_and_keeps_at_least_one(groups: int, sparsity: float, kept: int) -> None:
    assert kept_count(groups, sparsity) == kept


def test_kept_count_is_exact_for_every_percentage() -> None:
    assert [kept_count(1000, percent / 100) for percent in range(100)] == [
        1000 - 10 * percent for percent in range(100)
    ]
    in_binary = [int((1 - percent / 100) * 1000) for percent in range(100)]
    assert in_binary[90] == 99  # what it would be otherwise


def test_kept_count_takes_floats_of_numpy() -> None:
    assert kept_count(1000, np.float64(0.9)) == 100


def test_uniform_keeps_the_same_share_of_every_weight_in_order_of_index_when_all_are_equal() -> None:
    kept = Uniform().select([torch.zeros(2, 3), torch.ones(10)], 0.5)
    assert kept[0].tolist() == [[True, True, True], [False, False, False]]
    assert kept[1].tolist() == [True] * 5 + [False] * 5


def test_global_keeps_the_count_in_order_of_weight_and_index_when_all_are_equal() -> None:
    kept = Global().select([torch.ones(3), torch.ones(2, 2), torch.ones(3)], 0.5)  # 5 of 10
    assert [mask.tolist() for mask in kept] == [[True] * 3, [[True, True], [False, False]], [False] * 3]


def test_global_may_remove_all_of_one_weight_and_says_where_it_cut() -> None:
    selection = Global()
    kept = selection.select([torch.tensor([0.1, 0.2]), torch.tensor([3.0, 1.0, 2.0])], 0.6)
    assert [mask.tolist() for mask in kept] == [[False, False], [True, False, True]]
    assert selection.threshold == 2.0
    selection.select([torch.tensor([0.1, 0.2])], 0.0)
    assert selection.threshold is None


def test_threshold_without_a_value_meets_the_sparsity_over_all_weights() -> None:
    kept = Threshold().select([torch.tensor([5.0, 1.0]), torch.tensor([4.0, 2.0])], 0.5)
    assert [mask.tolist() for mask in kept] == [[True, False], [True, False]]
    assert not Threshold().decides_sparsity


def test_threshold_with_a_value_rises_to_it_and_keeps_what_is_above() -> None:
    selection = Threshold(value=2.0)
    assert selection.decides_sparsity
    scores = [torch.tensor([0.0, 1.0, 1.5, 2.0, 2.5])]
    assert selection.select(scores, 0.0)[0].tolist() == [True] * 5
    assert selection.select(scores, 0.5)[0].tolist() == [False, False, True, True, True]
    assert selection.select(scores, 1.0)[0].tolist() == [False, False, False, False, True]
    assert selection.threshold == 2.0


def test_threshold_that_is_above_all_scores_leaves_the_highest_of_each_weight() -> None:
    scores = [torch.arange(1000.0), torch.zeros(10), torch.tensor([[3.0, 1.0], [2.0, 101.0]])]
    kept = Threshold(value=100.0).select([scores[0] / 1e4, *scores[1:]], 1.0)
    assert kept[0].nonzero().flatten().tolist() == [994, 995, 996, 997, 998, 999]  # 0.5 % and one
    assert kept[1].tolist() == [True] + [False] * 9  # equals: the first
    assert kept[2].tolist() == [[False, False], [False, True]]  # nothing to add


@pytest.mark.parametrize("value", [math.inf, math.nan, "0.1", True, [1.0]])
def test_threshold_refuses_a_value_that_is_no_number(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"`value` must be a (finite )?number"):
        Threshold(value=value)


def test_within_inputs_keeps_the_highest_of_every_group_and_the_lower_index_of_equals() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [0.0, 9.0, 9.0, 9.0, -1.0, -3.0, -2.0, -4.0]])
    (kept,) = WithinInputs(2, 4).select([scores], 0.5)
    assert kept.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 4), (0.24, 4), (0.25, 3), (0.49, 3), (0.5, 2), (0.75, 1)])
def test_within_inputs_passes_through_m_less_one_on_its_way_to_n(sparsity: float, kept: int) -> None:
    (mask,) = WithinInputs(1, 4).select([torch.rand(3, 8)], sparsity)
    assert mask.view(-1, 4).sum(1).tolist() == [kept] * 6


def test_within_inputs_never_drops_below_n() -> None:
    (mask,) = WithinInputs(2, 4).select([torch.rand(3, 8)], 0.99)
    assert mask.view(-1, 4).sum(1).tolist() == [2] * 6


def test_within_inputs_reaches_n_for_every_n_and_m() -> None:
    """`1 - n/m` is no float for most: computed without care, 4:5 would keep all five."""
    for m in range(2, 33):
        for n in range(1, m):
            (mask,) = WithinInputs(n, m).select([torch.zeros(1, m)], 1.0 - n / m)
            assert mask.tolist() == [[True] * n + [False] * (m - n)], f"{n}:{m}"


SELECTIONS = [Uniform(), Global(), Threshold(), Threshold(value=0.5), WithinInputs(2, 4)]


@pytest.mark.parametrize("selection", SELECTIONS, ids=repr)
def test_selection_refuses_nan(selection: Selection) -> None:
    with pytest.raises(SparsityError, match="NaN among the scores"):
        selection.select([torch.ones(1, 8), torch.tensor([[1.0, math.nan, 2.0, 3.0]])], 0.5)


@pytest.mark.parametrize("selection", SELECTIONS, ids=repr)
def test_selection_keeps_infinity_before_all_and_minus_infinity_after(selection: Selection) -> None:
    (kept,) = selection.select([torch.tensor([[-math.inf, math.inf, 0.4, 0.6]])], 0.5)
    assert not kept[0, 0]
    assert kept[0, 1]
