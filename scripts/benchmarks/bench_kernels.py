"""Time the sparse matmuls against torch's dense ones: interleaved, as the median of ratios with their quartiles.

With one thread CPU time is measured, which other processes disturb less; with more threads wall-clock time.

    python scripts/benchmarks/bench_kernels.py --threads 1 --tokens 128 --isa avx2

Every result is compared with the dense one first. Weights and masks are random. A ratio above 1 is a speed-up. With
--int8 weights and inputs are rounded to int8, and results may be 3 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.kernels import PackedInt8, library_status, pack, pack_int8
from hf_sparse.kernels.functional import ffn, linear
from hf_sparse.kernels.int8_ops import why_not_int8
from hf_sparse.kernels.library import ISA_VARIABLE, library
from hf_sparse.profiling.timer import interleave, quartiles, ratios

Run = Callable[[], Tensor]


def masked(out: int, width: int, zeros: float, rows: int) -> Tensor:
    """Make a random weight whose rows x 1 blocks are zero with this probability."""
    kept = torch.rand(-(-out // rows), width) >= zeros
    return torch.randn(out, width) * 0.05 * kept.repeat_interleave(rows, 0)[:out]


def int8_ffn(x: Tensor, up: PackedInt8, bias: Tensor, down: PackedInt8, back: Tensor) -> Tensor:
    """Compute a feed-forward pair in int8."""
    sizes = (up.rows, down.rows, up.out_features, down.out_features, up.in_features)
    out: Tensor = torch.ops.hf_sparse.int8_ffn(x, *up.parts, bias, *down.parts, back, *sizes, "gelu")
    return out


def speed_ups(dense: Run, sparse: Run, rounds: int, threads: int, limit: float) -> tuple[float, float, float]:
    """Compare the results, then time both; return quartiles of dense over sparse."""
    expected, found = dense(), sparse()
    error = float((expected - found).norm() / expected.norm())
    if not error < limit:
        raise SystemExit(f"the sparse matmul is wrong: relative error {error:.1e}, limit {limit:.1e}")
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = interleave({"dense": dense, "sparse": sparse}, rounds, warmup=0, clock=clock)
    return quartiles(ratios(seconds, "dense", "sparse"))


def main() -> None:
    """Print one line a case, as a table and as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("IN", "OUT"))
    parser.add_argument("--isa", help="avx512vbmi, avx512, avx2, portable, neon; the best by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-ffn", action="store_true")
    parser.add_argument("--int8", action="store_true", help="weights and inputs rounded to int8, in place of fp32")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.isa:
        os.environ[ISA_VARIABLE] = options.isa  # read with the library, which is loaded now
        if library() is None:
            parser.error(f"--isa {options.isa}: {library_status().message}")
    if options.int8 and (why := why_not_int8()) is not None:
        parser.error(f"--int8 cannot run here: {why}")
    print(f"{library_status().message}; {options.threads} thread(s), torch {torch.__version__}")
    with torch.inference_mode():
        for width, out in options.shape or [(768, 3072), (3072, 768)]:
            for tokens in options.tokens:
                for rows in options.rows:
                    for zeros in options.zeros:
                        measure(width, out, tokens, rows, zeros, options)


def measure(width: int, out: int, tokens: int, rows: int, zeros: float, options: argparse.Namespace) -> None:
    """Measure one product, and the feed-forward pair where the shape widens."""
    x, first, second = torch.randn(tokens, width), masked(out, width, zeros, rows), masked(width, out, zeros, rows)
    bias, back = torch.randn(out), torch.randn(width)
    up, down = pack(first, rows), pack(second, rows)
    cases = {"linear": (lambda: F.linear(x, first, bias), lambda: linear(x, up, bias))}
    if options.int8:
        short = min(rows, 4)
        rounded = pack_int8(first, short), pack_int8(second, short)
        cases["linear"] = (cases["linear"][0], lambda: linear(x, rounded[0], bias))
    if out > width and not options.no_ffn:
        cases["ffn"] = (
            lambda: F.linear(F.gelu(F.linear(x, first, bias)), second, back),
            (lambda: int8_ffn(x, rounded[0], bias, rounded[1], back))
            if options.int8
            else (lambda: ffn(x, up, bias, down, back, "gelu")),
        )
    for name, (dense, sparse) in cases.items():
        limit = 0.03 if options.int8 else 1e-5
        low, middle, high = speed_ups(dense, sparse, options.rounds, options.threads, limit)
        if options.json:
            facts = {"case": name, "in": width, "out": out, "tokens": tokens, "rows": rows, "zeros": zeros}
            print(json.dumps({**facts, "ratio": middle, "quartiles": [low, high], "bytes": up.nbytes}), flush=True)
        else:
            shape = f"{width}->{out}"
            print(
                f"{name:7}{shape:>12} {tokens:5} tokens {rows:2}x1 {zeros:4.0%} zeros: "
                f"{middle:5.2f} ({low:.2f}-{high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
