"""A tiny classifier, dense and structurally pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from hf_sparse import SparsityConfig, sparsify
from tests.helpers import tiny


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.save_bert(tmp_path / "dense", head=True)


@pytest.fixture
def sparse(dense: Path, tmp_path: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    sparsify(
        model, SparsityConfig(groups=[{"pattern": "head", "sparsity": 0.5}, {"pattern": "neuron", "sparsity": 0.5}])
    )
    model.save_pretrained(tmp_path / "sparse")
    tiny.save_tokenizer(tmp_path / "sparse")
    return tmp_path / "sparse"
