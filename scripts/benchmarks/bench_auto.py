"""Is `to_runtime(model, "auto")` ever slower than dense? Random shapes, sparsities, blocks and batches.

    python scripts/benchmarks/bench_auto.py --json auto.json       # exit code 1 if any is below 0.97
    python scripts/benchmarks/bench_auto.py --cases 50 --tokens 1 512          # 150 calls, short ones too

Two thirds of the models are a linear layer, the others a BERT of one layer. Each is chosen for with a fresh table, and
called with sequence lengths that were not timed for the choice. Dense and runtime model are timed interleaved, with one
thread by CPU time; the figure is the median of dense over runtime within a round. Where auto left all
layers dense both are the same model, and the figure is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_sparse import to_runtime
from hf_sparse.errors import BackendError
from hf_sparse.kernels import library_status
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave, quartiles, ratios, threads_of_torch
from hf_sparse.runtime import SpeedTable

FLOOR = 0.97
WORK = 2e10
"""Most multiplications and additions of a dense call, so that a case takes seconds."""


def even(random_: random.Random, low: int, high: int, step: int = 1) -> int:
    """Return a multiple of step whose logarithm is even between these."""
    return max(step, round(math.exp(random_.uniform(math.log(low), math.log(high))) / step) * step)


@torch.no_grad()
def prune(layer: nn.Linear, sparsity: float, rows: int, generator: torch.Generator) -> None:
    """Zero random blocks."""
    height, width = layer.weight.shape
    kept = torch.rand(-(-height // rows), width, generator=generator) >= sparsity
    layer.weight.mul_(kept.repeat_interleave(rows, 0)[:height])


def make(number: int, seed: int, calls: int, shortest: int, longest: int) -> tuple[str, Any, list[Any]]:
    """Return a random case: what it is, the pruned model, its inputs of so many tokens."""
    random_ = random.Random(f"{seed}:{number}")  # noqa: S311  no secret
    generator = torch.Generator().manual_seed(random_.randrange(2**31))
    torch.manual_seed(0)
    sparsity, rows = random_.uniform(0.12, 0.97), random_.choice([1, 1, 2, 4, 8, 16])
    if number % 3 < 2:
        out, into = even(random_, 48, 4096), even(random_, 48, 4096)
        model: Any = nn.Sequential(nn.Linear(into, out, bias=random_.random() < 0.8))
        said, each = f"{into} -> {out}", 2 * into * out
    else:
        width, heads = even(random_, 64, 1024, 16), 4
        model = BertModel(
            BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=even(random_, 64, 4096, 4),
                       num_hidden_layers=1, vocab_size=100, max_position_embeddings=1024),
            add_pooling_layer=False,
        )  # fmt: skip
        said, each = (
            f"BERT {width}, {model.config.intermediate_size}",
            8 * width**2 + 4 * width * model.config.intermediate_size,
        )
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            prune(layer, sparsity, rows, generator)
    inputs = []
    for _ in range(calls):
        tokens = even(random_, shortest, max(shortest + 1, min(longest, int(WORK / each))))
        if number % 3 < 2:
            inputs.append(torch.randn(1, tokens, into, generator=generator))
        else:
            batch = random_.choice([1, 2, 4, 8])
            batch = batch if tokens >= 16 * batch else 1
            inputs.append(torch.randint(0, 100, (batch, min(tokens // batch, 1024)), generator=generator))
    return f"{said}, {sparsity:.0%} in {rows}x1", model.eval(), inputs


def compare(dense: Any, model: Any, x: Any, rounds: int) -> tuple[float, float, float]:
    """Return quartiles of dense time over that of the other model."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = {"dense": partial(dense, x), "runtime": partial(model, x)}
    seconds = interleave(runs, rounds, warmup=1, min_seconds=0.004, clock=clock)
    return quartiles(ratios(seconds, "dense", "runtime"))


def main() -> int:
    """Measure, print, write JSON; 1 if auto was slower anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--calls", type=int, default=3, help="token counts for each case (3)")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("LEAST", "MOST"), default=(1, 4096))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(machine().rpartition(",")[0], library_status().isa, f"{options.threads} thread(s)")
    rows: list[dict[str, Any]] = []
    with threads_of_torch(options.threads), tempfile.TemporaryDirectory() as folder:
        for number in range(options.first, options.first + options.cases):
            said, model, inputs = make(number, options.seed, options.calls, *options.tokens)
            dense = copy.deepcopy(model)
            start = time.perf_counter()
            try:
                report = to_runtime(model, table=SpeedTable(Path(folder) / f"{number}.json"))
                packed = len(report.sparse)
                count = len(report.layers)
            except BackendError:  # too few zeros
                packed, count = 0, 1
            chosen = time.perf_counter() - start
            for x in inputs:
                tokens = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()
                gain = compare(dense, model, x, options.rounds) if packed else (1.0, 1.0, 1.0)
                rows.append(
                    {"case": number, "what": said, "tokens": tokens, "packed": f"{packed}/{count}", "gain": gain}
                )
                low, middle, high = gain
                print(
                    f"{number:3} {said:<32} {tokens:5} tokens  packed {packed}/{count}  {middle:5.2f} [{low:.2f}, "
                    f"{high:.2f}]  chosen in {chosen:.1f} s{'' if middle >= FLOOR else '  SLOWER'}",
                    flush=True,
                )
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1))
    slower = [row for row in rows if row["gain"][1] < FLOOR]
    packed_rows = [row for row in rows if not row["packed"].startswith("0/")]
    print(f"{len(slower)} of {len(rows)} calls ({len(packed_rows)} of packed models) are slower than dense by over 3 %")
    for row in slower:
        print(f"  case {row['case']}: {row['what']}, {row['tokens']} tokens: {row['gain'][1]:.3f}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
