"""Self-attention in runtime form: what it takes over gives the same, and what it does not is computed as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.modeling.class_swap import restore
from hf_sparse.runtime.fused_attention import FusedAttentionBlock
from hf_sparse.runtime.fused_ffn import FusedFeedForward
from hf_sparse.runtime.shared_input import SharedInput
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)
    pretend(monkeypatch, int8=None)


@pytest.fixture(params=["cpu", "cpu-int8"])
def backend(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often the operator is called from the modules."""
    from hf_sparse.runtime import fused_attention as attention

    made: list[int] = []

    def counting(real: Any) -> Any:
        def counted(*given: Any) -> Tensor:
            made.append(1)
            return real(*given)

        return counted

    for name in ("heads", "heads_and_norm"):
        monkeypatch.setattr(attention, name, counting(getattr(attention, name)))
    return made


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Say which sub-blocks were computed with their layer norm."""
    from hf_sparse.runtime import fused_attention as attention
    from hf_sparse.runtime import fused_ffn as blocks

    made: list[str] = []
    for module, name in ((attention, "heads_and_norm"), (blocks, "feed_forward")):
        real = getattr(module, name)

        def noted(*given: Any, real: Any = real, name: str = name) -> Tensor:
            made.extend([name] if name == "heads_and_norm" or given[-1] is not None else [])
            out: Tensor = real(*given)
            return out

        monkeypatch.setattr(module, name, noted)
    return made


def texts(length: int, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 40, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = mask[2, length - 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def close(found: Tensor, wanted: Tensor, backend: str = "cpu") -> None:
    if backend == "cpu":
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    else:
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def one_by_one(model: Any) -> Any:
    """Return a copy whose products are still packed, but whose sub-blocks torch puts together."""
    plain = copy.deepcopy(model)
    restore(plain, SharedInput)
    restore(plain, FusedAttentionBlock)
    for module in plain.modules():
        if isinstance(module, FusedFeedForward):
            module.fused_ffn.takes_norm = False
    return plain


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("pattern", ["element", {"name": "block", "rows": 4, "cols": 1}])
def test_outputs_are_those_of_the_dense_model(family: str, pattern: Any, calls: list[int], backend: str) -> None:
    model = sparse(family, pattern=pattern)
    lengths = [(length, padded) for length in (1, 2, 15, 16, 17, 30) for padded in (False, True)]
    expected = [answers(model, texts(*length)) for length in lengths]
    to_runtime(model, backend)
    found = [answers(model, texts(*length)) for length in lengths]
    assert len(calls) == 2 * len(lengths), "both layers, each time"
    for value, wanted in zip(found, expected, strict=True):
        close(value, wanted, backend)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_way_back_leaves_no_trace(family: str, backend: str) -> None:
    model = sparse(family)
    before = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    to_runtime(model, backend)
    assert sum(isinstance(module, SharedInput) for module in model.modules()) == 2
    to_dense_runtime(model)
    assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == before


def test_attention_weights_are_given_where_they_are_asked_for(calls: list[int], backend: str) -> None:
    model, inputs = sparse("bert"), texts(17, True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
        to_runtime(model, backend)
        found = model(**inputs, output_attentions=True)
    assert not calls
    for value, wanted in zip(found.attentions, expected.attentions, strict=True):
        close(value, wanted, backend)
    model.set_attn_implementation("sdpa")
    close(answers(model, inputs), expected.logits, backend)
    assert calls


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_residual_and_layer_norm_are_part_of_the_operators(family: str, norms: list[str], backend: str) -> None:
    model = sparse(family)
    expected = answers(model, texts(17, True))
    to_runtime(model, backend)
    close(answers(model, texts(17, True)), expected, backend)
    # DistilBERT has its layer norms one module further out.
    assert norms == (["heads_and_norm", "feed_forward"] * 2 if family == "bert" else [])
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("LayerNorm"):
                module.weight.mul_(1.5)
                module.bias.add_(0.1)
    found = answers(model, texts(17, True))
    to_dense_runtime(model)
    close(found, answers(model, texts(17, True)), backend)


@pytest.mark.parametrize("sub_block", ["attention.", ""])
@pytest.mark.parametrize("part", ["output", "output.dense", "output.dropout", "output.LayerNorm"])
def test_what_comes_after_a_sub_block_is_still_seen_by_hooks(
    sub_block: str, part: str, norms: list[str], backend: str
) -> None:
    model, seen = sparse("bert"), []
    expected = answers(model, texts(17, True))
    to_runtime(model, backend)
    watched = model.bert.encoder.layer[1].get_submodule(sub_block + part)
    watched.register_forward_hook(lambda *_: seen.append(1))
    close(answers(model, texts(17, True)), expected, backend)
    assert seen == [1]
    assert norms == (
        ["heads_and_norm", "feed_forward", "heads_and_norm"]
        if not sub_block
        else ["heads_and_norm", "feed_forward", "feed_forward"]
    )


_INSIDE = {
    "bert": ("attention.self.query", "attention.self.value", "intermediate", "intermediate.dense",
             "intermediate.intermediate_act_fn", "output", "output.dense"),
    "distilbert": ("attention.k_lin", "attention.out_lin", "ffn.lin1", "ffn.activation", "ffn.lin2", "ffn.dropout"),
    "t5": ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.act", "layer.1.DenseReluDense.dropout",
           "layer.1.DenseReluDense.wo"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "part"), [(family, part) for family, parts in _INSIDE.items() for part in parts])
def test_hooks_that_come_later_see_what_is_inside(family: str, part: str, backend: str) -> None:
    model, seen = sparse(family), []
    expected = answers(model, batch(family))
    to_runtime(model, backend)
    name = {"bert": "bert.encoder.layer.1.", "distilbert": "distilbert.transformer.layer.1.", "t5": "encoder.block.1."}
    model.get_submodule(name[family] + part).register_forward_hook(lambda *_: seen.append(1))
    close(answers(model, batch(family)), expected, backend)
    assert seen == [1]


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("bert", "encoder.layer.0.attention.output.dropout"),
        ("bert", "encoder.layer.0.output.dropout"),
        ("distilbert", "transformer.layer.0.ffn.dropout"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.dropout"),
        ("t5-gated", "encoder.block.0.layer.1.DenseReluDense.dropout"),
    ],
)
def test_dropout_that_is_switched_on_alone_drops(family: str, part: str, backend: str) -> None:
    model = sparse(family)
    to_runtime(model, backend)
    expected = answers(model, batch(family))
    dropout: Any = next(module for name, module in model.named_modules() if name.endswith(part))
    dropout.p = 0.9
    dropout.train()
    assert not torch.allclose(answers(model, batch(family)), expected, atol=1e-5)
    dropout.eval()
    assert torch.equal(answers(model, batch(family)), expected)


@pytest.mark.parametrize("part", ["", "intermediate", "output", "attention.output"])
def test_classes_that_are_made_of_those_of_transformers_compute_as_they_say(part: str, backend: str) -> None:
    model, inputs = sparse("bert"), texts(17, True)
    module: Any = model.bert.encoder.layer[1].get_submodule(part)
    name, real = ("forward", type(module).forward) if part else ("feed_forward_chunk", type(module).feed_forward_chunk)
    own = {name: lambda self, *given: real(self, *given) * 1.5, "__module__": "made.of.it"}
    before = answers(model, inputs)
    module.__class__ = type(type(module).__name__, (type(module),), own)
    expected = answers(model, inputs)
    assert not torch.allclose(before, expected, atol=1e-4)
    to_runtime(model, backend)
    if backend == "cpu":
        close(answers(model, inputs), expected)
    assert (answers(model, inputs) - expected).norm() < 0.3 * (before - expected).norm()


@pytest.mark.parametrize("length", [4, 17])
def test_autocast_around_a_model_breaks_nothing(length: int, backend: str) -> None:
    model, inputs = sparse("bert"), texts(length, True)
    to_runtime(model, backend)
    expected = answers(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answers(model, inputs)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_replaced_layer_norm_is_computed(norms: list[str], backend: str) -> None:
    model = sparse("bert")
    model.bert.encoder.layer[0].attention.output.LayerNorm = torch.nn.Identity()
    expected = answers(model, texts(17, True))
    to_runtime(model, backend)
    close(answers(model, texts(17, True)), expected, backend)
    assert norms == ["feed_forward", "heads_and_norm", "feed_forward"]


def test_decoder_keeps_its_causal_attention(calls: list[int], backend: str) -> None:
    model, inputs = sparse("bert", is_decoder=True), texts(17, False)
    expected = answers(model, inputs)
    to_runtime(model, backend)
    close(answers(model, inputs), expected, backend)
    assert not calls


def test_changed_bias_is_seen_and_copies_stand_alone(backend: str) -> None:
    model, inputs = sparse("bert"), texts(17, True)
    to_runtime(model, backend)
    before, other = answers(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.bias.add_(1.0)
    assert not torch.allclose(answers(model, inputs), before, atol=1e-3)
    assert torch.equal(answers(other, inputs), before)


def test_hook_on_an_input_of_attention_is_still_called(calls: list[int], backend: str) -> None:
    model, seen = sparse("bert"), []
    model.bert.encoder.layer[1].attention.self.key.register_forward_hook(lambda *_: seen.append(1))
    expected: Any = answers(model, texts(17, True))
    to_runtime(model, backend)
    close(answers(model, texts(17, True)), expected, backend)
    assert seen == [1, 1]
    assert calls == [1]


def test_compiled_and_padded_model_gives_the_same(backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = sparse("bert"), texts(17, True)
    expected = answers(model, inputs)
    to_runtime(model, backend)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(answers(compiled, inputs), expected, backend)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("pattern", ["element", {"name": "block", "rows": 4, "cols": 1}])
def test_int8_sub_blocks_differ_from_their_parts_by_rounding_alone(
    family: str, pattern: Any, calls: list[int], norms: list[str]
) -> None:
    model = sparse(family, pattern=pattern)
    to_runtime(model, "cpu-int8")
    plain = one_by_one(model)
    for length in (1, 15, 16, 17, 30):
        for padded in (False, True):
            wanted = answers(plain, texts(length, padded))
            assert not calls
            assert not norms
            found = answers(model, texts(length, padded))
            assert len(calls) == 2
            assert (found - wanted).norm() < 5e-3 * wanted.norm()
            calls.clear()
            norms.clear()
