"""`hf-sparse sensitivity`: groups that a recipe accepts, errors before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from hf_sparse import SparsityConfig, sparsify
from hf_sparse.analysis.kept_weights import kept_groups
from hf_sparse.cli.main import main
from hf_sparse.utils.strict_yaml import parse_yaml
from tests.helpers import tiny


def test_sensitivity_command_suggests_groups_that_a_recipe_takes(dense: Path, tmp_path: Path, capsys: Any) -> None:
    texts = tiny.write_sentences(tmp_path / "texts.jsonl")
    command = ["sensitivity", str(dense), "--data", str(texts), "--length", "16", "--sparsity", "0.8"]
    assert main([*command, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for way in ("sensitivity", "erdos_renyi"):
        block = out.split(f"# {way}, 0.8 in total\n")[1].split("\n# ")[0]
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        config = SparsityConfig.from_dict(parse_yaml(block)["sparsity"])
        sparsify(model, config)
        weights = [model.get_submodule(group.targets[0]).weight for group in config.groups if group.targets]
        total = sum(weight.numel() for weight in weights)
        assert sum(int(weight.count_nonzero()) for weight in weights) == total // 5
    assert "# heads" not in out  # two attentions of four heads: one head would be left for both
    assert main([*command[:-1], "0.5"]) == 0
    out = capsys.readouterr().out
    block = out.split("# heads, 0.5 in total\n")[1]
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    sparsify(model, SparsityConfig.from_dict(parse_yaml(block)["sparsity"]))
    assert sum(int(group.kept.gt(0).sum()) for group in kept_groups(model) if group.kind == "attention") == 4
    assert "one head masked alone" in out
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    assert len(json.loads(out)["losses"]) == 12
    assert {name: len(found["alone"]) for name, found in json.loads(out)["masked_heads"].items()} == {
        "bert.encoder.layer.0.attention": 4,
        "bert.encoder.layer.1.attention": 4,
    }


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--sparsity", "0.95"], "at most the highest measured level, 0.9"),
        (["--sparsity", "1.5"], "must be in [0, 1), got 1.5"),
        (["--plot", "x.xyz"], "the suffix must be one of"),
        (["--plot", "no/x.png"], "the folder no does not exist"),
    ],
)
def test_what_cannot_be_answered_or_drawn_is_refused_before_anything_is_loaded(
    capsys: Any, option: list[str], said: str
) -> None:
    for command in ("sensitivity", "heads"):
        if command == "sensitivity" or "--plot" in option:
            assert main([command, "no/model", "--data", "no.jsonl", *option]) == 2
            assert said in capsys.readouterr().err
