from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse import RecipeError
from hf_sparse.pruning.scorers import Random
from tests.helpers.layers import attached, two_layers


def test_random_scores_do_not_depend_on_the_weight() -> None:
    a, b = torch.rand(4, 4), torch.rand(4, 4)
    assert torch.equal(Random().element_scores(a), Random().element_scores(b))


def test_random_scores_differ_by_seed() -> None:
    weight = torch.rand(4, 4)
    assert not torch.equal(Random(seed=0).element_scores(weight), Random(seed=1).element_scores(weight))


def test_random_leaves_the_random_state_of_training_alone() -> None:
    weight, before = torch.rand(4, 4), torch.get_rng_state()
    Random().element_scores(weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_removes_for_good() -> None:
    pruner = attached(two_layers(), scorer="random", sparsity=0.9, schedule={"name": "linear", "begin": 0.0})
    previous = None
    for step in range(11):
        pruner.step(step / 10)
        mask = pruner.units[0].masked.mask.clone()
        assert previous is None or not (mask & ~previous).any()
        previous = mask


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, "1", True, None])
def test_random_refuses_a_seed_that_is_no_whole_number(seed: Any) -> None:
    with pytest.raises(RecipeError, match=r"`seed` must be an integer in \[0, 2\*\*63\), got "):
        Random(seed=seed)
