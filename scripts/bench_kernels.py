"""Time the sparse products against torch's dense ones: interleaved, as the median of ratios with their quartiles.

With one thread the time of the processor counts, so that other programs disturb less; else that of the clock.

    python scripts/bench_kernels.py --threads 1 --tokens 128 --isa avx2

Every result is compared with the dense one first. Weights and masks are random. A ratio above 1 is a gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.kernels import library_status, pack
from hf_sparse.kernels.library import library
from hf_sparse.kernels.ops import ffn, linear


def masked(out: int, width: int, zeros: float, rows: int) -> Tensor:
    """Make a random weight whose rows x 1 blocks are zero with this probability."""
    kept = torch.rand(-(-out // rows), width) >= zeros
    return torch.randn(out, width) * 0.05 * kept.repeat_interleave(rows, 0)[:out]


def ratios(dense: Callable[[], Tensor], sparse: Callable[[], Tensor], rounds: int, threads: int) -> list[float]:
    """Time both in turn, the order changing from round to round; dense over sparse for each round."""
    expected, found = dense(), sparse()
    error = float((expected - found).norm() / expected.norm())
    if not error < 1e-5:
        raise SystemExit(f"the sparse product is wrong: relative error {error:.1e}")
    clock = time.process_time if threads == 1 else time.perf_counter
    result = []
    for turn in range(rounds):
        spent = {}
        for run in (dense, sparse) if turn % 2 else (sparse, dense):
            start = clock()
            run()
            spent[run] = clock() - start
        result.append(spent[dense] / spent[sparse])
    return result


def main() -> None:
    """Print one line a case, as a table and as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("IN", "OUT"))
    parser.add_argument("--isa", help="avx512, avx2, portable, neon; the best by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-ffn", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = library()
    if native is not None and options.isa:
        if options.isa not in native.isas:
            parser.error(f"--isa {options.isa}: this processor can do {', '.join(native.isas)}")
        native.isa = options.isa
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
    if out > width and not options.no_ffn:
        cases["ffn"] = (
            lambda: F.linear(F.gelu(F.linear(x, first, bias)), second, back),
            lambda: ffn(x, up, bias, down, back, "gelu"),
        )
    for name, (dense, sparse) in cases.items():
        low, middle, high = statistics.quantiles(ratios(dense, sparse, options.rounds, options.threads), n=4)
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
