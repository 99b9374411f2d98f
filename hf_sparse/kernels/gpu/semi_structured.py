"""2:4 linear layers on the sparse tensor cores of NVIDIA GPUs, by what torch itself has: cuSPARSELt or CUTLASS.

Two of every four consecutive inputs are kept, with two bits for the index of each. torch packs a weight that is not 2:4
without an error, and wrong; in fp32 it keeps one of two instead. So `refusal` comes first, with the reason.

This has not yet run on a GPU: packing and its inverse are tested on the CPU, the matmuls are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BackendError
from ..op_table import WeightFormat
from ..operators import define_all
from ..registry import Kernel, Layout, register
from .semi_structured_layout import (
    BACKENDS,
    FLOATS,
    NAMES,
    Packed,
    from_codec,
    of_shape,
    of_weight,
    pack_semi_structured,
    short,
    unpack_semi_structured,
)

__all__ = [
    "BACKENDS",
    "FLOATS",
    "Packed",
    "SemiStructuredLinear",
    "cusparselt_version",
    "default_backend",
    "from_codec",
    "pack_semi_structured",
    "refusal",
    "semi_structured_linear",
    "unpack_semi_structured",
]


def cusparselt_version() -> int | None:
    """Return the version of cuSPARSELt that torch was built with, or None where there is none."""
    return torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None


def default_backend(capability: tuple[int, int] | None) -> str:
    """Return "cusparselt" wherever torch has it, else "cutlass"."""
    return "cutlass" if capability is not None and capability[0] == 8 and cusparselt_version() is None else "cusparselt"


def refusal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    backend: str,
    weight: Tensor | None = None,
) -> str | None:
    """Return why a linear layer cannot run as 2:4, or None.

    Args:
        shape: of the weight, `(out, in)`.
        dtype: of weight, bias and activations.
        capability: of the CUDA device (`torch.cuda.get_device_capability`); None = there is none.
        backend: "cusparselt" or "cutlass".
        weight: to be looked at too: every value of it is read.

    Raises:
        BackendError: for another backend.

    Example:
        >>> refusal((64, 64), torch.float16, (7, 5), "cutlass")
        'sparse tensor cores came with compute capability 8.0 (Ampere), and this device has 7.5'
    """
    if backend not in BACKENDS:
        raise BackendError(f"2:4 knows the backends {', '.join(BACKENDS)}, not {backend!r}")
    return (
        _of_machine(capability, backend)
        or _of_dtype(dtype, backend)
        or of_shape(tuple(shape), dtype, backend)
        or (None if weight is None else of_weight(weight))
    )


def _of_machine(capability: tuple[int, int] | None, backend: str) -> str | None:
    if capability is None:
        return "2:4 needs a CUDA device, and there is none"
    if torch.version.hip:
        return "2:4 is written for NVIDIA, and this torch is built for ROCm"
    version = f"{capability[0]}.{capability[1]}"
    if capability[0] < 8:
        return f"sparse tensor cores came with compute capability 8.0 (Ampere), and this device has {version}"
    if backend == "cutlass" and capability[0] > 8:
        return f"torch's CUTLASS kernels run on compute capability 8.x alone, and this device has {version}: cuSPARSELt"
    if backend == "cusparselt" and cusparselt_version() is None:
        return "this torch is built without cuSPARSELt (the CUDA wheels of pytorch.org have it)"
    return None


def _of_dtype(dtype: torch.dtype, backend: str) -> str | None:
    if dtype in FLOATS:
        return None
    if dtype == torch.float32:
        return (
            "torch's layout for fp32 keeps one of two, not two of four, and would lose values silently: convert the "
            "model to fp16 or bf16"
        )
    if dtype in (torch.int8, torch.float8_e4m3fn):
        return (
            f"a matmul in {short(dtype)} needs scales for weight and activations, which this layer does not have "
            "(torch itself has one scale per tensor, for fp8 under torch._scaled_mm): fp16 or bf16"
        )
    return f"{NAMES[backend]} multiplies fp16 and bf16, not {short(dtype)}"


# -- the operator and the layer --------------------------------------------------------------------------------------


def _multiply(x: Tensor, values: Tensor, meta: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `x W^T + bias` of a batch that has the multiple of rows which the kernels need; CUDA alone."""
    if meta is None:
        y: Tensor = torch._cslt_sparse_mm(values, x.t(), bias=bias, transpose_result=True)
        return y
    if bias is None:
        return torch._sparse_semi_structured_mm(values, meta, x.t()).t()
    return torch._sparse_semi_structured_addmm(bias, values, meta, x.t()).t()


def _plain(x: Tensor) -> bool:
    """Return whether the plain default takes over: not on CUDA."""
    return not x.is_cuda


class SemiStructuredWeight(NamedTuple):
    """A weight with its bias, as the operator passes it on; see `semi_structured_linear`."""

    packed: Tensor
    meta: Tensor | None
    bias: Tensor | None
    out_features: int

    @property
    def in_features(self) -> None:
        """Not stated: cuSPARSELt has a layout of its own."""


