"""Whether equal work in each row helps the CPU kernel: masks of equal density, regular and not, in one interleaved run.

    python scripts/benchmarks/bench_connectivity.py [--output recipes/reference/connectivity.json]

"random entries" is an unstructured mask (rows differ), "random" has as many inputs for each output, "expander" and
"radix" as many outputs for each input too. One thread, fp32; the median of 15 calls, relative to random entries.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse import sparsify, to_runtime
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave
from hf_sparse.utils.atomic_io import write_text

ROUNDS = 15

MASKS = {
    "random entries": {"scorer": "random"},
    "random": {"pattern": "random"},
    "expander": {"pattern": "expander"},
    "radix": {"pattern": "radix"},
}


@torch.inference_mode()
def main() -> None:
    """Print the table and write the medians, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["768x768", "3072x768", "768x3072"], help="outputs x inputs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"| layer | tokens | zeros | {' | '.join(MASKS)} |\n|---|---|---|" + "---|" * len(MASKS))
    for outputs, inputs in (map(int, size.split("x")) for size in options.sizes):
        for sparsity in (0.8, 0.95):
            models = {}
            for name, group in MASKS.items():
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(inputs, outputs)).eval()
                sparsify(model, {"targets": "*", "sparsity": sparsity, **group})
                to_runtime(model, "cpu")
                models[name] = model
            for tokens in (16, 128):
                x = torch.randn(tokens, inputs)
                runs = {name: partial(model, x) for name, model in models.items()}
                seconds = interleave(runs, ROUNDS, warmup=1)
                medians = [1e3 * statistics.median(each) for each in seconds.values()]
                cells = " | ".join(f"{value / medians[0]:.2f}" for value in medians)
                print(f"| {outputs} x {inputs} | {tokens} | {sparsity:.0%} | {cells} |", flush=True)
                layer = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "zeros": sparsity}
                rows.append({**layer, "milliseconds": dict(zip(MASKS, medians, strict=True))})
    if options.output:
        found = {"machine": machine(), "rounds": ROUNDS, "rows": rows}
        write_text(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
