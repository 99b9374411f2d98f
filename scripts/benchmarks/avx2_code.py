"""Keep a benchmark to AVX2 code on a processor with more: `--avx2` of bench_peers, bench_embedding and bench_decode.

That is not a processor with AVX2 alone, whose clock, caches and widths are others; but all engines are measured on one.
ONNX Runtime has no such switch.
"""

from __future__ import annotations

import os
import sys

AVX2 = {
    "HF_SPARSE_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NM_ARCH": "avx2",
}
"""Switches of our kernels, of torch, of oneDNN (in torch and OpenVINO), of MKL and of DeepSparse."""


def keep_to_avx2() -> None:
    """Start this program anew with all of `AVX2` set, unless it is: libraries read them as they are loaded."""
    if not AVX2.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)  # noqa: S606  this very program
