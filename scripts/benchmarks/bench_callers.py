"""Throughput of one model that several threads call at once, each with one thread of torch: dense and sparse.

    python scripts/benchmarks/bench_callers.py MODEL --callers 1 2 4 8 --length 128
    python scripts/benchmarks/bench_callers.py MODEL --backends dense cpu cpu-int8 --callers 1 8

MODEL is a saved sparse model. Outputs of all callers are compared with those of one before anything is timed: the same
bits. Backends run interleaved: in each round each computes `--calls` forward passes.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from hf_sparse import to_runtime
from hf_sparse.analysis.bench_inputs import make_inputs
from hf_sparse.analysis.dense_engines import first_output
from hf_sparse.hf.auto import load_whole
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import in_rounds, quartiles

Batch = dict[str, Tensor]


def run(model: Any, inputs: Sequence[Batch], callers: int) -> tuple[float, list[Tensor]]:
    """Compute all inputs with several callers, and return the time and the outputs in the order of the inputs."""
    outputs: list[Any] = [None] * len(inputs)
    start = threading.Barrier(callers + 1)

    def work(number: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        with torch.inference_mode():
            for place in range(number, len(inputs), callers):
                outputs[place] = first_output(model(**inputs[place]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, outputs


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a sparse model")
    parser.add_argument("--backends", nargs="+", default=["dense", "auto"])
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--calls", type=int, default=32, help="forward passes of a round (32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, Any] = {}
    for backend in options.backends:
        models[backend] = load_whole(options.model, dtype=torch.float32).eval()
        if backend != "dense":
            to_runtime(models[backend], backend)
    inputs = [make_inputs(models[options.backends[0]], options.batch, options.length) for _ in range(options.calls)]
    for number, each in enumerate(inputs):
        each["input_ids"] = each["input_ids"].roll(number, 1)
    for backend, model in models.items():
        _, expected = run(model, inputs, 1)
        _, found = run(model, inputs, max(options.callers))
        if not all(map(torch.equal, found, expected)):
            raise SystemExit(
                f"bench_callers: {backend} gives other outputs to {max(options.callers)} callers than to one"
            )
    print(f"{machine().rsplit(', ', 2)[0]}, {os.cpu_count()} cores, batch {options.batch} x {options.length}")
    rows: dict[str, dict[int, Any]] = {backend: {} for backend in models}
    for callers in options.callers:
        timed = {backend: (lambda m=model, n=callers: run(m, inputs, n)[0]) for backend, model in models.items()}
        for backend, seconds in in_rounds(timed, options.rounds, warmup=1).items():
            low, middle, high = quartiles([options.calls * options.batch / each for each in seconds])
            rows[backend][callers] = (low, middle, high)
            print(f"{callers} callers  {backend:<12} {middle:9.1f} examples/s [{low:.1f}, {high:.1f}]", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
