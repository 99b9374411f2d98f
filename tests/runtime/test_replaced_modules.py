"""Modules that are replaced, wrapped or observed after `to_runtime`: it computes what the dense model does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.kernels import LibraryStatus
from hf_sparse.runtime import is_runtime
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

PARTS = {
    "bert": (
        "bert.encoder.layer.1",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense"),
        ("attention", "attention.self", "attention.output", "attention.output.dropout", "attention.output.LayerNorm",
         "intermediate", "intermediate.intermediate_act_fn", "output", "output.dropout", "output.LayerNorm"),
    ),
    "distilbert": (
        "distilbert.transformer.layer.1",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
        ("attention", "ffn", "ffn.activation", "ffn.dropout", "sa_layer_norm"),
    ),
    "t5": (
        "encoder.block.1.layer",
        ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
         "1.DenseReluDense.wi", "1.DenseReluDense.wo"),
        ("0.SelfAttention", "1.DenseReluDense", "1.DenseReluDense.act", "1.DenseReluDense.dropout"),
    ),
    "t5-gated": (
        "decoder.block.1.layer",
        ("0.SelfAttention.k", "1.EncDecAttention.k", "2.DenseReluDense.wi_0", "2.DenseReluDense.wi_1",
         "2.DenseReluDense.wo"),
        ("2.DenseReluDense.act", "2.DenseReluDense.dropout"),
    ),
}  # fmt: skip
LAYERS = [(family, f"{prefix}.{part}") for family, (prefix, layers, _) in PARTS.items() for part in layers]
MODULES = [
    (family, f"{prefix}.{part}") for family, (prefix, layers, others) in PARTS.items() for part in layers + others
]


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)


class Adapter(nn.Module):
    """A module and a low-rank update beside it, as adapters wrap a linear layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = base
        self.down = torch.randn(base.in_features, 2, generator=generator)
        self.up = torch.randn(2, base.out_features, generator=generator)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down @ self.up
        return out


