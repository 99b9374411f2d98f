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

from hf_sparse import BackendError, SparseConfig, SparsityConfig, sparsify, summarize, to_dense_runtime, to_runtime
from hf_sparse.runtime import is_runtime
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import built_for_test
from tests.helpers.runtime_models import answers, sparse, table
from tests.helpers.structures import FAMILIES, batch, build


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for_test(monkeypatch, "cpu", "dense_few")


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


def test_restoring_a_model_of_which_nothing_is_packed_changes_nothing(tmp_path: Any) -> None:
    model = sparse("bert")
    before = [(name, id(own), own.requires_grad) for name, own in model.named_parameters()]
    slower = {"sparse_linear": 2.0, "sparse_attention": 2.0, "sparse_ffn": 2.0, "csr": 2.0}
    report = to_runtime(model, table=table(tmp_path, **slower))
    assert not report.sparse
    to_dense_runtime(model)
    to_dense_runtime(model)
    assert [(name, id(own), own.requires_grad) for name, own in model.named_parameters()] == before


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
