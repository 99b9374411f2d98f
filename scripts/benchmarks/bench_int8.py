"""Time the int8 matmuls against the fp32 ones of the same instruction set: how many times as fast, at each length.

    python scripts/benchmarks/bench_int8.py --isa avx2 avx512vbmi --tokens 8 64 128

One thread, one linear layer, inputs rounded and outputs stored as in a model; interleaved, the median of ratios over
shapes of MiniLM and BERT-base. Weights and masks are random. A processor with more that runs code for AVX2 is not one
with AVX2 alone.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from bench_kernels import masked  # type: ignore[import-not-found]  # beside this file
from torch import Tensor

from hf_sparse.kernels import library_status, pack, pack_int8
from hf_sparse.kernels.library import Library
from hf_sparse.kernels.types import Int8Weight, Weight
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave, ratios

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))
"""In and out: the layers of MiniLM-L6 and of BERT-base."""


def gain(native: Library, weight: Tensor, rows: int, tokens: int, rounds: int) -> float:
    """Return the median of the time in fp32 over that in int8."""
    out, width = weight.shape
    assert native.int8 is not None
    exact, rounded = pack(weight, rows), pack_int8(weight, rows)
    x, plain, quantized = torch.randn(tokens, width), native.fp32, native.int8
    fp32 = plain.describe([Weight(*exact.parts, None, rows, out, width)])
    int8 = quantized.describe([Int8Weight(*rounded.parts, None, rows, out, width)])
    expected, found = plain.linear(x, fp32, "none"), quantized.linear(x, int8, "none")
    error = float((expected - found).norm() / expected.norm())
    if not error < 0.03:
        raise SystemExit(f"the int8 matmul is wrong: relative error {error:.1e}")
    runs = {"fp32": lambda: plain.linear(x, fp32, "none"), "int8": lambda: quantized.linear(x, int8, "none")}
    return statistics.median(ratios(interleave(runs, rounds, warmup=1), "fp32", "int8"))


def main() -> None:
    """Print a line for each instruction set, height, sparsity and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["avx2"], help="avx512vbmi, avx512, avx2, neon")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = library_status().path
    if path is None:
        parser.error(library_status().message)
    print(f"{machine()}; torch {torch.__version__}; fp32 / int8, median (lowest - highest) over {len(SHAPES)} shapes")
    for isa in options.isa:
        native = Library(path, isa)
        if native.int8 is None:
            parser.error(f"--isa {isa}: it has no int8 kernels")
        for rows in options.rows:
            for zeros in options.zeros:
                weights = [masked(out, width, zeros, rows) for width, out in SHAPES]
                for tokens in options.tokens:
                    each = [gain(native, weight, rows, tokens, options.rounds) for weight in weights]
                    print(
                        f"{isa:11} {rows}x1 {zeros:4.0%} {tokens:4} tokens: {statistics.median(each):5.2f} "
                        f"({min(each):.2f} - {max(each):.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
