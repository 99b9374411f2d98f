"""Speed-up of the runtime form for complete models: BERT-base, MiniLM-L6 and T5-small in shape, random weights.

    python scripts/benchmarks/bench_runtime.py --json runtime.json               # all of it, about an hour
    python scripts/benchmarks/bench_runtime.py --models bert-base --batches 1 --threads 1 --sparsities 0.9 --rounds 7

Outputs are compared before anything is timed. Then the dense model (torch, eager), the sparse ones, with --int8 the
same with backend "cpu-int8" (not exact: how far off is a column), and the dense model in the engines that are
installed (torch.compile, ONNX Runtime, OpenVINO; --engines) run interleaved; the speed-up is the median of the ratios
within a round, with quartiles, over torch and over the fastest dense engine of the run. T5 is timed as its encoder,
and as greedy decoding of 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from hf_sparse import to_runtime
from hf_sparse.analysis.benchmark import INT8_TOLERANCE, compare, engine_difference
from hf_sparse.analysis.dense_engines import ENGINES, INT8, Job, built, engines_named
from hf_sparse.kernels import library_status
from hf_sparse.modeling.layer_matching import block_layers
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.speed_record import FP32
from hf_sparse.profiling.timer import interleave, quartiles, threads_of_torch
from hf_sparse.profiling.timer import ratios as gains
from hf_sparse.runtime.lm_head import use_few_token_kernel
from hf_sparse.runtime.memory import bytes_of

PATTERNS = {"element": (1, 1), "4x1": (4, 1), "32x32": (32, 32)}
MINI: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
DECODED = 64


def make(name: str) -> Any:
    """Return a dense model of this shape."""
    torch.manual_seed(0)
    if name.startswith("t5"):
        start: dict[str, Any] = {"decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**start)).eval()  # the defaults are T5-small
    return BertModel(BertConfig(**(MINI if name == "minilm-l6" else {})), add_pooling_layer=False).eval()


@torch.no_grad()
def prune(model: nn.Module, sparsity: float, pattern: str) -> None:
    """Zero random blocks in every linear layer inside the transformer blocks."""
    rows, cols = PATTERNS[pattern]
    generator = torch.Generator().manual_seed(0)
    for layer in block_layers(model).values():
        height, width = layer.weight.shape
        kept = torch.rand(height // rows, width // cols, generator=generator) >= sparsity
        layer.weight.mul_(kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1))


def work(name: str, model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """Return what is timed."""
    if name == "t5-small-encoder":
        return lambda: model.encoder(ids)
    if name == "t5-small-decode":
        model.generation_config.eos_token_id = (
            None  # random weights might stop early; a minimal length costs time itself
        )
        return lambda: model.generate(ids, max_new_tokens=DECODED, do_sample=False)
    return lambda: model(ids)


def dense_engines(
    names: Sequence[str], name: str, dense: Any, ids: torch.Tensor, threads: int, folder: str
) -> dict[str, Callable[[], object]]:
    """Return what else runs the dense model: none for T5, whose encoder and generation no engine here exports."""
    if name.startswith("t5"):
        return {}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    engines, _ = built(names, Job(dense, 1, threads, Path(folder)), partial(engine_difference, dense, [batch]))
    return {label: partial(engine, batch) for label, (engine, _) in engines.items()}


def fastest_dense(seconds: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Return the fastest dense run of each precision: what the sparse one has to be compared with."""
    found = {}
    for precision in (FP32, INT8):
        runs = [name for name in seconds if name in ENGINES and ENGINES[name].precision == precision]
        runs += ["dense"] if precision == FP32 else []
        if runs:
            found[precision] = min(runs, key=lambda name: statistics.median(seconds[name]))
    return found


def measure(options: argparse.Namespace, name: str, batch: int, threads: int) -> Iterator[dict[str, Any]]:
    """Time one model at every sparsity and pattern, and yield a row for each."""
    dense = make(name)
    ids = torch.randint(5, 1000, (batch, options.length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        peers = dense_engines(engines_named(options.engines), name, dense, ids, threads, folder)
        for pattern in options.patterns:
            for sparsity in options.sparsities:
                same, sparse = make(name), make(name)
                prune(same, sparsity, pattern)
                prune(sparse, sparsity, pattern)
                report = to_runtime(sparse, options.backend)
                inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name.startswith("t5") else {})
                difference = compare(sparse, same, inputs)
                bytes_now, bytes_dense = bytes_of(sparse), bytes_of(same)
                runs = {"dense": work(name, dense, ids), "sparse": work(name, sparse, ids), **peers}
                if name == "t5-small-decode":  # what of the gain is the vocabulary alone
                    fast = make(name)
                    use_few_token_kernel(fast.lm_head)
                    runs["dense with our vocabulary"] = work(name, fast.requires_grad_(False), ids)
                int8: dict[str, float] = {}
                if options.int8:
                    rounded = make(name)
                    prune(rounded, sparsity, pattern)
                    to_runtime(rounded, "cpu-int8")
                    int8["int8_difference"] = compare(rounded, same, inputs, INT8_TOLERANCE)
                    runs["sparse-int8"] = work(name, rounded, ids)
                del same
                seconds = interleave(runs, options.rounds)
                ratios = {
                    run: quartiles([a / b for a, b in zip(seconds["dense"], found, strict=True)])
                    for run, found in seconds.items()
                    if run != "dense"
                }
                yield {
                    "model": name,
                    "batch": batch,
                    "length": options.length,
                    "threads": threads,
                    "pattern": pattern,
                    "sparsity": sparsity,
                    "difference": difference,
                    **int8,
                    "layers": f"{len(report.sparse)}/{len(report.layers)}",
                    "bytes": bytes_now,
                    "dense_bytes": bytes_dense,
                    "seconds": {run: quartiles(found) for run, found in seconds.items()},
                    "speedup": ratios,
                    "fastest dense": {
                        precision: {"engine": run, "speedup": quartiles(gains(seconds, run, "sparse"))}
                        for precision, run in fastest_dense(seconds).items()
                    },
                }


def main() -> None:
    """Measure, print a line per row, and write JSON."""
    models = ["bert-base", "minilm-l6", "t5-small-encoder", "t5-small-decode"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.8, 0.9, 0.95])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backend", default="cpu", help="see hf_sparse.to_runtime (cpu)")
    parser.add_argument("--int8", action="store_true", help='also time backend "cpu-int8"')
    parser.add_argument(
        "--engines", default="installed", help="other engines for the dense model, as of hf-sparse bench (installed)"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    setting = {
        "machine": machine().rsplit(", ", 2)[0],
        "system": platform.platform(),
        "kernels": library_status().isa,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "load": os.getloadavg(),
    }
    print(setting)
    rows = []
    for threads in options.threads:
        with threads_of_torch(threads):
            for name in options.models:
                for batch in options.batches:
                    for row in measure(options, name, batch, threads):
                        rows.append(row)
                        said = ", ".join(
                            f"{run} {middle:.2f}x [{low:.2f}, {high:.2f}]"
                            for run, (low, middle, high) in row["speedup"].items()
                        )
                        for precision, over in row["fastest dense"].items():
                            low, middle, high = over["speedup"]
                            said += f"; over {over['engine']} ({precision}) {middle:.2f}x [{low:.2f}, {high:.2f}]"
                        print(
                            f"{threads} thread(s) {name:<17} {batch} x {options.length} {row['pattern']:<8}"
                            f"{row['sparsity']:.0%}  {said}",
                            flush=True,
                        )
                        if options.json is not None:
                            Path(options.json).write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
