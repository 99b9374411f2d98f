"""Calibration, changed predictions and corrupted inputs, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse.analysis.robustness import Robustness, ece, truncated, with_typos
from hf_sparse.cli.main import main
from tests.helpers import tiny


def test_calibration_by_hand() -> None:
    # Confidences 0.6 (wrong), 0.65 (right) in (0.6, 0.7] and (0.5, 0.6]; 0.95 right, 0.91 wrong in the last bin of ten.
    high = torch.tensor([0.6, 0.65, 0.95, 0.91])
    labels = torch.tensor([1, 0, 0, 1])
    expected = (abs(0 - 0.6) + abs(1 - 0.65) + abs(1 - 0.95 + 0 - 0.91)) / 4
    assert ece(torch.stack([high, 1 - high], 1), labels, bins=10) == pytest.approx(expected, abs=1e-6)


def test_changed_predictions_and_classes_by_hand() -> None:
    def outputs(*classes: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(classes), 2).float()

    labels = torch.tensor([0, 0, 1, 1])
    result = Robustness(("no", "yes"), ("a", "b", "c", "d"), labels, outputs(0, 1, 1, 1), outputs(1, 0, 1, 1), {})
    assert result.counts() == {"became wrong": 1, "became correct": 1, "changed to another wrong class": 0}
    assert result.changed() == [0, 1]
    name, texts, precision, recall, _ = result.classes()[1]
    assert (name, texts, precision, recall) == ("yes", 2, (2 / 3, 2 / 3), (1.0, 1.0))
    assert Robustness(("no", "yes"), ("a",), labels[:1], outputs(0), outputs(0), {}).changed() == []


def test_typos_swap_inner_neighbours_the_same_way_each_time() -> None:
    text = "wonderful film of the century"
    changed = with_typos(text, 1.0)
    assert changed == with_typos(text, 1.0) != text
    assert with_typos(text, 0.0) == text
    for before, after in zip(text.split(), changed.split(), strict=True):
        assert sorted(before) == sorted(after)
        assert (before[0], before[-1]) == (after[0], after[-1])
    assert truncated("a", 0.25) == "a"


def test_outputs_that_are_not_finite_are_an_error(dense: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny.save_tokenizer(tmp_path / "nan")
    data = ["--data", str(tiny.write_sentences(tmp_path / "dev.jsonl", slice(4))), "--length", "16"]
    assert main(["heads", str(tmp_path / "nan"), *data]) == 2
    assert "importance of its heads is not known" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nan"), "--against", str(dense), *data]) == 2
    assert "probabilities that are not finite" in capsys.readouterr().err
