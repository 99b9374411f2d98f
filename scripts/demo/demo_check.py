"""Load a model that `hf-sparse train` left, in this new process, and write down what it is and does.

    python scripts/demo/demo_check.py RUN_FOLDER NAME

Measures the load time, counts the zeros of every matrix, and runs the validation texts of the recipe beside the model
again. Writes check_NAME.json and the logits, as check_NAME.npy, into the folder; demo_table.py compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import hf_sparse  # noqa: F401 - importing it lets from_pretrained read packed files
from hf_sparse.recipe.data import load_texts
from hf_sparse.recipe.metrics import build_metrics
from hf_sparse.recipe.recipe import Recipe

LOADS = 7


def timed_loads(folder: Path) -> tuple[Any, float]:
    """Return the model and the median seconds that loading it took; the first load, which also imports, is left out."""
    seconds = []
    for _ in range(LOADS):
        begun = time.perf_counter()
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        seconds.append(time.perf_counter() - begun)
    return model, statistics.median(seconds[1:])


def zeros(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the number of zeros and of entries of every matrix, counted in the loaded tensors themselves."""
    matrices = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    return {name: [int((tensor == 0).sum()), tensor.numel()] for name, tensor in matrices.items()}


def evaluate(model: Any, recipe: Recipe, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Return logits and metrics on the validation texts, in the batches that the training run evaluated in."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, validation = load_texts(recipe.data).tokenized(tokenizer, recipe.data.max_length)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=nowhere,
                per_device_eval_batch_size=recipe.training_arguments().per_device_eval_batch_size,
                report_to="none",
                disable_tqdm=not sys.stderr.isatty(),
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=build_metrics(recipe.metric, recipe.model.predicts),
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.predict(validation, metric_key_prefix="eval")
    return np.asarray(result.predictions), dict(result.metrics or {})


def main() -> None:
    """Check one folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="of the files written")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    folder: Path = options.folder
    model, load_seconds = timed_loads(folder)
    logits, metrics = evaluate(model, Recipe.load(folder / "recipe.yaml"), folder)
    np.save(folder / f"check_{options.name}.npy", logits, allow_pickle=False)
    report = {"load_seconds": load_seconds, "metrics": metrics, "zeros": zeros(model)}
    (folder / f"check_{options.name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: loaded in {load_seconds:.3f} s, {len(logits)} texts, accuracy {metrics['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
