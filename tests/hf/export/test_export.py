from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5ForConditionalGeneration,
)
from transformers.exporters import ExportedModel

import hf_sparse
from hf_sparse import BackendError
from hf_sparse.cli.main import main
from hf_sparse.hf.export.exporter import compare_outputs, export, export_model
from hf_sparse.hf.export.inputs import Sizes, sample
from tests.helpers.tiny import save_t5
from tests.hf.export.uneven import NARROW, uneven_bert

SIZES = [(2, 8), (1, 16), (5, 3), (1, 1)]
"""Rows and tokens; only the first is what was traced."""


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


def test_report_has_the_difference_with_the_limit_of_its_own_output():
    """The outputs have limits of their own: 1e-4 of the largest number in each."""
    outputs = {"logits": torch.full((2, 2), 100.0), "state": torch.zeros(2, 2)}
    exported = {"logits": outputs["logits"] + 5e-3, "state": outputs["state"] + 1e-6}
    model = uneven_bert()
    model.forward = lambda input_ids=None: outputs
    difference, allowed = compare_outputs(model, lambda **_: exported, [Sizes(2, 4)])
    assert difference == pytest.approx(5e-3, rel=1e-2)
    assert allowed == pytest.approx(1e-2)
