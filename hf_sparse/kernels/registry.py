"""The kernels that multiply by a packed weight. A new kernel is one file that ends with one `register(Kernel(...))`.

The runtime reads all that it knows of a kernel here: which weights it takes, how it packs them, what it calls, whether
its result is exact. `hf_sparse.to_runtime(model, NAME)` packs for it, `hf-sparse doctor` tries it, and the contract
tests (tests/contracts/test_kernels.py) run over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackendError
from ..registry import nearest

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """The packed form of a weight.

    Attributes:
        parts: names of its tensors.
        pack: (weight, rows) -> its tensors; blocks are `rows` outputs high.
        unpack: (tensors, rows, out_features, in_features) -> the dense weight.
        version: of what the tensors mean. Count it up with every change: files of `save_runtime` state it.
        by_isa: whether it is another on another instruction set.
        check: (tensors, rows, out_features, in_features) -> raises where tensors from a file would lead outside of the
            weight; None = the operator checks that in each call.
    """

    parts: tuple[str, ...]
    pack: Callable[[Tensor, int], Parts]
    unpack: Callable[[Parts, int, int, int], Tensor]
    version: int = 1
    by_isa: bool = False
    check: Callable[[Parts, int, int, int], object] | None = None


def _always() -> str | None:
    return None


def _any_weight(weight: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by a packed weight.

    Args:
        name: in `PackedLinear.kernel`.
        layout: how it packs a weight.
        op: called as `op(x, *parts, bias, rows, out_features, in_features)`; an operator of `operators.define_all`, or
            a function that calls one.
        reference: (x, unpacked weight, bias) -> what the operator has to compute.
        backend: name in `to_runtime(backend=)`, `name` by default; "" = no backend of its own.
        label: in reports, `name` by default; with fused operators the prefix of "_linear", "_ffn" and "_qkv".
        fused: operators of whole sub-blocks: "ffn", "gated_ffn", "ffn_norm", "attention", "attention_norm".
        dtypes: of the weights that it takes.
        device: type of the device that it runs on.
        isas: instruction sets that it is compiled for; it runs in plain torch elsewhere.
        pattern: sparsity pattern that its weights must have; None = any.
        guard: weight -> why the kernel cannot take it (its shape, its values), or None. dtype and device are checked
            without it.
        unavailable: why the kernel cannot run on this machine, or None.
        heights: block heights -> time per stored value, relative to that of height 1.
        error: largest deviation of the unpacked weight, as a fraction of the largest weight of its output row; 0 =
            the weight is kept exactly.
        few_tokens: whether it is for a model that generates, a few tokens at a time: "auto" tries it there beside the
            preferred kernel, and the LM head is packed for it too.
        joins: weights with the same input -> whether packing them as one gains, and changes no output; None = never.
            Kernels with fused operators pack query, key and value as one anyway.
        lm_head: the kernel that the LM head is packed for instead; None = this one.
        suits: weight -> the block height to try it with, or why that cannot be worth it; None = `choose_rows`.
        module: makes a layer of its own from an `nn.Linear` and the height; for kernels that are not `PackedLinear`.
    """

    name: str
    layout: Layout
    op: Callable[..., Tensor]
    reference: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    backend: str | None = None
    label: str | None = None
    fused: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    device: str = "cpu"
    isas: tuple[str, ...] = ()
    pattern: str | None = None
    guard: Callable[[Tensor], str | None] = _any_weight
    unavailable: Callable[[], str | None] = _always
    heights: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    error: float = 0.0
    few_tokens: bool = False
    joins: Callable[[Sequence[Tensor]], bool] | None = None
    lm_head: str | None = None
    suits: Callable[[Tensor], int | str] | None = None
    module: Callable[[nn.Linear, int], nn.Module] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", self.name if self.backend is None else self.backend)
        object.__setattr__(self, "label", self.name if self.label is None else self.label)

    @property
    def exact(self) -> bool:
        """Whether it keeps weights exactly."""
        return self.error == 0.0

    def report_name(self, form: str) -> str:
        """Return its name in reports for a layer that is packed alone ("linear") or in a sub-block ("ffn", "qkv")."""
        return f"{self.label}_{form}" if self.fused else str(self.label)

    def refusal(self, weight: Tensor) -> str | None:
        """Return why the kernel cannot take a weight, or None."""
        if weight.dim() != 2:
            return f"it takes a matrix (out, in), and the weight has shape {tuple(weight.shape)}"
        if weight.dtype not in self.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"it takes weights in {known}, and this one is in {str(weight.dtype).removeprefix('torch.')}"
        if weight.device.type != self.device:
            return f"it takes weights on {self.device}, and this one is on {weight.device.type}"
        return self.guard(weight)

    def pack(self, weight: Tensor, rows: int | None = None) -> Parts:
        """Pack a weight.

        Args:
            rows: block height; None = the fastest for this weight.

        Raises:
            BackendError: with the reason of `refusal`, or for another height.
        """
        if why := self.refusal(weight):
            raise BackendError(f"the kernel '{self.name}' cannot take this weight: {why}")
        rows = self.choose_rows(weight) if rows is None else rows
        if rows not in self.heights:
            known = ", ".join(map(str, self.heights))
            raise BackendError(f"the kernel '{self.name}' takes blocks of {known} rows, got {rows}")
        return self.layout.pack(weight.detach(), rows)

    def choose_rows(self, weight: Tensor) -> int:
        """Return the fastest block height for a weight: taller blocks are faster per value, but store more zeros."""
        return choose_rows(weight, self.heights)

    def height_for(self, weight: Tensor) -> int | str:
        """Return the block height to try for a weight that lies on the current device, or why it is not tried."""
        why = self.unavailable() or self.guard(weight)
        if why is not None:
            return why
        return self.choose_rows(weight) if self.suits is None else self.suits(weight)


