"""Block-sparse linear layers: packing is exact, the plain default is right, and so is the kernel in the interpreter."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_sparse import BackendError, CheckpointError
from hf_sparse.formats.codecs import encode
from hf_sparse.kernels.gpu import block_sparse
from hf_sparse.kernels.gpu.block_sparse import (
    Blocks,
    BlockSparseLinear,
    block_sparse_linear,
    from_codec,
    pack_blocks,
    refusal,
    unpack_blocks,
)

ROOT = Path(__file__).parents[3]


def blocky(out: int, into: int, side: int, kept: float = 0.4, dtype: torch.dtype = torch.float32) -> Tensor:
    flags = torch.rand(-(-out // side), -(-into // side)) < kept
    flags[0] = False  # a row of blocks with none
    mask = flags.repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :into]
    return torch.where(mask, torch.randn(out, into), 0.0).to(dtype)


def layer_of(weight: Tensor, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("out", "into"), [(64, 128), (70, 101), (5, 3), (128, 33)])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_packed_weight_comes_back_bit_for_bit(out: int, into: int, side: int, dtype: torch.dtype) -> None:
    weight = blocky(out, into, side, dtype=dtype)
    weight[-1, -1] = -0.0
    blocks = pack_blocks(weight, side, side)
    back = unpack_blocks(blocks, (out, into))
    assert torch.equal(back, weight)
    assert bool(back[-1, -1].signbit())
    assert len(blocks.values) == blocks.pointers[-1] <= max(1, (-(-out // side) - 1) * -(-into // side) + 1)


def test_layout_is_that_of_torch() -> None:
    weight = blocky(128, 192, 32)
    blocks, bsr = pack_blocks(weight), weight.to_sparse_bsr((32, 32))
    assert torch.equal(blocks.values, bsr.values())
    assert torch.equal(blocks.columns.long(), bsr.col_indices())
    assert torch.equal(blocks.pointers.long(), bsr.crow_indices())


def test_weight_of_zeros_alone_has_no_block() -> None:
    blocks = pack_blocks(torch.zeros(64, 64))
    assert len(blocks.values) == 0
    assert blocks.pointers.tolist() == [0, 0, 0]
    assert torch.equal(unpack_blocks(blocks, (64, 64)), torch.zeros(64, 64))


@pytest.mark.parametrize("shape", [(128, 192), (100, 70)])
def test_stored_blocks_are_taken_as_they_are(shape: tuple[int, int]) -> None:
    weight = blocky(*shape, 32)
    stored = from_codec(*encode(weight, {"name": "block", "rows": 32, "cols": 32}))
    assert stored is not None
    for one, other in zip(stored, pack_blocks(weight), strict=True):
        assert torch.equal(one, other)


def test_other_codecs_and_small_blocks_are_left_to_the_decoder() -> None:
    weight = blocky(64, 64, 32)
    for codec in ("bitmask", {"name": "block", "rows": 4, "cols": 1}):
        assert from_codec(*encode(weight, codec)) is None


def test_damaged_bitmap_is_found() -> None:
    entry, parts = encode(blocky(96, 96, 32), {"name": "block", "rows": 32, "cols": 32})
    with pytest.raises(CheckpointError, match="bits behind the end"):
        from_codec(entry, {**parts, "_blocks": torch.full_like(parts["_blocks"], 255)})
    # One block more than there are values for.
    flags = parts["_blocks"].clone()
    flags[0] |= 1
    with pytest.raises(CheckpointError, match="the bitmap keeps"):
        from_codec(entry, {**parts, "_blocks": flags})


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "block", "reason"),
    [
        ((64,), torch.float16, (8, 0), (32, 32), "needs a matrix"),
        ((0, 64), torch.float16, (8, 0), (32, 32), "with entries"),
        ((64, 64), torch.float16, (8, 0), (4, 1), "not 4 x 1"),
        ((64, 64), torch.float64, (8, 0), (32, 32), "not float64"),
        ((64, 64), torch.float16, None, (32, 32), "needs a CUDA device"),
        ((64, 64), torch.bfloat16, (7, 5), (32, 32), "8.0 in bfloat16, and this device has 7.5"),
        ((64, 64), torch.float16, (6, 1), (32, 32), "7.0 in float16, and this device has 6.1"),
    ],
)
def test_refusal_says_why(shape: Any, dtype: Any, capability: Any, block: Any, reason: str) -> None:
    assert re.search(reason, refusal(shape, dtype, capability, *block) or "")


def test_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "has_triton", lambda: True)
    assert refusal((70, 50), torch.float16, (7, 5), 32, 64) is None
    monkeypatch.setattr(block_sparse, "has_triton", lambda: False)
    assert "pip install triton" in (refusal((70, 50), torch.float16, (7, 5), 32, 64) or "")


# -- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "product", [block_sparse._by_rows, block_sparse._by_bsr], ids=lambda function: function.__name__
)
@pytest.mark.parametrize(("out", "into", "side"), [(64, 128, 32), (70, 101, 16), (128, 64, 64), (33, 40, 32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_plain_products_agree_with_dense(product: Any, out: int, into: int, side: int, bias: bool, tokens: int) -> None:
    layer = layer_of(blocky(out, into, side, 0.7), bias=bias)
    x = torch.randn(tokens, into)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    found = product(x, *pack_blocks(layer.weight, side, side), layer.bias, out)
    assert found.shape == exact.shape
    assert float((found - exact).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("shape", [(5, 101), (2, 3, 101), (101,), (0, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_computes_what_the_dense_one_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = layer_of(blocky(70, 101, 32, 0.7, dtype), bias=True)
    made, x = BlockSparseLinear.from_linear(layer), torch.randn(shape).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert made(x).shape == layer(x).shape
    torch.testing.assert_close(made(x), layer(x), atol=bound, rtol=bound)


def test_layer_survives_copies_and_pickles_and_gives_the_dense_one_back() -> None:
    layer = layer_of(blocky(64, 96, 32), bias=True)
    made, x = BlockSparseLinear.from_linear(layer), torch.randn(3, 96)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301  our own bytes
        assert torch.equal(other(x), made(x))
    back = made.to_linear()
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(back.bias, layer.bias)


def test_activations_in_another_type_are_refused() -> None:
    made = BlockSparseLinear.from_linear(layer_of(blocky(64, 64, 32), bias=False))
    with pytest.raises(BackendError, match=r"float32, and what it is given in torch\.float16"):
        made(torch.randn(2, 64).half())


def test_op_is_seen_through_by_torch() -> None:
    layer = layer_of(blocky(64, 96, 32), bias=True)
    made, x = BlockSparseLinear.from_linear(layer), torch.randn(3, 96)
    torch.library.opcheck(block_sparse_linear, (x, made.values, made.columns, made.pointers, made.bias, 64))
    exported = torch.export.export(nn.Sequential(made), (x,))
    assert torch.equal(exported.module()(x), made(x))


def test_blocks_may_be_cast_with_the_model() -> None:
    layer = layer_of(blocky(64, 64, 32), bias=True)
    made = BlockSparseLinear.from_linear(layer).to(torch.bfloat16)
    assert made.columns.dtype == torch.int32
    assert torch.equal(
        unpack_blocks(Blocks(made.values, made.columns, made.pointers), (64, 64)), layer.weight.bfloat16()
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
@pytest.mark.timeout(300)
def test_kernel_agrees_with_fp64_in_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when it is imported, and something else may have done that.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "block_sparse_cases.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["called"] == 3 * 3 * 4 * 3  # types, blocks, shapes, token counts: the kernel, not the default
