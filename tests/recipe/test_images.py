"""Recipes of images: what is read, trained and resumed; what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_sparse import RecipeError
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from tests.helpers.convolutional import build

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def png(color: tuple[int, int, int], seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-30, 30, (16, 16, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(color) + noise).clip(0, 255).astype("uint8")).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write a model with its processor, and images of three colors."""
    for split, count in (("train", 8), ("validation", 3)):
        rows = [(png(color, seed), name) for seed in range(count) for name, color in COLORS.items()]
        table = {"picture": [{"bytes": file, "path": None} for file, _ in rows], "color": [name for _, name in rows]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{split}.parquet")
    build("vit").save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path


def recipe(files: Path, output: str, **sections: Any) -> Recipe:
    training: dict[str, Any] = {"save_steps": 4, "disable_tqdm": True, "use_cpu": True, "max_steps": 8}
    training |= {"learning_rate": 1e-2, "per_device_train_batch_size": 6, "report_to": "none"}
    data = {"train": f"{files}/train.parquet", "validation": f"{files}/validation.parquet"}
    return Recipe.from_dict({
        "model": {"name": f"{files}/model", "task": "image-classification"},
        "data": {**data, "text": "picture", "label": "color"},
        "sparsity": {"sparsity": 0.5, "targets": ["*projection", "*.layers.*"]},
        "training": {**training, "output_dir": str(files / output)},
        **sections,
    })  # fmt: skip


def test_images_are_learned_and_a_run_is_resumed_to_the_bit(files: Path) -> None:
    whole = run(recipe(files, "whole"))
    assert whole.metrics["eval_accuracy"] > 0.5
    assert whole.summary.sparsity == pytest.approx(0.5, abs=0.01)
    assert (files / "whole" / "preprocessor_config.json").is_file()
    weights = (files / "whole" / "model.safetensors").read_bytes()
    for path in sorted((files / "whole").glob("checkpoint-8/*"), reverse=True):
        path.unlink()
    (files / "whole" / "checkpoint-8").rmdir()
    again = run(recipe(files, "whole"), resume=True)
    assert again.metrics["eval_accuracy"] == whole.metrics["eval_accuracy"]
    assert (files / "whole" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"text": ["picture", "color"], "label": "other"}}, "must be the one column with the images"),
        ({"data": {"text": "color", "label": "picture"}}, "column 'color' holds no images"),
        ({"model": {"num_labels": 4}}, "model.num_labels is 4, but the training examples have 3 classes"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(files: Path, section: Any, message: str) -> None:
    base = recipe(files, "out").to_dict()
    changed = {key: {**base[key], **value} for key, value in section.items()}
    with pytest.raises(RecipeError, match=message):
        run(Recipe.from_dict({**base, **changed}))
