"""A pruned model whose data changes: fixed masks, RigL and movement on a second task, at one sparsity.

    python scripts/benchmarks/bench_shift.py FOLDER --model models/paraphrase-minilm-l3-v2 --data data [--seeds 0 1 2]

FOLDER gets one run for each method and seed, and `shift.json`; runs that are finished are not repeated. First the model
is pruned on SST-2 by magnitude. Then its encoder, with a new head, goes on with BBC news or MRPC in four ways: with
fixed masks (the zeros stay), RigL (constant sparsity), movement (which frees the zeros and prunes again) and, as a
bound, all weights free (`fill`). "SST-2 after" is the accuracy on SST-2 of the encoder under the head it had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from hf_sparse.utils.atomic_io import read_json, write_text

STEPS = {"sst2": 600, "mrpc": 300, "bbc-news": 150}
TEXT: dict[str, str | list[str]] = {"sst2": "sentence", "mrpc": ["sentence1", "sentence2"], "bbc-news": "text"}
LENGTH = {"sst2": 64, "mrpc": 96, "bbc-news": 64}


def methods(sparsity: float) -> dict[str, dict[str, Any] | None]:
    """Return the sparsity section of each way to go on."""
    again = {"name": "cubic", "begin": 0.1, "end": 0.7, "every": 5}
    return {
        "fixed": None,
        "rigl": {"scorer": {"name": "rigl", "every": 20}, "sparsity": sparsity, "schedule": "constant"},
        "movement": {"scorer": "movement", "sparsity": sparsity, "schedule": again},
        "free": None,
    }


def recipe(task: str, model: dict[str, Any], data: Path, output: Path, seed: int, sparsity: Any) -> Recipe:
    """Return the recipe of one run."""
    return Recipe.from_dict(
        {
            "model": model,
            "data": {
                "train": str(data / task / "train.jsonl"),
                "validation": str(data / task / "validation.jsonl"),
                "text": TEXT[task],
                "max_length": LENGTH[task],
            },
            "freeze": ["*embeddings*"],
            "sparsity": sparsity,
            "training": {
                "output_dir": str(output),
                "max_steps": STEPS[task],
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 64,
                "learning_rate": 1e-4,
                "warmup_steps": 0.1,
                "logging_steps": 50,
                "save_strategy": "no",
            },
            "seed": seed,
        }
    )


def finished(folder: Path, made: Recipe) -> float:
    """Run a recipe unless its folder has a finished run, and return the accuracy."""
    if not (folder / "report.md").is_file():
        run(made, overwrite=True)
    return float((read_json(folder / "eval_results.json") or {})["eval_accuracy"])


def encoder_of(pruned: Path) -> Path:
    """Return the folder with the model without its head, whose size is that of the first task."""
    folder = pruned.with_name(f"{pruned.name}-encoder")
    if not (folder / "config.json").is_file():
        AutoTokenizer.from_pretrained(pruned).save_pretrained(folder)
        AutoModel.from_pretrained(pruned).save_pretrained(folder)
    return folder


@torch.no_grad()
def old_accuracy(before: Path, after: Path, data: Path) -> float:
    """Return the accuracy on SST-2 of the encoder of `after` under the head of `before`."""
    model = AutoModelForSequenceClassification.from_pretrained(before)
    model.base_model.load_state_dict(
        AutoModelForSequenceClassification.from_pretrained(after).base_model.state_dict(), strict=True
    )
    tokenizer = AutoTokenizer.from_pretrained(before)
    rows = [json.loads(line) for line in (data / "sst2/validation.jsonl").read_text(encoding="utf-8").splitlines()]
    right = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts = [row["sentence"] for row in part]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = [model.config.label2id.get(str(row["label"]), row["label"]) for row in part]
        right += int((model.eval()(**batch).logits.argmax(1) == torch.tensor(labels)).sum())
    return right / len(rows)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=("bbc-news", "mrpc"), default=["bbc-news", "mrpc"])
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        pruned = options.folder / f"sst2-{seed}"
        section = {
            "scorer": "magnitude",
            "sparsity": options.sparsity,
            "schedule": {"name": "cubic", "begin": 0.1, "end": 0.7, "every": 5},
        }
        first = finished(pruned, recipe("sst2", {"name": options.model}, options.data, pruned, seed, section))
        encoder = encoder_of(pruned)
        for task in options.tasks:
            for name, sparsity in methods(options.sparsity).items():
                output = options.folder / f"{task}-{name}-{seed}"
                model = {"name": str(encoder), "fill": name == "free"}
                value = finished(output, recipe(task, model, options.data, output, seed, sparsity))
                old = old_accuracy(pruned, output, options.data)
                row = {"seed": seed, "task": task, "method": name, "accuracy": value, "first": first, "old": old}
                print(row, flush=True)
                results.append(row)
                write_text(options.folder / "shift.json", json.dumps(results, indent=1) + "\n")
    print(
        "| second task | masks | accuracy (mean) | per seed | SST-2 before | SST-2 after |\n|---|---|---|---|---|---|"
    )
    for task in options.tasks:
        for name in methods(options.sparsity):
            rows = [row for row in results if (row["task"], row["method"]) == (task, name)]
            mean = {key: statistics.mean(row[key] for row in rows) for key in ("accuracy", "first", "old")}
            each = " ".join(f"{row['accuracy']:.3f}" for row in rows)
            print(f"| {task} | {name} | {mean['accuracy']:.3f} | {each} | {mean['first']:.3f} | {mean['old']:.3f} |")


if __name__ == "__main__":
    main()
