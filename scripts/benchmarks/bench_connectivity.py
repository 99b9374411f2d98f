"""Whether equal work in each row helps the CPU kernel: masks of equal density, regular and not, in one interleaved run.

    python scripts/benchmarks/bench_connectivity.py

"random entries" is an unstructured mask (rows differ), "random" has as many inputs for each output, "expander" and
"radix" as many outputs for each input too. One thread, fp32; the median of 15 calls, relative to random entries.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import nn

from hf_sparse import sparsify, to_runtime
from hf_sparse.profiling.timer import interleave

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
                seconds = interleave(runs, 15, warmup=1)
                medians = [statistics.median(each) for each in seconds.values()]
                cells = " | ".join(f"{value / medians[0]:.2f}" for value in medians)
                print(f"| {outputs} x {inputs} | {tokens} | {sparsity:.0%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
