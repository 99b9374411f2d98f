"""Weights an operator has met before: the same numbers, whatever happens to their tensors between two calls."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.errors import BackendError
from hf_sparse.kernels import KERNELS
from hf_sparse.kernels.known_weights import KnownWeights
from hf_sparse.kernels.library import NativeOps
from tests.helpers.kernels import NATIVE, sparse

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built")

WIDTH, HIDDEN, HEADS = 16, 40, 2
FORMATS = ["cpu", "int8"]
NAMES = ["linear", "ffn", "gated_ffn", "ffn_norm", "attention", "attention_norm"]
SHAPES = {
    "linear": [(WIDTH, WIDTH)],
    "ffn": [(HIDDEN, WIDTH), (WIDTH, HIDDEN)],
    "gated_ffn": [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)],
    "ffn_norm": [(HIDDEN, WIDTH), (WIDTH, HIDDEN)],
    "attention": [(3 * WIDTH, WIDTH)],
    "attention_norm": [(3 * WIDTH, WIDTH), (WIDTH, WIDTH)],
}
SIZES: dict[str, tuple[Any, ...]] = {
    "linear": (4, WIDTH, WIDTH, "none"),
    "ffn": (4, 4, HIDDEN, WIDTH, WIDTH, "gelu"),
    "gated_ffn": (4, 4, 4, HIDDEN, WIDTH, WIDTH, "silu"),
    "ffn_norm": (4, 4, HIDDEN, WIDTH, "gelu"),
    "attention": (4, 3 * WIDTH, WIDTH, HEADS, 0.3),
    "attention_norm": (4, 4, WIDTH, WIDTH, HEADS, 0.3),
}


class Call:
    """An operator and its arguments.

    Attributes:
        weights: the tensors of each weight.
        biases: of each.
        norm: weight and bias of the layer norm, or nothing.
    """

    def __init__(self, kernel: str, name: str) -> None:
        self.name, self.operator = name, KERNELS[kernel].fused[name]
        self.weights = [list(KERNELS[kernel].layout.pack(0.3 * sparse(*shape, 0.5), 4)) for shape in SHAPES[name]]
        self.biases: list[Tensor | None] = [torch.randn(shape[0]) for shape in SHAPES[name]]
        self.norm = [torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)] if name.endswith("norm") else []
        self.sizes = SIZES[name]

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        arguments: list[Any] = []
        for parts, bias in zip(self.weights, self.biases, strict=True):
            arguments += [*parts, bias]
        arguments += [*self.norm, 1e-5] if self.norm else []
        arguments += [mask] if self.name.startswith("attention") else []
        out: Tensor = self.operator(x, *arguments, *self.sizes)
        return out

    def anew(self) -> Call:
        """Return the same call of copies, which no operator has seen."""
        twin = object.__new__(Call)
        twin.name, twin.operator, twin.sizes = self.name, self.operator, self.sizes
        twin.weights = [[part.clone() for part in parts] for parts in self.weights]
        twin.biases = [None if bias is None else bias.clone() for bias in self.biases]
        twin.norm = [part.clone() for part in self.norm]
        return twin


@pytest.fixture(params=[(kernel, name) for kernel in FORMATS for name in NAMES if name in KERNELS[kernel].fused])
def call(request: pytest.FixtureRequest) -> Call:
    return Call(*request.param)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record at each call of an operator whether its weights were known."""
    results: list[bool] = []
    find: Callable[..., Any] = KnownWeights.find

    def recorded(self: KnownWeights, arguments: tuple[Any, ...]) -> Any:
        described = find(self, arguments)
        results.append(described is not None)
        return described

    monkeypatch.setattr(KnownWeights, "find", recorded)
    return results


def x_of(length: int = 5) -> Tensor:
    return torch.randn(2, length, WIDTH)


def test_second_call_gives_the_bits_of_the_first(call: Call, found: list[bool]) -> None:
    for length in (1, 5, 20, 40):
        x = x_of(length)
        first = call.anew()(x)
        assert torch.equal(call(x), first)
        assert torch.equal(call(x), first)
    assert found == [False, False, True, *[False, True, True] * 3]


def test_biases_of_any_kind_compute_as_in_the_first_call(call: Call, found: list[bool]) -> None:
    x, size = x_of(), len(call.biases[0])  # type: ignore[arg-type]
    call(x)
    for bias in (None, torch.randn(size), torch.randn(size, dtype=torch.float64), torch.randn(size, 2)[:, 0]):
        call.biases[0] = bias
        found.clear()
        assert torch.equal(call(x), call.anew()(x))
        assert found == [True, False]


def test_layers_met_without_a_bias_take_one(call: Call) -> None:
    x, biases = x_of(), call.biases
    call.biases = [None] * len(biases)
    call(x)
    call.biases = biases
    assert torch.equal(call(x), call.anew()(x))


def test_what_tensors_hold_is_read_at_each_call(call: Call, found: list[bool]) -> None:
    x = x_of()
    before = call(x)
    call.weights[-1][0].zero_()
    for part in (*call.biases, *call.norm):
        assert part is not None
        part.mul_(2.0)
    after = call(x)
    assert found[-1]
    assert not torch.equal(before, after)
    assert torch.equal(after, call.anew()(x))