def _linear(x: Tensor, weight: SemiStructuredWeight) -> Tensor:
    packed, meta, bias, out_features = weight
    tokens = x.shape[0]
    if not tokens:
        return x.new_empty((0, out_features))
    values = packed.view(x.dtype)
    if meta is not None and _plain(x):
        return F.linear(x, unpack_semi_structured(Packed(values, meta)), bias)
    multiple = BACKENDS["cusparselt" if meta is None else "cutlass"]._DTYPE_SHAPE_CONSTRAINTS[x.dtype].dense_min_rows
    padded = F.pad(x, (0, 0, 0, -tokens % multiple)).contiguous()
    return _multiply(padded, values, meta, bias)[:tokens, :out_features].contiguous()


semi_structured_linear = define_all(WeightFormat("semi_structured", SemiStructuredWeight, _linear))["linear"]
"""`x W^T + bias`; `packed` is the values as bytes, for cuSPARSELt without meta, else for CUTLASS.

Shapes: `(tokens, in)` -> `(tokens, out_features)`.
"""


class SemiStructuredLinear(nn.Module):
    """A linear layer for inference whose weight is 2:4.

    The weight is kept as bytes, because a cast of the model would destroy the indices of its values; a model that
    is cast afterwards gets an error at its next forward pass.

    Args:
        packed: bytes of the values; see `semi_structured_linear`.
        dtype: of the weight.
    """

    packed: Tensor
    meta: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        meta: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.register_buffer("packed", packed)
        self.register_buffer("meta", meta)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, layer: nn.Linear, backend: str | None = None) -> SemiStructuredLinear:
        """Pack a layer that is on a CUDA device.

        Raises:
            BackendError: with the reason of `refusal`.
        """
        weight = layer.weight.detach()
        capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
        backend = backend or default_backend(capability)
        if why := refusal(tuple(weight.shape), weight.dtype, capability, backend, weight):
            raise BackendError(f"cannot run as 2:4: {why}")
        if layer.bias is not None and layer.bias.dtype != weight.dtype:
            raise BackendError(f"cannot run as 2:4: weight in {short(weight.dtype)}, bias {short(layer.bias.dtype)}")
        if backend == "cutlass":
            return cls.from_packed(pack_semi_structured(weight), layer.bias)
        compressed = torch._cslt_compress(weight.contiguous())
        shape = (layer.out_features, layer.in_features)
        return cls(compressed.view(torch.uint8), None, layer.bias, shape, weight.dtype)

    @classmethod
    def from_packed(cls, packed: Packed, bias: Tensor | None = None) -> SemiStructuredLinear:
        """Take a weight that is in the layout of CUTLASS; works on the CPU too, slowly."""
        rows, half = packed.values.shape
        values = packed.values.contiguous()
        return cls(values.view(torch.uint8), packed.meta, bias, (rows, 2 * half), values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `(..., in_features)` -> `(..., out_features)`."""
        if x.dtype != self.dtype or (self.bias is not None and self.bias.dtype != self.dtype):
            raise BackendError(
                f"this layer was packed in {short(self.dtype)}, and activations or bias are in {short(x.dtype)} or "
                "were cast since: cast the dense model first, then pack it"
            )
        flat = x.reshape(-1, self.in_features)
        y: Tensor = semi_structured_linear(flat, self.packed, self.meta, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer, its weight as it was."""
        if self.meta is not None:
            weight = unpack_semi_structured(Packed(self.packed.view(self.dtype), self.meta))
        else:
            one = torch.eye(self.in_features, dtype=self.dtype, device=self.packed.device)
            weight = _multiply(one, self.packed.view(self.dtype), None, None).t().contiguous()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer

    def extra_repr(self) -> str:
        backend = "cuSPARSELt" if self.meta is None else "CUTLASS"
        return f"in_features={self.in_features}, out_features={self.out_features}, 2:4 by {backend}"


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tuple(pack_semi_structured(weight))


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, meta = parts
    return unpack_semi_structured(Packed(values, meta))


def _matmul(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, rows: int, out_features: int, in_features: int
) -> Tensor:
    flat = x.reshape(-1, in_features)
    y: Tensor = semi_structured_linear(flat, values.view(torch.uint8), meta, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _guard(weight: Tensor) -> str | None:
    capability = _capability()
    backend = "cutlass" if capability is None else default_backend(capability)
    return _of_dtype(weight.dtype, backend) or of_shape(tuple(weight.shape), weight.dtype, backend) or of_weight(weight)


def _unavailable() -> str | None:
    capability = _capability()
    return _of_machine(capability, default_backend(capability))


register(
    Kernel(
        name="semi_structured",
        backend="",  # "auto" on a GPU
        layout=Layout(("values", "meta"), _pack, _unpack),
        op=_matmul,
        dtypes=FLOATS,
        device="cuda",
        pattern="2:4",
        guard=_guard,
        unavailable=_unavailable,
        module=lambda layer, rows: SemiStructuredLinear.from_linear(layer),
    )
)
