"""The verbs, at the level of a plain loop: exact counts, what is refused and when, what is logged."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import Pruner, RecipeError, SparsityConfig, SparsityError, summarize
from hf_sparse.config.sparsity import SCORERS
from hf_sparse.pruning.masked_weight import hidden
from tests.helpers.layers import attached, one_layer, two_layers
from tests.helpers.training import bert

OPTIONS = {"block": {"rows": 4, "cols": 4}}


def train(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: range, total: int) -> None:
    """Some steps of a plain loop; the data depend on the step alone."""
    for step in steps:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        ((model(x) - 1.0).square().mean() + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / total, step=step + 1)


def scores_of(pruner: Pruner) -> Tensor:
    found = pruner.units[0].masked.scores
    assert found is not None
    return found


# -- counts ------------------------------------------------------------------------------------------------------------


# A quarter of the groups of an (8, 16) and a (16, 8) weight, and half of the inputs for 2:4.
GROUPS_KEPT = {"element": [32, 32], "block": [2, 2], "row": [2, 4], "column": [4, 2], "n:m": [64, 64]}


@pytest.mark.parametrize("pattern", list(GROUPS_KEPT))
@pytest.mark.parametrize("scorer", [name for name in SCORERS if SCORERS[name].source not in ("heads", "inputs")])
def test_pruner_keeps_exactly_what_was_asked(scorer: str, pattern: str) -> None:
    model = two_layers()
    how = {"sparsity": None if pattern == "n:m" else 0.75, "pattern": {"name": pattern, **OPTIONS.get(pattern, {})}}
    pruner = attached(model, scorer=scorer, schedule={"name": "linear", "begin": 0.0, "end": 0.8}, **how)
    train(model, pruner, torch.optim.AdamW(pruner.parameter_groups(), lr=1e-2), range(8), 8)
    groups = [int(unit.pattern.pool(unit.masked.mask.float()).sum()) for unit in pruner.units]
    entries = sum(int(unit.masked.mask.sum()) for unit in pruner.units)
    if scorer == "soft_movement":  # its weights compete with each other, except within 2:4
        groups, expected = [sum(groups)], [sum(GROUPS_KEPT[pattern])]
    else:
        expected = GROUPS_KEPT[pattern]
        assert entries == (128 if pattern == "n:m" else 64)
    assert groups == expected
    pruner.finish()
    pruner.bake()
    assert summarize(model).nonzeros == entries


@pytest.mark.parametrize("step", range(11))
def test_soft_movement_meets_the_scheduled_sparsity_over_all_weights_at_every_step(step: int) -> None:
    model = two_layers()
    pruner = attached(
        model, scorer="soft_movement", sparsity=0.9, schedule={"name": "linear", "begin": 0.0, "end": 1.0}
    )
    for score in pruner.groups[0].scores:
        nn.init.normal_(score)
    pruner.step(step / 10)
    kept = [256, 232, 209, 186, 163, 140, 117, 94, 71, 48, 25][step]  # floor(256 (1 - 0.09 step))
    assert sum(int(unit.masked.mask.sum()) for unit in pruner.units) == kept


@pytest.mark.parametrize("scorer", ["movement", "soft_movement", "gradient", "taylor"])
@pytest.mark.parametrize(
    ("pattern", "kept"), [("element", 32), ({"name": "block", "rows": 4, "cols": 4}, 32), ("row", 32), ("column", 32)]
)
def test_pruner_keeps_the_exact_count_while_all_scores_are_equal(scorer: str, pattern: Any, kept: int) -> None:
    model = two_layers()
    pruner = attached(model, scorer=scorer, pattern=pattern, sparsity=0.75, selection="uniform")
    pruner.step(1.0)
    assert [int(unit.masked.mask.sum()) for unit in pruner.units] == [kept, kept]
    assert bool(pruner.units[0].masked.mask[0, 0])  # the first among equals


def test_pruner_global_selection_lets_weights_compete() -> None:
    model = two_layers()
    model[0].weight.data.fill_(1.0)
    model[2].weight.data.fill_(10.0)
    attached(model, sparsity=0.75, selection="global").step(1.0)
    assert [weight.nonzeros for weight in summarize(model).weights] == [0, 64]


# -- learning ----------------------------------------------------------------------------------------------------------


def test_movement_trains_as_a_plain_loop_with_two_groups_of_adamw() -> None:
    model = two_layers()[:1]
    weight, bias = (nn.Parameter(parameter.detach().clone()) for parameter in model.parameters())
    pruner = attached(model, scorer={"name": "movement", "learning_rate": 0.05}, sparsity=0.75)
    optimizer = torch.optim.AdamW(pruner.parameter_groups(), lr=0.01, weight_decay=0.1)
    scores = nn.Parameter(torch.zeros(8, 16))
    groups: list[dict[str, Any]] = [{"params": [weight, bias]}, {"params": [scores], "lr": 0.05, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    pruner.step(0.0)
    train(model, pruner, optimizer, range(6), 6)
    for step in range(6):
        with torch.no_grad():
            mask = torch.zeros(128, dtype=torch.bool)
            mask[scores.view(-1).sort(descending=True, stable=True).indices[:32]] = True
            mask = mask.view(8, 16)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        masked = (weight * mask).detach().requires_grad_()
        (x @ masked.T + bias - 1.0).square().mean().backward()
        assert masked.grad is not None
        weight.grad, scores.grad = masked.grad * mask, masked.grad * weight.detach()
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(scores_of(pruner).detach(), scores.detach())
    torch.testing.assert_close(hidden(model[0]).detach(), weight.detach())


def test_movement_learns_its_scores_while_nothing_is_pruned_yet() -> None:
    model = one_layer([[1.0, 2.0]])
    pruner = attached(model, scorer="movement", sparsity=0.5, schedule={"name": "cubic", "begin": 0.5})
    pruner.step(0.0)
    assert pruner.units[0].masked.mask.all()
    model(torch.tensor([3.0, -1.0])).sum().backward()
    assert scores_of(pruner).grad.tolist() == [[3.0, -2.0]]  # type: ignore[union-attr]


def test_movement_learns_scores_of_a_frozen_weight() -> None:
    model = one_layer([[1.0, 2.0]])
    model[0].weight.requires_grad_(False)
    pruner = attached(model, scorer="movement", sparsity=0.5)
    model(torch.tensor([3.0, -1.0])).sum().backward()
    assert scores_of(pruner).grad.tolist() == [[3.0, -2.0]]  # type: ignore[union-attr]
    assert hidden(model[0]).grad is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradient_that_is_not_finite_leaves_the_scores_as_they_were(bad: float) -> None:
    model = one_layer([[1.0, 2.0]])
    pruner = attached(model, scorer="gradient", sparsity=0.5)
    for x in ([3.0, -1.0], [bad, 1.0], [1.0, 1.0]):
        model(torch.tensor(x)).sum().backward()
        pruner.observe()
    assert pruner.units[0].masked.get_buffer("importance").tolist() == [[4.0, 2.0]]


def test_observe_without_a_backward_pass_changes_nothing() -> None:
    model = one_layer([[1.0, 2.0]])
    pruner = attached(model, scorer="gradient", sparsity=0.5)
    model(torch.tensor([3.0, -1.0])).sum().backward()
    pruner.observe()
    pruner.observe()
    assert pruner.units[0].masked.get_buffer("importance").tolist() == [[3.0, 1.0]]


def test_gradient_scores_see_removed_weights_so_that_they_can_come_back() -> None:
    model = one_layer([[1.0, 2.0]])
    pruner = attached(model, scorer="gradient", sparsity=0.5)
    for x, expected in (([5.0, 0.0], [1.0, 0.0]), ([0.0, 7.0], [0.0, 2.0])):
        model(torch.tensor(x)).sum().backward()
        pruner.observe()
        pruner.step(1.0)
        assert model[0].weight.tolist() == [expected]


@pytest.mark.parametrize("scorer", ["gradient", "taylor"])
def test_importance_does_not_depend_on_the_scale_of_the_loss(scorer: str) -> None:
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = two_layers()
        pruner = attached(model, scorer=scorer, sparsity=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=enabled)
        for x in torch.eye(16)[:3]:  # powers of 2, and so exact
            scaler.scale(model(x).square().sum()).backward()
            scaler.unscale_(optimizer)
            pruner.observe(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == (8192.0 if enabled else 1.0)
        found.append([unit.masked.get_buffer("importance") for unit in pruner.units])
    for plain, scaled in zip(*found, strict=True):
        assert plain is not None
        assert bool(plain.any())
        torch.testing.assert_close(plain, scaled)


@pytest.mark.parametrize("scorer", ["gradient", "taylor"])
def test_pruner_refuses_to_look_at_gradients_of_a_frozen_weight(scorer: str) -> None:
    model = two_layers()
    model[2].weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=rf"scorer '{scorer}' looks at gradients, but '2\.weight' is frozen"):
        attached(model, scorer=scorer, sparsity=0.5)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("scorer", ["movement", "gradient"])
def test_gradient_checkpointing_changes_neither_gradients_nor_importance(scorer: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        pruner = Pruner(model, SparsityConfig(sparsity=0.5, scorer=scorer, schedule="constant")).attach()
        pruner.step(0.0)
        ids = torch.arange(10).view(2, 5)
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        pruner.observe()
        masked = [unit.masked for unit in pruner.units]
        found.append([mask.get_buffer("importance") if mask.scores is None else mask.scores.grad for mask in masked])
    assert all(tensor is not None and bool(tensor.any()) for tensor in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("scorer", [name for name in SCORERS if SCORERS[name].source not in ("heads", "inputs")])
def test_pruner_prunes_bfloat16_weights_to_the_exact_count(scorer: str) -> None:
    model = two_layers().to(torch.bfloat16)
    pruner = attached(model, scorer=scorer, sparsity=0.75, selection="uniform")
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    model(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().sum().backward()
    pruner.observe()
    optimizer.step()
    pruner.step(1.0)
    pruner.bake()
    assert [weight.nonzeros for weight in summarize(model).weights] == [32, 32]
    assert model[0].weight.dtype == torch.bfloat16


def test_copy_of_a_model_in_training_saves_loads_and_is_independent() -> None:
    model = two_layers()
    pruner = attached(model, scorer="movement", sparsity=0.75)
    pruner.step(1.0)
    twin = copy.deepcopy(model)
    assert set(twin.state_dict()) == set(model.state_dict())
    other = two_layers()
    attached(other, scorer="movement", sparsity=0.5)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(hidden(twin[0]), hidden(other[0]))
    assert not torch.equal(hidden(model[0]), hidden(other[0]))
    pruner.bake()
    assert "0.weight_hidden" in twin.state_dict()


# -- when --------------------------------------------------------------------------------------------------------------


def test_pruner_renews_masks_every_so_many_steps_and_where_the_ramp_ends() -> None:
    schedule = {"name": "linear", "begin": 0.0, "end": 0.7, "every": 4}
    pruner = attached(two_layers(), sparsity=0.75, schedule=schedule)
    group = pruner.groups[0]
    assert [step for step in range(11) if group.due(step / 10, step)] == [0, 4, 7, 8, 10]
    assert group.due(0.3, None)


def test_pruner_keeps_its_masks_between_renewals() -> None:
    model = two_layers()
    pruner = attached(model, sparsity=0.75, schedule={"name": "linear", "begin": 0.0, "end": 0.8, "every": 4})
    counts = []
    for step in range(11):
        pruner.step(step / 10, step=step)
        counts.append(int(pruner.units[0].masked.mask.sum()))
    assert counts == [128, 128, 128, 128, 80, 80, 80, 80, 32, 32, 32]


@pytest.mark.parametrize("progress", [-0.1, 1.1, 50, math.nan, "0.5", None])
def test_pruner_refuses_progress_that_is_no_fraction(progress: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"`progress` must be a number in \[0, 1\], the fraction of training done, got "
    ):
        attached(two_layers(), sparsity=0.5).step(progress)


@pytest.mark.parametrize("step", [-1, 0.5, "1"])
def test_pruner_refuses_a_step_that_is_no_number_of_steps(step: Any) -> None:
    with pytest.raises(RecipeError, match=r"`step` must be an integer in \[0, inf\), got "):
        attached(two_layers(), sparsity=0.5).step(0.5, step)


@pytest.mark.parametrize("verb", ["observe", "penalty", "finish", "bake", "logs"])
def test_pruner_refuses_its_verbs_without_masks(verb: str) -> None:
    pruner = Pruner(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    for _ in range(2):
        with pytest.raises(SparsityError, match=r"has no masks on its model: call attach\(\) first"):
            getattr(pruner, verb)()
        with pytest.raises(SparsityError, match=r"call attach\(\) first"):
            pruner.step(0.5)
        pruner.attach().bake()  # and after it


def test_pruner_can_be_attached_again_after_bake() -> None:
    model = two_layers()
    pruner = attached(model, sparsity=0.75)
    pruner.step(1.0)
    pruner.bake()
    pruner.attach().step(1.0)
    assert len(pruner.units) == 2
    pruner.bake()
    assert summarize(model).nonzeros == 64


def test_attach_touches_nothing_when_a_weight_is_parametrised_already() -> None:
    model = two_layers()
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(RecipeError, match=r"'2\.weight' already has a mask or another parametrisation"):
        attached(model, sparsity=0.5)
    assert type(model[0]) is nn.Linear


def test_attach_refuses_weights_that_are_not_in_memory() -> None:
    with torch.device("meta"):
        model = two_layers()
    with pytest.raises(RecipeError, match=r"'0\.weight' is not in memory"):
        attached(model, sparsity=0.5)


def test_pruner_refuses_a_selection_beside_a_pattern_that_has_its_own() -> None:
    with pytest.raises(RecipeError, match=r"pattern 2:4 .* leave selection 'global' out"):
        Pruner(two_layers(), SparsityConfig(targets="*", pattern="2:4", selection="global"))


def test_finish_refuses_masks_that_were_not_renewed_at_the_end() -> None:
    pruner = attached(two_layers(), sparsity=0.75, schedule={"name": "linear", "begin": 0.0})
    pruner.step(0.4)
    with pytest.raises(SparsityError, match=r"sparsity 0\.75 was requested, but the masks are at 0\.3750"):
        pruner.finish()
    pruner.step(1.0)
    pruner.finish()


def test_finish_takes_what_a_threshold_with_a_value_leaves() -> None:
    pruner = attached(two_layers(), selection={"name": "threshold", "value": 1e9})
    pruner.step(1.0)
    pruner.finish()
    assert summarize(pruner.model).nonzeros == 2  # the highest of each weight


# -- what a loop needs -------------------------------------------------------------------------------------------------


def test_score_groups_have_their_own_rate_and_no_decay() -> None:
    model = two_layers()
    groups = [
        {"targets": "0", "sparsity": 0.5, "scorer": {"name": "movement", "learning_rate": 0.5}},
        {"targets": "2", "sparsity": 0.5, "scorer": {"name": "soft_movement", "learning_rate": 0.25}},
    ]
    pruner = Pruner(model, SparsityConfig(groups=groups)).attach()
    first, second = pruner.score_groups()
    assert (first["lr"], first["weight_decay"]) == (0.5, 0.0)
    assert (second["lr"], second["weight_decay"]) == (0.25, 0.0)
    assert [first["params"], second["params"]] == [[unit.masked.scores] for unit in pruner.units]


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = two_layers()
    pruner = attached(model, sparsity=0.5, scorer="movement")
    groups: Any = pruner.parameter_groups()
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert len(groups[0]["params"]) == 4


def test_penalty_is_zero_for_methods_without_one() -> None:
    pruner = attached(two_layers(), sparsity=0.5, scorer="movement")
    pruner.step(1.0)
    assert not pruner.has_penalty
    assert float(pruner.penalty()) == 0.0


def test_penalty_adds_up_over_groups() -> None:
    scorer = {"name": "soft_movement", "penalty_strength": 8.0}
    groups = [{"targets": name, "sparsity": 0.5, "scorer": scorer} for name in "02"]
    pruner = Pruner(two_layers(), SparsityConfig(groups=groups)).attach()
    for group in pruner.groups:
        cast(Any, group.scorer).adapt(None, 1.0)
    assert float(pruner.penalty().detach()) == pytest.approx(8.0)  # 8 * sigmoid(0), twice


def test_logs_of_one_group() -> None:
    pruner = attached(one_layer([[1.0, 2.0], [3.0, 4.0]]), sparsity=0.5, scorer="movement", selection="global")
    with torch.no_grad():
        scores_of(pruner).copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    pruner.step(1.0)
    assert pruner.logs() == {"sparsity": 0.5, "threshold": 3.0, "score_norm": 5.0}


def test_logs_of_several_groups_are_numbered() -> None:
    groups: list[Any] = [
        {"targets": "0", "sparsity": 0.5, "schedule": "constant"},
        {"targets": "2", "sparsity": 0.75, "schedule": "constant", "scorer": "soft_movement"},
    ]
    pruner = Pruner(two_layers(), SparsityConfig(groups=groups)).attach()
    pruner.step(1.0)
    logs = pruner.logs()
    assert (logs["sparsity"], logs["sparsity_0"], logs["sparsity_1"]) == (0.625, 0.5, 0.75)
    assert set(logs) == {
        "sparsity", "sparsity_0", "sparsity_1", "threshold_1", "penalty_strength_1", "score_norm_1", "penalty_1"
    }  # fmt: skip
    assert logs["threshold_1"] == 0.5  # sigmoid(0)
