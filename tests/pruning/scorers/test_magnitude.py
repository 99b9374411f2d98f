from __future__ import annotations

import math

import torch

from hf_sparse.pruning.scorers import Magnitude
from tests.helpers.layers import attached, one_layer


def test_magnitude_is_the_absolute_value() -> None:
    scores = Magnitude().element_scores(torch.tensor([[-2.0, 0.0, 1.0, -math.inf]]))
    assert scores.tolist() == [[2.0, 0.0, 1.0, math.inf]]


def test_magnitude_of_a_block_is_the_mean_over_it() -> None:
    model = one_layer([[1.0, -5.0, 2.0, 2.0]])  # means 3 and 2
    attached(model, sparsity=0.5, pattern={"name": "block", "rows": 1, "cols": 2}).step(1.0)
    assert model[0].weight.tolist() == [[1.0, -5.0, 0.0, 0.0]]


def test_magnitude_looks_at_the_value_under_the_mask() -> None:
    """A removed weight keeps its value, so it comes back when another one becomes smaller."""
    model = one_layer([[3.0, 4.0]])
    pruner = attached(model, sparsity=0.5)
    pruner.step(1.0)
    assert model[0].weight.tolist() == [[0.0, 4.0]]
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 1] = -1.0
    pruner.step(1.0)
    assert model[0].weight.tolist() == [[3.0, 0.0]]
