"""A weight as bits and values in 4 bits: the layout by hand, and how values are rounded."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.kernels.bitmask_int4 import pack, unpack
from tests.helpers.kernels import sparse


def test_layout_by_hand():
    weight = torch.zeros(2, 200)
    weight[0, 1], weight[0, 2], weight[0, 63], weight[0, 150], weight[1, 127] = 0.5, -0.5, 0.0625, -1.0, 1e-40
    values, bits, pointers, scales = pack(weight)
    assert values[:3].tolist() == [0x0F, 0x08, 0x07], "8 and -8; 1 alone; -1 of the next word with values"
    assert bits.tolist() == [[6 - 2**63, 0, 1 << 22, 0], [0, 0, 0, 0]], "what counts as zero is not stored"
    assert pointers.tolist() == [0, 3, 3]
    assert scales.dtype == torch.bfloat16
    assert scales.tolist() == [[0.0625, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], "of -1 alone: its own step"
    assert torch.equal(unpack(values, bits, pointers, scales, 2, 200)[0], weight[0])


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (9, 200), (0, 70), (4, 0)])
def test_values_are_the_nearest_of_16_and_zero(shape):
    weight = sparse(shape[0], shape[1], 0.4)
    parts = pack(weight)
    found = unpack(*parts, *shape)
    assert found.shape == shape
    scales = parts[3].float().repeat_interleave(64, 1)[:, : shape[1]]
    steps = torch.arange(-8.0, 9.0)
    for row, each in enumerate(weight):
        nearest = (each[:, None] - steps * scales[row][:, None]).abs().amin(1)
        torch.testing.assert_close((found[row] - each).abs(), nearest, rtol=1e-5, atol=1e-7)


def test_bytes_of_a_weight_at_half_of_zeros():
    kept = sparse(256, 1024, 0.5)
    values, bits, _, scales = pack(kept + kept.sign())  # so that none rounds to zero
    size = 8 * (values.numel() - 1024 - 256 + bits.nbytes + scales.nbytes) / kept.numel()
    assert 3.2 < size < 3.35, "a bit for each entry, 4 for each value, 16 for the scale of 64 columns"
