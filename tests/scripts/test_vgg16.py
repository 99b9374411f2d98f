"""The script of the VGG16 case: its processor prepares images as the convolutions were trained, its recipes run."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from hf_sparse.recipe.prune import compact_saved
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from hf_sparse.utils.strict_yaml import read_yaml
from scripts.reference import vgg16, vgg16_model

RECIPES = Path(__file__).parents[2] / "recipes"
LAYERS = [8, "M", 8, "M"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write images, convolutions as those of the wheel are stored, and what `fit` makes of them."""
    data, features = tmp_path / "data" / "cifar10-6k", tmp_path / "features"
    data.mkdir(parents=True)
    features.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("validation", 10)):
        rows = []
        for number in range(count):
            file = io.BytesIO()
            pixels = generator.integers(0, 100, (32, 32, 3)) + 15 * (number % 10)
            Image.fromarray(pixels.astype("uint8")).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = {"image": rows, "label": [number % 10 for number in range(count)]}
        datasets.Dataset.from_dict(table).to_parquet(data / f"{split}.parquet")
    (features / "config.json").write_text(json.dumps({"cfg": LAYERS}))
    state = vgg16_model.VGG(LAYERS, 4, 10).features.state_dict()
    save_file({f"features.{key}": tensor.half() for key, tensor in state.items()}, features / "model.safetensors")
    options = {"data": data, "features": features, "folder": tmp_path / "models" / "vgg16-cifar10"}
    vgg16.fit(argparse.Namespace(**options, seeds=[0], epochs=1, hidden=4))
    return tmp_path


def recipe(files: Path, name: str) -> Recipe:
    overrides = [
        f"model.name={files}/models/vgg16-cifar10-0",
        *(f"data.{split}={files}/data/cifar10-6k/{split}.parquet" for split in ("train", "validation")),
        f"training.output_dir={files}/runs/{name}",
        "training.num_train_epochs=5",
        "training.per_device_train_batch_size=5",
        "training.disable_tqdm=true",
        "training.report_to=none",
    ]
    return Recipe.load(RECIPES / f"{name}.yaml", overrides)


def test_processor_prepares_images_as_the_classifier_was_fitted(files: Path) -> None:
    folder = files / "data" / "cifar10-6k"
    pixels, _ = vgg16_model.images(folder, "validation")
    column = datasets.load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train")[:]["image"]
    raw = [Image.open(io.BytesIO(each["bytes"])).convert("RGB") for each in column]
    made = AutoImageProcessor.from_pretrained(files / "models" / "vgg16-cifar10-0")(raw, return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], pixels)


def test_recipes_run_and_their_results_are_collected(files: Path) -> None:
    # Half of the filters of both convolutions: half of 216 weights, 3/4 of 576, half of the 32 that read the last ones.
    asked = {"vgg16_dense": 0.0, "vgg16_element_80": 0.8, "vgg16_stripes": 0.47, "vgg16_filters_taylor": 556 / 824}
    for name, zeros in asked.items():
        done = run(recipe(files, name))
        assert 0 <= done.metrics["eval_accuracy"] <= 1
        assert name == "vgg16_dense" or done.summary.sparsity == pytest.approx(zeros, abs=0.01)
    compact_saved(str(files / "runs/vgg16_filters_taylor"), files / "runs/small")
    assert (files / "runs/small/preprocessor_config.json").is_file()
    rows = vgg16.collect(sorted((files / "runs").glob("*")))
    found = {row["run"]: row for row in rows}
    dense = vgg16_model.VGGForImageClassification(vgg16_model.VGGConfig(LAYERS, 4, num_labels=10)).num_parameters()
    assert found["vgg16_dense"]["parameters"] == dense
    assert found["small"]["parameters"] < found["vgg16_filters_taylor"]["parameters"] == dense
    assert found["small"]["zeros"] == found["vgg16_dense"]["zeros"] == 0.0
    assert found["vgg16_element_80"]["zeros"] == pytest.approx(0.8, abs=0.01)
    assert found["small"]["accuracy"] == found["vgg16_filters_taylor"]["accuracy"]


def test_recipes_differ_in_their_sparsity_alone() -> None:
    paths = sorted(RECIPES.glob("vgg16_*.yaml"))
    assert len(paths) == 7
    shared = []
    for path in paths:
        plain = read_yaml(path)
        plain.pop("sparsity", None)
        plain["training"].pop("output_dir")
        shared.append(plain)
    assert all(each == shared[0] for each in shared)
