"""What can go wrong between `attach` and `bake` is an error at the next step, with the name of the weight."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_sparse import Pruner, RecipeError, SparsityConfig, SparsityError, sparsify, summarize
from hf_sparse.config.sparsity import SCORERS
from hf_sparse.pruning.masked_weight import hidden
from tests.helpers.layers import attached, two_layers
from tests.helpers.training import RAMP, bert, sparse_trainer

TRAINED = [name for name in SCORERS if SCORERS[name].source not in ("heads", "inputs")]


def train_step(model: Any, pruner: Pruner, optimizer: Any, progress: float, x: torch.Tensor | None = None) -> None:
    x = torch.ones(2, 16) if x is None else x
    ((model(x) - 1.0).square().mean() + pruner.penalty()).backward()
    pruner.observe()
    optimizer.step()
    optimizer.zero_grad()
    pruner.step(progress)


# -- replaced layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["step", "finish"])
@pytest.mark.parametrize("replaced", ["layer", "parent", "mask"])
def test_layer_that_was_replaced_is_an_error_with_its_name(verb: str, replaced: str) -> None:
    model: Any = nn.Sequential(two_layers())
    pruner = attached(model, sparsity=0.75)
    pruner.step(1.0)
    if replaced == "layer":
        model[0][2] = nn.Linear(8, 16)
    elif replaced == "parent":
        model[0] = two_layers()
    else:
        nn.utils.parametrize.remove_parametrizations(model[0][2], "weight")
    name = r"0\.0" if replaced == "parent" else r"0\.2"
    with pytest.raises(SparsityError, match=rf"'{name}' was replaced after its mask was put on"):
        pruner.step(1.0) if verb == "step" else pruner.finish()


def test_layer_that_something_is_put_around_is_still_there() -> None:
    model = two_layers()
    pruner = attached(model, sparsity=0.75)
    model[0] = nn.Sequential(model[0])
    for _ in range(2):
        pruner.step(1.0)
    pruner.finish()


def test_layer_replaced_in_a_trainer_is_an_error(tmp_path: Path) -> None:
    class Replace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.bert.encoder.layer[1].intermediate.dense = nn.Linear(32, 64)

    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.8, schedule=RAMP), callbacks=[Replace()])
    with pytest.raises(SparsityError, match=r"'bert\.encoder\.layer\.1\.intermediate\.dense' was replaced"):
        trainer.train()


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["movement", "soft_movement"])
def test_optimizer_without_the_learned_scores_is_an_error_at_the_first_step(scorer: str) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = attached(model, scorer=scorer, sparsity=0.75)
    pruner.step(0.0)
    with pytest.raises(RecipeError, match=r"not the learned scores of 2 of 2 weights.*after Pruner\.attach"):
        train_step(model, pruner, optimizer, 0.5)


def test_optimizer_of_an_earlier_scorer_that_learns_nothing_is_fine() -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = attached(model, sparsity=0.75)
    train_step(model, pruner, optimizer, 1.0)
    pruner.bake()


def test_two_optimizers_share_weights_and_scores() -> None:
    model = two_layers()
    pruner = attached(model, scorer="movement", sparsity=0.75)
    groups: Any = pruner.score_groups()
    both = [torch.optim.SGD([p for g in pruner.parameter_groups()[:1] for p in g["params"]], 0.1)]  # type: ignore[attr-defined]
    both.append(torch.optim.SGD(groups))
    for progress in (0.5, 1.0):
        model(torch.ones(2, 16)).square().mean().backward()
        for optimizer in both:
            optimizer.step()
        pruner.step(progress)
    pruner.bake()


# -- NaN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", {"name": "linear", "begin": 0.0, "end": 0.5, "freeze": 0.6}])
@pytest.mark.parametrize("scorer", TRAINED)
def test_loss_that_is_nan_is_an_error_at_that_step(scorer: str, schedule: Any) -> None:
    model = two_layers()
    pruner = attached(model, scorer=scorer, sparsity=0.75, schedule=schedule)
    optimizer = torch.optim.AdamW(pruner.parameter_groups(), lr=0.01)
    for progress in (0.0, 0.7, 0.8):
        pruner.step(progress)
        train_step(model, pruner, optimizer, progress)
    with pytest.raises(SparsityError, match=r"NaN among the (scores|entries) of '0\.weight'"):
        train_step(model, pruner, optimizer, 0.9, torch.full((2, 16), math.nan))


@pytest.mark.parametrize("scorer", ["gradient", "taylor", "rigl"])
def test_step_that_a_loss_scaler_skips_is_no_error(scorer: str) -> None:
    model = two_layers()
    pruner = attached(model, scorer=scorer, sparsity=0.75)
    model(torch.full((2, 16), math.inf)).sum().backward()
    pruner.observe(1024.0)
    model.zero_grad()
    pruner.step(0.5)
    assert bool(torch.isfinite(hidden(model[0])).all())


@pytest.mark.parametrize("scorer", ["magnitude", "random", "set"])
@pytest.mark.parametrize("selection", ["uniform", "global"])
def test_one_shot_pruning_names_the_weight_with_nan(scorer: str, selection: str) -> None:
    model = two_layers()
    model[2].weight.data[3, 3] = math.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(SparsityError, match=r"NaN among the scores of '2\.weight', so nothing"):
        sparsify(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer, selection=selection))
    assert torch.equal(model[0].weight, before)


# -- frozen weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scorer", "warned"), [("magnitude", True), ("random", True), ("movement", False)])
def test_frozen_weights_that_are_pruned_are_warned_of(
    scorer: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = two_layers()
    model[2].weight.requires_grad_(False)
    caplog.set_level(logging.WARNING)
    logging.getLogger("hf_sparse.pruning.pruner").addHandler(caplog.handler)
    attached(model, scorer=scorer, sparsity=0.5)
    assert ("1 weights (first: 2.weight) are frozen (requires_grad=False)" in caplog.text) == warned
    caplog.clear()
    sparsify(two_layers().requires_grad_(False), SparsityConfig(targets="*", sparsity=0.5))  # nothing trains here
    assert not caplog.text


# -- copies, and several names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["movement", "magnitude", "gradient", "rigl"])
@pytest.mark.parametrize("end", ["bake", "detach"])
def test_copy_taken_in_training_works_after_the_original_has_ended(scorer: str, end: str) -> None:
    model = two_layers()
    pruner = attached(model, scorer=scorer, sparsity=0.75)
    pruner.step(1.0)
    twin, second = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.ones(2, 16)
    expected, keys = model(x).detach(), set(model.state_dict())
    getattr(pruner, end)()
    assert type(model[0]) is nn.Linear
    for other in (twin, second):
        assert torch.equal(other(x), expected)
        assert set(other.state_dict()) == keys
        other(x).sum().backward()
    attached(two_layers(), scorer=scorer, sparsity=0.5).model.load_state_dict(twin.state_dict())
    assert summarize(twin).sparsity == 0.75


@pytest.mark.parametrize("stored", [0, 1])
def test_module_under_two_names_resumes_as_it_was(tmp_path: Path, stored: int) -> None:
    def trainer(folder: Path) -> Any:
        model = bert()
        model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
        names = [name for name, _ in model.bert.encoder.layer[0].named_parameters()]
        first, second = (f"bert.encoder.layer.{index}" for index in (1 - stored, stored))
        model._tied_weights_keys = {f"{first}.{name}": f"{second}.{name}" for name in names}
        return sparse_trainer(folder, model=model, save_strategy="steps", save_steps=10)

    one, two = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    one.train()
    two.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    for (name, first), second in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_module_under_two_names_gives_the_same_tensors_for_both() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer})
    pruner = attached(model, sparsity=0.75, scorer="movement")
    pruner.step(1.0)
    for _ in range(2):
        state = model.state_dict()
        for suffix in ("", "_kept", "_hidden", "_scores"):
            assert state[f"a.weight{suffix}"].data_ptr() == state[f"b.weight{suffix}"].data_ptr()
    other = nn.ModuleDict({"a": (again := nn.Linear(8, 8)), "b": again})
    attached(other, sparsity=0.5, scorer="movement")
    other.load_state_dict(state)
    assert torch.equal(hidden(other["a"]), hidden(layer))
