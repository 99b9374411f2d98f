"""Speed of a compacted BERT against the dense one, beside the share of multiplications that is left. Interleaved.

    python scripts/bench_structure.py --gone 0.5 0.75 --threads 1 2 --shapes 1x128 8x128 --modes sdpa compiled

Weights are random, and so are the heads and neurons that go (the same share in every layer, different ones in each). In
each round the dense and the compacted model run in turn, in an order that turns from round to round; the ratio of the
two is taken in each round, so that what else the machine does falls on both. `achieved` is the speed-up divided by the
reciprocal of the share of multiplications that is left: 1 = all that could be had by doing less.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import hf_sparse

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
MODES = ("eager", "sdpa", "compiled")


def models(shape: str, gone: float, implementation: str) -> tuple[Any, Any]:
    """Return a dense model and the same without this share of its heads and neurons."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SHAPES[shape], "vocab_size": 1000, "attn_implementation": implementation}
    dense = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    small = copy.deepcopy(dense)
    groups = [{"pattern": pattern, "sparsity": gone, "scorer": "magnitude"} for pattern in ("head", "neuron")]
    hf_sparse.sparsify(small, hf_sparse.SparsityConfig(groups=groups))
    hf_sparse.compact(small)
    return dense, small


def multiplications(model: nn.Module, batch: int, length: int) -> int:
    """Count those of the linear layers and of the two products in each attention."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            count += batch * length * module.weight.numel()
        count += 2 * batch * length * length * int(vars(module).get("all_head_size", 0))
    return count


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the time of one call, the mean over some."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


@torch.inference_mode()
def compare(dense: nn.Module, small: nn.Module, ids: Tensor, rounds: int, repeats: int) -> list[tuple[float, float]]:
    """Return the times of both in each round."""
    runs = {"dense": lambda: dense(input_ids=ids), "small": lambda: small(input_ids=ids)}
    for run in runs.values():
        seconds(run, 2)
    pairs = []
    for number in range(rounds):
        order = ("dense", "small") if number % 2 == 0 else ("small", "dense")
        times = {name: seconds(runs[name], repeats) for name in order}
        pairs.append((times["dense"], times["small"]))
    return pairs


def measure(options: argparse.Namespace, gone: float, mode: str, threads: int, shape: str) -> dict[str, Any]:
    """Return the figures of one case."""
    batch, length = (int(side) for side in shape.split("x"))
    torch.set_num_threads(threads)
    dense, small = models(options.model_shape, gone, "eager" if mode == "eager" else "sdpa")
    left = multiplications(small, batch, length) / multiplications(dense, batch, length)
    if mode == "compiled":
        torch.compiler.reset()
        dense, small = torch.compile(dense), torch.compile(small)
    ids = torch.randint(0, 1000, (batch, length))
    pairs = compare(dense, small, ids, options.rounds, options.repeats)
    ratios = sorted(big / little for big, little in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "gone": gone,
        "mode": mode,
        "threads": threads,
        "shape": shape,
        "milliseconds_dense": 1e3 * statistics.median(big for big, _ in pairs),
        "milliseconds_small": 1e3 * statistics.median(little for _, little in pairs),
        "share_of_multiplications": left,
        "speed_up": [low, middle, high],
        "achieved": [low * left, middle * left, high * left],
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--gone", nargs="+", type=float, default=[0.5, 0.75], help="shares of heads and of neurons")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["sdpa", "compiled"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"], help="batch x tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="calls per model and round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    options = parser.parse_args()
    if min(options.rounds, options.repeats, *options.threads) < 1:
        parser.error("--rounds, --repeats and --threads are at least 1")
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    transformers.logging.set_verbosity_error()
    cases = [
        (gone, mode, threads, shape)
        for mode in options.modes
        for threads in options.threads
        for shape in options.shapes
        for gone in options.gone
    ]
    if not options.json:
        print(f"{options.model_shape}, torch {torch.__version__}, transformers {transformers.__version__}\n")
        print(f"{'mode':9}{'threads':>8}{'shape':>8}{'gone':>6}{'dense ms':>10}{'small ms':>10}{'speed-up':>10}"
              f"{'by count':>10}{'achieved':>10}{'quartiles':>14}")  # fmt: skip
    figures = []
    for case in cases:
        found = measure(options, *case)
        figures.append(found)
        if options.json:
            continue
        low, middle, high = found["achieved"]
        print(
            f"{found['mode']:9}{found['threads']:8}{found['shape']:>8}{found['gone']:6.2f}"
            f"{found['milliseconds_dense']:10.1f}{found['milliseconds_small']:10.1f}{found['speed_up'][1]:10.2f}"
            f"{1 / found['share_of_multiplications']:10.2f}{middle:10.3f}{f'{low:.3f}-{high:.3f}':>14}",
            flush=True,
        )
    if options.json:
        print(json.dumps({"model_shape": options.model_shape, "torch": torch.__version__, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
