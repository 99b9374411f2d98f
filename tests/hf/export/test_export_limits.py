"""What an export refuses or reports, and samples of inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertForMultipleChoice,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sparse import BackendError, RecipeError
from hf_sparse.cli.main import main
from hf_sparse.hf.export.exporter import export, export_model
from hf_sparse.hf.export.inputs import Sizes, sample, sizes_for
from tests.helpers.layers import attached
from tests.helpers.tiny import config
from tests.hf.export.uneven import NARROW, uneven_bert


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


def test_opset_that_the_exporter_cannot_write_is_an_error(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(BackendError, match=r"opset 1 was requested, but torch .* to opset \d\d only\. Nothing was"):
        export_model(uneven_bert(), "onnx", tmp_path / "out", opset=1)
    assert not (tmp_path / "out").exists()
