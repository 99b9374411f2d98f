"""Every GPU product against fp64, and training and saving on a GPU; scripts/verify_gpu.py has the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_sparse import Pruner, SparsityConfig, sparsify
from hf_sparse.kernels.gpu import block_sparse, semi_structured
from hf_sparse.kernels.gpu.block_sparse import BlockSparseLinear
from hf_sparse.kernels.gpu.semi_structured import SemiStructuredLinear
from tests.helpers.structures import batch, build

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
HALF = [torch.float16, torch.bfloat16]


def layer_of(weight: Tensor, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype, device="cuda")
    layer.weight.data.copy_(weight)
    return layer


def off(made: nn.Module, layer: nn.Linear, x: Tensor) -> float:
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    return float((made(x).double() - exact).abs().max() / exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("backend", list(semi_structured.BACKENDS))
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_two_of_four_agrees_with_fp64(backend: str, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    order = torch.rand(128 * 256 // 4, 4).argsort(1)
    weight = torch.where((order < 2).view(128, 256), torch.randn(128, 256), 0.0).to(dtype).cuda()
    capability = torch.cuda.get_device_capability()
    if why := semi_structured.refusal((128, 256), dtype, capability, backend, weight):
        pytest.skip(why)
    layer = layer_of(weight, bias=bias)
    made = SemiStructuredLinear.from_linear(layer, backend)
    assert off(made, layer, torch.randn(tokens, 256, dtype=dtype, device="cuda")) < BOUNDS[dtype]
    assert torch.equal(made.to_linear().weight, weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_blocks_agree_with_fp64(dtype: torch.dtype, side: int, tokens: int) -> None:
    out, into = 4 * side - 5, 6 * side - 3
    if why := block_sparse.refusal((out, into), dtype, torch.cuda.get_device_capability(), side, side):
        pytest.skip(why)
    mask = (torch.rand(4, 6) < 0.5).repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :into]
    layer = layer_of(torch.where(mask, torch.randn(out, into), 0.0).to(dtype), bias=True)
    made = BlockSparseLinear.from_linear(layer, side, side)
    assert off(made, layer, torch.randn(tokens, into, dtype=dtype, device="cuda")) < BOUNDS[dtype]
    assert torch.equal(made.to_linear().weight, layer.weight)


@torch.no_grad()
@pytest.mark.parametrize("product", [block_sparse._by_bsr, block_sparse._by_rows], ids=lambda f: f.__name__)
def test_products_without_triton_agree_with_fp64(product: Any) -> None:
    mask = (torch.rand(4, 6) < 0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)
    layer = layer_of(torch.where(mask, torch.randn(128, 192), 0.0), bias=True)
    x = torch.randn(9, 192, device="cuda")
    found = product(x, *block_sparse.pack_blocks(layer.weight), layer.bias, 128)
    torch.testing.assert_close(found, layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scorer", ["magnitude", "movement", "gradient", "random"])
@pytest.mark.parametrize("selection", ["uniform", "global"])
def test_pruning_on_a_gpu_keeps_its_tensors_there(scorer: str, selection: str) -> None:
    model = build("bert").cuda().train()
    config = SparsityConfig(sparsity=0.5, scorer=scorer, selection=selection, schedule="constant")
    pruner = Pruner(model, config).attach()
    inputs = {key: value.cuda() for key, value in batch("bert").items()}
    for _ in range(2):
        (model(**inputs).loss + pruner.penalty()).backward()
        pruner.step(1.0)
    pruner.bake()
    assert all(parameter.is_cuda for parameter in model.parameters())


def test_saved_from_a_gpu_and_loaded_onto_it(tmp_path: Path) -> None:
    model = build("bert").cuda()
    sparsify(model, SparsityConfig(sparsity=0.5, scorer="magnitude"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="cuda")
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert other.is_cuda
        assert torch.equal(one, other)
