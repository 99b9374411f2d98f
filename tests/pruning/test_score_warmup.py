"""The warm-up of learned scores: a factor on top of whatever schedule their learning rate follows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_sparse import Pruner, RecipeError, SparsityConfig
from hf_sparse.pruning.masked_weight import masked_weight
from hf_sparse.pruning.scorers import Movement, SoftMovement
from tests.helpers.training import RAMP, Rows, bert, sparse_trainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def movement(warmup: float, rate: float = 0.1) -> dict[str, Any]:
    return {"name": "movement", "learning_rate": rate, "warmup": warmup}


def one_weight() -> tuple[nn.Sequential, Pruner, torch.optim.Optimizer]:
    """A weight of 2 whose loss is -W': the gradient of its score is -2 at every step."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[2.0]]))
    model = nn.Sequential(linear)
    pruner = Pruner(model, SparsityConfig(targets="*", sparsity=0.0, scorer=movement(0.5))).attach()
    groups = pruner.parameter_groups()
    return model, pruner, torch.optim.SGD([{**groups[0], "lr": 0.0}, groups[1]], lr=0.0)


def test_scores_warm_up_along_the_progress_of_the_run() -> None:
    model, pruner, optimizer = one_weight()
    pruner.warm_up(optimizer)
    scores, seen = pruner.units[0].masked.scores, []
    assert scores is not None
    pruner.step(0.0)
    for step in range(4):
        (-model(torch.ones(1, 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(scores.detach()))
        pruner.step((step + 1) / 4)
    # Factors 0, 1/2, 1, 1 of 0.1 * 2.
    assert seen == pytest.approx([0.0, 0.1, 0.3, 0.5])


def test_the_rate_that_others_see_is_the_scheduled_one_after_each_step() -> None:
    model, pruner, optimizer = one_weight()
    pruner.warm_up(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    pruner.step(0.0)
    for step in range(3):
        (-model(torch.ones(1, 1))).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 / (1 + step))
        scheduler.step()
        pruner.step((step + 1) / 4)
    assert "warmup" not in optimizer.state_dict()["param_groups"][1]


def test_a_step_that_fails_leaves_the_rate_as_it_was_scheduled() -> None:
    _, pruner, optimizer = one_weight()
    pruner.warm_up(optimizer)
    pruner.step(0.0)

    def closure() -> float:
        raise ValueError("no loss today")

    with pytest.raises(ValueError, match="no loss today"):
        optimizer.step(closure)
    pruner.step(1.0)
    optimizer.step()
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_each_warm_up_has_a_group_of_its_own() -> None:
    model = bert()
    groups = [
        {"targets": "*.attention.*", "sparsity": 0.5, "scorer": movement(0.25)},
        {"exclude": "*.attention.*", "sparsity": 0.5, "scorer": movement(0.0)},
    ]
    pruner = Pruner(model, SparsityConfig(groups=groups)).attach()
    made: Any = pruner.score_groups()
    assert [(group["lr"], len(group["params"])) for group in made] == [(0.1, 8), (0.1, 4)]


def test_trainer_multiplies_the_warm_up_with_the_schedule_of_the_weights(tmp_path: Path) -> None:
    steps = 8
    config = SparsityConfig(sparsity=0.8, scorer=movement(0.5, 0.03), schedule=RAMP)
    by_hand = bert(**NO_DROPOUT)
    pruner = Pruner(by_hand, config).attach()
    weights, scores = pruner.parameter_groups()
    optimizer = torch.optim.SGD([{**weights, "lr": 0.1}, scores], lr=0.1)

    def linear(step: int) -> float:
        return min(step / 2, (steps - step) / (steps - 2))

    lambdas = [linear, lambda step: linear(step) * min(1.0, step / (0.5 * steps))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas)
    rows = Rows()
    pruner.step(0.0)
    for step in range(steps):
        batch = torch.utils.data.default_collate([rows[i] for i in range(8 * step, 8 * step + 8)])
        by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / steps)
    expected = [unit.masked.scores for unit in pruner.units]

    found: list[torch.Tensor] = []

    class Take(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            masks = [masked_weight(module) for module in model.modules()]
            found[:] = [mask.scores.detach().clone() for mask in masks if mask is not None and mask.scores is not None]

    sparse_trainer(
        tmp_path, config, bert(**NO_DROPOUT), [Take()], optim="sgd", learning_rate=0.1, max_steps=steps, warmup_steps=2,
        train_sampling_strategy="sequential",
    ).train()  # fmt: skip
    assert max(float(tensor.abs().max()) for tensor in found) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_run_resumed_in_its_warm_up_is_the_uninterrupted_run(tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.9, scorer=movement(0.8), schedule={**RAMP, "every": 3})
    whole = sparse_trainer(tmp_path / "whole", config, save_strategy="steps", save_steps=7)
    whole.train()
    again = sparse_trainer(tmp_path / "again", config, save_strategy="steps", save_steps=7)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], expected), name


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan, "0.1", True, None])
@pytest.mark.parametrize("cls", [Movement, SoftMovement])
def test_warm_up_is_a_fraction_of_the_run(cls: type[Movement], warmup: Any) -> None:
    with pytest.raises(RecipeError, match=r"`warmup` must be (a number )?in \[0, 1\), got "):
        cls(warmup=warmup)
