from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.exporters import ExportedModel

import hf_sparse
from hf_sparse import BackendError, RecipeError
from hf_sparse.cli.main import main
from hf_sparse.hf.export.exporter import compare_outputs, export, export_model
from hf_sparse.hf.export.inputs import Sizes, sample, sizes_for
from tests.helpers.layers import attached
from tests.helpers.tiny import config, save_bert, save_t5

SIZES = [(2, 8), (1, 16), (5, 3), (1, 1)]
"""Rows and tokens; only the first is what was traced."""

NARROW: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}

HEADS, NEURONS = (3, 1), (40, 7)
"""What is left in each layer of the uneven BERT, of 4 heads and 64 neurons."""


def keep_rows(layer: nn.Linear, rows: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[:rows].clone())
    layer.bias = nn.Parameter(layer.bias.detach()[:rows].clone())
    layer.out_features = rows


def keep_columns(layer: nn.Linear, columns: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[:, :columns].clone())
    layer.in_features = columns


def uneven_bert() -> BertForSequenceClassification:
    """Return a BERT whose layers have different numbers of heads and neurons, cut by hand."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=3, vocab_size=200))
    layers: Any = model.bert.encoder.layer
    for layer, heads, neurons in zip(layers, HEADS, NEURONS, strict=True):
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            keep_rows(getattr(attention, name), 8 * heads)
        keep_columns(layer.attention.output.dense, 8 * heads)
        attention.num_attention_heads, attention.all_head_size = heads, 8 * heads
        keep_rows(layer.intermediate.dense, neurons)
        keep_columns(layer.output.dense, neurons)
    return model.eval()


def batch_of(model, rows, tokens):
    return sample(model, Sizes(rows, tokens))


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def uneven_onnx(tmp_path_factory):
    """Return an uneven BERT, the folder of its ONNX file, and the report."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, folder = uneven_bert(), tmp_path_factory.mktemp("export") / "onnx"
    return model, folder, export_model(model, "onnx", folder, batch=2, length=8)


@pytest.fixture(scope="module")
def session(uneven_onnx):
    import onnxruntime

    return onnxruntime.InferenceSession(uneven_onnx[1] / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("rows", "tokens"), SIZES)
