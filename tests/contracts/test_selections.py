"""What every selection of the registry promises; a new one is picked up by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import SparsityConfig, SparsityError, sparsify
from hf_sparse.config.sparsity import SELECTIONS
from hf_sparse.pruning.selection import Owl, PerRow, Selection
from hf_sparse.pruning.selection.budget import Budget

NEEDS_A_MODEL = {Budget.name, Owl.name}
"""Selections that know the costs of a model or the inputs of its layers; tests/pruning/selection/test_NAME.py."""
WITHIN_ROWS = {PerRow.name}
"""Selections in which the weights of a row compete with each other alone."""


def by_scores(name: str) -> Selection:
    """Return a selection that compares scores alone, with its default options."""
    if name in NEEDS_A_MODEL:
        pytest.skip(f"selection '{name}' is bound to a model")
    selection: Selection = SELECTIONS.build(name)
    return selection


def scores(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((6, 8), (1, 40), (3, 3))]


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_gives_a_bool_mask_for_each_weight_and_changes_no_score(name: str) -> None:
    given = scores()
    before = [tensor.clone() for tensor in given]
    kept = by_scores(name).select(given, 0.5)
    assert [(mask.dtype, mask.shape) for mask in kept] == [(torch.bool, tensor.shape) for tensor in given]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_keeps_all_at_no_sparsity_and_fewer_at_more(name: str) -> None:
    kept = [by_scores(name).select(scores(), sparsity) for sparsity in (0.0, 0.25, 0.5, 0.9)]
    counts = [sum(int(mask.sum()) for mask in masks) for masks in kept]
    total = sum(tensor.numel() for tensor in scores())
    assert counts[0] == total
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] < total


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_keeps_the_higher_scores_of_each_weight(name: str) -> None:
    for whole, kept in zip(scores(), by_scores(name).select(scores(), 0.5), strict=True):
        for tensor, mask in zip(whole, kept, strict=True) if name in WITHIN_ROWS else [(whole, kept)]:
            if mask.any() and not mask.all():
                assert tensor[mask].min() >= tensor[~mask].max()


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_is_the_same_each_time_also_among_equal_scores(name: str) -> None:
    equal = [torch.zeros(4, 4), torch.zeros(2, 3)]
    first, second = by_scores(name).select(equal, 0.5), by_scores(name).select(equal, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_refuses_nan(name: str) -> None:
    given = scores()
    given[1][0, 7] = float("nan")
    with pytest.raises(SparsityError, match="NaN"):
        by_scores(name).select(given, 0.5)


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_selection_prunes_a_model(name: str) -> None:
    by_scores(name)
    layers = [nn.Linear(16, 24), nn.Linear(24, 8)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    options: dict[str, Any] = {"targets": "*", "selection": name, "sparsity": 0.5}
    sparsify(model, SparsityConfig(**options))
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert zeros == pytest.approx(0.5 * (16 * 24 + 24 * 8), abs=16)
