"""What every kernel of the registry promises. Each test is a function of one kernel, so that others can call it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sparse import SparsityConfig, sparsify
from hf_sparse.errors import BackendError, PatternError
from hf_sparse.kernels import KERNELS, Kernel
from hf_sparse.kernels.types import ACTIVATIONS

SHAPES = ((1, 1), (45, 301), (64, 128), (3, 130))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def pruned(kernel: Kernel, out: int, width: int, zeros: float) -> Tensor:
    """Return a weight of the pattern of a kernel, one of its output rows empty, in the first of its types."""
    layer = nn.Linear(width, out, bias=False)
    if kernel.pattern is not None:
        sparsify(nn.Sequential(layer), SparsityConfig(targets="*", sparsity=0.5, pattern=kernel.pattern))
    weight = layer.weight.detach() * width**0.5 * (torch.rand(out, width) >= zeros)
    if out > 2:
        weight[out // 2] = 0.0
    return weight.to(kernel.dtypes[0])


def weights(kernel: Kernel) -> Iterator[tuple[Tensor, int]]:
    """Yield weights of every shape that the kernel takes, with every block height."""
    found = False
    for (out, width), zeros in itertools.product(SHAPES, (0.5, 0.9, 1.0)):
        try:
            weight = pruned(kernel, out, width, zeros)
        except PatternError:
            continue
        if kernel.guard(weight) is None:
            found = True
            yield from ((weight, rows) for rows in kernel.heights)
    assert found, f"the kernel '{kernel.name}' takes a weight of none of the shapes {SHAPES}"


def call(kernel: Kernel, x: Tensor, weight: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """Pack a weight and multiply by it."""
    return kernel.op(x, *kernel.layout.pack(weight, rows), bias, rows, *weight.shape)


def unpacked(kernel: Kernel, weight: Tensor, rows: int) -> Tensor:
    """Pack a weight and unpack it."""
    return kernel.layout.unpack(kernel.layout.pack(weight, rows), rows, *weight.shape)


def test_layout_restores_the_weight(kernel: Kernel) -> None:
    for weight, rows in weights(kernel):
        before = weight.clone()
        parts = kernel.layout.pack(weight, rows)
        assert len(parts) == len(kernel.layout.parts)
        restored = kernel.layout.unpack(parts, rows, *weight.shape)
        assert torch.equal(weight, before)
        assert restored.shape == weight.shape
        if kernel.exact:
            assert torch.equal(restored, weight)
        else:
            largest = weight.abs().amax(1, keepdim=True)
            assert bool(((restored - weight).abs() <= kernel.error * 1.001 * largest).all())
        assert not restored[weight == 0].any()


def test_layout_of_a_transposed_weight_is_that_of_its_copy(kernel: Kernel) -> None:
    for weight, rows in weights(kernel):
        scattered = weight.t().contiguous().t()
        if kernel.guard(scattered) is not None:
            continue  # it takes contiguous weights alone
        copy = kernel.layout.pack(weight, rows)
        for part, expected in zip(kernel.layout.pack(scattered, rows), copy, strict=True):
            assert torch.equal(part, expected)


def test_operator_equals_its_reference(kernel: Kernel) -> None:
    for weight, rows in weights(kernel):
        exact = unpacked(kernel, weight, rows).double()
        for lead, biased in itertools.product(((1,), (17,), (2, 35), ()), (False, True)):
            x = torch.randn(*lead, weight.shape[1]).to(weight.dtype)
            bias = torch.randn(weight.shape[0]).to(weight.dtype) if biased else None
            found = call(kernel, x, weight, rows, bias)
            expected = kernel.reference(x.double(), exact, None if bias is None else bias.double())
            assert found.dtype == weight.dtype
            assert found.shape == (*lead, weight.shape[0])
            # A kernel that rounds may round the other way where an input is as far from both steps.
            step = 2 * kernel.error * float(x.abs().max() * exact.abs().max())
            bound = TOLERANCE[weight.dtype] * max(1.0, float(expected.abs().max())) + step
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def test_no_tokens_give_no_outputs(kernel: Kernel) -> None:
    for weight, rows in weights(kernel):
        for lead in ((0,), (2, 0), (0, 3)):
            found = call(kernel, torch.randn(*lead, weight.shape[1]).to(weight.dtype), weight, rows, None)
            assert found.shape == (*lead, weight.shape[0])
            assert found.dtype == weight.dtype


def test_fake_tensors_have_the_shape_of_real_ones(kernel: Kernel) -> None:
    for weight, rows in weights(kernel):
        parts, bias = kernel.layout.pack(weight, rows), torch.zeros(weight.shape[0]).to(weight.dtype)
        for lead in ((), (5,), (2, 0), (2, 3)):
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(part) for part in (*parts, bias)]
                x = torch.empty(*lead, weight.shape[1], dtype=weight.dtype)
                found = kernel.op(x, *fakes, rows, *weight.shape)
            assert found.shape == (*lead, weight.shape[0])
            assert found.dtype == weight.dtype


class _Packed(nn.Module):
    def __init__(self, kernel: Kernel, weight: Tensor, rows: int) -> None:
        super().__init__()
        self.kernel, self.rows, self.shape = kernel, rows, tuple(weight.shape)
        self.parts = kernel.layout.pack(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.op(x, *self.parts, None, self.rows, *self.shape)


def test_exported_program_computes_the_same(kernel: Kernel) -> None:
    weight, rows = list(weights(kernel))[-1]
    module, x = _Packed(kernel, weight, rows), torch.randn(5, weight.shape[1]).to(weight.dtype)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=99)},))
        assert torch.equal(program.module()(x), module(x))
        assert torch.equal(program.module()(x[:3]), module(x[:3]))


def test_guard_refuses_what_it_cannot_take(kernel: Kernel) -> None:
    weight, rows = next(weights(kernel))
    wrong = {
        "matrix": torch.zeros(3, dtype=weight.dtype),
        "weights in": weight.to(torch.complex64),
        "weights on": weight.to("meta"),
    }
    for reason, refused in wrong.items():
        assert reason in str(kernel.refusal(refused))
        with pytest.raises(BackendError, match=reason):
            kernel.pack(refused, rows)
    if kernel.pattern is not None:
        assert kernel.guard(torch.ones_like(weight)) is not None
    if kernel.device == "cpu":
        assert kernel.refusal(weight) is None
        with pytest.raises(BackendError, match="rows"):
            kernel.pack(weight, 7)
        assert kernel.choose_rows(weight) in kernel.heights


def test_derivatives_are_right_or_refused(kernel: Kernel) -> None:
    weight, rows = list(weights(kernel))[-1]
    parts = kernel.layout.pack(weight, rows)
    x, matrix = torch.randn(5, weight.shape[1]).to(weight.dtype), unpacked(kernel, weight, rows)

    def run(one: Tensor) -> Tensor:
        return kernel.op(one, *parts, None, rows, *weight.shape)

    def grad() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run(leaf).sum(), leaf)[0]

    def tangent() -> Tensor:
        return torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]

    ones = torch.ones(5, len(matrix), dtype=weight.dtype)
    expected = {grad: ones @ matrix, tangent: torch.ones_like(x) @ matrix.T}
    for derivative, exact in expected.items():
        try:
            found = derivative()
        except BackendError:
            continue
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_record_is_consistent(kernel: Kernel) -> None:
    assert KERNELS[kernel.name] is kernel
    assert kernel.backend == "" or KERNELS.backends[str(kernel.backend)] is kernel
    assert set(kernel.fused) <= {"linear", "ffn", "gated_ffn", "ffn_norm", "attention", "attention_norm"}
    assert kernel.heights
    assert all(time > 0 for time in kernel.heights.values())
    assert kernel.unavailable() is None or isinstance(kernel.unavailable(), str)


CONTRACT: tuple[Callable[[Kernel], None], ...] = (
    test_layout_restores_the_weight,
    test_layout_of_a_transposed_weight_is_that_of_its_copy,
    test_operator_equals_its_reference,
    test_no_tokens_give_no_outputs,
    test_fake_tensors_have_the_shape_of_real_ones,
    test_exported_program_computes_the_same,
    test_guard_refuses_what_it_cannot_take,
    test_derivatives_are_right_or_refused,
    test_record_is_consistent,
)
"""To be called with a kernel that was registered from elsewhere."""


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


def test_every_promise_is_in_the_contract() -> None:
    apart = {"test_every_promise_is_in_the_contract", "test_names_are_unique", "test_unknown_names_are_refused"}
    apart |= {"test_fused_operators_are_those_of_the_table"}
    named = {name for name in globals() if name.startswith("test_")} - apart
    assert named == {check.__name__ for check in CONTRACT}


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="twice"):
        KERNELS.register(KERNELS["csr"])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BackendError, match="did you mean 'csr'"):
        KERNELS["cst"]


def test_fused_operators_are_those_of_the_table() -> None:
    """A kernel with fused operators has all of them: the runtime asks for one by name."""
    x, norm = torch.randn(1, 20, 32), (torch.ones(32), torch.zeros(32), 1e-5)
    for kernel in (KERNELS[name] for name in KERNELS if KERNELS[name].fused):
        square, qkv = torch.randn(32, 32), torch.randn(96, 32)
        rows = next(iter(kernel.heights))
        one, three = (*kernel.layout.pack(square, rows), None), (*kernel.layout.pack(qkv, rows), None)
        calls = {
            "linear": (*one, rows, 32, 32, ACTIVATIONS[1]),
            "ffn": (*one, *one, rows, rows, 32, 32, 32, ACTIVATIONS[1]),
            "gated_ffn": (*one, *one, *one, rows, rows, rows, 32, 32, 32, ACTIVATIONS[1]),
            "ffn_norm": (*one, *one, *norm, rows, rows, 32, 32, ACTIVATIONS[1]),
            "attention": (*three, None, rows, 96, 32, 2, 0.5),
            "attention_norm": (*three, *one, *norm, None, rows, rows, 32, 32, 2, 0.5),
        }
        for name, arguments in calls.items():
            assert kernel.fused[name](x, *arguments).shape == x.shape
