"""Learned scores are a textbook optimizer group, whatever optimizer the Trainer is told to use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, get_scheduler

from hf_sparse import Pruner, RecipeError, SparsityCallback, SparsityConfig
from hf_sparse.hf.trainer.optimizer import check_optimizer
from hf_sparse.pruning.masked_weight import hidden
from tests.helpers.training import Rows, arguments, bert, sparse_trainer

STEPS = 12
CONFIG = SparsityConfig(
    sparsity=0.8,
    scorer={"name": "movement", "learning_rate": 0.03},
    schedule={"name": "cubic", "begin": 0.1, "end": 0.7},
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECAY = 0.1


def by_hand(model: torch.nn.Module, make: Any, clip: float) -> Pruner:
    """The same training in a plain loop: weights with decay, weights without, scores; one linear schedule."""
    no_decay = ("bias", "LayerNorm")
    pruner = Pruner(model, CONFIG).attach()
    scores = [unit.masked.scores for unit in pruner.units]
    learned = {id(score) for score in scores}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in learned]
    optimizer = make(
        [
            {"params": [p for n, p in named if not any(word in n for word in no_decay)], "weight_decay": DECAY},
            {"params": [p for n, p in named if any(word in n for word in no_decay)], "weight_decay": 0.0},
            {"params": scores, "lr": 0.03, "weight_decay": 0.0},
        ]
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    rows = Rows()
    model.train()
    pruner.step(0.0)
    for step in range(STEPS):
        index = range(8 * (step % 8), 8 * (step % 8) + 8)
        batch = torch.utils.data.default_collate([rows[i] for i in index])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / STEPS)
    return pruner


OPTIMIZERS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3),
}


class Keep:
    """Hold on to masks and weights before training ends and they are baked."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def take(self, pruner: Pruner) -> None:
        self.masks = [unit.masked.mask.clone() for unit in pruner.units]
        self.scores = [unit.masked.scores.detach().clone() for unit in pruner.units if unit.masked.scores is not None]
        self.weights = [hidden(unit.module).detach().clone() for unit in pruner.units]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_train_as_a_textbook_group_under(name: str, tmp_path: Path) -> None:
    model = bert(**NO_DROPOUT)
    expected = Keep()
    expected.take(by_hand(copy.deepcopy(model), OPTIMIZERS[name], clip=1.0))

    trainer = sparse_trainer(
        tmp_path,
        CONFIG,
        model,
        optim=name,
        max_steps=STEPS,
        warmup_steps=2,
        weight_decay=DECAY,
        train_sampling_strategy="sequential",
    )
    found = Keep()
    callback = trainer.callback_handler.callbacks[-2]
    original = callback.on_train_end

    def take_and_end(*args: Any, **kwargs: Any) -> None:
        found.take(callback.pruner)
        original(*args, **kwargs)

    callback.on_train_end = take_and_end
    trainer.train()

    assert max(float(score.abs().max()) for score in found.scores) > 0
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        assert torch.equal(ours, theirs)


def model_of(trainer: Any) -> torch.nn.Module:
    return trainer.model


def groups_of(trainer: Any) -> list[dict[str, Any]]:
    trainer.create_optimizer()
    return trainer.optimizer.param_groups


def test_scores_have_their_own_rate_and_no_decay(tmp_path: Path) -> None:
    groups = groups_of(sparse_trainer(tmp_path, CONFIG, weight_decay=DECAY))
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.03]
    assert [group["weight_decay"] for group in groups] == [DECAY, 0.0, 0.0]
    assert len(groups[2]["params"]) == 12
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))


def test_no_group_is_added_for_scorers_that_learn_nothing(tmp_path: Path) -> None:
    assert len(groups_of(sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5)))) == 2


def test_each_score_rate_gets_a_group(tmp_path: Path) -> None:
    config = SparsityConfig(
        groups=[
            {"targets": "*.attention.*", "sparsity": 0.5, "scorer": {"name": "movement", "learning_rate": 0.1}},
            {"exclude": "*.attention.*", "sparsity": 0.5, "scorer": {"name": "movement", "learning_rate": 0.2}},
        ]
    )
    groups = groups_of(sparse_trainer(tmp_path, config))
    assert [(group["lr"], len(group["params"])) for group in groups[2:]] == [(0.1, 8), (0.2, 4)]


def test_an_optimizer_of_the_user_gets_the_scores_too(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = sparse_trainer(tmp_path, CONFIG, model, trainer_options={"optimizers": (optimizer, None)})
    trainer.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 0.03]


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw", "lomo", "adalomo", "schedule_free_adamw"])
def test_optimizers_that_cannot_hold_the_rule_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"optim='{name}' cannot be used with SparsityCallback: .*Use adamw_torch"):
        check_optimizer(name)


def test_refused_optimizer_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lomo"):
        sparse_trainer(tmp_path, CONFIG, optim="lomo")


def test_trainer_that_makes_its_own_optimizer_is_an_error_before_step_one(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(list(model_of(self).parameters())[-2:], lr=0.1)
            return self.optimizer

    model = bert()
    before = copy.deepcopy(model.state_dict())
    trainer = Own(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[SparsityCallback(CONFIG)])
    with pytest.raises(RecipeError, match=r"scores of 12 weights .* call super\(\).create_optimizer"):
        trainer.train()
    assert torch.equal(before["classifier.weight"], model.state_dict()["classifier.weight"])


def test_plain_trainers_are_left_alone(tmp_path: Path) -> None:
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Rows())
    assert len(groups_of(trainer)) == 2
