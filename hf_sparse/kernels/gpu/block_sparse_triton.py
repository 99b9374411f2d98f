"""The Triton kernel of `block_sparse`; to be used only where Triton is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # so that whatever walks over all modules can import this one
    triton = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

_kernel: Any = None
if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]
        x,
        values,
        columns,
        pointers,
        bias,
        y,
        tokens,
        out_features,
        in_features,
        has_bias: tl.constexpr,
        upcast: tl.constexpr,
        tile: tl.constexpr,
        rows: tl.constexpr,
        cols: tl.constexpr,
    ):
        row = tl.program_id(1)
        token = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        out = row * rows + tl.arange(0, rows)
        within = tl.arange(0, cols)
        start, end = tl.load(pointers + row), tl.load(pointers + row + 1)
        # Read as (cols, rows), for x W^T; 64 bits, because there may be more entries than 32 can count.
        block = values + start.to(tl.int64) * (rows * cols) + within[:, None] + tl.arange(0, rows)[None, :] * cols
        total = tl.zeros((tile, rows), dtype=tl.float32)
        for index in range(start, end):
            column = tl.load(columns + index) * cols + within
            there = (token < tokens)[:, None] & (column < in_features)[None, :]
            left = tl.load(x + token[:, None] * in_features + column[None, :], mask=there, other=0.0)
            right = tl.load(block)
            if upcast:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
            block += rows * cols
        if has_bias:
            total += tl.load(bias + out, mask=out < out_features, other=0.0).to(tl.float32)[None, :]
        inside = (token < tokens)[:, None] & (out < out_features)[None, :]
        tl.store(y + token[:, None] * out_features + out[None, :], total.to(y.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return `x W^T + bias`, see `block_sparse.Blocks`; `x` is contiguous and has a token at least."""
    tokens, in_features = x.shape
    _, rows, cols = values.shape
    y = x.new_empty((tokens, out_features))
    # As many tokens as there are, within what a tensor core takes (16) and what stays in registers beside a block.
    tile = min(max(16, triton.next_power_of_2(tokens)), 128 if rows < 128 else 64)
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(tokens, tile), len(pointers) - 1)](
            x,
            values.contiguous(),
            columns,
            pointers,
            y if bias is None else bias,
            y,
            tokens,
            out_features,
            in_features,
            has_bias=bias is not None,
            upcast=INTERPRETED,  # the interpreter multiplies bf16 wrong
            tile=tile,
            rows=rows,
            cols=cols,
            num_warps=4 if tile * rows <= 4096 else 8,
        )
    return y
