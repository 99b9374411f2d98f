"""What the observing scorers refuse and remember. (Sums over steps and batches are in test_by_hand.)"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_sparse import RecipeError
from hf_sparse.pruning.scorers import Gradient, Taylor

WEIGHT, FIRST, SECOND = (torch.tensor([[a, b]]) for a, b in ((3.0, -5.0), (-2.0, 1.0), (4.0, 2.0)))


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (Gradient(), [[6.0, 3.0]]),
        (Gradient(momentum=0.5), [[5.0, 2.5]]),
        (Gradient(momentum=0.0), [[4.0, 2.0]]),
        (Taylor(), [[18.0, 15.0]]),
        (Taylor(momentum=0.5), [[15.0, 12.5]]),
        (Taylor(momentum=0), [[12.0, 10.0]]),
    ],
)
def test_observing_scorer_decays_what_it_remembers(scorer: Gradient, expected: list[list[float]]) -> None:
    importance = torch.zeros(1, 2)
    scorer.observe(importance, WEIGHT, FIRST)
    scorer.observe(importance, WEIGHT, SECOND)
    assert importance.tolist() == expected


def test_observing_scorer_leaves_what_it_looks_at_as_it_is() -> None:
    weight, gradient = WEIGHT.clone(), FIRST.clone()
    for scorer in (Gradient(), Taylor()):
        scorer.observe(torch.zeros(1, 2), weight, gradient)
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(gradient, FIRST)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, "0.5", None, True])
@pytest.mark.parametrize("cls", [Gradient, Taylor])
def test_observing_scorer_refuses_a_momentum_that_is_none(cls: type[Gradient], momentum: Any) -> None:
    with pytest.raises(RecipeError, match=r"`momentum` must be (a number )?in \[0, 1\], got "):
        cls(momentum=momentum)