class Scaled(nn.Module):
    """Any module, with a different output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Any:  # T5 looks at the dtype of one
        return self.base.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scale(self, args, self.base(*args, **kwargs))


def scale(_: Any, __: Any, out: Any) -> Any:
    """Scale an output; a forward hook."""
    return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out


class OtherForward:
    """A forward method for one module, as tools assign it."""

    def __init__(self, module: Any) -> None:
        self.weight, self.bias = module.weight.detach(), module.bias

    def __call__(self, x: Tensor) -> Tensor:
        return 1.5 * nn.functional.linear(x, self.weight, self.bias)


def other_linear(layer: Any) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        other.weight.copy_(torch.randn(other.weight.shape, generator=torch.Generator().manual_seed(2)))
        if other.bias is not None:
            other.bias.fill_(0.1)
    return other.requires_grad_(False).eval()


def changed(family: str, change: Callable[[Any], object]) -> None:
    """Check that a change of a model in runtime form has the effect that it has on the dense model."""
    model, inputs = sparse(family), batch(family)
    before, dense = answers(model, inputs), copy.deepcopy(model)
    change(dense)
    expected = answers(dense, inputs)
    assert not torch.allclose(before, expected, atol=1e-3), "the change has no effect at all"
    to_runtime(model, "cpu")
    torch.testing.assert_close(answers(model, inputs), before, atol=2e-5, rtol=1e-4)
    change(model)
    torch.testing.assert_close(answers(model, inputs), expected, atol=5e-5, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, expected, atol=5e-5, rtol=1e-4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        torch.testing.assert_close(answers(copied, inputs), expected, atol=5e-5, rtol=1e-4)
    to_dense_runtime(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(answers(model, inputs), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), LAYERS)
def test_adapter_around_a_layer_is_computed(family: str, name: str) -> None:
    changed(family, lambda model: model.set_submodule(name, Adapter(model.get_submodule(name))))


@pytest.mark.parametrize(("family", "name"), LAYERS)
def test_other_layer_in_the_place_of_one_is_computed(family: str, name: str) -> None:
    def replace(model: Any) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, other_linear(model.get_submodule(name)))

    changed(family, replace)


@pytest.mark.parametrize(("family", "name"), MODULES)
def test_wrapped_module_is_computed(family: str, name: str) -> None:
    changed(family, lambda model: model.set_submodule(name, Scaled(model.get_submodule(name))))


@pytest.mark.parametrize(("family", "name"), MODULES)
def test_hook_that_changes_an_output_is_called(family: str, name: str) -> None:
    changed(family, lambda model: model.get_submodule(name).register_forward_hook(scale))


@pytest.mark.parametrize(("family", "name"), LAYERS)
def test_forward_method_that_is_replaced_is_called(family: str, name: str) -> None:
    def replace(model: Any) -> None:
        module = model.get_submodule(name)
        module.forward = OtherForward(module)

    changed(family, replace)


@pytest.mark.parametrize("family", list(PARTS))
def test_hooks_for_all_modules_see_every_layer(family: str) -> None:
    model, inputs = sparse(family), batch(family)
    to_runtime(model, "cpu")
    expected, seen = answers(model, inputs), set[int]()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(id(module)))
    try:
        found = answers(model, inputs)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert {id(module) for module in model.modules() if isinstance(module, PackedLinear)} <= seen


@pytest.mark.parametrize("activation", [torch.tanh, nn.Tanh()])
def test_plain_function_as_activation_can_be_replaced(activation: Any) -> None:
    def replace(model: Any) -> None:
        intermediate = model.bert.encoder.layer[0].intermediate
        del intermediate.intermediate_act_fn
        intermediate.intermediate_act_fn = activation

    changed("bert", replace)
    model, inputs = sparse("bert", hidden_act="gelu"), batch("bert")
    for layer in model.bert.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = nn.functional.gelu
    report = to_runtime(model, "cpu")
    assert "sparse_ffn" in {layer.kernel for layer in report.layers}
    fused = answers(model, inputs)
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = activation
    found = answers(model, inputs)
    to_dense_runtime(model)
    assert not torch.allclose(fused, found, atol=1e-3)
    torch.testing.assert_close(answers(model, inputs), found, atol=2e-5, rtol=1e-4)


def lora(model: Any, *targets: str) -> Any:
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    torch.manual_seed(3)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("family", "targets", "dense"),
    [
        ("t5", ("wi",), ("wi",)),
        ("t5", ("lm_head",), ()),
        ("t5-gated", ("wi_0", "wi_1"), ("wi_0", "wi_1")),
        ("t5-gated", ("k", "v"), (".k", ".v")),
        ("bert", ("intermediate.dense",), ("intermediate.dense",)),
        ("bert", ("key",), ("key",)),
        ("distilbert", ("k_lin", "lin2"), ("k_lin", "lin2")),
    ],
)
def test_lora_of_peft_on_layers_that_stayed_dense_is_computed(family: str, targets: Any, dense: Any) -> None:
    model, inputs = sparse(family), batch(family)
    for name, module in model.named_modules():
        if name.endswith(dense) and dense:
            nn.init.normal_(module.weight, std=0.3)
    plain = copy.deepcopy(model)
    to_runtime(model, "cpu")
    before = answers(model, inputs)
    expected = answers(lora(plain, *targets), inputs)
    adapted = lora(model, *targets)
    assert is_runtime(adapted)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(answers(adapted, inputs), expected, atol=5e-5, rtol=1e-4)


def test_parameters_train_again_though_an_adapter_has_renamed_them() -> None:
    model = sparse("t5").requires_grad_(True)
    bias = model.encoder.final_layer_norm.weight.requires_grad_(False)
    to_runtime(model, "cpu")
    name = "encoder.block.1.layer.0.SelfAttention.o"
    model.set_submodule(name, Adapter(model.get_submodule(name)))
    to_dense_runtime(model)
    assert {name for name, own in model.named_parameters() if not own.requires_grad} == {
        name for name, own in model.named_parameters() if own is bias
    }


def test_parameters_train_again_where_a_part_was_packed_and_the_whole_is_restored() -> None:
    model = sparse("bert").requires_grad_(True)
    to_runtime(model.bert, "cpu")
    to_dense_runtime(model)
    assert all(own.requires_grad for own in model.parameters())
