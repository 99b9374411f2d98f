"""A weight as bits and nonzero values: the layout by hand, the product against fp64 on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.errors import BackendError
from hf_sparse.kernels import KERNELS, bitmask
from hf_sparse.kernels.bitmask import SLACK, bitmask_linear, pack, unpack
from tests.helpers.kernels import NATIVE, WAYS, odd_inputs, sparse, use_way

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    use_way(monkeypatch, bitmask, request.param)
    return request.param


def test_layout_by_hand():
    weight = torch.zeros(2, 66)
    weight[0, 1], weight[0, 65], weight[1, 63] = 2.0, -3.0, 0.5
    values, bits, pointers = pack(weight)
    assert values.dtype == torch.bfloat16
    assert values[:3].tolist() == [2.0, -3.0, 0.5]
    assert values.numel() == 3 + 66 + SLACK
    assert bits.tolist() == [[2, 2], [-(2**63), 0]]
    assert pointers.tolist() == [0, 2, 3]
    assert torch.equal(unpack(values, bits, pointers, 2, 66), weight)


def test_values_that_bfloat16_cannot_hold_stay_as_they_are():
    weight = sparse(9, 70, 0.5)
    assert pack(weight)[0].dtype == torch.float32
    assert pack(weight.bfloat16().float())[0].dtype == torch.bfloat16
    assert torch.equal(unpack(*pack(weight), 9, 70), weight)
    assert pack(torch.full((1, 1), torch.finfo(torch.float32).max))[0].dtype == torch.float32, "not infinity"
    tiny = torch.full((1, 1), 1e-45)
    assert torch.equal(unpack(*pack(tiny), 1, 1), tiny)


def test_zeros_of_a_row_that_has_few_are_values():
    """Above 1 / 16 of zeros (bfloat16) or 1 / 32 (float32) the bits of a row are fewer bytes."""
    for dtype, few, many in ((torch.bfloat16, 3, 4), (torch.float32, 1, 2)):
        weight = torch.randn(3, 64).to(dtype).float()
        weight[0, :few], weight[1, :many] = 0.0, 0.0
        values, bits, pointers = pack(weight)
        assert values.dtype == dtype
        assert pointers.tolist() == [0, 64, 128 - many, 192 - many]
        assert bits[0].tolist() == [-1]
        assert bits[1].tolist() == [-1 << many]
        assert torch.equal(unpack(values, bits, pointers, 3, 64), weight)


@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_with_a_value_for_each_column_takes_nothing_of_the_next(way, dtype, width):
    weight = torch.ones(2, width).to(DTYPES[dtype]).float()
    weight[0, 0], weight[1] = 0.0, torch.inf
    for tokens in (1, 3):
        found = bitmask_linear(torch.ones(tokens, width), *pack(weight), None, 2, width)
        assert torch.equal(found, torch.tensor([[width - 1.0, torch.inf]]).expand(tokens, 2))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (17, 64), (130, 301), (6, 2100)])
def test_matches_fp64_at_any_number_of_tokens(way, shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for zeros in (0.0, 0.02, 0.5, 0.9, 1.0):
            weight, bias = sparse(shape[0], shape[1], zeros).to(DTYPES[dtype]).float(), torch.randn(shape[0])
            parts = pack(weight)
            for tokens in (*range(6), 9, 40, 70):
                x = torch.randn(tokens, shape[1])
                for some in (bias, None):
                    exact = F.linear(x.double(), weight.double(), None if some is None else some.double())
                    found = bitmask_linear(x, *parts, some, *shape)
                    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-4)
    finally:
        torch.set_num_threads(before)


def test_panels_of_wide_inputs_add_up(way):
    weight = sparse(5, 3000, 0.6).bfloat16().float()
    x = torch.randn(70, 3000)
    found = bitmask_linear(x, *pack(weight), None, *weight.shape)
    torch.testing.assert_close(found.double(), F.linear(x.double(), weight.double()), rtol=1e-5, atol=1e-3)


def test_inputs_of_any_form(way):
    weight = sparse(20, 30, 0.5)
    for x in odd_inputs():
        found = bitmask_linear(x, *pack(weight), None, *weight.shape)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_nan_and_infinity_of_the_weight_arrive(way):
    weight = torch.zeros(3, 40)
    weight[0, 3], weight[1, 5], weight[2, 7] = torch.nan, torch.inf, -torch.inf
    for tokens in (1, 3):
        found = bitmask_linear(torch.ones(tokens, 40), *pack(weight), None, 3, 40)
        assert found[:, 0].isnan().all()
        assert (found[:, 1] == torch.inf).all()
        assert (found[:, 2] == -torch.inf).all()


def test_parts_that_do_not_fit_together_are_refused(way):
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers = pack(weight)
    wrong = {
        "short bits": (values, bits[:, :1], pointers),
        "short pointers": (values, bits, pointers[:-1]),
        "values of another type": (values.half(), bits, pointers),
        "pointers of another type": (values, bits, pointers.long()),
    }
    for parts in wrong.values():
        with pytest.raises(BackendError, match="do not form a weight of 8 x 70"):
            bitmask_linear(x, *parts, None, 8, 70)
    with pytest.raises(BackendError, match=r"shape \(\.\.\., 70\) for a weight with 70 inputs, got \(2, 69\)"):
        bitmask_linear(x[:, :69], values, bits, pointers, None, 8, 70)
    with pytest.raises(BackendError, match="bias"):
        bitmask_linear(x, values, bits, pointers, torch.zeros(9), 8, 70)


@pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built")
def test_pointers_that_lead_outside_are_refused_by_the_kernel():
    weight, x = sparse(8, 70, 0.5), torch.randn(2, 70)
    values, bits, pointers = pack(weight)
    backwards, far, cut = pointers.clone(), pointers.clone(), values[:-1]
    backwards[3], far[8] = 2**30, int(pointers[8]) + 1
    for damaged in ((values, bits, backwards), (values, bits, far), (cut, bits, pointers)):
        with pytest.raises(BackendError, match="lead outside"):
            bitmask_linear(x, *damaged, None, 8, 70)


def test_more_values_than_int32_counts_are_refused(monkeypatch):
    monkeypatch.setattr(bitmask, "SLACK", 2**31)
    with pytest.raises(BackendError, match="fewer than 2\\^31 nonzeros"):
        KERNELS["bitmask"].pack(torch.eye(2))
