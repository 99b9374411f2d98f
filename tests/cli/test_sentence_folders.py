"""The commands on folders of sentence-transformers: they read the transformer inside, and keep what is not theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse.analysis.benchmark import bench
from hf_sparse.cli.main import main
from tests.helpers.sentence import cross_encoder, sentence_transformer

KINDS = {"SentenceTransformer": sentence_transformer, "CrossEncoder": cross_encoder}


def saved(folder: Path, kind: str) -> Path:
    model = KINDS[kind](folder)
    hf_sparse.sparsify(model, hf_sparse.SparsityConfig(sparsity=0.75, pattern={"name": "block", "rows": 4, "cols": 1}))
    model.eval().save_pretrained(str(folder / "sparse"))
    (folder / "sparse" / "eval_results.json").write_text(json.dumps({"eval_spearman": 0.8125}))
    return folder / "sparse"


@pytest.mark.parametrize("kind", KINDS)
def test_card_adds_its_section_and_needs_no_force(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind)
    for _ in range(2):
        assert main(["card", str(folder), "--license", "apache-2.0"]) == 0
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.count("## Sparsity") == 1
        assert "## Model Details" in card
        assert f"from sentence_transformers import {kind}" in card
        assert "0.8125" in card
        assert "license: apache-2.0" in card


def test_what_somebody_wrote_into_such_a_card_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path, "SentenceTransformer")
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\n## Thanks\n\nTo everybody.\n", encoding="utf-8")
    assert main(["card", str(folder)]) == 0
    assert "To everybody." in card.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_bench_and_report_read_the_transformer_inside(kind: str, tmp_path: Path, capsys: Any) -> None:
    folder = saved(tmp_path, kind)
    assert main(["bench", str(folder), "--rounds", "2", "--backend", "csr", "--length", "8", "--save"]) == 0
    assert "layers sparse" in capsys.readouterr().out
    assert main(["report", str(folder), "--html", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "spearman 0.8125" in page
    assert "median and quartiles of a forward pass" in page


def test_bench_takes_the_length_of_a_model_that_reads_fewer_tokens(tmp_path: Path) -> None:
    folder = saved(tmp_path, "SentenceTransformer")
    most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert most < 128
    assert bench(str(folder), rounds=2, backend="csr").setting["length"] == most
    with pytest.raises(hf_sparse.RecipeError, match=f"at most the {most} positions"):
        bench(str(folder), rounds=2, backend="csr", length=128)
