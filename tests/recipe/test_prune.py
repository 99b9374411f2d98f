"""`hf-sparse prune` of causal language models with calibration texts, and of others with examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_plain
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_sparse import RecipeError, SparsityConfig, sparsify
from hf_sparse.cli.main import main
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.recipe.prune import CalibrationText, prune
from hf_sparse.recipe.texts import TokenStream
from tests.helpers import oneshot, tiny


def pruned(tmp_path: Path, *options: str, dtype: torch.dtype = torch.float32) -> tuple[int, Path]:
    model = oneshot.save_llama(tmp_path / "model", dtype=dtype)
    data = oneshot.write_text(tmp_path / "text.txt")
    arguments = ["prune", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    return main([*arguments, "--samples", "4", "--length", "32", *options]), tmp_path / "out"


def test_text_calibrates_as_sequences_in_python_do(tmp_path: Path) -> None:
    status, out = pruned(tmp_path, "--scorer", "sparsegpt", "--pattern", "2:4", "--seed", "3")
    assert status == 0
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    stream = TokenStream.of((tmp_path / "text.txt").read_text(), load_tokenizer(str(out)))
    batches = [{"input_ids": ids} for ids in stream.samples(4, 32, seed=3)]
    sparsify(expected, SparsityConfig(scorer="sparsegpt", pattern="2:4"), batches)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_weights_of_16_bits_are_pruned_in_float32_and_saved_as_they_were(tmp_path: Path) -> None:
    status, out = pruned(tmp_path, "--scorer", "wanda", "--sparsity", "0.5", dtype=torch.bfloat16)
    assert status == 0
    dense = load_plain(tmp_path / "model" / "model.safetensors")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    weight = loaded.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, dense["model.layers.1.mlp.up_proj.weight"] * (weight != 0))
    assert float((weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("scorer", ["taylor", "head_importance"])
def test_heads_are_measured_on_a_text(tmp_path: Path, scorer: str) -> None:
    status, out = pruned(tmp_path, "--scorer", scorer, "--pattern", "head", "--sparsity", "0.5")
    assert status == 0
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    stream = TokenStream.of((tmp_path / "text.txt").read_text(), load_tokenizer(str(out)))
    batches = [{"input_ids": ids, "labels": ids} for ids in stream.samples(4, 32)]
    sparsify(expected, SparsityConfig(scorer=scorer, pattern="head", sparsity=0.5), batches)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


@pytest.mark.parametrize("options", [["--reconstruction", "cg"], ["--selection", "owl"]])
def test_magnitude_with_what_looks_at_inputs(tmp_path: Path, options: list[str]) -> None:
    status, out = pruned(tmp_path, "--sparsity", "0.5", *options)
    assert status == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    zeros = torch.cat([(layer.mlp.up_proj.weight == 0).flatten() for layer in loaded.model.layers])
    assert float(zeros.double().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "wanda", "--sparsity", "0.5", "--length", "900"], "at most 64"),
        (["--scorer", "wanda", "--sparsity", "0.5", "--samples", "0"], "samples` must be a positive integer, got 0"),
        (["--sparsity", "0.5"], "must be a file with suffix .json"),
        (["--scorer", "wanda", "--pattern", "row", "--sparsity", "0.5"], "does not work with pattern 'row'"),
    ],
)
def test_requests_that_do_not_fit_are_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = pruned(tmp_path, *options)
    assert status == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-sparse: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not out.exists()


def test_encoders_are_calibrated_with_examples(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path / "model", head=True)
    data = tiny.write_sentences(tmp_path / "data.jsonl")
    options = ["--scorer", "sparsegpt", "--pattern", "4:8", "--data", str(data), "--length", "8"]
    assert main(["prune", str(model), *options, "--output", str(tmp_path / "out")]) == 0
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    weight = loaded.bert.encoder.layer[1].output.dense.weight
    assert (weight.view(-1, 8) != 0).sum(1).eq(4).all()


@pytest.mark.parametrize("head", [True, False])
def test_encoders_are_calibrated_with_plain_text_that_begins_and_ends_as_theirs_do(tmp_path: Path, head: bool) -> None:
    model = tiny.save_bert(tmp_path / "model", head=head)
    data = tmp_path / "plain.txt"
    data.write_text(" ".join(sentence for sentence, _ in tiny.sentences()))
    options = ["--scorer", "wanda", "--sparsity", "0.5", "--data", str(data), "--length", "9", "--samples", "4"]
    assert main(["prune", str(model), *options, "--output", str(tmp_path / "out")]) == 0
    tokenizer = load_tokenizer(str(model))
    words = tokenizer(data.read_text(), add_special_tokens=False)["input_ids"]
    stream = TokenStream.of(data.read_text(), tokenizer, ends=True)
    samples = stream.samples(4, 9)
    assert all(ids[0, 0] == tokenizer.cls_token_id and ids[0, -1] == tokenizer.sep_token_id for ids in samples)
    assert all(ids.shape == (1, 9) and set(ids[0, 1:-1].tolist()) <= set(words) for ids in samples)
    kind = AutoModelForSequenceClassification if head else AutoModel
    expected, loaded = kind.from_pretrained(model), kind.from_pretrained(tmp_path / "out")
    sparsify(expected, SparsityConfig(scorer="wanda", sparsity=0.5), [{"input_ids": ids} for ids in samples])
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_length_is_what_both_model_and_tokenizer_take(tmp_path: Path) -> None:
    model = oneshot.save_llama(tmp_path / "model")  # made for 64 tokens
    tokenizer = load_tokenizer(str(model))
    data = oneshot.write_text(tmp_path / "text.txt")
    llama = AutoModelForCausalLM.from_pretrained(model)
    for stated, expected in ((10**30, 64), (48, 48)):
        tokenizer.model_max_length = stated
        assert CalibrationText(str(data), samples=1).batches(llama, tokenizer)[0]["input_ids"].shape == (1, expected)


def test_an_interrupted_run_from_file_to_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out" / ".pruning").mkdir(parents=True)
    with pytest.raises(RecipeError, match="interrupted run"):
        prune("no-such-model", {"sparsity": 0.5}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".pruning"]


def test_columns_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = oneshot.save_llama(tmp_path / "model"), tmp_path / "data.jsonl"
    text = oneshot.write_text(tmp_path / "text.txt").read_text()
    data.write_text(json.dumps({"text": text, "class": 1}) + "\n")
    options = ["--scorer", "wanda", "--sparsity", "0.5", "--data", str(data), "--length", "16", "--samples", "2"]
    with caplog.at_level("WARNING", "hf_sparse"):
        assert main(["prune", str(model), *options, "--label", "class", "--output", str(tmp_path / "out")]) == 0
    (message,) = [record.getMessage() for record in caplog.records if "--label" in record.getMessage()]
    assert message.startswith("--label is not used: LlamaForCausalLM is shown sequences of the text in column 'text'")
