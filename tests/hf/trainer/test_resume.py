"""What a checkpoint records of the run that made it, and what a resume with another run is told."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from hf_sparse import CheckpointError, RecipeError, SparsityCallback, SparsityConfig, last_checkpoint, summarize
from hf_sparse.hf.trainer.data_record import data_facts
from hf_sparse.hf.trainer.run_record import check_resume
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer

BASE: dict[str, Any] = {
    "sparsity": 0.75,
    "scorer": "magnitude",
    "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6},
}
STEPS: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    sparse_trainer(folder, SparsityConfig(**BASE), **STEPS).train()
    return folder


@pytest.mark.parametrize(
    ("changed", "listed"),
    [
        ({"sparsity": 0.5}, r"sparsity\.groups\.0\.sparsity: 0\.75 -> 0\.5"),
        ({"scorer": "movement"}, r"sparsity\.groups\.0\.scorer\.name: magnitude -> movement"),
        ({"pattern": "row"}, r"sparsity\.groups\.0\.pattern\.name: element -> row"),
        ({"selection": "global"}, r"sparsity\.groups\.0\.selection\.name: not set -> global"),
        ({"schedule": {**RAMP, "end": 0.7}}, r"sparsity\.groups\.0\.schedule\.end: 0\.6 -> 0\.7"),
        ({"exclude": "*.layer.0.*"}, r"sparsity\.groups\.0\.exclude: \[\] -> \['\*\.layer\.0\.\*'\]"),
    ],
)
def test_resume_with_another_config_is_an_error_that_lists_the_difference(
    changed: dict[str, Any], listed: str, trained: Path, tmp_path: Path
) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(**{**BASE, **changed}), **STEPS)
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint-4 was made by a run that differs.*{listed}"):
        trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))


def test_another_spelling_of_the_same_config_is_no_difference(trained: Path, tmp_path: Path) -> None:
    config = SparsityConfig(groups=[{**BASE, "scorer": {"name": "magnitude"}, "pattern": {"name": "element"}}])
    trainer = sparse_trainer(tmp_path, config, **STEPS)
    trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    assert trainer.state.global_step == 8


def test_changes_that_are_allowed_by_name_are_accepted_and_no_others(trained: Path, tmp_path: Path) -> None:
    changed = SparsityConfig(**{**BASE, "sparsity": 0.8, "schedule": {**RAMP, "end": 0.7}})

    def resume(*allow: str) -> Any:
        callback = SparsityCallback(changed, allow=allow)
        trainer = Trainer(bert(), arguments(tmp_path, **STEPS), train_dataset=Rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
        return trainer.model

    with pytest.raises(CheckpointError, match=r"schedule\.end: 0\.6 -> 0\.7"):
        resume("groups.0.sparsity")
    assert summarize(resume("groups.0.sparsity", "end")).sparsity == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(RecipeError, match="allow: 'schedul' is not a key of this run; did you mean"):
        resume("schedul")


def texts(count: int = 64, **columns: list[str]) -> Dataset:
    ids = Rows(count).ids
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist(), **columns})


@pytest.mark.parametrize(
    ("changed", "listed"),
    [
        (lambda: texts(60), r"data\.examples: 64 -> 60"),
        (
            lambda: texts(note=["x"] * 64),
            r"data\.columns: \['input_ids', 'labels'\] -> \['input_ids', 'labels', 'note'\]",
        ),
        (lambda: texts().shuffle(seed=1), r"data\.content: \w+ -> \w+"),
        (lambda: Rows(60), r"data\.columns: .* -> not set.*data\.examples: 64 -> 60"),
    ],
)
def test_resume_with_other_data_is_an_error_unless_it_is_allowed(changed: Any, listed: str, tmp_path: Path) -> None:
    def trainer(data: Any, *allow: str) -> Any:
        callback = SparsityCallback(SparsityConfig(**BASE), allow=allow)
        return Trainer(bert(), arguments(tmp_path, **STEPS), train_dataset=data, callbacks=[callback])

    trainer(texts()).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=rf"was made by a run that differs.*{listed}"):
        trainer(changed()).train(resume_from_checkpoint=checkpoint)
    trainer(texts()).train(resume_from_checkpoint=checkpoint)
    trainer(changed(), "data").train(resume_from_checkpoint=checkpoint)


def test_checkpoint_of_an_older_version_has_no_data_to_compare(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"]["hf_sparse"]["sparsity"].pop("data") == {"examples": 64}
    path.write_text(json.dumps(state))
    trainer = sparse_trainer(tmp_path / "out", SparsityConfig(**BASE), **STEPS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8


def test_facts_of_data_do_not_depend_on_transforms_or_the_time_and_cost_few_examples() -> None:
    data = texts(1000)
    assert data_facts(data) == data_facts(texts(1000).with_transform(lambda batch: {"x": [object()]}))
    assert data_facts(data)["content"] != data_facts(data.shuffle(seed=1))["content"]
    assert data_facts(Dataset.from_dict({"a": []})) == {"examples": 0, "columns": ["a"], "content": data_facts(
        Dataset.from_dict({"b": []}))["content"]}  # fmt: skip
    assert data_facts(iter([1])) == data_facts(None) == {}


def test_what_masks_depend_on_cannot_be_changed_even_if_allowed() -> None:
    old, new = {"sparsity.groups.0.scorer.name": "magnitude"}, {"sparsity.groups.0.scorer.name": "movement"}
    with pytest.raises(CheckpointError, match=r"cannot be resumed with another sparsity\.groups\.0\.scorer\.name"):
        check_resume("checkpoint-4", old, new, ["scorer"], "{}")


def test_resume_true_is_compared_too(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    trainer = sparse_trainer(tmp_path / "run", SparsityConfig(**{**BASE, "sparsity": 0.5}), **STEPS)
    with pytest.raises(CheckpointError, match=r"0\.75 -> 0\.5"):
        trainer.train(resume_from_checkpoint=True)


def test_resume_without_the_callback_names_it(trained: Path, tmp_path: Path) -> None:
    trainer = Trainer(bert(), arguments(tmp_path, **STEPS), train_dataset=Rows())
    with pytest.raises(CheckpointError, match=r"this Trainer has no SparsityCallback\. To resume, add one"):
        trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))


def test_resume_of_a_dense_checkpoint_with_the_callback_is_an_error(tmp_path: Path) -> None:
    Trainer(bert(), arguments(tmp_path / "dense", **STEPS), train_dataset=Rows()).train()
    trainer = sparse_trainer(tmp_path / "sparse", SparsityConfig(**BASE), **STEPS)
    with pytest.raises(CheckpointError, match="does not record a sparsity config: it was written without"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-4"))


@pytest.mark.parametrize("state", ["", "[]", '{"stateful_callbacks": 3}', '{"stateful_callbacks": {"hf_sparse": [1]}}'])
def test_damaged_state_is_a_checkpoint_error(state: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(state)
    trainer = sparse_trainer(tmp_path / "out", SparsityConfig(**BASE), **STEPS)
    with pytest.raises(CheckpointError, match=r"cannot read the training state|does not record a sparsity config"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resume_with_model_init_says_what_to_do(trained: Path, tmp_path: Path) -> None:
    callback = SparsityCallback(SparsityConfig(**BASE))
    trainer: Any = Trainer(
        model_init=lambda: bert(), args=arguments(tmp_path, **STEPS), train_dataset=Rows(), callbacks=[callback]
    )
    with pytest.raises(CheckpointError, match=r"with model_init.*Give the Trainer the model itself"):
        trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))


@pytest.mark.parametrize("step", [4, 8])
def test_resume_with_more_steps_never_lowers_the_sparsity(
    step: int, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("hf_sparse.hf.trainer.sparsity_record").addHandler(caplog.handler)
    trainer = sparse_trainer(tmp_path, SparsityConfig(**BASE), **{**STEPS, "max_steps": 16})
    trainer.train(resume_from_checkpoint=str(trained / f"checkpoint-{step}"))
    logged = [log["sparsity"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 16
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(0.75, abs=1e-3)
    assert f"resumed at step {step} of 16, from a run of 8 steps" in caplog.text


def test_checkpoint_that_is_written_over_is_incomplete_until_it_is_whole(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies between the weights of its checkpoint-4 and their optimizer leaves no mixture that counts."""
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        sparse_trainer(tmp_path, SparsityConfig(**BASE), learning_rate=5e-3, **STEPS).train()
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").is_file()  # of the other run
    with pytest.raises(CheckpointError, match=r"checkpoint-4 lacks a readable trainer_state\.json"):
        last_checkpoint(tmp_path)