def test_tensors_that_are_replaced_are_described_anew(call: Call) -> None:
    x = x_of()
    expected = call(x)
    for part in [part for parts in call.weights for part in parts] + [*call.biases, *call.norm]:
        assert part is not None
        moved = part.data
        part.data = part.clone()
        moved.fill_(1)  # nobody reads it any more
        assert torch.equal(call(x), expected)
    call.weights[0][0].data = call.weights[0][0][:1].clone()
    with pytest.raises(BackendError, match="make it with"):
        call(x)


def test_tensors_at_the_same_place_that_are_read_otherwise_are_described_anew(call: Call) -> None:
    """As a cast away and back may leave them: the same object and address, in another type, stride or shape."""
    x, size = x_of(), SHAPES[call.name][0][0]
    wide = torch.randn(4 * size).bfloat16().view(torch.float32)  # finite in both types
    bias = wide[:size]
    call.biases[0] = bias
    call(x)
    bias.data = wide[::2]
    assert torch.equal(call(x), call.anew()(x))
    bias.data = wide[:size].view(torch.bfloat16)[:size]
    assert torch.equal(call(x), call.anew()(x))
    bias.data = wide[: size - 1]
    with pytest.raises(BackendError, match="`bias` must be"):
        call(x)
    bias.data = wide[:size]
    if call.norm:
        wide = torch.randn(2 * WIDTH)
        call.norm[0] = wide[:WIDTH]
        call(x)
        call.norm[0].data = wide[::2]
        assert torch.equal(call(x), call.anew()(x))
        call.norm[0].data = wide[: WIDTH - 1]
        with pytest.raises(BackendError, match="layer norm must have"):
            call(x)
        call.norm[0].data = wide[:WIDTH]
    call(x)
    values = call.weights[0][0]
    values.data = values.data[:1]
    with pytest.raises(BackendError, match="make it with"):
        call(x)


def test_known_weights_refuse_what_others_refuse(call: Call) -> None:
    call(x_of())
    for wrong in (torch.randn(2, 5, WIDTH + 1), torch.ones(2, 5, WIDTH, dtype=torch.int64)):
        with pytest.raises(BackendError, match="`x` must be"):
            call(wrong)
    with pytest.raises(BackendError, match="no backward"):
        call(x_of().requires_grad_())
    if call.name.startswith("attention"):
        with pytest.raises(BackendError, match="a mask of shape"):
            call(x_of(), torch.zeros(2, 1, 5, 4))
        with pytest.raises(BackendError, match="`x` of an attention"):
            call(torch.randn(5, WIDTH))
        call.sizes = (*call.sizes[:-2], HEADS + 1, 0.3)
        with pytest.raises(BackendError, match="`heads` must divide"):
            call(x_of())
    else:
        call.sizes = (*call.sizes[:-1], "tanh")
        with pytest.raises(BackendError, match="`activation` must be"):
            call(x_of())
    call.sizes, call.biases[0] = SIZES[call.name], torch.randn(7)
    with pytest.raises(BackendError, match="`bias` must be"):
        call(x_of())


def test_other_constants_are_not_those_of_before(call: Call) -> None:
    x = x_of()
    before = call(x)
    changed = ("relu",) if isinstance(call.sizes[-1], str) else (0.9,)
    call.sizes = (*call.sizes[:-1], *changed)
    after = call(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, call.anew()(x))


def test_other_types_and_transforms_compute_as_before(call: Call) -> None:
    x = x_of()
    expected = call(x)
    halves = KERNELS["cpu"].fused["linear"] is call.operator and call(x.to(torch.bfloat16))
    if isinstance(halves, Tensor):
        assert halves.dtype == torch.bfloat16
        torch.testing.assert_close(halves.float(), expected, atol=0.1, rtol=0.1)
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(call)(several)[0], expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_gone_are_forgotten(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[dict[int, Any]] = []
    add: Callable[..., None] = KnownWeights.add

    def recorded(self: KnownWeights, *arguments: Any) -> None:
        add(self, *arguments)
        known.append(self._known)

    monkeypatch.setattr(KnownWeights, "add", recorded)
    twin = call.anew()
    twin(x_of())
    key = id(twin.weights[0][0])
    assert key in known[-1]
    del twin.weights[0][0]
    gc.collect()
    assert key not in known[-1]
    for _ in range(30):  # tensors that take the place of others
        assert torch.equal(call.anew()(torch.ones(1, 3, WIDTH)), call(torch.ones(1, 3, WIDTH)))


def test_a_change_while_weights_are_described_is_not_remembered(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    x = x_of()
    describe = NativeOps.describe

    def changed(self: NativeOps, *arguments: Any) -> Any:
        described = describe(self, *arguments)
        for bias in call.biases:
            assert bias is not None
            bias.data = bias.data + 1.0
        return described

    with monkeypatch.context() as patch:
        patch.setattr(NativeOps, "describe", changed)
        call(x)
    assert torch.equal(call(x), call.anew()(x))


def test_threads_with_biases_of_their_own_do_not_mix_them(call: Call) -> None:
    x, size = x_of(), len(call.biases[0])  # type: ignore[arg-type]
    twins = [call.anew() for _ in range(4)]
    for twin in twins:
        twin.biases[0] = torch.randn(size)
    expected = [twin(x) for twin in twins]
    for twin in twins:
        twin.weights, twin.norm, twin.biases[1:] = call.weights, call.norm, call.biases[1:]

    def calls(number: int) -> bool:
        with torch.inference_mode():
            return all(torch.equal(twins[number](x), expected[number]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))
