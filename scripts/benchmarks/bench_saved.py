"""Time saved models against the first of them, interleaved: forward passes, or generation for encoder-decoders.

    python scripts/benchmarks/bench_saved.py runs/sst2_dense runs/small --threads 1 --batch 8 --length 64
    python scripts/benchmarks/bench_saved.py runs/g2p_dense runs/g2p_small --generate 40

Each round runs every model once and divides its time by that of the first model in the same round. Printed are the
median of these ratios with quartiles, and the sizes of the weight files; beside them the first model in the engines
that are installed, as torch may not be the fastest that runs it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from hf_sparse.analysis.bench_inputs import make_inputs
from hf_sparse.analysis.benchmark import engine_difference
from hf_sparse.analysis.dense_engines import ENGINES, Job, built, engines_named
from hf_sparse.formats.inspection import inspect
from hf_sparse.hf.auto import load_whole
from hf_sparse.profiling.timer import interleave, quartiles, ratios


def call(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    """Return what is timed."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (options.batch, options.length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if options.generate:
        length = {"min_new_tokens": options.generate, "max_new_tokens": options.generate}
        return lambda: model.generate(**inputs, **length, do_sample=False)
    return lambda: model(**inputs)


def dense_engines(
    names: Sequence[str], model: Any, options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Any]]:
    """Return what else runs the first model, with its outputs."""
    inputs = make_inputs(model, options.batch, options.length)
    engines, _ = built(names, Job(model, 1, options.threads, folder), partial(engine_difference, model, [inputs]))
    return {name: partial(engine, inputs) for name, (engine, _) in engines.items()}


@torch.inference_mode()
def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders; the first is what the others are compared with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="time N greedy tokens instead")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--engines", default="installed", help="other engines for the first model, as of hf-sparse bench (installed)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = [load_whole(name).eval() for name in options.models]
    runs: dict[int | str, Callable[[], Any]] = {index: call(model, options) for index, model in enumerate(loaded)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        names = [] if options.generate else engines_named(options.engines)
        engines = dense_engines(names, loaded[0], options, Path(folder))
        seconds = interleave({**runs, **engines}, options.rounds)
    what = f"{options.generate} greedy tokens" if options.generate else "one forward pass"
    print(
        f"{what}, batch {options.batch}, {options.length} tokens in, {options.threads} threads, speed-up over the first"
    )
    for index, (name, model) in enumerate(zip(options.models, loaded, strict=True)):
        low, middle, high = quartiles(ratios(seconds, 0, index))
        size = sum(inspect(name).files.values()) / 1e6
        sizes = f"{model.num_parameters():>13,} parameters{size:9.2f} MB"
        print(f"{Path(name).name:<24}{middle:6.2f} [{low:.2f}, {high:.2f}]{sizes}")
    for name in engines:
        low, middle, high = quartiles(ratios(seconds, 0, name))
        print(f"{name:<24}{middle:6.2f} [{low:.2f}, {high:.2f}]  the first model, {ENGINES[name].precision}")


if __name__ == "__main__":
    main()
