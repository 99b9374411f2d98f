"""Layers that are computed together: feed-forward parts, query, key and value."""

from __future__ import annotations

import pytest
import torch

from hf_sparse import to_runtime
from hf_sparse.modeling.architectures import known_sub_blocks
from hf_sparse.runtime import fused_ffn as blocks
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import built_for_test
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch
from tests.runtime.converted import kernels_of


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for_test(monkeypatch, "cpu", "dense_few")


def test_feed_forward_parts_and_attention_inputs_are_taken_whole() -> None:
    found = kernels_of(to_runtime(sparse("bert"), "cpu"))
    layer = "bert.encoder.layer.0"
    assert {found[f"{layer}.attention.self.{part}"] for part in ("query", "key", "value")} == {"sparse_qkv"}
    assert found[f"{layer}.attention.output.dense"] == "sparse_linear"
    assert found[f"{layer}.intermediate.dense"] == found[f"{layer}.output.dense"] == "sparse_ffn"

    found = kernels_of(to_runtime(sparse("t5"), "cpu"))
    assert found["encoder.block.0.layer.0.SelfAttention.q"] == "sparse_qkv"
    assert found["decoder.block.0.layer.1.EncDecAttention.q"] == "sparse_linear"
    assert found["decoder.block.0.layer.2.DenseReluDense.wi"] == "sparse_ffn"


def test_product_of_several_layers_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    attention = model.bert.encoder.layer[0].attention.self
    calls: list[int] = []
    from hf_sparse.runtime.packed_weight import Packed

    real = Packed.multiply

    def counted(self: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(1)
        return real(self, x, bias)

    monkeypatch.setattr(Packed, "multiply", counted)
    x, other = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    expected = {
        name: torch.nn.functional.linear(x, layer.weight, layer.bias)
        for name, layer in attention.named_children()
        if isinstance(layer, PackedLinear)
    }
    found = {name: getattr(attention, name)(x) for name in expected}
    assert len(calls) == 1
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    # Another input between, the same tensor with other numbers, and the same layer twice: nothing stale comes out.
    attention.query(x)
    torch.testing.assert_close(
        attention.key(other),
        torch.nn.functional.linear(other, attention.key.weight, attention.key.bias),
        atol=1e-5,
        rtol=1e-5,
    )
    attention.query(x)
    x.mul_(2)
    torch.testing.assert_close(
        attention.key(x), torch.nn.functional.linear(x, attention.key.weight, attention.key.bias), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(attention.query(x), attention.query(x))
    with torch.no_grad():
        attention.value.bias.add_(1)
    torch.testing.assert_close(
        attention.value(other),
        torch.nn.functional.linear(other, attention.value.weight, attention.value.bias),
        atol=1e-5,
        rtol=1e-5,
    )


def test_hook_inside_a_feed_forward_part_is_still_called() -> None:
    model, seen = sparse("bert"), []
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda *_: seen.append(1))
    found = kernels_of(to_runtime(model, "cpu"))
    answers(model, batch("bert"))
    assert seen == [1]
    assert found["bert.encoder.layer.1.intermediate.dense"] == "sparse_linear"
    assert found["bert.encoder.layer.0.intermediate.dense"] == "sparse_ffn"


def test_every_head_of_cross_attention_sees_its_own_input() -> None:
    model, inputs = sparse("bert", is_decoder=True, add_cross_attention=True), batch("bert")
    memory = torch.randn(3, 6, 16)
    with torch.no_grad():
        expected = model.bert(inputs["input_ids"], encoder_hidden_states=memory).last_hidden_state
        to_runtime(model, "cpu")
        found = model.bert(inputs["input_ids"], encoder_hidden_states=memory).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_activation_is_recognised_by_what_it_does() -> None:
    for name, known in {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "tanh": None}.items():
        (block, *_) = [b for b in known_sub_blocks(sparse("bert", hidden_act=name)) if b.kind == "feed_forward"]
        assert blocks.activation_of(block) == known, name


def test_activation_that_is_clipped_far_from_zero_is_another_one() -> None:
    model, inputs = sparse("bert", hidden_act="gelu_10"), batch("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.mul_(1000.0)
    expected = answers(model, inputs)
    (block, *_) = [b for b in known_sub_blocks(model) if b.kind == "feed_forward"]
    assert float(next(iter(block.inputs.values()))(torch.randn(64, 16)).detach().max()) > 20
    assert blocks.activation_of(block) is None
    to_runtime(model, "cpu")
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_unknown_activation_leaves_the_layers_apart() -> None:
    model, inputs = sparse("bert", hidden_act="tanh"), batch("bert")
    expected = answers(model, inputs)
    report = to_runtime(model, "cpu")
    assert kernels_of(report)["bert.encoder.layer.0.intermediate.dense"] == "sparse_linear"
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
