"""One token: every layout of a sparse weight beside dense int8, at rising sparsity. From where on does a layout win?

    python scripts/benchmarks/bench_one_token.py --json one_token.json

Layers of the shapes of Gemma-3-270M and Qwen2.5-Coder-0.5B, one token, as when text is generated. A model reads each
weight once a token, from memory: so each form has as many copies as exceed the third cache, and a call goes through
all. Dense int8 is torch's (`quantized.linear_dynamic`, a scale for each row, by the engine that torch takes here). One
thread, CPU time, interleaved; figures are the median and the quartiles of ratios over dense int8 within a round: above
1 is faster. Weights and masks are random; outputs are compared first, those of forms that round to 3 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import masked  # type: ignore[import-not-found]  # beside this file
from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse.kernels import KERNELS, library_status
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave, quartiles, ratios, threads_of_torch
from hf_sparse.runtime.packed_weight import Packed

SHAPES = ((2048, 640), (640, 2048), (4864, 896), (896, 4864))
"""Outputs and inputs of the feed-forward layers of the two models."""

FORMS = {
    "bitmask": ("bitmask", 1),
    "bitmask-int8": ("bitmask-int8", 1),
    "fp32, indices": ("cpu", 1),
    "fp32, 4x1": ("cpu", 4),
    "fp32, 16x1": ("cpu", 16),
    "int8, 4x1": ("cpu-int8", 4),
}
"""Backend of `to_runtime`, and block height of mask and layout."""

BASE = "dense int8"
CACHE = 1 << 26
"""Bytes of all copies of a form, at least."""


def dense_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the matmul with a weight rounded to int8."""
    scales = weight.abs().amax(1).clamp_min(1e-12) / 127
    rounded = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)


class Copies:
    """Enough copies of a matmul to exceed the caches; a call goes through all.

    Args:
        make: of one copy.
        nbytes: of its weight.
    """

    def __init__(self, make: Callable[[], Callable[[Tensor], Tensor]], nbytes: int) -> None:
        self.matmuls = [make() for _ in range(-(-CACHE // nbytes))]

    def __call__(self, x: Tensor) -> Tensor:
        for matmul in self.matmuls:
            out = matmul(x)
        return out


def sparse(weight: Tensor, backend: str, rows: int) -> Copies:
    """Return copies of the matmul with a packed weight."""
    packed = Packed.of(weight, KERNELS.backends[backend].name, rows)

    def make() -> Callable[[Tensor], Tensor]:
        own = packed._replace(operands=tuple(operand.clone() for operand in packed.operands))
        return partial(own.multiply, bias=None)

    return Copies(make, sum(operand.nbytes for operand in packed.operands))


def measure(out: int, into: int, zeros: float, forms: list[str], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return the speed of each form over dense int8."""
    x = torch.randn(1, into)
    runs: dict[str, Copies] = {}

    def add(name: str, run: Copies, weight: Tensor) -> None:
        expected = F.linear(x, weight)
        off = float((run(x) - expected).norm() / expected.norm())
        if off > (0.03 if "int8" in name else 1e-5):
            raise SystemExit(f"{name} is {off:.1e} from the matmul in float32")
        runs[name] = run

    for name in forms:
        backend, rows = FORMS[name]
        weight = masked(out, into, zeros, rows)
        add(name, sparse(weight, backend, rows), weight)
    dense = masked(out, into, 0.0, 1)
    add(BASE, Copies(lambda: dense_int8(dense), dense.numel()), dense)
    add("dense fp32", Copies(lambda: partial(F.linear, weight=dense.clone()), dense.nbytes), dense)
    timed = {name: partial(run, x) for name, run in runs.items()}
    seconds = interleave(timed, rounds, warmup=1, clock=time.thread_time)
    each = {name: [one / len(runs[name].matmuls) for one in found] for name, found in seconds.items()}
    return {name: quartiles(ratios(each, BASE, name)) for name in runs if name != BASE}


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with threads_of_torch(1):
        print(machine(), library_status().isa, torch.backends.quantized.engine)
        for out, into in tqdm(SHAPES):
            for zeros in options.sparsities:
                gains = measure(out, into, zeros, options.forms, options.rounds)
                rows.append({"out": out, "in": into, "sparsity": zeros, "over dense int8": gains})
                line = ", ".join(f"{name} {low:.2f}-{mid:.2f}-{high:.2f}" for name, (low, mid, high) in gains.items())
                tqdm.write(f"{out} x {into}, {zeros:.0%}: {line}")
        if options.json is not None:
            facts = {
                "machine": machine(),
                "instruction_set": library_status().isa,
                "rounds": options.rounds,
                "rows": rows,
            }
            options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
