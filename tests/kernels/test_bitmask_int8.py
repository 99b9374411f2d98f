"""A weight as bits and values in int8: the layout by hand, and how values are rounded."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.kernels import LibraryStatus, bitmask_int8
from hf_sparse.kernels.bitmask_int8 import pack, unpack
from hf_sparse.kernels.bitmask_rounded import GROUP, rounded


def test_layout_by_hand():
    weight = torch.zeros(2, 200)
    weight[0, 1], weight[0, 2], weight[0, 150], weight[1, 127] = 2.54, 0.03, -1.27, 1e-40
    values, bits, pointers, scales = pack(weight)
    assert values[:3].tolist() == [127, 2, -1]
    assert bits.tolist() == [[6, 0, 1 << 22, 0], [0, 0, 0, 0]], "what counts as zero is not stored"
    assert pointers.tolist() == [0, 3, 3]
    torch.testing.assert_close(scales[0], torch.tensor([0.02, 1.27]))  # one value is on a grid of its own
    weight[0, 2] = 0.04
    torch.testing.assert_close(unpack(values, bits, pointers, scales, 2, 200)[0], weight[0])


def test_a_large_number_costs_only_its_group_its_digits():
    x = torch.full((2 * GROUP,), 0.01)
    x[0] = 1000.0
    steps, scales = rounded(x)
    values = (steps * scales).flatten()
    assert not values[1:GROUP].any()
    torch.testing.assert_close(values[GROUP:], x[GROUP:])


@pytest.fixture
def spread(request, monkeypatch):
    status = LibraryStatus(True, None, request.param, "as if it were there")
    monkeypatch.setattr(bitmask_int8, "library_status", lambda: status)
    return request.param


@pytest.mark.parametrize("spread", ["avx512vbmi", "neon", "portable"], indirect=True)
def test_zeros_of_a_row_that_has_few_are_values(spread):
    weight = torch.randn(2, 64).sign()
    weight[0, :7], weight[1, :8] = 0.0, 0.0  # an eighth is where the bits are as many bytes
    values, bits, pointers, scales = pack(weight)
    assert pointers.tolist() == [0, 64, 120]
    assert values[:7].tolist() == [0] * 7
    assert bits.tolist() == [[-1, 0], [-1 << 8, 0]]
    assert torch.equal(unpack(values, bits, pointers, scales, 2, 64) == 0, weight == 0)


@pytest.mark.parametrize("spread", ["avx512", "avx2"], indirect=True)
def test_rows_keep_their_zeros_where_spreading_takes_longer(spread):
    weight = torch.zeros(3, 256)
    weight[0, ::2], weight[1, :98], weight[2, :97] = 1.0, -1.0, 1.0
    values, bits, pointers, scales = pack(weight)
    assert pointers.tolist() == [0, 256, 512, 512 + 97]
    assert bits[:2].tolist() == [[-1] * 4] * 2
    assert torch.equal(unpack(values, bits, pointers, scales, 3, 256), weight)
