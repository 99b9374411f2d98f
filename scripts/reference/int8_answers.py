"""How many answers of a classifier does int8 change? Its runtime form in fp32 and in int8, on the same texts.

    python scripts/reference/int8_answers.py RUN [RUN ...] --data validation.jsonl

RUN is a folder that `hf-sparse train` or scripts/reference/reproduce.py made; the names of text and label come from
its recipe.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse import to_dense_runtime, to_runtime


@torch.inference_mode()
def logits(model: torch.nn.Module, tokenizer: object, texts: list[tuple[str, ...]], length: int) -> Tensor:
    """Return the outputs of a model for texts, 32 at a time."""
    out = []
    for start in range(0, len(texts), 32):
        some = [list(part) for part in zip(*texts[start : start + 32], strict=True)]
        inputs = tokenizer(*some, truncation=True, max_length=length, padding=True, return_tensors="pt")  # type: ignore[operator]
        out.append(model(**inputs).logits)
    return torch.cat(out)


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="texts with labels, one JSON object a line")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    for run in options.runs:
        data = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["data"]
        names = [data["text"]] if isinstance(data["text"], str) else data["text"]
        texts = [tuple(row[name] for name in names) for row in rows]
        labels = torch.tensor([int(row[data["label"]]) for row in rows])
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
        found = {}
        for backend in ("cpu", "cpu-int8"):
            to_runtime(model.eval(), backend)
            found[backend] = logits(model, tokenizer, texts, data["max_length"]).argmax(dim=-1)
            to_dense_runtime(model)
        changed = int((found["cpu"] != found["cpu-int8"]).sum())
        right = {backend: float((answers == labels).float().mean()) for backend, answers in found.items()}
        print(f"{run.name}: {changed} of {len(rows)} differ; right {right['cpu']:.4f}, int8 {right['cpu-int8']:.4f}")


if __name__ == "__main__":
    main()
