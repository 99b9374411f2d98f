"""What kernels of rounded values in bits share: the product against the same rounded numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.kernels import bitmask_int4, bitmask_int8, bitmask_rounded
from hf_sparse.kernels.bitmask_rounded import matmul
from tests.helpers.kernels import NATIVE, WAYS, odd_inputs, sparse, use_way


class Rounded(NamedTuple):
    """A kernel whose values are rounded."""

    linear: Callable[..., Any]
    pack: Callable[..., Any]
    unpack: Callable[..., Any]


ROUNDED = {
    "int8": Rounded(bitmask_int8.bitmask_int8_linear, bitmask_int8.pack, bitmask_int8.unpack),
    "int4": Rounded(bitmask_int4.bitmask_int4_linear, bitmask_int4.pack, bitmask_int4.unpack),
}


@pytest.fixture(params=ROUNDED)
def kernel(request):
    return ROUNDED[request.param]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    use_way(monkeypatch, bitmask_rounded, request.param)
    return request.param


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (17, 128), (130, 301), (6, 2100)])
def test_matches_the_rounded_numbers_at_any_number_of_tokens(kernel, way, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for zeros in (0.0, 0.05, 0.5, 0.9, 1.0):
            weight, bias = sparse(shape[0], shape[1], zeros), torch.randn(shape[0])
            parts = kernel.pack(weight)
            exact = kernel.unpack(*parts, *shape)
            for tokens in (*range(6), 9, 40, 70):
                x = torch.randn(tokens, shape[1])
                for some in (bias, None):
                    found = kernel.linear(x, *parts, some, *shape)
                    expected = matmul(x, exact, some)
                    # An input as far from both steps may be rounded the other way.
                    step = float(x.abs().max() * weight.abs().max()) / 100 if tokens else 0.0
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 + step)
                    assert float((found - expected).norm()) <= 1e-3 * (1 + float(found.norm()))
    finally:
        torch.set_num_threads(before)


def test_inputs_of_any_form(kernel, way):
    weight = sparse(20, 30, 0.5)
    parts = kernel.pack(weight)
    for x in odd_inputs():
        found = kernel.linear(x, *parts, None, *weight.shape)
        torch.testing.assert_close(found, matmul(x, kernel.unpack(*parts, 20, 30), None), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_token_with_a_number_that_is_none_comes_out_as_nan(kernel, way, bad):
    weight, x = torch.ones(3, 300), torch.ones(3, 300)
    x[1, 7] = bad
    found = kernel.linear(x, *kernel.pack(weight), None, 3, 300)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], torch.full((2, 3), 300.0))


def test_tiny_and_huge_numbers(kernel, way):
    for size in (1e-38, 1e-20, 1.0, 1e20):
        x = torch.full((2, 140), size)
        found = kernel.linear(x, *kernel.pack(torch.ones(1, 140)), None, 1, 140)
        torch.testing.assert_close(found, torch.full((2, 1), 140 * size), rtol=1e-5, atol=1e-35)


def test_parts_that_do_not_fit_together_are_refused(kernel, way):
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers, scales = kernel.pack(weight)
    for parts in (
        (values, bits[:, :1], pointers, scales),
        (values, bits, pointers[:-1], scales),
        (values, bits, pointers, scales[:1]),
        (values.float(), bits, pointers, scales),
    ):
        with pytest.raises(BackendError, match="do not form a weight of 8 x 70"):
            kernel.linear(x, *parts, None, 8, 70)


@pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built")
def test_pointers_that_lead_outside_are_refused_by_the_kernel(kernel):
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers, scales = kernel.pack(weight)
    far = pointers.clone()
    far[8] += 1
    for damaged in ((values, bits, far, scales), (values[:-1], bits, pointers, scales)):
        with pytest.raises(BackendError, match="lead outside"):
            kernel.linear(x, *damaged, None, 8, 70)
