"""Runtime form: the same outputs, and back the same bits."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import (
    BackendError,
    Pruner,
    RecipeError,
    SparseConfig,
    SparsityConfig,
    compact,
    sparsify,
    summarize,
    to_dense_runtime,
    to_runtime,
)
from hf_sparse.modeling.architectures import known_sub_blocks
from hf_sparse.pruning.head_importance import head_importance
from hf_sparse.runtime import SpeedTable, is_runtime
from hf_sparse.runtime import fused_ffn as blocks
from hf_sparse.runtime.autotune import Measurement, Trial
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import Fixed, answers, sparse, table
from tests.helpers.structures import FAMILIES, batch, build


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)


def kernels_of(report: Any) -> dict[str, str]:
    return {layer.name: layer.kernel for layer in report.layers}


@pytest.mark.parametrize("backend", ["cpu", "csr"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_are_those_of_the_dense_model(family: str, backend: str) -> None:
    model, inputs = sparse(family), batch(family)
    expected = answers(model, inputs)
    report = to_runtime(model, backend)
    assert is_runtime(model)
    assert report.sparse
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["element", {"name": "block", "rows": 4, "cols": 1}])
@pytest.mark.parametrize("backend", ["cpu", "csr"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "t5-gated"])
def test_way_there_and_back_changes_no_bit(family: str, backend: str, pattern: Any) -> None:
    model = sparse(family, pattern=pattern)
    model.eval().requires_grad_(True)
    first = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: (own.requires_grad, own.dtype) for name, own in model.named_parameters()}
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    to_runtime(model, backend)
    assert list(model.state_dict()) == names
    to_dense_runtime(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert {name: (own.requires_grad, own.dtype) for name, own in model.named_parameters()} == asked
    assert not first.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name


@pytest.mark.parametrize("backend", ["cpu", "csr"])
def test_zeros_with_a_sign_keep_it(backend: str) -> None:
    model: Any = nn.Sequential(nn.Linear(40, 24)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(24, 40) < 0.2)
    before = model[0].weight.detach().clone()
    assert torch.signbit(before[before == 0]).any()
    to_runtime(model, backend)
    to_dense_runtime(model)
    assert torch.equal(model[0].weight.view(torch.int32), before.view(torch.int32))


def test_tied_embeddings_stay_tied_and_dense() -> None:
    model = sparse("t5", tie_word_embeddings=True)
    sparsify(model, SparsityConfig(sparsity=0.8))
    report = to_runtime(model, "cpu")
    (head,) = [layer for layer in report.layers if layer.name == "lm_head"]
    assert head.reason is not None
    assert "shared" in head.reason
    to_dense_runtime(model)
    assert model.lm_head.weight is model.shared.weight


def test_trains_again_after_the_way_back() -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "cpu")
    to_dense_runtime(model)
    model.train()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    zeros = weight == 0
    model(**inputs).loss.backward()
    assert weight.grad.abs().sum() > 0
    assert not weight.grad[zeros].any(), "the zeros of a pruned model stay zeros in training"


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],  # noqa: S301 (our own)
    ids=["copy", "pickle"],
)
def test_the_hook_that_keeps_zeros_costs_nothing_in_runtime_form_and_returns(how: Any) -> None:
    model = sparse("bert")
    guarded = [layer for layer in model.modules() if layer._forward_pre_hooks]
    assert guarded
    to_runtime(model, "cpu")
    assert not any(layer._forward_pre_hooks for layer in guarded if is_runtime(layer))
    copied = how(model)
    to_dense_runtime(copied)
    copied.train()
    weight = copied.bert.encoder.layer[0].intermediate.dense.weight
    zeros = weight == 0
    copied(**batch("bert")).loss.backward()
    assert weight.grad.abs().sum() > 0
    assert not weight.grad[zeros].any()
    to_dense_runtime(model)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in guarded)


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


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_generation_gives_the_same_tokens(family: str) -> None:
    model, inputs = sparse(family), batch(family)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = model.generate(ids, attention_mask=mask, **options)
    to_runtime(model, "cpu")
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_t5_never_unpacks_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("t5-gated"), batch("t5-gated")
    for _, block in model.encoder.block.named_children():
        block.layer[-1].DenseReluDense.wi_0.weight.data.normal_()  # dense, so the feed-forward part is not fused
    expected = answers(model, inputs)
    to_runtime(model, "cpu")
    monkeypatch.setattr(PackedLinear, "weight", property(lambda _: pytest.fail("unpacked")))
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_packed_form_of_nine_tenths_zeros_takes_a_quarter_at_most() -> None:
    model = nn.Sequential(nn.Linear(512, 256)).eval()
    sparsify(model, SparsityConfig(targets="*", sparsity=0.9))
    (layer,) = to_runtime(model, "cpu").layers
    held = sum(buffer.nbytes for buffer in model.buffers())
    assert layer.bytes == held <= 0.25 * layer.dense_bytes
    assert sum(own.numel() for own in model.parameters()) == 256, "nothing but the bias"


def test_dense_weight_is_kept_on_request() -> None:
    model = sparse("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    report = to_runtime(model, "cpu", keep_dense=True)
    assert all(layer.bytes > layer.dense_bytes for layer in report.sparse)
    to_dense_runtime(model)
    assert model.bert.encoder.layer[0].output.dense.weight is weight


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_copies_work_and_stand_alone(family: str, way: str) -> None:
    model, inputs = sparse(family), batch(family)
    expected = answers(model, inputs)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    to_runtime(model, "cpu")
    answers(model, inputs)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301  made here
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for own in model.parameters():
            own.zero_()
    torch.testing.assert_close(answers(twin, inputs), expected, atol=1e-5, rtol=1e-5)
    to_dense_runtime(twin)
    assert all(torch.equal(value, dense[name]) for name, value in twin.state_dict().items())


def test_threads_share_a_model() -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    inputs = [batch("bert", seed) for seed in range(4)]
    expected = [answers(model, each) for each in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        found = [answers(model, inputs[number]) for _ in range(30)]
        wrong.extend(number for each in found if not torch.allclose(each, expected[number], atol=1e-6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_model_gives_the_same() -> None:
    model, inputs = sparse("bert"), batch("bert")
    expected = answers(model, inputs)
    to_runtime(model, "cpu")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers(compiled, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_model_gives_the_same(strict: bool) -> None:
    model = sparse("bert")
    ids = {key: value for key, value in batch("bert").items() if key != "labels"}
    expected = answers(model, ids)
    to_runtime(model, "cpu")
    with torch.no_grad():
        exported = torch.export.export(model, (), ids, strict=strict)
    calls = [str(node.target) for node in exported.graph.nodes if "hf_sparse" in str(node.target)]
    kinds = ("sparse_attention_norm", "sparse_ffn_norm")
    assert calls == [f"hf_sparse.{kind}.default" for kind in kinds] * 2, "all of each layer"
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**ids).logits, expected, atol=1e-5, rtol=1e-5)


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


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_auto_keeps_dense_where_dense_wins(tmp_path: Any) -> None:
    model = sparse("bert")
    report = to_runtime(model, table=table(tmp_path, sparse_attention=0.98, sparse_linear=2.0, sparse_ffn=0.25))
    found = kernels_of(report)
    assert {found[f"bert.encoder.layer.0.attention.self.{part}"] for part in ("query", "key", "value")} == {"dense"}
    assert found["bert.encoder.layer.0.intermediate.dense"] == "sparse_ffn"
    by_name = {layer.name: layer for layer in report.layers}
    dense = by_name["bert.encoder.layer.0.attention.output.dense"]
    assert dense.reason is not None
    assert "dense is faster" in dense.reason
    assert dense.gains[200] == 0.5
    assert by_name["bert.encoder.layer.0.output.dense"].gains[200] == 4.0
    assert type(model.bert.encoder.layer[0].attention.output.dense) is nn.Linear


def test_auto_takes_the_layers_of_a_company_that_loses_one_by_one(tmp_path: Any) -> None:
    report = to_runtime(sparse("bert"), table=table(tmp_path, sparse_attention=1.0, sparse_ffn=1.0, sparse_linear=0.5))
    assert {layer.kernel for layer in report.sparse} == {"sparse_linear"}
    assert len(report.sparse) == 12


def test_model_of_which_nothing_wins_stays_as_it_is(tmp_path: Any) -> None:
    model = sparse("bert").requires_grad_(True)
    report = to_runtime(model, table=table(tmp_path, sparse_attention=1.0, sparse_ffn=1.0, sparse_linear=1.0))
    assert not report.sparse
    assert not is_runtime(model)
    assert all(own.requires_grad for own in model.parameters())


def test_each_shape_is_timed_once_and_kept(tmp_path: Any) -> None:
    clock = Fixed()
    first = table(tmp_path)
    first.clock = clock
    to_runtime(sparse("bert"), table=first)
    assert len(clock.asked) == len(set(clock.asked))
    asked = {(trial.kind, trial.tokens) for trial in clock.asked}
    assert {tokens for _, tokens in asked} == {1, 2, 4, 8, 15, 17, 65, 200, 1024}
    again = table(tmp_path)
    to_runtime(sparse("bert"), table=again)
    assert again.clock.asked == []  # type: ignore[attr-defined]


def test_model_that_generates_is_timed_with_one_token_too(tmp_path: Any) -> None:
    times = table(tmp_path)
    to_runtime(sparse("t5"), table=times)
    assert {1, 2, 5, 8} < {trial.tokens for trial in times.clock.asked}  # type: ignore[attr-defined]


def test_encoder_of_a_model_that_generates_is_timed_with_whole_texts_alone(tmp_path: Any) -> None:
    class FewLose(Fixed):
        def __call__(self, trial: Trial, dense: Any, packed: Any) -> Any:
            return super().__call__(trial, dense, packed) if trial.tokens > 8 else Measurement(1.0, 2.0, 0.5)

    times = table(tmp_path)
    times.clock = FewLose()
    report = to_runtime(sparse("t5"), table=times)
    assert report.sparse
    assert all(layer.name.startswith("encoder.") for layer in report.sparse)
    assert not [layer for layer in report.layers if layer.name.startswith("encoder.") and layer not in report.sparse]


def test_numbers_of_tokens_can_be_named(tmp_path: Any) -> None:
    times = table(tmp_path)
    to_runtime(sparse("t5"), tokens=(64, 32), table=times)
    assert {trial.tokens for trial in times.clock.asked} == {32, 64}  # type: ignore[attr-defined]
    for wrong in ((), (0, 3), 128, (1.5,), ("a", "b"), "12"):
        with pytest.raises(BackendError, match="`tokens` must be"):
            to_runtime(sparse("bert"), tokens=wrong, table=times)  # type: ignore[arg-type]


def test_file_of_times_that_is_spoilt_is_measured_anew(tmp_path: Any) -> None:
    for text in ("", '{"a": [1, 2', "[]", "[" * 100_000, '{"a": ["x"]}', '{"a": [NaN, 1, 1]}'):
        (tmp_path / "runtime.json").write_text(text)
        assert to_runtime(sparse("bert"), table=table(tmp_path)).sparse
        assert len(table(tmp_path).cache.read()) > 1


@pytest.mark.parametrize("backend", ["cpu", "csr"])
def test_layers_compute_in_float32_under_autocast(backend: str) -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64)).eval()
    sparsify(model, SparsityConfig(targets="*", sparsity=0.75))
    to_runtime(model, backend)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x), expected)
            with pytest.raises(BackendError, match="autocast"):
                model(x.bfloat16())


@pytest.mark.parametrize(
    ("measured", "faster"),
    [
        (Measurement(1.0, 0.5, 1.9), True),
        (Measurement(1.0, 0.97, 1.02), False),  # less than the margin
        (Measurement(1.0, 0.9, 0.99), False),  # slower in one round of four
        (Measurement(1.0, 1.2, 0.8), False),
    ],
)
def test_packed_product_wins_by_a_margin_and_in_most_rounds(measured: Measurement, faster: bool) -> None:
    assert measured.is_faster is faster


def test_one_number_of_tokens_that_loses_keeps_the_layer_dense(tmp_path: Any) -> None:
    def clock(trial: Trial, dense: Any, packed: Any) -> Measurement:
        return Measurement(1.0, 1.1, 0.9) if trial.tokens == 65 else Measurement(1.0, 0.2, 4.9)

    report = to_runtime(sparse("bert"), table=SpeedTable(tmp_path / "t.json", clock))
    assert not report.sparse
    assert "at 65 tokens" in str(report.layers[0].reason)


def test_race_takes_the_real_modules(tmp_path: Any) -> None:
    found = []

    def clock(trial: Trial, dense: Any, packed: Any) -> Measurement:
        one, other = dense(), packed()
        for a, b in zip(*(each if isinstance(each, list) else [each] for each in (one, other)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        found.append(trial.kind)
        return Measurement(1.0, 0.2, 4.9)

    for family in ("bert", "t5-gated"):
        with torch.no_grad():
            to_runtime(sparse(family), table=SpeedTable(tmp_path / f"{family}.json", clock))
    assert set(found) == {"sparse_linear", "sparse_qkv", "sparse_attention", "sparse_ffn", "dense_few", "bitmask"}


def test_real_times_are_measured_and_positive(tmp_path: Any) -> None:
    report = to_runtime(nn.Sequential(sparse_linear()).eval(), table=SpeedTable(tmp_path / "t.json"))
    (layer,) = report.layers
    assert {17, 65, 200, 1024} <= set(layer.gains) <= {1, 2, 4, 8, 15, 17, 65, 200, 1024}
    assert all(gain > 0 for gain in layer.gains.values())


def sparse_linear() -> nn.Linear:
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[:, 8:] = 0.0
    return layer


def test_blocks_set_the_height() -> None:
    for rows in (1, 4, 16):
        model: Any = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
        kept = torch.rand(64 // rows, 64) < 0.2
        with torch.no_grad():
            model[0].weight.mul_(kept.repeat_interleave(rows, dim=0))
        assert to_runtime(model, "cpu").layers[0].rows in ({16, 8} if rows == 16 else {rows})


def test_report_is_data_and_a_table() -> None:
    model = sparse("bert")
    report = to_runtime(model, "cpu")
    data = report.to_dict()
    assert data["backend"] == "cpu"
    assert {layer["name"] for layer in data["layers"]} == {layer.name for layer in report.layers}
    text = str(report)
    assert "bert.encoder.layer.0.intermediate.dense" in text
    assert "12 of 14 layers sparse" in text
    assert "too few zeros" in text  # pooler and classifier


def test_backend_dense_says_what_there_is_and_changes_nothing() -> None:
    model = sparse("bert")
    report = to_runtime(model, "dense")
    assert not is_runtime(model)
    assert {layer.kernel for layer in report.layers} == {"dense"}


def test_summary_counts_packed_weights() -> None:
    model = sparse("bert")
    expected = summarize(model)
    to_runtime(model, "cpu")
    assert summarize(model).nonzeros == expected.nonzeros


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_training_is_refused_with_the_way_out() -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "cpu")
    model.train()
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model(**inputs)


def test_gradients_are_refused() -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    x = torch.randn(1, 4, 16, requires_grad=True)
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model(inputs_embeds=x)
    assert not model(input_ids=batch("bert")["input_ids"]).logits.requires_grad, "inference needs no no_grad()"


@pytest.mark.parametrize("change", ["half", "meta", "bfloat16"])
def test_casts_and_moves_are_refused(change: str) -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model.to({"half": torch.float16, "bfloat16": torch.bfloat16}.get(change, change))


def test_loading_weights_into_packed_layers_is_refused() -> None:
    model = sparse("bert")
    state = copy.deepcopy(model.state_dict())
    to_runtime(model, "cpu")
    with pytest.raises(RuntimeError, match="to_dense_runtime"):
        model.load_state_dict(state)


def masked() -> Any:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    Pruner(model, SparsityConfig(targets="*", sparsity=0.5, schedule="constant")).attach()
    return model


def meta() -> Any:
    return nn.Sequential(nn.Linear(16, 16, device="meta"))


def adapters() -> Any:
    return nn.ModuleDict({"q": nn.ModuleDict({"base_layer": nn.Linear(4, 4)})})


def quantized() -> Any:
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (masked, "bake"),
        (meta, "offloaded"),
        (adapters, "adapters"),
        (quantized, "quantized"),
        (lambda: nn.Sequential(sparse_linear()).half(), "float32"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "nothing is sparse"),
        (lambda: nn.Sequential(nn.ReLU()), "no linear layer"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_with_a_reason(make: Any, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        to_runtime(make(), "cpu")


def test_runtime_form_of_a_runtime_form_is_refused() -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match="already"):
        to_runtime(model, "cpu")


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(
    "change",
    [
        compact,
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, pattern="head")),
        lambda model: sparsify(
            model, SparsityConfig(sparsity=0.5, pattern="head", scorer="head_importance"), [batch("bert")]
        ),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, pattern="head+neuron")),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5)),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, targets="*")),
        lambda model: Pruner(model, SparsityConfig(sparsity=0.5)).attach(),
        lambda model: head_importance(model, [batch("bert")]),
    ],
    ids=["compact", "heads", "head importance", "head+neuron", "default", "all", "Pruner", "importance"],
)
def test_pruning_and_cutting_a_runtime_model_names_the_way_back(change: Any, some: bool) -> None:
    model = sparse("bert")
    if some:
        with torch.no_grad():
            model.bert.encoder.layer[1].intermediate.dense.weight.normal_()
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match=r"'bert.encoder.layer.0.attention.self.query' .*to_dense_runtime\(model\)"):
        change(model)
    to_dense_runtime(model)
    compact(model)


def test_restoring_a_model_of_which_nothing_is_packed_changes_nothing(tmp_path: Any) -> None:
    model = sparse("bert")
    before = [(name, id(own), own.requires_grad) for name, own in model.named_parameters()]
    slower = {"sparse_linear": 2.0, "sparse_attention": 2.0, "sparse_ffn": 2.0, "csr": 2.0}
    report = to_runtime(model, table=table(tmp_path, **slower))
    assert not report.sparse
    to_dense_runtime(model)
    to_dense_runtime(model)
    assert [(name, id(own), own.requires_grad) for name, own in model.named_parameters()] == before


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(
        BackendError,
        match="'auto', 'cpu', 'cpu-int8', 'csr', 'bitmask', 'bitmask-int8', 'bitmask-int4', 'dense', got 'gpu'",
    ):
        to_runtime(sparse("bert"), "gpu")


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(False, None, None, "build them so"))
    pretend(monkeypatch, cpu="build them so", dense_few="build them so")
    with pytest.raises(BackendError, match="build them so"):
        to_runtime(sparse("bert"), "cpu")
    report = to_runtime(sparse("bert"), table=table(tmp_path))
    assert {layer.kernel for layer in report.sparse} == {"csr"}


def test_saved_runtime_model_is_the_sparse_model(tmp_path: Any) -> None:
    model = sparse("bert")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    to_runtime(model, "cpu")
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", format="dense")
    for form in ("packed", "dense"):
        loaded = type(model).from_pretrained(tmp_path / form).state_dict()
        assert loaded.keys() == dense.keys()
        assert all(torch.equal(loaded[name], dense[name]) for name in dense)


# -- from_pretrained ---------------------------------------------------------------------------------------------------


def test_backend_of_the_config_brings_a_loaded_model_into_runtime_form(tmp_path: Any) -> None:
    model, inputs = sparse("bert"), batch("bert")
    expected = answers(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend="csr"))
    assert is_runtime(loaded)
    torch.testing.assert_close(answers(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not is_runtime(type(model).from_pretrained(tmp_path)), "it is a wish of the one who loads"
    loaded.save_pretrained(tmp_path / "again")
    assert "backend" not in (tmp_path / "again" / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(answers(again, inputs), expected)
    loaded.dequantize()
    assert not is_runtime(loaded)


def test_dense_checkpoint_is_pruned_and_packed_in_one_load(tmp_path: Any) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(sparsity=0.75, backend="csr"))
    assert is_runtime(loaded)
    with pytest.raises(BackendError, match="nothing is sparse"):
        type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend="csr"))


def test_config_refuses_unknown_backends_and_two_wishes() -> None:
    with pytest.raises(
        RecipeError, match="'auto', 'cpu', 'cpu-int8', 'csr', 'bitmask', 'bitmask-int8', 'bitmask-int4', 'dense'"
    ):
        SparseConfig(backend="gpu")
    with pytest.raises(RecipeError, match="one of the two"):
        SparseConfig(backend="auto", quantization_config={"load_in_8bit": True})
