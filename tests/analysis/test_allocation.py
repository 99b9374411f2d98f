"""Allocations hit the total exactly, follow their rule on layers counted by hand, and survive the way into a recipe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import RecipeError, SparsityConfig, sparsify
from hf_sparse.analysis.allocation import by_sensitivity, erdos_renyi, groups_of
from hf_sparse.pruning.selection import kept_count

SIDES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@settings(deadline=None)
@given(SIDES, st.floats(0, 0.99))
def test_erdos_renyi_hits_the_total_and_no_layer_is_empty_or_too_full(sides, sparsity):
    shapes = {str(place): shape for place, shape in enumerate(sides)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = kept_count(sum(sizes.values()), sparsity)
    if total < len(sizes):
        with pytest.raises(RecipeError, match="each keeps at least one"):
            erdos_renyi(shapes, sparsity)
        return
    kept = erdos_renyi(shapes, sparsity)
    assert sum(kept.values()) == total
    assert all(1 <= kept[name] <= sizes[name] for name in sizes)
    for group in groups_of(kept, sizes):
        assert kept_count(sizes[group["targets"]], group["sparsity"]) == kept[group["targets"]]


@settings(deadline=None)
@given(st.data(), SIDES)
def test_sensitivity_hits_the_total_for_any_curve(data, sides):
    sizes = {str(place): rows * columns for place, (rows, columns) in enumerate(sides)}
    levels = [0.5, 0.7, 0.9]
    curve = st.lists(st.floats(-2, 2), min_size=3, max_size=3)
    curves = {name: data.draw(curve) for name in sizes}
    sparsity = data.draw(st.floats(0, 0.9))
    total = kept_count(sum(sizes.values()), sparsity)
    if total >= len(sizes):
        kept = by_sensitivity(sizes, levels, curves, sparsity)
        assert sum(kept.values()) == total
        assert all(1 <= kept[name] <= sizes[name] for name in sizes)


def test_erdos_renyi_leaves_a_layer_dense_that_would_be_more_than_full():
    # One scale for all would give the small layer 101 * 4/44 = 9 of its 4 weights.
    assert erdos_renyi({"small": (2, 2), "large": (20, 20)}, 0.75) == {"small": 4, "large": 97}


def test_sensitivity_equalises_the_increase_on_curves_with_a_bend():
    levels = [0.5, 0.9]
    curves = {"a": [1.0, 2.0], "b": [2.0, 10.0]}
    # An increase of 1.5 is a = 0.5 + 0.4 * 0.5 = 0.7 and b = 0.5 * 1.5 / 2 = 0.375.
    kept = by_sensitivity({"a": 1000, "b": 1000}, levels, curves, (0.7 + 0.375) / 2)
    assert kept == {"a": 300, "b": 625}


def test_a_layer_that_costs_nothing_is_pruned_first_and_not_above_what_was_measured():
    curves = {"free": [0.0], "dear": [1.0]}
    assert by_sensitivity({"free": 100, "dear": 100}, [0.8], curves, 0.2) == {"free": 60, "dear": 100}
    assert by_sensitivity({"free": 100, "dear": 100}, [0.8], curves, 0.5) == {"free": 20, "dear": 80}
    with pytest.raises(RecipeError, match=r"at most the highest measured level, 0\.8, got .*: measure a higher one"):
        by_sensitivity({"free": 100, "dear": 100}, [0.8], curves, 0.81)


def test_groups_prune_a_model_to_exactly_the_total():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(13, 29), torch.nn.Linear(29, 7), torch.nn.Linear(7, 3)]
    model = torch.nn.Sequential(*layers)
    shapes = {str(place): (layer.out_features, layer.in_features) for place, layer in enumerate(layers)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    kept = erdos_renyi(shapes, 0.83)
    sparsify(model, SparsityConfig.from_dict({"groups": groups_of(kept, sizes)}))
    assert {str(i): int(layer.weight.count_nonzero()) for i, layer in enumerate(layers)} == kept
    assert sum(kept.values()) == kept_count(sum(sizes.values()), 0.83)


def test_a_layer_without_which_the_loss_is_not_finite_is_no_layer_that_costs_nothing():
    with pytest.raises(RecipeError, match="not finite with 'b' pruned"):
        by_sensitivity({"a": 100, "b": 100}, [0.8], {"a": [1.0], "b": [float("nan")]}, 0.4)
