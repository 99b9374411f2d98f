"""`hf-sparse heads` and `compact`: the table is head_importance on the texts, the picture and the files are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    T5Config,
    T5ForSequenceClassification,
)

from hf_sparse import RecipeError, SparsityConfig, compact, sparsify
from hf_sparse.analysis.head_table import HeadTable, heads
from hf_sparse.cli.main import main
from hf_sparse.pruning.head_importance import head_importance
from hf_sparse.recipe.sections import DataSection
from tests.helpers import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny.save_bert(tmp_path / "bert", head=True)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return tiny.write_sentences(tmp_path / "texts.jsonl")


def section(path: Path, **options: Any) -> DataSection:
    return DataSection(train=str(path), validation="none", max_length=16, **options)


def test_table_is_the_importance_of_heads_on_these_texts(saved: Path, texts: Path) -> None:
    table = heads(str(saved), section(texts), batch=5)
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    words, labels = zip(*tiny.sentences(), strict=True)
    batch = {**tokenizer(list(words), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}
    assert table.samples == 24
    assert table.names == tuple(f"bert.encoder.layer.{layer}.attention" for layer in range(2))
    torch.testing.assert_close(table.importance, head_importance(model, [batch]), rtol=1e-4, atol=1e-9)


def test_heads_of_a_model_that_writes_texts_are_measured_one_text_at_a_time(tmp_path: Path) -> None:
    tiny.save_t5(tmp_path / "t5")
    words = tiny.write_spellings(tmp_path / "words.jsonl", "cat doghouse")
    table = heads(str(tmp_path / "t5"), section(words, text="source", label="target"))
    assert table.importance.shape == (2 + 2 * 2, 4)  # two encoder layers; self- and cross-attention of two more
    assert bool((table.importance > 0).all())


def test_command_prints_the_table_and_draws_it(saved: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["heads", str(saved), "--data", str(texts), "--length", "16", "--samples", "10"]
    assert main([*command, "--plot", str(tmp_path / "heads.png")]) == 0
    out = capsys.readouterr().out
    assert "bert.encoder.layer.1.attention" in out
    assert "1.00 is" in out
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 10
    assert len(found["importance"]["bert.encoder.layer.0.attention"]) == 4


def test_heads_that_are_gone_are_shown_as_such() -> None:
    table = HeadTable(("a", "b"), torch.tensor([[1.0, float("nan")], [0.5, 0.25]]), 3)
    assert str(table).splitlines()[1:3] == ["a           1.00     -", "b           0.50  0.25"]
    assert table.to_dict() == {"samples": 3, "importance": {"a": [1.0, None], "b": [0.5, 0.25]}}


def test_label_that_the_model_does_not_know_is_an_error(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "the film is fine", "label": "so-so"}\n')
    with pytest.raises(RecipeError, match="row 0 of the data has label 'so-so', but the model knows LABEL_0, LABEL_1"):
        heads(str(saved), section(path))


def test_label_of_a_class_may_be_written_as_a_fraction_as_in_training(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "floats.csv"
    path.write_text("text,label\nthe film is fine,1.0\nthe plot is dull,0.0\n")
    assert heads(str(saved), section(path)).samples == 2
    path.write_text("text,label\nthe film is fine,0.5\nthe plot is dull,0.0\n")
    with pytest.raises(RecipeError, match=r"row 0 of the data has label 0\.5"):
        heads(str(saved), section(path))


@pytest.mark.parametrize("command", ["heads", "sensitivity", "report", "prune"])
def test_texts_longer_than_the_model_takes_are_refused(saved: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "film " * 50, "label": 1}) + "\n")
    more = {
        "report": ["--against", str(saved), "--html", str(tmp_path / "page.html")],
        "prune": ["--scorer", "taylor", "--sparsity", "0.5", "--output", str(tmp_path / "out")],
    }
    assert main([command, str(saved), "--data", str(path), "--length", "17", *more.get(command, [])]) == 2
    assert "examples are cut at 17 tokens, but the model takes at most 16" in capsys.readouterr().err


def test_columns_and_length_are_those_of_the_recipe_beside_the_model(saved: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [json.dumps({"sentence": text, "mood": label}) for text, label in tiny.sentences()]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    command = ["heads", str(saved), "--data", str(tmp_path / "own.jsonl"), "--json"]
    assert main(command) == 2
    assert "'text'" in capsys.readouterr().err
    (saved / "recipe.yaml").write_text("data: {text: sentence, label: mood, max_length: 4}")
    assert main(command) == 0
    cut = json.loads(capsys.readouterr().out)["importance"]
    assert main([*command, "--length", "16"]) == 0  # what is given counts
    assert json.loads(capsys.readouterr().out)["importance"] != cut
    (saved / "recipe.yaml").write_text("data: {text: [a, b, c]}")
    assert main(command) == 2
    assert "`data.text` must be a column name or a list of two" in capsys.readouterr().err


def test_model_without_a_head_for_texts_is_refused(texts: Path, tmp_path: Path, capsys: Any) -> None:
    BertForMaskedLM(tiny.config()).save_pretrained(tmp_path / "words")
    tiny.save_tokenizer(tmp_path / "words")
    for command in ("heads", "sensitivity"):
        assert main([command, str(tmp_path / "words"), "--data", str(texts), "--length", "16"]) == 2
        assert "BertForMaskedLM gives no class or number for a text" in capsys.readouterr().err


def test_encoder_decoder_that_classifies_is_measured_by_its_classes(texts: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 17, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    special: dict[str, Any] = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3, "num_labels": 2}
    T5ForSequenceClassification(T5Config(**sizes, **special)).save_pretrained(tmp_path / "t5")
    tiny.save_tokenizer(tmp_path / "t5")
    assert heads(str(tmp_path / "t5"), section(texts)).importance.shape == (3, 4)


def test_no_texts_at_once_is_an_error(saved: Path, texts: Path) -> None:
    with pytest.raises(RecipeError, match="`batch` must be a positive integer, got 0"):
        heads(str(saved), section(texts), batch=0)


def test_compact_command_writes_the_smaller_model(saved: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    sparsify(
        model, SparsityConfig(groups=[{"pattern": "head", "sparsity": 0.5}, {"pattern": "neuron", "sparsity": 0.5}])
    )
    model.save_pretrained(tmp_path / "sparse")
    tiny.save_tokenizer(tmp_path / "sparse")
    assert main(["compact", str(tmp_path / "sparse"), "--output", str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention: 2 of 4 heads" in out
    assert "bert.encoder.layer.1.intermediate: 32 of 64 neurons" in out
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tmp_path / "small")
    compact(model)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_compact_command_refuses_a_model_that_has_nothing_to_cut_out(saved: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["compact", str(saved), "--output", str(tmp_path / "small")]) == 2
    assert "nothing to remove" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert main(["compact", str(saved), "--output", str(saved)]) == 2