def test_state_of_the_callbacks_can_be_restored_by_transformers(trained: Path, tmp_path: Path) -> None:
    options = {**STEPS, "restore_callback_states_from_checkpoint": True}
    trainer = sparse_trainer(tmp_path, SparsityConfig(**BASE), **options)
    trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    assert summarize(trainer.model).sparsity == pytest.approx(0.75, abs=1e-3)


# -- two Trainers on one model ---------------------------------------------------------------------------------------


def test_trainer_made_twice_on_one_model_trains_with_the_second(tmp_path: Path) -> None:
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = sparse_trainer(tmp_path, SparsityConfig(**BASE), model, max_steps=4)
    second = sparse_trainer(tmp_path, SparsityConfig(**{**BASE, "sparsity": 0.5}), model, max_steps=4)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    second.train()
    assert summarize(model).sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(RecipeError, match="a later Trainer with a SparsityCallback"):
        first.train()


def test_two_callbacks_of_one_trainer_are_refused_with_what_to_do(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(**BASE), callbacks=[SparsityCallback({"sparsity": 0.5})])
    with pytest.raises(RecipeError, match=r"takes one SparsityCallback, got 2\. .*SparsityConfig\(groups=\[\.\.\.\]\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_that_was_interrupted_starts_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("hf_sparse.hf.trainer.mask_owner").addHandler(caplog.handler)
    model = bert()
    step = Trainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        trainer = sparse_trainer(tmp_path, SparsityConfig(**BASE), model, max_steps=8)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    hidden = model.state_dict()["bert.encoder.layer.0.output.dense.weight_hidden"].clone()
    trainer = sparse_trainer(tmp_path, SparsityConfig(**BASE), model, max_steps=8)
    assert "pruning starts over" in caplog.text
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, hidden)
    trainer.train()
    assert summarize(model).sparsity == pytest.approx(0.75, abs=1e-3)


