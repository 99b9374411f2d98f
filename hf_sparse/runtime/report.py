"""What `to_runtime` decided about each layer, and why: as data and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        sparsity: fraction of zeros.
        kernel: "sparse_linear", "sparse_ffn" (a whole feed-forward sub-block), "sparse_qkv" (query, key and value as
            one matmul), the same three with "int8" for "sparse", "csr", "bitmask", "bitmask-int8" and "bitmask-int4"
            (for models that generate), "dense_few" (dense, by a GEMV kernel for a few tokens) or "dense".
        rows: output rows that share their columns in the packed form; 0 of a dense layer.
        bytes: of the weight in memory.
        dense_bytes: of the dense weight.
        gains: token count -> speed-up over dense, where it was measured; for layers that stay dense, that of the
            kernel that was not faster.
        reason: why the layer is not sparse; None if it is.
        error: of a rounded matmul, relative to the exact one, on normally distributed inputs; None of exact kernels.
        weight_error: of the rounded weight, relative to the exact one; 0 where that is on the grid of the kernel.
        dense_up_to: token count up to which a call computes with the dense weight, which is kept for it; 0 = nowhere.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str
    rows: int
    bytes: int
    dense_bytes: int
    gains: Mapping[int, float]
    reason: str | None = None
    error: float | None = None
    weight_error: float | None = None
    dense_up_to: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        out = dataclasses.asdict(self)
        return out | {"shape": list(self.shape), "gains": {str(key): gain for key, gain in self.gains.items()}}


@dataclasses.dataclass(frozen=True)
class RuntimeReport:
    """The linear layers of a model in runtime form. `print` it for a table.

    Attributes:
        backend: the requested one.
        machine: processor, threads and torch of the measurements.
        kernels: status of the kernels of this package.
        layers: one report per layer.
    """

    backend: str
    machine: str
    kernels: str
    layers: tuple[LayerReport, ...]

    @property
    def sparse(self) -> tuple[LayerReport, ...]:
        """The layers that are packed."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def bytes(self) -> int:
        """Bytes of the weights of all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights of all layers if they were dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        keys = ("backend", "machine", "kernels", "bytes", "dense_bytes")
        return {key: getattr(self, key) for key in keys} | {"layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        columns = f"{'shape':>11}  {'sparsity':>8}  {'kernel':<13}  {'rows':>4}  {'memory':>6}  speed-up or reason"
        head = f"{'layer':<{width}}  {columns}"
        lines = [head, "-" * len(head)]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            share = layer.bytes / layer.dense_bytes if layer.dense_bytes else 1.0
            result = layer.reason or _speedups(layer.gains) or _errors(layer) or "not measured"
            result += f", dense up to {layer.dense_up_to} tokens" if layer.dense_up_to else ""
            lines.append(
                f"{layer.name:<{width}}  {shape:>11}  {layer.sparsity:>8.2%}  {layer.kernel:<13}  "
                f"{layer.rows or '':>4}  {share:>6.0%}  {result}"
            )
        lines.append("-" * len(head))
        lines.append(
            f"{len(self.sparse)} of {len(self.layers)} layers sparse; weights {self.bytes / 1e6:.1f} MB, dense "
            f"{self.dense_bytes / 1e6:.1f} MB. {self.machine}. {self.kernels}"
        )
        return "\n".join(lines)


def _errors(layer: LayerReport) -> str | None:
    """Format the errors of a rounded layer."""
    if layer.error is None or layer.weight_error is None:
        return None
    weight = f"{layer.weight_error:.2%} of the weight" if layer.weight_error else "none of the weight"
    return f"not exact: relative error {layer.error:.2%} on random inputs, {weight}"


def _speedups(speedups: Mapping[int, float]) -> str:
    """Format speed-ups by token count.

    Example:
        >>> _speedups({16: 2.04, 128: 6.5})
        '2.0x (16 tokens), 6.5x (128 tokens)'
    """
    return ", ".join(f"{speedup:.1f}x ({tokens} tokens)" for tokens, speedup in speedups.items())
