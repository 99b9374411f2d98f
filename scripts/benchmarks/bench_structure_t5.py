"""Speed of a compacted T5 against the dense one: the encoder alone, and the encoder with greedy decoding. Interleaved.

    python scripts/benchmarks/bench_structure_t5.py --gone 0.5 0.75 --threads 1 2 --batches 1 8 --modes dynamic static

Shape of T5-small with random weights; the heads and neurons that go are random too, the same share in every layer and
different ones in each. All contestants of one case (dense and compacted, in each mode) run in turn within each round,
in an order that turns from round to round, and ratios are taken within a round.

The share of multiplications that is left is counted while both run, by torch's own counter, so it holds what is
executed: for `generate` the encoder, the keys and values of the cross-attention once, each step of the decoder with the
cache as long as it is then, and the product with the vocabulary, which no pruning of heads and neurons makes smaller.
`achieved` = speed-up times that share. `same mode` compares with the dense model in the same mode; `over plain` with
the dense model in eager mode with the cache that transformers takes by itself.

Modes: dynamic = that; static = a static cache; compiled = a static cache, with the decoder under torch.compile, and the
encoder too.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, T5Config, T5ForConditionalGeneration

import hf_sparse

SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 2048, "d_kv": 64, "vocab_size": 32128},
    "tiny": {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 64, "d_kv": 8, "vocab_size": 100},
}
MODES = ("dynamic", "static", "compiled")
PARTS = ("encoder", "generate")
LENGTH, STEPS = 128, 32


def dense_model(shape: str) -> Any:
    """Return a T5 with random weights; it never ends a text by itself before it is asked to."""
    torch.manual_seed(0)
    rest: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = T5Config(**SHAPES[shape], **rest, feed_forward_proj="relu")
    return T5ForConditionalGeneration(config).eval()


def compacted(dense: Any, gone: float) -> Any:
    """Return the same without this share of the heads and neurons of each layer."""
    small = copy.deepcopy(dense)
    groups = [{"pattern": pattern, "sparsity": gone, "scorer": "magnitude"} for pattern in ("head", "neuron")]
    hf_sparse.sparsify(small, hf_sparse.SparsityConfig(groups=groups))
    hf_sparse.compact(small)
    return small


def call(model: Any, part: str, mode: str, ids: Tensor) -> Callable[[], Any]:
    """Return what is timed."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mode == "compiled":
        model = copy.copy(model)  # shares the weights; only this one has a compiled encoder
        model._modules = {**model._modules, "encoder": torch.compile(model.encoder)}
    if part == "encoder":
        return lambda: model.get_encoder()(**inputs)
    settings: dict[str, Any] = {} if mode == "dynamic" else {"cache_implementation": "static"}
    if mode == "compiled":
        settings["compile_config"] = CompileConfig(fullgraph=False, mode="default")
        settings["compile_config"]._compile_all_devices = True  # transformers compiles on a CPU only if told so
    elif mode == "static":
        settings["disable_compile"] = True
    return lambda: model.generate(
        **inputs, min_new_tokens=STEPS, max_new_tokens=STEPS, do_sample=False, num_beams=1, **settings
    )


@torch.no_grad()
def operations(model: Any, part: str, ids: Tensor) -> int:
    """Count the multiplications and additions that are executed."""
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of a CPU
    with FlopCounterMode(display=False) as counter:
        call(model, part, "dynamic", ids)()
    model.set_attn_implementation("sdpa")
    return int(counter.get_total_flops())


@torch.inference_mode()
def interleave(runs: dict[Any, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[Any, list[float]]:
    """Return the times of all, one for each round."""
    for run in runs.values():
        run()
        run()
    times: dict[Any, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def measure(options: argparse.Namespace, models: dict[float, Any], part: str, threads: int, batch: int) -> None:
    """Measure one case, all modes in one go, and print its rows."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    ids = torch.randint(2, models[0.0].config.vocab_size, (batch, LENGTH))
    counts = {gone: operations(model, part, ids) for gone, model in models.items()}
    # The encoder has no cache: there, static is the same as dynamic.
    modes = [mode for mode in options.modes if part == "generate" or mode != "static"]
    runs = {(gone, mode): call(model, part, mode, ids) for mode in modes for gone, model in models.items()}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = interleave(runs, options.rounds if part == "generate" else 3 * options.rounds, clock)
    for (gone, mode), own in times.items():
        cells = [part, mode, threads, f"{batch}x{LENGTH}", f"{gone:.2f}", f"{1e3 * statistics.median(own):.1f}"]
        share = counts[gone] / counts[0.0]
        cells.append(f"{1 / share:.2f}")
        for other in (mode, "dynamic"):
            if (0.0, other) in times:
                ratios = [big / little for big, little in zip(times[0.0, other], own, strict=True)]
                low, middle, high = quartiles(ratios)
                cells += [f"{middle:.2f}", f"{middle * share:.2f} ({low * share:.2f}-{high * share:.2f})"]
            else:
                cells += ["", ""]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-shape", choices=SHAPES, default="t5-small")
    parser.add_argument("--gone", nargs="+", type=float, default=[0.5, 0.75], help="shares of heads and of neurons")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["dynamic", "static"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="of generate; the encoder has three times as many")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of one thread, on a busy machine"
    )
    options = parser.parse_args()
    if min(options.rounds, *options.threads, *options.batches) < 1:
        parser.error("--rounds, --threads and --batches are at least 1")
    if options.clock == "cpu" and max(options.threads) > 1:
        parser.error("--clock cpu is for --threads 1: the time of two threads has their waiting in it")
    return options


def main() -> None:
    """Measure and print a Markdown table."""
    options = parse()
    transformers.logging.set_verbosity_error()
    dense = dense_model(options.model_shape)
    models = {0.0: dense, **{gone: compacted(dense, gone) for gone in options.gone}}
    print(
        f"{options.model_shape}, {STEPS} steps, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{options.clock} clock\n"
    )
    print("| part | mode | threads | shape | gone | ms | by count | same mode: speed-up | achieved (quartiles) "
          "| over plain: speed-up | achieved (quartiles) |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for part in options.parts:
        for threads in options.threads:
            for batch in options.batches:
                measure(options, models, part, threads, batch)


if __name__ == "__main__":
    main()
