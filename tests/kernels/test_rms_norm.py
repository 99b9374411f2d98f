"""RMSNorm of a few tokens, against fp64."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.kernels import rms_norm as module
from hf_sparse.kernels.rms_norm import reference, rms_norm
from tests.helpers.kernels import WAYS, use_way


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    use_way(monkeypatch, module, request.param)
    return request.param


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("features", [1, 7, 31, 64, 129, 640, 2000])
def test_matches_fp64(way, features, offset):
    weight = torch.randn(features)
    for rows in (0, 1, 3):
        x = torch.randn(rows, features) * torch.tensor([1.0, 1e-3, 1e3])[:rows, None]
        exact = reference(x.double(), weight.double(), 1e-6, offset)
        torch.testing.assert_close(rms_norm(x, weight, 1e-6, offset).double(), exact, rtol=2e-6, atol=1e-7)


def test_a_row_of_zeros_is_divided_by_eps_alone(way):
    assert not rms_norm(torch.zeros(2, 9), torch.ones(9), 1e-6).any()


def test_nan_and_infinity_stay_in_their_row(way):
    x = torch.ones(3, 16)
    x[0, 3], x[2, 5] = torch.nan, torch.inf
    found, expected = rms_norm(x, torch.ones(16), 1e-6), reference(x, torch.ones(16), 1e-6, 0.0)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_leading_shapes_strides_and_types(way):
    weight = torch.randn(60)[::2]
    for x in (torch.randn(30), torch.randn(2, 3, 30), torch.randn(60, 4).T[:, ::2], torch.randn(1, 30).expand(4, 30)):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference(x, weight, 1e-6, 0.0))
        found = rms_norm(x.double(), weight.double(), 1e-6, 1.0)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, reference(x.double(), weight.double(), 1e-6, 1.0))


def test_refuses_what_does_not_fit_and_what_needs_a_derivative(way):
    with pytest.raises(BackendError, match=r"got \(3,\) for an input of shape \(2, 4\)"):
        rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(BackendError, match="no backward"):
        rms_norm(torch.ones(2, 4, requires_grad=True), torch.ones(4), 1e-6)
    x = torch.ones(2, 4)
    with pytest.raises(BackendError, match="no backward"):
        torch.func.grad(lambda each: rms_norm(each, torch.ones(4), 1e-6).sum())(x)


def test_vmap_and_fake_tensors(way):
    x, weight = torch.randn(5, 2, 8), torch.randn(8)
    found = torch.vmap(lambda each: rms_norm(each, weight, 1e-6))(x)
    torch.testing.assert_close(found, reference(x, weight, 1e-6, 0.0))
    assert rms_norm(x.to("meta"), weight.to("meta"), 1e-6).shape == x.shape
