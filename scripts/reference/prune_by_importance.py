"""Remove the least important heads of a fine-tuned model (Michel et al. 2019) and its smallest neurons, in one shot.

    python scripts/reference/prune_by_importance.py runs/dense runs/small --data data/sst2/train.jsonl --text sentence

The baseline that pruning during fine-tuning is compared with: importance from a pass over training examples, magnitude
for neurons, the same share of every layer, everything removed. Fine-tune the result with `hf-sparse train` and a recipe
without sparsity whose model is the output folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hf_sparse
from hf_sparse.hf.auto import load_tokenizer, load_whole
from hf_sparse.recipe.data import load_split
from hf_sparse.recipe.data_loader import LabelledBatches
from hf_sparse.recipe.sections import DataSection


def main() -> None:
    """Prune, compact and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--gone", type=float, default=0.5)
    options = parser.parse_args()

    section = DataSection(
        train=options.data, validation="none", text=options.text, label=options.label, train_samples=options.samples
    )
    model, tokenizer = load_whole(options.model), load_tokenizer(options.model)
    groups: list[Any] = [
        {"pattern": "head", "scorer": "head_importance", "sparsity": options.gone},
        {"pattern": "neuron", "scorer": "magnitude", "sparsity": options.gone},
    ]
    batches = LabelledBatches(model, tokenizer, load_split(section, "train"), section)
    hf_sparse.sparsify(model, hf_sparse.SparsityConfig(groups=groups), batches)
    hf_sparse.compact(model)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{model.num_parameters():,} parameters in {options.output}")


if __name__ == "__main__":
    main()
