"""The vocabulary section of a recipe: trimmed before training, in a stage too, and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from hf_sparse import RecipeError
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.stages import load_stages, run_stages
from hf_sparse.vocabulary import Criteria, read_report
from tests.helpers.tokenizers import word_piece

SECTIONS = {"model": "m", "data": {"train": "a.json", "validation": "b.json"}}


def test_section_is_checked_and_written_back() -> None:
    recipe = Recipe.from_dict({**SECTIONS, "vocabulary": {"coverage": 0.99, "keep": ["a"]}})
    assert recipe.vocabulary == Criteria(coverage=0.99, keep=["a"])
    assert recipe.to_dict()["vocabulary"] == {"coverage": 0.99, "keep": ["a"]}
    with pytest.raises(RecipeError, match=r"vocabulary section has no key 'coverag'; did you mean 'coverage'?"):
        Recipe.from_dict({**SECTIONS, "vocabulary": {"coverag": 1}})


def test_stages_trim_then_prune(tmp_path: Path) -> None:
    tokenizer = word_piece()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": text, "label": label} for text, label in (("the fox", 0), ("a lazy dog", 1))] * 4
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = {
        "model": str(tmp_path / "model"),
        "data": {**{key: str(tmp_path / f"{key}.jsonl") for key in ("train", "validation")}, "max_length": 32},
        "training": {"max_steps": 2, "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"},
        "stages": [{"name": "trimmed", "vocabulary": {}}, {"name": "pruned", "sparsity": {"sparsity": 0.5}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run_stages(load_stages(tmp_path / "recipe.yaml"))
    report = read_report(tmp_path / "out" / "trimmed")
    assert report is not None
    assert report.held_out is not None
    assert report.held_out.examples == 8
    assert read_report(tmp_path / "out") == report
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(saved) == report.tokens_after < report.tokens
