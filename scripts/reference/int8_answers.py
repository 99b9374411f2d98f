"""Count the predictions of a classifier that int8 changes: its runtime form in fp32 and in int8, on the same examples.

    python scripts/reference/int8_answers.py RUN [RUN ...] --data validation.jsonl

RUN is a folder written by `hf-sparse train` or scripts/reference/reproduce.py; the columns of text and label come from
its recipe.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.utils.strict_yaml import read_yaml


@torch.inference_mode()
def logits(model: torch.nn.Module, tokenizer: object, examples: list[tuple[str, ...]], length: int) -> Tensor:
    """Return the outputs of a model for examples, in batches of 32."""
    out = []
    for start in range(0, len(examples), 32):
        columns = [list(part) for part in zip(*examples[start : start + 32], strict=True)]
        inputs = tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")  # type: ignore[operator]
        out.append(model(**inputs).logits)
    return torch.cat(out)


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="labelled examples, one JSON object per line")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    for run in options.runs:
        data = read_yaml(run / "recipe.yaml")["data"]
        names = [data["text"]] if isinstance(data["text"], str) else data["text"]
        examples = [tuple(row[name] for name in names) for row in rows]
        labels = torch.tensor([int(row[data["label"]]) for row in rows])
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
        predictions = {}
        for backend in ("cpu", "cpu-int8"):
            to_runtime(model.eval(), backend)
            predictions[backend] = logits(model, tokenizer, examples, data["max_length"]).argmax(dim=-1)
            to_dense_runtime(model)
        changed = int((predictions["cpu"] != predictions["cpu-int8"]).sum())
        accuracy = {name: float((predicted == labels).float().mean()) for name, predicted in predictions.items()}
        print(
            f"{run.name}: {changed} of {len(rows)} differ; fp32 {accuracy['cpu']:.4f}, int8 {accuracy['cpu-int8']:.4f}"
        )


if __name__ == "__main__":
    main()
