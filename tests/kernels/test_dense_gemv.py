"""The product of a few tokens with a dense weight, against fp64 and torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.kernels import dense_gemv as dense
from hf_sparse.kernels.dense_gemv import FEW, dense_linear
from tests.helpers.kernels import WAYS, use_way


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    use_way(monkeypatch, dense, request.param)
    return request.param


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (17, 64), (130, 301), (33, 512)])
def test_matches_fp64_at_any_number_of_tokens(way, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, bias = torch.randn(shape), torch.randn(shape[0])
        for tokens in (*range(FEW + 2), 40):
            x = torch.randn(tokens, shape[1])
            for some in (bias, None):
                exact = F.linear(x.double(), weight.double(), None if some is None else some.double())
                torch.testing.assert_close(dense_linear(x, weight, some).double(), exact, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [2, FEW + 1])
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_gradients_are_those_of_torch(way, tokens, which):
    parts = {"x": torch.randn(tokens, 6), "weight": torch.randn(5, 6), "bias": torch.randn(5)}
    leaf = parts[which].requires_grad_()
    wanted = torch.autograd.grad(F.linear(*parts.values()).sum(), leaf)
    torch.testing.assert_close(torch.autograd.grad(dense_linear(*parts.values()).sum(), leaf), wanted)


def test_autocast_gives_the_type_that_torch_gives(way):
    weight = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tokens in (1, FEW + 1):
            x = torch.randn(tokens, 6)
            assert torch.equal(dense_linear(x, weight), F.linear(x, weight))


def test_leading_shapes_strides_and_types(way):
    weight, bias = torch.randn(20, 30), torch.randn(20)
    for x in (torch.randn(30), torch.randn(2, 3, 30), torch.randn(60, 4).T[:, ::2], torch.randn(1, 30).expand(4, 30)):
        torch.testing.assert_close(dense_linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(dense_linear(x, weight.T.contiguous().T), F.linear(x, weight))
        torch.testing.assert_close(dense_linear(x, weight, torch.randn(40)[::2].copy_(bias)), F.linear(x, weight, bias))
        torch.testing.assert_close(
            dense_linear(x.double(), weight.double(), bias.double()),
            F.linear(x.double(), weight.double(), bias.double()),
        )
    for lead in ((0,), (2, 0)):
        assert dense_linear(torch.randn(*lead, 30), weight).shape == (*lead, 20)
    assert dense_linear(torch.randn(3, 0), torch.randn(5, 0)).shape == (3, 5)
    assert dense_linear(torch.randn(3, 5), torch.randn(0, 5)).shape == (3, 0)


def test_infinity_and_nan_are_those_of_torch(way):
    x, weight = torch.randn(2, 40), torch.randn(50, 40)
    weight[3, 7], weight[4, 8], x[1, 7] = float("nan"), float("inf"), 0.0
    torch.testing.assert_close(dense_linear(x, weight), F.linear(x, weight), equal_nan=True)


@pytest.mark.parametrize(
    "wrong",
    [
        (torch.randn(2, 3), torch.randn(4, 5), None),
        (torch.randn(1, 5), torch.randn(4, 5), torch.randn(3)),
        (torch.randn(1, 5), torch.randn(4, 5).double(), None),
        (torch.randn(()), torch.randn(4, 5), None),
    ],
)
def test_what_torch_refuses_is_refused(way, wrong):
    with pytest.raises(RuntimeError):
        dense_linear(*wrong)


def test_operator_passes_the_checks_of_torch():
    for tokens in (1, FEW + 1):
        torch.library.opcheck(
            torch.ops.hf_sparse.dense_linear.default,
            (torch.randn(tokens, 5), torch.randn(4, 5), None),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
