"""The runtime form on a GPU: the kernels of the registry for "cuda", layer by layer, where they are faster than dense.

Not yet run on a GPU: the choice for each layer, and its reason, are tested on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError
from ..kernels import KERNELS, Kernel
from ..modeling.layer_matching import BACK, InRuntimeForm
from .autotune import Measurement, SpeedTable, Trial, why_dense
from .fused_parts import is_observed
from .report import LayerReport
from .survey import LayerDecision

TOKENS = (128, 1024, 8192)
"""Token counts that are timed on a GPU."""


@dataclasses.dataclass(frozen=True)
class GpuCandidate:
    """A kernel that can compute a layer.

    Args:
        kernel: of the registry.
        rows: rows of a block.
    """

    kernel: Kernel
    rows: int


class GpuLinear(InRuntimeForm, nn.Module):
    """A linear layer that is computed by a sparse one; its state dict is that of the dense layer.

    Args:
        fast: the sparse layer.
        plain: the dense layer, for `restore`. Its weight is moved to the memory of the CPU, unless `keep_dense`.
    """

    def __init__(self, fast: nn.Module, plain: nn.Linear, keep_dense: bool) -> None:
        super().__init__()
        self.fast = fast
        self.device = plain.weight.device
        if not keep_dense:
            plain.weight.data = plain.weight.data.cpu()
        self.plain = (plain,)  # in a tuple, so that nobody moves, counts or trains it
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The dense weight, where it is kept: changes of it have no effect."""
        return self.plain[0].weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`.

        Raises:
            BackendError: in training, or with gradients through the layer.
        """
        if self.training or (x.requires_grad and torch.is_grad_enabled()):
            raise BackendError(f"a layer in runtime form (hf_sparse.to_runtime) cannot train: {BACK}, or eval()")
        out: Tensor = self.fast(x)
        return out

    def restored(self) -> nn.Linear:
        """Return the dense layer, on its device."""
        plain = self.plain[0]
        plain.weight.data = plain.weight.data.to(self.device)
        plain.train(self.training)
        return plain

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.check_apply(fn)
        return self

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise `BackendError` if `_apply` of this function would cast or move the layer."""
        dtype = self.plain[0].weight.dtype
        probe = fn(torch.zeros(1, dtype=dtype, device=self.device))
        if probe.dtype != dtype or probe.device != self.device:
            raise BackendError(
                f"a model in runtime form stays in {dtype} on {self.device}, requested {probe.dtype} on "
                f"{probe.device}: {BACK}, then cast or move it"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, own in self.plain[0].named_parameters():
            destination[f"{prefix}{name}"] = own.detach().to(self.device)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state of the dense layer; `fast` has none of its own."""
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination


def is_on_gpu(model: nn.Module) -> bool:
    """Return whether all linear layers of a model are on a GPU."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.numel()]
    return bool(layers) and all(layer.weight.is_cuda for layer in layers)


def convert(
    model: nn.Module,
    decisions: Mapping[str, LayerDecision],
    keep_dense: bool,
    tokens: Sequence[int],
    table: SpeedTable,
) -> Iterator[LayerReport]:
    """Replace the layers of a model that a sparse kernel computes faster, and yield the report of each layer."""
    for name, decision in decisions.items():
        layer, size = decision.layer, decision.layer.weight.nbytes
        if decision.reason is None and is_observed(layer):
            decision = decision.stays_dense("it has forward hooks, which a sparse layer would not call")
        if decision.reason is not None:
            shape = tuple(layer.weight.shape)
            yield LayerReport(name, shape, decision.sparsity, "dense", 0, size, size, {}, decision.reason)
            continue
        replacement, report = choose(name, layer, decision.sparsity, table, tokens, keep_dense)
        if replacement is not None:
            model.set_submodule(name, replacement)
        yield report


def restore(model: nn.Module) -> None:
    """Put the dense layers of a model back in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GpuLinear):
            model.set_submodule(name, module.restored())


def candidates(layer: nn.Linear) -> tuple[list[GpuCandidate], str]:
    """Return which kernels of the registry can compute a layer, and why the others cannot."""
    weight = layer.weight.detach()
    able: list[GpuCandidate] = []
    reasons: list[str] = []
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        for kernel in KERNELS.of_device("cuda"):
            rows = kernel.height_for(weight)
            if isinstance(rows, str):
                reasons.append(rows)
            elif kernel.module is not None:
                able.append(GpuCandidate(kernel, rows))
    return able, "; ".join(reasons)


def choose(
    name: str,
    layer: nn.Linear,
    sparsity: float,
    table: SpeedTable,
    tokens: Sequence[int],
    keep_dense: bool,
) -> tuple[GpuLinear | None, LayerReport]:
    """Time the kernels that can compute a layer, and return the fastest layer if it is faster than dense."""
    able, why = candidates(layer)
    dense_bytes = layer.weight.nbytes
    best: tuple[float, GpuCandidate, nn.Module, dict[int, float]] | None = None
    speedups: dict[int, float] = {}
    for candidate in able:
        assert candidate.kernel.module is not None
        fast = candidate.kernel.module(layer, candidate.rows).eval()
        measured = {count: _measure(layer, fast, candidate, sparsity, table, count) for count in tokens}
        speedups = {count: each.speedup for count, each in measured.items()}
        lowest, slower = min(speedups.values()), why_dense(candidate.kernel.name, measured)
        if slower is None and (best is None or lowest > best[0]):
            best = (lowest, candidate, fast, speedups)
        elif best is None and slower is not None:
            why = slower
    shape = tuple(layer.weight.shape)
    if best is None:
        return None, LayerReport(name, shape, sparsity, "dense", 0, dense_bytes, dense_bytes, speedups, why)
    _, candidate, fast, speedups = best
    size = sum(own.nbytes for own in fast.buffers()) + (dense_bytes if keep_dense else 0)
    report = LayerReport(name, shape, sparsity, candidate.kernel.name, candidate.rows, size, dense_bytes, speedups)
    return GpuLinear(fast, layer, keep_dense), report


def _measure(
    layer: nn.Linear, fast: nn.Module, candidate: GpuCandidate, sparsity: float, table: SpeedTable, count: int
) -> Measurement:
    weight = layer.weight
    x = torch.randn(1, count, layer.in_features, device=weight.device, dtype=weight.dtype)
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu"

    def run_of(module: nn.Module) -> Callable[[], object]:
        def run() -> object:
            out = module(x)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            return out

        return run

    kind = f"{candidate.kernel.name} {str(weight.dtype).removeprefix('torch.')}"
    trial = Trial(kind, (tuple(weight.shape),), round(100 * sparsity), (candidate.rows,), count, device)
    return table.measure(trial, run_of(layer), run_of(fast))
