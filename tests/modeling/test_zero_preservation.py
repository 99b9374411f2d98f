"""A sparse model that is fine-tuned further stays sparse, and can be set free."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import SparsityConfig, sparsify, summarize
from tests.helpers.layers import two_layers
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"weight_decay": 0.1},
    "sgd": {"optim_args": "momentum=0.9"},
    "adafactor": {},
    "rmsprop": {},
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    sparsify(bert(), SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def fine_tune(model: Any, folder: Path, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, arguments(folder, max_steps=5, **options), train_dataset=Rows()).train()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(before[name], model.state_dict()[name])  # what is kept has moved


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_loaded_model_keeps_its_zeros_in_a_plain_trainer(optim: str, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    zeros = {name: tensor == 0 for name, tensor in model.named_parameters()}
    targeted = [weight.name for weight in summarize(model).weights]
    fine_tune(model, tmp_path / "runs", optim=optim, **OPTIMIZERS[optim])
    for name, weight in model.named_parameters():
        if name in targeted:
            assert torch.equal(weight == 0, zeros[name]), name
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert summarize(again).nonzeros == summarize(model).nonzeros


LIVES: dict[str, dict[str, Any]] = {
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "clipping, warm-up, label smoothing": {"max_grad_norm": 0.1, "warmup_steps": 2, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("life", LIVES)
def test_zeros_stay_whatever_the_trainer_is_told(life: str, dtype: torch.dtype, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed, dtype=dtype)
    zeros = {weight.name: model.get_parameter(weight.name) == 0 for weight in summarize(model).weights}
    fine_tune(model, tmp_path / "runs", weight_decay=0.1, learning_rate=0.01, **LIVES[life])
    for name, removed in zeros.items():
        assert torch.all(model.get_parameter(name)[removed] == 0), name


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_their_zeros(how: str, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    fine_tune(model, tmp_path / "first")  # its parameters have their hooks now; the copy's have none
    twin = COPIES[how](model)
    expected = summarize(twin).nonzeros
    fine_tune(twin, tmp_path / "second")
    assert summarize(twin).nonzeros == expected
    twin.save_pretrained(tmp_path / "saved")  # itself, not the model it is a copy of
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=twin.dtype)
    assert torch.equal(saved.state_dict()["classifier.weight"], twin.state_dict()["classifier.weight"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_keeps_its_zeros(backend: str) -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert summarize(model).sparsity == pytest.approx(0.5, abs=0.01)


def test_model_that_was_pruned_keeps_its_zeros_in_the_next_run(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path / "prune")
    trainer.train()
    expected = summarize(trainer.model).nonzeros
    fine_tune(trainer.model, tmp_path / "on")
    assert summarize(trainer.model).nonzeros == expected


def test_dequantized_model_is_free(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    fine_tune(model, tmp_path / "kept")
    model.dequantize()
    fine_tune(model, tmp_path / "free")
    assert summarize(model).sparsity < 0.01


def test_pruning_further_is_not_held_back_by_the_zeros(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    config = SparsityConfig(sparsity=0.5, scorer="movement", schedule=RAMP)
    sparse_trainer(tmp_path, config, model).train()
    # Weights that were zero in the file have trained: half of all are kept now, not a tenth.
    assert summarize(model).sparsity == pytest.approx(0.5, abs=0.01)
