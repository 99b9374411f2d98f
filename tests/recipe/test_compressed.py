"""Recipes and commands whose groups give layers another form, from YAML to the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from hf_sparse.cli.main import main
from hf_sparse.pruning.compressions.saved_forms import forms_of
from tests.helpers.tiny import save_bert, write_sentences

TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_bert(tmp_path / "bert")
    write_sentences(tmp_path / "train.jsonl", slice(0, 18))
    write_sentences(tmp_path / "validation.jsonl", slice(18, None))
    return tmp_path


def test_hashed_recipe_leaves_a_hashed_model_a_report_and_a_card(folder: Path) -> None:
    recipe = {
        "model": "bert",
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 8},
        "sparsity": {"compress": {"name": "hashed", "ratio": "1/8"}},
        "training": {**TRAINING, "output_dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "run")
    assert len(forms_of(loaded).layers) == 12
    assert "1/8" in (folder / "run" / "recipe.yaml").read_text(encoding="utf-8") or "0.125" in (
        folder / "run" / "recipe.yaml"
    ).read_text(encoding="utf-8")
    for name in ("report.md", "README.md"):
        assert (folder / "run" / name).is_file()
    assert main(["inspect", str(folder / "run")]) == 0


def test_prune_puts_low_rank_beside_what_is_kept(folder: Path) -> None:
    arguments = ["--sparsity", "0.5", "--scorer", "wanda", "--compress", "{name: low_rank, rank: 2}"]
    data = ["--data", str(folder / "train.jsonl"), "--batch", "4", "--length", "8"]
    assert main(["prune", str(folder / "bert"), *arguments, *data, "--output", str(folder / "out")]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "out", num_labels=2)
    forms = forms_of(loaded)
    assert {form.form for form in forms.layers.values()} == {"sparse_low_rank"}
    weight = loaded.get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert 0.4 < float((weight == 0).double().mean()) < 0.6
    assert torch.isfinite(weight).all()
