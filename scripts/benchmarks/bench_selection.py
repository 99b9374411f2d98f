"""Time to select the highest of all scores of a model together, and to write its masks.

    python scripts/benchmarks/bench_selection.py --model-shape bert-base --threads 1

Random scores in the shapes of the encoder. Measured is what `selection: global` does at each renewal of the masks, the
check for NaN included. Each layout is a case of its own: scores that repeat, or all equal, are what a bracket from a
sample could stumble over.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_sparse.profiling.timer import interleave
from hf_sparse.pruning.selection import kept_count
from hf_sparse.pruning.selection.topk import keep_highest

SHAPES = {"minilm-l6": (384, 6), "bert-base": (768, 12), "bert-large": (1024, 24)}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda values: values,
    "magnitude": Tensor.abs,
    "rounded": lambda values: values.mul(16).round_(),
    "half zero": torch.relu,
    "all equal": torch.zeros_like,
    "bfloat16": Tensor.bfloat16,
}


def scores_of(hidden: int, layers: int, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return scores like the linear weights of an encoder."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*[(hidden, hidden)] * 4, (4 * hidden, hidden), (hidden, 4 * hidden)] * layers
    return [layout(torch.randn(shape, generator=generator)) for shape in shapes]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hidden, layers = SHAPES[options.model_shape]
    print(f"{options.model_shape}, {options.threads} thread(s), median of {options.rounds}, seconds\n")
    print(f"{'':12}" + "".join(f"{f'{sparsity:.0%} sparse':>14}" for sparsity in options.sparsity))
    total = 0
    for name, layout in LAYOUTS.items():
        scores = scores_of(hidden, layers, layout)
        total = sum(tensor.numel() for tensor in scores)
        line = f"{name:12}"
        for sparsity in options.sparsity:
            keep = kept_count(total, sparsity)
            masks, _ = keep_highest(scores, keep)
            assert sum(int(torch.count_nonzero(mask)) for mask in masks) == keep
            del masks
            seconds = interleave({name: partial(keep_highest, scores, keep)}, options.rounds, warmup=0, inference=False)
            line += f"{statistics.median(seconds[name]):14.3f}"
        print(line, flush=True)
    print(f"\n{total:,} scores")


if __name__ == "__main__":
    main()