def choose_rows(weight: Tensor, heights: Mapping[int, float]) -> int:
    """Return the block height with the lowest time for a weight.

    Example:
        >>> heights = {1: 1.0, 4: 0.7}
        >>> choose_rows(torch.eye(16), heights), choose_rows(torch.eye(16).repeat_interleave(4, dim=0), heights)
        (1, 4)
    """
    if len(heights) == 1:
        return next(iter(heights))
    nonzero = weight.detach() != 0
    costs = {rows: _stored(nonzero, rows) * time for rows, time in heights.items()}
    return min(costs, key=lambda rows: costs[rows])


def _stored(nonzero: Tensor, rows: int) -> int:
    """Return how many values a packed weight with blocks of this height holds."""
    padded = F.pad(nonzero, (0, 0, 0, -nonzero.shape[0] % rows))
    return int(padded.reshape(-1, rows, nonzero.shape[1]).any(dim=1).sum()) * rows


class Kernels:
    """All kernels by name, in the order of preference."""

    def __init__(self) -> None:
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            raise BackendError(f"unknown kernel '{name}'{nearest(name, self)} Known: {', '.join(self)}.")
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, name: Any) -> bool:
        return name in self._kernels

    def register(self, kernel: Kernel) -> Kernel:
        """File a kernel under its name.

        Raises:
            ValueError: the name, or the backend, is taken.
        """
        if kernel.name in self or (kernel.backend and kernel.backend in self.backends):
            raise ValueError(f"kernel '{kernel.name}' (backend '{kernel.backend}') is registered twice")
        self._kernels[kernel.name] = kernel
        return kernel

    def remove(self, name: str) -> None:
        """Take a kernel out, for tests that add one."""
        del self._kernels[name]

    @property
    def backends(self) -> dict[str, Kernel]:
        """The kernels that `to_runtime` takes by name: backend -> kernel."""
        return {kernel.backend: kernel for kernel in self._kernels.values() if kernel.backend}

    def of_device(self, device: str) -> list[Kernel]:
        """Return the kernels for a type of device."""
        return [kernel for kernel in self._kernels.values() if kernel.device == device]

    def fastest_exact(self) -> Kernel:
        """Return the first exact kernel for the CPU that runs on this machine: what backend "auto" times."""
        return next(self._exact())

    def for_few_tokens(self) -> Kernel | None:
        """Return the first of those for a few tokens, if there is one: what "auto" tries beside the former."""
        return next((kernel for kernel in self._exact() if kernel.few_tokens), None)

    def _exact(self) -> Iterator[Kernel]:
        able = (kernel for kernel in self.of_device("cpu") if kernel.backend and kernel.exact)
        return (kernel for kernel in able if kernel.unavailable() is None)


KERNELS = Kernels()
register = KERNELS.register
