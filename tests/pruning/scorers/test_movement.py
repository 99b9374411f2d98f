"""What the learned scorers refuse, and how soft movement is steered. (The steps themselves are in test_by_hand.)"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_sparse import RecipeError, SparsityConfig
from hf_sparse.pruning.scorers import Movement, SoftMovement
from hf_sparse.pruning.selection import Threshold


def soft(**options: Any) -> SoftMovement:
    scorer = SoftMovement(**options)
    scorer.shared_state(1000)
    return scorer


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan, "1e-2", True, None])
@pytest.mark.parametrize("cls", [Movement, SoftMovement])
def test_learned_scorer_refuses_a_learning_rate_that_is_none(cls: type[Movement], rate: Any) -> None:
    with pytest.raises(RecipeError, match=r"`learning_rate` must be (a number )?in \(0, inf\), got "):
        cls(learning_rate=rate)


def test_learning_rate_that_yaml_reads_as_text_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r"scorer 'movement': `learning_rate` must be a number in \(0, inf\), got '1e-2'"
    ):
        SparsityConfig(sparsity=0.5, scorer={"name": "movement", "learning_rate": "1e-2"})


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, math.nan, "0.1", True])
def test_soft_movement_refuses_a_threshold_that_no_sigmoid_takes(threshold: Any) -> None:
    with pytest.raises(RecipeError, match=r"`threshold` must be (a number )?in \(0, 1\), got "):
        SoftMovement(threshold=threshold)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan, "400", True])
def test_soft_movement_refuses_a_strength_that_can_never_rise(strength: Any) -> None:
    with pytest.raises(RecipeError, match=r"`penalty_strength` must be (a number )?in \(0, inf\), got "):
        SoftMovement(penalty_strength=strength)


def test_soft_movement_starts_from_the_strength_of_the_paper_for_a_model_of_its_size() -> None:
    assert float(SoftMovement().shared_state(85_000_000)["strength"]) == pytest.approx(400.0)
    assert float(SoftMovement().shared_state(850_000)["strength"]) == pytest.approx(4.0)
    assert float(SoftMovement(penalty_strength=7.0).shared_state(850_000)["strength"]) == 7.0


def test_soft_movement_selects_over_all_its_weights() -> None:
    assert SoftMovement().own_selection() == Threshold()
    assert Movement().own_selection() is None


def test_soft_movement_penalty_is_the_mean_over_weights_of_their_means() -> None:
    scorer = soft(penalty_strength=8.0)
    small, large = torch.zeros(1, 2), torch.full((10, 10), 100.0)  # sigmoids 0.5 and 1: each weight counts once
    assert float(scorer.penalty([small, large])) == 0.0
    scorer.adapt(None, 0.5)
    assert float(scorer.penalty([small, large])) == pytest.approx(8.0 * 0.5 * 0.75)


def test_soft_movement_penalty_pulls_every_score_down() -> None:
    scorer = soft(penalty_strength=8.0)
    scorer.adapt(None, 1.0)
    scores = torch.zeros(1, 2, requires_grad=True)
    scorer.penalty([scores]).backward()
    # 8 * sigmoid'(0) / 2 = 8 * 0.25 / 2, and gradient descent subtracts it.
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("threshold", "level", "factor"),
    [
        # The cut is to be at level * ln(0.1 / 0.9) = -2.1972 * level; an error counts up to 1, and 1 is 2 %.
        (0.0, 0.0, 1.0),
        (0.5, 0.0, math.exp(0.01)),
        (-0.5, 0.0, math.exp(-0.01)),
        (-2.1972246, 1.0, 1.0),
        (0.0, 1.0, math.exp(0.02)),
        (-9.0, 1.0, math.exp(-0.02)),
        (-1.0986123, 0.5, 1.0),
        (-0.5986123, 0.5, math.exp(0.01)),
    ],
)
def test_soft_movement_pulls_harder_when_the_cut_is_too_high(threshold: float, level: float, factor: float) -> None:
    scorer = soft(penalty_strength=8.0)
    scorer.adapt(threshold, level)
    assert float(scorer.strength) == pytest.approx(8.0 * factor)
    assert float(scorer.level) == level


def test_soft_movement_is_not_steered_while_nothing_is_cut() -> None:
    scorer = soft(penalty_strength=8.0)
    scorer.adapt(None, 0.3)
    assert (float(scorer.strength), float(scorer.level)) == (8.0, 0.3)


@pytest.mark.parametrize(("threshold", "bound"), [(50.0, 8e4), (-50.0, 8e-4)])
def test_soft_movement_strength_stays_in_its_range(threshold: float, bound: float) -> None:
    scorer = soft(penalty_strength=8.0)
    for _ in range(1000):
        scorer.adapt(threshold, 1.0)
    assert float(scorer.strength) == pytest.approx(bound)


def test_soft_movement_steers_the_tensors_that_are_saved() -> None:
    scorer = SoftMovement(penalty_strength=8.0)
    state = scorer.shared_state(1000)
    scorer.adapt(9.0, 0.7)
    assert float(state["strength"]) > 8.0
    assert float(state["level"]) == 0.7


@pytest.mark.parametrize(("threshold", "logged"), [(0.0, 0.5), (-2.1972246, 0.1), (1e4, 1.0), (-1e4, 0.0)])
def test_soft_movement_logs_the_cut_as_a_sigmoid_however_far(threshold: float, logged: float) -> None:
    scorer = soft(penalty_strength=8.0)
    scorer.adapt(None, 0.5)
    assert scorer.logs(threshold) == {"threshold": pytest.approx(logged), "penalty_strength": 4.0}
    assert scorer.logs(None) == {"penalty_strength": 4.0}
