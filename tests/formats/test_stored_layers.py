"""Kinds of layers in a file, by hand; what inspection, card and report say of convolutions, forms and filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse import SparsityConfig, compact, sparsify
from hf_sparse.cli.main import main
from hf_sparse.formats.inspection import StoredTensor, inspect
from hf_sparse.formats.layer_forms import FORMS_KEY, LayerForm, LayerForms
from hf_sparse.formats.stored_layers import LayerGroup, layer_groups
from hf_sparse.hf.hub.model_card import card_text, facts_of
from tests.helpers import convolutional, tiny
from tests.helpers.pages import check_page


def stored(name: str, *shape: int, kept: float = 1.0, size: int = 100) -> StoredTensor:
    return StoredTensor(name, "bitmask", shape, "F32", int(torch.Size(shape).numel() * kept), size)


def test_kinds_and_forms_by_hand() -> None:
    tensors = [
        stored("a.weight", 4, 6, kept=0.5),
        stored("b.weight", 2, 3, 5, 5, kept=0.2),
        stored("c.weight", 2, 3, 5),
        stored("experts.gate_up_proj", 2, 4, 8, kept=0.25),
        stored("d.buckets", 16),
        stored("d.bias", 8, size=7),
        stored("e.weight", 8, 8, kept=0.5),
        stored("e.low_rank.down", 2, 8),
        stored("e.low_rank.up", 8, 2),
    ]
    forms = LayerForms({
        "d": LayerForm("hashed", {"rows": 8, "columns": 16, "buckets": 16, "seed": 3}),
        "e": LayerForm("sparse_low_rank", {"rows": 8, "columns": 8, "rank": 2}),
        "elsewhere": LayerForm("hashed", {"rows": 8, "columns": 8, "buckets": 4, "seed": 3}),
    })  # fmt: skip
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    assert layer_groups(matrices, tensors, {FORMS_KEY: forms.to_dict()}) == [
        LayerGroup("convolutions", 2, 180, 180, 60, 200),
        LayerGroup("matrices", 2, 88, 88, 44, 200),
        LayerGroup("stacked experts", 1, 64, 64, 16, 100),
        LayerGroup("hashed, buckets 16", 1, 128, 16, 16, 100),
        LayerGroup("low rank beside a sparse weight, rank 2", 1, 64, 32, 32, 200),
    ]
    assert layer_groups(matrices, tensors, {FORMS_KEY: forms.to_dict()})[3].row == (
        "hashed, buckets 16", "1", "16 for 128 entries", "0.00%", "0.1 kB",
    )  # fmt: skip


@pytest.fixture
def filters(tmp_path: Path) -> Path:
    """Save a ResNet with half of the weights, of which half of the inner filters have left."""
    model = convolutional.build("resnet")
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    compact(model)
    sparsify(model, SparsityConfig(sparsity=0.5))
    model.save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def test_convolutions_and_filters_are_named_everywhere(filters: Path) -> None:
    inspection = inspect(filters)
    (group,) = inspection.layers
    assert group.kind == "convolutions"
    assert (group.layers, group.parameters) == (len(inspection.weights), sum(w.parameters for w in inspection.weights))
    left, before, places = inspection.removed["filters"]
    assert (2 * left, places) == (before, 3)
    assert f"filters: {left} of {before} left in 3 layers that have lost some" in str(inspection)
    assert f"convolutions: {group.layers} layers, {group.parameters:,}, 50." in str(inspection)
    as_json = json.loads(json.dumps(inspection.to_dict()))
    assert as_json["removed"] == {"filters": {"left": left, "of": before, "layers": 3}}
    assert as_json["layers"][0]["kind"] == "convolutions"

    text = card_text(facts_of(filters))
    assert f"Compaction kept {left} of {before} filters of the pruned parts" in text
    assert (
        "## Layers\n\n| layers | count | parameters | zeros | stored |\n| --- | --- | --- | --- | --- |\n| convol"
        in text
    )

    assert main(["report", str(filters)]) == 0
    page = (filters / "report.html").read_text()
    check_page(page)
    assert "<h2>Layers</h2>" in page
    assert "<h2>Kept filters</h2>" in page
    assert ": 8 of 16" in page
    assert f"filters: {left} of {before} left" in page


@pytest.mark.parametrize(
    ("group", "named"),
    [
        ({"compress": {"name": "hashed", "ratio": "1/8"}}, "hashed, buckets "),
        ({"compress": {"name": "low_rank", "rank": 2}}, "low rank, rank 2"),
        (
            {"scorer": "wanda", "sparsity": 0.5, "compress": {"name": "low_rank", "rank": 2}},
            "low rank beside a sparse ",
        ),
    ],
)
def test_forms_are_named_everywhere(group: Any, named: str, tmp_path: Path) -> None:
    folder = tiny.save_bert(tmp_path / "bert", head=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [text for text, _ in tiny.sentences()[:4]]
    batch = dict(AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True))
    sparsify(model, SparsityConfig(**group), None if "hashed" in named else [batch])
    model.save_pretrained(tmp_path / "out")
    inspection = inspect(tmp_path / "out")
    form = next(own for own in inspection.layers if own.kind.startswith(named))
    assert form.layers == 12
    assert form.stored_bytes == 4 * form.parameters
    assert form.parameters < form.entries / 2
    assert str(form) in str(inspection)
    assert named in card_text(facts_of(tmp_path / "out"))
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert named in page


def test_model_of_matrices_has_no_section_on_layers(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.save_bert(tmp_path / "bert", head=True))
    sparsify(model, SparsityConfig(sparsity=0.5))
    model.save_pretrained(tmp_path / "out")
    assert [group.kind for group in inspect(tmp_path / "out").layers] == ["matrices"]
    assert "## Layers" not in card_text(facts_of(tmp_path / "out"))
    assert "matrices" not in str(inspect(tmp_path / "out"))
