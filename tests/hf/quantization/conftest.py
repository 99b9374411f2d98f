"""A packed BERT, and a copy of it for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from hf_sparse import SparsityConfig, sparsify
from tests.helpers.training import bert


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForSequenceClassification, Path]:
    folder = tmp_path_factory.mktemp("packed")
    model = sparsify(bert(), SparsityConfig(sparsity=0.9)).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def packed(original: tuple[BertForSequenceClassification, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(original[1], tmp_path / "packed")
