"""RMSNorm modules of models in runtime form: recognised by what they compute, and left alone where they do more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_sparse import SparsityConfig, sparsify, to_dense_runtime, to_runtime
from hf_sparse.kernels.rms_norm import rms_norm as operator
from hf_sparse.runtime import rms_norm
from hf_sparse.runtime.rms_norm import MOST, FewTokenRMSNorm, use_operator
from tests.helpers.kernels import NATIVE
from tests.helpers.oneshot import gemma, llama
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

pytestmark = pytest.mark.skipif(NATIVE is None, reason="needs the C++ kernels")


def pruned(build: Any) -> Any:
    model = build().float()
    sparsify(model, SparsityConfig(sparsity=0.5))
    return model.eval()


def normed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FewTokenRMSNorm)]


@pytest.mark.parametrize(("build", "count"), [(llama, 2 * 3 + 1), (gemma, 6 * 4 + 1)])
def test_all_norms_of_a_decoder_compute_the_same(build: Any, count: int) -> None:
    model = pruned(build)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.normal_()
    ids = torch.randint(3, 50, (2, 5))
    expected = answers(model, {"input_ids": ids})
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, **options)
    to_runtime(model, "bitmask")
    assert len(normed(model)) == count
    torch.testing.assert_close(answers(model, {"input_ids": ids}), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(ids, **options), generated)
    to_dense_runtime(model)
    assert not normed(model)
    assert torch.equal(answers(model, {"input_ids": ids}), expected)


def test_t5_has_them_too_and_bert_has_none() -> None:
    model = sparse("t5", 0.5)
    inputs = batch("t5")
    expected = answers(model, inputs)
    to_runtime(model, "bitmask")
    assert normed(model)
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    plain = sparse("t5", 0.5)
    to_runtime(plain, "cpu")
    assert not normed(plain), "whole sequences: torch"


def test_a_weight_that_changes_later_counts() -> None:
    model = pruned(llama)
    to_runtime(model, "bitmask")
    norm: Any = normed(model)[0]
    x = torch.randn(2, 32)
    before = norm(x)
    with torch.no_grad():
        norm.weight.mul_(2)
    torch.testing.assert_close(norm(x), 2 * before)


def test_many_tokens_other_types_and_gradients_are_computed_by_the_plain_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pruned(llama)
    to_runtime(model, "bitmask")
    norm = normed(model)[0]
    calls: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return operator(*given)

    monkeypatch.setattr(rms_norm, "rms_norm", counted)
    norm(torch.randn(2, 32))
    assert calls == [1]
    norm(torch.randn(MOST // 32 + 1, 32))
    norm(torch.randn(2, 32).bfloat16())
    x = torch.randn(2, 32, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(torch.randn(2, 32))
    assert calls == [1]


class OtherRMSNorm(nn.Module):
    """What is called a norm, and is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LlamaRMSNorm.forward(self, hidden_states)  # type: ignore[arg-type]


def test_only_what_computes_the_formula_alone_is_taken() -> None:
    hooked, broken, zero = (LlamaRMSNorm(8) for _ in range(3))
    hooked.register_forward_hook(lambda *given: None)
    broken.variance_epsilon = 1  # a whole number
    zero.variance_epsilon = 0.0
    model = nn.ModuleList([LlamaRMSNorm(8), OtherRMSNorm(), hooked, broken, zero, LlamaRMSNorm(8).double()])
    use_operator(model)
    assert [isinstance(each, FewTokenRMSNorm) for each in model] == [True, False, False, False, False, False]


class SummedRMSNorm(OtherRMSNorm):
    """What is called a norm, and is not that one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        squares = hidden_states.pow(2).sum(-1, keepdim=True)
        return hidden_states * torch.rsqrt(squares + self.variance_epsilon) * self.weight


class GatedRMSNorm(OtherRMSNorm):
    """One with a second input."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states)


class FlatRMSNorm(OtherRMSNorm):
    """One that takes inputs of two dimensions alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, _ = hidden_states.shape
        return super().forward(hidden_states)


@pytest.mark.parametrize(
    ("kind", "taken"), [(OtherRMSNorm, True), (SummedRMSNorm, False), (GatedRMSNorm, False), (FlatRMSNorm, False)]
)
def test_classes_of_transformers_are_tried_too(monkeypatch: pytest.MonkeyPatch, kind: Any, taken: bool) -> None:
    monkeypatch.setattr(kind, "__module__", "transformers.models.test")
    model = nn.ModuleList([kind()])
    use_operator(model)
    assert isinstance(model[0], FewTokenRMSNorm) == taken


def test_a_norm_is_called_by_the_name_of_its_input_too() -> None:
    model = pruned(llama)
    to_runtime(model, "bitmask")
    norm, x = normed(model)[0], torch.randn(2, 32)
    torch.testing.assert_close(norm(hidden_states=x), norm(x))


def test_exported_programs_take_any_number_of_tokens() -> None:
    model = pruned(llama)
    to_runtime(model, "bitmask")
    norm, x = normed(model)[0], torch.randn(1, 5, 32)
    with torch.no_grad():
        program = torch.export.export(norm, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", max=4096)},))
        long = torch.randn(1, MOST // 32 + 100, 32)
        torch.testing.assert_close(program.module()(long), norm(long))
