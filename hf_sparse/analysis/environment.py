"""What this machine can run: which kernels are there, whether their results are right, and what is missing."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from .._version import __version__
from ..kernels import library_status
from ..kernels.int8_ops import why_not_int8
from ..profiling.machine import machine
from ..runtime.autotune import SpeedTable
from ..runtime.packed_weight import HEIGHTS, Kernel, Packed


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
    """Check the machine, and try every kernel on a tiny matmul."""
    versions = f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    status = library_status()
    findings = [
        Finding("machine", True, f"{machine()} of {os.cpu_count()} processors"),
        Finding("versions", True, versions),
        Finding("C++ kernels", status.available, status.message),
    ]
    label = "sparse matmul" if status.available else "sparse matmul (plain torch, slow)"
    findings += [_try(label, "cpu", list(HEIGHTS)), _try("CSR matmul of torch", "csr", [1]), _try_int8()]
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


@torch.no_grad()
def _try_int8() -> Finding:
    """Compare the int8 matmul with a dense one on integers, where it is exact."""
    name, why = "int8 matmul", why_not_int8()
    if why is not None:
        return Finding(name, False, f"backend 'cpu-int8' cannot run here: {why}")
    generator = torch.Generator().manual_seed(0)
    right = True
    for tokens in (1, 67):
        weight, x = (torch.randint(-126, 127, (n, 150), generator=generator).to(torch.float32) for n in (37, tokens))
        weight *= torch.rand(37, 150, generator=generator) < 0.2
        weight[:, 0], x[:, 0] = 127.0, -127.0
        right &= torch.equal(Packed.of(weight, "int8").multiply(x, None).double(), x.double() @ weight.double().T)
    return Finding(name, right, "verified: exact on integers" if right else "WRONG on integers")


@torch.no_grad()
def _try(name: str, kernel: Kernel, heights: list[int]) -> Finding:
    """Compare a kernel with the dense matmul in float64, for odd shapes, one token and many."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    try:
        for rows in heights:
            weight = torch.randn(37, 150, generator=generator, dtype=torch.float32)
            weight *= torch.rand(37, 150, generator=generator) < 0.2
            bias, packed = torch.randn(37, generator=generator, dtype=torch.float32), Packed.of(weight, kernel, rows)
            if not torch.equal(packed.dense(), weight):
                return Finding(name, False, f"WRONG: a weight packed in blocks of {rows} rows comes back changed")
            for tokens in (1, 67):
                x = torch.randn(tokens, 150, generator=generator, dtype=torch.float32)
                expected = F.linear(x.double(), weight.double(), bias.double())
                worst = max(worst, float((packed.multiply(x, bias).double() - expected).abs().max()))
    except (RuntimeError, OSError) as error:
        return Finding(name, False, f"fails: {error}")
    right = worst < 1e-4
    return Finding(name, right, f"{'verified' if right else 'WRONG'}: {worst:.0e} from the matmul in float64")
