"""The packed form of a weight restores every bit, however the weight lies in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.runtime import to_dense_runtime, to_runtime
from hf_sparse.runtime.packed_weight import Packed

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda weight: weight.clone(),
    "transposed": lambda weight: weight.t().contiguous().t(),
    "strided": lambda weight: weight.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda weight: torch.cat([weight, weight])[len(weight) :],
    "expanded": lambda weight: weight[:1].expand(len(weight), -1),
}


def weight_with_negative_zeros() -> Tensor:
    weight = torch.randn(13, 37) * (torch.rand(13, 37) < 0.3)
    weight[:, ::3] = torch.where(weight[:, ::3] == 0, -0.0, weight[:, ::3])
    return weight


@pytest.mark.parametrize("kernel", ["cpu", "csr", "int8"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_restores_negative_zeros_of_any_memory_layout(kernel: str, name: str) -> None:
    weight = LAYOUTS[name](weight_with_negative_zeros())
    assert torch.signbit(weight[weight == 0]).any()
    restored = Packed.of(weight, kernel).dense()
    assert torch.equal(restored, weight)
    assert torch.equal(torch.signbit(restored), torch.signbit(weight))


@pytest.mark.parametrize("backend", ["cpu", "csr"])
def test_model_with_a_transposed_weight_is_packed_and_restored(backend: str) -> None:
    layer = nn.Linear(13, 37)
    layer.weight = nn.Parameter(weight_with_negative_zeros().t())
    before, model = layer.weight.detach().clone(), nn.Sequential(layer).eval()
    to_runtime(model, backend)
    to_dense_runtime(model)
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.signbit(layer.weight), torch.signbit(before))


@pytest.mark.parametrize("kernel", ["int8", "bitmask-int8", "bitmask-int4"])
@pytest.mark.parametrize("scale", [1.0, 1e-23, 1e-31])
def test_errors_of_small_weights_are_not_lost_in_small_squares(kernel: str, scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128) * (torch.rand(16, 128) < 0.5) * scale
    packed = Packed.of(weight, kernel)
    of_weight = packed.errors(weight).weight
    lost = (packed.multiplied() / scale - weight / scale).norm() / (weight / scale).norm()
    assert of_weight == pytest.approx(float(lost), rel=1e-3)
    assert of_weight > 1e-3
