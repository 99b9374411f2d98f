"""The int8 products: exact on whole numbers, within a proven bound of fp64 on others; C++ and plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.errors import BackendError
from hf_sparse.kernels import int8_ops as int8
from hf_sparse.kernels import pack_int8, unpack_int8
from hf_sparse.kernels import reference as fallback
from hf_sparse.kernels.int8_layout import ROWS
from hf_sparse.kernels.types import ACTIVATIONS
from tests.helpers.kernels import int8_ways, odd_inputs, sparse

NATIVE = int8_ways()
SHAPES = [(1, 1), (3, 130), (33, 129), (64, 256), (45, 301)]
TOKENS = (1, 2, 9, 16, 17, 33, 64, 65, 130)


@pytest.fixture(params=["torch", *NATIVE])
def way(request, monkeypatch):
    monkeypatch.setattr(int8, "native", lambda: NATIVE.get(request.param))
    return request.param


def whole(rows: int, width: int, zeros: float) -> Tensor:
    """Make whole numbers whose rows are all zero or have 127 for the largest: what no rounding changes."""
    made = torch.randint(-127, 128, (rows, width)).float() * (torch.rand(rows, width) >= zeros)
    made[:, 0] = torch.where((made != 0).any(dim=1), -127.0, 0.0)
    return made


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_numbers_give_exactly_the_dense_product(way, rows, shape):
    out, width = shape
    for tokens in TOKENS:
        for zeros in (0.0, 0.9, 1.0):
            weight, x = whole(out, width, zeros), whole(tokens, width, 0.1)
            bias = torch.randint(-9, 9, (out,)).float()
            found = int8.int8_linear(x, pack_int8(weight, rows), bias)
            assert torch.equal(found.double(), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_against_fp64_is_within_half_a_step_of_each_factor(way, rows, shape):
    out, width = shape
    for tokens in (1, 17, 130):
        weight, x = sparse(out, width, 0.7), torch.randn(tokens, width) * torch.rand(tokens, 1) * 100
        found = int8.int8_linear(x, pack_int8(weight, rows)).double()
        x, weight = x.double(), weight.double()
        x_half = x.abs().amax(1, keepdim=True) / 254
        w_half = weight.abs().amax(1) / 254
        kept = (weight != 0).double()
        bound = x_half * weight.abs().sum(1) + (x.abs() @ kept.T) * w_half + x_half * w_half * kept.sum(1)
        assert bool(((found - F.linear(x, weight)).abs() <= bound * 1.0001 + 1e-30).all())


def test_packing_rounds_to_the_nearest_step_and_keeps_zeros():
    weight = sparse(45, 301, 0.6)
    for rows in ROWS:
        found = unpack_int8(pack_int8(weight, rows))
        assert not found[weight == 0].any()
        step = weight.abs().amax(1, keepdim=True) / 127
        assert bool(((found - weight).abs() <= step * 0.5001).all())


def test_packing_takes_less_than_half_of_the_fp32_values():
    weight = sparse(256, 256, 0.75).view(64, 4, 256)[:, :1].repeat(1, 4, 1).view(256, 256)
    assert pack_int8(weight, 4).nbytes < weight.count_nonzero() * 4 / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_fp64(way, activation):
    weight, x = torch.eye(37), torch.linspace(-12, 12, 40 * 37).view(40, 37)
    plain = int8.int8_linear(x, pack_int8(weight))
    found = int8.int8_linear(x, pack_int8(weight), None, activation)
    torch.testing.assert_close(found.double(), fallback.activate(plain.double(), activation), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [(1, 4), (4, 2), (2, 1)])
def test_feed_forward_is_its_products_one_by_one(way, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width, hidden, out in ((50, 131, 33), (128, 300, 128), (7, 1, 3)):
            up, gate = (pack_int8(sparse(hidden, width, 0.8), rows[0]) for _ in range(2))
            down, b, c = pack_int8(sparse(out, hidden, 0.8), rows[1]), torch.randn(hidden), torch.randn(out)
            sizes = (hidden, out, width)
            for tokens in (0, 1, 16, 17, 64, 65, 200):
                x = torch.randn(tokens, width)
                found = torch.ops.hf_sparse.int8_ffn(
                    x, *up.parts, b, *down.parts, c, up.rows, down.rows, *sizes, "gelu"
                )
                assert torch.equal(found, int8.int8_linear(int8.int8_linear(x, up, b, "gelu"), down, c))
                found = torch.ops.hf_sparse.int8_gated_ffn(
                    *(x, *gate.parts, None, *up.parts, None, *down.parts, None),
                    *(gate.rows, up.rows, down.rows, *sizes, "silu"),
                )
                gated = int8.int8_linear(x, gate, None, "silu") * int8.int8_linear(x, up)
                assert torch.equal(found, int8.int8_linear(gated, down))
    finally:
        torch.set_num_threads(before)


def test_leading_shapes_zero_batches_and_strides(way):
    weight = sparse(20, 30, 0.5)
    packed = pack_int8(weight, 2)
    for x in odd_inputs():
        found = int8.int8_linear(x, packed)
        assert found.shape == (*x.shape[:-1], 20)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=0.05, atol=0.2)


def test_weights_without_outputs_or_inputs(way):
    assert int8.int8_linear(torch.randn(5, 7), pack_int8(torch.zeros(0, 7))).shape == (5, 0)
    found = int8.int8_linear(torch.randn(5, 0), pack_int8(torch.zeros(3, 0)), torch.ones(3))
    assert torch.equal(found, torch.ones(5, 3))


def test_a_token_that_is_not_finite_gives_nan_and_its_neighbours_do_not(way):
    weight, x = sparse(9, 40, 0.5), torch.randn(70, 40)
    x[3, 5], x[20, 39], x[69, 0] = float("nan"), float("inf"), float("-inf")
    found = int8.int8_linear(x, pack_int8(weight)).isnan()
    assert found[[3, 20, 69]].all()
    assert found.sum() == 3 * 9


def test_tiny_and_huge_numbers(way):
    weight = torch.eye(4) * torch.tensor([1e-38, 1e-20, 1.0, 1e30])
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e-38, 0.0, 0.0, 1e-38], [1e3, 1e3, 1e3, 1e3]])
    found = int8.int8_linear(x, pack_int8(weight, 1))
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1e-17, 1e3, 1e33]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("part", "value"), [("pointers", -1), ("pointers", 10**6), ("columns", 41)])
def test_hostile_weights_are_refused(way, part, value):
    if way == "torch":
        pytest.skip("plain torch reads nothing outside of its tensors")
    packed = pack_int8(sparse(8, 41, 0.5))
    getattr(packed, part).view(torch.int16 if part == "columns" else torch.int32).flatten()[2] = value
    with pytest.raises(BackendError, match="lead outside"):
        int8.int8_linear(torch.randn(3, 41), packed)


def test_packing_refuses_what_int8_cannot_say():
    for weight, said in (
        (torch.zeros(3), "shape"),
        (torch.zeros(3, 3, dtype=torch.float64), "float64"),
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.zeros(1, 65_537), "65537"),
    ):
        with pytest.raises(BackendError, match=said):
            pack_int8(weight)
    with pytest.raises(BackendError, match="8 rows"):
        pack_int8(torch.zeros(8, 8), 8)


def test_products_refuse_gradients_wrong_widths_and_parts_that_do_not_fit(way):
    packed = pack_int8(sparse(8, 41, 0.5))
    with pytest.raises(BackendError, match="no backward"):
        int8.int8_linear(torch.randn(3, 41, requires_grad=True), packed)
    with pytest.raises(BackendError, match="41 inputs"):
        int8.int8_linear(torch.randn(3, 40), packed)
    with pytest.raises(BackendError, match="scales"):
        torch.ops.hf_sparse.int8_linear(
            torch.randn(3, 41), *packed.parts[:3], packed.scales[:3], packed.offsets, None, 4, 8, 41, "none"
        )


def test_other_types_are_computed_in_torch():
    weight, x = sparse(9, 20, 0.5), torch.randn(4, 20)
    for dtype in (torch.float64, torch.bfloat16):
        y = int8.int8_linear(x.to(dtype), pack_int8(weight))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=5e-2, atol=1e-1)


def test_operators_pass_the_checks_of_torch(way):
    up, down = pack_int8(sparse(12, 20, 0.5), 2), pack_int8(sparse(6, 12, 0.5), 4)
    x = torch.randn(3, 20)
    torch.library.opcheck(torch.ops.hf_sparse.int8_linear.default, (x, *up.parts, torch.randn(12), 2, 12, 20, "gelu"))
    torch.library.opcheck(
        torch.ops.hf_sparse.int8_ffn.default, (x, *up.parts, None, *down.parts, None, 2, 4, 12, 6, 20, "relu")
    )
    torch.library.opcheck(
        torch.ops.hf_sparse.int8_gated_ffn.default,
        (x, *up.parts, None, *up.parts, None, *down.parts, None, 2, 2, 4, 12, 6, 20, "gelu_tanh"),
    )


def test_threads_change_nothing(way):
    packed, before = pack_int8(sparse(100, 70, 0.7)), torch.get_num_threads()
    try:
        for tokens in (1, 30, 300):
            x, found = torch.randn(tokens, 70), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(int8.int8_linear(x, packed))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)
