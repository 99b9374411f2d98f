"""Linear layers whose weight is made of whole blocks (32 x 32, 64 x 64): a Triton kernel, and a plain torch default.

The blocks of each row of blocks lie one after the other (BCSR). A program of the kernel takes one row of blocks and
some tokens, multiplies block by block, and adds up in fp32. Without Triton the matmul is torch's for BSR where it has
one, and otherwise one dense matmul for each row of blocks, correct and slow.

This has not yet run on a GPU: the kernel is tested in Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BackendError
from ..op_table import WeightFormat
from ..operators import define_all
from ..registry import Kernel, Layout, register
from .block_sparse_layout import EMPTY, SIDES, TRIED, Blocks, block_side, from_codec, pack_blocks, unpack_blocks

__all__ = [
    "SIDES",
    "BlockSparseLinear",
    "Blocks",
    "block_side",
    "block_sparse_linear",
    "from_codec",
    "has_triton",
    "interprets",
    "pack_blocks",
    "refusal",
    "unpack_blocks",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Return whether Triton runs its kernels in Python, on any device (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    from .block_sparse_triton import INTERPRETED

    return INTERPRETED


def refusal(
    shape: tuple[int, ...], dtype: torch.dtype, capability: tuple[int, int] | None, rows: int, cols: int
) -> str | None:
    """Return why the kernel cannot run a linear layer on a GPU, or None.

    Args:
        shape: of the weight, `(out, in)`; sides need not be multiples of the block.
        capability: of the CUDA device; None = there is none.
        rows: of a block.
        cols: of a block.

    Example:
        >>> refusal((64, 64), torch.float16, None, 32, 32)
        'the block kernel needs a CUDA device, and there is none'
    """
    if len(shape) != 2 or not all(shape):
        return f"the block kernel needs a matrix with entries, and the weight has shape {tuple(shape)}"
    if rows not in SIDES or cols not in SIDES:
        return f"the block kernel takes blocks with sides of {', '.join(map(str, SIDES))}, not {rows} x {cols}"
    if why := _of_dtype(dtype):
        return why
    if capability is None:
        return "the block kernel needs a CUDA device, and there is none"
    too_old = _of_capability(dtype, capability)
    return too_old or (None if has_triton() else "Triton is not installed: pip install triton")


def _of_dtype(dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    return None if dtype in DTYPES else f"the block kernel multiplies fp16, bf16 and fp32, not {name}"


def _of_capability(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    least = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    if capability >= least:
        return None
    return (
        f"the block kernel needs compute capability {least[0]}.{least[1]} in {str(dtype).removeprefix('torch.')}, and "
        f"this device has {capability[0]}.{capability[1]}"
    )


# -- the operator and the layer --------------------------------------------------------------------------------------


class BlockWeight(NamedTuple):
    """A weight with its bias, as the operator passes it on; see `Blocks`."""

    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor | None
    out_features: int

    @property
    def in_features(self) -> None:
        """Not stated: the last block may be padded."""


def _multiply(x: Tensor, weight: BlockWeight) -> Tensor:
    _, rows, cols = weight.values.shape
    fits = rows in SIDES and cols in SIDES and x.dtype in DTYPES
    if x.shape[0] and fits and has_triton() and (x.is_cuda or interprets()):
        from .block_sparse_triton import multiply

        return multiply(x.contiguous(), *weight)
    if x.shape[0] and x.is_cuda and x.dtype == torch.float32 and len(weight.columns):
        return _by_bsr(x, *weight)
    return _by_rows(x, *weight)


def _by_bsr(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return torch's matmul for BSR; its CUDA one for half precision is in Triton too."""
    _, rows, cols = values.shape
    filled = F.pad(x, (0, -x.shape[1] % cols))
    size = ((len(pointers) - 1) * rows, filled.shape[1])
    weight = torch.sparse_bsr_tensor(pointers, columns, values, size, check_invariants=False)
    y = (weight @ filled.t()).t()[:, :out_features]
    return y.contiguous() if bias is None else y + bias


def _by_rows(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return the output from one dense matmul for each row of blocks."""
    _, rows, cols = values.shape
    tiles = F.pad(x, (0, -x.shape[1] % cols)).view(x.shape[0], -(-x.shape[1] // cols), cols)
    out = x.new_zeros((x.shape[0], (len(pointers) - 1) * rows))
    starts: list[int] = pointers.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start < end:
            seen = tiles[:, columns[start:end].long()].flatten(1)
            weight = values[start:end].transpose(1, 2).reshape(-1, rows)
            out[:, row * rows : (row + 1) * rows] = seen @ weight
    out = out[:, :out_features]
    return out.contiguous() if bias is None else out + bias


block_sparse_linear = define_all(WeightFormat("block_sparse", BlockWeight, _multiply))["linear"]
"""`x W^T + bias`, see `Blocks`. Shapes: `(tokens, in)` -> `(tokens, out_features)`."""


class BlockSparseLinear(nn.Module):
    """A linear layer for inference that keeps the blocks of its weight which are not zero.

    Args:
        shape: of the weight, `(out, in)`.
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor | None

    def __init__(self, blocks: Blocks, bias: Tensor | None, shape: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        for name, tensor in blocks._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, layer: nn.Linear, rows: int = 32, cols: int = 32) -> BlockSparseLinear:
        """Keep the blocks of a layer; on the CPU the plain default computes it."""
        blocks = pack_blocks(layer.weight, rows, cols)
        return cls(blocks, layer.bias, (layer.out_features, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `(..., in_features)` -> `(..., out_features)`."""
        if x.dtype != self.values.dtype:
            raise BackendError(f"the layer is in {self.values.dtype}, and what it is given in {x.dtype}")
        flat = x.reshape(-1, self.in_features)
        y: Tensor = block_sparse_linear(flat, self.values, self.columns, self.pointers, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer, its weight as it was."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        blocks = Blocks(self.values, self.columns, self.pointers)
        layer.weight = nn.Parameter(unpack_blocks(blocks, (self.out_features, self.in_features)))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer

    def extra_repr(self) -> str:
        count, rows, cols = self.values.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, {count} blocks of {rows} x {cols}"


def _pack(weight: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tuple(pack_blocks(weight, rows, rows))


def _unpack(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> Tensor:
    values, columns, pointers = parts
    return unpack_blocks(Blocks(values, columns, pointers), (out_features, in_features))


def _matmul(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    bias: Tensor | None,
    rows: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    flat = x.reshape(-1, in_features)
    y: Tensor = block_sparse_linear(flat, values, columns, pointers, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _guard(weight: Tensor) -> str | None:
    capability = _capability()
    if not all(weight.shape):
        return "it has no entries"
    return _of_dtype(weight.dtype) or (None if capability is None else _of_capability(weight.dtype, capability))


def _suits(weight: Tensor) -> int | str:
    side = block_side(weight)
    return side or f"fewer than {EMPTY:.0%} of its blocks of {' or '.join(map(str, TRIED))} are empty"


register(
    Kernel(
        name="block_sparse",
        backend="",  # "auto" on a GPU
        layout=Layout(("values", "columns", "pointers"), _pack, _unpack),
        op=_matmul,
        dtypes=DTYPES,
        device="cuda",
        guard=_guard,
        suits=_suits,
        unavailable=lambda: refusal((64, 64), torch.float16, _capability(), 32, 32),
        heights=dict.fromkeys(SIDES, 1.0),  # blocks are squares
        module=lambda layer, rows: BlockSparseLinear.from_linear(layer, rows, rows),
    )
)
