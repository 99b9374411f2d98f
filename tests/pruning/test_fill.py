"""Filled models: smaller, dense inside, trained again, and loaded by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import Pruner, SparsityConfig, SparsityError, compact, fill, sparsify, summarize
from tests.helpers.training import Rows, arguments, bert

HYBRID = SparsityConfig(
    groups=[
        {"targets": "*.attention.*", "pattern": {"name": "block", "rows": 4, "cols": 4}, "sparsity": 0.5},
        {"pattern": "neuron", "sparsity": 0.5},
    ]
)
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_filled_model_trains_its_zeros_and_keeps_its_size(tmp_path: Path) -> None:
    model = sparsify(bert(), HYBRID)
    compact(model)
    assert 0.4 < summarize(model, [QUERY]).sparsity < 0.6
    fill(model)
    Trainer(model, arguments(tmp_path / "run", max_steps=3), train_dataset=Rows()).train()
    assert summarize(model, [QUERY]).sparsity == 0.0
    assert model.bert.encoder.layer[0].intermediate.dense.weight.shape == (32, 32)
    model.save_pretrained(tmp_path / "filled")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "filled")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.config.quantization_config.intent is None
    with pytest.raises(SparsityError, match="nothing to fill"):
        fill(loaded)


def test_packed_model_can_be_filled_after_loading(tmp_path: Path) -> None:
    sparsify(bert(), SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "packed")
    loaded = fill(AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"))
    Trainer(loaded, arguments(tmp_path / "run", max_steps=3), train_dataset=Rows()).train()
    assert summarize(loaded, [QUERY]).sparsity == 0.0


def test_model_that_is_being_pruned_or_never_was_is_refused() -> None:
    model = bert()
    with pytest.raises(SparsityError, match="nothing to fill"):
        fill(model)
    Pruner(model, HYBRID).attach()
    with pytest.raises(SparsityError, match="there are masks"):
        fill(model)
