"""Perplexity of a causal language model after one-shot pruning, with and without reconstruction.

    python scripts/reference/causal_oneshot.py MODEL --calibration valid.txt --test test.txt
        --output recipes/reference/causal_oneshot.json [--samples 16] [--length 512] [--windows 12] [--only 50% 2:4]

Calibration: sequences from random places of a text (seed 0), each with BOS if the tokenizer puts one before a text.
Evaluation: the first windows of another text, which do not overlap, each with BOS likewise. All linear layers in the
blocks are pruned; embeddings are not. The model is pruned in float32, its weights are rounded to bfloat16, and it is
evaluated in float32. Results are added to the file one by one, and those that are there are not computed again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, sparsify
from hf_sparse.analysis.perplexity import mean_loss
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.pruning.calibrated.tasks import LayerUpdate
from hf_sparse.recipe.texts import TokenStream, calibration_batches, read_text
from hf_sparse.utils.atomic_io import read_json, write_text

PATTERNS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "60%": {"sparsity": 0.6},
    "4:8": {"pattern": "4:8"},
}
METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"scorer": "sparsegpt"},
    "wanda": {"scorer": "wanda"},
    "magnitude": {"scorer": "magnitude"},
    "wanda+reconstruction": {"scorer": "wanda", "reconstruction": "cg"},
    "sparsegpt+reconstruction": {"scorer": "sparsegpt", "reconstruction": "cg"},
    "magnitude+reconstruction": {"scorer": "magnitude", "reconstruction": "cg"},
    "wanda+owl": {"scorer": "wanda", "selection": "owl"},
}


def rounded(model: Any) -> Any:
    """Round the weights to bfloat16, as they are saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def main() -> None:
    """Measure what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(PATTERNS), help="patterns")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.model)
    valid = TokenStream.of(read_text(options.calibration), tokenizer)
    test = TokenStream.of(read_text(options.test), tokenizer)
    windows = list(test.windows(options.length, most=options.windows))
    setting = {
        "samples": options.samples, "length": options.length, "windows": options.windows, "seed": options.seed,
        "begins": test.begins, "tokens": sum(window.scored for window in windows),
    }  # fmt: skip
    key = f"{Path(options.model).name}, {options.samples} x {options.length}, seed {options.seed}"

    def measure(name: str, group: dict[str, Any] | None) -> None:
        everything: dict[str, Any] = read_json(options.output) or {}
        entry = everything.setdefault(key, {"setting": setting, "results": {}})
        if name in entry["results"]:
            return
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        updates: list[LayerUpdate] = []
        begin = time.perf_counter()
        if group is not None:
            batches = calibration_batches(valid, options.samples, options.length, options.seed, model.device)
            data = group.get("scorer") != "magnitude" or "reconstruction" in group
            sparsify(model, SparsityConfig(**group), batches if data else None, on_layer=updates.append)
        seconds = time.perf_counter() - begin
        result: dict[str, Any] = {"perplexity": round(math.exp(mean_loss(rounded(model), windows)), 3)}
        if group is not None:
            result["seconds"] = round(seconds, 1)
        errors = [update.error for update in updates if update.error is not None]
        if errors:
            result["mean_layer_error"] = round(sum(errors) / len(errors), 5)
        everything = read_json(options.output) or {}
        entry = everything.setdefault(key, {"setting": setting, "results": {}})
        entry["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        entry["results"][name] = result
        write_text(options.output, json.dumps(everything, indent=2) + "\n")
        print(name, result, flush=True)
        del model
        gc.collect()  # hooks of a pruned model refer to it

    measure("dense", None)
    for pattern in options.only:
        for method in options.methods:
            measure(f"{pattern} {method}", {**PATTERNS[pattern], **METHODS[method]})


if __name__ == "__main__":
    main()
