"""Sparse transfer: a dense model with zeros keeps them in training, whoever made it, and is saved packed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import (
    DistillationCallback,
    DistillationConfig,
    Pruner,
    RecipeError,
    SparseConfig,
    SparsityConfig,
    SparsityError,
    fill,
    keep_zeros,
    last_checkpoint,
    sparsify,
    summarize,
)
from hf_sparse.formats.safetensors_io import read_manifest
from hf_sparse.modeling.model_state import sparse_weights
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.sections import ModelSection
from tests.helpers.training import Rows, arguments, bert

KEY = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A folder of another program: dense files with 80 % zeros, and nothing that says so."""
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(tmp_path / "upstream", format="dense")
    assert "quantization_config" not in json.loads((tmp_path / "upstream" / "config.json").read_text())
    return tmp_path / "upstream"


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.detach() == 0 for name, p in model.named_parameters() if name.startswith("bert.encoder") and p.ndim > 1
    }


def assert_same_zeros(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    found = zeros(model)
    assert found.keys() == before.keys()
    for name, gone in before.items():
        assert torch.equal(found[name], gone), name


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def trainer(folder: Path, model: Any, **options: Any) -> Any:
    callbacks = options.pop("callbacks", [])
    return Trainer(model=model, args=arguments(folder, **options), train_dataset=Rows(), callbacks=callbacks)


def test_zeros_are_the_same_after_training_and_weights_are_not(upstream: Path, tmp_path: Path) -> None:
    model = keep_zeros(loaded(upstream))
    before, weight = zeros(model), model.get_parameter(KEY).detach().clone()
    run = trainer(tmp_path / "run", model, weight_decay=0.1)
    run.train()
    assert_same_zeros(model, before)
    assert not torch.equal(model.get_parameter(KEY), weight)
    run.save_model(str(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out" / "model.safetensors")
    assert manifest is not None
    assert len(manifest.targets) == 12
    assert_same_zeros(loaded(tmp_path / "out"), before)


def test_without_it_the_zeros_are_lost(upstream: Path, tmp_path: Path) -> None:
    model = loaded(upstream)
    before = zeros(model)
    trainer(tmp_path / "run", model).train()
    assert not torch.equal(zeros(model)[KEY], before[KEY])


def test_resumed_run_ends_in_the_bits_of_the_uninterrupted_one(upstream: Path, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 10}
    whole = trainer(tmp_path / "whole", keep_zeros(loaded(upstream)), **steps)
    whole.train()
    trainer(tmp_path / "half", keep_zeros(loaded(upstream)), **steps, max_steps=20).train()
    for path in (tmp_path / "half").glob("checkpoint-20/*"):
        path.unlink()
    (tmp_path / "half" / "checkpoint-20").rmdir()
    resumed = trainer(tmp_path / "half", keep_zeros(loaded(upstream)), **steps)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "half"))
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_loop_of_the_users_keeps_zeros_of_a_plain_module(optimizer: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Conv1d(16, 8, 1), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[:, :8] = 0
        model[2].weight[:4] = 0
    assert keep_zeros(model) is model
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        loss = model[3](model[2](model[1](model[0](torch.randn(2, 16)))[..., None].expand(-1, -1, 4))).square().sum()
        loss.backward()
        steps.step()
        steps.zero_grad()
    assert int((model[0].weight == 0).sum()) == 128
    assert not model[2].weight[:4].any()
    assert int((model[3].weight == 0).sum()) == 0
    assert summarize(model).sparsity == pytest.approx(0.5)


def test_targets_name_the_layers_whatever_share_of_zeros_they_have(upstream: Path) -> None:
    model = loaded(upstream)
    keep_zeros(model, targets="*.attention.*")
    assert len(sparse_weights(model)) == 8
    few: Any = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        few[0].weight[0, 0] = 0
    with pytest.raises(SparsityError, match="no sparse weight"):
        keep_zeros(few)
    keep_zeros(few, targets="*")
    with pytest.raises(RecipeError, match="matches no layer"):
        keep_zeros(few, targets="nothing")


def test_teacher_works(upstream: Path, tmp_path: Path) -> None:
    model = keep_zeros(loaded(upstream))
    before = zeros(model)
    callback = DistillationCallback(DistillationConfig(teacher=str(upstream)))
    trainer(tmp_path / "run", model, callbacks=[callback]).train()
    assert_same_zeros(model, before)


def test_fill_takes_it_back(upstream: Path, tmp_path: Path) -> None:
    model = fill(keep_zeros(loaded(upstream)))
    before = zeros(model)
    trainer(tmp_path / "run", model).train()
    assert not torch.equal(zeros(model)[KEY], before[KEY])


def test_zeros_that_are_not_kept_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
    with torch.no_grad():
        model[0].weight[:4] = 0
        model.register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 4)))
    with caplog.at_level(logging.WARNING):
        keep_zeros(model)
    assert "32 zeros of 1 other parameters (first: experts)" in caplog.text


def test_models_that_are_not_plain_are_refused(upstream: Path) -> None:
    model = loaded(upstream)
    Pruner(model, SparsityConfig(sparsity=0.9)).attach()
    with pytest.raises(SparsityError, match="End the pruning first"):
        keep_zeros(model)
    with pytest.raises(SparsityError, match="no sparse weight"):
        keep_zeros(bert())


# -- the same by SparseConfig, and in recipes -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [SparseConfig(keep_zeros=True), {"quant_method": "hf_sparse", "keep_zeros": True}])
def test_config_of_the_load_keeps_zeros(config: Any, upstream: Path, tmp_path: Path) -> None:
    model = loaded(upstream, quantization_config=config)
    before = zeros(model)
    trainer(tmp_path / "run", model).train()
    assert_same_zeros(model, before)
    model.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "keep_zeros" not in stored
    assert_same_zeros(loaded(tmp_path / "out"), before)


def test_config_is_for_zeros_that_are_there_and_for_nothing_else(upstream: Path, tmp_path: Path) -> None:
    for other in ({"sparsity": 0.9}, {"backend": "auto"}):
        with pytest.raises(RecipeError, match="give it alone"):
            SparseConfig(keep_zeros=True, **other)
    with pytest.raises(RecipeError, match="keep_zeros"):
        SparseConfig(keep_zeros=1)  # type: ignore[arg-type]
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(tmp_path / "packed")
    loaded(tmp_path / "packed", quantization_config=SparseConfig(keep_zeros=True))


def test_recipe_keeps_zeros_or_prunes() -> None:
    data = {"model": {"name": "m", "keep_zeros": True}, "data": {"name": "glue", "config": "rte", "text": "sentence1"}}
    assert Recipe.from_dict(data).to_dict()["model"]["keep_zeros"] is True
    with pytest.raises(RecipeError, match="give one of the two"):
        Recipe.from_dict({**data, "sparsity": {"sparsity": 0.9}})
    with pytest.raises(RecipeError, match="give one of the two"):
        ModelSection("m", fill=True, keep_zeros=True)
    with pytest.raises(RecipeError, match="keep_zeros"):
        ModelSection("m", keep_zeros="yes")  # type: ignore[arg-type]


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"`model` must be a torch.nn.Module, got None"):
        keep_zeros(None)  # type: ignore[type-var]
