"""Heads, neurons and sub-blocks: which entries go together, how they are scored, what training sees of removed ones."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, Pruner, SparsityConfig, SparsityError, sparsify, summarize
from hf_sparse.config.sparsity import PATTERNS, SCORERS
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.masked_weight import hidden
from hf_sparse.pruning.patterns import Lines
from tests.helpers import structures

STRUCTURES = [name for name in PATTERNS if PATTERNS[name].structural and name != "filter"]
"""Those of transformers; filters are tested in tests/pruning/test_filters.py."""


class T5DenseActDense(nn.Module):
    """Two neurons between one input and one output, with the names that T5 gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo, self.act = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False), nn.ReLU()
        self.wi.weight.data.copy_(torch.tensor([[2.0], [1.0]]))
        self.wo.weight.data.copy_(torch.tensor([[3.0, 1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.act(self.wi(x)))


def pruner_of(model: nn.Module, pattern: str = "neuron", **group: Any) -> Pruner:
    return Pruner(
        model, SparsityConfig(**{"pattern": pattern, "schedule": "constant", "sparsity": 0.5, **group})
    ).attach()


def test_lines_are_rows_or_columns() -> None:
    scores = torch.arange(8.0).view(4, 2)
    assert Lines(0, 2).pool(scores).tolist() == [1.5, 5.5]
    assert Lines(1, 1).pool(scores, "sum").tolist() == [12.0, 16.0]
    assert Lines(0, 0).groups_shape((4, 2)) == (1,)
    assert Lines(0, 2).expand(torch.tensor([True, False]), (4, 2)).int().tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert Lines(1, 2).expand(torch.tensor([False, True]), (1, 4)).int().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("pattern", STRUCTURES)
def test_structure_is_no_pattern_of_one_weight(pattern: str) -> None:
    with pytest.raises(PatternError, match=rf"pattern {re.escape(pattern)} spans several weights of a sub-block"):
        PATTERNS.build(pattern).check((4, 4), "x.weight")


# -- scores by hand: x = 1, so h = (2, 1) and y = 3*2 + 1*1 = 7 --------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ("magnitude", [2.5, 1.0]),  # (|2| + |3|) / 2, (|1| + |1|) / 2
        ("gradient", [2.5, 1.0]),  # dy/dwi = (3, 1) and dy/dwo = (2, 1)
        ("taylor", [6.0, 1.0]),  # (2*3 + 3*2) / 2, (1*1 + 1*1) / 2
    ],
)
def test_scores_are_means_over_all_members(scorer: str, expected: list[float]) -> None:
    model = T5DenseActDense()
    pruner = pruner_of(model, scorer=scorer)
    model(torch.ones(1, 1)).sum().backward()
    pruner.observe()
    (unit,) = pruner.units
    assert pruner.groups[0].scorer.scores(unit).tolist() == expected
    pruner.step(1.0)
    assert unit.kept().tolist() == [True, False]


@pytest.mark.parametrize("scorer", ["movement", "soft_movement"])
def test_learned_score_gets_the_gradient_summed_over_members(scorer: str) -> None:
    model = T5DenseActDense()
    pruner = pruner_of(model, scorer=scorer)
    model(torch.ones(1, 1)).sum().backward()
    (score,) = pruner.groups[0].scores
    assert score.grad is not None
    assert score.grad.tolist() == [12.0, 2.0]  # dy/dwo * wo + dy/dwi * wi = (2*3 + 3*2, 1*1 + 1*1)
    assert sum(parameter is score for parameter in model.parameters()) == 1


def test_removed_neuron_learns_its_score_keeps_its_weights_and_comes_back() -> None:
    model = T5DenseActDense()
    pruner = pruner_of(model, scorer="movement")
    (score,) = pruner.groups[0].scores
    with torch.no_grad():
        score.copy_(torch.tensor([1.0, 0.0]))
    pruner.step(1.0)
    output = model(torch.ones(1, 1))
    assert output.item() == 6.0
    (-output).sum().backward()
    # Of the removed neuron: what its column would have brought, h_2 * wo_2 = 1, and no gradient for its weights.
    assert score.grad is not None
    assert score.grad.tolist() == [-12.0, -1.0]
    assert hidden(model.wi).grad.tolist() == [[3.0 * -1], [0.0]]  # type: ignore[union-attr]
    assert hidden(model.wo).grad.tolist() == [[-2.0, 0.0]]  # type: ignore[union-attr]
    with torch.no_grad():
        score.copy_(torch.tensor([0.0, 1.0]))
    pruner.step(1.0)
    assert model(torch.ones(1, 1)).item() == 1.0


def test_gradient_of_a_removed_neuron_is_observed_too() -> None:
    model = T5DenseActDense()
    pruner = pruner_of(model, scorer="taylor")
    pruner.units[0].keep(torch.tensor([True, False]))
    model(torch.ones(1, 1)).sum().backward()
    pruner.observe()
    assert pruner.groups[0].scorer.scores(pruner.units[0]).tolist() == [6.0, 0.5]  # (wo * h + 0) / 2


def test_members_are_all_masked_where_no_gradient_flows() -> None:
    model = T5DenseActDense()
    pruner_of(model).step(1.0)
    with torch.no_grad():
        assert model.wi.weight.tolist() == [[2.0], [0.0]]
        assert model.wo.weight.tolist() == [[3.0, 0.0]]
        assert model(torch.ones(1, 1)).item() == 6.0
    assert model(torch.ones(1, 1)).item() == 6.0
    assert summarize(model, ["wi.weight", "wo.weight"]).sparsity == 0.5
    state = model.state_dict()
    assert state["wi.weight"].tolist() == [[2.0], [0.0]]
    assert state["wi.weight_hidden"].tolist() == [[2.0], [1.0]]


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", STRUCTURES)
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5-gated"])
def test_rows_biases_and_columns_of_removed_groups_are_zero(family: str, pattern: str) -> None:
    model = structures.build(family)
    before = copy.deepcopy(model)
    sparsify(model, SparsityConfig(pattern=pattern, sparsity=0.5))
    removed = total = 0
    for block, old in zip(find_sub_blocks(model, "a test"), find_sub_blocks(before, "a test"), strict=True):
        if block.kind not in PATTERNS.build(pattern).kinds:
            assert torch.equal(block.output.weight, old.output.weight)
            continue
        dead = (block.output.weight == 0).all(0)
        for name, layer in block.inputs.items():
            assert torch.equal((layer.weight == 0).all(1), dead)
            assert torch.equal(layer.weight[~dead], old.inputs[name].weight[~dead])
            if layer.bias is not None:
                assert torch.equal(layer.bias == 0, dead)
        assert torch.equal(block.output.weight[:, ~dead], old.output.weight[:, ~dead])
        if block.output.bias is not None:
            assert torch.equal(block.output.bias, old.output.bias)
        groups = dead.view(block.groups, block.size)
        assert torch.equal(groups.any(1), groups.all(1))
        sub_block = pattern == "layer"
        removed += int(dead.all()) if sub_block else int(groups.all(1).sum())
        total += 1 if sub_block else block.groups
    assert removed == total - int(0.5 * total) if pattern == "layer" else removed == total // 2


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5-gated"])
def test_masked_model_is_the_model_without_its_heads_with_and_without_gradients(family: str) -> None:
    model = structures.build(family)
    chosen = structures.choose(model)
    pruned = copy.deepcopy(model)
    structures.remove_others(pruned, chosen)
    groups = [{"pattern": pattern, "sparsity": 0.5, "schedule": "constant"} for pattern in ("head", "neuron")]
    pruner = Pruner(model, SparsityConfig(groups=groups)).attach()
    blocks = {block.output: block for block in find_sub_blocks(model, "a test")}
    for unit in pruner.units:
        block = blocks[unit.module]
        unit.keep(torch.tensor([group in chosen[block.name] for group in range(block.groups)]))
    inputs = structures.batch(family)
    expected = pruned(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    pruner.bake()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == set(pruned.state_dict())
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_baked_zeros_stay_zero_in_training() -> None:
    model = sparsify(structures.build("bert"), SparsityConfig(pattern="neuron", sparsity=0.5)).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        model(**structures.batch("bert", step)).loss.backward()
        optimizer.step()
    block = next(b for b in find_sub_blocks(model, "a test") if b.kind == "feed_forward")
    dead = (block.output.weight == 0).all(0)
    assert int(dead.sum()) == 6
    (first,) = block.inputs.values()
    assert not first.weight[dead].any()
    assert not first.bias[dead].any()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("family", "scorer"),
    [
        *(("bert", scorer) for scorer in SCORERS if SCORERS[scorer].source not in ("heads", "inputs")),
        ("t5-gated", "movement"),
        ("t5-gated", "taylor"),
    ],
)
@pytest.mark.parametrize("pattern", STRUCTURES)
def test_training_reaches_the_fraction_of_groups_and_goes_on_from_a_state_dict(
    family: str, pattern: str, scorer: str
) -> None:
    config = SparsityConfig(
        pattern=pattern, scorer=scorer, sparsity=0.75, schedule={"name": "cubic", "begin": 0.0, "end": 0.9}
    )

    def run(interrupted: bool) -> tuple[Any, Pruner]:
        model = structures.build(family)
        pruner = Pruner(model, config).attach()
        pruner.step(0.0)
        for step in range(6):
            if interrupted and step == 3:
                saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                model = structures.build(family, seed=1)
                pruner = Pruner(model, config).attach()
                assert model.load_state_dict(saved) == ([], [])
            optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.05)  # it remembers nothing itself
            (model(**structures.batch(family, step)).loss + pruner.penalty()).backward()
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step((step + 1) / 6)
        return model, pruner

    model, pruner = run(False)
    # Groups of different sizes compete there, so that the fraction of weights is not that of groups.
    tolerance = {"layer": 0.13, "head+neuron": 0.2, "kv_head+neuron": 0.2}.get(pattern, 1e-6)
    kept = sum(int(unit.kept().sum()) for unit in pruner.units)
    groups = sum(unit.kept().numel() for unit in pruner.units)
    assert kept == int(0.25 * groups)
    pruner.finish()
    assert pruner.logs()["sparsity"] == pytest.approx(0.75, abs=tolerance)
    resumed, _ = run(True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    names = set(structures.build(family).state_dict())
    pruner.bake()
    assert set(model.state_dict()) == names
    assert summarize(model).sparsity == pytest.approx(0.75, abs=tolerance)


def test_layers_compete_over_the_whole_model() -> None:
    with pytest.raises(PatternError, match=r"pattern layer has a selection of its own"):
        sparsify(structures.build("bert"), SparsityConfig(pattern="layer", sparsity=0.5, selection="uniform"))


def test_finish_refuses_layers_that_were_not_removed() -> None:
    pruner = pruner_of(structures.build("bert"), "layer", schedule={"name": "linear", "begin": 0.0})
    pruner.step(0.1)  # 3 of 4
    with pytest.raises(SparsityError, match=r"sparsity 0\.5 was requested, but the masks are at 0\.2500"):
        pruner.finish()
    pruner.step(1.0)
    pruner.finish()


def test_copy_of_a_model_in_training_has_its_own_scores() -> None:
    model = structures.build("bert")
    pruner = pruner_of(model, "head", scorer="movement")
    twin = copy.deepcopy(model)
    twin(**structures.batch("bert")).loss.backward()
    assert all(score.grad is None for score in pruner.groups[0].scores)
    own = [parameter for name, parameter in twin.named_parameters() if name.endswith("scores")]
    assert len(own) == len(pruner.units)
    assert all(score.grad is not None for score in own)


def test_one_weight_cannot_be_in_a_structure_and_in_another_group() -> None:
    groups = [{"pattern": "head", "sparsity": 0.5}, {"targets": "*.query", "sparsity": 0.5}]
    with pytest.raises(ValueError, match=r"attention\.self\.query' is in group 0 and in group 1"):
        Pruner(structures.build("bert"), SparsityConfig(groups=groups))
