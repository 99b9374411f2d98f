"""SparsityCallback in a real Trainer: what it reaches, what it refuses before step one, and what it writes."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_sparse import SparsityCallback, SparsityConfig, sparsify, summarize
from hf_sparse.pruning.masked_weight import masked_weight
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=Rows(16).ids).logits


# -- what it reaches -------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.9},
    "magnitude-global": {"sparsity": 0.9, "selection": "global"},
    "movement": {"sparsity": 0.9, "scorer": "movement"},
    "movement-block": {"sparsity": 0.75, "scorer": "movement", "pattern": {"name": "block", "rows": 8, "cols": 8}},
    "soft_movement": {"sparsity": 0.9, "scorer": "soft_movement"},
    "gradient": {"sparsity": 0.9, "scorer": "gradient"},
    "taylor": {"sparsity": 0.9, "scorer": {"name": "taylor", "momentum": 0.5}},
    "random": {"sparsity": 0.9, "scorer": "random"},
    "2:4": {"pattern": "2:4", "scorer": "movement"},
    "rows": {"sparsity": 0.5, "pattern": "row", "scorer": "movement"},
}


@pytest.mark.parametrize("name", METHODS)
def test_training_reaches_the_sparsity_that_was_asked(name: str, tmp_path: Path) -> None:
    config = SparsityConfig(**METHODS[name], schedule=RAMP)
    trainer = sparse_trainer(tmp_path, config)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    asked = config.groups[0].sparsity or 0.5
    # A weight of 32x32 has 1,024 entries and 16 blocks of 8x8; kept counts are whole numbers.
    assert summarize(trainer.model).sparsity == pytest.approx(asked, abs=1e-3)
    assert summarize(trainer.model).parameters == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert type(trainer.model.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert set(trainer.model.state_dict()) == {key for key in before if "weight_" not in key}
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_soft_movement_reaches_its_sparsity_at_every_step_of_the_schedule(tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.8, scorer="soft_movement", schedule={"name": "linear", "begin": 0.0, "end": 0.5})
    trainer = sparse_trainer(tmp_path, config, logging_steps=1)
    trainer.train()
    logged = [log["sparsity"] for log in trainer.state.log_history if "loss" in log]
    expected = [min(1.0, step / 10) * 0.8 for step in range(1, 21)]
    assert logged == pytest.approx(expected, abs=0.005)


def test_scores_learn_from_step_one_while_nothing_is_pruned_yet(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            masked = masked_weight(model.bert.encoder.layer[0].attention.self.query)
            assert masked is not None
            assert masked.scores is not None
            seen.append(float(masked.scores.detach().abs().sum()) if bool(masked.mask.all()) else math.nan)

    config = SparsityConfig(sparsity=0.9, scorer="movement", schedule={"name": "cubic", "begin": 0.5, "end": 0.9})
    sparse_trainer(tmp_path, config, callbacks=[Watch()]).train()
    # The query of the first layer has a gradient from the first step on, and its mask keeps all until half-time.
    assert seen[0] > 0
    assert seen[8] > seen[0]


def test_masks_are_renewed_every_n_steps_and_where_the_ramp_ends(tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.8, schedule={"name": "linear", "begin": 0.0, "end": 0.55, "every": 4})
    trainer = sparse_trainer(tmp_path, config, logging_steps=1)
    trainer.train()
    logged = [round(log["sparsity"], 2) for log in trainer.state.log_history if "loss" in log]
    at_four, at_eight = round(0.8 * 4 / 11, 2), round(0.8 * 8 / 11, 2)
    assert logged == [0.0] * 3 + [at_four] * 4 + [at_eight] * 3 + [0.8] * 10


def test_masks_stay_as_they_are_once_frozen_and_scores_do_not_matter_any_more(tmp_path: Path) -> None:
    seen: list[list[torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            layers = [masked_weight(module) for module in model.modules()]
            seen.append([masked.mask.clone() for masked in layers if masked is not None])

    schedule = {"name": "cubic", "begin": 0.0, "end": 0.5, "freeze": 0.72, "every": 4}
    sparse_trainer(
        tmp_path, SparsityConfig(sparsity=0.8, scorer="movement", schedule=schedule), callbacks=[Watch()]
    ).train()

    def same(first: int, second: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(seen[first - 1], seen[second - 1], strict=True))

    assert not same(10, 12)  # the final sparsity is reached, and the masks go on changing
    assert not same(14, 15)  # renewed once more as they are fixed: 0.72 of 20 steps is between steps 14 and 15
    assert all(same(15, step) for step in range(16, 21))


@pytest.mark.parametrize("late", [False, True])
def test_model_init_and_a_callback_added_late_work_too(late: bool, tmp_path: Path) -> None:
    callback = SparsityCallback(SparsityConfig(sparsity=0.9, scorer="movement", schedule=RAMP))
    options: dict[str, Any] = {"model": bert()} if late else {"model_init": lambda: bert(), "callbacks": [callback]}
    trainer: Any = Trainer(args=arguments(tmp_path), train_dataset=Rows(), **options)
    if late:
        trainer.add_callback(callback)
    trainer.train()
    assert summarize(trainer.model).sparsity == pytest.approx(0.9, abs=1e-3)


def test_penalty_does_not_depend_on_how_a_batch_is_accumulated(tmp_path: Path) -> None:
    config = SparsityConfig(
        sparsity=0.5,
        scorer={"name": "soft_movement", "penalty_strength": 50.0},
        schedule={"name": "constant", "begin": 0.0},
    )
    scores = []
    for accumulate in (1, 4):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = sparse_trainer(
            tmp_path, config, model, optim="sgd", max_steps=1, logging_steps=1, max_grad_norm=0.0,
            per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        callback = trainer.callback_handler.callbacks[-2]
        # Only the pull of the penalty: without the task's loss, whose scaling is the Trainer's affair.
        for parameter in model.classifier.parameters():
            parameter.requires_grad_(False).zero_()
        trainer.create_optimizer()
        kept: dict[str, torch.Tensor] = {}
        original = callback.on_train_end
        callback.on_train_end = lambda *a, _c=callback, _k=kept, _o=original, **k: (
            _k.update({u.name: u.masked.scores.detach().clone() for u in _c.pruner.units}),
            _o(*a, **k),
        )[1]
        trainer.train()
        scores.append(kept)
    assert scores[0]
    for name in scores[0]:
        assert float(scores[0][name].abs().max()) > 0
        torch.testing.assert_close(scores[0][name], scores[1][name], rtol=1e-4, atol=1e-9)


# -- the best model --------------------------------------------------------------------------------------------------


def test_best_model_is_never_less_sparse_than_asked(tmp_path: Path) -> None:
    # The metric gets worse from evaluation to evaluation, so the first, dense checkpoint would win.
    rising = iter(range(100))
    trainer = sparse_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        trainer_options={"compute_metrics": lambda _: {"badness": float(next(rising))}},
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="badness", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 12  # the first at the end of the ramp, 0.6 of 20 steps
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    assert summarize(trainer.model).sparsity == pytest.approx(0.9, abs=1e-3)
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(logits(best), logits(trainer.model))


def test_stopping_before_the_schedule_ends_warns_and_says_the_sparsity(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    trainer = sparse_trainer(tmp_path, callbacks=[Stop()])
    logging.getLogger("hf_sparse.hf.trainer.callback").addHandler(caplog.handler)
    trainer.train()
    assert "stopped at step 5 of 20, before the schedule reached its final sparsity" in caplog.text
    assert 0.3 < summarize(trainer.model).sparsity < 0.9


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"schedule": RAMP}, True),
        ({"schedule": {**RAMP, "initial": 0.5}}, False),
        ({"schedule": {**RAMP, "initial": 0.4}}, True),
        ({"schedule": {**RAMP, "initial": 0.5}, "scorer": "movement"}, True),
        ({"schedule": RAMP, "targets": "*.layer.0.*"}, False),
    ],
)
def test_zeros_of_an_earlier_pruning_that_would_train_again_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], warned: bool
) -> None:
    model = sparsify(bert(), SparsityConfig(sparsity=0.5, targets="*.layer.1.*"))
    with caplog.at_level(logging.WARNING, "hf_sparse.pruning.group_checks"):
        trainer = sparse_trainer(tmp_path, SparsityConfig(**{"sparsity": 0.9, **options}), model=model)
        logging.getLogger("hf_sparse.pruning.group_checks").addHandler(caplog.handler)
        trainer.train()
    assert ("6 weights (first: bert.encoder.layer.1.attention.self.query.weight) have zeros" in caplog.text) == warned


# -- logs ------------------------------------------------------------------------------------------------------------


def test_logs_reach_the_state_and_every_other_callback(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    config = SparsityConfig(
        groups=[
            {"targets": "*.attention.*", "sparsity": 0.5, "scorer": "soft_movement", "schedule": RAMP},
            {"exclude": "*.attention.*", "sparsity": 0.8, "schedule": RAMP, "selection": "global"},
        ]
    )
    trainer = sparse_trainer(tmp_path, config, eval_strategy="steps", eval_steps=10)
    trainer.callback_handler.callbacks.insert(0, Reporter())  # reporters of transformers come first, like this one
    trainer.train()
    last = [log for log in seen if "loss" in log][-1]
    assert last["sparsity_0"] == pytest.approx(0.5, abs=1e-3)
    assert last["sparsity_1"] == pytest.approx(0.8, abs=1e-3)
    assert last["sparsity"] == pytest.approx(0.65, abs=1e-3)  # both groups have 8,192 weights
    assert {"threshold_0", "penalty_0", "penalty_strength_0", "score_norm_0", "threshold_1"} <= set(last)
    assert [log["eval_sparsity"] for log in seen if "eval_loss" in log][-1] == pytest.approx(0.65, abs=1e-3)
    assert [log for log in trainer.state.log_history if "loss" in log][-1]["sparsity"] == last["sparsity"]


def test_importance_is_that_of_the_loss_and_not_of_the_scaled_loss_of_fp16(tmp_path: Path) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5, scorer="gradient"), model)
        ids = Rows(4).ids
        (scale * model(input_ids=ids, labels=ids[:, 0] % 2).loss).backward()
        # What a Trainer in fp16 hands over, which is for GPUs only.
        optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda scale=scale: scale))
        callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, SparsityCallback))
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
        assert callback.pruner is not None
        found.append([unit.masked.get_buffer("importance") for unit in callback.pruner.units])
    for plain, scaled in zip(*found, strict=True):
        assert bool(plain.any())
        torch.testing.assert_close(plain, scaled)


def test_short_ramp_warns_for_learned_scores_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("hf_sparse.hf.trainer.schedule_check").addHandler(caplog.handler)
    sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5, schedule=RAMP)).train()
    assert "learns its scores from zero" not in caplog.text
    sparse_trainer(tmp_path).train()
    assert "'movement' learns its scores from zero, and this schedule ends its ramp at step 12 of 20" in caplog.text


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["movement", "soft_movement", "taylor", "magnitude"])
def test_resumed_run_is_the_uninterrupted_run(method: str, tmp_path: Path) -> None:
    scorer = {"name": "taylor", "momentum": 0.9} if method == "taylor" else method
    config = SparsityConfig(sparsity=0.9, scorer=scorer, schedule={**RAMP, "every": 3})
    whole = sparse_trainer(tmp_path / "whole", config, save_strategy="steps", save_steps=10)
    whole.train()
    again = sparse_trainer(tmp_path / "again", config, save_strategy="steps", save_steps=10)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    for (name, expected), found in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
