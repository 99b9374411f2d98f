"""A weight as bits and values in 4 bits: the layout by hand, the product against the same rounded numbers in fp64."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.kernels import bitmask_int4, library
from hf_sparse.kernels.bitmask_int4 import bitmask_int4_linear, pack, unpack
from hf_sparse.kernels.bitmask_int8 import matmul
from hf_sparse.kernels.library import Library
from tests.helpers.kernels import odd_inputs, sparse

NATIVE = library.library()
WAYS = ["torch", *(NATIVE.isas if NATIVE else [])]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    chosen = Library(NATIVE.path, request.param) if NATIVE and request.param != "torch" else None
    monkeypatch.setattr(bitmask_int4, "library", lambda: chosen)
    return request.param


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (17, 128), (130, 301), (6, 2100)])
def test_matches_the_rounded_numbers_at_any_number_of_tokens(way, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for zeros in (0.0, 0.5, 0.9, 1.0):
            weight, bias = sparse(shape[0], shape[1], zeros), torch.randn(shape[0])
            parts = pack(weight)
            exact = unpack(*parts, *shape)
            for tokens in (*range(6), 9, 40, 70):
                x = torch.randn(tokens, shape[1])
                for some in (bias, None):
                    found = bitmask_int4_linear(x, *parts, some, *shape)
                    expected = matmul(x, exact, some)
                    # An input as far from both steps may be rounded the other way.
                    step = float(x.abs().max() * weight.abs().max()) / 100 if tokens else 0.0
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 + step)
                    assert float((found - expected).norm()) <= 1e-3 * (1 + float(found.norm()))
    finally:
        torch.set_num_threads(before)


def test_inputs_of_any_form(way):
    weight = sparse(20, 30, 0.5)
    parts = pack(weight)
    for x in odd_inputs():
        found = bitmask_int4_linear(x, *parts, None, *weight.shape)
        torch.testing.assert_close(found, matmul(x, unpack(*parts, 20, 30), None), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_token_with_a_number_that_is_none_comes_out_as_nan(way, bad):
    weight, x = torch.ones(3, 300), torch.ones(3, 300)
    x[1, 7] = bad
    found = bitmask_int4_linear(x, *pack(weight), None, 3, 300)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], torch.full((2, 3), 300.0))


def test_tiny_and_huge_numbers(way):
    for size in (1e-38, 1e-20, 1.0, 1e20):
        x = torch.full((2, 140), size)
        found = bitmask_int4_linear(x, *pack(torch.ones(1, 140)), None, 1, 140)
        torch.testing.assert_close(found, torch.full((2, 1), 140 * size), rtol=1e-5, atol=1e-35)


def test_parts_that_do_not_fit_together_are_refused(way):
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers, scales = pack(weight)
    for parts in (
        (values, bits[:, :1], pointers, scales),
        (values, bits, pointers[:-1], scales),
        (values, bits, pointers, scales[:1]),
        (values.float(), bits, pointers, scales),
    ):
        with pytest.raises(BackendError, match="do not form a weight of 8 x 70"):
            bitmask_int4_linear(x, *parts, None, 8, 70)


@pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built")
def test_pointers_that_lead_outside_are_refused_by_the_kernel():
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers, scales = pack(weight)
    far = pointers.clone()
    far[8] += 1
    for damaged in ((values, bits, far, scales), (values[:-1], bits, pointers, scales)):
        with pytest.raises(BackendError, match="lead outside"):
            bitmask_int4_linear(x, *damaged, None, 8, 70)