def test_detach_gives_the_dense_model_back(tmp_path: Path) -> None:
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback = SparsityCallback(SparsityConfig(**BASE))
    Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    callback.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- an optimizer and a scheduler of the user ------------------------------------------------------------------------


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_of_the_user_scales_the_rate_of_learned_scores(name: str, tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = SCHEDULERS[name](optimizer)
    config = SparsityConfig(**{**BASE, "scorer": {"name": "movement", "learning_rate": 0.03}})
    trainer = sparse_trainer(
        tmp_path, config, model, max_steps=6, trainer_options={"optimizers": (optimizer, scheduler)}
    )
    trainer.train()
    weights, scores = optimizer.param_groups
    assert scores["lr"] == pytest.approx(30 * weights["lr"])
    assert weights["lr"] != 1e-3
    assert summarize(model).sparsity == pytest.approx(0.75, abs=1e-3)


def test_scheduler_that_takes_no_more_groups_is_refused_before_step_one(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    config = SparsityConfig(**{**BASE, "scorer": "movement"})
    trainer = sparse_trainer(tmp_path, config, model, trainer_options={"optimizers": (optimizer, scheduler)})
    with pytest.raises(RecipeError, match=r"\(OneCycleLR\) .* takes no more groups. Leave it out"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "batch", [8, 6]
)  # of 64 examples: the last step is the last of an epoch, or in the middle of one
def test_run_that_is_resumed_after_its_last_step_trains_no_other(batch: int, tmp_path: Path) -> None:
    options = {**STEPS, "per_device_train_batch_size": batch, "max_steps": 8}
    first = sparse_trainer(tmp_path, SparsityConfig(**BASE), **options)
    first.train()
    again = sparse_trainer(tmp_path, SparsityConfig(**BASE), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
