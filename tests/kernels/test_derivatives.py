"""Operators without a derivative refuse what needs one, in every mode of autograd; the dense one is right in all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_sparse.errors import BackendError
from hf_sparse.kernels import csr_op, fp32_ops, int8_ops, pack, pack_int8
from hf_sparse.kernels.dense_gemv import FEW, dense_linear
from hf_sparse.kernels.gpu.block_sparse import block_sparse_linear, pack_blocks
from hf_sparse.kernels.gpu.semi_structured import semi_structured_linear
from hf_sparse.kernels.gpu.semi_structured_layout import pack_semi_structured
from hf_sparse.kernels.types import Norm

SIZE = 32
SQUARE, QKV = torch.eye(SIZE), torch.eye(SIZE).repeat(3, 1)


def _calls() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return a call of every operator: (x, bias) -> output."""
    norm = Norm(torch.ones(SIZE), None, 1e-5)
    a, b, c, d = pack(SQUARE), pack(QKV), pack_int8(SQUARE), pack_int8(QKV)
    parts, blocks = csr_op.pack(SQUARE), pack_blocks(SQUARE, 16, 16)
    half = pack_semi_structured(SQUARE.repeat(1, 2).to(torch.float16))
    return {
        "linear": lambda x, bias: fp32_ops.linear(x, a, bias),
        "ffn": lambda x, bias: fp32_ops.ffn(x, a, None, a, bias),
        "gated_ffn": lambda x, bias: fp32_ops.gated_ffn(x + 0 * bias, a, a, a),
        "attention": lambda x, bias: fp32_ops.attention(x, b, bias.repeat(3), 2),
        "ffn_norm": lambda x, bias: fp32_ops.ffn_norm(x, a, None, a, bias, norm),
        "attention_norm": lambda x, bias: fp32_ops.attention_norm(x, b, None, a, bias, norm, 2),
        "int8_linear": lambda x, bias: int8_ops.int8_linear(x, c, bias),
        "int8_attention": lambda x, bias: int8_ops.int8_attention(x, d, bias.repeat(3), 2),
        "int8_ffn_norm": lambda x, bias: int8_ops.int8_ffn_norm(x, c, bias, c, None, norm),
        "int8_attention_norm": lambda x, bias: int8_ops.int8_attention_norm(x, d, None, c, bias, norm, 2),
        "csr": lambda x, bias: csr_op.csr_linear(x, *parts, bias, SIZE, SIZE),
        "block_sparse": lambda x, bias: block_sparse_linear(x[0], *blocks, bias, SIZE),
        "semi_structured": lambda x, bias: semi_structured_linear(
            x[0].repeat(1, 2).half(), half.values.view(torch.uint8), half.meta, bias.half(), SIZE
        ),
    }


CALLS = _calls()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("length", [3, 20])
def test_tangent_of_input_or_bias_is_refused(name: str, which: int, length: int) -> None:
    inputs = [torch.randn(1, length, SIZE), torch.randn(SIZE)]
    with forward_ad.dual_level(), torch.no_grad():
        CALLS[name](*inputs)  # nothing has a tangent
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(BackendError, match="derivative"):
            CALLS[name](*inputs)


@pytest.mark.parametrize("name", CALLS)
def test_functional_transforms_are_refused(name: str) -> None:
    x, bias = torch.randn(1, 20, SIZE), torch.randn(SIZE)
    with pytest.raises(BackendError, match="derivative"):
        torch.func.jvp(lambda one: CALLS[name](one, bias), (x,), (torch.ones_like(x),))
    with pytest.raises(BackendError, match="derivative"):
        torch.func.grad(lambda one: CALLS[name](one, bias).sum().float())(x)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_is_refused(name: str) -> None:
    x, bias = torch.randn(1, 20, SIZE), torch.randn(SIZE, requires_grad=True)
    with pytest.raises(BackendError, match="derivative"):
        CALLS[name](x, bias)
    with torch.no_grad():
        CALLS[name](x, bias)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_forward_mode_derivative_of_a_dense_layer_is_that_of_torch(tokens: int) -> None:
    x, weight, bias = torch.randn(tokens, 6), torch.randn(5, 6), torch.randn(5)
    tangents = (torch.randn(tokens, 6), torch.randn(5, 6), torch.randn(5))
    found = torch.func.jvp(dense_linear, (x, weight, bias), tangents)
    expected = torch.func.jvp(torch.nn.functional.linear, (x, weight, bias), tangents)
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level(), torch.no_grad():
        out = forward_ad.unpack_dual(dense_linear(forward_ad.make_dual(x, tangents[0]), weight)).tangent
        assert out is not None
        torch.testing.assert_close(out, tangents[0] @ weight.T)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_that_need_no_derivative_of_an_operator_are_right() -> None:
    packed, x, z = pack(2 * torch.eye(4)), torch.randn(3, 4), torch.randn(2, 3, 4)
    func = torch.func

    def double(y: Tensor) -> Tensor:
        return fp32_ops.linear(y, packed)

    assert torch.equal(func.vmap(double)(x), 2 * x)
    assert torch.equal(func.vmap(func.vmap(double))(z), 2 * z)
    assert torch.equal(func.grad(lambda y: (y * double(y.detach())).sum())(x), 2 * x)
    assert torch.equal(func.vmap(func.grad(lambda y: (y * double(y.detach())).sum()))(x), 2 * x)
    assert torch.equal(func.jvp(lambda y: y * func.vmap(double)(x), (x,), (x,))[1], 2 * x * x)
    with pytest.raises(BackendError, match="derivative"):
        func.vmap(lambda y: func.jvp(double, (y,), (y,))[1])(x)
    with pytest.raises(BackendError, match="derivative"):
        torch.ops.hf_sparse.dense_linear(x, x, None) + func.jacfwd(
            lambda y: torch.ops.hf_sparse.dense_linear(y, x, None)
        )(x)
