"""Speed of a compacted BERT against the dense one, beside the share of multiplications that is left. Interleaved.

    python scripts/benchmarks/bench_structure.py --gone 0.5 0.75 --threads 1 2 --shapes 1x128 8x128

Weights are random, and so are the heads and neurons that go (the same share in every layer, different ones in each). In
each round the dense and the compacted model run in turn, in an order that turns from round to round; the ratio of the
two is taken in each round, so that what else the machine does falls on both. `achieved` is the speed-up divided by the
reciprocal of the share of multiplications that is left: 1 = all that could be had by doing less. It is given twice:
`same mode`, over the dense model in the same mode (compiled over compiled), and `over plain`, over the dense model that
is not compiled, which for the mode compiled has what compiling gives in it.

With --beside, in the modes that are not compiled: torch-pruning's result with the same survivors, and the dense model
under ONNX Runtime, in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench_structure_beside as beside  # type: ignore[import-not-found]  # beside it, for Python; mypy: scripts.
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel

import hf_sparse
from hf_sparse.formats.structure import Edits

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
MODES = ("eager", "sdpa", "compiled")


def models(shape: str, gone: float, implementation: str) -> tuple[Any, Any, Edits]:
    """Return a dense model, the same without this share of its heads and neurons, and what was cut."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SHAPES[shape], "vocab_size": 1000, "attn_implementation": implementation}
    dense = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    small = copy.deepcopy(dense)
    groups = [{"pattern": pattern, "sparsity": gone, "scorer": "magnitude"} for pattern in ("head", "neuron")]
    hf_sparse.sparsify(small, hf_sparse.SparsityConfig(groups=groups))
    return dense, small, hf_sparse.compact(small)


def multiplications(model: nn.Module, batch: int, length: int) -> int:
    """Count those of the linear layers and of the two products in each attention."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            count += batch * length * module.weight.numel()
        count += 2 * batch * length * length * int(vars(module).get("all_head_size", 0))
    return count


def seconds(run: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    """Return the time of one call, the mean over some."""
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


@torch.inference_mode()
def compare(
    runs: dict[str, Callable[[], Any]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the times of all, one for each round."""
    for run in runs.values():
        seconds(run, 2, clock)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(runs[name], repeats, clock))
    return times


def quartiles(dense: list[float], other: list[float]) -> list[float]:
    """Return the quartiles of the speed-ups of the rounds."""
    ratios = [big / little for big, little in zip(dense, other, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def measure(options: argparse.Namespace, gone: float, mode: str, threads: int, shape: str) -> dict[str, Any]:
    """Return the figures of one case."""
    batch, length = (int(side) for side in shape.split("x"))
    torch.set_num_threads(threads)
    dense, small, edits = models(options.model_shape, gone, "eager" if mode == "eager" else "sdpa")
    left = multiplications(small, batch, length) / multiplications(dense, batch, length)
    ids = torch.randint(0, 1000, (batch, length))
    called = {"dense": dense, "small": small}
    if mode == "compiled":
        torch.compiler.reset()
        called = {"dense": torch.compile(dense), "small": torch.compile(small), "plain": dense}
    elif options.beside and (pruned := beside.torch_pruned(dense, edits)) is not None:
        called["torch-pruning"] = pruned
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(model, input_ids=ids) for name, model in called.items()
    }
    if mode != "compiled" and options.beside and (onnx := beside.onnx_run(dense, ids, threads)) is not None:
        runs["onnxruntime dense"] = onnx
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = compare(runs, options.rounds, options.repeats, clock)
    speed_ups = {
        "same mode": quartiles(times["dense"], times["small"]),
        "over plain": quartiles(times.get("plain", times["dense"]), times["small"]),
    }
    return {
        "gone": gone,
        "mode": mode,
        "threads": threads,
        "shape": shape,
        "milliseconds": {name: 1e3 * statistics.median(own) for name, own in times.items()},
        "share_of_multiplications": left,
        "speed_up": speed_ups,
        "achieved": {name: [value * left for value in values] for name, values in speed_ups.items()},
        "beside": {
            name: quartiles(times["dense"], own)
            for name, own in times.items()
            if name not in ("dense", "small", "plain")
        },
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
    parser.add_argument("--beside", action="store_true", help="measure torch-pruning and ONNX Runtime too")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of one thread, on a busy machine"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    options = parser.parse_args()
    if min(options.rounds, options.repeats, *options.threads) < 1:
        parser.error("--rounds, --repeats and --threads are at least 1")
    if options.clock == "cpu" and max(options.threads) > 1:
        parser.error("--clock cpu is for --threads 1: the time of two threads has their waiting in it")
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
        if options.beside and (lines := beside.missing()):
            print(*lines, sep="\n", end="\n\n")
        print("| mode | threads | shape | gone | dense ms | small ms | by count | same mode: speed-up | achieved "
              "(quartiles) | over plain: achieved (quartiles) | beside: speed-up (quartiles) |")  # fmt: skip
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    figures = []
    for case in cases:
        found = measure(options, *case)
        figures.append(found)
        if options.json:
            continue
        achieved = [f"{middle:.3f} ({low:.3f}-{high:.3f})" for low, middle, high in found["achieved"].values()]
        others = [f"{name} {mid:.2f} ({low:.2f}-{high:.2f})" for name, (low, mid, high) in found["beside"].items()]
        print(
            f"| {found['mode']} | {found['threads']} | {found['shape']} | {found['gone']:.2f} "
            f"| {found['milliseconds']['dense']:.1f} | {found['milliseconds']['small']:.1f} "
            f"| {1 / found['share_of_multiplications']:.2f} | {found['speed_up']['same mode'][1]:.2f} "
            f"| {achieved[0]} | {achieved[1]} | {', '.join(others)} |",
            flush=True,
        )
    if options.json:
        print(json.dumps({"model_shape": options.model_shape, "torch": torch.__version__, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