def test_onnx_runtime_gives_the_logits_of_an_uneven_model_at_any_size(uneven_onnx, session, rows, tokens):
    model = uneven_onnx[0]
    inputs = batch_of(model, rows, tokens)
    (got,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    want = logits_of(model, inputs)
    assert got.shape == (rows, 3)
    assert float((torch.from_numpy(got) - want).abs().max()) <= 1e-4


def test_onnx_weights_take_what_the_parameters_take(uneven_onnx):
    model, folder, report = uneven_onnx
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    whole = BertForSequenceClassification(model.config)
    assert dense < 0.8 * 4 * sum(parameter.numel() for parameter in whole.parameters())
    assert report.dense_bytes == dense
    # Vectors of few entries lie in the graph, and the tracer adds a few constants.
    assert 0.9 * dense <= report.files["model.onnx.data"] <= 1.02 * dense
    assert report.files == {name: (folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}


def test_onnx_files_do_not_name_folders_of_this_machine(uneven_onnx):
    for path in uneven_onnx[1].iterdir():
        assert b"site-packages" not in path.read_bytes(), path.name


def test_report_says_what_was_compared_and_how_well(uneven_onnx):
    report = uneven_onnx[2]
    assert report.batches == ((2, 8), (1, 4), (3, 11))
    assert 0 < report.difference <= report.allowed
    assert "largest difference to the model" in str(report)
    assert report.sparsity < 0.01  # the row of the padding token
    assert "zeros" not in str(report)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Return the folder of a packed BERT, half of whose weights are gone."""
    folder = tmp_path_factory.mktemp("sparse")
    dense = save_bert(folder / "dense", head=True)
    assert main(["prune", str(dense), "--sparsity", "0.5", "--output", str(folder / "sparse")]) == 0
    return folder / "sparse"


def test_command_exports_a_sparse_model_to_torch(sparse, tmp_path, capsys):
    folder = shutil.copytree(sparse, tmp_path / "model")
    assert main(["export", str(folder), "--to", "torch"]) == 0
    text = capsys.readouterr().out
    assert "unstructured zeros do not make this file smaller" in text
    assert text.count("torch.onnx") == 0
    output = folder / "torch"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    program = torch.export.load(output / "model.pt2")
    for name, weight in model.named_parameters():
        assert torch.equal(program.state_dict[name], weight), name
    module = program.module()
    for rows, tokens in SIZES:
        inputs = batch_of(model, rows, tokens)
        assert torch.equal(module(**inputs).logits, logits_of(model, inputs))
    assert AutoTokenizer.from_pretrained(output).tokenize("the film") == ["the", "film"]
    written = json.loads((output / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert "quantization_config" not in written, "the manifest describes other files"
    # A torch program is a pickle: from 5.24 on, transformers loads it only if it is trusted.
    loaded = ExportedModel.from_pretrained(output, trust_remote_code=True)
    assert loaded(**inputs).logits.shape == (1, 2)


def test_sparse_model_survives_torch_export_by_itself(sparse, tmp_path):
    """Loaded weights are trainable and their zeros guarded by hooks; tracing has to get through these."""
    model = AutoModelForSequenceClassification.from_pretrained(sparse).eval()
    inputs = batch_of(model, 2, 8)
    program = torch.export.export(model, args=(), kwargs=inputs)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert int((again.state_dict[name] == 0).sum()) == again.state_dict[name].numel() // 2
    want = logits_of(model, inputs)
    assert torch.allclose(again.module()(**inputs).logits, want, atol=1e-6)
    model.train()(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    weight = model.get_parameter(name)
    assert weight.grad is not None
    assert bool((weight.grad[weight == 0] == 0).all()), "the zeros are still guarded"


def test_t5_becomes_one_graph_without_a_cache(tmp_path):
    model = T5ForConditionalGeneration.from_pretrained(save_t5(tmp_path / "t5"))
    report = export_model(model, "torch", tmp_path / "out", length=8)
    module = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for rows, tokens in SIZES:
        inputs = batch_of(model, rows, tokens)
        got = module(**inputs)
        assert torch.allclose(got.logits, logits_of(model, inputs), atol=1e-4)
        assert "past_key_values" not in got
    assert report.difference <= 1e-4


@pytest.mark.slow
def test_onnx_t5_generates_what_the_model_generates(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = save_t5(tmp_path / "t5")
    export(str(folder), "onnx", tmp_path / "out", length=8)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    inputs = batch_of(model, 3, 9)
    del inputs["decoder_input_ids"]
    want = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1)
    ids = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(12):
        feed = {name: value.numpy() for name, value in {**inputs, "decoder_input_ids": ids}.items()}
        (logits,) = session.run(["logits"], feed)
        logits[..., model.config.eos_token_id] = -float("inf")  # as min_new_tokens does
        ids = torch.cat([ids, torch.from_numpy(logits)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, want)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["openvino", "executorch"])
def test_other_runtimes_agree_after_loading(to, tmp_path):
    pytest.importorskip(to)
    model = uneven_bert()
    report = export_model(model, to, tmp_path, batch=4, length=12)
    assert report.difference <= 1e-4
    options: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if to == "openvino" else {}
    loaded = ExportedModel.from_pretrained(tmp_path, **options)
    for rows, tokens in [(4, 12), (1, 1), (3, 5)]:
        inputs = batch_of(model, rows, tokens)
        assert torch.allclose(loaded(**inputs).logits, logits_of(model, inputs), atol=1e-4)
    assert ("up to 4 rows and 12 tokens" in str(report)) == (to == "executorch")
    assert ("INFERENCE_PRECISION_HINT=f32" in str(report)) == (to == "openvino")


SMALL: dict[str, Any] = {"vocab_size": 200, "max_position_embeddings": 40}
FAMILIES = {
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, **NARROW)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SMALL, dim=8, n_layers=1, n_heads=1, hidden_dim=8)),
    "electra": lambda: ElectraForTokenClassification(ElectraConfig(**SMALL, **NARROW, embedding_size=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_other_encoders_agrees(tmp_path, family):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    report = export_model(FAMILIES[family](), "onnx", tmp_path)
    longest = 38 if family == "roberta" else 40
    assert report.batches == ((2, longest), (1, longest // 2), (3, longest))
    assert report.difference <= 1e-4


class Wrong:
    """An exported model that computes something else."""

    def __init__(self, model, change):
        self.model, self.change, self.components = model, change, {}

    def to(self, **_):
        return self

    def __call__(self, **inputs):
        return {"logits": self.change(self.model(**inputs).logits)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: logits + 2e-3, "differs from the model's by 2.0e-03, 1.0e-04 is allowed"),
        (lambda logits: logits * float("nan"), "differs from the model's by nan"),
        (lambda logits: logits[:1], r"has shape \(1, 3\) exported, but \(2, 3\) in the model"),
    ],
)
def test_nothing_is_written_when_the_outputs_differ(tmp_path, monkeypatch, change, reason):
    monkeypatch.setattr(
        "transformers.exporters.DynamoExporter", lambda: SimpleNamespace(export=lambda model, *_: Wrong(model, change))
    )
    with pytest.raises(BackendError, match=reason):
        export_model(uneven_bert(), "torch", tmp_path / "out", length=8)
    assert not (tmp_path / "out").exists()


def test_what_a_tracer_says_is_reported_and_the_model_left_as_it_was(tmp_path, monkeypatch):
    def fail(model, *_):
        assert not model.training
        raise ValueError("unsupported operator\nand a long story")

    monkeypatch.setattr("transformers.exporters.DynamoExporter", lambda: SimpleNamespace(export=fail))
    model = uneven_bert()
    model.train()
    model.bert.eval()
    model.classifier.bias.requires_grad_(False)
    with pytest.raises(BackendError, match=r"cannot be exported to torch: ValueError: unsupported operator$"):
        export_model(model, "torch", tmp_path, length=8)
    assert model.training
    assert not model.bert.training
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["classifier.bias"]
    assert getattr(model.config, "use_cache", True)


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("onxx", {}, "cannot export to 'onxx'; known are onnx, openvino, executorch, torch"),
        ("torch", {"opset": 18}, "opset is for onnx"),
        ("torch", {"batch": 1}, "`batch` must be at least 2, got 1"),
        (
            "torch",
            {"length": 17},
            "`length` must be at most the 16 tokens that BertForSequenceClassification takes, got 17",
        ),
    ],
)
def test_export_says_what_cannot_be_asked(tmp_path, to, options, reason):
    with pytest.raises(RecipeError, match=reason):
        export_model(uneven_bert(), to, tmp_path, **options)


@pytest.mark.parametrize(
    ("to", "command"),
    [
        ("onnx", 'pip install "hf_sparse[export]"'),
        ("openvino", "pip install openvino"),
        ("executorch", "pip install executorch"),
    ],
)
def test_missing_packages_are_named_with_what_installs_them(tmp_path, capsys, monkeypatch, to, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(tmp_path), "--to", to]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-sparse: BackendError: export to")
    assert command in error


def test_masked_model_has_to_be_baked_first(tmp_path):
    model = uneven_bert()
    pruner = attached(model.bert.encoder, sparsity=0.5, scorer="magnitude")
    with pytest.raises(RecipeError, match="still being pruned: bake the model first"):
        export_model(model, "torch", tmp_path)
    pruner.bake()


def test_export_does_not_overwrite_the_model(sparse, capsys):
    assert main(["export", str(sparse), "--to", "torch", "--output", str(sparse)]) == 2
    assert "folder of the model, whose config would be lost" in capsys.readouterr().err


def test_half_precision_that_a_runtime_lacks_comes_with_the_way_out(tmp_path, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no such Add")

    monkeypatch.setattr("transformers.exporters.DynamoExporter", lambda: SimpleNamespace(export=fail))
    with pytest.raises(BackendError, match=r"no such Add\. Its weights are torch.bfloat16; try dtype float32"):
        export_model(uneven_bert().bfloat16(), "torch", tmp_path, length=8)


@pytest.mark.parametrize(("asked", "loaded"), [("float32", torch.float32), (None, torch.bfloat16)])
def test_weights_are_of_the_type_asked_for(tmp_path, monkeypatch, asked, loaded):
    BertModel(config()).bfloat16().save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr("hf_sparse.hf.export.exporter.export_model", lambda model, *_, **__: seen.append(model.dtype))
    assert main(["export", str(tmp_path), "--to", "torch", *(["--dtype", asked] if asked else [])]) == 0
    assert seen == [loaded]


def test_missing_tokenizer_is_no_error(tmp_path, monkeypatch, caplog):
    BertModel(config()).save_pretrained(tmp_path)
    written: dict[str, Any] = {}

    def record(model, to, folder, **options):
        written.update(options, to=to, folder=folder, kind=type(model))
        return "report"

    monkeypatch.setattr("hf_sparse.hf.export.exporter.export_model", record)
    report: Any = export(str(tmp_path), "torch", batch=3)
    assert report == "report"
    assert written == {"batch": 3, "to": "torch", "folder": tmp_path / "torch", "kind": BertModel}
    assert "no tokenizer was copied" in caplog.text


def test_models_without_one_text_per_row_are_refused():
    with pytest.raises(RecipeError, match="ViTForImageClassification takes pixel_values"):
        sizes_for(ViTForImageClassification(ViTConfig(image_size=16, **NARROW)), 2, None)
    with pytest.raises(RecipeError, match="BertForMultipleChoice takes several sequences per row"):
        sizes_for(BertForMultipleChoice(config()), 2, None)
    t5 = T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    with pytest.raises(RecipeError, match="T5ForSequenceClassification looks for the end token"):
        sizes_for(T5ForSequenceClassification(t5), 2, None)


def test_roberta_takes_two_tokens_less_than_it_has_positions():
    model = RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=20, vocab_size=30, **NARROW))
    sizes = sizes_for(model, 2, None)
    assert sizes.length == 18
    assert model(**sample(model, sizes)).logits.shape == (2, 2)
    with pytest.raises(RecipeError, match="must be at most the 18 tokens"):
        sizes_for(model, 2, 19)


def test_sample_is_padded_and_has_both_kinds_of_token():
    model = BertModel(config())
    inputs = sample(model, Sizes(2, 8))
    assert inputs["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert inputs["input_ids"][1, 4:].tolist() == [0] * 4
    assert bool((inputs["input_ids"][inputs["attention_mask"] == 1] != 0).all())
    assert set(inputs["token_type_ids"].flatten().tolist()) == {0, 1}
    assert set(sample(model, Sizes(1, 1))) == {"input_ids", "attention_mask", "token_type_ids"}


def test_version_of_operators_reaches_the_file(tmp_path, monkeypatch):
    seen = {}

    def stop(model, inputs, settings):
        seen.update(settings)
        raise ValueError("enough")

    pytest.importorskip("onnxscript")
    monkeypatch.setattr("transformers.exporters.OnnxExporter", lambda: SimpleNamespace(export=stop))
    with pytest.raises(BackendError, match="enough"):
        export_model(uneven_bert(), "onnx", Path(tmp_path), opset=20)
    assert seen["opset_version"] == 20
    assert hf_sparse.__version__


def test_opset_that_the_exporter_cannot_write_is_an_error(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(BackendError, match=r"opset 1 was requested, but torch .* to opset \d\d only\. Nothing was"):
        export_model(uneven_bert(), "onnx", tmp_path / "out", opset=1)
    assert not (tmp_path / "out").exists()


def test_report_has_the_difference_with_the_limit_of_its_own_output():
    """The outputs have limits of their own: 1e-4 of the largest number in each."""
    outputs = {"logits": torch.full((2, 2), 100.0), "state": torch.zeros(2, 2)}
    exported = {"logits": outputs["logits"] + 5e-3, "state": outputs["state"] + 1e-6}
    model = uneven_bert()
    model.forward = lambda input_ids=None: outputs
    difference, allowed = compare_outputs(model, lambda **_: exported, [Sizes(2, 4)])
    assert difference == pytest.approx(5e-3, rel=1e-2)
    assert allowed == pytest.approx(1e-2)
