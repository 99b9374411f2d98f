from __future__ import annotations

import math
import time

import pytest
import torch
from transformers import Trainer

from hf_sparse.errors import RecipeError
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.step_timer import StepTimer
from hf_sparse.recipe.train import freeze, run
from tests.helpers import tiny


def test_step_timer_takes_the_median_and_leaves_evaluation_and_saving_out(monkeypatch):
    events = [("step_begin", 0.0), ("step_begin", 1.0), ("step_begin", 3.0), ("evaluate", 50.0), ("step_begin", 90.0)]
    events += [("step_begin", 93.0), ("save", 99.0), ("step_begin", 200.0), ("step_begin", 204.0)]
    timer = StepTimer()
    for event, moment in events:
        monkeypatch.setattr(time, "perf_counter", lambda moment=moment: moment)
        getattr(timer, f"on_{event}")(None, None, None)
    assert timer.seconds == [1.0, 2.0, 3.0, 4.0]
    assert timer.median == 2.5


def test_step_timer_of_one_step_is_nan():
    timer = StepTimer()
    timer.on_step_begin(None, None, None)
    assert math.isnan(timer.median)


def test_freeze_keeps_what_matches_from_being_trained():
    model = torch.nn.ModuleDict({"embeddings": torch.nn.Embedding(2, 2), "dense": torch.nn.Linear(2, 2)})
    freeze(model, ["*embeddings*", "*.bias"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["dense.weight"]


def test_freeze_names_parameters_when_nothing_matches():
    with pytest.raises(
        RecipeError, match=r"freeze: 'embed' matches no parameter. Parameters of the model: weight, bias"
    ):
        freeze(torch.nn.Linear(2, 2), ["embed"])


def test_interrupted_run_does_not_look_finished_with_the_results_of_the_one_before(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    data = {name: str(tiny.write_sentences(tmp_path / f"{name}.jsonl")) for name in ("train", "validation")}
    training = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "max_steps": 1, "report_to": []}
    model = str(tiny.save_bert(tmp_path / "bert"))
    (tmp_path / "out").mkdir()
    for name in ("report.md", "eval_results.json"):
        (tmp_path / "out" / name).write_text("{}")
    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(Recipe.from_dict({"model": model, "data": {**data, "max_length": 16}, "training": training}))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


def test_freeze_leaves_something_to_train():
    with pytest.raises(RecipeError, match=r"`freeze` must leave parameters to train, but '\*' match all of them"):
        freeze(torch.nn.Linear(2, 2), ["*"])
