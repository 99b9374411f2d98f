"""Low rank: by hand, the best of its rank on the calibration data, beside a sparse weight, in the runtime, as LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import RecipeError, SparsityCallback, sparsify, to_dense_runtime, to_runtime
from hf_sparse.modeling.forms import LowRankLinear, is_low_rank
from hf_sparse.pruning.compressions import LowRank


def test_by_hand() -> None:
    # H = diag(1, 100): the second input is ten times as large, so its column wins although its entry is smaller.
    weight, products = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.diag(torch.tensor([1.0, 100.0]))
    down, up = LowRank(rank=1, damping=0.0).fit(weight, products)
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    down, up = LowRank(rank=1, weighted=False).fit(weight, products)
    torch.testing.assert_close(up @ down, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    down, up = LowRank(rank=2, damping=0.0).fit(weight, products)
    torch.testing.assert_close(up @ down, weight)


def test_no_other_product_of_the_rank_is_nearer_on_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator).double(), torch.randn(8, 50, generator=generator).double()
    products = x @ x.t()
    down, up = LowRank(rank=2, damping=0.0).fit(weight, products)
    best = float(((weight - up @ down) @ x).square().sum())
    for _ in range(200):
        change_up, change_down = (1e-2 * torch.randn(part.shape, generator=generator) for part in (up, down))
        other = (up + change_up) @ (down + change_down)
        assert float(((weight - other) @ x).square().sum()) >= best


def test_dead_inputs_are_no_obstacle() -> None:
    products = torch.zeros(4, 4)
    down, up = LowRank(rank=1).fit(torch.eye(4), products)
    assert bool(torch.isfinite(up @ down).all())


def sparse_layer(seed: int = 0, **group: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a model of one layer after sparsify, its inputs and its dense outputs."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 64, generator=generator))
        layer.bias.zero_()
    x = torch.randn(200, 64, generator=generator) * torch.linspace(0.1, 3, 64)
    model = Model(layer)
    dense = layer(x).detach()
    sparsify(model, {"targets": "*", **group}, [{"x": x}])
    return model, x, dense


class Model(nn.Sequential):
    """A layer that takes keyword arguments, as calibration gives them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self[0](x)
        return out


@torch.no_grad()
def test_the_removed_part_is_approximated_and_the_zeros_stay() -> None:
    plain, x, dense = sparse_layer(sparsity=0.75, scorer="wanda")
    both, _, _ = sparse_layer(sparsity=0.75, scorer="wanda", compress={"name": "low_rank", "rank": 8})
    assert is_low_rank(both[0])
    assert torch.equal(both[0].weight, plain[0].weight)
    errors = [float((model(x) - dense).square().sum()) for model in (plain, both)]
    assert errors[1] < 0.8 * errors[0]
    part = both[0].low_rank
    torch.testing.assert_close(both(x), plain(x) + x @ part.down.t() @ part.up.t())


@torch.no_grad()
def test_alone_it_takes_the_place_of_the_weight() -> None:
    model, x, dense = sparse_layer(compress={"name": "low_rank", "rank": 16})
    assert isinstance(model[0], LowRankLinear)
    assert model[0].down.shape == (16, 64)
    all_alike, _, _ = sparse_layer(compress={"name": "low_rank", "rank": 16, "weighted": False})
    assert float((model(x) - dense).square().sum()) < float((all_alike(x) - dense).square().sum())


@torch.no_grad()
def test_the_runtime_computes_both_parts_and_gives_them_back() -> None:
    model, x, _ = sparse_layer(sparsity=0.75, compress={"name": "low_rank", "rank": 4})
    expected = model.eval()(x)
    report = to_runtime(model, "csr")
    assert [layer.kernel for layer in report.layers] == ["csr"]
    torch.testing.assert_close(model(x), expected)
    to_dense_runtime(model)
    assert torch.equal(model(x), expected)


def test_zeros_stay_and_both_parts_train() -> None:
    model, x, _ = sparse_layer(sparsity=0.75, compress={"name": "low_rank", "rank": 4})
    zeros, before = model[0].weight == 0, [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    assert bool((model[0].weight[zeros] == 0).all())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("group", "batches", "message"),
    [
        ({"compress": {"name": "low_rank", "rank": 65}}, True, "at most the smaller side"),
        ({"compress": {"name": "low_rank", "rank": 4}}, False, "some batches"),
        ({"sparsity": 0.5, "compress": {"name": "low_rank", "rank": 4}}, False, "some batches"),
        ({"sparsity": 0.5, "pattern": "head", "compress": {"name": "low_rank", "rank": 2}}, True, "head"),
    ],
)
def test_what_cannot_be_is_refused(group: dict[str, Any], batches: bool, message: str) -> None:
    model = Model(nn.Linear(64, 64))
    with pytest.raises(RecipeError, match=message):
        sparsify(
            model,
            {**({} if "pattern" in group else {"targets": "*"}), **group},
            [{"x": torch.ones(1, 64)}] if batches else None,
        )


def test_training_does_not_fit_it() -> None:
    from hf_sparse import Pruner

    for group in ({"compress": "low_rank"}, {"compress": "low_rank", "sparsity": 0.5}):
        with pytest.raises(RecipeError, match="in one shot"):
            Pruner(nn.Sequential(nn.Linear(64, 64)), {"targets": "*", **group}).attach()
    assert SparsityCallback({"compress": "hashed"})
