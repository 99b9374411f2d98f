"""Run the Triton kernel on the CPU; a program, because Triton reads TRITON_INTERPRET once, when it is imported."""

from __future__ import annotations

import json
import os
import sys

import torch

from hf_sparse.kernels.gpu import block_sparse, block_sparse_triton

SHAPES = [(64, 96), (70, 101), (128, 64), (33, 40)]
TOKENS = [1, 5, 37]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Rounding of the result, a little more than half a unit in the last place of its type; the sums are in fp32."""


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert block_sparse.interprets()
    called = 0
    multiply = block_sparse_triton.multiply

    def counted(*args: torch.Tensor) -> torch.Tensor:
        nonlocal called
        called += 1
        return multiply(*args)  # type: ignore[arg-type]

    block_sparse_triton.multiply = counted  # type: ignore[assignment]
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    worst: dict[str, float] = {}
    for dtype, bound in BOUNDS.items():
        for side in (16, 32, 64):
            for out, into in SHAPES:
                weight = torch.randn(out, into)
                for row in range(0, out, side):  # whole blocks off; one row of blocks has none left
                    for column in range(0, into, side):
                        if row == 0 or torch.rand(()) < 0.5:
                            weight[row : row + side, column : column + side] = 0
                layer = torch.nn.Linear(into, out, bias=into % 2 == 0, dtype=dtype)
                layer.weight.data.copy_(weight)
                made = block_sparse.BlockSparseLinear.from_linear(layer, side, side)
                for tokens in TOKENS:
                    x = torch.randn(tokens, into).to(dtype)
                    bias = None if layer.bias is None else layer.bias.double()
                    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), bias)
                    error = float(((made(x).double() - exact).abs() / exact.abs().clamp(min=1)).max())
                    name = str(dtype).removeprefix("torch.")
                    worst[name] = max(worst.get(name, 0.0), error)
                    if error > bound:
                        sys.exit(f"{dtype} {side} {out}x{into} {tokens} tokens: off by {error}")
    print(json.dumps({"called": called, "worst": worst}))  # noqa: T201


if __name__ == "__main__":
    main()
