"""Weights in bits that C++ has met before: the same numbers, whatever happens to their tensors between two calls."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.kernels import KERNELS, bitmask
from tests.helpers.kernels import NATIVE, odd_inputs, sparse

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built")

NAMES = ["bitmask", "bitmask-int8", "bitmask-int4"]
OUT, WIDTH = 21, 30


@pytest.fixture(params=NAMES)
def op(request: pytest.FixtureRequest) -> Any:
    kernel = KERNELS[request.param]
    return lambda x, parts, bias=None: kernel.op(x, *parts, bias, 1, OUT, WIDTH)


@pytest.fixture
def parts(request: pytest.FixtureRequest, op: Any) -> tuple[torch.Tensor, ...]:
    made: tuple[torch.Tensor, ...] = KERNELS[request.node.callspec.params["op"]].layout.pack(sparse(OUT, WIDTH, 0.5), 1)
    return made


def anew(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return copies, which no call has seen."""
    return tuple(part.clone() for part in parts)


def test_second_call_gives_the_bits_of_the_first(op: Any, parts: Any) -> None:
    for x in odd_inputs():
        for bias in (None, torch.randn(OUT), torch.randn(OUT, dtype=torch.float64), torch.randn(OUT, 2)[:, 0]):
            first = op(x, anew(parts), bias)
            for _ in range(2):
                assert torch.equal(op(x, parts, bias), first)


def test_what_tensors_hold_is_read_at_each_call(op: Any, parts: Any) -> None:
    x, bias = torch.randn(2, WIDTH), torch.randn(OUT)
    op(x, parts, bias)
    parts[0].zero_()
    bias.add_(1.0)
    assert torch.equal(op(x, parts, bias), op(x, anew(parts), bias.clone()))


def test_tensors_that_are_replaced_are_described_anew(op: Any, parts: Any) -> None:
    x = torch.randn(2, WIDTH)
    expected, zeros = op(x, parts), op(x, [torch.zeros_like(parts[0]), *parts[1:]])
    for number, part in enumerate(parts):
        moved = part.data
        part.data = part.clone()
        moved.fill_(-1)  # nobody reads it any more
        assert torch.equal(op(x, parts), expected), number
    parts[0].data = torch.zeros_like(parts[0])
    assert torch.equal(op(x, parts), zeros)
    parts[0].data = parts[0][:1].clone()
    with pytest.raises(BackendError, match="lead outside"):
        op(x, parts)


def test_known_weights_refuse_what_others_refuse(op: Any, parts: Any) -> None:
    x = torch.randn(2, WIDTH)
    op(x, parts)
    for wrong in (torch.randn(2, WIDTH + 1), torch.tensor(1.0), torch.ones(2, WIDTH, dtype=torch.int64)):
        with pytest.raises(BackendError, match="`x` must be"):
            op(wrong, parts)
    with pytest.raises(BackendError, match="`bias` must be"):
        op(x, parts, torch.randn(OUT + 1))
    with pytest.raises(BackendError, match="no backward"):
        op(x.clone().requires_grad_(), parts)
    kernel = KERNELS["bitmask"]
    with pytest.raises(BackendError, match="do not form a weight"):
        kernel.op(torch.randn(2, WIDTH), *kernel.layout.pack(sparse(OUT, WIDTH, 0.5), 1), None, 1, OUT + 1, WIDTH)


def test_half_precision_and_transforms_compute_as_before(op: Any, parts: Any) -> None:
    x = torch.randn(3, 2, WIDTH)
    expected = op(x, parts)
    torch.testing.assert_close(torch.func.vmap(lambda row: op(row, parts))(x), expected, atol=1e-5, rtol=1e-5)
    halves = op(x.to(torch.bfloat16), parts)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, atol=0.2, rtol=0.1)


def test_weights_that_are_gone_are_forgotten(op: Any, parts: Any) -> None:
    known = bitmask._native.known
    weight = KERNELS["bitmask"].layout.pack(sparse(OUT, WIDTH, 0.5), 1)
    KERNELS["bitmask"].op(torch.randn(WIDTH), *weight, None, 1, OUT, WIDTH)
    key = id(weight[0])
    assert key in known
    kept = weight[0]
    del weight  # the bits and the pointers die, the values do not
    gc.collect()
    assert key not in known
    del kept
    for _ in range(50):  # tensors that take the place of others
        twin = anew(parts)
        assert torch.equal(op(torch.ones(WIDTH), twin), op(torch.ones(WIDTH), copy.deepcopy(twin)))


def test_threads_with_biases_of_their_own_do_not_mix_them(op: Any, parts: Any) -> None:
    x = torch.randn(1, WIDTH)
    biases = [torch.full((OUT,), float(number)) for number in range(8)]
    expected = [op(x, anew(parts), bias) for bias in biases]

    def calls(number: int) -> bool:
        with torch.inference_mode():
            return all(torch.equal(op(x, parts, biases[number]), expected[number]) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))
