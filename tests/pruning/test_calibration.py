"""Pruning in one shot by what a pass over data shows: gradients, and the importance of heads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import PatternError, RecipeError, SparsityCallback, SparsityConfig, SparsityError, compact, sparsify
from hf_sparse.cli.main import main
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.head_importance import head_importance
from tests.helpers import structures, tiny
from tests.helpers.training import Rows, arguments, bert


class Product(nn.Module):
    """L = mean over samples of y * w.x, so G = mean of y x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.layer.weight.data.copy_(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return SimpleNamespace(loss=(self.layer(x)[:, 0] * labels).mean())


def batch(x: list[float], y: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([x], dtype=torch.float32), "labels": torch.tensor([y])}


# Batches (x, y) = ([1, 1, 1, 0], 1) and ([1, -1, 0, 1], 2): G = (1, 1, 1, 0) and (2, -2, 0, 2).
# Sums of |G|: (3, 3, 1, 2). Sums of |W G|: (1 + 2, 2 + 4, 3 + 0, 0 + 8) = (3, 6, 3, 8).
@pytest.mark.parametrize(("scorer", "left"), [("gradient", [1.0, -2.0, 0.0, 0.0]), ("taylor", [0.0, -2.0, 0.0, 4.0])])
def test_scorers_of_gradients_prune_by_a_pass_over_data(scorer: str, left: list[float]) -> None:
    model = Product()
    model.layer.weight.grad = torch.full((1, 4), 7.0)
    batches = iter([batch([1, 1, 1, 0], 1.0), batch([1, -1, 0, 1], 2.0)])
    sparsify(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer), batches)
    assert model.layer.weight.tolist() == [left]
    assert model.layer.weight.grad.tolist() == [[7.0] * 4]
    assert model.training


@pytest.mark.parametrize("scorer", ["gradient", "taylor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_no_scores(scorer: str, value: float) -> None:
    model = Product()
    before = model.layer.weight.detach().clone()
    with pytest.raises(SparsityError, match=r"'layer\.weight' must be finite, and in batch 1"):
        sparsify(
            model,
            SparsityConfig(targets="*", sparsity=0.5, scorer=scorer),
            [batch([1, 1, 1, 0], 1.0), batch([1, 1, 1, 0], value)],
        )
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5-gated"])
def test_head_importance_removes_the_heads_that_the_table_ranks_lowest(family: str) -> None:
    model = structures.build(family)
    batches = [structures.batch(family, seed) for seed in range(2)]
    table = head_importance(model, batches)
    # An iterator, which can be read but once, and another scorer for the neurons.
    groups: list[Any] = [
        {"pattern": "head", "scorer": "head_importance", "sparsity": 0.5},
        {"pattern": "neuron", "scorer": "taylor", "sparsity": 0.5},
    ]
    sparsify(model, SparsityConfig(groups=groups), iter(batches))
    attentions = [block for block in find_sub_blocks(model, "a test") if block.kind == "attention"]
    for block, importance in zip(attentions, table, strict=True):
        columns = (block.output.weight != 0).view(-1, block.groups, block.size).any(2).any(0)
        kept = importance.argsort(descending=True)[: block.groups // 2]
        assert sorted(columns.nonzero().flatten().tolist()) == sorted(kept.tolist())
    compact(model)
    table = head_importance(model, batches)
    sparsify(model, SparsityConfig(pattern="head", scorer="head_importance", sparsity=0.5), batches)  # and again
    for block, importance in zip(attentions, table, strict=True):
        columns = (block.output.weight != 0).view(-1, block.groups, block.size).any(2).any(0)
        assert int(columns.sum()) == max(1, block.groups // 2)
        left = importance[~importance.isnan()]
        assert bool(columns[left.argmax()])


@pytest.mark.parametrize("normalize", [False, True])
def test_attentions_compete_by_importance_or_by_its_share_of_their_norm(normalize: bool) -> None:
    model, batches = structures.build("bert"), [structures.batch("bert", 0)]
    model.bert.encoder.layer[1].attention.output.dense.weight.data *= 0.01  # heads that hardly matter
    table = head_importance(model, batches)
    values = table / table.norm(dim=1, keepdim=True) if normalize else table
    scorer = {"name": "head_importance", "normalize": normalize}
    sparsify(model, SparsityConfig(pattern="head", scorer=scorer, selection="global", sparsity=0.5), batches)
    cut = values.flatten().sort(descending=True).values[values.numel() // 2]
    blocks = [block for block in find_sub_blocks(model, "a test") if block.kind == "attention"]
    for row, block in zip(values, blocks, strict=True):
        kept = (block.output.weight != 0).view(-1, block.groups, block.size).any(2).any(0)
        assert kept.tolist() == (row > cut).tolist()
    assert bool((table[1] > table[0].max()).any()) is False
    last = (blocks[1].output.weight != 0).any()
    assert bool(last) is normalize


def test_head_importance_is_refused_for_groups_that_are_no_heads_and_the_model_is_left() -> None:
    model = structures.build("bert")
    config = SparsityConfig(pattern="neuron", scorer="head_importance", sparsity=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PatternError, match=r"scores attention heads, but groups of .* are not heads"):
        sparsify(model, config, [structures.batch("bert", 0)])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_no_batch_and_no_labels_are_errors() -> None:
    for scorer in ("taylor", "head_importance"):
        config = SparsityConfig(pattern="head", scorer=scorer, sparsity=0.5)
        with pytest.raises(SparsityError, match="there was no batch"):
            sparsify(structures.build("bert"), config, [])
        unlabelled = {key: value for key, value in structures.batch("bert", 0).items() if key != "labels"}
        with pytest.raises(SparsityError, match="returned no loss"):
            sparsify(structures.build("bert"), config, [unlabelled])


def test_callback_refuses_a_scorer_that_measures_before_pruning(tmp_path: Path) -> None:
    config = SparsityConfig(pattern="head", scorer="head_importance", sparsity=0.5)
    with pytest.raises(RecipeError, match="measures a model on data before it is pruned"):
        Trainer(bert(), arguments(tmp_path), train_dataset=Rows(), callbacks=[SparsityCallback(config)])


def test_command_prunes_heads_by_their_importance_on_texts(tmp_path: Path, capsys: Any) -> None:
    saved, texts = tiny.save_bert(tmp_path / "bert", head=True), tiny.write_sentences(tmp_path / "texts.jsonl")
    command = ["prune", str(saved), "--pattern", "head", "--scorer", "head_importance", "--sparsity", "0.5"]
    assert main([*command, "--output", str(tmp_path / "none")]) == 2
    assert "looks at data" in capsys.readouterr().err
    command += ["--data", str(texts), "--length", "16", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert main(["heads", str(saved), "--data", str(texts), "--length", "16", "--json"]) == 0
    printed = capsys.readouterr().out
    table = json.loads(printed[printed.index("{") :])["importance"]
    for block in find_sub_blocks(pruned, "a test"):
        if block.kind == "attention":
            kept = (block.output.weight != 0).view(-1, block.groups, block.size).any(2).any(0)
            ranked = torch.tensor(table[block.name]).argsort(descending=True)
            assert kept.nonzero().flatten().tolist() == sorted(ranked[: block.groups // 2].tolist())
