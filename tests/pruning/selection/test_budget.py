"""Budgets: never overspent, spent on what matters most, the same answer as trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig, SparsityError, sparsify
from hf_sparse.config.sparsity import PATTERNS, SCHEDULES
from hf_sparse.profiling.latency_table import LatencyTable, Shape, measure
from hf_sparse.pruning.selection.budget import Budget, Costs
from hf_sparse.pruning.unit_finding import find_units
from tests.helpers import decoders
from tests.helpers.structures import FAMILIES
from tests.helpers.training import RAMP, sparse_trainer

HEADS, NEURONS = Costs("attention", 8, 4, 2, 3), Costs("feed_forward", 8, 6, 1, 1)


def table(times: dict[str, list[float]], path: Path) -> LatencyTable:
    """A machine on which sub-blocks of a kind take these seconds with 0, 1, 2, ... groups."""
    return LatencyTable(
        path / "latency.json", lambda shape, levels: {groups: [times[shape.kind][groups]] for groups in levels}, idle
    )


def idle() -> Any:
    return SimpleNamespace(stop=lambda: 0.0)


def test_flops_of_a_head_and_of_a_neuron_by_hand() -> None:
    # A head of 2 rows: 4 matrices x 8 x 2 weights; 2 numbers times 10 tokens are compared and mixed; 2 operations each.
    assert HEADS.parameters == 4 * 8 * 2
    assert HEADS.flops(10) == 2 * 64 + 2 * 2 * 10 * 2
    assert NEURONS.flops(10) == 2 * NEURONS.parameters == 2 * 2 * 8
    assert Costs("feed_forward", 8, 6, 1, 2).parameters == 3 * 8  # gated


@pytest.mark.parametrize("of", ["flops", "parameters"])
@pytest.mark.parametrize("remaining", [0.1, 0.33, 0.5, 0.9])
def test_highest_scores_are_kept_until_the_budget_is_spent(of: str, remaining: float) -> None:
    budget = Budget(of=of, remaining=remaining, length=10)
    budget.prepare([HEADS, NEURONS])
    scores = [torch.rand(4), torch.rand(6)]
    kept = budget.select(scores, 1.0)
    costs = [cost.flops(10) if of == "flops" else cost.parameters for cost in (HEADS, NEURONS)]
    each = torch.tensor([costs[0]] * 4 + [costs[1]] * 6)
    mask, all_scores = torch.cat(kept), torch.cat(scores)
    spent, limit = int(each[mask].sum()), remaining * int(each.sum())
    assert spent <= limit
    if not mask.all():
        first_out = all_scores[~mask].argmax()
        assert spent + int(each[~mask][first_out]) > limit  # the next could not be paid
        assert not mask.any() or all_scores[~mask].max() <= all_scores[mask].min()
    assert budget.logs() == {f"remaining_{of}": pytest.approx(spent / int(each.sum()))}


def test_equal_scores_are_kept_in_order() -> None:
    budget = Budget(of="parameters", remaining=0.5)
    budget.prepare([NEURONS, NEURONS])
    assert [k.tolist() for k in budget.select([torch.zeros(6), torch.zeros(6)], 1.0)] == [[True] * 6, [False] * 6]


def test_budget_tightens_along_the_schedule() -> None:
    budget = Budget(of="parameters", remaining=0.5)
    budget.prepare([NEURONS])
    scores = [torch.arange(6.0)]
    assert [int(budget.select(scores, level)[0].sum()) for level in (0.0, 1 / 3, 2 / 3, 1.0)] == [6, 5, 4, 3]


def best_by_trying(times: list[Tensor], losses: list[Tensor], limit: float) -> float:
    options = itertools.product(*(range(len(t)) for t in times))
    return min(
        sum(float(loss[k]) for loss, k in zip(losses, counts, strict=True))
        for counts in options
        if sum(float(t[k]) for t, k in zip(times, counts, strict=True)) <= limit
    )


@pytest.mark.parametrize("seed", range(20))
def test_latency_budget_loses_as_little_as_the_best_of_all_choices(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = {kind: torch.rand(7, generator=generator).cumsum(0).tolist() for kind in ("attention", "feed_forward")}
    for row in times.values():
        row[0] = 0.0
    costs = [HEADS, NEURONS, Costs("attention", 8, 4, 2, 3)]
    scores = [torch.rand(cost.groups, generator=generator) - 0.3 for cost in costs]
    budget = Budget(of="latency", remaining=0.45)
    budget.prepare(costs, table(times, tmp_path))
    kept = budget.select(scores, 1.0)
    per_unit = [torch.tensor(times[cost.kind][: cost.groups + 1]) for cost in costs]
    limit = 0.45 * sum(float(t[-1]) for t in per_unit)
    assert sum(float(t[int(k.sum())]) for t, k in zip(per_unit, kept, strict=True)) <= limit + 1e-6

    lowest = min(float(s.min()) for s in scores)
    losses = []
    for cost, score in zip(costs, scores, strict=True):
        mass = ((score - lowest) * cost.parameters).sort(descending=True).values
        losses.append(torch.tensor([float(mass[k:].sum()) for k in range(cost.groups + 1)]))
    found = sum(float(loss[int(k.sum())]) for loss, k in zip(losses, kept, strict=True))
    # Within one bucket per unit of the best there is.
    assert found <= best_by_trying(per_unit, losses, limit * (1 - 3 / 4000)) + 1e-4
    for score, mask in zip(scores, kept, strict=True):
        assert not mask.any() or mask.all() or score[mask].min() >= score[~mask].max()


def test_latency_budget_removes_nothing_that_saves_no_time(tmp_path: Path) -> None:
    # Attention takes the same time with any number of heads, so only taking all of them would save time.
    times = {"attention": [0.0, 1.0, 1.0, 1.0, 1.0], "feed_forward": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    budget = Budget(of="latency", remaining=4 / 7)
    budget.prepare([HEADS, NEURONS], table(times, tmp_path))
    kept = budget.select([torch.full((4,), 5.0), torch.arange(6.0)], 1.0)
    assert kept[0].tolist() == [True] * 4
    assert kept[1].tolist() == [False] * 3 + [True] * 3


def test_times_are_measured_once_per_shape_and_machine(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def clock(shape: Shape, levels: Sequence[int]) -> dict[int, list[float]]:
        asked.append(list(levels))
        return {groups: [float(groups)] for groups in levels}

    shape = Shape("feed_forward", 8, 40, 1, 1, 4, 1)
    first = LatencyTable(tmp_path / "deep" / "latency.json", clock, idle).times(shape)
    assert asked == [shape.levels]
    assert first.tolist() == pytest.approx(list(range(41)), abs=1e-9)
    assert torch.equal(LatencyTable(tmp_path / "deep" / "latency.json", clock, idle).times(shape), first)
    assert len(asked) == 1


@pytest.mark.parametrize("content", ["", "[1]", "{broken", '{"x": ["a"]}', '{"x": [NaN]}'])
def test_a_damaged_cache_is_measured_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(content)
    times = table({"attention": [0.0, 2.0, 4.0]}, tmp_path).times(Shape("attention", 8, 2, 4, 3, 4, 1))
    assert times.tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("shape", [Shape("attention", 16, 4, 4, 3, 8, 2), Shape("feed_forward", 16, 8, 1, 2, 8, 2)])
def test_a_real_measurement_is_positive_and_nothing_takes_no_time(shape: Shape) -> None:
    rounds = measure(shape, shape.levels)
    assert list(rounds) == shape.levels
    assert rounds[0] == [0.0]
    assert all(min(rounds[level]) > 0.0 for level in shape.levels[1:])
    assert len({len(rounds[level]) for level in shape.levels[1:]}) == 1


# -- on models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shot_pruning_keeps_the_budget_on_every_family(family: str) -> None:
    model = FAMILIES[family]()
    selection = {"name": "budget", "of": "parameters", "remaining": 0.5}
    config = SparsityConfig(pattern="head+neuron", selection=selection)
    layers = {name: layer for plan in Pruner(model, config).groups for name, layer in plan.layers.items()}
    total = sum(layer.weight.numel() for layer in layers.values())
    sparsify(model, config)
    left = 0
    for layer in layers.values():
        lines = layer.weight.detach() != 0
        left += int(lines.any(1).sum()) * int(lines.any(0).sum())
    # What is cut out is what is saved; the budget is met but for the last group, of 4 rows at most.
    assert 0.5 * total - 4 * 4 * 16 < left <= 0.5 * total


def test_movement_spends_a_budget_of_operations_in_the_trainer(tmp_path: Path) -> None:
    selection = {"name": "budget", "of": "flops", "remaining": 0.4, "length": 8}
    config = SparsityConfig(pattern="head+neuron", scorer="movement", selection=selection, schedule=RAMP)
    trainer = sparse_trainer(tmp_path, config, logging_steps=1)
    trainer.train()
    logged = [log["remaining_flops"] for log in trainer.state.log_history if "loss" in log]
    schedule = SCHEDULES.build(RAMP)
    limits = [1.0 - 0.6 * schedule(step / 20, 1.0) for step in range(1, 21)]
    # Never above the budget of the moment, and below by less than the next head, a fifteenth of all, would cost.
    assert all(limit - 1 / 15 < used <= limit + 1e-9 for used, limit in zip(logged, limits, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "seconds"}, "selection 'budget': `of` must be one of 'flops', 'parameters', 'latency', got 'seconds'"),
        ({"remaining": 1.0}, r"`remaining` must be in \(0, 1\), got 1.0"),
        ({"remaining": 0.0}, r"`remaining` must be in \(0, 1\), got 0.0"),
        ({"remaining": True}, r"`remaining` must be a number in \(0, 1\), got True"),
        ({"length": 0}, "`length` must be a positive integer, got 0"),
    ],
)
def test_budget_that_cannot_be_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparsityConfig(pattern="head+neuron", selection={"name": "budget", **options})


def test_budget_beside_a_sparsity_is_an_error() -> None:
    with pytest.raises(RecipeError, match="`sparsity` must be left out"):
        SparsityConfig(pattern="head+neuron", selection="budget", sparsity=0.5)


def test_budget_of_single_weights_is_an_error() -> None:
    with pytest.raises(
        PatternError, match=r"pattern .*leaves every layer as large as it is. Use pattern 'head\+neuron'"
    ):
        Pruner(FAMILIES["bert"](), SparsityConfig(pattern="element", selection="budget"))


def test_scores_of_other_units_are_an_error() -> None:
    budget = Budget()
    budget.prepare([NEURONS])
    with pytest.raises(SparsityError, match="knows 1 units, and was given the scores of 2"):
        budget.select([torch.zeros(6), torch.zeros(6)], 1.0)


# -- layers that are divided in another way --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("pattern", "expected"), [("kv_head", 384), ("head", 128)])
def test_heads_that_share_key_and_value_cost_what_leaves_with_them(family: str, pattern: str, expected: int) -> None:
    model = decoders.build(family)
    budget = Budget(of="parameters", remaining=0.5)
    units = find_units(model, PATTERNS.build(pattern), None, ())
    budget.prepare_units(units, PATTERNS.build(pattern))
    # Two queries of 4 x 16 weights, key, value and the columns of two heads; or one query and the columns of one head.
    assert {cost.parameters for cost in budget._costs} == {expected}
    with pytest.raises(PatternError, match="several heads read one"):
        Budget(of="latency", remaining=0.5).prepare_units(units, PATTERNS.build(pattern))


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "opt"])
def test_fused_and_transposed_layers_cost_what_separate_ones_do(family: str) -> None:
    model = decoders.build(family)
    pattern = PATTERNS.build("head+neuron")
    budget = Budget(of="flops", remaining=0.5)
    budget.prepare_units(find_units(model, pattern, None, ()), pattern)
    assert set(budget._costs) == {Costs("attention", 16, 4, 4, 3), Costs("feed_forward", 16, 12, 1, 1)}
