"""`hf-sparse drop`: the layers and experts that Python removes, saved as a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse import prune_layers
from hf_sparse.cli.main import main
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.recipe.texts import TokenStream
from tests.helpers import decoders, oneshot


def test_layers_are_those_that_python_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = oneshot.save_llama(tmp_path / "model"), tmp_path / "out"
    data = oneshot.write_text(tmp_path / "text.txt")
    arguments = ["drop", str(model), "--data", str(data), "--samples", "4", "--length", "32", "--layers", "1"]
    assert main([*arguments, "--criterion", "loss", "--output", str(out)]) == 0
    assert "layers removed: " in capsys.readouterr().out
    expected = AutoModelForCausalLM.from_pretrained(model)
    stream = TokenStream.of(data.read_text(), load_tokenizer(str(model)))
    batches = [{"input_ids": ids, "labels": ids} for ids in stream.samples(4, 32)]
    prune_layers(expected, batches, 1, "loss")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == expected.config.num_hidden_layers
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    assert "hf_sparse" not in (out / "config.json").read_text()
    assert load_tokenizer(str(out)) is not None


def test_experts_leave_a_saved_mixture(tmp_path: Path) -> None:
    model, out = oneshot.save_llama(tmp_path / "model"), tmp_path / "out"
    words = load_tokenizer(str(model))
    decoders.build("mixtral", vocab_size=len(words)).save_pretrained(model)
    data = oneshot.write_text(tmp_path / "text.txt")
    arguments = ["drop", str(model), "--data", str(data), "--samples", "4", "--length", "32", "--experts", "0.25"]
    assert main([*arguments, "--output", str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 3
    assert main([*arguments, "--merge", "--output", str(tmp_path / "merged")]) == 0
    dropped, merged = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "merged"))
    assert merged.config.num_local_experts == 3
    weights = [made.model.layers[0].mlp.experts.down_proj for made in (dropped, merged)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing was requested"),
        (["--experts", "0.5"], "where the experts of a model are"),
        (["--layers", "9"], "`layers` must be an integer in [0, 3), got 9"),
        (["--layers", "1", "--merge"], "name a fraction of them"),
        (["--experts", "0.5", "--merge", "--selection", "global"], "no other selection"),
        (["--layers", "1", "--length", "900"], "at most 64"),
    ],
)
def test_requests_that_do_not_fit_are_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = oneshot.save_llama(tmp_path / "model"), oneshot.write_text(tmp_path / "text.txt")
    usual = ["--samples", "4", "--length", "32"]
    arguments = ["drop", str(model), "--data", str(data), "--output", str(tmp_path / "out"), *usual, *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
