"""The report: read back whole, refused where it is not one, and shown in card, HTML page and plot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from hf_sparse import CheckpointError, VocabularyReport, trim_vocabulary
from hf_sparse.hf.hub.model_card import card_text, facts_of
from hf_sparse.vocabulary.held_out import HeldOut
from hf_sparse.vocabulary.report import REPORT, carry_report, read_report
from tests.helpers.tokenizers import CORPUS, byte_bpe, tokens_of


def report(**changes: Any) -> VocabularyReport:
    """Return a report of round numbers."""
    held = HeldOut(10, 100, 120, 132, 108, 4, 40, 52, 1, 2)
    whole = VocabularyReport(
        "BPE", 1000, 100, 1000, 100, 8000, 800, 32000, 3200, 10000, 2800, 50, 5000, 0.99,
        {"seen": 60, "special": 40}, (("<b>|x", 7), ("\x1b[2J", 3)), ((0.9, 50), (0.99, 90), (1.0, 200)), held,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def test_figures_by_hand() -> None:
    made = report()
    assert (made.parameters_saved, made.bytes_saved, made.size_at(200)) == (7200, 28800, 3600)
    held = made.held_out
    assert held is not None
    assert (held.fertility, held.coverage, held.growth) == ((1.2, 1.32), 0.9, 1.3)
    text = str(made)
    lines = ["1,000 -> 100 (BPE)", "10,000 -> 2,800 (28.0%)", "80.0% -> 28.6%", "99.0000% of 5,000 tokens in 50"]
    lines += ["1.2000 -> 1.3200", "4 of 10 sequences, which get 30.00% longer", "1 -> 2", "60 seen, 40 special"]
    for line in lines:
        assert line in text
    assert "fertility was not measured" in str(report(held_out=None))


def test_report_is_read_back_whole(tmp_path: Path) -> None:
    for made in (report(), report(held_out=None, caveat="a note", removed=(), curve=())):
        made.save(tmp_path)
        assert read_report(tmp_path) == made
    carry_report(tmp_path, tmp_path.joinpath("next").absolute().parent)
    (tmp_path / "other").mkdir()
    carry_report(tmp_path, tmp_path / "other")
    assert read_report(tmp_path / "other") == report(held_out=None, caveat="a note", removed=(), curve=())
    (tmp_path / REPORT).unlink()
    carry_report(tmp_path, tmp_path / "other")
    assert read_report(tmp_path / "other") is None


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "1"}, {"tokens": True}, {"coverage": None}, {"kind": 5}, {"reasons": []}, {"reasons": {"a": "b"}},
        {"removed": "ab"}, {"removed": [["a"]]}, {"curve": [["a", 1]]}, {"curve": 5}, {"held_out": []}, {"caveat": 1},
        {"held_out": {"words": 1}}, {"coverage": float("nan")},
    ],
)  # fmt: skip
def test_file_that_is_no_report_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(json.dumps({**report().to_dict(), **change}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"vocabulary_report\.json is not one that hf_sparse wrote"):
        read_report(tmp_path)


def test_card_and_page_show_it_escaped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hf_sparse.analysis.model_report import write_report

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=20, intermediate_size=8, **sizes)).save_pretrained(tmp_path)
    report().save(tmp_path)
    card = card_text(facts_of(tmp_path))
    assert "## Vocabulary" in card
    assert "A model with a smaller vocabulary" in card
    assert "import hf_sparse" not in card  # a dense model of plain transformers
    assert "&lt;b&gt;\\|x" in card
    assert "<b>|x" not in card
    write_report(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nines of coverage" in page
    assert "&lt;b&gt;|x" in page
    assert "\x1b" not in card + page


def test_plot_shows_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    report().plot(tmp_path / "size.png")
    drawn = json.loads(image_module.open(tmp_path / "size.png").text["Description"])[0]
    assert [y for _, y in drawn["lines"][0]] == [0.0024, 0.00272, 0.0036]
    assert drawn["points"] == [["this model", [0.01, 0.0028]]]


def test_axis_of_the_plot_has_readable_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from hf_sparse.reporting import plotting

    figures: list[Any] = []
    monkeypatch.setattr(plotting, "write_figure", lambda figure, path: figures.append(figure))
    report().plot(tmp_path / "size.png")
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert "99 %" in labels
    assert all(label.endswith(" %") for label in labels)


def test_held_out_sequences_are_measured_with_both_tokenizers() -> None:
    tokenizer = byte_bpe()
    sizes: dict[str, Any] = {"hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    before = [tokens_of(tokenizer, sequence) for sequence in CORPUS]
    made = trim_vocabulary(model, tokenizer, CORPUS[:1], held_out=CORPUS)
    after = [tokens_of(tokenizer, sequence) for sequence in CORPUS]
    held = made.held_out
    assert held is not None
    changed = [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    assert held == HeldOut(
        len(CORPUS),
        sum(len(sequence.split()) for sequence in CORPUS),
        sum(map(len, before)),
        sum(map(len, after)),
        sum(token in tokenizer.get_vocab() for tokens in before for token in tokens),
        len(changed),
        sum(len(before[index]) for index in changed),
        sum(len(after[index]) for index in changed),
    )
    assert 0 < held.changed < held.examples
    assert held.growth > 1


def test_the_word_none_is_not_the_unknown_token_of_a_tokenizer_without_one() -> None:
    tokenizer = byte_bpe(["None None None"] * 9)
    tokenizer.unk_token = None
    assert tokenizer.tokenize("None") == ["None"]
    sizes: dict[str, Any] = {"hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    held = trim_vocabulary(model, tokenizer, ["None"], held_out=["None"]).held_out
    assert held is not None
    assert (held.tokens, held.unknown, held.unknown_after) == (1, 0, 0)
