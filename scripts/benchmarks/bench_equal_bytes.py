"""Ways to make a model small in one shot, at equal stored bytes, on STS-B.

    python scripts/benchmarks/bench_equal_bytes.py models/paraphrase-minilm-l3-v2 data/stsb [--pairs 500]

The sentence encoder keeps its embeddings; of the bytes of its linear layers a budget is left. Each method gets the
sparsity, rank or ratio that fits into it (with the codec that files use: values and a bitmask), without training. The
score is Spearman's correlation of cosine similarities on validation pairs; calibration uses training sentences. Methods
that draw (random, connectivity, hashed) are run with three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_sparse import sparsify
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.layer_matching import block_layers
from hf_sparse.utils.atomic_io import write_text

RANK = 8
"""Of the low-rank part beside a sparse weight."""


def sparsity_for(budget: float) -> float:
    """Return the sparsity at which 32-bit values and a bitmask take a part of the dense bytes."""
    return 1 - (budget - 1 / 32)


def rank_for(budget: float, shape: tuple[int, int]) -> int:
    """Return the rank at which two thin matrices take a part of the dense bytes of a layer."""
    rows, columns = shape
    return max(1, int(budget * rows * columns / (rows + columns)))


def groups(budget: float, model: nn.Module) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Return the config of each method by seed."""
    sparsity = sparsity_for(budget)
    layers = {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in block_layers(model).items()}
    shapes = sorted(set(layers.values()))

    def by_shape(of: Callable[[tuple[int, int]], dict[str, Any]]) -> dict[str, Any]:
        return {"groups": [{"targets": [n for n in layers if layers[n] == shape], **of(shape)} for shape in shapes]}

    def beside(shape: tuple[int, int], weighted: bool) -> dict[str, Any]:
        part = RANK * sum(shape) / (shape[0] * shape[1])
        compress = {"name": "low_rank", "rank": RANK, "weighted": weighted}
        return {"scorer": "wanda", "sparsity": sparsity_for(budget - part), "compress": compress}

    return {
        "magnitude": lambda seed: {"sparsity": sparsity},
        "random": lambda seed: {"sparsity": sparsity, "scorer": {"name": "random", "seed": seed}},
        "effective_resistance": lambda seed: {"sparsity": sparsity, "scorer": "effective_resistance"},
        "expander": lambda seed: {"sparsity": sparsity, "pattern": {"name": "expander", "seed": 100 * seed}},
        "radix": lambda seed: {"sparsity": sparsity, "pattern": "radix"},
        "random fan-in": lambda seed: {"sparsity": sparsity, "pattern": {"name": "random", "seed": 100 * seed}},
        "hashed": lambda seed: {"compress": {"name": "hashed", "ratio": budget, "seed": seed}},
        "low rank": lambda seed: by_shape(
            lambda shape: {"compress": {"name": "low_rank", "rank": rank_for(budget, shape)}}
        ),
        "wanda": lambda seed: {"sparsity": sparsity, "scorer": "wanda"},
        "wanda + low rank": lambda seed: by_shape(lambda shape: beside(shape, True)),
        "sparsegpt": lambda seed: {"sparsity": sparsity, "scorer": "sparsegpt"},
    }


SEEDED = ("random", "expander", "random fan-in", "hashed")
CALIBRATED = ("low rank", "wanda", "wanda + low rank", "sparsegpt")


class Pairs:
    """Sentence pairs with their scores.

    Args:
        path: of a JSON Lines file.
        count: of pairs.
    """

    def __init__(self, path: Path, count: int, tokenizer: Any) -> None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.rows = rows[:: max(1, len(rows) // count)][:count]
        self.tokenizer = tokenizer

    def batches(self, key: str) -> list[dict[str, Tensor]]:
        """Return one side, tokenized."""
        texts = [row[key] for row in self.rows]
        return [
            dict(self.tokenizer(texts[i : i + 64], padding=True, truncation=True, max_length=64, return_tensors="pt"))
            for i in range(0, len(texts), 64)
        ]

    @torch.inference_mode()
    def spearman(self, model: Any) -> float:
        """Return 100 times the correlation of ranks."""
        sides = []
        for key in ("sentence1", "sentence2"):
            found = []
            for batch in self.batches(key):
                hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
            sides.append(torch.cat(found))
        gold = torch.tensor([float(row.get("score", row.get("label"))) for row in self.rows])
        ranks = torch.stack([_ranks((sides[0] * sides[1]).sum(1)), _ranks(gold)])
        return 100 * float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return mean ranks: equal values share theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="names of rows; without it, all of them")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held = Pairs(options.data / "validation.jsonl", options.pairs, tokenizer)
    calibration = Pairs(options.data / "train.jsonl", 128, tokenizer).batches("sentence1")
    dense = AutoModel.from_pretrained(options.model).eval()
    layers = [f"{name}.weight" for name in block_layers(dense)]
    whole = sum(dense.get_parameter(name).nbytes for name in layers)
    print("| bytes of the layers | method | Spearman | per seed |\n|---|---|---|---|")
    print(f"| 100 % | dense | {held.spearman(dense):.1f} | |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "dense"
        dense.save_pretrained(plain)
        rest = sum(inspect(plain).files.values()) - whole
        for budget in options.budgets:
            for name, config in groups(budget, dense).items():
                if options.methods and name not in options.methods:
                    continue
                scores, size = [], 0.0
                for seed in options.seeds if name in SEEDED else options.seeds[:1]:
                    model = AutoModel.from_pretrained(options.model).eval()
                    sparsify(model, config(seed), calibration if name in CALIBRATED else None)
                    scores.append(held.spearman(model))
                    model.save_pretrained(Path(folder) / "out")
                    size = (sum(inspect(Path(folder) / "out").files.values()) - rest) / whole
                rows.append({"budget": budget, "method": name, "share": size, "scores": scores})
                each = " ".join(f"{score:.1f}" for score in scores) if len(scores) > 1 else ""
                print(f"| {size:.1%} | {name} | {statistics.mean(scores):.1f} | {each} |", flush=True)
                if options.output:
                    write_text(options.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
