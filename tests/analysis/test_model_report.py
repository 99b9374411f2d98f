"""The report of a model: one safe page with every section, and reasons for what is omitted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.cli.main import main
from tests.helpers import tiny
from tests.helpers.pages import EVIL, check_page
from tests.helpers.speeds import speed_file


def test_report_is_one_safe_page_with_every_section(dense: Path, sparse: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{text} {EVIL}", "label": label}) for text, label in tiny.sentences()]
    (tmp_path / "dev.jsonl").write_text("\n".join(rows) + "\n")
    log: list[Any] = [
        {"step": step, "sparsity": step / 10, "eval_accuracy": 0.5 + step / 20, f"eval_{EVIL}": 1} for step in (1, 2)
    ]
    log += [{"step": 3, "sparsity": float("nan"), "eval_accuracy": "high"}, "no row"]
    (sparse / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (sparse / "eval_results.json").write_text(json.dumps({f"eval_{EVIL}": 0.5}))
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(machine=EVIL)))
    command = ["report", str(sparse), "--against", str(dense), "--data", str(tmp_path / "dev.jsonl"), "--length", "16"]
    assert main([*command, "--html", str(tmp_path / "out.html"), "--bench", str(tmp_path / "bench.json")]) == 0
    text = (tmp_path / "out.html").read_text()
    check_page(text)
    assert "&lt;script&gt;" in text
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:7] == [
        "Size",
        "Speed",
        "Sparsity per layer",
        "Kept heads",
        "Kept neurons",
        "Weights",
        "Training curves",
    ]
    assert len(titles) == 11
    assert "bert.encoder.layer.1.attention: 2 of 4" in text
    assert "4.00 ms [3.90, 4.10]" in text
    assert text.count("<img") == 12
    assert "typos in all longer words" in text


def test_report_says_what_is_omitted_and_why(dense: Path) -> None:
    assert main(["report", str(dense)]) == 0
    text = (dense / "report.html").read_text()
    check_page(text)
    reasons = re.findall("Omitted: (.*?)</p>", text)
    assert len(reasons) == 3
    assert any("no trainer_state.json" in reason for reason in reasons)
    assert any("--bench FILE" in reason for reason in reasons)


def test_report_refuses_examples_without_a_dense_baseline(dense: Path, capsys: Any) -> None:
    assert main(["report", str(dense), "--data", "x.jsonl"]) == 2
    assert "add --against DENSE_DIR" in capsys.readouterr().err


def test_report_draws_values_as_far_apart_as_floats_can_be(dense: Path) -> None:
    log = [{"step": 1, "loss": 1e308}, {"step": 2, "loss": -1e308}]
    (dense / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["report", str(dense)]) == 0


def test_report_finds_out_first_that_there_is_no_folder_for_the_page(capsys: Any) -> None:
    assert main(["report", "no/model", "--html", "no/page.html"]) == 2
    assert "the folder no does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"architectures": 5}, {"architectures": True}, {"architectures": {"a": 1}}, {"model_type": 5}]
)
def test_report_of_a_model_whose_config_is_damaged_is_an_error(dense: Path, capsys: Any, change: Any) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, **change}))
    assert main(["report", str(dense)]) == 2
    assert "cannot load model" in capsys.readouterr().err
