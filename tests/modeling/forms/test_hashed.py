"""Hashed layers: the hash by hand, exact gradients, no matrix in memory, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import RecipeError
from hf_sparse.modeling.forms import HashedEmbedding, HashedLinear
from hf_sparse.modeling.forms.hashed import _Linear
from hf_sparse.modeling.forms.hashing import column_keys, row_keys, slots


def _mix(value: int) -> int:
    """SplitMix64 with Python's integers."""
    value &= 2**64 - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return value ^ (value >> 31)


def _slot(row: int, column: int, seed: int, buckets: int) -> int:
    golden = 0x9E3779B97F4A7C15
    r = _mix(seed + (2 * row + 1) * golden) >> 33 | 1
    c = _mix(seed + (2 * column + 2) * golden) >> 33 | 1
    return 2 * buckets * (r * c % 2**47 >> 16) >> 31


@pytest.mark.parametrize(("seed", "buckets"), [(0, 5), (7, 3), (2**62 + 12345, 100_003), (2**63 - 1, 1)])
def test_slots_are_those_of_the_stated_hash(seed: int, buckets: int) -> None:
    found = slots(row_keys(torch.arange(4), seed), column_keys(torch.arange(6), seed), buckets)
    assert found.tolist() == [[_slot(i, j, seed, buckets) for j in range(6)] for i in range(4)]
    assert int(found.min()) >= 0
    assert int(found.max()) < 2 * buckets


def test_buckets_are_equally_full_signs_balanced_and_rows_independent() -> None:
    index = slots(row_keys(torch.arange(512), 3), column_keys(torch.arange(512), 3), 1024)
    counts = torch.bincount(index.view(-1), minlength=2048).double()
    expected = 512 * 512 / 2048
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - 2047) < 6 * (2 * 2047) ** 0.5
    # Two rows, or two columns, agree in as many entries as chance has it.
    for one, two in ((index[0], index[1]), (index[:, 5], index[:, 400]), (index[7], index[300])):
        assert int((one == two).sum()) <= 5


def test_products_by_hand() -> None:
    layer = HashedLinear(3, 2, buckets=2, seed=5)
    with torch.no_grad():
        layer.buckets.copy_(torch.tensor([2.0, 10.0]))
        layer.bias.copy_(torch.tensor([100.0, 200.0]))  # type: ignore[union-attr]
    table = [2.0, 10.0, -2.0, -10.0]
    weight = [[table[_slot(i, j, 5, 2)] for j in range(3)] for i in range(2)]
    assert layer.weight.tolist() == weight
    x = [1.0, 3.0, -1.0]
    expected = [
        sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in zip(weight, (100, 200), strict=True)
    ]
    assert layer(torch.tensor([x])).tolist() == [expected]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 257)])  # the last in several chunks
def test_gradients_are_those_of_the_dense_matrix(shape: tuple[int, int]) -> None:
    rows, columns = shape
    layer = HashedLinear(columns, rows, buckets=max(1, rows * columns // 8), seed=1, dtype=torch.float64)
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, rows, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    found = [x.grad, layer.buckets.grad, layer.bias.grad]  # type: ignore[union-attr]
    twin = x.detach().clone().requires_grad_()
    layer.zero_grad()
    (nn.functional.linear(twin, layer.weight, layer.bias) * weights).sum().backward()
    for ours, theirs in zip(found, [twin.grad, layer.buckets.grad, layer.bias.grad], strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    buckets = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _Linear.apply(a, b, 6, 5, 9), (x, buckets))


def test_embedding_is_rows_of_the_matrix_with_their_gradients() -> None:
    table = HashedEmbedding(50, 8, buckets=40, seed=2, padding_idx=0, dtype=torch.float64)
    ids = torch.tensor([[3, 3, 0], [49, 1, 3]])
    weights = torch.randn(2, 3, 8, dtype=torch.float64)
    out = table(ids)
    assert out[0, 2].tolist() == [0.0] * 8
    (out * weights).sum().backward()
    found, table.buckets.grad = table.buckets.grad, None
    rows = table.weight[ids].masked_fill((ids == 0)[..., None], 0)
    torch.testing.assert_close(out, rows)
    (rows * weights).sum().backward()
    torch.testing.assert_close(found, table.buckets.grad)


def test_fit_is_the_mean_of_signed_entries_and_nearest() -> None:
    layer = HashedLinear(4, 3, buckets=2, seed=0)
    weight = torch.arange(12.0).view(3, 4)
    layer.fit(weight)
    sums, counts = [0.0, 0.0], [0, 0]
    for i in range(3):
        for j in range(4):
            slot = _slot(i, j, 0, 2)
            sums[slot % 2] += float(weight[i, j]) * (1 if slot < 2 else -1)
            counts[slot % 2] += 1
    torch.testing.assert_close(
        layer.buckets.detach(), torch.tensor([s / max(1, n) for s, n in zip(sums, counts, strict=True)])
    )
    error = float((layer.weight.detach() - weight).square().sum())
    for change in (0.1, -0.1):
        with torch.no_grad():
            layer.buckets[0] += change
        assert float((layer.weight.detach() - weight).square().sum()) > error
        layer.fit(weight)


def test_fit_of_a_hashed_matrix_gives_it_back() -> None:
    layer, other = (HashedLinear(31, 17, buckets=60, seed=4, dtype=torch.float64) for _ in range(2))
    used = torch.bincount(slots(row_keys(torch.arange(17), 4), column_keys(torch.arange(31), 4), 60).view(-1) % 60)
    other.fit(layer.weight)
    torch.testing.assert_close(other.buckets[: len(used)][used > 0], layer.buckets[: len(used)][used > 0])


def test_backward_keeps_no_matrix() -> None:
    """What autograd keeps between the passes: the inputs and the buckets."""
    layer = HashedLinear(256, 512, buckets=1000)
    kept: list[int] = []
    x = torch.randn(4, 256, requires_grad=True)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert sum(kept) <= x.numel() + 1000
    assert {name for name, _ in layer.named_buffers()} == set()


def test_bfloat16_sums_in_float32() -> None:
    layer = HashedLinear(64, 64, buckets=1, dtype=torch.bfloat16)
    layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    index = slots(row_keys(torch.arange(64), 0), column_keys(torch.arange(64), 0), 1)
    exact = float((index == 0).sum() - (index == 1).sum())
    assert float(layer.buckets.grad) == float(torch.tensor(exact).bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 0}, "`buckets`"),
        ({"buckets": 13}, r"`buckets` must be an integer in \[1, 12\], got 13"),
        ({"buckets": 2, "seed": -1}, "`seed`"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        HashedLinear(4, 3, **options)
