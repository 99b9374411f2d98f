from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hf_sparse import RecipeError
from hf_sparse.analysis.perplexity import perplexity
from hf_sparse.cli.main import main
from tests.helpers import oneshot, tiny
from tests.helpers.kernels import all_present


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(oneshot.save_llama(tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(oneshot.write_text(tmp_path / "text.txt", 100))


def test_perplexity_is_that_of_the_loss_of_the_model(model: str, text: str) -> None:
    found = perplexity(model, text, length=21)
    ids = [3 + oneshot.WORDS.index(word) for word in Path(text).read_text().split()]
    losses = []
    for start in range(0, 100, 20):
        batch = torch.tensor([[1, *ids[start : start + 20]]])
        losses.append(float(oneshot.llama().float()(batch, labels=batch).loss))
    assert found.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)
    assert (found.tokens, found.windows, found.length, found.stride) == (100, 5, 21, 20)
    assert found.begins == "each begins with <s>"


def test_windows_stride_and_bos_are_as_requested_and_stated(model: str, text: str) -> None:
    found = perplexity(model, text, length=16, stride=5, samples=4, bos="never")
    assert (found.windows, found.tokens, found.stride) == (4, 15 + 3 * 5, 5)
    assert str(found).endswith("30 tokens in 4 windows of 16 tokens, stride 5, without BOS")
    assert perplexity(model, text).length == 64  # what the model takes


def test_model_against_itself_and_against_another(model: str, text: str, tmp_path: Path) -> None:
    same = perplexity(model, text, against=model, length=21)
    assert same.against is not None
    assert same.value == same.against.value
    assert same.agreement == 1.0
    assert same.divergence == pytest.approx(0.0, abs=1e-6)
    assert main(["prune", model, "--sparsity", "0.9", "--output", str(tmp_path / "sparse")]) == 0
    other = perplexity(str(tmp_path / "sparse"), text, against=model, length=21)
    assert other.against is not None
    assert other.divergence is not None
    assert other.against.value == same.value != other.value
    assert other.divergence > 0


def test_what_rounding_changes_is_measured_in_runtime_form(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_present(monkeypatch)
    sparse = str(tmp_path / "sparse")
    assert main(["prune", model, "--sparsity", "0.5", "--output", sparse]) == 0
    exact = perplexity(sparse, text, against=sparse, length=21, backend="csr")
    assert exact.against is not None
    assert exact.value == pytest.approx(exact.against.value, rel=1e-5)
    rounded = perplexity(sparse, text, against=sparse, length=21, backend="bitmask-int4")
    assert rounded.against is not None
    assert rounded.divergence is not None
    assert rounded.against.value == exact.against.value != rounded.value
    assert rounded.divergence > 1e-7
    assert main(["perplexity", sparse, "--data", text, "--length", "21", "--backend", "bitmask-int8"]) == 0
    assert f"{sparse}, computed by bitmask-int8" in capsys.readouterr().out
    assert main(["perplexity", sparse, "--data", text, "--backend", "bitmask-int9"]) == 2
    assert "`backend` must be one of" in capsys.readouterr().err


def test_verb_prints_text_and_json(model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["perplexity", model, "--data", text, "--length", "21", "--against", model]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["agreement"] == 1.0
    assert data["against"]["value"] == data["value"]
    assert main(arguments) == 0
    assert "ratio 1.0000, same most likely token 100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--length", "65", "at most 64"), ("--stride", "0", "`stride` must be"), ("--length", "1", "`length` must be")],
)
def test_requests_that_do_not_fit_are_refused(
    model: str, text: str, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["perplexity", model, "--data", text, option, value]) == 2
    assert message in capsys.readouterr().err


def test_only_causal_models_have_a_perplexity(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="BertModel, and perplexity is that of a model that predicts the next token"):
        perplexity(str(tiny.save_bert(tmp_path / "bert")), text)


def test_length_is_what_both_model_and_tokenizer_take(model: str, text: str) -> None:
    assert perplexity(model, text).length == 64
    path = Path(model, "tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 48}))
    assert perplexity(model, text).length == 48
