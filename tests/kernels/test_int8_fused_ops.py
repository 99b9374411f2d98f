"""Whole sub-blocks in int8: as their parts one by one, and as plain torch from the same rounded numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse.errors import BackendError
from hf_sparse.kernels import PackedInt8, pack_int8
from hf_sparse.kernels import int8_ops as int8
from hf_sparse.kernels import reference as fallback
from hf_sparse.kernels.types import Int8Weight, Norm
from tests.helpers.kernels import masks, sparse
from tests.kernels.test_int8_ops import way, whole  # noqa: F401  `way` is a fixture

LENGTHS = ((0, 20), (2, 0), (1, 1), (2, 15), (1, 16), (2, 17), (3, 17), (3, 33), (2, 64), (1, 65), (4, 65), (1, 130))
SHAPES = ((3, 16, 50), (1, 5, 33), (2, 64, 128))  # heads, size of each, features


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def plainly(x: Tensor, weight: PackedInt8, bias, heads: int, mask: Tensor | None, scale: float) -> Tensor:
    """Compute an attention in fp64, from what x and the weight are rounded to."""
    parts = Int8Weight(*weight.parts, bias, weight.rows, weight.out_features, weight.in_features)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return fallback.attention(int8._matmul(x.double(), parts), heads, mask, scale)


def texts(batch: int, length: int, width: int) -> Tensor:
    """Make inputs that are whole steps, so that rounding does not hang on the last bit of a division."""
    return whole(batch * length, width, 0.1).view(batch, length, width)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_attention_is_that_of_the_same_rounded_numbers(way, threads, rows):  # noqa: F811
    for heads, size, width in SHAPES:
        weight, bias = pack_int8(0.01 * sparse(3 * heads * size, width, 0.8), rows), torch.randn(3 * heads * size)
        for batch, length in LENGTHS:
            x = texts(batch, length, width)
            found = int8.int8_attention(x, weight, bias, heads)
            assert found.shape == (batch, length, heads * size)
            close(found, plainly(x, weight, bias, heads, None, size**-0.5))


@pytest.mark.parametrize("length", [7, 17, 33, 70, 130])
def test_attention_with_a_mask(way, length):  # noqa: F811
    weight, x = pack_int8(0.01 * sparse(48, 30, 0.5), 4), texts(3, length, 30)
    for mask in masks(length):
        close(int8.int8_attention(x, weight, None, 2, mask, 0.3), plainly(x, weight, None, 2, mask, 0.3))


def test_attention_that_may_see_nothing_gives_zeros(way):  # noqa: F811
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., 3, :] = False
    found = int8.int8_attention(torch.randn(1, 20, 30), pack_int8(sparse(48, 30, 0.5)), None, 2, mask)
    assert not found[0, 3].any()
    assert found[0, 4].any()


@pytest.mark.parametrize("rows", [(1, 4), (4, 2), (2, 1)])
def test_whole_sub_blocks_are_their_parts_one_by_one(way, threads, rows):  # noqa: F811
    for heads, size, width in SHAPES:
        inner, hidden = heads * size, 131
        qkv, output = (pack_int8(sparse(3 * inner, width, 0.8), rows[0]), pack_int8(sparse(width, inner, 0.8), rows[1]))
        up, down = pack_int8(sparse(hidden, width, 0.8), rows[0]), pack_int8(sparse(width, hidden, 0.8), rows[1])
        b, c, d = torch.randn(3 * inner), torch.randn(width), torch.randn(hidden)
        for norm in (Norm(torch.randn(width), torch.randn(width), 1e-5), Norm(torch.randn(width), None, 0.1)):
            for batch, length in LENGTHS:
                x = torch.randn(batch, length, width)
                mask = torch.rand(batch, 1, 1, length) < 0.9
                mixed = int8.int8_attention(x, qkv, b, heads, mask, 0.1)
                wanted = fallback.normalize(int8.int8_linear(mixed, output, c), x, norm)
                close(int8.int8_attention_norm(x, qkv, b, output, c, norm, heads, mask, 0.1), wanted)
                made = torch.ops.hf_sparse.int8_ffn(
                    *(x, *up.parts, d, *down.parts, c, up.rows, down.rows, hidden, width, width, "gelu")
                )
                found = int8.int8_ffn_norm(x, up, d, down, c, norm)
                close(found, fallback.normalize(made, x, norm))


def test_one_token_that_is_not_finite_spoils_its_own_sequence_alone(way):  # noqa: F811
    qkv, output, x = pack_int8(sparse(48, 30, 0.5)), pack_int8(sparse(30, 16, 0.5)), torch.randn(2, 70, 30)
    x[1, 66, 3] = float("inf")
    norm = Norm(torch.ones(30), None, 1e-5)
    found = int8.int8_attention_norm(x, qkv, None, output, None, norm, 2)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_other_types_are_computed_in_torch():
    weight, norm = sparse(90, 30, 0.5), Norm(torch.ones(30), None, 1e-5)
    qkv, output, x = pack_int8(weight), pack_int8(torch.eye(30)), torch.randn(2, 20, 30)
    wanted = int8.int8_attention_norm(x, qkv, None, output, None, norm, 3)
    for dtype in (torch.float64, torch.bfloat16):
        typed = Norm(norm.weight.to(dtype), None, 1e-5)
        found = int8.int8_attention_norm(x.to(dtype), qkv, None, output, None, typed, 3)
        assert found.dtype == dtype
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("length", [3, 70])
def test_autocast_around_changes_nothing(way, length):  # noqa: F811
    qkv, output = pack_int8(sparse(90, 30, 0.5)), pack_int8(torch.eye(30))
    norm, x = Norm(torch.ones(30), None, 1e-5), torch.randn(2, length, 30)
    calls = (
        lambda: int8.int8_linear(x, output),
        lambda: int8.int8_attention(x, qkv, None, 3),
        lambda: int8.int8_attention_norm(x, qkv, None, output, None, norm, 3),
        lambda: int8.int8_ffn_norm(x, output, None, output, None, norm),
    )
    for call in calls:
        wanted = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call()
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_gradients_of_what_is_not_the_input_are_refused_too():
    eye, x = pack_int8(torch.eye(30)), torch.randn(20, 30)
    needed, norm = torch.ones(30, requires_grad=True), Norm(torch.ones(30), None, 1e-5)
    for call in (
        lambda: int8.int8_linear(x, eye, needed),
        lambda: int8.int8_ffn_norm(x, eye, None, eye, needed, norm),
        lambda: int8.int8_ffn_norm(x, eye, None, eye, None, Norm(needed, None, 1e-5)),
    ):
        with pytest.raises(BackendError, match="no backward"):
            call()
        with torch.no_grad():
            call()


def test_what_does_not_fit_is_refused():
    qkv, output, x = pack_int8(sparse(48, 30, 0.5)), pack_int8(sparse(30, 16, 0.5)), torch.randn(2, 20, 30)
    up, norm = pack_int8(sparse(16, 30, 0.5)), Norm(torch.ones(30), None, 1e-5)
    with pytest.raises(BackendError, match="5 heads"):
        int8.int8_attention(x, qkv, None, 5)
    with pytest.raises(BackendError, match="batch, length"):
        int8.int8_attention(x[0], qkv, None, 2)
    with pytest.raises(BackendError, match="a mask of shape"):
        int8.int8_attention(x, qkv, None, 2, torch.zeros(2, 1, 1, 19))
    with pytest.raises(BackendError, match="layer norm"):
        int8.int8_attention_norm(x, qkv, None, output, None, Norm(torch.ones(29), None, 1e-5), 2)
    with pytest.raises(BackendError, match="layer norm"):
        int8.int8_ffn_norm(x, up, None, output, None, Norm(torch.ones(29), None, 1e-5))
    with pytest.raises(BackendError, match="no backward"):
        int8.int8_attention(x.requires_grad_(), qkv, None, 2)
    with pytest.raises(BackendError, match="of an int8 weight of shape"):
        int8.int8_attention_norm(x.detach(), qkv, None, qkv, None, norm, 2)


def test_hostile_weights_are_refused(way):  # noqa: F811
    if way == "torch":
        pytest.skip("plain torch reads nothing outside of its tensors")
    for bad in (0, 1):
        weights = [pack_int8(sparse(48, 30, 0.5)), pack_int8(sparse(30, 16, 0.5))]
        weights[bad].pointers[2] = 10**6
        with pytest.raises(BackendError, match="lead outside"):
            int8.int8_attention_norm(
                torch.randn(2, 20, 30), weights[0], None, weights[1], None, Norm(torch.ones(30), None, 1e-5), 2
            )


def test_operators_pass_the_checks_of_torch(way):  # noqa: F811
    qkv, output, x = pack_int8(sparse(48, 30, 0.5), 2), pack_int8(sparse(30, 16, 0.5), 4), torch.randn(2, 17, 30)
    up, norm, mask = (
        pack_int8(sparse(16, 30, 0.5), 1),
        Norm(torch.randn(30), torch.randn(30), 1e-5),
        torch.ones(2, 1, 1, 17),
    )
    torch.library.opcheck(
        torch.ops.hf_sparse.int8_attention.default, (x, *qkv.parts, torch.randn(48), mask > 0, 2, 48, 30, 2, 0.5)
    )
    torch.library.opcheck(
        torch.ops.hf_sparse.int8_attention_norm.default,
        (x, *qkv.parts, None, *output.parts, torch.randn(30), *norm, mask, 2, 4, 16, 30, 2, 0.5),
    )
    torch.library.opcheck(
        torch.ops.hf_sparse.int8_ffn_norm.default,
        (x, *up.parts, torch.randn(16), *output.parts, None, *norm, 1, 4, 16, 30, "gelu"),
    )
