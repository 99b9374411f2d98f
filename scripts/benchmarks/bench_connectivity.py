"""Whether equal work in each row helps the CPU kernel: masks of equal density, regular and not, in one interleaved run.

    python scripts/benchmarks/bench_connectivity.py

"random entries" is an unstructured mask (rows differ), "random" has as many inputs for each output, "expander" and
"radix" as many outputs for each input too. One thread, fp32; the median of 15 calls, relative to random entries.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from hf_sparse import sparsify, to_runtime

MASKS = {
    "random entries": {"scorer": "random"},
    "random": {"pattern": "random"},
    "expander": {"pattern": "expander"},
    "radix": {"pattern": "radix"},
}


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"| layer | tokens | zeros | {' | '.join(MASKS)} |\n|---|---|---|" + "---|" * len(MASKS))
    for outputs, inputs in ((768, 768), (3072, 768), (768, 3072)):
        for sparsity in (0.8, 0.95):
            models = []
            for group in MASKS.values():
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(inputs, outputs)).eval()
                sparsify(model, {"targets": "*", "sparsity": sparsity, **group})
                to_runtime(model, "cpu")
                models.append(model)
            for tokens in (16, 128):
                x = torch.randn(tokens, inputs)
                times: list[list[float]] = [[] for _ in models]
                for _ in range(16):
                    for model, found in zip(models, times, strict=True):
                        start = time.perf_counter()
                        model(x)
                        found.append(time.perf_counter() - start)
                medians = [statistics.median(found[1:]) for found in times]
                cells = " | ".join(f"{value / medians[0]:.2f}" for value in medians)
                print(f"| {outputs} x {inputs} | {tokens} | {sparsity:.0%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
