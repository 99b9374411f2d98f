"""What this machine can run: which kernels are there, whether their results are right, and what is missing."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from .._version import __version__
from ..kernels import KERNELS, Kernel, library_status
from ..profiling.machine import machine
from ..runtime.autotune import SpeedTable
from ..runtime.packed_weight import Packed


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of it.
        works: whether it can be used here.
        says: what was found, or how to get it.
    """

    name: str
    works: bool
    says: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All checks. `print` them for a table."""

    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"findings": [dataclasses.asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        rows = [f"{'yes' if one.works else 'no':<4}{one.name:<{width}}  {one.says}" for one in self.findings]
        return "\n".join(rows)


def diagnose() -> Diagnosis:
    """Look at the machine, and try every kernel on a tiny matmul."""
    versions = f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    status = library_status()
    findings = [
        Finding("machine", True, f"{machine()} of {os.cpu_count()} processors"),
        Finding("versions", True, versions),
        Finding("C++ kernels", status.available, status.message),
    ]
    findings += [_try(kernel) for kernel in KERNELS.of_device("cpu")]
    cuda = torch.cuda.is_available()
    says = (
        f"{torch.cuda.get_device_name()}: to_runtime times 2:4 and blocks there (scripts/verify_gpu.py checks them)"
        if cuda
        else "no CUDA device; none is needed for the CPU kernels"
    )
    findings.append(Finding("CUDA", cuda, says))
    path = SpeedTable().cache.path
    findings.append(Finding("measured times", path.is_file(), f"{path}" if path.is_file() else f"{path}: none yet"))
    return Diagnosis(tuple(findings))


def _try(kernel: Kernel) -> Finding:
    """Compare a kernel with its reference in float64; without its instruction set only if it is exact."""
    name, why = f"kernel '{kernel.name}'", kernel.unavailable()
    if why is not None and not kernel.exact:
        return Finding(name, False, f"backend '{kernel.backend}' cannot run here: {why}")
    if why is not None:
        name += " (plain torch, slow)"
    try:
        wrong, error = _worst(kernel)
    except (RuntimeError, OSError) as failure:
        return Finding(name, False, f"fails: {failure}")
    if wrong is not None:
        return Finding(name, False, f"WRONG: {wrong}")
    right = error < 1e-4
    return Finding(name, right, f"{'verified' if right else 'WRONG'}: {error:.0e} from the matmul in float64")


@torch.no_grad()
def _worst(kernel: Kernel) -> tuple[str | None, float]:
    """Return what is wrong with the layout, and the largest error, for odd shapes, one token and many.

    A kernel that rounds is compared with the weight that it stores, which may be as far from the exact one as
    `Kernel.error` says. Its inputs are whole, with the same largest one at both ends of each row, so that whatever
    columns share a scale, it rounds none of them.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(rows: int) -> Tensor:
        if kernel.exact:
            return torch.randn(rows, 150, generator=generator, dtype=torch.float32)
        whole = torch.randint(-126, 127, (rows, 150), generator=generator).to(torch.float32)
        whole[:, 0] = whole[:, -1] = 127.0
        return whole

    error = 0.0
    for rows in kernel.heights:
        weight = numbers(37)
        weight[:, 1:-1] *= torch.rand(37, 148, generator=generator) < 0.2
        bias, packed = torch.randn(37, generator=generator, dtype=torch.float32), Packed.of(weight, kernel.name, rows)
        if not torch.equal(packed.dense(), weight):
            return f"a weight packed in blocks of {rows} rows is restored changed", 0.0
        stored = packed.multiplied()
        far = (stored - weight).abs().amax(1) / weight.abs().amax(1)
        if float(far.max()) > kernel.error * (1 + 1e-6):
            return f"a weight is rounded by {float(far.max()):.1e} of the largest of its row", 0.0
        for tokens in (1, 67):
            x = numbers(tokens)
            expected = F.linear(x.double(), stored.double(), bias.double())
            scale = 1.0 if kernel.exact else float(expected.abs().max())
            error = max(error, float((packed.multiply(x, bias).double() - expected).abs().max()) / scale)
    return None, error
