"""Layers whose forward calls their feed-forward method itself, without `apply_chunking_to_forward`."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from hf_sparse import SparsityConfig, sparsify, to_dense_runtime, to_runtime
from hf_sparse.kernels import library_status
from hf_sparse.modeling.class_swap import swaps_of
from hf_sparse.runtime.fused_ffn import FusedFeedForward, UnchunkedFeedForward, UnchunkedLayer
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

pytestmark = pytest.mark.skipif(not library_status().available, reason="the C++ kernels are not built")


def mixins(model: nn.Module) -> set[type]:
    """Return what the feed-forward sub-blocks of a model became."""
    return {mixin for module in model.modules() for mixin in swaps_of(module) if issubclass(mixin, FusedFeedForward)}


@pytest.mark.parametrize(
    ("family", "mixin"),
    [("bert", UnchunkedLayer), ("roberta", UnchunkedLayer), ("electra", UnchunkedLayer),
     ("distilbert", UnchunkedFeedForward), ("t5", FusedFeedForward)],
)  # fmt: skip
def test_families_with_chunks_compute_as_before(family: str, mixin: type) -> None:
    model = sparse(family)
    dense, inputs = copy.deepcopy(model), batch(family)
    to_runtime(model, "cpu")
    assert mixins(model) == {mixin}
    torch.testing.assert_close(answers(model, inputs), answers(dense, inputs), atol=1e-5, rtol=1e-5)
    to_dense_runtime(model)
    assert mixins(model) == set()
    assert torch.equal(answers(model, inputs), answers(dense, inputs))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_chunking_is_not_called_where_the_forward_method_is_known(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(family), batch(family)
    calls: list[int] = []

    def counted(function: Any, *args: Any) -> torch.Tensor:
        calls.append(1)
        return apply_chunking_to_forward(function, *args)

    for place in {type(module).__module__ for module in model.modules()}:
        if hasattr(sys.modules[place], "apply_chunking_to_forward"):
            monkeypatch.setattr(sys.modules[place], "apply_chunking_to_forward", counted)
    answers(model, inputs)
    assert calls  # the plain forward methods call it
    calls.clear()
    to_runtime(model, "cpu")
    answers(model, inputs)
    assert not calls


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_chunks_that_are_asked_for_are_computed_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(family), batch(family)
    expected = answers(model, inputs)
    to_runtime(model, "cpu")
    lengths: list[int] = []
    plain = FusedFeedForward.swapped_call
    for module in model.modules():
        if isinstance(module, FusedFeedForward):
            module.chunk_size_feed_forward = 1  # type: ignore[attr-defined]

            def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
                lengths.append(x.shape[1])
                return plain(self, x)

            monkeypatch.setattr(type(module), type(module).method or "", counted)
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert set(lengths) == {1}


def decoder(**options: Any) -> Any:
    """Return a sparse BERT that attends to another sequence too."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        is_decoder=True, add_cross_attention=True, **options,
    )  # fmt: skip
    model = BertModel(config)
    sparsify(model, SparsityConfig(sparsity=0.5))
    return model.eval()


@torch.no_grad()
def test_cross_attention_and_caches_compute_as_before() -> None:
    model = decoder()
    dense, ids = copy.deepcopy(model), torch.randint(0, 30, (2, 20))
    to_runtime(model, "cpu")
    assert UnchunkedLayer in mixins(model)
    memory = torch.randn(2, 7, 16)
    inputs: dict[str, Any]
    for inputs in (
        {"encoder_hidden_states": memory},
        {"encoder_hidden_states": memory, "encoder_attention_mask": torch.ones(2, 7).tril()},
        {"use_cache": True},
        {},
    ):
        found, expected = model(ids, **inputs), dense(ids, **inputs)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        if inputs.get("use_cache"):
            more = [each(ids[:, :1], past_key_values=out.past_key_values).last_hidden_state
                    for each, out in ((model, found), (dense, expected))]  # fmt: skip
            torch.testing.assert_close(*more, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_and_attentions_are_recorded() -> None:
    model, inputs = sparse("bert"), batch("bert")
    dense = copy.deepcopy(model)
    to_runtime(model, "cpu")
    asked = {"output_hidden_states": True, "output_attentions": True}
    for each in (model, dense):
        each.set_attn_implementation("eager")
    found, expected = model(**inputs, **asked), dense(**inputs, **asked)
    assert len(found.hidden_states) == len(expected.hidden_states) > 1
    for states in ("hidden_states", "attentions"):
        for one, other in zip(found[states], expected[states], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["other arguments", "wrapped"])
def test_forward_that_is_patched_is_called(kind: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BertLayer.forward

    def scaled(self: Any, hidden_states: Any, attention_mask: Any = None, scale: float = 2.0, **kwargs: Any) -> Any:
        return scale * plain(self, hidden_states, attention_mask, **kwargs)

    @functools.wraps(plain)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2.0 * plain(self, *args, **kwargs)

    def patch() -> None:
        monkeypatch.setattr(BertLayer, "forward", scaled if kind == "other arguments" else wrapped)

    model = sparse("bert")
    layer, x = model.bert.encoder.layer[0], torch.randn(1, 20, model.config.hidden_size)
    expected = 2.0 * layer(x)
    if before:
        patch()
    to_runtime(model, "cpu")
    patch()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_arguments_by_name() -> None:
    model = sparse("distilbert")
    module: Any = model.distilbert.transformer.layer[0].ffn
    x = torch.randn(1, 20, model.config.dim)
    expected = module(input=x)
    to_runtime(model, "cpu")
    torch.testing.assert_close(module(input=x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_parameters_can_be_swapped_after_a_call(family: str) -> None:
    model, inputs = sparse(family), batch(family)
    to_runtime(model, "cpu")
    expected = answers(model, inputs)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(answers(model, inputs), expected)
