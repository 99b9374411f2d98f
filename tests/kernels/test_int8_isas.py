"""The int8 operators give the same bits in every instruction set, also where 16 bits do not hold two products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_sparse.kernels import int8_ops, pack_int8
from hf_sparse.kernels.int8_layout import MAX_INPUTS, ROWS
from hf_sparse.kernels.library import Library, NativeOps
from hf_sparse.kernels.types import Int8Weight
from tests.helpers.kernels import NATIVE, int8_ways, sparse
from tests.kernels.test_int8_ops import whole

WAYS = int8_ways()
TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 32, 33, 40, 47, 57, 63, 64, 65, 127, 130)

pytestmark = pytest.mark.skipif(not WAYS, reason="no instruction set here has int8 kernels")


def of_all(compute: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Compute with the kernels of each instruction set."""
    found = {}
    for isa, native in WAYS.items():
        monkeypatch.setattr(int8_ops, "native", lambda native=native: native)
        found[isa] = compute()
    return found


def assert_same_bits(compute: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Check that all give the same, NaN for NaN; return it."""
    found = of_all(compute, monkeypatch)
    first, *others = found.values()
    for isa, other in zip(list(found)[1:], others, strict=True):
        assert torch.equal(first.nan_to_num(nan=1e38), other.nan_to_num(nan=1e38)), isa
        assert torch.equal(first.isnan(), other.isnan()), isa
    return first


def patterned(pattern: str, out: int, width: int) -> Tensor:
    """Return a weight of a pattern."""
    if pattern == "blocks":
        return torch.randn(out, width) * (torch.rand(-(-out // 4), width) < 0.3).repeat_interleave(4, 0)[:out]
    if pattern == "columns":
        return torch.randn(out, width) * (torch.rand(width) < 0.5)
    if pattern == "2:4":
        return torch.randn(out, width) * (torch.arange(width) % 4 < 2)
    return sparse(out, width, float(pattern))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pattern", ["0", "0.5", "0.9", "1", "blocks", "columns", "2:4"])
def test_linear(monkeypatch: pytest.MonkeyPatch, rows: int, pattern: str) -> None:
    for out, width in ((1, 1), (3, 130), (33, 129), (77, 301)):
        packed, bias = pack_int8(patterned(pattern, out, width), rows), torch.randn(out)
        for tokens in TOKENS:
            x = torch.randn(tokens, width) * torch.rand(tokens, 1) * 100
            assert_same_bits(lambda p=packed, x=x, b=bias: int8_ops.int8_linear(x, p, b), monkeypatch)  # type: ignore[misc]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("signs", ["both", "alike"])
def test_largest_sums_of_products_are_exact(monkeypatch: pytest.MonkeyPatch, rows: int, signs: str) -> None:
    """Every weight and input at its largest: 2 * 127 * 127, and 2 * 255 * 127 of inputs stored plus 128."""
    for width in (2, 301, 4096, MAX_INPUTS):
        out, tokens = (9, 35) if width < 5000 else (5, 9)
        weight, x = torch.full((out, width), 127.0), torch.full((tokens, width), 127.0)
        if signs == "both":
            weight, x = weight * torch.randn(out, width).sign(), x * torch.randn(tokens, width).sign()
        exact = (x.double() @ weight.double().T).float()
        for sign in (1, -1):
            packed = pack_int8(sign * weight, rows)
            found = assert_same_bits(lambda p=packed, x=x: int8_ops.int8_linear(x, p), monkeypatch)  # type: ignore[misc]
            assert torch.equal(found, sign * exact)


@pytest.mark.parametrize("rows", [(1, 4), (4, 2), (2, 1)])
def test_feed_forward_without_a_smooth_activation(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]) -> None:
    up, gate = pack_int8(sparse(131, 50, 0.7), rows[0]), pack_int8(sparse(131, 50, 0.7), rows[0])
    down, bias = pack_int8(sparse(33, 131, 0.7), rows[1]), torch.randn(131)
    tail = (*rows, 131, 33, 50)
    for tokens in TOKENS:
        x = torch.randn(tokens, 50)
        x[tokens // 2, 7] = float("inf") if tokens > 1 else 1.0
        for activation in ("none", "relu"):
            assert_same_bits(
                lambda x=x, a=activation: torch.ops.hf_sparse.int8_ffn(  # type: ignore[misc]
                    x, *up.parts, bias, *down.parts, None, *tail, a
                ),
                monkeypatch,
            )
            assert_same_bits(
                lambda x=x, a=activation: torch.ops.hf_sparse.int8_gated_ffn(  # type: ignore[misc]
                    x, *gate.parts, None, *up.parts, bias, *down.parts, None, rows[0], *tail, a
                ),
                monkeypatch,
            )


@pytest.mark.parametrize("rows", ROWS)
def test_attention_differs_by_the_softmax_alone(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    qkv = pack_int8(0.05 * sparse(96, 50, 0.5), rows)
    for length in (16, 17, 33, 40, 64, 65, 130):
        x = torch.randn(2, length, 50)
        found = of_all(lambda x=x: int8_ops.int8_attention(x, qkv, None, 2), monkeypatch)  # type: ignore[misc]
        first, *others = found.values()
        for other in others:
            torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-5)


def test_tokens_that_are_not_finite_or_all_but_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(70, 40)
    x[3, 5], x[20, 39], x[33, 0], x[69, 0] = float("nan"), float("inf"), float("nan"), float("-inf")
    x[5], x[6], x[7], x[8] = 0.0, 1e-38, 1e-30, 3e38
    for rows in ROWS:
        packed = pack_int8(sparse(9, 40, 0.5), rows)
        found = assert_same_bits(lambda p=packed: int8_ops.int8_linear(x, p), monkeypatch)  # type: ignore[misc]
        assert found.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 20, 33, 69]


def test_inputs_halfway_between_steps_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiplication by 127 / largest and the addition are rounded once, as one instruction does."""
    packed = pack_int8(torch.eye(97), 1)
    for largest in (127.0, 0.1, 3.0, 1e-20):
        x = (torch.arange(-127, 128).repeat(97)[: 97 * 254].view(254, 97) + 0.5) / 127 * largest
        x[:, 0] = largest
        assert_same_bits(lambda x=x: int8_ops.int8_linear(x, packed), monkeypatch)  # type: ignore[misc]


def test_the_switch_of_instruction_sets_chooses_the_int8_kernels_too() -> None:
    assert NATIVE is not None
    if "avx2" not in NATIVE.isas:
        pytest.skip("this processor has no AVX2")
    assert isinstance(Library(NATIVE.path, "avx2").int8, NativeOps)
    assert Library(NATIVE.path, "portable").int8 is None
    weight, x = whole(8, 30, 0.5), whole(5, 30, 0.1)
    exact = x @ weight.T
    for native in WAYS.values():
        packed = pack_int8(weight, 4)
        arguments = (*packed.parts, None, packed.rows, 8, 30)
        assert torch.equal(native.linear(x, native.describe([Int8Weight(*arguments)]), "none"), exact)
