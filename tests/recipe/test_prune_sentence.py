"""`hf-sparse prune` and its like on folders of sentence-transformers: their modules come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hf_sparse
from hf_sparse.cli.main import main
from hf_sparse.hf.embedding.module_files import carry_modules, module_files
from tests.helpers.sentence import TEXTS, cross_encoder, package, sentence_transformer

QUARTER: dict[str, Any] = {"sparsity": 0.75}


def saved(folder: Path, **options: Any) -> Path:
    sentence_transformer(folder, **options).save_pretrained(str(folder / "dense"))
    return folder / "dense"


def encoded(model: Any) -> Any:
    return model.encode(TEXTS, show_progress_bar=False)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in module_files(folder)}


def test_the_pruned_folder_gives_the_embeddings_of_the_pruned_model(tmp_path: Path) -> None:
    dense, out = saved(tmp_path, pooling="cls", dense=True), tmp_path / "out"
    assert main(["prune", str(dense), "--sparsity", "0.75", "--output", str(out)]) == 0
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"} <= names(out) == names(dense)
    expected = package().SentenceTransformer(str(dense), device="cpu")
    before = encoded(expected)
    hf_sparse.sparsify(expected[0].model, hf_sparse.SparsityConfig(**QUARTER))
    found = encoded(package().SentenceTransformer(str(out), device="cpu"))
    assert (found == encoded(expected)).all()
    assert np.abs(found - before).max() > 1e-3


def test_examples_without_labels_are_enough_for_the_inputs_of_layers(tmp_path: Path) -> None:
    dense, out = saved(tmp_path), tmp_path / "out"
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"words": text}) + "\n" for text in TEXTS))
    options = ["--scorer", "sparsegpt", "--sparsity", "0.75", "--length", "8", "--data", str(data), "--text", "words"]
    assert main(["prune", str(dense), *options, "--output", str(out)]) == 0
    model = package().SentenceTransformer(str(out), device="cpu")
    assert hf_sparse.summarize(model).sparsity == pytest.approx(0.75, abs=0.01)
    expected = package().SentenceTransformer(str(dense), device="cpu")
    tokens = [
        dict(expected.tokenizer(TEXTS[i : i + 16], padding=True, truncation=True, max_length=8, return_tensors="pt"))
        for i in range(0, len(TEXTS), 16)
    ]
    hf_sparse.sparsify(expected[0].model, hf_sparse.SparsityConfig(scorer="sparsegpt", **QUARTER), tokens)
    np.testing.assert_array_equal(encoded(model), encoded(expected))


def test_a_reranker_keeps_its_modules_too(tmp_path: Path) -> None:
    model = cross_encoder(tmp_path)
    model.save_pretrained(str(tmp_path / "dense"))
    assert main(["prune", str(tmp_path / "dense"), "--sparsity", "0.75", "--output", str(tmp_path / "out")]) == 0
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    hf_sparse.sparsify(model, hf_sparse.SparsityConfig(**QUARTER))
    found = package().CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs, show_progress_bar=False)
    assert (found == model.predict(pairs, show_progress_bar=False)).all()


def test_modules_of_a_model_that_was_there_before_are_removed(tmp_path: Path) -> None:
    dense, out = saved(tmp_path, dense=True, normalize=False), tmp_path / "out"
    carry_modules(str(dense), out)
    assert names(out) == names(dense) > {"2_Dense/config.json"}
    sentence_transformer(tmp_path, normalize=False).save_pretrained(str(tmp_path / "other"))
    carry_modules(str(tmp_path / "other"), out)
    assert names(out) == names(tmp_path / "other")
    assert not any(out.glob("2_Dense/*"))
    (tmp_path / "plain").mkdir()
    carry_modules(str(tmp_path / "plain"), out)
    assert not names(out)
    assert not (out / "modules.json").exists()


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    dense = saved(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    (dense / "9_Secret").symlink_to(tmp_path / "secret")
    with pytest.raises(hf_sparse.CheckpointError, match="outside of its folder"):
        carry_modules(str(dense), tmp_path / "out")
