"""Load models that `hf-sparse train` saved, in a new process, and record their zeros, predictions and load times.

    python scripts/demo/check.py NAME RUN_FOLDER [RUN_FOLDER ...]

Evaluates the validation examples of the recipe stored with each model. Writes check_NAME.json and the logits, as
check_NAME.npy, into the folder; table.py compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from functools import partial
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
from hf_sparse.profiling.timer import interleave
from hf_sparse.recipe.data import load_examples
from hf_sparse.recipe.metrics import build_metrics
from hf_sparse.recipe.recipe import Recipe

LOADS = 4


def timed_loads(folder: Path) -> tuple[Any, float]:
    """Return the model and the median load time in seconds; the first load, which also imports, is not counted."""
    load = partial(AutoModelForSequenceClassification.from_pretrained, folder)
    seconds = interleave({"load": load}, LOADS, warmup=1, inference=False)
    return load(), statistics.median(seconds["load"])


def zeros(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the number of zeros and of entries of every matrix, counted in the loaded tensors themselves."""
    matrices = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    return {name: [int((tensor == 0).sum()), tensor.numel()] for name, tensor in matrices.items()}


def evaluate(model: Any, recipe: Recipe, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Return logits and metrics on the validation examples, in the batches of the training run's evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, validation = load_examples(recipe.data).tokenized(tokenizer, recipe.data.max_length)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=nowhere,
                per_device_eval_batch_size=recipe.training_arguments().per_device_eval_batch_size,
                report_to="none",
                dataloader_pin_memory=False,  # there is nothing to pin for on a CPU, and torch warns
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=build_metrics(recipe.metric, recipe.model.predicts),
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.predict(validation, metric_key_prefix="eval")
    return np.asarray(result.predictions), dict(result.metrics or {})


def main() -> None:
    """Check all folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="of the files written")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    for folder in options.folders:
        model, load_seconds = timed_loads(folder)
        logits, metrics = evaluate(model, Recipe.load(folder / "recipe.yaml"), folder)
        np.save(folder / f"check_{options.name}.npy", logits, allow_pickle=False)
        report = {"load_seconds": load_seconds, "metrics": metrics, "zeros": zeros(model)}
        (folder / f"check_{options.name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        accuracy = metrics["eval_accuracy"]
        print(f"{folder}: loaded in {load_seconds:.3f} s, {len(logits)} examples, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
