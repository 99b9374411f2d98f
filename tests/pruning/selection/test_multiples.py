"""Groups kept by the multiple: by hand, in each selection, in a training, and what a user is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hf_sparse import Pruner, RecipeError, SparsityConfig, compact, sparsify
from hf_sparse.pruning.selection import Budget, Global, Threshold, Uniform, in_multiples
from hf_sparse.pruning.selection.budget import Costs
from tests.helpers import structures
from tests.helpers.convolutional import build, outputs

FIRST = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0, 0.0])
"""In chunks of two: (5, 4), (3, 2) and (1, 0), with means 4.5, 2.5 and 0.5."""
SECOND = torch.tensor([9.0, 2.0, 0.0])
"""In chunks of two: (9, 2) and 0 alone, with means 5.5 and 0."""


def choose(selection: Any, sparsity: float, scores: list[torch.Tensor], multiples: list[int]) -> list[list[int]]:
    """Return the numbers of the groups that are kept."""
    kept = in_multiples(scores, multiples, lambda chunks: selection.select(chunks, sparsity))
    assert [mask.shape for mask in kept] == [tensor.shape for tensor in scores]
    return [mask.nonzero().flatten().tolist() for mask in kept]


def test_chunks_by_hand() -> None:
    assert choose(Uniform(), 0.5, [FIRST, SECOND], [2, 2]) == [[0, 2], [0, 1]]
    assert choose(Uniform(), 0.3, [FIRST, SECOND], [2, 2]) == [[0, 2, 3, 4], [0, 1]]
    assert choose(Global(), 0.4, [FIRST, SECOND], [2, 2]) == [[0, 2, 3, 4], [0, 1]]  # 3 of 5: 5.5, 4.5, 2.5
    assert choose(Global(), 0.8, [FIRST, SECOND], [2, 2]) == [[], [0, 1]]
    assert choose(Threshold(value=1.0), 1.0, [FIRST, SECOND], [2, 2]) == [[0, 2, 3, 4], [0, 1]]


def test_units_of_other_kinds_keep_any_number() -> None:
    assert choose(Uniform(), 0.5, [FIRST, SECOND], [2, 1]) == [[0, 2], [0]]
    assert choose(Uniform(), 0.5, [FIRST, SECOND], [1, 1]) == [[0, 2, 3], [0]]


def test_a_layer_with_fewer_groups_than_the_multiple_keeps_them_all() -> None:
    assert choose(Uniform(), 0.9, [SECOND], [16]) == [[0, 1, 2]]


def test_equal_scores_stay_in_order() -> None:
    assert choose(Uniform(), 0.5, [torch.zeros(6)], [2]) == [[0, 1]]


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_budget_is_spent_by_the_chunk(of: str) -> None:
    heads, neurons = Costs("attention", 8, 2, 4, 3), Costs("feed_forward", 8, 6, 1, 1, multiple=4)
    assert neurons.marks.tolist() == [0, 4, 6]
    budget = Budget(of=of, remaining=0.5, length=1)
    budget.prepare([heads, neurons])
    # 16 weights each neuron, 128 each head, 352 in all; a chunk of four neurons is 64, the last one of two 32. (A head
    # of flops: 2 x 128 + 4 x 4 = 272, of 736 in all.)
    scores = [torch.tensor([1.0, 9.0]), torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0])]
    assert choose(budget, 1.0, scores, [1, 4]) == [[1], []]
    assert budget.used == pytest.approx(128 / 352 if of == "parameters" else 272 / 736)
    budget.remaining = 0.56
    assert choose(budget, 1.0, scores, [1, 4]) == [[1], [0, 1, 2, 3]]


@pytest.mark.parametrize("of", ["parameters", "latency"])
def test_chunks_of_neurons_by_a_budget_on_a_model(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hf_sparse.profiling.latency_table.LatencyTable.times",
        lambda self, shape: (
            torch.arange(shape.groups + 1, dtype=torch.float64) * (5 if shape.kind == "attention" else 1)
        ),
    )
    model = structures.build("bert")
    pattern = {"name": "head+neuron", "multiple_of": 4}
    sparsify(model, SparsityConfig(pattern=pattern, selection={"name": "budget", "of": of, "remaining": 0.6}))
    edits = compact(model)
    counts = [cut.count for kind, _, cut in edits if kind == "neurons"]
    assert counts or edits.heads
    assert all(count % 4 == 0 for count in counts)


def test_filters_keep_multiples_at_every_step_and_in_the_compacted_model() -> None:
    model = build("vgg")  # 6, 8 and 10 filters
    config = SparsityConfig(pattern={"name": "filter", "multiple_of": 2}, sparsity=0.5, schedule="linear")
    assert SparsityConfig.from_dict(config.to_dict()) == config
    pruner = Pruner(model, config).attach()
    seen = []
    for step in range(11):
        pruner.step(step / 10)
        seen.append([int(unit.kept().sum()) for unit in pruner.groups[0].units])
    assert all(count % 2 == 0 for counts in seen for count in counts)
    assert (seen[0], seen[-1]) == ([6, 8, 10], [2, 4, 4])
    pruner.bake()
    expected = outputs(model)
    edits = compact(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    assert [cut.count for _, _, cut in edits] == [2, 4, 4]


def test_multiple_that_rounds_the_sparsity_away_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sparsify(build("vgg"), SparsityConfig(pattern={"name": "filter", "multiple_of": 16}, sparsity=0.5))
    assert "the masks will be at 0: pattern filter keeps a multiple of 16 groups" in caplog.text
    assert "A smaller multiple rounds less" in caplog.text


@pytest.mark.parametrize("value", [0, -2, 1.5, "8", True])
def test_multiples_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="multiple_of"):
        SparsityConfig(pattern={"name": "neuron", "multiple_of": value}, sparsity=0.5)
    with pytest.raises(RecipeError, match="multiple_of"):
        SparsityConfig(pattern={"name": "head", "multiple_of": 2}, sparsity=0.5)
