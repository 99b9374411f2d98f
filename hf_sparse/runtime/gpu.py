"""The runtime form on a GPU: 2:4 and blocks, layer by layer, where they are faster than dense there.

Not yet run on a GPU: which layer gets what, and why not, is tested on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError
from ..kernels.gpu import block_sparse, semi_structured
from ..kernels.gpu.block_sparse import BlockSparseLinear
from ..kernels.gpu.semi_structured import SemiStructuredLinear
from ..modeling.layer_matching import BACK, InRuntimeForm
from .autotune import MARGIN, Race, SpeedTable, Trial
from .report import LayerReport

TOKENS = (128, 1024, 8192)
"""Numbers of tokens that are timed on a GPU."""

SIDES = (64, 32)
EMPTY = 0.4
"""Share of blocks that are zero below which their kernel is not tried."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to compute a layer.

    Attributes:
        kernel: of the report.
        make: makes the layer.
        rows: of a block.
    """

    kernel: str
    make: Callable[[], nn.Module]
    rows: int


class GpuLinear(InRuntimeForm, nn.Module):
    """A linear layer that is computed by a sparse one; the state dict has that of the dense layer.

    Args:
        fast: what computes.
        plain: the dense layer, which comes back. Its weight waits in the memory of the CPU, unless `keep_dense`.
    """

    def __init__(self, fast: nn.Module, plain: nn.Linear, keep_dense: bool) -> None:
        super().__init__()
        self.fast = fast
        self.place = plain.weight.device
        if not keep_dense:
            plain.weight.data = plain.weight.data.cpu()
        self.plain = (plain,)  # in a tuple, so that nobody moves, counts or trains it
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The dense weight, where it waits: what is written into it changes nothing."""
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

    def back(self) -> nn.Linear:
        """Return the dense layer."""
        plain = self.plain[0]
        plain.weight.data = plain.weight.data.to(self.place)
        plain.train(self.training)
        return plain

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(torch.zeros(1, dtype=self.plain[0].weight.dtype, device=self.place))
        if probe.dtype != self.plain[0].weight.dtype or probe.device != self.place:
            raise BackendError(f"a model in runtime form cannot be moved or cast: {BACK}, then do that")
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, own in self.plain[0].named_parameters():
            destination[f"{prefix}{name}"] = own.detach().to(self.place)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state of the dense layer; `fast` has none of its own."""
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination


def block_side(weight: Tensor) -> int | None:
    """Return the side of the blocks that a weight is pruned in, if many of them are empty.

    Example:
        >>> weight = torch.zeros(128, 128)
        >>> weight[:32, :64] = 1.0
        >>> block_side(weight), block_side(torch.ones(64, 64))
        (64, None)
    """
    for side in SIDES:
        filled = nn.functional.pad(weight != 0, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
        blocks = filled.view(-1, side, filled.shape[1] // side, side).transpose(1, 2).flatten(2).any(2)
        if float((~blocks).float().mean()) >= EMPTY:
            return side
    return None


def ways(layer: nn.Linear, capability: tuple[int, int] | None) -> tuple[list[Way], str]:
    """Return how a layer could be computed, and why not in the other ways.

    Args:
        capability: of the CUDA device.
    """
    weight = layer.weight.detach()
    shape, found, reasons = tuple(weight.shape), [], []
    backend = semi_structured.default_backend(capability)
    if why := semi_structured.refusal(shape, weight.dtype, capability, backend, weight):
        reasons.append(why)
    else:
        found.append(Way("semi_structured", lambda: SemiStructuredLinear.from_linear(layer, backend), 1))
    side = block_side(weight)
    if side is None:
        reasons.append(f"fewer than {EMPTY:.0%} of its blocks of {' or '.join(map(str, SIDES))} are empty")
    elif why := block_sparse.refusal(shape, weight.dtype, capability, side, side):
        reasons.append(why)
    else:
        found.append(Way("block_sparse", lambda: BlockSparseLinear.from_linear(layer, side, side), side))
    return found, "; ".join(reasons)


def choose(
    name: str,
    layer: nn.Linear,
    sparsity: float,
    table: SpeedTable,
    tokens: Sequence[int],
    keep_dense: bool,
    capability: tuple[int, int] | None,
) -> tuple[GpuLinear | None, LayerReport]:
    """Time what a layer can be computed by, and return the fastest if it is faster than dense."""
    able, why = ways(layer, capability)
    dense_bytes = layer.weight.nbytes
    best: tuple[float, Way, nn.Module, dict[int, float]] | None = None
    gains: dict[int, float] = {}
    for way in able:
        made = way.make().eval()
        races = {count: _race(layer, made, way, sparsity, table, count) for count in tokens}
        gains = {count: race.gain for count, race in races.items()}
        least = min(gains.values())
        if all(race.won for race in races.values()) and (best is None or least > best[0]):
            best = (least, way, made, gains)
        elif best is None:
            why = f"dense is faster, or less than {MARGIN:.0%} slower: {way.kernel} is {least:.2f}x as fast"
    shape = tuple(layer.weight.shape)
    if best is None:
        return None, LayerReport(name, shape, sparsity, "dense", 0, dense_bytes, dense_bytes, gains, why)
    _, way, made, gains = best
    size = sum(own.nbytes for own in made.buffers()) + (dense_bytes if keep_dense else 0)
    report = LayerReport(name, shape, sparsity, way.kernel, way.rows, size, dense_bytes, gains)
    return GpuLinear(made, layer, keep_dense), report


def _race(layer: nn.Linear, made: nn.Module, way: Way, sparsity: float, table: SpeedTable, count: int) -> Race:
    weight = layer.weight
    x = torch.randn(1, count, layer.in_features, device=weight.device, dtype=weight.dtype)
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu"

    def timed(module: nn.Module) -> Callable[[], object]:
        def run() -> object:
            out = module(x)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            return out

        return run

    kind = f"{way.kernel} {str(weight.dtype).removeprefix('torch.')}"
    trial = Trial(kind, (tuple(weight.shape),), round(100 * sparsity), (way.rows,), count, device)
    return table.race(trial, timed(layer), timed(made))
