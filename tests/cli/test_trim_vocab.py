"""`hf-sparse trim-vocab`: model and tokenizer together, in a form that plain transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from hf_sparse.cli.main import main
from hf_sparse.vocabulary import read_report
from tests.helpers.tokenizers import CORPUS, word_piece

LINES = ["the quick fox", "a lazy dog", ""] * 20
PLAIN = """
import sys
from transformers import AutoModelForMaskedLM, AutoTokenizer
model, tokenizer = AutoModelForMaskedLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
logits = model(**tokenizer("the quick fox", return_tensors="pt")).logits
print(tuple(logits.shape), len(tokenizer), "hf_sparse" in sys.modules, float(logits.sum()))
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Write a tiny model with its tokenizer, and a corpus beside it."""
    tokenizer = word_piece()
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(LINES), encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: object) -> int:
    """Run the verb on the model of the fixture."""
    return main(["trim-vocab", str(folder / "model"), "--output", str(folder / "small"), *map(str, arguments)])


def test_model_and_tokenizer_load_without_hf_sparse(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(saved, "--data", saved / "corpus.txt", "--coverage", "1") == 0
    out = capsys.readouterr().out
    assert "fertility (tokens per word), held out  1.0000 -> 1.0000" in out
    assert "100.0000% of 114 tokens in 38 sequences" in out
    assert f"Saved in {saved / 'small'}" in out
    report = read_report(saved / "small")
    assert report is not None
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}  # without the repository on the path
    command = [sys.executable, "-c", PLAIN, str(saved / "small")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=saved)
    assert done.returncode == 0, done.stderr
    whole = AutoModelForMaskedLM.from_pretrained(saved / "model")
    tokenizer = AutoTokenizer.from_pretrained(saved / "model")
    tokens, vocab = tokenizer("the quick fox", return_tensors="pt"), tokenizer.get_vocab()
    kept = [vocab[token] for token in AutoTokenizer.from_pretrained(saved / "small").get_vocab()]
    expected = float(whole(**tokens).logits[..., kept].sum())
    shape, size, imported, total = done.stdout.rsplit(" ", 3)[0].strip(), *done.stdout.split()[-3:]
    assert (shape, size, imported) == (f"(1, {len(tokens['input_ids'][0])}, {report.rows_after})", size, "False")
    assert int(size) == report.tokens_after < report.tokens
    assert float(total) == pytest.approx(expected, abs=1e-4)


def test_modules_of_sentence_transformers_are_carried_over(saved: Path) -> None:
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    files = {"modules.json": [pooling], "1_Pooling/config.json": {"pooling_mode_cls_token": True}}
    for name, content in files.items():
        (saved / "model" / name).parent.mkdir(exist_ok=True)
        (saved / "model" / name).write_text(json.dumps(content), encoding="utf-8")
    assert run(saved, "--data", saved / "corpus.txt") == 0
    for name, content in files.items():
        assert json.loads((saved / "small" / name).read_text(encoding="utf-8")) == content


def test_json_plot_and_columns(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [json.dumps({"sentence": line}) for line in (*LINES, *CORPUS)]
    (saved / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options: tuple[object, ...] = (
        "--text",
        "sentence",
        "--min-count",
        "2",
        "--held-out",
        saved / "corpus.txt",
        "--keep",
        "jumps",
    )
    options += ("--drop-characters", "--pad-to-multiple-of", "8", "--json", "--plot", saved / "size.png")
    assert run(saved, "--data", saved / "rows.jsonl", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows_after"] % 8 == 0
    assert printed["held_out"]["examples"] == 40
    assert "jumps" in AutoTokenizer.from_pretrained(saved / "small").get_vocab()
    assert (saved / "size.png").stat().st_size > 1000


def test_script_alone(saved: Path) -> None:
    assert run(saved, "--script", "Latin", "--script", "Common", "--drop-characters") == 0
    vocab = AutoTokenizer.from_pretrained(saved / "small").get_vocab()
    assert {"fox", "12", "!", "caf\u00e9"} <= set(vocab)
    assert not {token for token in vocab if "\u0400" <= token[-1] <= "\u04ff" or token[-1] == "\u6f22"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data, --keep or --script"),
        (["--data", "nothing.txt"], "cannot read the corpus nothing.txt"),
        (["--data", "corpus.txt", "--coverage", "2"], "`coverage` must be in (0, 1], got 2.0"),
        (["--data", "model/config.json"], "has no column 'text'"),
        (["--data", "corpus.txt", "--output", "model"], "which would be overwritten"),
        (["--data", "corpus.txt", "--plot", "picture.exe"], "the suffix must be one of"),
        (["--script", "Elvish"], "Unicode scripts"),
    ],
)
def test_errors(saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(saved)
    assert run(Path(), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (saved / "small").exists()
